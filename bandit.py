"""The bandits of the TPO paper (2604.06159, Figs. 2 to 4): where gradients point, and what for.

    python bandit.py                                    single and multi, 100 seeds: 10 s, one core
    python bandit.py --task mnist --algo tpo --seeds 2  a first look: 30 s, ends near 2.9% error
    python bandit.py --task mnist --mechanism           MNIST, 20 seeds, six methods: 15 min
The last line to expect from the first command:
    multi: mean error below 1%: ce at step 680, tpo at step 698, grpo at step 756, dg at step 867,
    pg at step 968

single  Fig. 2: one context, 100 arms, reward 1 for arm 0; a step on 100 sampled actions
multi   Fig. 3: 100 contexts x 10 arms, exact population gradients, one global step
mnist   Fig. 4: one sampled label per image, reward 1 if right; MLP 784-50-50-10, Adam
error = 1 - pi(y), mnist: test error. misalignment = 1 - cos(g, the oracle's g) for the update g in
logit space; the oracle is CE, in single pi(y) times CE. All S seeds run in one batch of tensors,
each with a random stream of its own; B = batch of actions.
The later losses of baselines.py run from seqtask.py and llm_rlvr.py: in single, on policy, with
steps of unit length, all but oapl and kondo take GRPO's step; in multi they take PG's, CE's or
GRPO's; an image of mnist has no group.
"""
import argparse
import gzip
import http.client
import json
import math
import os
import struct
import sys
import tempfile
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
EVERY = {"single": 1, "multi": 5, "mnist": 200}  # steps between two evaluation records
BINS = (0, 0.25, 0.5, 0.75, 1)                   # of the wrong mass's concentration, Fig. 4(b)
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"


