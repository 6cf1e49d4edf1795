"""The paper's bandits (arXiv 2604.06159, Figs. 2 to 4): where the gradient of TPO points, and what that buys.

    python bandit.py                                        single and multi, 100 seeds: TODO s on 2 CPU cores
    python bandit.py --task mnist --mechanism               MNIST, 20 seeds, six methods: TODO min on one core
    python bandit.py --task mnist --algo tpo --seeds 2      a first look: TODO s
The last line to expect (the first command; the step varies by none with the seeds fixed):
    TODO

single  one context, 100 arms, reward 1 for arm 0; a step on 100 sampled actions.        error = 1 - pi(y)      Fig. 2
multi   100 contexts x 10 arms, exact population gradients, one global step.             error = 1 - pi(y)      Fig. 3
mnist   one sampled label per image, reward 1 if it is right; MLP 784-50-50-10, Adam.    error = test error     Fig. 4
misalignment = 1 - cos(g, the oracle's g) for the update g in logit space; the oracle is CE, in single pi(y) times CE.
All seeds run in one batch of tensors; S = seeds, B = batch of actions, each seed with a random stream of its own.
"""
import argparse
import gzip
import http.client
import json
import math
import os
import struct
import sys
import time
import urllib.request
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from runpy import run_path

import torch
import torch.nn.functional as F

from baselines import grpo_loss
from tpo import standardize, tpo_loss, tpo_target

ALGOS = {"single": ("pg", "grpo", "dg", "tpo"),
         "multi": ("ce", "pg", "grpo", "dg", "tpo"),
         "mnist": ("ce", "pg", "grpo", "group_pg", "dg", "tpo")}
EVERY = {"single": 1, "multi": 5, "mnist": 200}                      # steps between two evaluation records
# What the paper's own code gives over 100 seeds (single, multi), or what the paper prints over 20 (mnist), at the
# default settings: final error, first step below 1% error (mnist: 5%), misalignment (single, step 112).
REFERENCE = {
    "single": {"pg": (1.0e-3, 125, 0.034), "dg": (5.3e-5, 97, 1.8e-4), "tpo": (5.1e-5, 97, 2.3e-7), "grpo": (2.7e-3, 104, 0.67)},
    "multi": {"ce": (3.4e-4, 679), "tpo": (4.0e-4, 696), "grpo": (5.3e-4, 752), "dg": (2.1e-3, 860), "pg": (6.1e-3, 956)},
    "mnist": {"tpo": (0.029, 1600), "dg": (None, 2200), "pg": (0.053,), "grpo": (0.059,), "group_pg": (0.072,)}}
BINS = (0, 0.25, 0.5, 0.75, 1)                                       # of the wrong mass's concentration, Fig. 4(b)
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"


def option(default, text):
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    task: str = option("single,multi", "single, multi, mnist, a comma list of them, or all")
    algo: str = option("all", "comma list of ce, pg, grpo, group_pg, dg, tpo, or all; a task runs those it knows")
    seeds: dict = option({"single": 100, "multi": 100, "mnist": 20}, "number of seeds, run side by side")
    steps: dict = option({"single": 150, "multi": 1000, "mnist": 10000}, "gradient steps")
    eta: float = option(1.0, "temperature of TPO's target and of DG's gate, above 0")
    data: str = option("data/mnist", "folder with the four MNIST .gz files; missing ones are downloaded into it")
    mechanism: bool = option(False, "mnist: also measure Fig. 4(b) at step 2000 (or the last step, if that is earlier)")
    out: str = option("", "write a JSON-lines log to this file")
    plot: str = option("", "draw the curves into this .png file (needs matplotlib)")


# ---- single: sampled gradients in logit space (Fig. 2) -----------------------------------------------------------------

def sample(pi, uniform):
    """Actions by inverse CDF of pi (..., K) from uniform numbers (..., n)."""
    return torch.searchsorted(pi.cumsum(-1), uniform).clamp(max=pi.shape[-1] - 1)    # rounding: the cdf may end below 1


def single_gradient(algo, pi, a, r, eta):
    """g (S, K) from pi (S, K), actions a (S, B) and rewards r (S, B)."""
    A = r - 0.5
    if algo == "grpo":
        A = (r - r.mean(-1, keepdim=True)) / (r.var(-1, keepdim=True, correction=0) + 1e-8).sqrt()
    if algo == "dg":
        A = A * torch.sigmoid(A * -pi.log().gather(-1, a) / eta)
    scores = torch.zeros_like(pi).scatter_add(-1, a, A) / a.shape[-1]   # (S, K) mean over the batch of A * onehot(a)
    if algo == "tpo":
        return tpo_target(pi.log(), scores, eta) - pi                   # Eq. 3: -dL/dl = q - p
    return scores - scores.sum(-1, keepdim=True) * pi                   # mean over the batch of A * (e_a - pi)


