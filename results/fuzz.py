"""100,000 random groups through tpo.py against an independent fp64 computation in numpy.

    python results/fuzz.py [--groups 100000] [--seed 0]         prints the line recorded in results/fuzz.txt

Groups of 1 to 64 candidates with fp16, bf16, fp32 or fp64 inputs, masks, scores from 1e-30 to 1e30, equal scores with
float noise, log-probs of -1e4 and -inf, eta and anchor at random. Each batch has one size, dtype, eta and anchor; both
sides get the same rounded inputs. Error is absolute, on q, on dL/dl per group and on the loss, the loss relative to
max(1, |loss|). Groups with a log-prob of -inf are counted apart: tpo.py takes -inf as -1e9, where fp32 resolves 64
nats, so among candidates that the old policy could not sample fp32 is finite but cannot be exact; fp64 must be both.
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

sys.path.insert(0, str(Path(__file__).parents[1]))
from tpo import tpo_loss, tpo_target

# in fp32 inside, but for fp64; the gradient then takes the dtype of its leaf, hence bf16's bound
BOUND = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-3, torch.float64: 1e-9}


def log_softmax(z):
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def reference(logp, logp_old, scores, eta, anchor):
    """q, loss and dL/dl of one group without masked candidates, from the equations, in fp64; -inf counts as -1e9."""
    l, old = np.maximum(logp, -1e9), np.maximum(logp_old, -1e9)
    s = scores / max(np.abs(scores).max(), np.finfo(np.float32).tiny)              # u does not depend on the scale
    c = s - s.mean()
    u = np.zeros_like(s) if np.abs(c).max() <= 1e-6 else c / np.sqrt((c * c).mean())
    q, logits = np.exp(log_softmax(anchor * old + u / eta)), log_softmax(l - (1 - anchor) * old)
    return q, -(q * logits).sum(), np.exp(logits) - q


def draw(rng, n, K):
    """n groups of K: scores of one kind each, log-probs (new, old) of one kind each, masks that keep at least one."""
    kinds = [rng.normal(size=(n, K)), rng.integers(0, 2, (n, K)).astype(float), rng.normal(size=(n, K)) * 1e30,
             rng.normal(size=(n, K)) * 1e-30, 0.1 + rng.normal(size=(n, K)) * 1e-9, np.full((n, K), rng.normal())]
    scores = np.choose(rng.integers(0, len(kinds), (n, 1)), kinds)
    spread = rng.choice([0.1, 1, 20, 300], (n, 1))
    old = -np.abs(rng.normal(size=(n, K))) * spread
    logp = np.minimum(0, old + rng.normal(size=(n, K)) * rng.choice([0, 0.1, 3], (n, 1)))
    for x in (old, logp):
        x[rng.random((n, K)) < rng.choice([0, 0.1, 0.9], (n, 1))] = rng.choice([-1e4, -np.inf])
    mask = rng.random((n, K)) < rng.choice([1, 0.5, 0.1], (n, 1))
    mask[np.arange(n), rng.integers(0, K, n)] = True
    return logp, old, scores, mask


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=100_000, help="how many groups (default 100000)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default 0)")
    args = parser.parse_args()
    rng, start, done, bad, worst = np.random.default_rng(args.seed), time.time(), 0, 0, {}
    while done < args.groups:
        n, K, dtype = min(50, args.groups - done), int(rng.integers(1, 65)), list(BOUND)[rng.integers(0, 4)]
        eta, anchor = float(rng.choice([0.25, 1, 4])), float(rng.choice([0, 0.25, 1]))
        *arrays, keep = draw(rng, n, K)
        if dtype == torch.float16:
            arrays[2] = np.clip(arrays[2], -6e4, 6e4)                               # fp16 ends at 65,504
        logp, old, scores = (torch.tensor(x).to(dtype) for x in arrays)
        mask, logp = torch.tensor(keep), logp.requires_grad_()
        q, loss = tpo_target(old, scores, eta, anchor, mask), tpo_loss(logp, old, scores, eta, anchor, mask)
        g = torch.autograd.grad(loss, logp)[0] * n
        each = [tpo_loss(*(x[i].detach() for x in (logp, old, scores)), eta, anchor, mask[i]).item() for i in range(n)]
        bad += sum(int((~x.isfinite()).sum()) for x in (q, loss, g, torch.tensor(each)))
        exact = [x.detach().double().numpy() for x in (logp, old, scores)]
        for i in range(n):
            real = keep[i]
            q_i, loss_i, g_i = reference(*(x[i][real] for x in exact), eta, anchor)
            alive = exact[0][i][real] > -1e9                                    # -inf is constant: no gradient there
            errors = {"q": np.abs(q[i].double().numpy()[real] - q_i).max(),
                      "loss": abs(each[i] - loss_i) / max(1, abs(loss_i)),
                      "dL/dl": np.abs(g[i].double().numpy()[real] - g_i)[alive].max(initial=0)}
            errors["masked"] = max(np.abs(x[i].double().numpy()[~real]).max(initial=0) for x in (q, g))
            name = max(errors, key=errors.get)
            case = dtype, "-inf" if np.isinf(exact[0][i][real]).any() or np.isinf(exact[1][i][real]).any() else "finite"
            if errors[name] >= worst.get(case, (0,))[0]:
                worst[case] = float(errors[name]), f"{name}, K {K}, eta {eta}, anchor {anchor}, group {done + i}"
        done += n
    for (dtype, kind), (error, where) in sorted(worst.items(), key=str):
        print(f"{str(dtype):16}{kind:8}largest error {error:.1e} ({where})")
    bounded = {case: error for case, (error, _) in worst.items() if case[0] == torch.float64 or case[1] == "finite"}
    largest = {d: max([e for (dtype, _), e in bounded.items() if dtype == d], default=0) for d in BOUND}
    exact = largest.pop(torch.float64)
    print(f"{done:,} groups: {bad} values not finite; largest error {exact:.1e} in fp64 (-inf included), "
          f"{max(largest.values()):.1e} in fp32 and below (finite log-probs); {time.time() - start:.0f} s, "
          f"{torch.get_num_threads()} thread of {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}")
    sys.exit(bad > 0 or any(error > BOUND[d] for (d, _), error in bounded.items()))


if __name__ == "__main__":
    main()
