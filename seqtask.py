"""The sequence experiments of TPO (arXiv 2604.06159): a small transformer learns from reward alone to reverse tokens.

    python seqtask.py                                       terminal reward, H = 7, 3 seeds: 2 min on two cores
    python seqtask.py --preset table3 --length 8 --seeds 3  a preset is a set of flags; those you give replace its own
    python seqtask.py --preset section4 --smoke --out a.jsonl    the same, shrunk to minutes on a CPU
The last line to expect from the first command; rounding alone moves single seeds (on another machine 4.0, 22.8, 97.8):
    final error, 3 seeds: tpo 1.8%, grpo 19.4%, dg 97.1%

Prompt: H tokens uniform over V. The policy writes H tokens; the goal is the prompt (copy), V - 1 - x (flip), or either
one reversed. Reward per token: bag 1 if right; sequential 1 if it and all before it are right; terminal 1 on every
token if all H are right, else 0. Error of an episode = 1 - mean reward of its rollouts, before its updates.
S seeds train side by side: every parameter has a leading axis S (on a CPU S = 1, see train). B prompts, K candidates,
H length, V vocabulary, L tokens of a sequence as input (2H - 1, as the last one is never read), N = B * K sequences.

A training pass computes each distinct prefix once (see Tree) and skips what has exactly no gradient (see episode).
"""
import argparse
import itertools
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import baselines
from tpo import standardize, tpo_target, tpo_weights

SINGLE = ("pg", "ppo", "dg", "kondo")                                    # one rollout per prompt
PER_TOKEN = ("dr_grpo", "dapo", "gspo", "cispo")                         # K rollouts, log-probs per token
GROUPED = ("tpo", "grpo", "grpo_no_kl", "grpo_masked", "group_pg", "tpo_no_anchor",
           "rloo", "maxrl", "rebel", "oapl", *PER_TOKEN)                 # K rollouts per prompt
OWN_WEIGHTS = ("rloo", "maxrl", "rebel", "oapl", "dr_grpo")              # of those, neither q nor u
TOKEN = ("tpo_token", "grpo_token")                                      # K next tokens at each prefix of one rollout
LAYERS, WIDTH, HEADS = 2, 64, 2
EVERY = 60                                                               # seconds between checkpoints


