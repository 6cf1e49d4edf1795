"""The sequence tasks of TPO (arXiv 2604.06159): a transformer learns by reward to reverse tokens.

    python seqtask.py                        terminal reward, H = 7, 3 seeds: 2 min on two cores
    python seqtask.py --preset section4 --smoke --out a.jsonl  shrunk to minutes on a CPU
    python seqtask.py --preset table3 --length 8 --seeds 3     your flags replace the preset's
The first one's last line (on another machine 1.8, 19.4, 97.1: rounding moves single seeds):
    final error, 3 seeds: tpo 2.1%, grpo 6.5%, dg 97.4%

Prompt: H tokens uniform over V. The policy writes H tokens; the goal is the prompt (copy),
V - 1 - x (flip), or either one reversed. Reward per token: bag 1 if right; sequential 1 if it and
all before it are right; terminal 1 on every token if all H are right, else 0. Error of an episode =
1 - mean reward of its rollouts, before its updates.
S seeds train side by side, on a leading axis of every parameter (on a CPU S = 1, see train). B
prompts, K candidates, H length, V vocabulary, L = 2H - 1 tokens of a sequence as input (not the
answer's last), N sequences (B * K, or B where one suffices or candidates are next tokens), C tokens
weighed at each place of an answer: its own, or K next ones.
"""
import argparse
import io
import json
import os
import platform
import sys
import time
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from baselines import METHODS, tpo_no_anchor_loss
from tpo import standardize, tpo_loss, tpo_target, tpo_weights

# K next tokens at each prefix of one completion in place of K completions
TOKEN = {name + "_token": METHODS[name]._replace(per="next") for name in ("tpo", "grpo")}
ALGOS = METHODS | TOKEN
SINGLE = [name for name, method in ALGOS.items() if method.per == "sample"]
GROUPED = [name for name, method in ALGOS.items() if method.per in ("group", "token")]
BY_TARGET = tpo_loss, tpo_no_anchor_loss                        # these weigh by p - q
LAYERS, WIDTH, HEADS = 2, 64, 2                                 # the paper's text has 4 heads
EVERY = 60                                                      # seconds between checkpoints

DENSE = "--reward bag --length 10 --episodes 1000 --algo tpo_token,grpo_token,dg,ppo --seeds 10"
TERMINAL = "--length 10 --episodes 2000 --algo tpo,grpo,grpo_no_kl,ppo,dg --seeds 20"
SECTION4 = "--length 8 --candidates 32 --batch 256 --episodes 2000 --algo tpo,grpo --seeds 20"
PRESETS = {
    "table1": f"{DENSE} --vocab 2,4,8,16 --seeds 20",
    "table2": f"{DENSE} --reward bag,sequential --target copy,flip,reverse_copy,reverse_flip",
    "table3": f"{TERMINAL} --length 7,8,9,10 --match prompts,interactions",
    "fig8": f"{TERMINAL} --algo tpo,tpo_no_anchor,group_pg,grpo_no_kl",
    "eta": f"{DENSE} --algo tpo_token --eta .25,.5,1,2,4",
    "ksweep": f"{SECTION4} --candidates 4,8,16,32,64 --seeds 30",
    "epochs": f"{SECTION4} --epochs 1,2,4,8,16 --seeds 30",
    "masking": f"{SECTION4} --algo tpo,grpo,grpo_masked --seeds 30",
    "dg-epochs": f"{SECTION4} --algo dg --dg-epochs 1,4",
    "section4": f"{SECTION4} --diagnostics --seeds 10"}
flag = lambda default, help: field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    preset: str = flag("", f"an experiment of the paper: {', '.join(PRESETS)}")
    smoke: bool = flag(False, "1 seed, H to 6, 300 episodes, B 50, K 8, where no flag says more")
    target: str = flag("reverse_copy", "copy, flip, reverse_copy, reverse_flip *")
    reward: str = flag("terminal", "bag, sequential, terminal *")
    algo: str = flag("tpo,grpo,dg", f"{', '.join(ALGOS)} *")
    length: str = flag("7", "H, tokens of the prompt and of the answer *")
    vocab: str = flag("2", "V, tokens to choose from *")
    candidates: str = flag("8", "K, candidates in a group *")
    batch: int = flag(100, "B, prompts per episode")
    epochs: str = flag("4", "gradient epochs, dg's aside; some losses want 1: see baselines.py *")
    dg_epochs: str = flag("1", "the same for dg and ddpg, which are one here *")
    eta: str = flag("1", "temperature of TPO's target and of DG's gate, and REBEL's eta *")
    lr: float = flag(1e-3, "learning rate of Muon and of AdamW")
    episodes: int = flag(300, "batches of rollouts")
    seeds: int = flag(3, "how many, numbered from 0")
    match: str = flag("prompts", "prompts; interactions: lone rollouts get B * K, lr * sqrt(K) *")
    diagnostics: bool = flag(False, "also record gradient norms, group shares and weights")
    device: str = flag("cpu", "cpu or cuda")
    out: str = flag("", "a JSON-lines log, and each minute a checkpoint beside it, to go on from")


