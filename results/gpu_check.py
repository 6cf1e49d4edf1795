"""Everything about llm_rlvr.py that only a GPU can show, in one command: python results/gpu_check.py

The CUDA tests; first-epoch log-probs in bf16 against fp32; the default job with and without --compile. Prints one JSON line
per check with the device's name. Not yet run on a GPU: no number in this repository comes from it.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import llm_rlvr  # noqa: E402


def show(check, **values):
    print(json.dumps({"check": check, "device": torch.cuda.get_device_name(), "torch": torch.__version__, **values}), flush=True)


if not torch.cuda.is_available():
    sys.exit("results/gpu_check.py: needs a CUDA device")

tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "cuda", str(ROOT / "test_tpo.py")], capture_output=True, text=True)
show("tests", passed=tests.returncode == 0, last_line=tests.stdout.strip().splitlines()[-1])

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
