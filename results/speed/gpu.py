"""Everything that only a GPU can show, in one command: python results/speed/gpu.py

The CUDA tests; attention with and without cuDNN; first-epoch log-probs in bf16 against fp32; the
default job with and without --compile; one update at the size of Qwen3-1.7B, fully and by LoRA:
memory, throughput, share of the memory bandwidth and of the matmul rate; twenty seeds of seqtask.py
at once. Prints one JSON line per check with the device's name. Not yet run on a GPU: no number in
this repository comes from it.
"""
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
import llm_rlvr
import pretrained
import seqtask

LAYERS, KV_HEADS, HEAD_DIM = 28, 8, 128                             # Qwen3-1.7B
B, P, K, T = 16, 64, 16, 512                                        # an update of it


def show(check, **values):
    device, version = torch.cuda.get_device_name(), torch.__version__
    print(json.dumps({"check": check, "device": device, "torch": version, **values}), flush=True)


def tests():
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", str(ROOT / "test_tpo.py")]
    run = subprocess.run(command, capture_output=True, text=True)
    last_line = (run.stdout or run.stderr).strip().splitlines()[-1]
    show("tests", passed=run.returncode == 0, last_line=last_line)


def cudnn():
    """llm_rlvr.py leaves cuDNN's attention out, for the time that each new shape takes."""
    def attend(N):
        q, k, v = (torch.randn(N, 40, heads, 128, device="cuda", dtype=torch.bfloat16,
                               requires_grad=True) for heads in (16, 8, 8))
        mask = torch.ones(N, 1, 40, 40, dtype=torch.bool, device="cuda").tril()
        llm_rlvr.attention(q, k, v, mask).sum().backward()

    for on in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(on)
        attend(32)                                                  # loads what is needed
        torch.cuda.synchronize()
        start = time.perf_counter()
        for N in range(64, 84):
            attend(N)
        torch.cuda.synchronize()
        show("attention of 20 new shapes", cudnn=on, seconds=time.perf_counter() - start)


def log_probs():
    t = llm_rlvr.Trainer(llm_rlvr.Config(device="cuda"))
    prompts = t.encode_prompts(t.eval_items[:32])
    y, sampled = t.sample(prompts, 16, generator=t.generator)
    prompt_of = torch.arange(32, device="cuda").repeat_interleave(16)

    def trained(token_logp):
        return token_logp(t.model, prompts, y.flatten(0, 1), prompt_of).view(y.shape)

    with torch.no_grad():
        exact, half = trained(llm_rlvr.token_logp), trained(t.token_logp)
    show("log-probs", bf16_sampler_minus_trainer=(sampled - half).abs().max().item(),
         bf16_minus_fp32=(half - exact).abs().max().item())


def default_job(*flags):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "llm_rlvr.py", "--algo", "tpo", "--device", "cuda",
                        "--out", folder, *flags], check=True, stdout=sys.stderr)
        lines = next(Path(folder).glob("*/log.jsonl")).read_text(encoding="utf-8").splitlines()
    *records, result = map(json.loads, lines)
    reached = [r["seconds"] for r in records if r["kind"] == "eval" and r["pass1"] >= 0.9]
    result.pop("kind")
    show(" ".join(["default job", *flags]), seconds_to_90=min(reached, default=None), **result)


def machine():
    """FLOP/s of a large matrix product and bytes/s of a large copy."""
    def rate(work, amount):
        """amount per second, of the last of three calls."""
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
        return amount / (time.perf_counter() - start)

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    big = torch.empty(2**30, device="cuda")
    matmul = rate(lambda: a @ a, 2 * 8192**3)
    copy = rate(lambda: big[:2**29].copy_(big[2**29:]), 4 * 2**30)
    show("machine", matmul_tflops=matmul / 1e12, copy_gb_s=copy / 1e9)
    return matmul, copy


def large_update(matmul, copy, lora_rank):
    """The second of two updates; prompts and scores are given, and no completion ends."""
    class Trainer(llm_rlvr.Trainer):
        def build(self):
            model = llm_rlvr.GPT(llm_rlvr.ModelConfig(
                21, 2048, LAYERS, heads=16, kv_heads=KV_HEADS, head_dim=HEAD_DIM, hidden=6144))
            if lora_rank:
                pretrained.add_lora(model, lora_rank, torch.bfloat16)
            return SimpleNamespace(encode=list, ends=[-1]), model

        make_optimizers = pretrained.Pretrained.make_optimizers             # AdamW alone

        def score(self, items, y):
            return torch.rand(B, K)

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    t = Trainer(llm_rlvr.Config(
        prompts=B, candidates=K, max_new_tokens=T, epochs=1, lr=1e-5, micro_tokens=16384,
        recompute=True, eval_puzzles=1, device="cuda"))
    params = sum(p.numel() for p in t.model.parameters())
    rows = torch.randint(10, (B, P), generator=torch.Generator().manual_seed(0)).tolist()
    with mock.patch.object(llm_rlvr, "puzzles", lambda *_: [(row, "") for row in rows]):
        t.update()
        metrics = t.update()
    sampled, trained = metrics["sample_tok_s"], metrics["train_tok_s"]
    # a step of sampling reads the bf16 weights and the bf16 cache, which is half full on average
    cache = 2 * LAYERS * KV_HEADS * HEAD_DIM * 2 * B * K * (P + T / 2)
    show(f"1.7B update, LoRA rank {lora_rank}" if lora_rank else "1.7B update", params=params,
         peak_gb=torch.cuda.max_memory_allocated() / 1e9, sample_tok_s=sampled, train_tok_s=trained,
         share_of_bandwidth=sampled / (B * K) * (2 * params + cache) / copy,
         share_of_matmul=trained * (4 if lora_rank else 6) * params / matmul)    # W is frozen


def seeds_at_once(algo, reward):
    run = seqtask.Run("reverse_copy", reward, algo, 10, 2, 8, 100, 4, 1.0, 1e-3, "prompts",
                      seeds=20, episodes=50)
    seconds = seqtask.train(run, "cuda", False)[2]
    show(f"seqtask {algo}", ms_per_episode_seed=1e3 * seconds / run.episodes / run.seeds)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("results/speed/gpu.py: needs a CUDA device")
    tests()
    cudnn()
    log_probs()
    default_job()
    default_job("--compile")
    rates = machine()
    large_update(*rates, lora_rank=0)
    large_update(*rates, lora_rank=32)
    seeds_at_once("tpo", "terminal")
    seeds_at_once("tpo_token", "bag")
