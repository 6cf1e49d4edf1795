"""Stale data, as asynchronous trainers have it: the sampler is the policy of --lag updates ago.

    python results/llm/lag.py run --lag 4 --algo vcpo      then any flag of llm_rlvr.py
    python results/llm/lag.py record                       63 runs, one a core: writes lag.jsonl
    python results/llm/lag.py table                        prints the table of ../README.md

logp_old is the sampler's, so nothing is known without a forward and no group is at rest: its
scores are equal, but p is not p_old. Lag 0 is llm_rlvr.py to the bit. vcpo (arXiv 2602.17616) also
lowers the learning rate where few sequences count.
"""
import json
import os
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import llm_rlvr

FILE, LAGS, SEEDS = HERE / "lag.jsonl", (0, 4, 16), (50, 51, 52)
FLAGS = "--steps 300 --eval-every 50 --eval-set test --device cpu"
# learning rates: the better of 1e-2 and 2e-2 at lag 0, seed 1, held-out puzzles: lag_tune.txt
METHODS = {"tpo": 2e-2, "lpo": 1e-2, "grpo": 1e-2, "ppo": 1e-2, "ddpg": 2e-2, "vcpo": 1e-2,
           "oapl": 2e-2}


@dataclass(frozen=True)
class Config(llm_rlvr.Config):
    lag: int = llm_rlvr.flag(4, "updates between the policy that samples and the one trained", 0)


class Trainer(llm_rlvr.Trainer):
    """llm_rlvr.py with a stale sampler."""
    Config = Config

    def __init__(self, c):
        super().__init__(c)
        self.history = deque(maxlen=c.lag + 1)                  # of weights, the oldest first

    def rollout(self, items):
        self.history.append([p.detach().clone() for p in self.trained])
        self.load(self.history[0])
        rollout = super().rollout(items)
        self.load(self.history[-1])
        return rollout

    @torch.no_grad()
    def load(self, weights):
        for p, saved in zip(self.trained, weights):
            p.copy_(saved)

    def policy(self, rollout, epoch):
        return super().policy(rollout, epoch + self.c.lag)      # 0 only where the sampler's holds

    def slope(self, logp, rollout, scores, q, epoch):
        if self.c.algo == "vcpo":
            w = (logp - rollout.logp_old).sum(-1)[rollout.row].clamp(-20, 20).exp()       # (B, K)
            size = w.sum().square() / w.square().sum()          # effective, of B K sequences
            for optimizer, _ in self.optimizers:        # update sets lr, epochs multiply it
                optimizer.param_groups[0]["lr"] *= (size / w.numel()).clamp(max=1).sqrt().item()
        return super().slope(logp, rollout, scores, q, epoch + self.c.lag)

    def state(self):
        return super().state() | {"history": list(self.history)}

    def restore(self, saved):
        super().restore(saved)
        self.history.extend([x.to(self.device) for x in weights] for weights in saved["history"])


def read():
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    return [json.loads(line) for line in lines]


def record():
    """The runs that are not in the file yet, one per core at a time, one thread each."""
    def run(job):
        algo, lag, seed = job
        out = f"out/lag/{lag}"
        command = (f"python results/llm/lag.py run --lag {lag} --algo {algo} --seed {seed} "
                   f"--lr {METHODS[algo]} {FLAGS} --out {out}")
        subprocess.run([sys.executable, *command.split()[1:]], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        log = (ROOT / out / f"graph_color-{algo}-{seed}" / "log.jsonl").read_text(encoding="utf-8")
        *records, result = map(json.loads, log.splitlines())
        curve = [(e["step"], e["pass1"]) for e in records if e["kind"] == "eval"]
        with FILE.open("a", encoding="utf-8") as f:
            f.write(json.dumps(result | dict(lag=lag, command=command, curve=curve)) + "\n")

    done = {(r["algo"], r["lag"], r["seed"]) for r in read()}
    jobs = [(algo, lag, seed) for seed, lag, algo in product(SEEDS, LAGS, METHODS)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(run, [job for job in jobs if job not in done]))


def table():
    """pass@1 in % after the last update, mean and s.e. over seeds."""
    runs = read()
    print("| method |", *(f"lag {lag} |" for lag in LAGS), "\n|" + "---|" * (1 + len(LAGS)))
    for algo in METHODS:
        cells = []
        for lag in LAGS:
            x = [100 * r["pass1_after"] for r in runs if (r["algo"], r["lag"]) == (algo, lag)]
            cells.append(f"{mean(x):.1f} ± {stdev(x) / len(x) ** 0.5:.1f}" if len(x) > 1 else "-")
        print("|", " | ".join((algo, *cells)), "|")


if __name__ == "__main__":
    commands = {"run": lambda: llm_rlvr.main(sys.argv[2:], Trainer), "record": record,
                "table": table}
    name = "".join(sys.argv[1:2])
    commands.get(name, lambda: llm_rlvr.fail(f"{name!r}: allowed are {', '.join(commands)}"))()
