"""The comparison of llm_rlvr.py's algorithms: a small grid per algorithm on tuning seeds, then five fresh seeds on the test set.

    python results/compare.py tune       writes results/llm_tune.jsonl, one line per run
    python results/compare.py record     takes each algorithm's best setting from there, writes results/llm_compare.jsonl
    python results/compare.py table      prints the table of results/README.md from that
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
TASKS = "graph_color", "knights_knaves"
ALGOS = "tpo:anchor=1", "tpo:anchor=0.25", "tpo:anchor=0", "grpo", "dg", "ppo", "pg"
STEPS = 200
PHASES = {
    "tune": dict(file=HERE / "llm_tune.jsonl", flags=f"--steps {STEPS} --eval-set heldout", seeds=[100, 101]),
    "record": dict(file=HERE / "llm_compare.jsonl", flags=f"--steps {STEPS} --eval-set test", seeds=[0, 1, 2, 3, 4])}
GRID = [f"lr={lr}:epochs={epochs}" for lr, epochs in ((5e-4, 1), (1e-3, 1), (2e-3, 1), (1e-3, 2), (2e-3, 2), (1e-3, 4))]
COMMON = "--prompts 16 --eval-every 25 --device cpu"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def command(task, algo, seed, flags):
    return f"python llm_rlvr.py --task {task} --algo {algo} --seed {seed} {flags} {COMMON}"


def run(job):
    (task, algo, seed, flags), out = job, PHASES[sys.argv[1]]["file"]
    words = [sys.executable, *command(*job).split()[1:], "--out", "out/compare/{task}-{algo}-{seed}"]
    subprocess.run(words, cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    records = lines(HERE.parent / "out/compare" / f"{task}-{algo.replace(':', '-')}-{seed}" / "log.jsonl")
    keep = "step", "seconds", "pass1", "greedy", "reward", "kl", "informative", "entropy", "anchor_max", "anchor_size"
    result = dict(records[-1], algo=algo.split(":lr=")[0], setting=algo, command=command(*job), threads=1,
                  curve=[{k: r[k] for k in keep if k in r} for r in records if r["kind"] == "eval"])
    with out.open("a") as f:
        f.write(json.dumps(result) + "\n")
    print(f"{task} {algo} seed {seed}: {result['pass1_after']:.3f} in {result['seconds']:.0f} s", flush=True)


def best(task, algo):
    """The setting with the highest final plus average pass@1, summed over the tuning seeds."""
    value = Counter()
    for r in lines(PHASES["tune"]["file"]):
        if (r["task"], r["algo"]) == (task, algo):
            value[r["setting"]] += r["pass1_after"] + mean(e["pass1"] for e in r["curve"])
    return max(value, key=value.get)


def table():
    """Mean ± s.e. over the seeds; the updates to 50% are those of the mean curve."""
    percent = lambda v: f"{100 * mean(v):.1f} ± {100 * stdev(v) / len(v)**0.5:.1f}"
    print("| task | algorithm | lr, epochs | pass@1 % before | after | greedy after | updates to 50% | seconds | entropy | "
          "informative |\n|" + "---|" * 10)
    runs = lines(PHASES["record"]["file"])
    for task, setting in dict.fromkeys((r["task"], r["setting"]) for r in runs):
        rs = [r for r in runs if (r["task"], r["setting"]) == (task, setting)]
        half = next((e[0]["step"] for e in zip(*(r["curve"] for r in rs)) if mean(x["pass1"] for x in e) >= 0.5), "-")
        last = [r["curve"][-1] for r in rs]
        print("", task, rs[0]["algo"], setting.split(":lr=")[1].replace(":epochs=", ", "),
              *(percent([r[k] for r in rs]) for k in ("pass1_before", "pass1_after", "greedy_after")), half,
              *(f"{mean(v):{form}}" for form, v in ((".0f", [r["seconds"] for r in rs]), (".3f", [e["entropy"] for e in last]),
                                                    (".2f", [e["informative"] for e in last]))), "", sep=" | ")


if __name__ == "__main__":
    if sys.argv[1] == "table":
        sys.exit(table())
    phase = PHASES[sys.argv[1]]
    settings = [(t, s) for t in TASKS for a in ALGOS for s in (
        [f"{a}:{g}" for g in GRID] if sys.argv[1] == "tune" else [best(t, a)])]
    done = {r["command"] for r in lines(phase["file"])}
    jobs = [(t, s, seed, phase["flags"]) for seed in phase["seeds"] for t, s in settings]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(run, [job for job in jobs if command(*job) not in done]))
