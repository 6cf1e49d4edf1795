"""Which loss, which alpha? All tuned alike, then five other seeds on test puzzles.

    python results/llm/compare.py tune       seven settings each, the two best again: tune.jsonl
    python results/llm/compare.py record     each at its best setting, 5 seeds: compare.jsonl
    python results/llm/compare.py table      the table of ../README.md, then TUNED of llm_rlvr.py
    python results/llm/compare.py run --scale 1      then any flag of llm_rlvr.py: see ScaleFree
    python results/llm/compare.py edges out/graph_color-tpo-50 ...     a run's puzzles by size
One run per CPU core at a time, one thread each. A run that is already in the file is not repeated.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, median, stdev

import torch

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import llm_rlvr
from baselines import METHODS

TUNE, FILE = HERE / "tune.jsonl", HERE / "compare.jsonl"
# what is compared: on fresh data ddpg is dg; lpo is tpo at alpha = 0
ENTRIES = [{"algo": name} for name in METHODS if name not in ("tpo", "ddpg")]
ENTRIES += [{"algo": "tpo", "anchor": alpha} for alpha in (0.1, 0.25, 0.5, 1)]
ENTRIES += [{"algo": "tpo", "scale": 1}]
COMMON = {"task": "graph_color", "layers": 2, "steps": 300, "eval-every": 25, "device": "cpu"}
TUNING, SEEDS = (1, 2), (50, 51, 52, 53, 54)
GRID = [{"lr": lr, "epochs": epochs}
        for lr, epochs in ((1e-2, 1), (2e-2, 1), (4e-2, 1), (5e-3, 2), (1e-2, 2), (2e-2, 2))]
# a seventh setting of a method's own: the first of these flags that it takes, else a lower rate
OWN = [("beta", {"lr": 2e-2, "epochs": 2, "beta": 0.2}),
       ("clip", {"lr": 2e-2, "epochs": 2, "clip": 0.4}),
       ("eta", {"lr": 2e-2, "epochs": 1, "eta": 0.5})]
NAMED = "algo", "anchor", "scale"                 # the flags that make an entry; these a setting:
TUNABLE = "lr", "epochs", "beta", "clip", "eta"
KEPT = "step", "seconds", "pass1", "pass4", "greedy", "reward", "kl", "informative", "entropy"


@dataclass(frozen=True)
class Config(llm_rlvr.Config):
    scale: float = llm_rlvr.flag(1.0, "nats: a group's alpha is min(1, scale / sd(l_old))", 0)


class ScaleFree(llm_rlvr.Trainer):
    """llm_rlvr.py with an alpha for each group, so that the anchor's logits have an sd of scale."""
    Config = Config

    def rollout(self, items):
        rollout = super().rollout(items)
        sd = rollout.logp_old[rollout.row].sum(-1).std(-1, correction=0, keepdim=True)     # (B, 1)
        self.set_alpha((self.c.scale / sd).clamp(max=1))
        return rollout

    def record_result(self, seconds):
        self.set_alpha(self.c.scale)                    # of a group with an sd of 1: for the line
        return super().record_result(seconds)

    def set_alpha(self, alpha):
        object.__setattr__(self.c, "anchor", alpha)


