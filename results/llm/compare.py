"""Compare llm_rlvr.py's methods: a grid on tuning seeds, then the best on fresh seeds and puzzles.

    python results/llm/compare.py tune       writes tune.jsonl, one line per run
    python results/llm/compare.py record     each method's best setting there, writes compare.jsonl
    python results/llm/compare.py table      prints the table of ../README.md from that
One run per CPU core at a time, one thread each. A run that is already in the file is not repeated.
"""
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = {"tune": HERE / "tune.jsonl", "record": HERE / "compare.jsonl"}
SEEDS = {"tune": [100, 101], "record": [0, 1, 2, 3, 4]}
EVAL_SETS = {"tune": "heldout", "record": "test"}
TASKS = "graph_color", "knights_knaves"
# a setting is a method and its flags: tpo:anchor=1:lr=0.002:epochs=2
METHODS = "tpo:anchor=1", "tpo:anchor=0.25", "tpo:anchor=0", "grpo", "dg", "ppo", "pg"
GRID = [f"lr={lr}:epochs={epochs}" for lr, epochs in
        ((5e-4, 1), (1e-3, 1), (2e-3, 1), (1e-3, 2), (2e-3, 2), (1e-3, 4))]
COMMON = "--steps 200 --prompts 16 --eval-every 25 --device cpu"
KEPT = ("step", "seconds", "pass1", "greedy", "reward", "kl", "informative", "entropy",
        "anchor_max", "anchor_size")


def read(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(phase, task, setting, seed):
    name, *flags = setting.split(":")
    out = f"out/compare/{task}-{setting.replace(':', '-')}-{seed}"
    command = (f"python llm_rlvr.py --task {task} --algo {name} --seed {seed} {COMMON} "
               f"--eval-set {EVAL_SETS[phase]} --out {out} " + " ".join("--" + f for f in flags))
    subprocess.run([sys.executable, *command.split()[1:]], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = read(ROOT / out / f"{task}-{name}-{seed}" / "log.jsonl")
    curve = [{k: r[k] for k in KEPT if k in r} for r in log if r["kind"] == "eval"]
    result = dict(log[-1], algo=setting.split(":lr=")[0], setting=setting, command=command,
                  threads=1, curve=curve)
    with FILES[phase].open("a", encoding="utf-8") as f:
        f.write(json.dumps(result) + "\n")
    print(f"{task} {setting} seed {seed}: {result['pass1_after']:.3f} "
          f"in {result['seconds']:.0f} s", flush=True)


def best(task, method):
    """The setting with the highest final plus average pass@1, summed over the tuning seeds."""
    value = Counter()
    for r in read(FILES["tune"]):
        if (r["task"], r["algo"]) == (task, method):
            value[r["setting"]] += r["pass1_after"] + mean(e["pass1"] for e in r["curve"])
    return max(value, key=value.get)


def percent(values):
    return f"{100 * mean(values):.1f} ± {100 * stdev(values) / len(values)**0.5:.1f}"


def table():
    """Mean ± s.e. over the seeds; the updates to 50% are those of the mean curve."""
    columns = ["task", "method", "lr, epochs", "pass@1 % before", "after", "greedy after",
               "updates to 50%", "seconds", "entropy", "informative"]
    print("|", " | ".join(columns), "|\n|" + "---|" * len(columns))
    found = {}
    for r in read(FILES["record"]):
        found.setdefault((r["task"], r["setting"]), []).append(r)
    for (task, setting), runs in found.items():
        means = [(same[0]["step"], mean(e["pass1"] for e in same))
                 for same in zip(*(r["curve"] for r in runs))]
        last = [r["curve"][-1] for r in runs]
        cells = [task, runs[0]["algo"], setting.split(":lr=")[1].replace(":epochs=", ", "),
                 *(percent([r[key] for r in runs])
                   for key in ("pass1_before", "pass1_after", "greedy_after")),
                 next((str(step) for step, pass1 in means if pass1 >= 0.5), "-"),
                 f"{mean(r['seconds'] for r in runs):.0f}",
                 f"{mean(e['entropy'] for e in last):.3f}",
                 f"{mean(e['informative'] for e in last):.2f}"]
        print("|", " | ".join(cells), "|")


def main(phase):
    if phase == "table":
        return table()
    if phase == "tune":
        settings = [(t, f"{m}:{g}") for t in TASKS for m in METHODS for g in GRID]
    else:
        settings = [(t, best(t, m)) for t in TASKS for m in METHODS]
    done = {(r["task"], r["setting"], r["seed"]) for r in read(FILES[phase])}
    jobs = [(*s, seed) for seed in SEEDS[phase] for s in settings if (*s, seed) not in done]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda job: run(phase, *job), jobs))


if __name__ == "__main__":
    main(sys.argv[1])
