"""1,000 hostile answers through the scorers of ten datasets of Reasoning Gym: is anything lost?

    pip install reasoning-gym
    python results/reliability/hostile.py [--answers 100] [--seed 0]        printed: hostile.txt

Each dataset gets --answers: the right one of every tenth entry, and else what a model could write
that hangs, ends, fills or breaks a process that evaluates it, alone or around the right answer. A
right answer must score what a quiet process gives it, whatever came before; each other one a finite
number. Exit status 1 if not, or if a process is left over.
"""
import argparse
import math
import os
import platform
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import text_tasks

DATASETS = ("countdown", "puzzle24", "n_queens", "binary_matrix", "spiral_matrix", "number_sorting",
            "string_insertion", "simple_integration", "polynomial_multiplication",
            "prime_factorization")
# {} is the right answer
QUICK = ("exit()", "quit(1)", "1/0", "0**-1", "", "{}{}", "-{}", "[{}]", "'{}'", "{} # {}", "nan",
         "inf", "None", "[]", "[[]]", "()", "{{}}", "\0", "\ud800", "\n" * 999, "9" * 99_999,
         "(" * 9999, "[" * 999 + "]" * 999, "lambda: 0", "x" * 10**5, "raise", "print({})",
         "input()", "1e999", "open('/dev/zero').read(1)", "__import__('os').getpid()",
         "__import__('sys').exit(3)", "globals().clear()", "__import__('os').close(1)",
         "factorial(99999)", "{}" * 99, "\u0663\u0664", "<answer>", "</answer>", "sin(x)/0",
         "zoo", "oo - oo", "I**I", "{0:d}", "%s%n")
DEADLY = ("7**8**9", "9**9**9**9", "10**10**9", "factorial(10**9)", "[0]*10**11", "'a'*10**12",
          "list(range(10**12))", "__import__('time').sleep(99)", "__import__('os')._exit(0)",
          "__import__('os').kill(__import__('os').getpid(), 11)", "__import__('os').fork()",
          "integrate(exp(x**x*sin(x)), x)", "expand((x + 1)**10**6)", "prod(range(1, 10**8))")


def children():
    """Pids of the processes that score and have not ended, on Linux."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
            state = (path.parent / "stat").read_text("utf-8").rpartition(")")[2].split()[0]
        except OSError:
            continue
        if b"rg_score.py" in command and state != "Z":
            found.append(int(path.parent.name))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--answers", type=int, default=100, help="to each dataset")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, start, lost, before = random.Random(args.seed), time.monotonic(), 0, set(children())
    for name in DATASETS:
        task = text_tasks.make_task(f"rg:{name}", "", 0)
        began, failed, faults = time.monotonic(), 0, set()
        for i in range(args.answers):
            _, entry = task.prompt(rng)
            right = str(entry["answer"])
            if i % 10 == 9:
                quiet = float(task.data.score_answer(right, entry))
                lost += task.check(entry, f"<answer>{right}</answer>") != quiet
                continue
            answer = rng.choice(DEADLY if i % 10 == 0 else QUICK).replace("{}", right)
            lost += not math.isfinite(task.check(entry, f"<answer>{answer}</answer>"))
            if task.scorer.failed:
                failed += 1
                faults.add(task.scorer.fault)
                task.scorer.told()
        if task.scorer.child:
            task.scorer.stop()
        print(f"{name}: {args.answers} answers in {time.monotonic() - began:.0f} s, {failed} could "
              f"not be scored: {', '.join(sorted(faults))}", flush=True)
    left = set(children()) - before
    print(f"{args.answers * len(DATASETS)} answers, {lost} lost, {len(left)} processes left, "
          f"{time.monotonic() - start:.0f} s ({platform.machine()}, Python "
          f"{platform.python_version()}, {os.cpu_count()} cores)")
    sys.exit(bool(lost or left))


if __name__ == "__main__":
    main()