def flag(default, help):
    """A field that becomes a command-line flag."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    preset: str = flag("", "an experiment of the paper: table1, table2, table3, fig8, eta, ksweep, epochs, masking, "
                           "dg-epochs, section4")
    smoke: bool = flag(False, "shrink the run to minutes on a CPU: 1 seed, H to 6, 300 episodes, B 50, K 8")
    target: str = flag("reverse_copy", "copy, flip, reverse_copy, reverse_flip *")
    reward: str = flag("terminal", "bag, sequential, terminal *")
    algo: str = flag("tpo,grpo,dg", ", ".join(SINGLE + GROUPED + TOKEN) + " *")
    length: str = flag("7", "H, tokens of the prompt and of the answer *")
    vocab: str = flag("2", "V, tokens to choose from *")
    candidates: str = flag("8", "K, candidates in a group *")
    batch: int = flag(100, "B, prompts per episode")
    epochs: str = flag("4", "gradient epochs on each batch of rollouts, for all but dg; pg, kondo, group_pg, rloo and "
                            "maxrl are made for 1 *")
    dg_epochs: str = flag("1", "the same for dg *")
    eta: str = flag("1", "temperature of TPO's target and of DG's gate, and REBEL's eta *")
    lr: float = flag(1e-3, "learning rate of Muon and of AdamW")
    episodes: int = flag(300, "batches of rollouts")
    seeds: int = flag(3, "seeds, 0 and up")
    match: str = flag("prompts", "prompts: the same B for all; interactions: single-rollout methods get B * K prompts "
                                 "and lr * sqrt(K) *")
    diagnostics: bool = flag(False, "also record gradient norms, group shares and weights per episode")
    device: str = flag("cpu", "cpu or cuda")
    out: str = flag("", "write a JSON-lines log, and each minute a checkpoint beside it; given again, goes on from it")


SECTION4 = dict(length="8", candidates="32", batch=256, episodes=2000, seeds=20)
DENSE = dict(reward="bag", length="10", episodes=1000)
PRESETS = {
    "table1": DENSE | dict(algo="tpo_token,grpo_token,dg,ppo", vocab="2,4,8,16", seeds=20),
    "table2": DENSE | dict(algo="tpo_token,grpo_token,dg,ppo", target="copy,flip,reverse_copy,reverse_flip",
                           reward="bag,sequential", seeds=10),
    "table3": dict(algo="tpo,grpo,grpo_no_kl,ppo,dg", length="7,8,9,10", match="prompts,interactions", episodes=2000,
                   seeds=20),
    "fig8": dict(algo="tpo,tpo_no_anchor,group_pg,grpo_no_kl", length="10", episodes=2000, seeds=20),
    "eta": DENSE | dict(algo="tpo_token", eta=".25,.5,1,2,4", seeds=10),
    "ksweep": SECTION4 | dict(algo="tpo,grpo", candidates="4,8,16,32,64"),
    "epochs": SECTION4 | dict(algo="tpo,grpo", epochs="1,2,4,8,16"),
    "masking": SECTION4 | dict(algo="tpo,grpo,grpo_masked"),
    "dg-epochs": SECTION4 | dict(algo="dg", dg_epochs="1,4"),
    "section4": SECTION4 | dict(algo="tpo,grpo", diagnostics=True)}


class Run(NamedTuple):
    """One algorithm at one setting: a cell of the grid that the comma lists span."""
    target: str
    reward: str
    algo: str
    length: int
    vocab: int
    candidates: int
    batch: int
    epochs: int
    eta: float
    lr: float
    match: str
    seeds: int
    episodes: int

    @property
    def K(self):                                                         # rollouts per prompt
        return self.candidates if self.algo in GROUPED else 1

    @property
    def scale(self):                                                     # more prompts for one rollout each
        return self.candidates if self.match == "interactions" and self.algo in SINGLE else 1


# ---- task ------------------------------------------------------------------------------------------------------------

def goal(target, prompts, vocab):
    """The tokens that the policy should write, (..., H) like the prompts."""
    prompts = prompts.flip(-1) if target.startswith("reverse") else prompts
    return vocab - 1 - prompts if target.endswith("flip") else prompts


def rewards(kind, right):
    """Reward of each token (..., H) from which ones are right (..., H), bool."""
    right = right.float()
    return {"bag": lambda: right,
            "sequential": lambda: right.cumprod(-1),
            "terminal": lambda: right.amin(-1, keepdim=True).expand_as(right)}[kind]()


# ---- model: pre-norm decoder, every parameter with a leading seed axis -----------------------------------------------

def parameters(rng, vocab, length):
    """The parameters of one seed. Kernels are (in, out), LeCun-normal truncated at 2 sigma, flax's default."""
    normal = lambda std, *shape: torch.randn(shape, generator=rng) * std

    def kernel(n, m):                                                    # .88 is the truncated normal's sigma
        return torch.nn.init.trunc_normal_(torch.empty(n, m), std=1, a=-2, b=2, generator=rng) / 0.87962566 / n**0.5

    P = {"token": normal(WIDTH**-0.5, vocab, WIDTH), "position": normal(0.02, 2 * length, WIDTH)}
    for l in range(LAYERS):
        P |= {f"gain1.{l}": torch.ones(1, WIDTH), f"shift1.{l}": torch.zeros(1, WIDTH),
              f"qkv.{l}": torch.cat([kernel(WIDTH, WIDTH) for _ in range(3)], 1),
              f"qkv_bias.{l}": torch.zeros(3, HEADS, WIDTH // HEADS),
              f"out.{l}": kernel(WIDTH, WIDTH), f"out_bias.{l}": torch.zeros(1, WIDTH),
              f"gain2.{l}": torch.ones(1, WIDTH), f"shift2.{l}": torch.zeros(1, WIDTH),
              f"up.{l}": kernel(WIDTH, 4 * WIDTH), f"up_bias.{l}": torch.zeros(1, 4 * WIDTH),
              f"down.{l}": kernel(4 * WIDTH, WIDTH), f"down_bias.{l}": torch.zeros(1, WIDTH)}
    return P | {"gain": torch.ones(1, WIDTH), "shift": torch.zeros(1, WIDTH),
                "head": kernel(WIDTH, vocab), "head_bias": torch.zeros(1, vocab)}


def norm_linear(x, gain, shift, W, b):
    """LayerNorm, then a linear layer; its gain and shift are folded into W and b, smaller than x (S, M, 64)."""
    return torch.baddbmm(shift @ W + b, F.layer_norm(x, (WIDTH,), eps=1e-6), gain.mT * W)


def attention_input(P, l, x):
    b = P[f"qkv_bias.{l}"].flatten(1)[:, None]
    return norm_linear(x, P[f"gain1.{l}"], P[f"shift1.{l}"], P[f"qkv.{l}"], b)              # (S, M, 3 * 64)


def rest_of_layer(P, l, x, attended):
    x = x + torch.baddbmm(P[f"out_bias.{l}"], attended, P[f"out.{l}"])
    h = norm_linear(x, P[f"gain2.{l}"], P[f"shift2.{l}"], P[f"up.{l}"], P[f"up_bias.{l}"])
    return x + torch.baddbmm(P[f"down_bias.{l}"], F.gelu(h, approximate="tanh"), P[f"down.{l}"])


def log_policy(P, x):
    return norm_linear(x, P["gain"], P["shift"], P["head"], P["head_bias"]).log_softmax(-1)          # (S, M, V)


def take(x, index):
    """Rows of x (S, M, C) by index (S, ...), flattened: (S, n, C)."""
    S, M, C = x.shape
    index = index.flatten(1) + M * torch.arange(S, device=x.device)[:, None]
    return x.reshape(S * M, C).index_select(0, index.flatten()).view(S, -1, C)


class Tree(NamedTuple):
    """N sequences as a tree of M distinct prefixes (nodes). The model is causal, so a node is computed once for all
    sequences that begin with it: linear layers run on nodes, attention on the R distinct sequences. Gradients add up at
    the nodes. Seeds with fewer nodes or sequences than others are filled up with copies of index 0."""
    token: torch.Tensor     # (S, M) last token of the prefix
    path: torch.Tensor      # (S, R, L) the nodes of each distinct sequence
    source: torch.Tensor    # (S, M) one place in the flattened path where the node stands
    node: torch.Tensor      # (S, N, L) the nodes of each given sequence
    row: torch.Tensor       # (S, N) its number among the distinct ones
    answers: int            # nodes from token H - 1 on, those that predict the answer, come first: their number


def tree(tokens, H, V, K, share=True):
    """tokens (S, N, L >= H), K neighbours with the same H first tokens. share=False looks for no other equal prefixes:
    then all sizes are known beforehand, and a GPU need not wait for them."""
    S, N, L = tokens.shape
    number, level = (torch.arange(n, device=tokens.device) for n in (N, L))
    order = number.expand(S, N)
    new = ((number % K == 0)[:, None] | (level >= H)).expand(S, N, L)
    if share:                                                            # sort by prompt, then by answer
        for part in (tokens[..., H:], tokens[..., :H]):
            # the tokens as a number in base V: equal numbers, equal tokens
            code = (part * V ** torch.arange(part.shape[-1], device=part.device).flip(0)).sum(-1)    # (S, N)
            order = order.gather(1, code.gather(1, order).argsort(dim=1, stable=True))
        tokens = tokens.gather(1, order[..., None].expand(S, N, L))
        changed = (tokens[:, 1:] != tokens[:, :-1]).cumsum(-1) > 0       # from the first token that differs on
        new = torch.cat((torch.ones_like(changed[:, :1]), changed), 1)   # (S, N, L) starts a node
    node = new.mT.flip(1).flatten(1).cumsum(1).view(S, L, N).flip(1).mT - 1                          # last tokens first
    row = new[..., -1].cumsum(1) - 1
    if share:
        M, R, answers = (int(x.max()) + 1 for x in (node, row, node[..., H - 1]))         # waits for the device
    else:
        M, R, answers = N // K * H + N * (L - H), N, N * (L - H) + N // K
    zeros = lambda n: torch.zeros(S, n, dtype=torch.long, device=tokens.device)
    one = zeros(R).scatter(1, row, number.expand(S, N))[..., None].expand(S, R, L)       # one sequence of each kind
    path = node.gather(1, one)
    place = torch.arange(R * L, device=tokens.device).expand(S, R * L)
    return Tree(token=zeros(M).scatter(1, path.flatten(1), tokens.gather(1, one).flatten(1)), path=path,
                source=zeros(M).scatter(1, path.flatten(1), place),
                node=torch.empty_like(node).scatter(1, order[..., None].expand(S, N, L), node),
                row=torch.empty_like(row).scatter(1, order, row), answers=answers)


def forward(P, tree, H, cache=None):
    """Log-probs (S, answers, V) of the token that follows each node of an answer. A list as cache collects each layer's
    keys and values (2, S * R, heads, L, 32)."""
    S, R, L = tree.path.shape
    embedding = torch.cat((P["token"], P["position"]), 1)                # (S, V + 2H, 64), looked up by a product with
    V, device = P["token"].shape[1], tree.path.device                    # 0/1: its backward is a product too, not a sum
    hot = torch.zeros(*tree.token.shape, embedding.shape[1], device=device)               # of M rows into V, one by one
    hot = hot.scatter(2, torch.stack((tree.token, V + tree.source % L), -1), 1)
    x = hot @ embedding                                                  # (S, M, 64)
    causal = torch.ones(L, L, dtype=torch.bool, device=device).tril()
    for l in range(LAYERS):
        rows = take(attention_input(P, l, x), tree.path).view(S * R, L, -1).split(WIDTH, -1)
        q, k, v = (part.view(S * R, L, HEADS, -1).transpose(1, 2) for part in rows)       # (S R, heads, L, 32)
        if cache is not None:
            cache.append((k, v))
        first, source = 0, tree.source
        if l == LAYERS - 1:                                              # above it only the answer's nodes are needed
            first, x, source = H - 1, x[:, :tree.answers], source[:, :tree.answers]
            source = (source // L * (L - first) + source % L - first).clamp(min=0)
        o = F.scaled_dot_product_attention(q[:, :, first:], k, v, causal[first:])         # (S R, heads, L - first, 32)
        x = rest_of_layer(P, l, x, take(o.transpose(1, 2).reshape(S, -1, WIDTH), source))
    return log_policy(P, x)


# ---- rollout ---------------------------------------------------------------------------------------------------------

def distinct(key, size, share):
    """key (S, N) below size -> the number of each key among the distinct ones (S, N), and one place of each (S, m)."""
    place = torch.arange(key.shape[1], device=key.device).expand_as(key)
    if not share:
        return place, place
    seen = torch.zeros(len(key), size, dtype=torch.long, device=key.device).scatter(1, key, 1).cumsum(1)
    number = seen.gather(1, key) - 1                 # seen counts keys below or equal: it rises at each key that occurs
    return number, torch.zeros_like(seen[:, :int(number.max()) + 1]).scatter(1, number, place)


def inverse_cdf(logp, uniform):
    return (uniform[..., None] > logp.exp().cumsum(-1)).sum(-1).clamp(max=logp.shape[-1] - 1)    # a cdf may end below 1


@torch.no_grad()
def rollout(P, prompts, uniform, share):
    """Answers y (S, N, H) to prompts (S, B, H), K for each, with log-probs (S, N, H, V) of all tokens at each step.

    uniform (S, N, H) decides the samples. Keys and values are kept: each prompt is computed once, then each distinct
    prefix of the answers once."""
    (S, B, H), N, V = prompts.shape, uniform.shape[1], P["token"].shape[1]
    shared, cache = tree(prompts, H, V, 1, share), []
    logp = forward(P, shared, H, cache)                                  # (S, distinct prompts, V)
    row = shared.row.repeat_interleave(N // B, 1)                        # (S, N)
    for l, kv in enumerate(cache):                                       # room for the answer's keys and values
        kv = torch.stack(kv, 1).view(S, -1, 2 * H * WIDTH)
        cache[l] = F.pad(take(kv, row).view(S * N, 2, HEADS, H, -1), (0, 0, 0, H - 1))
    number = shared.node[..., -1].repeat_interleave(N // B, 1)           # (S, N) which distinct prefix a sequence has
    y, logps = [], []
    for t in range(H):
        logps.append(take(logp, number))                                 # (S, N, V)
        y.append(inverse_cdf(logps[-1], uniform[..., t]))
        if t == H - 1:
            return torch.stack(y, -1), torch.stack(logps, 2)
        number, one = distinct(number * V + y[-1], logp.shape[1] * V, share)
        x = take(P["token"], y[-1].gather(1, one)) + P["position"][:, H + t, None]        # (S, m, 64)
        for l in range(LAYERS):
            q, k, v = take(attention_input(P, l, x), number).view(S * N, 3, HEADS, 1, -1).unbind(1)
            cache[l][:, 0, :, H + t], cache[l][:, 1, :, H + t] = k[:, :, 0], v[:, :, 0]
            k, v = cache[l][..., :H + t + 1, :].unbind(1)
            o = F.scaled_dot_product_attention(q, k, v).view(S, N, WIDTH)
            x = rest_of_layer(P, l, x, take(o, one))
        logp = log_policy(P, x)


# ---- optimizer -------------------------------------------------------------------------------------------------------

def orthogonalize(X):
    """The matrices of X (..., n, m), n <= m, with singular values moved near 1: five Newton-Schulz steps."""
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-8)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X
    return X


class Muon:
    """Nesterov momentum 0.95, orthogonalized, times sqrt(max(1, out / in)), for each matrix of the last two axes.

    Matrices of one shape, transposed ones among them, go through Newton-Schulz in one batch."""

    def __init__(self, params, lr):
        self.lr, self.groups = lr, {}
        for p in params:
            wide = p.shape[-2] <= p.shape[-1]
            shape = p.shape if wide else p.mT.shape
            self.groups.setdefault(shape, []).append((p, wide, max(1, p.shape[-1] / p.shape[-2])**0.5))
        self.momentum = {shape: torch.zeros(len(group), *shape, device=group[0][0].device)
                         for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self):
        for shape, group in self.groups.items():
            g = torch.stack([p.grad if wide else p.grad.mT for p, wide, _ in group])
            m = self.momentum[shape].lerp_(g, 0.05)
            for (p, wide, scale), u in zip(group, orthogonalize(g.lerp(m, 0.95))):
                p.sub_(u if wide else u.mT, alpha=self.lr * scale)


def optimizers(P, lr):
    """Muon for what is 2-D in the reference: embeddings, MLP kernels, the head, and, as a quirk of its shapes that we
    keep, the (heads, 32) biases of q, k and v. AdamW for the rest: its attention kernels are 3-D, so they are here. Not
    kept: optax.contrib.muon gives its AdamW Nesterov momentum and corrects Muon's bias (results/seq_optax.txt)."""
    names = ("token", "position", "qkv_bias", "up.", "down.", "head")
    on_muon = {name for name in P if name.startswith(names) and name != "head_bias"}
    return (Muon([P[name] for name in P if name in on_muon], lr),
            torch.optim.AdamW([P[name] for name in P if name not in on_muon], lr, weight_decay=0, fused=True))


# ---- the algorithm: sample, score, weigh, fit ------------------------------------------------------------------------

def loss_of(run):
    """loss(logp, logp_old, scores) of one seed, for all but the TPO family."""
    special = {"grpo_no_kl": partial(baselines.grpo_loss, beta=0), "grpo_token": baselines.grpo_loss,
               "dg": partial(baselines.dg_loss, eta=run.eta),
               "rebel": partial(baselines.rebel_loss, eta=run.eta),
               "dr_grpo": partial(baselines.dr_grpo_loss, length=run.length)}
    return special.get(run.algo) or getattr(baselines, run.algo + "_loss")


def weights(run, logp, logp_old, scores):
    """dL/dlogp, like logp: (S, B, K, H) tokens of K sequences, or (S, B, H, K) next tokens. L is a sum over seeds.

    scores (S, B, K) of sequences, else like logp. TPO's closed form is exactly 0 where p = q; autograd's not."""
    whole = run.algo in GROUPED and run.algo not in PER_TOKEN            # takes log-probs of sequences
    l, l_old = (logp.sum(-1), logp_old.sum(-1)) if whole else (logp, logp_old)            # (S, B, K) or like logp
    if run.algo.startswith("tpo"):
        anchor = torch.zeros_like(l) if run.algo == "tpo_no_anchor" else l_old
        w = tpo_weights(l, anchor, scores, run.eta) * len(l)             # its mean is over the seeds too
    else:
        l = l.detach().requires_grad_()
        w, = torch.autograd.grad(sum(map(loss_of(run), l, l_old, scores)), l)
    return w[..., None].expand_as(logp) if whole else w


def can_pull(run, choice, scores):
    """(S, N) bool: sequences that can have a gradient on a later epoch, when p has left p_old. choice as in episode."""
    S, B = scores.shape[:2]
    if run.algo.startswith("tpo"):                                       # K equal candidates: p = q = 1 / K for ever
        choice = choice.view(S, B, run.K, -1).mT if run.algo in GROUPED else choice       # (S, B, H, K)
        groups = (choice != choice[..., :1]).flatten(2).any(-1)
    elif run.algo in GROUPED and run.algo not in ("grpo", "rebel", "oapl"):               # at rest if scores equal
        groups = (standardize(scores) != 0).any(-1)
    elif run.algo in SINGLE:
        groups = ((scores - scores.mean((1, 2), keepdim=True)) != 0).flatten(2).any(-1)
    else:
        groups = torch.ones(S, B, dtype=torch.bool, device=scores.device)
    return groups.repeat_interleave(run.K, 1)


def episode(run, P, optimizer, prompts, uniform, started, share, diagnose=False):
    """One batch of rollouts and its gradient epochs. prompts (S, B, H), uniform (S, B, n, H); started (S,), bool, tells
    which seeds have ever had a gradient, and is updated. Returns the error (S,) and the diagnostics, each (S,)."""
    S, B, H = prompts.shape
    V = run.vocab
    y, logp_all = rollout(P, prompts, uniform[:, :, :run.K].flatten(1, 2), share)         # (S, N, H), (S, N, H, V)
    goals = goal(run.target, prompts, V)[:, :, None]                                      # (S, B, 1, H)
    right = y.view(S, B, run.K, H) == goals
    r = rewards(run.reward, right)                                                        # (S, B, K, H)
    choice = y[..., None]                                                                 # (S, N, H, 1) tokens to weigh
    shape, scores = r.shape, r.mean(-1) if run.algo in GROUPED else r
    if run.algo in TOKEN:                          # K candidates at each prefix, the first being the behaviour's token
        others = inverse_cdf(logp_all[:, :, None], uniform[:, :, 1:])                     # (S, B, K - 1, H)
        choice = torch.cat((y[:, :, None], others), 2).mT                                 # (S, B, H, K)
        before = torch.ones_like(r[:, :, 0])                                              # (S, B, H)
        if run.reward == "sequential":                                   # nothing counts after the behaviour's mistake
            before[..., 1:] = r[:, :, 0, :-1]
        shape, scores = choice.shape, (choice == goals.mT) * before[..., None]
    logp_old = logp_all.gather(-1, choice).view(shape)
    sequences = torch.cat((prompts.repeat_interleave(run.K, 1), y[..., :-1]), -1)         # (S, N, L)

    w = weights(run, logp_old, logp_old, scores)                         # the first epoch's, known without a forward
    kept = (w != 0).view(S, B * run.K, -1).any(-1)                       # (S, N) rows without weight have no gradient
    started |= kept.any(-1)
    for epoch in range(run.epochs):
        if epoch < 2:
            if epoch == 1:                                               # a seed that has never moved has p = p_old
                kept = can_pull(run, choice, scores) & started[:, None]
            first = sequences.gather(1, kept.long().argmax(1)[:, None, None].expand(S, 1, sequences.shape[-1]))
            nodes = tree(sequences.where(kept[..., None], first), H, V, run.K, share) if share else \
                tree(sequences, H, V, run.K, False)                      # what is not kept becomes a copy of what is
            index = nodes.node[..., H - 1:, None] * V + choice           # (S, N, H, ...) into (answers * V)
        if share and not kept.any():                                     # exact zeros; momentum still moves the weights
            for p in P.values():
                p.grad = torch.zeros_like(p)
        else:
            logp = forward(P, nodes, H).flatten(1).gather(1, index.flatten(1)).view(shape)
            if epoch:
                w = weights(run, logp.detach(), logp_old, scores)
            w = w.reshape(S, B * run.K, -1).where(kept[..., None], 0).view(shape)
            for p in P.values():
                p.grad = None
            (w * logp).sum().backward()
        if epoch == 0 and diagnose:
            norm = sum(p.grad.flatten(1).square().sum(1) for p in P.values()).sqrt()
        for o in optimizer:
            o.step()
    return 1 - r.mean((1, 2, 3)), diagnostics(run, norm, logp_old, scores) if diagnose else {}


def diagnostics(run, norm, logp_old, scores):
    """Of a grouped algorithm, each (S,): what the first epoch sees."""
    solved = scores == 1                                                                  # (S, B, K)
    u = standardize(scores)
    anchor = logp_old.sum(-1) * (run.algo == "tpo")                                       # 0: tpo_no_anchor
    weight = tpo_target(anchor, scores, run.eta) if run.algo.startswith("tpo") else u.abs()           # q, or |A|
    mean = lambda which: weight.where(which, 0).sum((1, 2)) / which.sum((1, 2)).clamp(min=1)
    return {"gradient_norm": norm, "groups_with_success": solved.any(-1).float().mean(1),
            "zero_variance": (u == 0).all(-1).float().mean(1), "weight_success": mean(solved),
            "weight_failure": mean(~solved)}


class Seeds:
    """Seeds that train side by side: their parameters, optimizers and random streams, one for each seed."""

    def __init__(self, run, seeds, device):
        self.rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        P = [parameters(rng, run.vocab, run.length) for rng in self.rngs]
        self.P = {name: torch.stack([p[name] for p in P]).to(device).requires_grad_() for name in P[0]}
        self.optimizer = optimizers(self.P, run.lr * run.scale**0.5)
        self.started = torch.zeros(len(seeds), dtype=torch.bool, device=device)

    def episode(self, run, share, diagnose):
        B, n, device = run.batch * run.scale, 1 if run.algo in SINGLE else run.candidates, self.started.device
        prompts = torch.stack([torch.randint(run.vocab, (B, run.length), generator=rng) for rng in self.rngs])
        uniform = torch.stack([torch.rand(B, n, run.length, generator=rng) for rng in self.rngs])
        return episode(run, self.P, self.optimizer, prompts.to(device), uniform.to(device), self.started, share,
                       diagnose)

    def state(self):
        muon, adam = self.optimizer
        return {"tensors": [x.detach() for x in (*self.P.values(), *muon.momentum.values(), self.started)],
                "adam": adam.state_dict(), "rngs": [rng.get_state() for rng in self.rngs]}

    def restore(self, saved):
        for x, was in zip(self.state()["tensors"], saved["tensors"]):
            x.copy_(was)
        self.optimizer[1].load_state_dict(saved["adam"])
        for rng, was in zip(self.rngs, saved["rngs"]):
            rng.set_state(was)


def train(run, device, share, diagnose=False, checkpoint=None):
    """Errors (episodes, S) of all seeds, the diagnostics {name: (episodes, S)}, and seconds.

    With share (for CPUs) each seed runs by itself: in a batch all would be as large as the largest tree, and less of it
    would fit the caches. For tpo at H = 10 that costs 0.32 s an episode instead of 0.53, and less once it has learned.
    With a path as checkpoint, the state is written there each minute, and a run of the same kind goes on from there.
    """
    parts = [Seeds(run, [s], device) for s in range(run.seeds)] if share else [Seeds(run, range(run.seeds), device)]
    kind, errors, notes, start = {**run._asdict(), "diagnose": diagnose, "share": share}, [], [], time.time()
    if (saved := load(checkpoint)) and saved["kind"] == kind:
        for part, was in zip(parts, saved["parts"]):
            part.restore(was)
        errors, notes, start = saved["errors"], saved["notes"], start - saved["seconds"]
        print(f"  goes on after episode {len(errors):,d}, from {checkpoint}")
    elif saved:
        print(f"  {checkpoint} is of another run, and replaced in a minute")
    said = written = time.time()
    for i in range(len(errors), run.episodes):
        error, note = zip(*(part.episode(run, share, diagnose) for part in parts))
        errors.append(torch.cat(error))
        notes.append({k: torch.cat([each[k] for each in note]) for k in note[0]})
        if time.time() - said > 10 or i == run.episodes - 1:
            if not all(p.isfinite().all() for part in parts for p in part.P.values()):     # no error rate tells
                fail(f"{run.algo}: weights that are not finite by episode {i + 1}; try a lower --lr (now {run.lr:g})")
            said, speed = time.time(), (i + 1) / (time.time() - start)
            print(f"  {run.algo:13s} episode {i + 1:5,d}/{run.episodes:,d}   error {errors[-1].mean():7.2%}   "
                  f"{speed * run.seeds:5.1f} seed-episodes/s   {(run.episodes - i - 1) / speed:4.0f} s left",
                  flush=True)
        if checkpoint and time.time() - written > EVERY:
            write(checkpoint, dict(kind=kind, errors=errors, notes=notes, seconds=time.time() - start,
                                   parts=[part.state() for part in parts]))
            written = time.time()
    stack = lambda rows: torch.stack([row.cpu() for row in rows])
    return stack(errors), {k: stack([note[k] for note in notes]) for k in notes[0]}, time.time() - start


# ---- records ---------------------------------------------------------------------------------------------------------

def rounded(x):
    return [float(f"{v:.4g}") for v in x.tolist()] if x.ndim else float(f"{x:.4g}")


def standard_error(x):
    """Over the seeds, the last axis; None for one seed."""
    return rounded(x.std(-1) / x.shape[-1]**0.5) if x.shape[-1] > 1 else None


def records(run, errors, notes, seconds):
    """A curve and the result. Errors are means over up to 10 episodes, the last of them for the final one."""
    T = len(errors)
    final = errors[-10:].mean(0)                                                          # (S,)
    below = (errors.mean(1) < 0.01).nonzero()
    setting = run._asdict()
    every = max(1, T // 200)
    thin = lambda x: x[:T // every * every].view(-1, every, x.shape[1]).mean(1)           # (points, S)
    curve = {"kind": "curve", **setting, "every": every, "error": rounded(thin(errors).mean(1)),
             "error_se": standard_error(thin(errors)), "error_per_seed": [rounded(e) for e in thin(errors).T]}
    curve |= {k: rounded(thin(v).mean(1)) for k, v in notes.items()}
    return curve, {"kind": "result", **setting, "final_error": rounded(final.mean()),
                   "final_error_se": standard_error(final), "solved": rounded((final < 0.05).float().mean()),
                   "steps_to_1pct": below[0, 0].item() if len(below) else None,
                   "ms_per_episode_seed": rounded(torch.tensor(seconds / T / run.seeds * 1e3)),
                   "threads": torch.get_num_threads()}


# What the paper prints, means of 20 seeds: {(V, algorithm): episodes to 1% error}, Table 1; {(match, algorithm): final
# error in % at H = 7, 8, 9, 10} of Table 3, where 95 stands for "above 95".
TABLE1 = {(v, algo): step for algo, steps in (("tpo_token", (58, 74, 103, 102)), ("grpo_token", (904, 141, 124, 148)),
                                              ("dg", (199, 273, 314, 393)), ("ppo", (872, 181, 191, 259)))
          for v, step in zip((2, 4, 8, 16), steps)}
TABLE3 = {"prompts": {"tpo": (6.9, 8.6, 6.1, 7.4), "grpo": (14.5, 27.6, 30.0, 50.4), "grpo_no_kl": (66.6, 92.5, 95, 95),
                      "ppo": (12.0, 26.3, 90.6, 95), "dg": (33.8, 58.8, 95, 95)},
          "interactions": {"tpo": (1.8, 2.8, 5.3, 19.0), "grpo": (9.6, 23.2, 36.2, 48.7),
                           "grpo_no_kl": (78.1, 83.8, 95, 95), "ppo": (38.6, 62.1, 66.2, 95),
                           "dg": (47.7, 69.4, 95, 95)}}


def paper(r):
    """What the paper prints at the setting of a result, or a dash."""
    epochs = r["epochs"] == (1 if r["algo"] == "dg" else 4)
    same = epochs and (r["target"], r["batch"], r["candidates"], r["eta"], r["lr"]) == ("reverse_copy", 100, 8, 1, 1e-3)
    if same and r["reward"] == "bag" and r["length"] == 10 and r["match"] == "prompts" and r["episodes"] == 1000:
        return f"1% at {TABLE1.get((r['vocab'], r['algo']), '-')}"
    if same and r["reward"] == "terminal" and r["vocab"] == 2 and r["episodes"] == 2000 and 7 <= r["length"] <= 10:
        error = TABLE3[r["match"]].get(r["algo"])
        return f"{'> ' * (error[r['length'] - 7] == 95)}{error[r['length'] - 7]}%" if error else "-"
    return "-"


def report(results):
    print(f"\n{'':13s}{'setting':>50}{'final error ± s.e.':>20}{'solved':>8}{'1% at':>7}{'paper':>11}"
          f"{'ms/episode':>12}")
    for r in results:
        setting = f"{r['target']} {r['reward']} H {r['length']} V {r['vocab']} K {r['candidates']} B {r['batch']} " \
                  f"E {r['epochs']} eta {r['eta']:g} {r['match']}"
        error = f"{r['final_error']:.1%}" + ("" if r["final_error_se"] is None else f" ± {r['final_error_se']:.1%}")
        step = "-" if r["steps_to_1pct"] is None else r["steps_to_1pct"]
        print(f"{r['algo']:13s}{setting:>50}{error:>20}{r['solved']:>8.0%}{step:>7}{paper(r):>11}"
              f"{r['ms_per_episode_seed']:>12.1f}")
    seeds = {r["seeds"] for r in results}
    best = sorted(results, key=lambda r: r["final_error"])
    names = dict(target="", reward="", length="H ", vocab="V ", candidates="K ", epochs="E ", eta="eta ", match="")
    varied = [k for k in names if len({(r["algo"], r[k]) for r in results}) > len({r["algo"] for r in results})]
    where = lambda r: "".join(f"{names[k]}{r[k] if isinstance(r[k], str) else format(r[k], 'g')} " for k in varied)
    print(f"final error, {max(seeds)} seed{'s' * (max(seeds) > 1)}: "
          + ", ".join(f"{r['algo']} {where(r)}{r['final_error']:.1%}" for r in best[:8]))


# ---- files, flags and errors -----------------------------------------------------------------------------------------

def fail(message):
    print(f"seqtask.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def write(path, value):
    """The lines of a log, or a dict by torch.save: beside the file, then renamed: path is never half-written."""
    temporary = Path(f"{path}.part")
    try:
        with temporary.open("wb") as f:
            if isinstance(value, dict):
                torch.save(value, f)
            else:
                f.writelines(json.dumps(line).encode() + b"\n" for line in value)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                             # of torch.save, if the disk is full
        temporary.unlink(missing_ok=True)
        fail(f"--out: cannot write {path} ({str(error).splitlines()[0]}); what stood there is intact")


def load(checkpoint):
    """What was written to checkpoint, a path or None; {} without a file."""
    if not checkpoint or not checkpoint.exists():
        return {}
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:                                           # a damaged file raises one of many types
        fail(f"--out: {checkpoint} cannot be read ({type(error).__name__}), it is damaged: delete it")


def read(path):
    """The records of an earlier run of the same command, to go on from."""
    try:
        text = Path(path).read_text() if path and Path(path).exists() else ""
        found = [json.loads(line) for line in text.splitlines()]
        if any(r["kind"] == "result" and not r.keys() >= set(Run._fields) for r in found):
            raise ValueError("results of another kind")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--out {path}: holds something else than a log of seqtask.py ({error}); give another file")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def writable(path):
    try:
        tempfile.TemporaryFile(dir=Path(path).parent).close()
        return not Path(path).is_dir()
    except OSError:
        return False


CHOICES = {"target": ("copy", "flip", "reverse_copy", "reverse_flip"), "reward": ("bag", "sequential", "terminal"),
           "algo": SINGLE + GROUPED + TOKEN, "match": ("prompts", "interactions")}
LEAST = {"length": 2, "vocab": 2, "candidates": 1, "batch": 1, "epochs": 1, "dg_epochs": 1, "episodes": 1, "seeds": 1}


def values(cfg, name):
    """The entries of a comma list, or the one value of a number, checked."""
    given, text = getattr(cfg, name), "--" + name.replace("_", "-")
    entries, allowed = str(given).split(","), None
    if name in CHOICES:
        fine, allowed = set(entries) <= set(CHOICES[name]), f"{', '.join(CHOICES[name])}, or a comma list of them"
    else:
        number = int if name in LEAST else float
        try:
            entries = [number(x) for x in entries]
            fine = all(x >= LEAST[name] if name in LEAST else 0 < x < math.inf for x in entries)
        except ValueError:
            fine = False
        allowed = f"whole numbers from {LEAST[name]}" if name in LEAST else "finite numbers above 0"
    if not fine:
        fail(f"{text} {given}: allowed are {allowed}")
    return entries


def parse(argv):
    """Config, and the runs of its grid."""
    parser = Parser(prog="seqtask.py", description=__doc__.splitlines()[0], allow_abbrev=False,
                    epilog="* a comma list runs every combination")
    for f in fields(Config):
        options = {"action": "store_true"} if f.type is bool else {"type": f.type, "metavar": f.type.__name__}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} [{f.default or 'off'}]", **options)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        fail(f"{unknown[0]} is not a flag; the flags are "
             + " ".join("--" + f.name.replace("_", "-") for f in fields(Config)))
    given = vars(given)
    if given.get("preset", "") not in ("", *PRESETS):
        fail(f"--preset {given['preset']}: allowed are {', '.join(PRESETS)}")
    cfg = Config(**PRESETS.get(given.get("preset"), {}) | given)
    if cfg.smoke:
        short = ",".join(dict.fromkeys(str(min(6, n)) for n in values(cfg, "length")))
        cfg = replace(cfg, **dict(length=short, seeds=1, batch=min(50, cfg.batch), episodes=min(300, cfg.episodes))
                      | {k: v for k, v in given.items() if k in ("seeds", "length", "batch", "episodes")})
        if "candidates" not in given and cfg.preset != "ksweep":
            cfg = replace(cfg, candidates="8")
    if cfg.device not in ("cpu", "cuda") or cfg.device == "cuda" and not torch.cuda.is_available():
        fail(f"--device {cfg.device}: allowed are cpu" + ", cuda" * torch.cuda.is_available())
    if cfg.out and not writable(cfg.out):
        fail(f"--out {cfg.out}: allowed are files in a folder you can write to")
    grid = [values(cfg, name) for name in ("target", "reward", "length", "vocab", "candidates", "batch", "epochs",
                                           "dg_epochs", "eta", "lr", "match", "seeds", "episodes", "algo")]
    runs = {}
    for target, reward, H, V, K, B, epochs, dg_epochs, *rest, algo in itertools.product(*grid):
        if algo in TOKEN and reward == "terminal":
            fail(f"--algo {algo} with --reward terminal: a token has no reward of its own; allowed are bag, sequential")
        if algo == "maxrl" and reward != "terminal":
            fail(f"--algo maxrl with --reward {reward}: its scores are 0 or 1; allowed is terminal")
        if algo not in SINGLE and K == 1:
            fail(f"--candidates 1 with --algo {algo}: a group needs at least 2; allowed with 1 are {', '.join(SINGLE)}")
        if V**H >= 2**62:
            fail(f"--vocab {V} with --length {H}: allowed are those with vocab ** length below 2 ** 62")
        run = Run(target, reward, algo, H, V, K, B, dg_epochs if algo == "dg" else epochs, *rest)
        runs[run] = None                                                 # dg_epochs changes nothing for the others
    return cfg, list(runs)


def main(argv=None):
    cfg, runs = parse(argv)
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")        # else sums in MKL depend on addresses: resumes would differ
    command = "python seqtask.py " + " ".join(sys.argv[1:] if argv is None else argv)
    checkpoint = Path(f"{cfg.out}.checkpoint") if cfg.out else None
    done = read(cfg.out)
    log = done or [{"kind": "config", "command": command, **asdict(cfg)}]
    recorded = {tuple(r[k] for k in Run._fields) for r in done if r["kind"] == "result"}
    weighted = [algo for algo in GROUPED if algo not in OWN_WEIGHTS]
    if cfg.diagnostics and any(run.algo not in weighted for run in runs):
        fail(f"--diagnostics with --algo {cfg.algo}: allowed are {', '.join(weighted)}")
    for i, run in enumerate(runs):
        print(f"{i + 1}/{len(runs)} {run.algo}: {run.target}, {run.reward}, H {run.length}, V {run.vocab}, "
              f"K {run.candidates}, B {run.batch}, epochs {run.epochs}, eta {run.eta:g}, seeds {run.seeds}", flush=True)
        if run in recorded:
            print(f"  is in {cfg.out} already: not run again")
            continue
        if run.scale > 1:
            print(f"  interaction-matched: {run.batch} * {run.scale} prompts, "
                  f"learning rate {run.lr:g} * sqrt({run.scale})")
        try:
            curve, result = records(run, *train(run, cfg.device, cfg.device == "cpu", cfg.diagnostics, checkpoint))
        except KeyboardInterrupt:
            fail("interrupted" + ("; the same command goes on from the last checkpoint" if cfg.out else ""))
        log = [*log, curve, result]
        if cfg.out:
            write(cfg.out, log)
            checkpoint.unlink(missing_ok=True)
    wanted = set(runs)
    report([r for r in log if r["kind"] == "result" and tuple(r[k] for k in Run._fields) in wanted])


if __name__ == "__main__":
    main()