def read(path):
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def run_all(path, jobs, script="llm_rlvr.py"):
    """Append to path each job, a dict of flags, that is not there yet: its flags, result, curve."""
    def run(job):
        out = ROOT / "out" / path.stem / "-".join(f"{name}{value}" for name, value in job.items())
        flags = " ".join(f"--{name} {value}" for name, value in job.items())
        command = f"python {script} {flags}"
        if "scale" in job:
            command = f"python results/llm/compare.py run {flags}"
        subprocess.run([sys.executable, *command.split()[1:], "--out", str(out)], cwd=ROOT,
                       check=True, stdout=subprocess.DEVNULL,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        *records, result = read(next(out.glob("*/log.jsonl")))
        curve = [{k: r[k] for k in KEPT if k in r} for r in records if r["kind"] == "eval"]
        record = result | dict(flags=job, command=command, curve=curve)
        with path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
        print(f"{command}: {result['pass1_after']:.3f} in {result['seconds']:.0f} s", flush=True)

    done = [r["flags"] for r in read(path)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(run, [job for job in jobs if job not in done]))


def settings(entry):
    own = [setting for name, setting in OWN if name in METHODS[entry["algo"]].takes]
    return GRID + (own or [{"lr": 5e-3, "epochs": 1}])[:1]


def flags(entry, setting, seed, eval_set):
    return {**entry, **setting, **COMMON, "seed": seed, "eval-set": eval_set}


def part(flags, names):
    return {name: flags[name] for name in names if name in flags}


def best(entry, seeds, n=1):
    """The n settings with the highest pass@1, averaged over the seeds, that all seeds have run."""
    found = {}
    for r in read(TUNE):
        if part(r["flags"], NAMED) == entry:
            setting = json.dumps(part(r["flags"], TUNABLE))
            found.setdefault(setting, {})[r["seed"]] = r["pass1_after"]
    value = {setting: mean(by_seed[seed] for seed in seeds)
             for setting, by_seed in found.items() if by_seed.keys() >= set(seeds)}
    return [json.loads(s) for s in sorted(value, key=value.get, reverse=True)[:n]]


def tune():
    """All settings with one seed, the two best of each entry with the other seed as well."""
    run_all(TUNE, [flags(entry, setting, TUNING[0], "heldout")
                   for entry in ENTRIES for setting in settings(entry)])
    run_all(TUNE, [flags(entry, setting, TUNING[1], "heldout")
                   for entry in ENTRIES for setting in best(entry, TUNING[:1], 2)])


def record():
    run_all(FILE, [flags(entry, setting, seed, "test")
                   for seed in SEEDS for entry in ENTRIES for setting in best(entry, TUNING)])


def chosen(entry):
    """The recorded runs of an entry at its best setting."""
    return [r for r in read(FILE) if part(r["flags"], NAMED) == entry
            and [part(r["flags"], TUNABLE)] == best(entry, TUNING)]


def percent(values):
    return f"{100 * mean(values):.1f} ± {100 * stdev(values) / len(values)**0.5:.1f}"


def first(curve, pass1, key):
    """key of the first evaluation with this pass@1, infinity if there is none."""
    return next((e[key] for e in curve if e["pass1"] >= pass1), float("inf"))


def table():
    """Mean ± s.e. over the seeds, the best first; of updates and seconds to a level the median.

    The difference is to TPO with the same seed and puzzles; a seed has collapsed if less than 2%
    of its groups are informative at the end: it learns no more.
    """
    columns = ["loss", "setting", "pass@1", "TPO less this", "greedy", "pass@4", "collapsed",
               "updates to 50%", "to 80%", "seconds to 50%", "to 80%", "seconds"]
    peer = {r["seed"]: r["pass1_after"] for r in chosen({"algo": "tpo", "anchor": 0.25})}
    print("|", " | ".join(columns), "|\n|" + "---|" * len(columns))
    rows = []
    for entry in ENTRIES:
        runs = chosen(entry)
        if len(runs) < len(SEEDS):
            print(f"{entry}: {len(runs)} of {len(SEEDS)} runs", file=sys.stderr)
            continue
        curves, [setting] = [r["curve"] for r in runs], best(entry, TUNING)
        reached = [median(first(curve, level, key) for curve in curves)
                   for key in ("step", "seconds") for level in (0.5, 0.8)]
        name, *alpha = (value if name == "algo" else f"{name} {value:g}"
                        for name, value in entry.items())
        rows.append([mean(c[-1]["pass1"] for c in curves), " ".join((name, *alpha)),
                     ", ".join(f"{k} {v:g}" for k, v in setting.items()),
                     percent([r["pass1_after"] for r in runs]),
                     percent([peer[r["seed"]] - r["pass1_after"] for r in runs]),
                     *(percent([c[-1][key] for c in curves]) for key in ("greedy", "pass4")),
                     f"{sum(c[-1]['informative'] < 0.02 for c in curves)}",
                     *("-" if x == float("inf") else f"{x:.0f}" for x in reached),
                     f"{mean(c[-1]['seconds'] for c in curves):.0f}"])
    for _, *row in sorted(rows, reverse=True):
        print("|", " | ".join(row), "|")
    for entry in ENTRIES:
        print(entry, best(entry, TUNING))


def edges(folders):
    """How a graph_color run's policy does on its evaluation puzzles of 4 to 8 edges."""
    for folder in folders:
        saved = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)
        settings = part(saved["records"][0], [f.name for f in fields(llm_rlvr.Config)])
        run = llm_rlvr.Trainer(llm_rlvr.Config(**settings))
        run.restore(saved)
        items = run.eval_items
        for n in range(4, 9):
            run.eval_items = [(text, key) for text, key in items if len(key) == n]
            result = run.evaluate()
            print(f"{folder}: {len(run.eval_items)} puzzles of {n} edges:",
                  *(f"{name} {result[name]:.1%}" for name in ("pass1", "greedy", "pass4")))


if __name__ == "__main__":
    commands = {"run": lambda: llm_rlvr.main(sys.argv[2:], ScaleFree), "tune": tune,
                "record": record, "table": table, "edges": lambda: edges(sys.argv[2:])}
    name = "".join(sys.argv[1:2])
    if name not in commands:
        raise SystemExit(f"compare.py {name}: allowed are {', '.join(commands)}")
    commands[name]()
