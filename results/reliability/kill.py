"""Kill -9 a run of llm_rlvr.py at random moments; do its resumes end as the uninterrupted run does?

    OMP_NUM_THREADS=1 python results/reliability/kill.py [--kills 50] [--seed 0]   printed: kill.txt

A small run (a checkpoint every second update, warm start included) is started, killed at a moment
drawn uniformly from the duration of the uninterrupted run, imports included, and started again,
with --resume, until it completes; then afresh. Each kill is followed by a
look at the checkpoint, each completion by a comparison of weights, optimizer, random states and
log, bit for bit but for the times. Then saving fails: at a file size limit within a checkpoint, on
/dev/full, in a folder that became read-only. Exit status 1 if anything is not as it should be.
Linux.
"""
import argparse
import ctypes
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SCRIPT = Path(__file__).parents[2] / "llm_rlvr.py"
SMALL = ("--width 64 --layers 1 --heads 2 --kv-heads 1 --prompts 8 --candidates 8 --steps 80 "
         "--eval-every 2 --warm-steps 30 --device cpu").split()
TIMES = {"seconds", "sample_seconds", "train_seconds", "sample_tok_s", "train_tok_s", "peak_mb"}


def start(folder, **how):
    command = [sys.executable, SCRIPT, *SMALL, "--out", folder.parent, "--resume"]
    return subprocess.Popen(command, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **how)


def bits(x):
    """x without times and flags that differ by intent, tensors as bytes: == is then bit for bit."""
    if isinstance(x, dict):
        left_out = TIMES | {"out", "resume"}
        return {name: bits(value) for name, value in x.items() if name not in left_out}
    if isinstance(x, (list, tuple)):
        return [bits(value) for value in x]
    return (x.dtype, x.shape, x.numpy().tobytes()) if isinstance(x, torch.Tensor) else x


def outcome(folder):
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return bits([checkpoint, [json.loads(line) for line in lines]])


def survive(folder, limit, draw=None):
    """Run to the end, killed up to limit times draw() seconds after each start. A word per kill."""
    kills, checkpoint = [], folder / "checkpoint.pt"
    while True:
        unfinished, process = set(folder.glob("*.tmp")), start(folder)
        try:
            _, error = process.communicate(timeout=draw() if len(kills) < limit else None)
            if process.returncode:
                sys.exit(f"kill.py: a start ended with status {process.returncode}: {error}")
            return kills
        except subprocess.TimeoutExpired as killed:
            process.kill()
            process.communicate()
            kills.append(f"{killed.timeout:.1f}")
        if not checkpoint.exists():
            kills[-1] += " without checkpoint"
        if set(folder.glob("*.tmp")) - unfinished:
            kills[-1] += " while writing"
        try:
            checkpoint.exists() and torch.load(checkpoint, weights_only=True)
        except Exception:                               # a damaged file raises one of many types
            kills[-1] += " UNREADABLE"


def limit_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))   # Python makes it an EFBIG


def bind_root():
    """PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: else permissions do not bind root."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def failed_saves(folder):
    """(name, exit status, stderr, whether the checkpoint is as it was) of runs that cannot save."""
    checkpoint = folder / "checkpoint.pt"
    saved = checkpoint.read_bytes()
    process = start(folder, preexec_fn=limit_size)
    error = process.communicate()[1]
    yield "file size limit", process.returncode, error, checkpoint.read_bytes() == saved

    def fill_disk():
        (folder / "checkpoint.pt.tmp").symlink_to("/dev/full")

    def lock_folder():
        folder.chmod(0o555)

    for name, spoil in (("disk full", fill_disk), ("folder made read-only", lock_folder)):
        checkpoint.unlink()
        process = start(folder, preexec_fn=bind_root)
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.01)
        spoil()
        saved = checkpoint.read_bytes()
        error = process.communicate()[1]
        yield name, process.returncode, error, checkpoint.read_bytes() == saved
    folder.chmod(0o755)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args()
    rng, begun, root = random.Random(args.seed), time.monotonic(), Path(tempfile.mkdtemp())
    whole, killed = (root / name / "graph_color-tpo-0" for name in ("whole", "killed"))
    whole.mkdir(parents=True)
    survive(whole, 0)
    seconds, expected, kills, same = time.monotonic() - begun, outcome(whole), [], 0
    print(f"uninterrupted {seconds:.1f} s; kills at seconds after each start:")
    while len(kills) < args.kills:
        killed.mkdir(parents=True)
        fell = survive(killed, args.kills - len(kills), lambda: rng.uniform(0, seconds))
        equal = outcome(killed) == expected
        kills += fell
        same += equal * len(fell)
        print(f"{', '.join(fell) or 'none'}: {'the same bits' if equal else 'OTHER BITS'}",
              flush=True)
        shutil.rmtree(killed)
    fine = True
    for name, status, error, intact in failed_saves(whole):
        fine = fine and status == 1 and intact and error.count("\n") == 1
        print(f"{name}: status {status}, checkpoint {'intact' if intact else 'LOST'}, "
              f"stderr {error.replace(str(whole), 'DIR').strip()!r}", flush=True)
    survive(whole, 0)
    fine = fine and outcome(whole) == expected
    shutil.rmtree(root)
    early, torn, damaged = (sum(word in kill for kill in kills)
                            for word in ("without", "writing", "UNREADABLE"))
    print(f"{len(kills)} kills, {torn} while writing a file, then {len(kills) - early} resumes and "
          f"{early} starts afresh for want of a checkpoint: {same} ended in the same bits, "
          f"{damaged} unreadable checkpoints")
    print("failed saves: " + ("one line each, the old checkpoint intact, resumed to the same bits"
                              if fine else "NOT AS THEY SHOULD BE"))
    print(f"{time.monotonic() - begun:.0f} s, {torch.get_num_threads()} thread of {os.cpu_count()} "
          f"cores ({platform.machine()}), torch {torch.__version__}")
    sys.exit(same < len(kills) or damaged > 0 or not fine)


if __name__ == "__main__":
    main()