class Run(namedtuple("Run", "target reward algo length vocab candidates batch epochs eta lr match "
                            "seeds episodes diagnostics", defaults=[False])):
    """One algorithm at one setting: a cell of the grid that the comma lists span."""

    @property
    def rollouts(self):                                         # of one prompt
        return self.candidates if self.algo in GROUPED else 1

    @property
    def scale(self):                                            # more prompts for one rollout each
        return self.candidates if self.match == "interactions" and self.algo in SINGLE else 1

    @property
    def loss(self):
        return ALGOS[self.algo].bind(eta=self.eta, anchor=1.0, length=self.length)

    @property
    def words(self):
        return (self.target, self.reward, f"H {self.length}", f"V {self.vocab}",
                f"K {self.candidates}", f"B {self.batch}", f"E {self.epochs}", f"eta {self.eta:g}",
                self.match)


# ---- the algorithm: sample, score, weigh, fit ----------------------------------------------------
def episode(run, P, optimizer, prompts, uniform, started):
    """One batch of rollouts and its gradient epochs. prompts (S, B, H), uniform (S, B, K or 1, H);
    started (S,), bool, tells which seeds have ever had a gradient, and is updated. Returns notes,
    each (S,): the error and the diagnostics."""
    y, choice, logp_old = sample(run, P, prompts, uniform)
    old = logp_old * (run.algo != "tpo_no_anchor")      # what the loss sees of p_old
    r, scores = score(run, prompts, y, choice)
    w = weights(run, logp_old, old, scores)             # the first epoch's: p = p_old is known
    kept = (w != 0).flatten(2).any(-1)                  # (S, N) no weight, no gradient
    started |= kept.any(-1)
    sequences = torch.cat((prompts.repeat_interleave(run.rollouts, 1), y[..., :-1]), 2)  # (S, N, L)
    notes = {"error": 1 - r.mean((1, 2, 3))}
    for epoch in range(run.epochs):
        if epoch == 1:                                  # a seed that has never moved has p = p_old
            kept = can_pull(run, choice, scores) & started[:, None]
        if epoch < 2:
            nodes, index = locate(run, sequences, choice, kept)
        for p in P.values():
            p.grad = torch.zeros_like(p)
        if len(prompts) > 1 or kept.any():      # S > 1 does not ask: a GPU would be waited for
            logp = forward(P, nodes, run.length).flatten(1).gather(1, index).view_as(logp_old)
            if epoch > 0:
                w = weights(run, logp.detach(), old, scores)
            (w.where(kept[..., None, None], 0) * logp).sum().backward()
        if epoch == 0 and run.diagnostics:
            norm = sum(p.grad.flatten(1).square().sum(1) for p in P.values()).sqrt()
            notes |= diagnostics(run, norm, old, scores)
        for o in optimizer:                     # no gradient: momentum still moves
            o.step()
    return notes


def sample(run, P, prompts, uniform):
    """Answers y (S, N, H); tokens to weigh (S, N, H, C): y's, C = 1, or K next ones; their logp."""
    y, logp = rollout(P, prompts, uniform[:, :, :run.rollouts].flatten(1, 2))
    choice = y[..., None]
    if run.algo in TOKEN:                               # the first candidate is the one written
        others = inverse_cdf(logp[:, :, None], uniform[:, :, 1:])              # (S, B, K - 1, H)
        choice = torch.cat((y[:, :, None], others), 2).mT                      # (S, B, H, K)
    return y, choice, logp.gather(-1, choice)


def score(run, prompts, y, choice):
    """Rewards (S, B, K, H) of the tokens written, and the scores that the method compares: of
    answers (S, B, K), of their tokens (S, B, 1, H), or of next tokens (S, B, H, K)."""
    goals = goal(run.target, prompts, run.vocab)
    r = rewards(run.reward, y.unflatten(1, (-1, run.rollouts)) == goals[:, :, None])
    if run.algo not in TOKEN:
        return r, r.mean(-1) if run.algo in GROUPED else r
    scores = (choice == goals[..., None]).float()
    if run.reward == "sequential":                      # nothing after the first mistake counts
        scores *= F.pad(r[:, :, 0, :-1], (1, 0), value=1)[..., None]
    return r, scores


