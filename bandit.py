"""The bandits of the TPO paper (2604.06159, Figs. 2 to 4): where gradients point, and what for.

    python bandit.py                                    single and multi, 100 seeds: 10 s, one core
    python bandit.py --task mnist --algo tpo --seeds 2  a first look: 30 s, ends near 2.9% error
    python bandit.py --task mnist --mechanism           MNIST, 20 seeds, six methods: 15 min
The first command ends with: multi: mean error below 1%: ce at step 680, tpo at step 698, grpo at
step 756, dg at step 867, pg at step 968

single  Fig. 2: one context, 100 arms, reward 1 for arm 0; a step on 100 sampled actions
multi   Fig. 3: 100 contexts x 10 arms, exact population gradients, one global step
mnist   Fig. 4: one sampled label per image, reward 1 if right; MLP 784-50-50-10, Adam
error = 1 - pi(y), mnist: test error. misalignment = 1 - cos(g, the oracle's g) for the update g in
logit space; the oracle is CE, in single pi(y) times CE. All S seeds run in one batch of tensors,
each with a random stream of its own; B = batch of actions. The later losses of baselines.py take
GRPO's step in single (not ddpg, oapl, kondo); in multi PG's, CE's or GRPO's (not lpo, ddpg, kondo).
"""
import argparse
import gzip
import json
import math
import os
import signal
import struct
import sys
import tempfile
import time
import urllib.request
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
    eta: float = flag(1.0, "temperature of TPO's target and of DG's gate")
    data: str = flag("data/mnist", "folder of MNIST's four .gz files, downloaded if missing")
    mechanism: bool = flag(False, "mnist: also measure Fig. 4(b), at step 2000 or the last before")
    out: str = flag("", "write a log to this file; results/bandit/paper.py reads it")
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
            "grpo": lambda: (p / (1 - p).clamp(min=1e-16)).sqrt(),      # p / sigma of the reward
            "tpo": lambda: beta_plus(p, eta)}[algo]()


def beta_plus(p, eta):
    """TPO on e_y over 10 arms: u is 3 for y, else -1/3, so q - pi (Eq. 2) is this (e_y - pi)."""
    lam = math.exp(10 / 3 / eta)
    return p * (lam - 1) / (1 - p + lam * p)


def multi(algo, seeds, steps, eta):
    logits = torch.stack([torch.randn(10, 100, generator=rng, dtype=torch.float64)
                          for rng in streams(seeds)])    # (S, 10, 100): faster with contexts last
    e_y = F.one_hot(torch.tensor(0), 10)[:, None]
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
    quarter = (4 * c).long().clamp(max=3)
    wrong = pi.argmax(-1) != y
    rows = [wrong & (quarter == i) for i in range(4)]
    return torch.stack([gain.where(row, 0).sum(-1) / row.sum(-1) for row in rows], -1)


def network(rng, n_in):
    """Zero biases, LeCun-normal weights truncated at 2 sigma, flax's default; .88 is its sigma."""
    for n, m in ((n_in, 50), (50, 50), (50, 10)):
        weight = torch.nn.init.trunc_normal_(torch.empty(n, m), generator=rng)
        yield weight / 0.87962566 / n**0.5
        yield torch.zeros(1, m)


def forward(params, x):
    """logits (S, N, 10) of all S networks for their own images x (S, N, 784)."""
    W1, b1, W2, b2, W3, b3 = params
    h = torch.baddbmm(b1, x, W1).relu()
    h = torch.baddbmm(b2, h, W2).relu()
    return torch.baddbmm(b3, h, W3)


def mnist(algo, seeds, steps, eta, data, mechanism):
    images, labels, test_images, test_labels = data
    rngs = streams(seeds)
    networks = [network(rng, images.shape[1]) for rng in rngs]
    params = [torch.stack(each).requires_grad_() for each in zip(*networks)]
    adam = torch.optim.Adam(params, lr=1e-3, fused=True)         # elementwise: exact for each seed
    start = time.monotonic()
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
        if mechanism and step == min(2000, steps):
            metrics["surplus"] = surplus(algo, pi, test_labels, eta)
        speed = step / (time.monotonic() - start)
        print(f"mnist {algo:8s} step {step:6,d}/{steps:,d}   "
              f"test error {metrics['error'].mean():6.2%}   {speed * seeds:,.0f} seed-steps/s   "
              f"{(steps - step) / speed:4.0f} s left for {algo}", flush=True)
        yield step, metrics