def single(algo, seeds, steps, eta):
    uniform = torch.stack([torch.rand(steps, 100, generator=rng, dtype=torch.float64) for rng in streams(seeds)], 1)
    logits = torch.zeros(seeds, 100, dtype=torch.float64)               # fp64: TPO's misalignment is at fp32's rounding
    e_y = F.one_hot(torch.tensor(0), 100)
    for step in range(steps):
        pi = logits.softmax(-1)                                         # (S, 100)
        a = sample(pi, uniform[step])                                   # (S, 100)
        g = single_gradient(algo, pi, a, (a == 0).double(), eta)
        yield step, {"error": 1 - pi[:, 0], "misalignment": misalignment(g, pi[:, :1] * (e_y - pi))}
        logits += 0.1 * normalize(g)


# ---- multi: exact gradients (Fig. 3) -----------------------------------------------------------------------------------

def beta(algo, p, eta):
    """The update is beta (e_y - pi) at correct-arm probability p, one of 10 arms."""
    return {"ce": lambda: torch.ones_like(p),
            "pg": lambda: p,
            "dg": lambda: p * torch.sigmoid(-p.log() / eta),
            "grpo": lambda: (p / (1 - p)).sqrt(),                       # p / sigma, the reward's sigma at this context
            "tpo": lambda: beta_plus(p, eta)}[algo]()


def beta_plus(p, eta):
    """TPO on e_y over 10 arms: u is 3 for y and -1/3 elsewhere, so q - pi (Eq. 2) is this times (e_y - pi)."""
    lam = math.exp(10 / 3 / eta)
    return p * (lam - 1) / (1 - p + lam * p)


def multi(algo, seeds, steps, eta):
    logits = torch.stack([torch.randn(100, 10, generator=rng, dtype=torch.float64) for rng in streams(seeds)])
    e_y = F.one_hot(torch.tensor(0), 10)
    for step in range(steps):
        v = e_y - logits.softmax(-1)                                    # (S, 100, 10)
        g = beta(algo, 1 - v[..., :1], eta) * v
        logits += 0.1 * normalize(g.flatten(1)).view_as(g)              # one step for all contexts together
        error = 1 - logits.softmax(-1)[..., 0]                          # (S, 100)
        yield step, {"error": error.mean(-1), "misalignment": misalignment(g.flatten(1), v.flatten(1))}


# ---- mnist: one sampled label per image (Fig. 4) -----------------------------------------------------------------------

def mnist_loss(algo, logp, a, y, eta):
    """Per-seed losses, mean over the batch, summed over the S seeds. logp (S, B, 10); a, y (S, B)."""
    S, B, _ = logp.shape
    logp_a, r = logp.gather(-1, a[..., None])[..., 0], (a == y).float()          # (S, B)
    A = r - logp.detach().exp().square().sum(-1)                                 # (S, B) baseline: chance of r if y ~ pi
    scores = A[..., None] * F.one_hot(a, 10)                                     # (S, B, 10)
    if algo == "tpo":
        return S * tpo_loss(logp, logp.detach(), scores, eta)                    # a group: the ten labels of an image
    if algo == "grpo":
        return S / B * grpo_loss(logp_a, logp_a.detach(), r)                     # a group: the batch of a seed
    if algo == "ce":
        return S * F.nll_loss(logp.flatten(0, 1), y.flatten())
    weight = {"pg": lambda: A,
              "dg": lambda: A * torch.sigmoid(A * -logp_a.detach() / eta),
              "group_pg": lambda: standardize(scores).gather(-1, a[..., None])[..., 0]}[algo]()
    return S * -(weight * logp_a).mean()


