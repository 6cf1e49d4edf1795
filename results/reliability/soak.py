"""An hour of llm_rlvr.py with an eye on its memory.

    python results/reliability/soak.py [--minutes 60] [flags of llm_rlvr.py]       printed: soak.txt

Runs the default job with a step count that it will not reach, reads its resident memory every ten
seconds, stops it as Ctrl-C does, and compares the first sixth of the time (after a minute of
warm-up) with the last. Linux.
"""
import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

SCRIPT = Path(__file__).parents[2] / "llm_rlvr.py"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--minutes", type=float, default=60)
args, flags = parser.parse_known_args()
if args.minutes < 2:
    parser.error(f"--minutes {args.minutes:g}: allowed are 2 or more")

readings = []                                                       # (minute, MB)
with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, SCRIPT, "--algo", "tpo", "--steps", "1000000", "--out", folder]
    run = subprocess.Popen(command + flags, text=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    start = time.time()
    while (minute := (time.time() - start) / 60) < args.minutes:
        if run.poll() is not None:
            sys.exit(f"the run ended early with status {run.returncode}: {run.stderr.read()}")
        status = Path(f"/proc/{run.pid}/status").read_text(encoding="utf-8")
        kilobytes = int(status.split("VmRSS:")[1].split()[0])
        readings.append((minute, kilobytes / 1024))
        time.sleep(10)
    run.send_signal(signal.SIGINT)
    _, message = run.communicate()
    if run.returncode != 130:
        sys.exit(f"the run did not stop as it should: status {run.returncode}, {message}")

print(message.strip().replace(folder, "FOLDER"))
part = args.minutes / 6
for begin in (1, args.minutes - part):
    resident = [mb for minute, mb in readings if begin <= minute < begin + part]
    print(f"resident memory of minutes {begin:.3g} to {begin + part:.3g}: "
          f"mean {mean(resident):.0f} MB, largest {max(resident):.0f} MB")
