"""Final MNIST test error of each single seed, for methods whose mean hides two kinds of runs.

    python results/bandit/mnist_seeds.py group_pg grpo | grep mean > results/bandit/mnist_seeds.txt

Seeds 20 to 59; the data are read from data/mnist.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import bandit

if not sys.argv[1:] or not set(sys.argv[1:]) <= set(bandit.ALGOS["mnist"]):
    raise SystemExit(f"mnist_seeds.py: allowed are some of {', '.join(bandit.ALGOS['mnist'])}")
bandit.streams = lambda seeds: [torch.Generator().manual_seed(20 + seed) for seed in range(seeds)]
bandit.EVERY["mnist"] = 2000
data = list(bandit.load_mnist(bandit.Config().data))
for algo in sys.argv[1:]:
    *_, (_, metrics) = bandit.mnist(algo, 40, 10_000, 1.0, data, None)
    e = metrics["error"]
    each = sorted(round(x, 3) for x in e.tolist())
    print(f"{algo}: mean {e.mean():.4f} s.e. {e.std() / len(e)**0.5:.4f} median {e.median():.4f} "
          f"above 9%: {(e > 0.09).sum()} of {len(e)}; {each}", flush=True)