def mnist_update(algo, pi, y, eta):
    """Expected logit update (S, N, 10) over the sampled action, App. C: sum_a pi_a W_a (e_a - pi), r = 1 for a = y."""
    e_y = F.one_hot(y, 10)                                                       # (N, 10) or (S, N, 10)
    A = e_y - pi.square().sum(-1, keepdim=True)                                  # (S, N, 10) of each possible action
    lam = math.exp(10 / 3 / eta)
    if algo == "ce":
        return e_y - pi
    if algo == "grpo":
        r = (pi * e_y).sum(-1).mean(-1)[:, None, None]                           # (S, 1, 1) mean reward of a large batch
    W = {"pg": lambda: A,
         "group_pg": lambda: 3 * A.sign(),                                       # u_a = 3 if A > 0, else -3
         "grpo": lambda: (e_y - r) / (r * (1 - r)).sqrt(),
         "dg": lambda: A * torch.sigmoid(A * -pi.log() / eta),
         "tpo": lambda: torch.where(e_y == 1, beta_plus(pi, eta),               # q - pi = W (e_a - pi) for each action
                                    -pi * (lam - 1) / (lam * (1 - pi) + pi))}[algo]()
    return pi * W - pi * (pi * W).sum(-1, keepdim=True)


def surplus(algo, pi, y, eta):
    """(S, 4): first-order gain in p_y of the expected update minus its one-vs-rest surrogate's, Fig. 4(b).

    The surrogate spreads the wrong mass evenly, where every update is beta (e_y - pi). Mean over misclassified examples.
    """
    e_y = F.one_hot(y, 10)
    p = (pi * e_y).sum(-1, keepdim=True)                                         # (S, N, 1)
    v = e_y - pi
    even = torch.where(e_y == 1, p, (1 - p) / 9)
    b = (mnist_update(algo, even, y, eta) * e_y).sum(-1) / (1 - p[..., 0])       # (S, N) the surrogate's beta
    gain = p[..., 0] * ((v * mnist_update(algo, pi, y, eta)).sum(-1) - b * v.square().sum(-1))
    c = (pi * (1 - e_y)).amax(-1) / (1 - p[..., 0])                              # (S, N) concentration, 1/9 to 1
    wrong = pi.argmax(-1) != y
    rows = [wrong & (low <= c) & (c < high) for low, high in zip(BINS, (*BINS[1:-1], 2))]     # c = 1 is in the last bin
    return torch.stack([(gain * row).sum(-1) / row.sum(-1) for row in rows], -1)              # NaN: no such example


def network(rng, n_in):
    """784-50-50-10: LeCun-normal weights (truncated at 2 sigma, as the paper's JAX code draws them), zero biases."""
    for n, m in ((n_in, 50), (50, 50), (50, 10)):
        weight = torch.nn.init.trunc_normal_(torch.empty(n, m), std=1, a=-2, b=2, generator=rng)
        yield weight / 0.87962566 / n**0.5                                       # .88 is the truncated normal's sigma
        yield torch.zeros(1, m)


def forward(params, x):
    """logits (S, N, 10) of all S networks for their own images x (S, N, 784)."""
    W1, b1, W2, b2, W3, b3 = params
    h = torch.baddbmm(b1, x, W1).relu()
    h = torch.baddbmm(b2, h, W2).relu()
    return torch.baddbmm(b3, h, W3)


def mnist(algo, seeds, steps, eta, data, mechanism_at):
    images, labels, test_images, test_labels = data
    rngs = streams(seeds)
    params = [torch.stack(w).requires_grad_() for w in zip(*(network(rng, images.shape[1]) for rng in rngs))]
    adam = torch.optim.Adam(params, lr=1e-3, fused=True)                         # elementwise, so exact for each seed
    start = time.time()
    for done in range(0, steps, EVERY["mnist"]):
        n = min(EVERY["mnist"], steps - done)
        index = torch.stack([torch.randint(len(labels), (n, 100), generator=rng) for rng in rngs], 1)      # (n, S, B)
        uniform = torch.stack([torch.rand(n, 100, 1, generator=rng) for rng in rngs], 1)                   # (n, S, B, 1)
        for i, z in zip(index, uniform):
            x, y = images[i], labels[i]                                          # (S, B, 784), (S, B)
            logp = forward(params, x).log_softmax(-1)                            # (S, B, 10)
            a = sample(logp.detach().exp(), z)[..., 0]                           # (S, B)
            loss = mnist_loss(algo, logp, a, y, eta)
            adam.zero_grad()
            loss.backward()
            adam.step()
        step = done + n
        with torch.no_grad():
            blocks = [forward(params, x.expand(seeds, -1, -1)) for x in test_images.split(1000)]
        pi = torch.cat(blocks, 1).double().softmax(-1)                           # (S, N, 10)
        g, oracle = (mnist_update(name, pi, test_labels, eta).flatten(1) for name in (algo, "ce"))
        metrics = {"error": (pi.argmax(-1) != test_labels).double().mean(-1), "misalignment": misalignment(g, oracle)}
        if step == mechanism_at:
            metrics["surplus"] = surplus(algo, pi, test_labels, eta)
        speed = step / (time.time() - start)
        print(f"mnist {algo:8s} step {step:6,d}/{steps:,d}   test error {metrics['error'].mean():6.2%}   "
              f"{speed * seeds:,.0f} seed-steps/s   {(steps - step) / speed:4.0f} s left for {algo}", flush=True)
        yield step, metrics


