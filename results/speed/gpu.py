"""Everything that only a GPU can show: python results/speed/gpu.py [CHECK ...] > gpu.jsonl

The CUDA tests; attention with and without cuDNN; first-epoch log-probs in bf16 against fp32; a run
that is resumed, and one that is repeated; one update at the sizes of Qwen3-0.6B and 1.7B, fully and
by LoRA: memory, throughput, share of the memory bandwidth and of the matmul rate; transformers'
generate at 0.6B beside our sampler, if it is installed; twenty seeds of seqtask.py at once; the
default job at three seeds, and with --compile. CHECKs are names in main: all take about 8 minutes,
by a count of kernels. Prints one JSON line per check with the device's name, and goes on after one
that fails. Not yet run on a GPU: no number in this repository comes from it.
"""
import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
import llm_rlvr
import pretrained
import seqtask
from hf_folder import as_gpt

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 28, 16, 8, 128                  # Qwen3-0.6B and 1.7B
SIZES = {"0.6B": (1024, 3072), "1.7B": (2048, 6144)}                # width, of the MLP
VOCABULARY = 151_936
B, P, K, T = 16, 64, 16, 256                                        # an update of them


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
    t.warm_start()
    for t.step in range(100):                           # a trained policy: an even one shows less
        t.update()
    prompts = t.encode_prompts(t.eval_items[:32])
    y, sampled = t.sample(prompts, 16, generator=t.generator)
    prompt_of = torch.arange(32, device="cuda").repeat_interleave(16)

    def trained(token_logp):
        return token_logp(t.model, prompts, y.flatten(0, 1), prompt_of).view(y.shape)

    with torch.no_grad():
        exact, half = trained(llm_rlvr.token_logp), trained(t.token_logp)
    show("log-probs", bf16_sampler_minus_trainer=(sampled - half).abs().max().item(),
         bf16_minus_fp32=(half - exact).abs().max().item())


def resume():
    """A run of 100 updates, the same again, and that continued from its checkpoint at 50."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        c = llm_rlvr.Config(steps=100, device="cuda", out=folder)
        c.folder.mkdir(parents=True)
        whole, again = (llm_rlvr.Trainer(c).run()[0] for _ in range(2))
        (c.folder / "checkpoint.previous.pt").replace(c.folder / "checkpoint.pt")
        resumed, _ = llm_rlvr.Trainer(replace(c, resume=True)).run()
    rewards = [[r["reward"] for r in log if r["kind"] == "update"]
               for log in (whole, again, resumed)]
    for check, pair in ("repeat", rewards[:2]), ("resume", rewards[1:]):
        first = next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), None)
        show(check, updates=[len(r) for r in pair], first_reward_that_differs=first)


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
        """amount per second, of the fastest of thirty calls: a clock takes a while to rise."""
        seconds = []
        for _ in range(30):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return amount / min(seconds)

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    big = torch.empty(2**30, device="cuda")
    matmul = rate(lambda: a @ a, 2 * 8192**3)
    copy = rate(lambda: big[:2**29].copy_(big[2**29:]), 4 * 2**30)
    show("machine", matmul_tflops=matmul / 1e12, copy_gb_s=copy / 1e9)
    return matmul, copy


def large_update(size, matmul, copy, lora_rank):
    """The second of two updates; prompts and scores are given, and no completion ends."""
    class Trainer(llm_rlvr.Trainer):
        def build(self):
            width, hidden = SIZES[size]
            with torch.device("cuda"):                                      # on a CPU: 20 s each
                model = llm_rlvr.GPT(llm_rlvr.ModelConfig(
                    VOCABULARY, width, LAYERS, HEADS, KV_HEADS, HEAD_DIM, hidden))
                embedding = model.model.embed_tokens.weight
                embedding.data *= width ** -0.5         # else it repeats the last token: all equal
                model.lm_head.weight = embedding                            # as in Qwen3
                if lora_rank:
                    pretrained.add_lora(model, lora_rank, torch.bfloat16)
            return SimpleNamespace(encode=list, ends=[-1]), model

        make_optimizers = pretrained.Pretrained.make_optimizers             # AdamW alone

        def score(self, items, y):
            return torch.rand(B, K)

        def backward(self, rollout, slope):
            self.rows = len(rollout.y)
            super().backward(rollout, slope)

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
    how = f"by LoRA of rank {lora_rank}" if lora_rank else "fully"
    show(f"{size} update, {how}", params=params, rows=t.rows,
         peak_gb=torch.cuda.max_memory_allocated() / 1e9, sample_tok_s=sampled, train_tok_s=trained,
         share_of_bandwidth=sampled / (B * K) * (2 * params + cache) / copy,
         share_of_matmul=trained * (4 if lora_rank else 6) * params / matmul)    # W is frozen


def generate():
    """Sampling by transformers and by us with the same random weights, in bf16."""
    import transformers
    width, hidden = SIZES["0.6B"]
    with torch.device("cuda"):
        library = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=hidden,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM, tie_word_embeddings=True)).to(torch.bfloat16).eval()
    prompts = torch.randint(10, (B, P), device="cuda")
    ours, ends = as_gpt(library).to("cuda"), torch.tensor([-1], device="cuda")
    ours.inv_freq = ours.inv_freq.float()               # as in recipes/pretrained.py
    for module in ours.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.float()
    generator = torch.Generator("cuda").manual_seed(0)

    def rate(cudnn, work):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)     # off in llm_rlvr.py, on by default
        for _ in range(2):                                          # the first loads what is needed
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                work()
            torch.cuda.synchronize()
        return B * K * T / (time.perf_counter() - start)

    show("sampling at 0.6B, tok/s",
         ours=rate(False, lambda: llm_rlvr.sample(ours, prompts, K, T, ends, generator)),
         generate=rate(True, lambda: library.generate(
             prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
             num_return_sequences=K, min_new_tokens=T, max_new_tokens=T, pad_token_id=0)))


def seeds_at_once(algo, reward):
    run = seqtask.Run("reverse_copy", reward, algo, 10, 2, 8, 100, 4, 1.0, 1e-3, "prompts",
                      seeds=20, episodes=50)
    with contextlib.redirect_stdout(sys.stderr):
        seconds = seqtask.train(run, "cuda", False)[2]
    show(f"seqtask {algo}", ms_per_episode_seed=1e3 * seconds / run.episodes / run.seeds)


def main():
    checks = {"tests": [tests], "cudnn": [cudnn], "log-probs": [log_probs], "resume": [resume],
              "updates": [lambda size=size, rank=rank: large_update(size, *rates, rank)
                          for size in SIZES for rank in (0, 32)],
              "generate": [generate],
              "seqtask": [partial(seeds_at_once, "tpo", "terminal"),
                          partial(seeds_at_once, "tpo_token", "bag")],
              "default": [partial(default_job, "--seed", str(seed)) for seed in range(3)],
              "compiled": [partial(default_job, "--compile", "--seed", str(seed))
                           for seed in range(3)]}
    names = sys.argv[1:] or checks
    if not set(names) <= set(checks):
        sys.exit(f"results/speed/gpu.py {' '.join(names)}: allowed are {', '.join(checks)}")
    if not torch.cuda.is_available():
        sys.exit("results/speed/gpu.py: needs a CUDA device")
    rates = machine()
    for name in names:
        for check in checks[name]:
            try:
                check()
            except Exception as error:                  # borrowed minutes: the rest still counts
                show(name, failed=f"{error!r:.300}")


if __name__ == "__main__":
    main()