def weights(run, logp, logp_old, scores):
    """dL/dlogp (S, N, H, C); L is a sum over seeds. TPO's closed form is exactly 0 where p = q;
    autograd's is not."""
    per = ALGOS[run.algo].per
    l, l_old = logp, logp_old                                                  # next: (S, B, H, K)
    if per != "next":
        l, l_old = (x.view(*scores.shape[:2], run.rollouts, -1) for x in (l, l_old))  # (S, B, K, H)
    if per == "group":
        l, l_old = l.sum(-1), l_old.sum(-1)                                    # (S, B, K)
    if run.loss.func in BY_TARGET:                      # its mean is over the seeds too
        w = tpo_weights(l, l_old, scores, **run.loss.keywords) * len(l)
    else:
        l = l.detach().requires_grad_()
        w, = torch.autograd.grad(sum(map(run.loss, l, l_old, scores)), l)
    return w.flatten(1)[..., None, None].expand_as(logp) if per == "group" else w.reshape_as(logp)


def can_pull(run, choice, scores):
    """(S, N) bool: answers that can have a gradient on a later epoch, when p has left p_old."""
    if run.loss.func in BY_TARGET:                      # K equal candidates: p = q = 1 / K for ever
        if run.algo in GROUPED:
            choice = choice[..., 0].unflatten(1, (-1, run.rollouts)).mT
        groups = choice != choice[..., :1]                                     # (S, B, H, K)
    elif run.algo in SINGLE:
        groups = scores != scores.mean((1, 2), keepdim=True)
    else:                                               # at rest where all scores are equal?
        groups = (standardize(scores) != 0) | ALGOS[run.algo].pulls
    return groups.flatten(2).any(-1).repeat_interleave(run.rollouts, 1)


def locate(run, sequences, choice, kept):
    """The tree of the rows kept (S > 1: of all), and where each token to weigh stands in its table
    (S, answers * V). A row left out becomes a copy of one kept; it has no weight."""
    if len(kept) == 1:
        row = sequences[:, kept[0].int().argmax()]                             # (1, L)
        sequences = sequences.where(kept[..., None], row[:, None])
    nodes = tree(sequences, run.length, run.vocab, run.rollouts)
    node = nodes.node[..., run.length - 1:, None]                              # (S, N, H, 1)
    return nodes, (node * run.vocab + choice).flatten(1)


def diagnostics(run, norm, old, scores):
    """Of a grouped loss's first epoch, each (S,). A weight is q or |u|; NaN if there is none."""
    u = standardize(scores)
    weight = u.abs()
    if run.loss.func in BY_TARGET:
        weight = tpo_target(old.view(*scores.shape, -1).sum(-1), scores, **run.loss.keywords)
    solved = scores == 1                                                       # (S, B, K)
    mean = lambda which: weight.where(which, 0).sum((1, 2)) / which.sum((1, 2))
    return {"gradient_norm": norm,
            "groups_with_success": solved.any(-1).float().mean(1),
            "zero_variance": (u == 0).all(-1).float().mean(1),
            "weight_success": mean(solved),
            "weight_failure": mean(~solved)}


def goal(target, prompts, vocab):
    """The tokens that the policy should write, (..., H) like the prompts."""
    prompts = prompts.flip(-1) if target.startswith("reverse") else prompts
    return vocab - 1 - prompts if target.endswith("flip") else prompts


def rewards(kind, right):
    """Reward of each token (..., H) from which ones are right (..., H), bool."""
    right = right.float()
    return {"bag": right,
            "sequential": right.cumprod(-1),
            "terminal": right.amin(-1, keepdim=True).expand_as(right)}[kind]