def read_idx(folder, name, ndim):
    """The uint8 array in an IDX file: bytes 0, 0, 8 (uint8), ndim, then ndim big-endian sizes, then the data."""
    path = Path(folder) / name
    advice = f"get it by: curl --create-dirs -o {path} {MIRROR}{name}"
    if not path.exists():
        try:
            print(f"downloading {MIRROR}{name}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".part")
            partial.write_bytes(urllib.request.urlopen(MIRROR + name, timeout=30).read())
            os.replace(partial, path)
        except (OSError, http.client.HTTPException) as error:
            fail(f"--data: {path} is missing and its download failed ({error}); {advice}")
    try:
        raw = gzip.decompress(path.read_bytes())
        shape = struct.unpack(f">{ndim}I", raw[4:4 + 4 * ndim])
        if raw[:4] != bytes((0, 0, 8, ndim)) or len(raw) != 4 + 4 * ndim + math.prod(shape):
            raise ValueError(f"not {ndim}-dimensional uint8 data of the length it declares")
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        fail(f"--data: {path} is truncated or not the IDX file it should be ({error}); {advice}")
    return torch.frombuffer(bytearray(raw[4 + 4 * ndim:]), dtype=torch.uint8).view(shape)


def load_mnist(folder):
    """Images (N, 784) in [0, 1] and labels (N,), of the training and of the test set."""
    for part in ("train", "t10k"):
        yield read_idx(folder, f"{part}-images-idx3-ubyte.gz", 3).flatten(1) / 255
        yield read_idx(folder, f"{part}-labels-idx1-ubyte.gz", 1).long()


# ---- shared by the three ----------------------------------------------------------------------------------------------

def streams(seeds):
    return [torch.Generator().manual_seed(seed) for seed in range(seeds)]


def normalize(g):
    return g / g.norm(dim=-1, keepdim=True).clamp(min=1e-12)             # GRPO's g is 0 once all 100 actions are right


def misalignment(g, oracle):
    return 1 - (normalize(g) * normalize(oracle)).sum(-1)


def mean_se(x):
    """Mean and standard error over seeds, x (S,); None where there are too few."""
    n = len(x)
    return round6(x.mean()) if n else None, round6(x.std() / n**0.5) if n > 1 else None


def round6(x):
    return float(f"{x:.6g}")


def run(task, algo, cfg, log, data):
    """Train all seeds of one method, log its evaluations and return its result record and misalignment to compare."""
    start, seeds, steps = time.time(), cfg.seeds[task], cfg.steps[task]
    if task == "mnist":
        curve = mnist(algo, seeds, steps, cfg.eta, data, min(2000, steps) if cfg.mechanism else None)
    else:
        curve = {"single": single, "multi": multi}[task](algo, seeds, steps, cfg.eta)
    errors, misalignments = {}, {}
    for step, metrics in curve:
        (errors[step], error_se), (misalignments[step], se) = (mean_se(metrics[k]) for k in ("error", "misalignment"))
        if task == "mnist" or step % EVERY[task] == 0 or step == steps - 1:
            log(kind="eval", task=task, algo=algo, step=step, error=errors[step], error_se=error_se,
                misalignment=misalignments[step], misalignment_se=se)
        if "surplus" in metrics:
            columns = [mean_se(x[~x.isnan()]) for x in metrics["surplus"].T]
            log(kind="mechanism", task=task, algo=algo, step=step, bins=BINS, surplus=[mean for mean, _ in columns],
                surplus_se=[se for _, se in columns])
    first_below = lambda bar: next((step for step, error in errors.items() if error < bar), None)
    result = dict(kind="result", task=task, algo=algo, seeds=seeds, final_error=errors[step], final_error_se=error_se,
                  steps_to_1pct=first_below(0.01), final_misalignment=misalignments[step],
                  seconds=round(time.time() - start, 2))
    if task == "mnist":
        result["steps_to_5pct"] = first_below(0.05)
    return result, misalignments


def main(argv=None):
    raise NotImplementedError


if __name__ == "__main__":
    main()
