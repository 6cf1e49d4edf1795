"""Stale data, as asynchronous trainers have it: the sampler is the policy of --lag updates ago.

    python results/llm/lag.py run --lag 4 --algo vcpo      then any flag of llm_rlvr.py
    python results/llm/lag.py record                       63 runs, one a core: writes lag.jsonl
    python results/llm/lag.py table                        prints the table of ../README.md

logp_old is the sampler's, so nothing is known without a forward and no group is at rest: its
scores are equal, but p is not p_old. Lag 0 is llm_rlvr.py to the bit, but for vcpo (arXiv
2602.17616), which lowers the learning rate of a step where few sequences count.
"""
import sys
from collections import deque
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
import llm_rlvr
from compare import STUDIES, best, percent, read, run_all

FILE, LAGS, SEEDS = HERE / "lag.jsonl", (0, 4, 16), (50, 51, 52)
# name in compare.py: each method has the setting that was best there, without lag
METHODS = {name: {"algo": name} for name in ("lpo", "grpo", "ppo", "vcpo", "oapl")}
METHODS |= {"tpo": {"algo": "tpo", "anchor": 0.25}, "ddpg": {"algo": "dg"}}


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

    def current_logp(self, rollout, epoch):
        return super().current_logp(rollout, epoch + self.c.lag)    # epoch 0 only without lag

    def slope(self, logp, rollout, scores, q, epoch):
        if self.c.algo == "vcpo":
            w = (logp - rollout.logp_old).sum(-1)[rollout.row].clamp(-20, 20).exp()       # (B, K)
            size = w.sum().square() / w.square().sum()          # effective, of B K sequences
            if epoch == 0:
                self.rates = [optimizer.param_groups[0]["lr"] for optimizer, _ in self.optimizers]
            for (optimizer, _), rate in zip(self.optimizers, self.rates):
                factor = (size / w.numel()).clamp(max=1).sqrt().item()
                optimizer.param_groups[0]["lr"] = rate * factor
        return super().slope(logp, rollout, scores, q, epoch + self.c.lag)

    def state(self):
        return super().state() | {"history": list(self.history)}

    def restore(self, saved):
        super().restore(saved)
        self.history.extend([x.to(self.device) for x in weights] for weights in saved["history"])


def record():
    jobs = []
    for seed, lag, algo in product(SEEDS, LAGS, METHODS):
        [setting] = best(METHODS[algo])
        jobs.append({**METHODS[algo], "algo": algo, "lag": lag, **setting,
                     **STUDIES["graph_color"].common, "seed": seed, "eval-set": "test"})
    run_all(FILE, jobs, "results/llm/lag.py run")


def table():
    """pass@1 in % after the last update, mean and s.e. over seeds, and the mean of greedy."""
    columns = [*(f"lag {lag}" for lag in LAGS), f"greedy at lag {LAGS[-1]}"]
    print("|", " | ".join(["method", *columns]), "|\n|" + "---|" * (1 + len(columns)))
    recorded = read(FILE)
    for algo in METHODS:
        runs = [[r for r in recorded if (r["algo"], r["flags"]["lag"]) == (algo, lag)]
                for lag in LAGS]
        print("|", " | ".join([algo, *(percent([r["pass1_after"] for r in same]) for same in runs),
                               f"{100 * mean(r['greedy_after'] for r in runs[-1]):.1f}"]), "|")


if __name__ == "__main__":
    commands = {"run": lambda: llm_rlvr.main(sys.argv[2:], Trainer), "record": record,
                "table": table}
    name = "".join(sys.argv[1:2])
    commands.get(name, lambda: llm_rlvr.fail(f"{name!r}: allowed are {', '.join(commands)}"))()
