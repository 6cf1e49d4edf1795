"""100,000 random groups through tpo.py against an independent fp64 computation in numpy.

    python results/reliability/fuzz.py [--groups 100000] [--seed 0]         printed: fuzz.txt

Groups of 1 to 64 candidates with fp16, bf16, fp32 or fp64 inputs, masks, scores from 1e-30 to 1e30,
around 1e5, or equal but for float noise, log-probs of -1e4 and -inf, eta and anchor at random. Each
batch has one size, dtype, eta and anchor; both sides get the same rounded inputs. Error is
absolute, on q, on dL/dl per group and on the loss, the loss relative to max(1, |loss|). Groups with
a log-prob of -inf are counted apart: tpo.py takes -inf as -1e9, where fp32 resolves 64 nats, so
among candidates that the old policy could not sample fp32 is finite but cannot be exact; fp64 must
be both.
Exit status 1 if anything is not finite or an error is above the bound.
"""
import argparse
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from tpo import tpo_loss, tpo_target

# in fp32 inside, but for fp64; the gradient then takes the dtype of its leaf, hence bf16's bound
BOUND = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-3, torch.float64: 1e-9}


def log_softmax(z):
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def reference(logp, logp_old, scores, eta, anchor):
    """q, loss and dL/dl of one group without masked candidates, in fp64; -inf counts as -1e9."""
    l, old = np.maximum(logp, -1e9), np.maximum(logp_old, -1e9)
    c = scores - scores.mean()
    equal = np.abs(c).max() <= 1e-6 * np.abs(scores).max()
    u = np.zeros_like(c) if equal else c / np.sqrt((c * c).mean())
    q = np.exp(log_softmax(anchor * old + u / eta))
    logits = log_softmax(l - (1 - anchor) * old)
    return q, -(q * logits).sum(), np.exp(logits) - q


def draw(rng, n, K):
    """Log-probs, old ones, scores and masks of n groups of K, each of one kind; one is unmasked."""
    def normal():
        return rng.normal(size=(n, K))

    kinds = [normal(), rng.integers(0, 2, (n, K)).astype(float), normal() * 1e30, normal() * 1e-30,
             0.1 + normal() * 1e-9, np.full((n, K), rng.normal()),
             1e5 + rng.integers(0, 5, (n, K))]
    scores = np.choose(rng.integers(0, len(kinds), (n, 1)), kinds)
    spread = rng.choice([0.1, 1, 20, 300], (n, 1))
    old = -np.abs(normal()) * spread
    logp = np.minimum(0, old + normal() * rng.choice([0, 0.1, 3], (n, 1)))
    for x in (old, logp):
        x[rng.random((n, K)) < rng.choice([0, 0.1, 0.9], (n, 1))] = rng.choice([-1e4, -np.inf])
    mask = rng.random((n, K)) < rng.choice([1, 0.5, 0.1], (n, 1))
    mask[np.arange(n), rng.integers(0, K, n)] = True
    return logp, old, scores, mask


def try_batch(rng, n):
    """n groups: their dtype, how many values are not finite, (kind, error, name, where) of each."""
    K, dtype = int(rng.integers(1, 65)), list(BOUND)[rng.integers(0, 4)]
    eta, anchor = float(rng.choice([0.25, 1, 4])), float(rng.choice([0, 0.25, 1]))
    *arrays, real = draw(rng, n, K)
    if dtype == torch.float16:
        arrays[2] = np.clip(arrays[2], -6e4, 6e4)                               # it ends at 65,504
    logp, old, scores = (torch.tensor(x).to(dtype) for x in arrays)             # (n, K)
    exact = [x.double().numpy() for x in (logp, old, scores)]
    mask, logp = torch.tensor(real), logp.requires_grad_()
    q = tpo_target(old, scores, eta, anchor, mask)
    loss = tpo_loss(logp, old, scores, eta, anchor, mask)
    g = torch.autograd.grad(loss, logp)[0] * n
    logp = logp.detach()
    each = torch.stack([tpo_loss(logp[i], old[i], scores[i], eta, anchor, mask[i])
                        for i in range(n)])
    bad = sum(int((~x.isfinite()).sum()) for x in (q, loss, g, each))
    q, g, each = (x.double().numpy() for x in (q, g, each))
    groups = []
    for i in range(n):
        inputs = [x[i][real[i]] for x in exact]
        q_i, loss_i, g_i = reference(*inputs, eta, anchor)
        alive = inputs[0] > -1e9                        # -inf is constant: no gradient there
        dl = np.abs(g[i][real[i]] - g_i)[alive]
        masked = np.abs([q[i][~real[i]], g[i][~real[i]]])
        errors = {"q": np.abs(q[i][real[i]] - q_i).max(), "dL/dl": dl.max(initial=0),
                  "loss": abs(each[i] - loss_i) / max(1, abs(loss_i)),
                  "masked": masked.max(initial=0)}
        kind = "-inf" if np.isinf(inputs[:2]).any() else "finite"
        where = f"K {K}, eta {eta}, anchor {anchor}"
        groups.append((kind, *max((float(e), name) for name, e in errors.items()), where))
    return dtype, bad, groups


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=100_000, help="how many (default 100000)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default 0)")
    args = parser.parse_args()
    rng, start, bad = np.random.default_rng(args.seed), time.time(), 0
    worst = {}                                          # (dtype, kind) -> (error, where)
    for done in range(0, args.groups, 50):
        dtype, more, groups = try_batch(rng, min(50, args.groups - done))
        bad += more
        for i, (kind, error, name, where) in enumerate(groups):
            if error >= worst.get((dtype, kind), (0,))[0]:
                worst[dtype, kind] = error, f"{name}, {where}, group {done + i}"
    for (dtype, kind), (error, where) in sorted(worst.items(), key=str):
        print(f"{str(dtype):16}{kind:8}largest error {error:.1e} ({where})")
    bounded = {(dtype, kind): error for (dtype, kind), (error, _) in worst.items()
               if dtype == torch.float64 or kind == "finite"}
    exact = [error for (dtype, _), error in bounded.items() if dtype == torch.float64]
    rest = [error for (dtype, _), error in bounded.items() if dtype != torch.float64]
    machine = (f"{torch.get_num_threads()} thread of {os.cpu_count()} cores "
               f"({platform.machine()}), torch {torch.__version__}")
    print(f"{args.groups:,} groups: {bad} values not finite; largest error "
          f"{max(exact, default=0):.1e} in fp64 (-inf included), {max(rest, default=0):.1e} in "
          f"fp32 and below (finite log-probs); {time.time() - start:.0f} s, {machine}")
    sys.exit(bad > 0 or any(error > BOUND[dtype] for (dtype, _), error in bounded.items()))


if __name__ == "__main__":
    main()
