"""Which loss, which alpha? All tuned alike, then five other seeds on test puzzles.

    python results/llm/compare.py tune [STUDY]       every setting of every entry: STUDY_tune.jsonl
    python results/llm/compare.py record [STUDY]     each at its best setting, 5 seeds: STUDY.jsonl
    python results/llm/compare.py table [STUDY]      the table of ../README.md, then the settings
    python results/llm/compare.py run --scale 1      then any flag of llm_rlvr.py: see variant
    python results/llm/compare.py edges out/graph_color-tpo-50 ...     a run's puzzles by size

STUDY is graph_color (the default: its files are tune.jsonl and compare.jsonl, its best settings
are TUNED of llm_rlvr.py), knights_knaves or aloud. One run per CPU core at a time, one thread
each. A run that is already in the file is not repeated.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from operator import itemgetter
from pathlib import Path
from statistics import mean, median, stdev
from typing import Callable, NamedTuple

import torch

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import llm_rlvr
from baselines import METHODS

# what is compared: on fresh data ddpg is dg; lpo is tpo at alpha = 0
ENTRIES = [{"algo": name} for name in METHODS if name not in ("tpo", "ddpg")]
ALPHAS = [{"algo": "tpo", "anchor": alpha} for alpha in (0.1, 0.25, 0.5, 1)]
ALPHAS += [{"algo": "tpo", "scale": 1}]
GRID = [{"lr": lr, "epochs": epochs}
        for lr, epochs in ((1e-2, 1), (2e-2, 1), (4e-2, 1), (5e-3, 2), (1e-2, 2), (2e-2, 2))]
# a seventh setting of a method's own: the first of these flags that it takes, else a lower rate
OWN = [("beta", {"lr": 2e-2, "epochs": 2, "beta": 0.2}),
       ("clip", {"lr": 2e-2, "epochs": 2, "clip": 0.4}),
       ("eta", {"lr": 2e-2, "epochs": 1, "eta": 0.5})]
NAMED = "algo", "anchor", "scale", "token-mean"   # the flags that make an entry; these a setting:
TUNABLE = "lr", "epochs", "beta", "clip", "eta"
KEPT = "step", "seconds", "pass1", "pass4", "greedy", "reward", "kl", "informative", "entropy"


def seven(entry):
    own = [setting for name, setting in OWN if name in METHODS[entry["algo"]].takes]
    return GRID + (own or [{"lr": 5e-3, "epochs": 1}])[:1]


def five(entry):
    return [{"lr": lr, "epochs": epochs}
            for lr, epochs in ((5e-3, 1), (2e-2, 1), (5e-3, 2), (1e-2, 2), (2e-2, 2))]


class Study(NamedTuple):
    tune: str                   # files in this folder
    file: str
    common: dict                # flags of every run
    entries: list
    settings: Callable          # of an entry: tried with the first of the seeds ...
    tuning: tuple               # ... and the two best with the others
    levels: tuple = ()          # of pass@1, whose times the table has
    peer: dict = {"algo": "tpo", "anchor": 0.25}        # the table has the difference to it
    seeds: tuple = (50, 51, 52, 53, 54)
    script: str = ""            # that runs it, if it is neither llm_rlvr.py nor this file's run
    series: tuple = ()          # metrics of which each update's value is kept
    value: Callable = itemgetter("pass1_after")         # of a run: the best setting has the most


SMALL = {"layers": 2, "device": "cpu"}
STUDIES = {
    "graph_color": Study("tune.jsonl", "compare.jsonl",
                         {"task": "graph_color", **SMALL, "steps": 300, "eval-every": 25},
                         ENTRIES + ALPHAS, seven, (1, 2), (0.5, 0.8)),
    "knights_knaves": Study("knights_knaves_tune.jsonl", "knights_knaves.jsonl",
                            {"task": "knights_knaves", **SMALL, "prompts": 16, "steps": 200,
                             "eval-every": 50}, ENTRIES + ALPHAS, five, (1,), (0.3, 0.4)),
    "aloud": Study("aloud_tune.jsonl", "aloud.jsonl",
                   {"task": "aloud", **SMALL, "prompts": 8, "steps": 200, "eval-every": 50},
                   [{"algo": "lpo"}, *ALPHAS, {"algo": "tpo", "anchor": 1, "token-mean": True},
                    {"algo": "lpo_rev"}, {"algo": "grpo"}], five, (1, 2), (0.2, 0.4),
                   {"algo": "lpo"})}


class Aloud(llm_rlvr.GraphColor):
    """Graph coloring after 0 to 24 words of thinking aloud, which the reward does not look at.

    Lengths differ within a group and so, by tens of nats, do the log-probs of whole completions,
    as with an LLM.
    """
    defaults = {"max_new_tokens": 34}
    words = "hm well let me see now if this one is there then maybe that or not".split()

    def check(self, key, answer):
        _, found, colors = answer.partition(" so")
        return super().check(key, colors) if found else 0.0

    def guess(self, rng, key):
        often = [1 / (i + 1) for i in range(len(self.words))]                           # Zipf
        aloud = rng.choices(self.words, often, k=rng.randrange(25))
        return "".join(" " + word for word in aloud) + " so" + super().guess(rng, key)


def length(y):
    return (y >= 0).sum(-1, keepdim=True)                                                # (..., 1)


def variant(base):
    """The trainer base with two more flags; without them it is base to the bit."""
    @dataclass(frozen=True)
    class Config(base.Config):
        scale: float = llm_rlvr.flag(0.0, "nats: a group's alpha is min(1, scale / sd(l_old)), so "
                                     "that its anchor's logits have at most that sd; 0: --anchor",
                                     0)
        token_mean: bool = llm_rlvr.flag(False, "l, of a loss on groups, is the mean over a "
                                         "completion's tokens, not the sum: another fixed point; "
                                         "entropy is then not logged right")

    class Variant(base):
        def __init__(self, c):
            super().__init__(c)
            if c.token_mean:
                sample = self.sample

                def sample_means(*args, **flags):
                    y, logp = sample(*args, **flags)
                    return y, logp / length(y)
                self.sample = sample_means

        def rows_logp(self, rollout, rows):
            logp = super().rows_logp(rollout, rows)
            return logp / length(rollout.y[rows]) if self.c.token_mean else logp

        def rollout(self, items):
            rollout = super().rollout(items)
            if self.c.scale:
                l_old = rollout.logp_old[rollout.row].sum(-1)                             # (B, K)
                sd = l_old.std(-1, correction=0, keepdim=True)                            # (B, 1)
                self.anchor = (self.c.scale / sd).clamp(max=1)                            # (B, 1)
            return rollout

        def record_result(self, seconds):
            if self.c.scale:            # for the line: alpha of a group with an sd of 1
                object.__setattr__(self.c, "anchor", self.c.scale)
            return super().record_result(seconds)

    Variant.__doc__, Variant.Config = base.__doc__, Config
    return Variant


def read(path):
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def run_all(path, jobs, script="", series=()):
    """Append to path each job, a dict of flags, that is not there yet: its flags, result, curve."""
    def run(job):
        out = ROOT / "out" / path.stem / "-".join(f"{name}{value}" for name, value in job.items())
        flags = " ".join(f"--{name}" if value is True else f"--{name} {value}"
                         for name, value in job.items())
        ours = job.keys() & {"scale", "token-mean"} or job["task"] == "aloud"
        command = f"python {script or ('results/llm/compare.py run' if ours else 'llm_rlvr.py')} "
        command += flags
        subprocess.run([sys.executable, *command.split()[1:], "--out", str(out)], cwd=ROOT,
                       check=True, stdout=subprocess.DEVNULL,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
        *records, result = read(next(out.glob("*/log.jsonl")))
        curve = [{k: r[k] for k in KEPT if k in r} for r in records if r["kind"] == "eval"]
        updates = [r for r in records if r["kind"] == "update"]
        record = result | dict(flags=job, command=command, curve=curve)
        record |= {name: [r[name] for r in updates] for name in series}
        with path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
        print(f"{command}: {result['pass1_after']:.3f} in {result['seconds']:.0f} s", flush=True)

    done = [r["flags"] for r in read(path)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(run, [job for job in jobs if job not in done]))


def part(flags, names):
    return {name: flags[name] for name in names if name in flags}


def best(entry, study=STUDIES["graph_color"], n=1, seeds=None):
    """The n settings with the highest value, averaged over the seeds, that all seeds have run."""
    found, seeds = {}, seeds or study.tuning
    for r in read(HERE / study.tune):
        if part(r["flags"], NAMED) == entry:
            setting = json.dumps(part(r["flags"], TUNABLE))
            found.setdefault(setting, {})[r["seed"]] = study.value(r)
    value = {setting: mean(by_seed[seed] for seed in seeds)
             for setting, by_seed in found.items() if by_seed.keys() >= set(seeds)}
    return [json.loads(s) for s in sorted(value, key=value.get, reverse=True)[:n]]


def run_study(study, path, seed, eval_set, settings):
    """settings: of an entry, a list."""
    run_all(path, [{**entry, **setting, **study.common, "seed": seed, "eval-set": eval_set}
                   for entry in study.entries for setting in settings(entry)],
            study.script, study.series)


def tune(study):
    first, *others = study.tuning
    run_study(study, HERE / study.tune, first, "heldout", study.settings)
    for seed in others:
        run_study(study, HERE / study.tune, seed, "heldout",
                  lambda entry: best(entry, study, 2, [first]))


def record(study):
    for seed in study.seeds:
        run_study(study, HERE / study.file, seed, "test", lambda entry: best(entry, study))


def chosen(entry, study):
    """The recorded runs of an entry at its best setting."""
    setting = best(entry, study)
    return [r for r in read(HERE / study.file)
            if part(r["flags"], NAMED) == entry and [part(r["flags"], TUNABLE)] == setting]


def percent(values):
    return f"{100 * mean(values):.1f} ± {100 * stdev(values) / len(values)**0.5:.1f}"


def first(curve, pass1, key):
    """key of the first evaluation with this pass@1, infinity if there is none."""
    return next((e[key] for e in curve if e["pass1"] >= pass1), float("inf"))


def table(study):
    """Mean ± s.e. over the seeds, the best first; of updates and seconds to a level the median.

    The difference is to the peer with the same seed and puzzles; a seed has collapsed if less than
    2% of its groups are informative at the end: it learns no more.
    """
    low, high = (f"{level:.0%}" for level in study.levels)
    columns = ["loss", "setting", "pass@1", f"{name(study.peer)} less this", "greedy", "pass@4",
               "collapsed", f"updates to {low}", f"to {high}", f"seconds to {low}", f"to {high}",
               "seconds"]
    peer = {r["seed"]: r["pass1_after"] for r in chosen(study.peer, study)}
    print("|", " | ".join(columns), "|\n|" + "---|" * len(columns))
    rows = []
    for entry in study.entries:
        runs = chosen(entry, study)
        if len(runs) < len(study.seeds):
            print(f"{entry}: {len(runs)} of {len(study.seeds)} runs", file=sys.stderr)
            continue
        curves, [setting] = [r["curve"] for r in runs], best(entry, study)
        reached = [median(first(curve, level, key) for curve in curves)
                   for key in ("step", "seconds") for level in study.levels]
        rows.append([mean(c[-1]["pass1"] for c in curves), name(entry),
                     ", ".join(f"{k} {v:g}" for k, v in setting.items()),
                     percent([r["pass1_after"] for r in runs]),
                     percent([peer[r["seed"]] - r["pass1_after"] for r in runs]),
                     *(percent([c[-1][key] for c in curves]) for key in ("greedy", "pass4")),
                     f"{sum(c[-1]['informative'] < 0.02 for c in curves)}",
                     *("-" if x == float("inf") else f"{x:.0f}" for x in reached),
                     f"{mean(c[-1]['seconds'] for c in curves):.0f}"])
    for _, *row in sorted(rows, reverse=True):
        print("|", " | ".join(row), "|")
    for entry in study.entries:
        print(entry, best(entry, study))


def name(flags):
    """An entry's name; ../plot.py makes the same."""
    return " ".join([flags["algo"], *(f"{k} {flags[k]:g}" for k in NAMED[1:] if k in flags)])


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


def run(argv):
    llm_rlvr.TASKS["aloud"] = Aloud()
    llm_rlvr.main(argv, variant(llm_rlvr.Trainer))


if __name__ == "__main__":
    commands = {"run": run, "edges": edges, "tune": tune, "record": record, "table": table}
    command, *arguments = sys.argv[1:] or [""]
    if command not in commands:
        raise SystemExit(f"compare.py {command}: allowed are {', '.join(commands)}")
    if command not in ("run", "edges"):
        study = (arguments or ["graph_color"])[0]
        if study not in STUDIES:
            raise SystemExit(f"compare.py {command} {study}: allowed are {', '.join(STUDIES)}")
        arguments = STUDIES[study]
    commands[command](arguments)
