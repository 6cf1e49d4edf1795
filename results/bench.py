"""Time this repository beside the paper's JAX code.

    python results/bench.py bandit                          beside the reference's times as measured elsewhere
    python results/bench.py seqtask                         the same for the transformer, about 5 min
    python results/bench.py bandit --reference DIR --command "python ..."
                                                            and a command of a clone of it, run in DIR on this machine
(for the clone: pip install jax flax optax; its time is the whole process, so it includes imports and compilation)
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import bandit as ours
import seqtask


def bandit():
    """Seconds {what: (ours, the reference's steady state)}; the reference ran on 2 CPU cores, both busy."""
    cfg = ours.Config()
    single, multi = (sum(ours.run(task, algo, cfg, None)[-1]["seconds"] for algo in ("pg", "grpo", "dg", "tpo"))
                     for task in ("single", "multi"))
    rng = torch.Generator().manual_seed(0)                          # pixels at random: the time does not depend on them
    data = [f(n) for n in (60000, 10000) for f in (lambda n: torch.rand(n, 784, generator=rng),
                                                   lambda n: torch.randint(10, (n,), generator=rng))]
    start, steps = time.time(), 600
    list(ours.mnist("tpo", 20, steps, 1.0, data, None))
    mnist = (time.time() - start) / 20 / steps * 10_000
    return {"single, 100 seeds, 4 methods": (single, 8.0), "multi, 100 seeds, 4 methods": (multi, 2.5),
            "mnist, 10,000 steps, per seed (tpo, 20 at once)": (mnist, 18.0)}


def seq():
    """Seconds per episode of one seed {what: (ours, the reference's steady state)}, H 10, V 2, K 8, B 100."""
    def seconds(algo, reward, episodes, epochs=4):
        run = seqtask.Run("reverse_copy", reward, algo, 10, 2, 8, 100, epochs, 1.0, 1e-3, "prompts", 1, episodes)
        return seqtask.train(run, "cpu", True)[2] / episodes

    seconds("tpo", "terminal", 3)                                   # the first optimizer of a process costs seconds
    return {"tpo, terminal, first 20 episodes": (seconds("tpo", "terminal", 20), 1.235),
            "tpo, terminal, mean of 2,000 episodes": (seconds("tpo", "terminal", 2000), 1.235),
            "grpo, terminal, first 20 episodes": (seconds("grpo", "terminal", 20), 1.321),
            "dg, terminal, first 200 episodes": (seconds("dg", "terminal", 200, epochs=1), 0.065),
            "tpo_token, bag, first 50 episodes": (seconds("tpo_token", "bag", 50), 0.833)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["bandit", "seqtask"])
    parser.add_argument("--reference", metavar="DIR", help="a clone of the paper's repository")
    parser.add_argument("--command", help="what to time in it")
    args = parser.parse_args()
    if bool(args.reference) != bool(args.command):
        parser.error("--reference and --command go together: the clone's folder, and what to time in it")
    print(f"{torch.get_num_threads()} threads")
    print(f"{'seconds':50}{'ours':>8}{'reference, measured elsewhere':>32}{'ratio':>8}")
    digits = 1 if args.what == "bandit" else 3
    for name, (mine, reference) in (bandit if args.what == "bandit" else seq)().items():
        print(f"{name:50}{mine:8.{digits + 1}f}{reference:32.{digits}f}{reference / mine:8.1f}")
    if args.reference:
        start = time.time()
        subprocess.run(args.command, shell=True, cwd=args.reference, check=True)
        print(f"{args.command}: {time.time() - start:.1f} s")