def flag(default, help):
    """A field that becomes a flag; of a dict, one default per task, the flag sets all."""
    return field(default_factory=lambda: default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    task: str = flag("single,multi", "single, multi, mnist, a comma list of them, or all")
    algo: str = flag("all", "comma list of ce, pg, grpo, group_pg, dg, tpo; a task runs its own")
    seeds: dict = flag({"single": 100, "multi": 100, "mnist": 20}, "seeds, run side by side")
    steps: dict = flag({"single": 150, "multi": 1000, "mnist": 10000}, "gradient steps")
    eta: float = flag(1.0, "temperature of TPO's target and of DG's gate, above 0")
    data: str = flag("data/mnist", "folder of MNIST's four .gz files, downloaded if missing")
    mechanism: bool = flag(False, "mnist: also measure Fig. 4(b), at step 2000 or the last before")
    out: str = flag("", "write a JSON-lines log to this file")
    plot: str = flag("", "draw the curves into this .png file (needs matplotlib)")


# ---- single: sampled gradients in logit space (Fig. 2) -------------------------------------------

def sample(pi, uniform):
    """Actions by inverse CDF of pi (..., K) from uniform numbers (..., n)."""
    actions = torch.searchsorted(pi.cumsum(-1), uniform)
    return actions.clamp(max=pi.shape[-1] - 1)                  # rounding: the cdf may end below 1


def single_gradient(algo, pi, a, r, eta):
    """g (S, K) from pi (S, K), actions a (S, B) and rewards r (S, B)."""
    A = r - 0.5
    if algo == "grpo":
        A = (r - r.mean(-1, keepdim=True)) / (r.var(-1, keepdim=True, correction=0) + 1e-8).sqrt()
    if algo == "dg":
        A = A * torch.sigmoid(A * -pi.log().gather(-1, a) / eta)
    scores = torch.zeros_like(pi).scatter_add(-1, a, A) / a.shape[-1]    # (S, K) mean A * onehot(a)
    if algo == "tpo":
        return tpo_target(pi.log(), scores, eta) - pi                    # Eq. 3: -dL/dl = q - p
    return scores - scores.sum(-1, keepdim=True) * pi                    # mean of A * (e_a - pi)


def single(algo, seeds, steps, eta):
    uniform = torch.stack([torch.rand(steps, 100, generator=rng, dtype=torch.float64)
                           for rng in streams(seeds)], 1)                # (steps, S, 100)
    logits = torch.zeros(seeds, 100, dtype=torch.float64)                # TPO's misalignment is at
    e_y = F.one_hot(torch.tensor(0), 100)                                # fp32's rounding
    for step in range(steps):
        pi = logits.softmax(-1)                                          # (S, 100)
        a = sample(pi, uniform[step])                                    # (S, 100)
        g = single_gradient(algo, pi, a, (a == 0).double(), eta)
        oracle = pi[:, :1] * (e_y - pi)
        yield step, {"error": 1 - pi[:, 0], "misalignment": misalignment(g, oracle)}
        logits += 0.1 * F.normalize(g)                                   # GRPO's g may be 0


# ---- multi: exact gradients (Fig. 3) -------------------------------------------------------------

def beta(algo, p, eta):
    """The update is beta (e_y - pi) at correct-arm probability p, one of 10 arms."""
    return {"ce": lambda: torch.ones_like(p),
            "pg": lambda: p,
            "dg": lambda: p * torch.sigmoid(-p.log() / eta),
            "grpo": lambda: (p / (1 - p)).sqrt(),                # p / sigma of the reward
            "tpo": lambda: beta_plus(p, eta)}[algo]()


def beta_plus(p, eta):
    """TPO on e_y over 10 arms: u is 3 for y, else -1/3, so q - pi (Eq. 2) is this (e_y - pi)."""
    lam = math.exp(10 / 3 / eta)
    return p * (lam - 1) / (1 - p + lam * p)


def multi(algo, seeds, steps, eta):
    logits = torch.stack([torch.randn(10, 100, generator=rng, dtype=torch.float64)
                          for rng in streams(seeds)])            # (S, 10, 100): contexts last is
    e_y = F.one_hot(torch.tensor(0), 10)[:, None]                # 7 times faster
    pi = logits.softmax(1)
    for step in range(steps):
        v = e_y - pi
        g = beta(algo, pi[:, :1], eta) * v
        logits += 0.1 * F.normalize(g.flatten(1)).view_as(g)     # one step for all contexts
        pi = logits.softmax(1)
        yield step, {"error": 1 - pi[:, 0].mean(-1),
                     "misalignment": misalignment(g.flatten(1), v.flatten(1))}


# ---- mnist: one sampled label per image (Fig. 4) -------------------------------------------------

def mnist_loss(algo, logp, a, y, eta):
    """Mean over the batch, summed over the S seeds. logp (S, B, 10); a, y (S, B)."""
    S, B, _ = logp.shape
    logp_a, r = logp.gather(-1, a[..., None])[..., 0], (a == y).float()          # (S, B)
    A = r - logp.detach().exp().square().sum(-1)                 # (S, B) baseline: E[r] if y ~ pi
    scores = A[..., None] * F.one_hot(a, 10)                                     # (S, B, 10)
    if algo == "tpo":                                            # a group: ten labels of an image
        return S * tpo_loss(logp, logp.detach(), scores, eta)
    if algo == "grpo":                                           # a group: the batch of a seed
        return S / B * grpo_loss(logp_a, logp_a.detach(), r)
    if algo == "ce":
        return S * F.nll_loss(logp.flatten(0, 1), y.flatten())
    if algo == "dg":
        A = A * torch.sigmoid(A * -logp_a.detach() / eta)
    if algo == "group_pg":
        A = standardize(scores).gather(-1, a[..., None])[..., 0]
    return S * -(A * logp_a).mean()


def mnist_update(algo, pi, y, eta):
    """Logit update (S, N, 10) expected over the action, App. C: sum_a pi_a W_a (e_a - pi)."""
    e_y = F.one_hot(y, 10)                                                # (N, 10) or (S, N, 10)
    A = e_y - pi.square().sum(-1, keepdim=True)                           # (S, N, 10)
    lam = math.exp(10 / 3 / eta)
    if algo == "ce":
        return e_y - pi
    if algo == "grpo":
        r = (pi * e_y).sum(-1).mean(-1)[:, None, None]                    # (S, 1, 1)
    W = {"pg": lambda: A,
         "group_pg": lambda: 3 * A.sign(),                                # u = 3 or -3
         "grpo": lambda: (e_y - r) / (r * (1 - r)).sqrt(),
         "dg": lambda: A * torch.sigmoid(A * -pi.log() / eta),
         "tpo": lambda: torch.where(e_y == 1, beta_plus(pi, eta),         # q - pi = W (e_a - pi)
                                    -pi * (lam - 1) / (lam * (1 - pi) + pi))}[algo]()
    return pi * W - pi * (pi * W).sum(-1, keepdim=True)


def surplus(algo, pi, y, eta):
    """(S, 4): first-order gain in p_y of the expected update minus its surrogate's, Fig. 4(b), mean
    over the misclassified, NaN where a bin has none. The surrogate (one-vs-rest) spreads the wrong
    mass evenly, so that every update is beta (e_y - pi)."""
    e_y = F.one_hot(y, 10)
    p = (pi * e_y).sum(-1)                                                # (S, N)
    v = e_y - pi
    even = torch.where(e_y == 1, p[..., None], (1 - p[..., None]) / 9)
    b = (mnist_update(algo, even, y, eta) * e_y).sum(-1) / (1 - p)        # the surrogate's beta
    gain = p * ((v * mnist_update(algo, pi, y, eta)).sum(-1) - b * v.square().sum(-1))
    c = (pi * (1 - e_y)).amax(-1) / (1 - p)                               # concentration, 1/9 to 1
    wrong = pi.argmax(-1) != y
    means = []
    for low, high in zip(BINS, (*BINS[1:-1], 2)):                         # c = 1 is in the last bin
        row = wrong & (low <= c) & (c < high)
        means.append(gain.where(row, 0).sum(-1) / row.sum(-1))
    return torch.stack(means, -1)


def network(rng, n_in):
    """Zero biases, LeCun-normal weights truncated at 2 sigma, flax's default; .88 is its sigma."""
    for n, m in ((n_in, 50), (50, 50), (50, 10)):
        weight = torch.nn.init.trunc_normal_(torch.empty(n, m), std=1, a=-2, b=2, generator=rng)
        yield weight / 0.87962566 / n**0.5
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
    networks = [network(rng, images.shape[1]) for rng in rngs]
    params = [torch.stack(each).requires_grad_() for each in zip(*networks)]
    adam = torch.optim.Adam(params, lr=1e-3, fused=True)         # elementwise: exact for each seed
    start = time.time()
    for done in range(0, steps, EVERY["mnist"]):
        n = min(EVERY["mnist"], steps - done)
        index = torch.stack([torch.randint(len(labels), (n, 100), generator=rng)
                             for rng in rngs], 1)
        uniform = torch.stack([torch.rand(n, 100, 1, generator=rng) for rng in rngs], 1)
        for i, z in zip(index, uniform):                                  # (S, B), (S, B, 1)
            x, y = F.embedding(i, images), labels[i]                      # (S, B, 784), (S, B)
            logp = forward(params, x).log_softmax(-1)                     # (S, B, 10)
            a = sample(logp.detach().exp(), z)[..., 0]                    # (S, B)
            loss = mnist_loss(algo, logp, a, y, eta)
            adam.zero_grad()
            loss.backward()
            adam.step()
        step = done + n
        with torch.no_grad():
            logits = [forward(params, x.expand(seeds, -1, -1)) for x in test_images.split(1000)]
        pi = torch.cat(logits, 1).double().softmax(-1)                    # (S, N, 10)
        g, oracle = (mnist_update(name, pi, test_labels, eta).flatten(1) for name in (algo, "ce"))
        metrics = {"error": (pi.argmax(-1) != test_labels).double().mean(-1),
                   "misalignment": misalignment(g, oracle)}
        if step == mechanism_at:
            metrics["surplus"] = surplus(algo, pi, test_labels, eta)
        speed = step / (time.time() - start)
        print(f"mnist {algo:8s} step {step:6,d}/{steps:,d}   "
              f"test error {metrics['error'].mean():6.2%}   {speed * seeds:,.0f} seed-steps/s   "
              f"{(steps - step) / speed:4.0f} s left for {algo}", flush=True)
        yield step, metrics


def read_idx(folder, name, *shape):
    """uint8 of this shape from an IDX file: bytes 0, 0, 8 (uint8), ndim; big-endian sizes; data."""
    path = Path(folder) / name
    advice = f"get it by: curl --create-dirs -o {path} {MIRROR}{name}"
    if not path.exists():
        print(f"downloading {MIRROR}{name}", flush=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(MIRROR + name, timeout=30) as response:
                write(path, response.read())
        except (OSError, http.client.HTTPException) as error:
            problem = f"{path} is missing and its download failed ({error})"
            fail(f"--data {folder}: {problem}; {advice}")
    header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
    try:
        raw = gzip.decompress(path.read_bytes())
        if raw[:len(header)] != header or len(raw) != len(header) + math.prod(shape):
            raise ValueError(f"not uint8 data of shape {shape}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        fail(f"--data {folder}: {path} is damaged or another file ({error}); {advice}")
    return torch.frombuffer(bytearray(raw[len(header):]), dtype=torch.uint8).view(shape)


def load_mnist(folder):
    """Images (N, 784) in [0, 1] and labels (N,), of the training and of the test set."""
    for part, n in (("train", 60000), ("t10k", 10000)):
        yield read_idx(folder, f"{part}-images-idx3-ubyte.gz", n, 28, 28).flatten(1) / 255
        yield read_idx(folder, f"{part}-labels-idx1-ubyte.gz", n).long()


# ---- shared by the three -------------------------------------------------------------------------

def streams(seeds):
    return [torch.Generator().manual_seed(seed) for seed in range(seeds)]


def misalignment(g, oracle):
    norms = g.norm(dim=-1) * oracle.norm(dim=-1)
    return (1 - (g * oracle).sum(-1) / norms.clamp(min=1e-30)).clamp(min=0)


def mean_se(x):
    """Mean and standard error over seeds, x (S,), in 6 digits; None where there are too few."""
    six = lambda value: float(f"{value:.6g}")
    return six(x.mean()) if len(x) else None, six(x.std() / len(x)**0.5) if len(x) > 1 else None


def run(task, algo, cfg, data):
    """All seeds of one method: its records, the result last."""
    start, seeds, steps = time.time(), cfg.seeds[task], cfg.steps[task]
    if task == "mnist":
        mechanism_at = min(2000, steps) if cfg.mechanism else None
        curve = mnist(algo, seeds, steps, cfg.eta, data, mechanism_at)
    else:
        curve = {"single": single, "multi": multi}[task](algo, seeds, steps, cfg.eta)
    records, first, named = [], {}, {"task": task, "algo": algo}
    for step, metrics in curve:
        error, error_se = mean_se(metrics["error"])
        angle, angle_se = mean_se(metrics["misalignment"])
        for bar in (0.01, 0.05):
            if error < bar:
                first.setdefault(bar, step)
        if task == "mnist" or step % EVERY[task] == 0 or step == steps - 1:
            means = {"error": error, "error_se": error_se,
                     "misalignment": angle, "misalignment_se": angle_se}
            records.append({"kind": "eval", **named, "step": step, **means})
        if "surplus" in metrics:
            gains, ses = zip(*(mean_se(x[~x.isnan()]) for x in metrics["surplus"].T))
            gains = {"surplus": gains, "surplus_se": ses}
            records.append({"kind": "mechanism", **named, "step": step, **gains})
    result = {"kind": "result", **named, "seeds": seeds, "final_error": error,
              "final_error_se": error_se, "steps_to_1pct": first.get(0.01),
              "final_misalignment": angle, "seconds": round(time.time() - start, 2)}
    if task == "mnist":
        result["steps_to_5pct"] = first.get(0.05)
    return [*records, result]


def report(task, records, cfg):
    """The task's table, and what it says in a sentence."""
    of_kind = lambda kind: [r for r in records if r["kind"] == kind]
    evals, mechanism, results = map(of_kind, ("eval", "mechanism", "result"))
    goal = "5%" if task == "mnist" else "1%"
    reached = lambda r: r[f"steps_to_{goal[0]}pct"]
    at = min(112, cfg.steps[task] - 1) if task == "single" else evals[-1]["step"]
    print(f"\n{task}: seeds {cfg.seeds[task]}, steps {cfg.steps[task]}, eta {cfg.eta:g}")
    print(f"{'':9}{'final error +- s.e.':>20}{f'below {goal} at':>14}{f'1 - cos at {at}':>18}")
    angles = {r["algo"]: r["misalignment"] for r in evals if r["step"] == at}
    for r in results:
        final, angle = cell(r["final_error"], r["final_error_se"]), cell(angles[r["algo"]])
        print(f"{r['algo']:9}{final:>20}{reached(r) or '-':>14}{angle:>18}{r['seconds']:9.1f} s")
    if mechanism:                                    # ce, pg, grpo, group_pg: 0 up to rounding
        bins = [f"c in {low} to {high}" for low, high in zip(BINS, BINS[1:])]
        print(f"{'surplus':9}" + "".join(f"{text:>20}" for text in bins))
    for r in mechanism:
        cells = map(cell, r["surplus"], r["surplus_se"])
        print(f"{r['algo']:9}" + "".join(f"{text:>20}" for text in cells))
    when = [f"{r['algo']} at step {reached(r)}" if reached(r) else f"{r['algo']} never"
            for r in sorted(results, key=lambda r: reached(r) or math.inf)]
    print(f"{task}: mean error below {goal}: {', '.join(when)}")


def cell(x, se=None):
    if x is None:
        return "-"
    return f"{x:.2g}" if se is None else f"{x:.2g} +- {se:.2g}"


# ---- files, flags and errors ---------------------------------------------------------------------

def fail(message):
    print(f"bandit.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path, data):
    """Beside the file, then renamed: path is never half-written."""
    temporary = Path(f"{path}.part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def writable(path):
    try:
        tempfile.TemporaryFile(dir=Path(path).parent).close()
        return not Path(path).is_dir()
    except OSError:
        return False


def save(path, records):
    try:
        write(path, "".join(json.dumps(r) + "\n" for r in records).encode())
    except OSError as error:
        fail(f"--out {path}: cannot be written ({error.strerror}); what stood there is intact")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def parse(argv):
    """Config, and the (task, algorithm) pairs to run."""
    parser = Parser(prog="bandit.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    for f in fields(Config):
        kind = int if f.type is dict else f.type
        options = {"action": "store_true"} if kind is bool else {"type": kind}
        value = getattr(Config(), f.name)
        parser.add_argument("--" + f.name, default=value, **options,
                            help=f"{f.metadata['help']} [{value or 'off'}]")
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        fail(f"{unknown[0]} is not a flag; the flags are "
             + " ".join("--" + f.name for f in fields(Config)))
    for name in ("seeds", "steps"):
        if isinstance(getattr(given, name), int):
            setattr(given, name, dict.fromkeys(ALGOS, getattr(given, name)))
    cfg = Config(**vars(given))
    known = ALGOS["mnist"]
    tasks = list(ALGOS) if cfg.task == "all" else cfg.task.split(",")
    algos = known if cfg.algo == "all" else cfg.algo.split(",")
    runs = [(task, algo) for task in tasks for algo in ALGOS.get(task, ()) if algo in algos]
    in_tasks = "; ".join(f"{task}: {', '.join(names)}" for task, names in ALGOS.items())
    for name, fine, allowed in (
            ("task", set(tasks) <= set(ALGOS),
             f"all, or a comma list of {', '.join(ALGOS)}"),
            ("algo", set(algos) <= set(known), f"all, or a comma list of {', '.join(known)}"),
            ("algo", runs, f"of --task {cfg.task} those named behind it in {in_tasks}"),
            ("seeds", cfg.seeds["mnist"] >= 1, "whole numbers from 1"),
            ("steps", cfg.steps["mnist"] >= 1, "whole numbers from 1"),
            ("eta", 0 < cfg.eta < math.inf, "finite numbers above 0"),
            ("mechanism", not cfg.mechanism or "mnist" in tasks, "tasks with mnist among them"),
            ("out", not cfg.out or writable(cfg.out), "files in a folder you can write to"),
            ("plot", not cfg.plot or writable(cfg.plot) and cfg.plot.endswith(".png"),
             ".png files in such a folder")):
        if not fine:
            value = getattr(cfg, name)
            fail(f"--{name} {value['mnist'] if isinstance(value, dict) else value}: "
                 f"allowed are {allowed}")
    return cfg, runs


def main(argv=None):
    cfg, runs = parse(argv)
    plot = Path(__file__).parent / "results" / "plot.py"
    draw = run_path(str(plot))["bandit"] if cfg.plot else None
    with_mnist = "mnist" in (task for task, _ in runs)
    if not with_mnist:
        print("not among these: MNIST (Fig. 4), python bandit.py --task mnist, 15 min on one core")
    data = list(load_mnist(cfg.data)) if with_mnist else None
    records, results = [{"kind": "config", **asdict(cfg)}], []
    for i, (task, algo) in enumerate(runs):
        *new, result = run(task, algo, cfg, data)
        records += new
        results.append(result)
        if cfg.out:                                  # a crash costs only the method under way
            save(cfg.out, records + results)
        if task not in (name for name, _ in runs[i + 1:]):
            report(task, [r for r in records[1:] + results if r["task"] == task], cfg)
    if draw:
        draw(records + results, cfg.plot)


if __name__ == "__main__":
    main()
