"""An hour of llm_rlvr.py with an eye on its memory: python results/soak.py [--minutes 60] [flags of llm_rlvr.py]

Runs the default job with a step count that it will not reach, reads its resident memory every ten seconds, stops it as Ctrl-C does, and
compares the first ten minutes (after one of warm-up) with the last ten. Recorded in soak.txt. Linux.
"""
import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--minutes", type=float, default=60)
args, flags = parser.parse_known_args()
if args.minutes < 21:
    parser.error(f"--minutes {args.minutes:g}: allowed are 21 or more, for two parts of ten minutes")

with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, Path(__file__).parents[1] / "llm_rlvr.py", "--algo", "tpo", "--steps", "1000000", "--out", folder, *flags]
    run, begun, seen = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True), time.time(), []
    while (minute := (time.time() - begun) / 60) < args.minutes:
        if run.poll() is not None:
            sys.exit(f"the run ended early with status {run.returncode}: {run.stderr.read()}")
        resident = Path(f"/proc/{run.pid}/status").read_text().split("VmRSS:")[1].split()[0]                          # in kB
        seen.append((minute, int(resident) / 1024))
        time.sleep(10)
    run.send_signal(signal.SIGINT)
    _, message = run.communicate()
    if run.returncode != 130:
        sys.exit(f"the run did not stop as it should: status {run.returncode}, {message}")

first, last = ([mb for minute, mb in seen if low <= minute < low + 10] for low in (1, args.minutes - 10))
print(f"{message.strip()}\nresident memory, mean (largest) of minutes 1 to 11: {mean(first):.0f} ({max(first):.0f}) MB; of the last ten of "
      f"{args.minutes:g} minutes: {mean(last):.0f} ({max(last):.0f}) MB; growth {100 * (mean(last) / mean(first) - 1):+.1f}%")
