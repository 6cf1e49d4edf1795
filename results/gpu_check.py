"""Everything that only a GPU can show, in one command: python results/gpu_check.py

The CUDA tests; attention with and without cuDNN; first-epoch log-probs in bf16 against fp32; the default job with and without
--compile; one update at the size of Qwen3-1.7B, fully and by LoRA: memory, throughput, share of the memory bandwidth and of the matmul
rate; twenty seeds of seqtask.py at once. Prints one JSON line per check with the device's name. Not yet run on a GPU:
no number in this repository comes from it.
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import llm_rlvr  # noqa: E402
import seqtask  # noqa: E402


def show(check, **values):
    print(json.dumps({"check": check, "device": torch.cuda.get_device_name(), "torch": torch.__version__, **values}), flush=True)


if not torch.cuda.is_available():
    sys.exit("results/gpu_check.py: needs a CUDA device")

tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "cuda", str(ROOT / "test_tpo.py")], capture_output=True, text=True)
show("tests", passed=tests.returncode == 0, last_line=(tests.stdout or tests.stderr).strip().splitlines()[-1])


def attend(batches):
    """Forward and backward of attention for each number of rows."""
    for R in batches:
        q, k, v = (torch.randn(R, 40, heads, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (16, 8, 8))
        mask = torch.ones(R, 1, 40, 40, dtype=torch.bool, device="cuda").tril()
        llm_rlvr.attention(q, k, v, mask).sum().backward()
    torch.cuda.synchronize()


for cudnn in (False, True):                                                 # llm_rlvr.py leaves it out, for the time of new shapes
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    attend([32])                                                            # loads what is needed
    begun = time.perf_counter()
    attend(range(64, 84))
    show("attention of 20 new shapes", cudnn=cudnn, seconds=time.perf_counter() - begun)

t = llm_rlvr.Trainer(llm_rlvr.parse(["--device", "cuda"]))
tokens, valid = llm_rlvr.encode_prompts(t.encode, t.exam[:32], t.device)
with t.autocast():
    y, real, sampled = llm_rlvr.sample(t.model, tokens, valid, 16, 7, t.end, t.generator)


def log_policy():
    of = torch.arange(32, device=t.device).repeat_interleave(16)
    return llm_rlvr.token_logp(t.model, tokens, valid, y.flatten(0, 1), of).view(y.shape).masked_fill(~real, 0)


with t.autocast():
    trained = log_policy()
exact = log_policy()
show("log-probs", bf16_sampler_minus_trainer=(sampled - trained).abs().max().item(),
     bf16_minus_fp32=(trained - exact).abs().max().item())

for flags in ([], ["--compile"]):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(ROOT / "llm_rlvr.py"), "--algo", "tpo", "--device", "cuda", "--out", folder, *flags], check=True)
        records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    reached = next((r["seconds"] for r in records if r["kind"] == "eval" and r["pass1"] >= 0.9), None)
    show("default job " + " ".join(flags), seconds_to_90=reached, **{k: v for k, v in records[-1].items() if k != "kind"})


def rate(work, amount):
    """amount per second, of the last of three calls."""
    for _ in range(3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        torch.cuda.synchronize()
    return amount / (time.perf_counter() - begun)


a, big = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16), torch.empty(2**30, device="cuda")
matmul, copy = rate(lambda: a @ a, 2 * 8192**3), rate(lambda: big[:2**29].copy_(big[2**29:]), 4 * 2**30)
del a, big
show("machine", matmul_tflops=matmul / 1e12, copy_gb_s=copy / 1e9)
P, K, T, B = 64, 16, 512, 16
for flags in ([], ["--lora-rank", "32"]):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    t = llm_rlvr.Trainer(llm_rlvr.parse(["--layers", "28", "--width", "2048", "--heads", "16", "--kv-heads", "8", "--prompts", str(B), "--candidates",
                                         str(K), "--max-new-tokens", str(T), "--epochs", "1", "--lr", "1e-5", "--micro-tokens", "16384",
                                         "--recompute", "--eval-puzzles", "1", "--device", "cuda", *flags]))
    t.end, t.encode, n = -1, list, sum(p.numel() for p in t.model.parameters())                             # no completion ends
    rows = torch.randint(10, (B, P), generator=torch.Generator().manual_seed(0)).tolist()
    with mock.patch.multiple(llm_rlvr, puzzles=lambda *_: [(row, "") for row in rows], score=lambda *_: torch.rand(B, K)):
        t.update()
        t.tally = dict.fromkeys(t.tally, 0.0)
        t.update()
    cache = 2 * 28 * 8 * 128 * 2 * B * K * (P + T / 2)                                            # bytes of bf16, mean over steps
    show("1.7B update " + " ".join(flags), params=n, peak_gb=torch.cuda.max_memory_allocated() / 1e9, sample_tok_s=t.rate("sample"),
         train_tok_s=t.rate("train"), share_of_bandwidth=t.rate("sample") / (B * K) * (2 * n + cache) / copy,      # bf16 copies
         share_of_matmul=t.rate("train") * 6 * n / matmul)
    del t

for algo, reward, length in (("tpo", "terminal", 10), ("tpo_token", "bag", 10)):
    run = seqtask.Run("reverse_copy", reward, algo, length, 2, 8, 100, 4, 1.0, 1e-3, "prompts", 20, 50)
    show(f"seqtask {algo}", ms_per_episode_seed=seqtask.train(run, "cuda", False)[2] / 50 / 20 * 1e3)