def read_idx(folder, name, *shape):
    """uint8 of this shape from an IDX file: bytes 0, 0, 8 (uint8), ndim; big-endian sizes; data."""
    path = Path(folder, name)
    header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
    try:
        if not path.exists():
            print(f"downloading {MIRROR}{name}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(MIRROR + name, timeout=30) as response:
                write(path, response.read())
        raw = gzip.decompress(path.read_bytes())
        if raw[:len(header)] != header or len(raw) != len(header) + math.prod(shape):
            raise ValueError(f"not uint8 data of shape {shape}")
    except Exception as error:                       # a damaged file raises one of many types
        fail(f"--data {folder}: {path} is missing or damaged ({error}); "
             f"get it by: curl --create-dirs -o {path} {MIRROR}{name}")
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
    start, seeds, steps = time.monotonic(), cfg.seeds[task], cfg.steps[task]
    more = (data, cfg.mechanism) if task == "mnist" else ()
    method = {"single": single, "multi": multi, "mnist": mnist}[task]
    records, first, named = [], {}, {"task": task, "algo": algo}
    for step, metrics in method(algo, seeds, steps, cfg.eta, *more):
        error, error_se = mean_se(metrics["error"])
        angle, angle_se = mean_se(metrics["misalignment"])
        for bar in (0.01, 0.05):
            if error < bar:
                first.setdefault(bar, step)
        if step % EVERY[task] == 0 or step >= steps - 1:
            means = {"error": error, "error_se": error_se,
                     "misalignment": angle, "misalignment_se": angle_se}
            records.append({"kind": "eval", **named, "step": step, **means})
        if "surplus" in metrics:
            gains, ses = zip(*(mean_se(x[~x.isnan()]) for x in metrics["surplus"].T))
            gains = {"surplus": gains, "surplus_se": ses}
            records.append({"kind": "mechanism", **named, "step": step, **gains})
    result = {"kind": "result", **named, "seeds": seeds, "final_error": error,
              "final_error_se": error_se, "steps_to_1pct": first.get(0.01),
              "final_misalignment": angle, "seconds": round(time.monotonic() - start, 2)}
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
    for r in mechanism:                              # ce, pg, grpo, group_pg: 0 up to rounding
        cells = map(cell, r["surplus"], r["surplus_se"])
        print(f"{r['algo']:9}surplus, c to .25, .5, .75, 1: {', '.join(cells)}")
    when = [f"{r['algo']} at step {reached(r)}" if reached(r) else f"{r['algo']} never"
            for r in sorted(results, key=lambda r: reached(r) or math.inf)]
    print(f"{task}: mean error below {goal}: {', '.join(when)}")


def cell(x, se=None):
    error = "" if se is None else f" +- {se:.2g}"
    return "-" if x is None else f"{x:.2g}{error}"


# ---- files, flags and errors ---------------------------------------------------------------------
def fail(message):
    print(f"bandit.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path, data):
    """In a folder that no other process makes, then moved: path is never half-written."""
    path = os.path.realpath(path)                    # of a link its target
    try:
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
            Path(folder, "new").write_bytes(data)
            os.replace(Path(folder, "new"), path)
    except OSError as error:
        fail(f"cannot write {path} ({error.strerror}); what stood there is intact")


def writable(path):
    """Whether path is a file, old or new, no folder or device, and its folder can be written to."""
    folder = os.path.dirname(os.path.realpath(path))
    return os.access(folder, os.W_OK) and (os.path.isfile(path) or not os.path.exists(path))


def stamp(path):
    """Of a file: each writing to it changes this."""
    return os.path.exists(path) and (os.stat(path).st_ino, os.stat(path).st_mtime_ns)


def per_task(text):
    """A whole number from 1, for every task."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: allowed are whole numbers from 1")
    return dict.fromkeys(ALGOS, int(text))


def parse(argv):
    """Config, and the (task, algorithm) pairs to run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = fail
    for f in fields(Config):
        kind = per_task if f.type is dict else f.type
        options = {"action": "store_true"} if kind is bool else {"type": kind}
        value = getattr(Config(), f.name)
        parser.add_argument("--" + f.name, default=value, **options,
                            help=f"{f.metadata['help']} [{value or 'off'}]")
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        fail(f"{unknown[0]} is not a flag; the flags are "
             + " ".join("--" + f.name for f in fields(Config)))
    cfg = Config(**vars(given))
    tasks = list(ALGOS) if cfg.task == "all" else list(dict.fromkeys(cfg.task.split(",")))
    algos = ALGOS["mnist"] if cfg.algo == "all" else cfg.algo.split(",")
    runs = [(task, algo) for task in tasks for algo in ALGOS.get(task, ()) if algo in algos]
    of_tasks = "; ".join(f"{task}: {', '.join(names)}" for task, names in ALGOS.items())
    for name, fine, allowed in (
            ("task", set(tasks) <= set(ALGOS), f"all, or a comma list of {', '.join(ALGOS)}"),
            ("algo", runs and set(algos) <= set(ALGOS["mnist"]),
             f"all, or a comma list with one of --task {cfg.task} among {of_tasks}"),
            ("eta", 0.01 <= cfg.eta < math.inf, "finite numbers from 0.01"),    # exp(10 / 3 / eta)
            ("mechanism", not cfg.mechanism or "mnist" in tasks, "tasks with mnist among them"),
            ("out", not cfg.out or writable(cfg.out), "files in a folder you can write to"),
            ("plot", not cfg.plot or writable(cfg.plot) and cfg.plot.endswith(".png"),
             ".png files in such a folder")):
        if not fine:
            fail(f"--{name} {getattr(cfg, name)}: allowed are {allowed}")
    return cfg, runs


def main(argv=None):
    cfg, runs = parse(argv)
    draw = cfg.plot and run_path(Path(__file__).parent / "results/plot.py")["bandit"]
    if "mnist" not in dict(runs):
        print("not among these: MNIST (Fig. 4), python bandit.py --task mnist, 15 min on one core")
    data = list(load_mnist(cfg.data)) if "mnist" in dict(runs) else None
    records, results = [{"kind": "config", **asdict(cfg)}], []
    stood = stamp(cfg.out)
    for i, (task, algo) in enumerate(runs):
        *new, result = run(task, algo, cfg, data)
        records += new
        results.append(result)
        if cfg.out:                                  # a crash costs only the method under way
            if stamp(cfg.out) != stood:
                fail(f"--out {cfg.out}: another run has written there since this one began")
            lines = [json.dumps(r) + "\n" for r in records + results]
            write(cfg.out, "".join(lines).encode())
            stood = stamp(cfg.out)
        if task not in dict(runs[i + 1:]):
            report(task, [r for r in records[1:] + results if r["task"] == task], cfg)
    if draw:
        draw(records + results, cfg.plot)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):                   # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)    # "| head" ends the run without a word
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; with --out the methods that were done are kept")