# ---- model: pre-norm decoder, every parameter with a leading seed axis ---------------------------
def parameters(rng, vocab, length):
    """The parameters of one seed. Kernels (in, out) are flax's: LeCun-normal, cut at 2 sigma."""
    cut_normal = lambda *shape: torch.nn.init.trunc_normal_(torch.empty(shape), generator=rng)
    kernel = lambda n, m: cut_normal(n, m) / 0.87962566 / n**0.5       # the sigma after the cut
    zeros = lambda n: torch.zeros(1, n)
    ones = torch.ones(1, WIDTH)
    P = {"token": torch.randn(vocab, WIDTH, generator=rng) * WIDTH**-0.5,
         "position": torch.randn(2 * length, WIDTH, generator=rng) * 0.02}
    for l in range(LAYERS):
        P |= {f"gain1.{l}": ones, f"shift1.{l}": zeros(WIDTH),
              f"qkv.{l}": torch.cat([kernel(WIDTH, WIDTH) for _ in range(3)], 1),
              f"qkv_bias.{l}": torch.zeros(3, HEADS, WIDTH // HEADS),
              f"out.{l}": kernel(WIDTH, WIDTH), f"out_bias.{l}": zeros(WIDTH),
              f"gain2.{l}": ones, f"shift2.{l}": zeros(WIDTH),
              f"up.{l}": kernel(WIDTH, 4 * WIDTH), f"up_bias.{l}": zeros(4 * WIDTH),
              f"down.{l}": kernel(4 * WIDTH, WIDTH), f"down_bias.{l}": zeros(WIDTH)}
    return P | {"gain": ones, "shift": zeros(WIDTH),
                "head": kernel(WIDTH, vocab), "head_bias": zeros(vocab)}


def norm_linear(P, x, norm, name, at=""):
    """LayerNorm, its gain and shift folded into W and b (smaller than x), and a linear layer."""
    gain, shift, W = P[f"gain{norm}{at}"], P[f"shift{norm}{at}"], P[name + at]
    b = P[f"{name}_bias{at}"].flatten(1)[:, None]                              # (S, 1, n)
    return torch.baddbmm(shift @ W + b, F.layer_norm(x, (WIDTH,), eps=1e-6), gain.mT * W)


def heads(x, path):
    """Queries, keys and values (S, M, 3 * 64) of nodes, or keys and values (S, M, 2 * 64), along
    paths (S, R, T): (3 or 2, S * R, heads, T, 32)."""
    S, R, T = path.shape
    return take(x, path).view(S * R, T, -1, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)


def rest_of_layer(P, l, x, attended):
    x = x + torch.baddbmm(P[f"out_bias.{l}"], attended, P[f"out.{l}"])
    h = F.gelu(norm_linear(P, x, "2", "up", f".{l}"), approximate="tanh")
    return x + torch.baddbmm(P[f"down_bias.{l}"], h, P[f"down.{l}"])


def take(x, index):
    """Rows of x (S, M, D) by index (S, ...), flattened: (S, n, D)."""
    S, M, D = x.shape
    index = index.flatten(1) + M * torch.arange(S, device=x.device)[:, None]
    return x.reshape(S * M, D).index_select(0, index.flatten()).view(S, -1, D)


# ---- sequences as a tree, and rollouts -----------------------------------------------------------
class Tree(NamedTuple):
    """N sequences as a tree of M distinct prefixes, its nodes. The model is causal: linear layers
    run on nodes, attention on the R distinct sequences. Longer prefixes have smaller numbers."""
    token: torch.Tensor     # (S, M) last token of the prefix
    path: torch.Tensor      # (S, R, L) the nodes of each distinct sequence
    source: torch.Tensor    # (S, M) one place in the flattened path where the node stands
    node: torch.Tensor      # (S, N, L) the nodes of each given sequence
    answers: int            # number of nodes from token H - 1 on: those that predict the answer


def distinct(key):
    """The number of each key (S, N) among the distinct ones, ascending, and one place of each. With
    S > 1 all count as distinct: else sizes would differ, and a GPU be waited for to know them."""
    place = torch.arange(key.shape[1], device=key.device).expand_as(key)
    if len(key) > 1:
        return place, place
    found, number = key.unique(return_inverse=True)
    return number, found.new_zeros(1, len(found)).scatter(1, number, place)


def tree(tokens, H, V, K):
    """The tree of tokens (S, N, L >= H), each K neighbours with the same H first ones."""
    S, N, L = tokens.shape
    number = tokens.new_zeros(S, N)
    numbers, sizes = [], []                             # at each length of the prefix
    for t in range(L):
        number, one = distinct(number * V + tokens[..., t])
        same = K if t < H and S > 1 else 1                          # distinct() merged none
        numbers.append(number // same)
        sizes.append(one.shape[1] // same)
    node = torch.stack([number + sum(sizes[t + 1:]) for t, number in enumerate(numbers)], -1)
    path = take(node, one)
    place = torch.arange(path[0].numel(), device=path.device).expand(S, -1)
    zeros = tokens.new_zeros(S, sum(sizes))
    return Tree(token=zeros.scatter(1, node.flatten(1), tokens.flatten(1)), path=path,
                source=zeros.scatter(1, path.flatten(1), place), node=node,
                answers=sum(sizes[H - 1:]))


def forward(P, nodes, H, cache=None):
    """Log-probs (S, answers, V) of the token that follows each node of an answer. A list as cache
    collects each layer's keys and values, (S, M, 2 * 64)."""
    S, R, L = nodes.path.shape
    # not take(): a product's backward is a product too, not a sum of M rows into V, one by one
    hot = [F.one_hot(nodes.token, P["token"].shape[1]), F.one_hot(nodes.source % L, 2 * H)]
    x = torch.cat(hot, -1).float() @ torch.cat((P["token"], P["position"]), 1)
    causal = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
    for l in range(LAYERS):
        qkv = norm_linear(P, x, "1", "qkv", f".{l}")
        if cache is not None:
            cache.append(qkv[..., WIDTH:])
        q, k, v = heads(qkv, nodes.path)                                       # (S R, heads, L, 32)
        first, source = 0, nodes.source
        if l == LAYERS - 1:                             # from here on only the answers' count
            first, x, source = H - 1, x[:, :nodes.answers], source[:, :nodes.answers]
            source = source // L * (L - first) + source % L - first            # in (R, L - first)
        o = F.scaled_dot_product_attention(q[:, :, first:], k, v, causal[first:])
        o = o.transpose(1, 2).reshape(S, -1, WIDTH)                        # (S, R (L - first), 64)
        x = rest_of_layer(P, l, x, take(o, source))
    return norm_linear(P, x, "", "head").log_softmax(-1)


def inverse_cdf(logp, uniform):
    passed = uniform[..., None] > logp.exp().cumsum(-1)
    return passed.sum(-1).clamp(max=logp.shape[-1] - 1)                    # a cdf may end below 1


@torch.no_grad()
def rollout(P, prompts, uniform):
    """Answers y (S, N, H) to prompts (S, B, H), and log-probs (S, N, H, V) of all tokens at each
    step, computed once for each distinct prefix. uniform (S, N, H) decides the samples."""
    (S, B, H), N, V = prompts.shape, uniform.shape[1], P["token"].shape[1]
    nodes, cache = tree(prompts, H, V, 1), []
    logp = forward(P, nodes, H, cache)                                         # (S, prompts, V)
    path = nodes.node.repeat_interleave(N // B, 1)                             # (S, N, H)
    number = path[..., -1]                                       # (S, N) which prefix each has
    y, logps = [], []
    for t in range(H):
        if t > 0:
            number, one = distinct(number * V + y[-1])
            path = torch.cat((path, cache[0].shape[1] + number[..., None]), -1)
            logp = append(P, cache, y[-1].gather(1, one), take(path, one))
        logps.append(take(logp, number))                                       # (S, N, V)
        y.append(inverse_cdf(logps[-1], uniform[..., t]))
    return torch.stack(y, -1), torch.stack(logps, 2)


def append(P, cache, token, path):
    """Log-probs (S, m, V) after one more token (S, m) of m distinct prefixes, whose paths (S, m, T)
    end with the nodes that this adds to the cache."""
    x = take(P["token"], token) + P["position"][:, path.shape[-1] - 1, None]   # (S, m, 64)
    for l in range(LAYERS):
        qkv = norm_linear(P, x, "1", "qkv", f".{l}")
        cache[l] = torch.cat((cache[l], qkv[..., WIDTH:]), 1)
        q = qkv[..., :WIDTH].reshape(-1, HEADS, 1, WIDTH // HEADS)             # (S m, heads, 1, 32)
        k, v = heads(cache[l], path)                                           # (S m, heads, T, 32)
        x = rest_of_layer(P, l, x, F.scaled_dot_product_attention(q, k, v).reshape(x.shape))
    return norm_linear(P, x, "", "head").log_softmax(-1)


# ---- optimizers and training ---------------------------------------------------------------------
def orthogonalize(X):
    """X (..., n, m), n <= m, with singular values moved near 1: five Newton-Schulz steps."""
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-8)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X
    return X


def wide(X):
    return X if X.shape[-2] <= X.shape[-1] else X.mT


class Muon:
    """Nesterov momentum 0.95, orthogonalized, times sqrt(max(1, out / in)), for each matrix of the
    last two axes. Matrices of one shape when laid wide go through Newton-Schulz in one batch."""

    def __init__(self, params, lr):
        self.lr, self.groups = lr, {}
        for p in params:
            self.groups.setdefault(wide(p).shape, []).append(p)
        self.momentum = {shape: torch.zeros(len(group), *shape, device=group[0].device)
                         for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self):
        for shape, group in self.groups.items():
            g = torch.stack([wide(p.grad) for p in group])
            m = self.momentum[shape].lerp_(g, 0.05)
            for p, u in zip(group, orthogonalize(g.lerp(m, 0.95))):
                n_in, n_out = p.shape[-2:]
                wide(p).sub_(u, alpha=self.lr * max(1, n_out / n_in)**0.5)


def optimizers(P, lr):
    """Muon for what is 2-D in the reference: embeddings, MLP kernels, the head and, a quirk that we
    keep, biases of q, k and v. AdamW for the rest, attention kernels too: they are 3-D there. Not
    kept of optax: Nesterov in AdamW, Muon's bias correction (results/seqtask/optax.txt)."""
    names = ("token", "position", "qkv_bias", "up.", "down.", "head")
    on_muon = {name: p for name, p in P.items() if name.startswith(names) and name != "head_bias"}
    rest = [p for name, p in P.items() if name not in on_muon]
    return Muon(on_muon.values(), lr), torch.optim.AdamW(rest, lr, weight_decay=0, fused=True)


class Seeds:
    """Seeds that train side by side: their parameters, optimizers and random streams."""

    def __init__(self, run, seeds, device):
        self.rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        each = [parameters(rng, run.vocab, run.length) for rng in self.rngs]
        self.P = {name: torch.stack([P[name] for P in each]).to(device).requires_grad_()
                  for name in each[0]}
        muon, self.adam = self.optimizer = optimizers(self.P, run.lr * run.scale**0.5)
        self.started = torch.zeros(len(seeds), dtype=torch.bool, device=device)
        tensors = *self.P.values(), *muon.momentum.values(), self.started
        self.tensors = [x.detach() for x in tensors]    # of the same memory

    def episode(self, run):
        """The notes of one more episode, each (S,)."""
        B, H, n = run.batch * run.scale, run.length, 1 if run.algo in SINGLE else run.candidates
        draw = lambda make: torch.stack([make(rng) for rng in self.rngs]).to(self.started.device)
        prompts = draw(lambda rng: torch.randint(run.vocab, (B, H), generator=rng))
        uniform = draw(lambda rng: torch.rand(B, n, H, generator=rng))
        return episode(run, self.P, self.optimizer, prompts, uniform, self.started)

    def state(self):
        return {"tensors": self.tensors, "adam": self.adam.state_dict(),
                "rngs": [rng.get_state() for rng in self.rngs]}

    def restore(self, saved):
        for x, was in zip(self.tensors, saved["tensors"]):
            x.copy_(was)
        self.adam.load_state_dict(saved["adam"])
        for rng, was in zip(self.rngs, saved["rngs"]):
            rng.set_state(was)


def train(run, device, share, checkpoints=()):
    """Errors (episodes, S) of all seeds, the diagnostics {name: (episodes, S)}, and seconds. With
    share (for CPUs) each seed runs by itself: only then do sequences share prefixes. With two paths
    as checkpoints, the state goes to the first each minute, what stood there to the second, and the
    same run goes on from there."""
    groups = [[s] for s in range(run.seeds)] if share else [range(run.seeds)]
    parts = [Seeds(run, seeds, device) for seeds in groups]
    kind, rows, saved = [*run, share], [], load(checkpoints)     # a row per episode
    start = said = written = time.monotonic()
    if saved and saved["kind"] == kind:
        for part, was in zip(parts, saved["parts"]):
            part.restore(was)
        rows, start = saved["rows"], start - saved["seconds"]
        print(f"  goes on after episode {len(rows):,d}, from {saved['path']}")
    elif saved:
        print(f"  {saved['path']} is of another run, and replaced in a minute")
    for done in range(len(rows) + 1, run.episodes + 1):
        each = [part.episode(run) for part in parts]
        rows.append({name: torch.cat([row[name] for row in each]) for name in each[0]})
        now = time.monotonic()
        if now - said > 10 or done == run.episodes:
            if not all(p.isfinite().all() for part in parts for p in part.tensors):
                fail(f"{run.algo}: weights not finite by episode {done}: try a lower --lr")
            left = (run.episodes - done) / done * (now - start)
            print(f"  {run.algo:13s} episode {done:5,d}/{run.episodes:,d}   "
                  f"error {rows[-1]['error'].mean():7.2%}   {left:4.0f} s left")
            said = now
        if checkpoints and now - written > EVERY:
            states = [part.state() for part in parts]
            save(checkpoints, dict(kind=kind, rows=rows, seconds=now - start, parts=states))
            written = now
    columns = {name: torch.stack([row[name].cpu() for row in rows]) for name in rows[0]}
    return columns.pop("error"), columns, time.monotonic() - start


# ---- records, files and flags --------------------------------------------------------------------
def rounded(x):
    four = lambda v: float(f"{v:.4g}") if v == v else None          # JSON has no NaN
    return [four(v) for v in x.tolist()] if x.ndim else four(x.item())


def records(run, errors, notes, seconds):
    """A curve, each point a mean over episodes, and the result, of the last 10 of them."""
    T, S = errors.shape
    every = max(1, T // 200)
    points = lambda x: x[:T // every * every].view(-1, every, S)
    thin = points(errors).mean(1)                                              # (points, S)
    error_of_mean = lambda x: rounded(x.std(-1) / S**0.5) if S > 1 else None
    curve = {"kind": "curve", **run._asdict(), "every": every,
             "error": rounded(thin.mean(1)), "error_se": error_of_mean(thin),
             "error_per_seed": [rounded(error) for error in thin.T]}
    curve |= {name: rounded(points(note).flatten(1).nanmean(1)) for name, note in notes.items()}
    final = errors[-10:].mean(0)                                               # (S,)
    below = (errors.mean(1) < 0.01).nonzero()
    return curve, {"kind": "result", **run._asdict(), "final_error": rounded(final.mean()),
                   "final_error_se": error_of_mean(final),
                   "solved": rounded((final < 0.05).float().mean()),
                   "steps_to_1pct": below[0, 0].item() if len(below) else None,
                   "ms_per_episode_seed": float(f"{seconds / T / S * 1e3:.4g}"),
                   "threads": torch.get_num_threads()}


def report(results):
    """A table of {run: result}, and the eight best in one line, with the settings that vary."""
    width = max(len(" ".join(run.words)) for run in results)
    print(f"\n{'setting':>{13 + width}}{'error ± s.e.':>20}{'solved':>8}{'1% at':>7}"
          f"{'ms/episode':>12}")
    for run, r in results.items():
        se, step = r["final_error_se"], r["steps_to_1pct"]
        error = f"{r['final_error']:.1%}" + ("" if se is None else f" ± {se:.1%}")
        print(f"{run.algo:13s}{' '.join(run.words):>{width}}{error:>20}{r['solved']:>8.0%}"
              f"{'-' if step is None else step:>7}{r['ms_per_episode_seed']:>12.1f}")
    best = []
    for run in sorted(results, key=lambda run: results[run]["final_error"])[:8]:
        others = [other.words for other in results if other.algo == run.algo]
        varied = [word for word in run.words if any(word not in words for words in others)]
        best.append(" ".join([run.algo, *varied, f"{results[run]['final_error']:.1%}"]))
    print(f"final error, {run.seeds} seed{'s' * (run.seeds > 1)}: {', '.join(best)}")


def fail(message):
    print(f"seqtask.py: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def alone(path):
    """Hold path or stop with the name of the run that does. The system drops a dead run's lock."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a file")
        lock = open(f"{path}.lock", "a+", encoding="utf-8")
    except OSError as error:
        fail(f"--out {path}: allowed are files in a folder you can write to ({error})")
    with lock:
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            fail(f"--out {path}: {lock.read()} is writing it; give another file")
        except (ImportError, OSError):                  # Windows, or a disk without locks
            pass
        lock.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", end="", file=lock, flush=True)
        yield


def write(data, path, previous=None):
    """Never half a file: to one that no other process makes, then renamed."""
    temporary = Path(f"{path}.{os.urandom(8).hex()}.part")
    try:
        with temporary.open("xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        fail(f"--out: cannot write {path} ({error}); what stood there is intact")
    finally:
        temporary.unlink(missing_ok=True)


def save(checkpoints, state):
    """By torch.save, behind the SHA-256 of its bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    write(sha256(data).digest() + data, *checkpoints)


def load(checkpoints):
    """The state in the first of the files that is there; {} without any."""
    for path in filter(Path.exists, checkpoints):
        data = path.read_bytes()
        if sha256(data[32:]).digest() != data[:32]:
            fail(f"--out: {path} is damaged (its checksum differs): delete it to go on from the "
                 "one before it or, without that, from the start")
        return torch.load(io.BytesIO(data[32:]), "cpu", weights_only=True) | {"path": path}
    return {}


def read(path):
    """The records of an earlier command with this --out, and {run: result} of its results."""
    try:
        text = path.read_text(encoding="utf-8") if path and path.exists() else ""
        log = [json.loads(line) for line in text.splitlines()]
        return log, {Run(**{name: r[name] for name in Run._fields if name in r}): r
                     for r in log if r["kind"] == "result"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--out {path}: holds no log of seqtask.py ({error}); give another file")


def values(cfg, name):
    """The entries of a comma list, or the one value of a number, checked."""
    given = getattr(cfg, name)
    allowed = {"preset": PRESETS, "algo": ALGOS, "match": ("prompts", "interactions"),
               "target": ("copy", "flip", "reverse_copy", "reverse_flip"),
               "reward": ("bag", "sequential", "terminal"),
               "device": ["cpu"] + ["cuda"] * torch.cuda.is_available()}.get(name)
    low = {"eta": 1e-6, "lr": 1e-12}.get(name, 1)
    kind = str if allowed else type(low)
    try:
        lone = name in ("preset", "device")             # these take no comma list
        entries = [kind(x) for x in ([given] if lone else str(given).split(","))]
        fine = all(x in allowed if allowed else low <= x < torch.inf for x in entries)
    except ValueError:                                  # no number
        fine = False
    if not fine:
        numbers = f"{'whole' if kind is int else 'finite'} numbers from {low}"
        fail(f"--{name.replace('_', '-')} {given}: allowed are {', '.join(allowed or [numbers])}")
    return entries


def parse(argv):
    """Config, and the runs of its grid."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     epilog="* a comma list runs every combination")
    parser.error = fail
    flags = {f"--{f.name.replace('_', '-')}": f for f in fields(Config)}
    for name, f in flags.items():
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(name, default=f.default, **kind,
                            help=f"{f.metadata['help']} [{f.default or 'off'}]")
    cfg, unknown = parser.parse_known_args(argv)
    if unknown:
        fail(f"{unknown[0]} is not a flag; the flags are {' '.join(flags)}")
    before = PRESETS[values(cfg, "preset")[0]].split() if cfg.preset else []
    cfg = parser.parse_args(before + argv)              # of two equal flags the last one wins
    if cfg.smoke:
        lengths = dict.fromkeys(str(min(6, H)) for H in values(cfg, "length"))
        before += (f"--length {','.join(lengths)} --batch {min(50, cfg.batch)} --seeds 1 "
                   f"--episodes {min(300, cfg.episodes)} "
                   f"--candidates {cfg.candidates if cfg.preset == 'ksweep' else 8}").split()
    cfg = Config(**vars(parser.parse_args(before + argv)))
    values(cfg, "device")
    return cfg, grid(cfg)


def grid(cfg):
    """The runs of all combinations, algo changing faster than all but epochs."""
    names = "target reward length vocab candidates batch eta lr match seeds episodes algo".split()
    runs = []
    for cell in product(*(values(cfg, name) for name in names)):
        setting = dict(zip(names, cell))
        if setting["algo"] not in SINGLE:               # a group has its K rollouts either way
            setting["match"] = "prompts"
        for epochs in values(cfg, "dg_epochs" if setting["algo"] in ("dg", "ddpg") else "epochs"):
            runs.append(Run(epochs=epochs, diagnostics=cfg.diagnostics, **setting))
            check(runs[-1])
    return list(dict.fromkeys(runs))


def check(run):
    """Settings that are fine one by one but not together."""
    algo, reward = f"--algo {run.algo}", f"--reward {run.reward}"
    if run.diagnostics and run.algo not in GROUPED:
        fail(f"--diagnostics with {algo}: allowed are {', '.join(GROUPED)}")
    if run.algo in TOKEN and run.reward == "terminal":
        fail(f"{algo} with {reward}: a token has no reward of its own; allowed are bag, sequential")
    if run.algo == "maxrl" and run.reward != "terminal":
        fail(f"{algo} with {reward}: its scores are 0 or 1; allowed is terminal")
    if run.algo not in SINGLE and run.candidates == 1:
        fail(f"--candidates 1 with {algo}: a group needs 2; allowed are {', '.join(SINGLE)}")


def main(argv):
    cfg, runs = parse(argv)
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")    # else sums in MKL depend on addresses:
    out = Path(cfg.out).resolve() if cfg.out else None  # resumes would differ
    checkpoints = [Path(f"{out}{end}") for end in (".checkpoint", ".checkpoint.previous") if out]
    with alone(out) if out else nullcontext():
        log, results = read(out)
        log = log or [{"kind": "config", "command": f"python seqtask.py {' '.join(argv)}",
                       **asdict(cfg)}]
        for i, run in enumerate(runs, 1):
            print(f"{i}/{len(runs)} {run.algo}: {' '.join(run.words)}, seeds {run.seeds}")
            if run in results:
                print(f"  is in {out} already: not run again")
                continue
            trained = train(run, cfg.device, cfg.device == "cpu", checkpoints)
            log += records(run, *trained)
            results[run] = log[-1]
            if out:
                write("".join(json.dumps(line) + "\n" for line in log).encode(), out)
            for path in checkpoints:
                path.unlink(missing_ok=True)
    report({run: results[run] for run in runs})


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace", line_buffering=True)   # a locale may have no ±
    try:
        main(sys.argv[1:])
    except BrokenPipeError:                             # what reads the output, | head, has gone
        os._exit(1)
    except KeyboardInterrupt:
        fail("interrupted; with --out the same command goes on from the last checkpoint")
