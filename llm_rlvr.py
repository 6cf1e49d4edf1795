"""RL with verifiable rewards on a small GPT by Target Policy Optimization (arXiv 2604.06159).

    python llm_rlvr.py --algo tpo                    90 s on two CPU cores
    python llm_rlvr.py --algo tpo,grpo,ppo,dg        each as it was tuned, then one table
    python llm_rlvr.py --task knights_knaves         another task; --help lists every flag
    python llm_rlvr.py --algo tpo --resume           go on after Ctrl-C or a crash

One update (Trainer.update): sample K completions y_i to each of B prompts from the policy pi_old;
score them by a rule; u = their z-scores, l_i = log pi(y_i|x) summed over tokens; the target
q_i ~ exp(alpha l_i_old + u_i / eta) says which should gain probability; then a few gradient steps
on the cross-entropy of p = softmax(l - (1 - alpha) l_old) to q: its slope p - q is 0 once p = q.

The last line to expect from the first command, up to what rounding does to one seed:
    tpo (alpha 0.25) took graph_color from 8.3% to 92.3% pass@1 (greedy 93.8%) on 256 heldout ...
Log and checkpoint go to out/<task>-<algo>-<seed>/.
"""
import argparse
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from runpy import run_path
from statistics import mean
from typing import NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from baselines import METHODS
from tpo import standardize, tpo_target


# --------------------------------------------------------------------------------------- settings
def flag(default, help):
    """A field that becomes a command-line flag of the same name, type and default."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    algo: str = flag("tpo", ", ".join(METHODS) + ", or a comma list")
    task: str = flag("graph_color", "graph_color, knights_knaves or addition")
    steps: int = flag(750, "updates, each with rollouts of its own")
    prompts: int = flag(32, "prompts per update, B")
    candidates: int = flag(16, "completions per prompt, K")
    epochs: int = flag(2, "gradient steps on each batch of rollouts")
    lr: float = flag(2e-3, "AdamW learning rate: rises over 30 updates, and falls linearly to 0")
    eta: float = flag(1.0, "temperature of TPO's target, of dg's gate, or rebel's eta")
    anchor: float = flag(0.25, "alpha in q ~ p_old^alpha exp(u / eta): 1 paper, 0 uniform anchor")
    length_normalize: bool = flag(False, "grouped losses take means of token log-probs, not sums")
    seed: int = flag(0, "of the weights, the training prompts and the sampling")
    eval_every: int = flag(50, "updates between evaluations; a checkpoint precedes each")
    eval_set: str = flag("heldout", "puzzles to evaluate on: heldout, or test for final numbers")
    eval_puzzles: int = flag(256, "how many of them, all different")
    max_new_tokens: int = flag(7, "longest completion, its end token included, T")
    warm_steps: int = flag(100, "supervised steps on random answers of the right form")
    layers: int = flag(2, "transformer blocks")
    width: int = flag(128, "embedding width, a multiple of 2 x heads")
    heads: int = flag(4, "query heads")
    kv_heads: int = flag(2, "key/value heads, a divisor of heads")
    micro_tokens: int = flag(8192, "tokens in one backward pass: less needs less memory")
    recompute: bool = flag(False, "keep no activations inside blocks: slower, less memory")
    out: str = flag("out/{task}-{algo}-{seed}", "folder of log.jsonl and checkpoint.pt")
    resume: bool = flag(False, "continue from the checkpoint in --out; without it, start anew")
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    compile: bool = flag(False, "torch.compile the training pass")
    plot: bool = flag(False, "draw pass@1 into --out (needs matplotlib)")


# What each did best with on graph_color (dg: of one epoch), see results/README.md. These replace
# the defaults above; a task's own defaults and the flags of the command line replace these.
TUNED = {"tpo": dict(lr=2e-3, epochs=2), "grpo": dict(lr=1e-3, epochs=4),
         "ppo": dict(lr=1e-3, epochs=4), "dg": dict(lr=2e-3, epochs=1),
         "pg": dict(lr=1e-3, epochs=1)}
ADAMW = dict(betas=(0.9, 0.95), weight_decay=0.0, fused=True)


# -------------------------------------------------------------------------------------- algorithm
class Rollout(NamedTuple):
    """K completions of each of B prompts; equal ones of a prompt are one of the N rows.

    row[b, k] says which, so x[row] makes (B, K, ...) of (N, ...), and its gradient adds up there.
    """
    prompts: torch.Tensor       # (B, P) left-padded
    prompt_mask: torch.Tensor   # (B, P) False on padding
    y: torch.Tensor             # (N, T)
    mask: torch.Tensor          # (N, T) True up to and including the end token
    logp_old: torch.Tensor      # (N, T) under the policy that sampled them, 0 on padding
    prompt_of: torch.Tensor     # (N,)
    row: torch.Tensor           # (B, K)


class Trainer:
    """RL with verifiable rewards on a small GPT, one run. A checkpoint holds what is in `state`."""
    Config, tuned = Config, TUNED

    def __init__(self, c):
        self.c, self.task, self.device = c, self.find_task(c), pick_device(c.device)
        self.method = METHODS[c.algo]           # its loss, per, rests, ...: see baselines.Method
        self.loss = self.method.bind(eta=c.eta, anchor=c.anchor, length=c.max_new_tokens)
        torch.manual_seed(c.seed)
        torch.backends.cuda.enable_cudnn_sdp(False)     # it plans anew for each shape it meets
        self.vocabulary, self.model = self.build()
        self.model.to(self.device).recompute = c.recompute
        self.ends = torch.tensor(self.vocabulary.ends, device=self.device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.params = sum(p.numel() for p in self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.trained, c.lr, **ADAMW)
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16,
                                enabled=self.device.type == "cuda")
        self.token_logp = torch.compile(token_logp) if c.compile else token_logp
        self.rng = random.Random(c.seed)
        self.generator = torch.Generator(self.device).manual_seed(c.seed)
        self.eval_items = eval_items(self.task, c.eval_set, c.eval_puzzles)
        self.step, self.seconds = 0, 0.0        # updates done; time, warm start included
        self.records = [{"kind": "config", **asdict(c)}]                        # the log
        self.recent = []                                # metrics since the last evaluation

    def build(self):
        """The vocabulary and a new model. recipes/pretrained.py reads them from a folder."""
        c, vocabulary = self.c, Vocabulary(self.task)
        return vocabulary, GPT(ModelConfig(vocabulary.size, c.width, c.layers, c.heads, c.kv_heads,
                                           c.width // c.heads, hidden=8 * math.ceil(c.width / 3)))

    def update(self):
        """Sample, score, target, fit: one update. Returns its metrics."""
        c, start = self.c, time.perf_counter()
        items = puzzles(self.task, self.rng, c.prompts, "train")
        rollout = self.rollout(items)                              # K completions of each prompt
        scores = self.score(items, rollout.y[rollout.row]).to(self.device)                # (B, K)
        l_old = self.sequence_logp(rollout.logp_old, rollout)                             # (B, K)
        q = tpo_target(l_old, scores, c.eta, c.anchor)             # Eq. 2, fixed over the epochs
        metrics = diagnose(q, l_old, rollout, scores, self.ends, c.anchor)
        sampled, taken = time.perf_counter(), 0

        decay = warmup(self.step) * (1 - self.step / c.steps)
        self.optimizer.param_groups[0]["lr"] = c.lr * decay
        for epoch in range(c.epochs):
            # at first the policy is the one that sampled: its log-probs are known, and only rows
            # that have a slope go through the model, in backward
            logp, graph = self.policy(rollout) if epoch else (rollout.logp_old, None)     # (N, T)
            slope = self.slope(logp, rollout, scores, q, epoch)    # dL/dlogp: p - q for tpo, Eq. 3
            if not slope.any():         # at rest, where AdamW would still move by its moments
                break
            self.backward(rollout, slope, graph)
            norm, taken = self.optimizer_step(), epoch + 1
            if epoch == 0:
                metrics["grad_norm"] = norm

        metrics = {name: round(float(x), 5) for name, x in metrics.items()}
        tokens = metrics["tokens"] * scores.numel()                # of completions
        return metrics | dict(sample_tok_s=round(tokens / (sampled - start)),
                              train_tok_s=round(tokens * taken / (time.perf_counter() - sampled)))

    def rollout(self, items):
        """Sample K completions to each puzzle."""
        c, B, K = self.c, len(items), self.c.candidates
        prompts, prompt_mask = self.encode_prompts(items)
        y, logp = self.sample(prompts, prompt_mask, K, self.generator)                 # (B, K, T)
        mask = up_to_end(y, self.ends)
        T = int(mask.sum(-1).max())
        y = y.masked_fill(~mask, self.ends[0])
        y, mask, logp = (x[..., :T].flatten(0, 1) for x in (y, mask, logp))            # (B * K, T)
        prompt_of = torch.arange(B, device=self.device).repeat_interleave(K)
        key = torch.column_stack((prompt_of, -mask.sum(-1), y))    # by prompt, the longest first
        key, row = (x.to(self.device)                              # (N, 2 + T), (B * K,)
                    for x in key.cpu().unique(dim=0, return_inverse=True))     # MPS has none
        prompt_of, length, y = key[:, 0], -key[:, 1:2], key[:, 2:]
        mask = torch.arange(T, device=self.device) < length                            # (N, T)
        # of equal completions the largest: they differ by rounding
        logp = logp.new_full(y.shape, -torch.inf).scatter_reduce(
            0, row[:, None].expand(-1, T), logp, "amax")                               # (N, T)
        rollout = Rollout(prompts, prompt_mask, y, mask, logp, prompt_of, row.view(B, K))
        if c.epochs > 1 and self.device.type == "cuda":
            # in bf16 a later epoch needs log-probs of a forward like its own to compare with
            with torch.no_grad():
                rollout = rollout._replace(logp_old=self.policy(rollout)[0])
        return rollout

    def sample(self, prompts, prompt_mask, K, generator, greedy=False):
        with self.autocast():
            return sample(self.model, prompts, prompt_mask, K, self.c.max_new_tokens, self.ends,
                          generator, greedy)

    def score(self, items, y):
        """Scores (B, K), on the CPU. A completion cut off before its end token scores 0."""
        def one(key, ids):
            text, ended = self.read(ids)
            return self.task.check(key, text) if ended else 0.0

        scores = [[one(key, ids) for ids in candidates]
                  for (_, key), candidates in zip(items, y.tolist())]
        scores = torch.tensor(scores, dtype=torch.float32)
        if not scores.isfinite().all():
            fail(f"--task {self.c.task}: its check returned a score that is not finite", 1)
        return scores

    def policy(self, rollout):
        """Log-probs (N, T) under the current policy, and the same with gradient if they fit one
        micro-batch, else None: then `backward` computes them again, part by part."""
        parts = self.micro_batches(rollout, torch.arange(len(rollout.y), device=self.device))
        if len(parts) == 1:
            graph = self.log_policy(rollout, parts[0])
            return graph.detach(), graph
        with torch.no_grad():
            return torch.cat([self.log_policy(rollout, rows) for rows in parts]), None

    def slope(self, logp, rollout, scores, q, epoch):
        """dL/dlogp (N, T) of the method's loss at logp (N, T). Equal completions are one row,
        whose slopes autograd adds up."""
        logp, anchor = logp.detach().requires_grad_(), self.c.anchor
        l, l_old = (self.sequence_logp(x, rollout) for x in (logp, rollout.logp_old))     # (B, K)
        if self.c.algo == "tpo":
            p = (l - (1 - anchor) * l_old).softmax(-1)              # Eq. 1; anchor = 1: softmax(l)
            loss = ((p - q).detach() * l).sum(-1).mean()            # has tpo_loss's slope, Eq. 3
        elif self.method.per == "group":
            loss = self.loss(l, l_old, scores)
        else:
            new, old, mask = (x[rollout.row] for x in (logp, rollout.logp_old, rollout.mask))
            loss = self.loss(new, old, scores, mask=mask)           # from (B, K, T)
        slope, = torch.autograd.grad(loss, logp)
        if epoch == 0 and self.method.rests:    # 0 but for rounding, and AdamW would step by that
            slope[~informative(scores)[rollout.prompt_of]] = 0
        return slope

    def backward(self, rollout, slope, graph):
        """Add dL/dtheta: exact however rows are split; rows without slope need no forward."""
        if graph is not None:
            return graph.backward(slope)
        for rows in self.micro_batches(rollout, slope.any(-1).nonzero()[:, 0]):
            self.log_policy(rollout, rows).backward(slope[rows])

    def optimizer_step(self):
        """One AdamW step. Returns the gradient norm."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        if not norm.isfinite():
            fail(f"gradient norm {norm:g} at update {self.step}: start again with a lower --lr "
                 f"(now {self.c.lr}) or a higher --eta (now {self.c.eta})", 1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def micro_batches(self, rollout, rows):
        """Rows, sorted by prompt, in parts of about --micro-tokens tokens."""
        T, P = rollout.y.shape[1], rollout.prompts.shape[1]
        first = rollout.prompt_of[rows].diff(prepend=rows.new_tensor([-1])) > 0     # of a prompt
        tokens = (T + P * first).cumsum(0)          # a prompt is computed once for its completions
        part = (tokens - 1) // self.c.micro_tokens                                  # (rows,)
        return rows.split(part.unique_consecutive(return_counts=True)[1].tolist())

    def log_policy(self, rollout, rows):
        """Log-probs (rows, T) under the current policy, 0 on padding, with gradient."""
        mask, (N, T) = rollout.mask[rows], rollout.y.shape
        longest = int(mask.sum(-1).max())
        used, prompt_of = rollout.prompt_of[rows].unique(return_inverse=True)
        prompts, prompt_mask = rollout.prompts[used], rollout.prompt_mask[used]
        with self.autocast():
            logp = self.token_logp(self.model, prompts, prompt_mask, rollout.y[rows, :longest],
                                   prompt_of)
        return F.pad(logp, (0, T - longest)).masked_fill(~mask, 0)

    def sequence_logp(self, logp, rollout):
        """l (B, K) of whole completions; with --length-normalize their means over tokens."""
        l = logp[rollout.row].sum(-1)
        return l / rollout.mask[rollout.row].sum(-1) if self.c.length_normalize else l

    def read(self, ids):
        """(text, whether it ended) of a completion."""
        ends = self.vocabulary.ends
        length = next((t for t, token in enumerate(ids) if token in ends), None)
        return self.vocabulary.decode(ids[:length]), length is not None

    def encode_prompts(self, items):
        """Prompts (B, P) and their mask, padded on the left: completions start in one column."""
        rows = [torch.tensor(self.vocabulary.encode(text), dtype=torch.long) for text, _ in items]
        tokens = pad_sequence(rows, True, padding_value=-1, padding_side="left").to(self.device)
        return tokens.clamp(min=0), tokens >= 0

    def evaluate(self):
        """pass@1 on the evaluation puzzles: four samples each at temperature 1, and greedy.

        With it what the model writes: the first puzzle and two samples, the same one every time.
        """
        c, items, result = self.c, self.eval_items, {}
        n = max(1, c.prompts * c.candidates // 4)               # as many rows at once as in update
        for name, K, greedy in (("pass1", 4, False), ("greedy", 1, True)):
            generator, right = torch.Generator(self.device).manual_seed(0), []
            for i in range(0, len(items), n):
                y, _ = self.sample(*self.encode_prompts(items[i:i + n]), K, generator, greedy)
                scores = self.score(items[i:i + n], y)                                    # (n, K)
                right.append((scores == 1).float())
                if i == 0 and not greedy:
                    texts = [self.read(ids)[0] for ids in y[0, :2].tolist()]
                    result["example"] = dict(prompt=items[0][0], completions=texts,
                                             scores=scores[0, :2].tolist())
            result[name] = torch.cat(right).mean().item()
        return result

    def warm_start(self):
        """Supervised steps on random answers: they teach the form, nothing of the solution."""
        start, end = time.time(), self.vocabulary.ends[0]
        rng = random.Random(f"warm {self.c.seed}")
        optimizer = torch.optim.AdamW(self.trained, 2e-3, **ADAMW)
        for step in range(self.c.warm_steps):
            items = puzzles(self.task, rng, 64, "train")
            prompts, prompt_mask = self.encode_prompts(items)
            guesses = [self.vocabulary.encode(self.task.guess(rng, key)) for _, key in items]
            guesses = [torch.tensor([*guess, end]) for guess in guesses]
            y = pad_sequence(guesses, True, padding_value=end).to(self.device)           # (64, T)
            optimizer.param_groups[0]["lr"] = 2e-3 * warmup(step)
            with self.autocast():
                logp = token_logp(self.model, prompts, prompt_mask, y,
                                  torch.arange(len(y), device=self.device))
            loss = -logp[up_to_end(y, self.ends)].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.seconds = time.time() - start

    def run(self, folder, stop=()):
        """Warm start or resume, then updates, with a checkpoint and an evaluation every
        --eval-every. Ends after the update under way once stop, a list, has an item."""
        c, path = self.c, folder / "checkpoint.pt"
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)     # of this run, not of those before
        if c.resume and path.exists():
            self.restore(path)
        else:
            with suppress(OSError):             # or a run killed early would resume an older one
                path.unlink()
            self.warm_start()
        print(f"{c.algo}: {self.params:,} parameters, {self.vocabulary.size} tokens, "
              f"{self.device}; e.g. {self.eval_items[0][0][:200]!r}")
        start = time.time() - self.seconds
        while True:
            self.seconds = time.time() - start
            due = self.step % c.eval_every == 0 or self.step == c.steps
            if due or stop:
                # before the evaluation: a run killed in it repeats the evaluation, no update
                write(path, self.state())
            if stop:
                fail(f"stopped after {self.step} updates; --resume continues from {path}", 130)
            if due:
                self.record_evaluation(folder)
            if self.step == c.steps:
                return self.record_result(folder, time.time() - start)
            self.recent.append(self.update())
            self.step += 1
            self.records.append({"kind": "update", "step": self.step, **self.recent[-1]})

    def record_evaluation(self, folder):
        names = self.recent[0] if self.recent else ()           # none before the first update
        means = {name: round(mean(m[name] for m in self.recent), 5) for name in names}
        self.recent = []
        self.log(folder, kind="eval", step=self.step, seconds=round(self.seconds, 2),
                 **self.evaluate(), **means)
        print(progress(self.records[-1], self.c.steps), flush=True)

    def record_result(self, folder, seconds):
        c, evaluations = self.c, [r for r in self.records if r["kind"] == "eval"]
        first, last = evaluations[0], evaluations[-1]
        self.log(folder, kind="result", task=c.task, algo=c.algo, seed=c.seed, params=self.params,
                 steps=c.steps, pass1_before=first["pass1"], pass1_after=last["pass1"],
                 greedy_after=last["greedy"], seconds=round(seconds, 2),
                 sample_tok_s=last["sample_tok_s"], train_tok_s=last["train_tok_s"],
                 peak_mb=peak_mb(self.device))
        print(last["example"]["prompt"])
        for text, score in zip(last["example"]["completions"], last["example"]["scores"]):
            print(f"    {score:g}  {text}")
        print(f"{label(asdict(c))} took {c.task} from {first['pass1']:.1%} to {last['pass1']:.1%} "
              f"pass@1 (greedy {last['greedy']:.1%}) on {len(self.eval_items)} {c.eval_set} "
              f"puzzles in {c.steps} updates and {seconds:.0f} s, warm start included")
        return self.records

    def log(self, folder, **record):
        self.records.append(record)
        write(folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in self.records))

    def state(self):
        return dict(config=asdict(self.c), device=self.device.type, step=self.step,
                    seconds=self.seconds, records=self.records, recent=self.recent,
                    rng=self.rng.getstate(), generator=self.generator.get_state(),
                    optimizer=self.optimizer.state_dict(),
                    model={name: p.detach() for name, p in self.model.named_parameters()
                           if p.requires_grad})

    def restore(self, path):
        saved = load(self.c, path)
        self.model.load_state_dict(saved["model"], strict=False)    # what is frozen is not in it
        self.optimizer.load_state_dict(saved["optimizer"])
        self.rng.setstate(saved["rng"])
        self.generator.set_state(saved["generator"])
        for name in ("step", "seconds", "records", "recent"):
            setattr(self, name, saved[name])

    @staticmethod
    def find_task(c):
        if c.task not in TASKS:
            fail(f"--task {c.task}: allowed are {', '.join(TASKS)}")
        return TASKS[c.task]


def informative(scores):
    """(B,) groups whose scores (B, K) differ."""
    return (standardize(scores) != 0).any(-1)


def warmup(step):
    return min(1.0, (step + 1) / 30)        # AdamW's first steps have full size for any gradient


@torch.no_grad()
def diagnose(q, l_old, rollout, scores, ends, alpha):
    """How far q (B, K) asks the policy to move, and the anchor's health: look at these first."""
    y, mask, logp = (x[rollout.row] for x in (rollout.y, rollout.mask, rollout.logp_old))
    anchor = (alpha * l_old).softmax(-1)                                                  # (B, K)
    shift = (q - anchor).abs().sum(-1)                                                      # (B,)
    ended = torch.isin(y, ends).any(-1)                                                   # (B, K)
    return dict(reward=scores.mean(),
                kl=torch.xlogy(q, q / anchor.clamp(min=1e-38)).sum(-1).mean(),   # KL(q || anchor)
                informative=informative(scores).float().mean(),
                entropy=-logp.sum() / mask.sum(), tokens=mask.sum(-1).float().mean(),
                unfinished=1 - ended.float().mean(), anchor_max=anchor.amax(-1).mean(),
                anchor_size=(1 / anchor.square().sum(-1)).mean(), anchor_shift=shift.mean(),
                anchor_dead=(shift < 1e-3).float().mean(), grad_norm=scores.new_zeros(()))


# --------------------------------------------------- one prompt, K completions: sample and log-prob
class Cache:
    """Keys and values of N = B * K rows, a prompt and its completion, for each layer
    (2, N, kv_heads, P + T - 1, D): the last token is never an input. `prompts` and `append` are
    attention functions for GPT.forward."""

    def __init__(self, prompt_mask, K, T):
        self.K, self.T, self.used = K, T, prompt_mask.shape[1]  # used: slots filled so far
        self.layers, self.causal = [], causal(prompt_mask)[0]
        self.visible = F.pad(prompt_mask, (0, T - 1), value=True).repeat_interleave(K, 0)

    def prompts(self, i, q, k, v):
        """Of all prompts, (B, P, heads, D): each is computed once and copied to its K rows."""
        kv = torch.stack((k.to(v.dtype), v)).transpose(2, 3)                # (2, B, kv_heads, P, D)
        self.layers.append(F.pad(kv.repeat_interleave(self.K, 1), (0, 0, 0, self.T - 1)))
        return attention(q, k, v, self.causal)

    def append(self, i, q, k, v):
        """Of one more token in each row, (N, 1, heads, D), in slot `used`.

        Two products: for one query a row, half the time of scaled_dot_product_attention on a CPU.
        """
        keys, values = self.layers[i]
        keys[:, :, self.used], values[:, :, self.used] = k[:, 0], v[:, 0]
        keys, values = (x[:, :, :self.used + 1] for x in (keys, values))    # (N, kv_heads, S, D)
        N, kv_heads, _, D = keys.shape
        weight = (q.view(N, kv_heads, -1, D) * D ** -0.5) @ keys.mT         # (N, kv_heads, G, S)
        hidden = ~self.visible[:, None, None, :self.used + 1]
        weight = weight.masked_fill(hidden, -torch.inf).softmax(-1)
        return (weight.to(values) @ values).view(q.shape)

    def keep(self, rows):
        """Only these rows go on. Layer by layer: old and new of all would not fit."""
        for i in range(len(self.layers)):
            self.layers[i] = self.layers[i][:, rows]
        self.visible = self.visible[rows]


@torch.no_grad()
def sample(model, prompts, prompt_mask, K, T, ends, generator, greedy=False):
    """K completions y (B, K, T) of each prompt and their fp32 log-probs (B, K, T), 0 on padding.

    Temperature 1 without top-k or top-p: any other sampler is not the policy that is trained.
    """
    device, N = prompts.device, len(prompts) * K
    kv, pos = Cache(prompt_mask, K, T), causal(prompt_mask)[1]
    h = model(prompts, pos, kv.prompts)[:, -1:].repeat_interleave(K, 0)              # (N, 1, width)
    pos = pos[:, -1:].repeat_interleave(K, 0)                                         # (N, 1)
    y, logps = torch.full((N, T), ends[0], device=device), torch.zeros(N, T, device=device)
    rows = torch.arange(N, device=device)                       # those that still go on
    if not greedy:
        uniform = torch.rand(N, T, generator=generator, device=device)
    for t in range(T):
        logp = model.lm_head(h[:, 0]).float().log_softmax(-1)                         # (rows, V)
        if greedy:
            token = logp.argmax(-1, keepdim=True)                                     # (rows, 1)
        else:           # by the inverse of the cdf, one random number a row: V of them took three
            cdf = logp.exp().cumsum(-1)                # quarters of a CPU step at V = 49,152
            token = torch.searchsorted(cdf, uniform[rows, t, None] * cdf[:, -1:], right=True)
            token = token.clamp(max=cdf.shape[1] - 1)
        y[rows, t], logps[rows, t] = token[:, 0], logp.gather(-1, token)[:, 0]
        if t == T - 1:
            break
        if t % 16 == 15:                # rows that ended leave; it costs a host sync, so not each t
            going = ~torch.isin(y[rows, :t + 1], ends).any(-1)                        # (rows,)
            if not going.any():
                break
            if going.float().mean() <= 0.75:
                rows, pos, token = rows[going], pos[going], token[going]
                kv.keep(going)
        h = model(token, pos + 1 + t, kv.append)
        kv.used += 1
    return y.view(-1, K, T), logps.masked_fill(~up_to_end(y, ends), 0).view(-1, K, T)


def up_to_end(y, ends):
    """True up to and including the first end token, which is sampled, scored and trained."""
    ended = torch.isin(y, ends)
    return ended.cumsum(-1) - ended.int() == 0


def token_logp(model, prompts, prompt_mask, y, prompt_of):
    """fp32 log-probs (N, T), with gradient, of completions y (N, T) of prompts[prompt_of] (B, P).

    Prompts and completions go through the linear layers as one list of B * P + N * (T - 1) tokens,
    so that a prompt is computed once for all its completions. Who attends to whom, for a prompt x
    with completions y and z of three tokens (the last is never an input; padding is left out):

                   x1 x2 x3   y1 y2   z1 z2        predicts
        x1          *
        x2          *  *
        x3          *  *  *                        y1 and z1
        y1          *  *  *    *                   y2
        y2          *  *  *    *  *                y3
        z1          *  *  *            *           z2
        z2          *  *  *            *  *        z3
    """
    (B, P), (N, T) = prompts.shape, y.shape
    prompt_causal, prompt_pos = causal(prompt_mask)
    own = torch.ones(T - 1, T - 1, dtype=torch.bool, device=y.device).tril().expand(N, -1, -1)
    prompt = prompt_mask[prompt_of][:, None].expand(-1, T - 1, -1)
    visible = torch.cat((prompt, own), 2)[:, None]                     # (N, 1, T - 1, P + T - 1)
    pos = prompt_pos[prompt_of, -1:] + 1 + torch.arange(T - 1, device=y.device)        # (N, T - 1)

    def split(x):                               # the list -> (B, P, ...) and (N, T - 1, ...)
        return x[:B * P].unflatten(0, (B, P)), x[B * P:].unflatten(0, (N, T - 1))

    def attend(_, q, k, v):
        (q, q_y), (k, k_y), (v, v_y) = split(q), split(k), split(v)
        keys = torch.cat((k.index_select(0, prompt_of), k_y), 1)
        values = torch.cat((v.index_select(0, prompt_of), v_y), 1)
        out, out_y = attention(q, k, v, prompt_causal), attention(q_y, keys, values, visible)
        return torch.cat((out.flatten(0, 1), out_y.flatten(0, 1)))

    tokens = torch.cat((prompts.flatten(), y[:, :-1].flatten()))
    h, h_y = split(model(tokens, torch.cat((prompt_pos.flatten(), pos.flatten())), attend))
    h = torch.cat((h[:, -1:].index_select(0, prompt_of), h_y), 1)                   # (N, T, width)

    def nll(h, target):
        return F.cross_entropy(model.lm_head(h).float(), target, reduction="none")

    n = max(1, 2**24 // model.config.vocab)     # 64 MB of logits at once, made again in backward
    chunks = list(zip(h.flatten(0, 1).split(n), y.flatten().split(n)))
    if len(chunks) == 1:
        return -nll(*chunks[0]).view(N, T)
    losses = [checkpoint(nll, *chunk, use_reentrant=False) for chunk in chunks]
    return -torch.cat(losses).view(N, T)


def causal(prompt_mask):
    """Mask (B, 1, P, P) of left-padded prompts, and their rotary positions (B, P)."""
    P, device = prompt_mask.shape[1], prompt_mask.device
    mask = torch.ones(P, P, dtype=torch.bool, device=device).tril() & prompt_mask[:, None]
    mask = mask | torch.eye(P, dtype=torch.bool, device=device)   # a softmax over nothing is NaN
    return mask[:, None], (prompt_mask.cumsum(1) - 1).clamp(min=0)


def attention(q, k, v, mask):
    """From q (B, S, heads, D) to k, v (B, S', kv_heads, D); mask (B, 1, S, S') is True if seen.

    The G query heads of a key head become further queries, since no fused kernel of CUDA takes
    both a mask and enable_gqa.
    """
    S, kv_heads, G = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    q = q.unflatten(2, (kv_heads, G)).permute(0, 2, 3, 1, 4).flatten(2, 3)   # (B, kv_heads, G S, D)
    y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2),
                                       attn_mask=mask.repeat(1, 1, G, 1))
    return y.unflatten(2, (G, S)).permute(0, 3, 1, 2, 4).flatten(2, 3)


# ------------------------------------------------------------------------------------------ model
@dataclass(frozen=True)
class ModelConfig:
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int                 # of the MLP
    qkv_bias: bool = False      # Qwen2
    qk_norm: bool = True        # Qwen3
    tied: bool = False          # the head is the token embedding
    theta: float = 10_000.0     # of the rotary positions
    eps: float = 1e-6           # of the RMSNorms


class GPT(nn.Module):
    """Decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention; named as in HF Llama."""

    def __init__(self, c):
        super().__init__()
        self.config, self.recompute = c, False
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(c.vocab, c.width),
                                    "layers": nn.ModuleList(Block(c) for _ in range(c.layers)),
                                    "norm": nn.RMSNorm(c.width, c.eps)})
        self.lm_head = nn.Linear(c.width, c.vocab, bias=False)
        frequency = c.theta ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        self.register_buffer("inv_freq", frequency, persistent=False)                   # (D / 2,)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):    # the residual stream's
                nn.init.normal_(p, std=(2 * c.layers * p.shape[1]) ** -0.5)
            elif p.ndim == 2:
                wide = "embed_tokens" in name and not c.tied
                nn.init.normal_(p, std=1.0 if wide else p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if c.tied:
            self.lm_head.weight = self.model["embed_tokens"].weight

    def forward(self, tokens, pos, attend):
        """Final hidden states (..., width) of tokens (...) at rotary positions pos (...).

        Who sees whom is the caller's: attend(i, q, k, v) is the attention of layer i, from q
        (..., heads, D) and k, v (..., kv_heads, D), D = head_dim, to (..., heads, D).
        """
        angle = torch.cat((pos[..., None] * self.inv_freq,) * 2, -1)[..., None, :]   # (..., 1, D)
        rope, x = (angle.cos(), angle.sin()), self.model["embed_tokens"](tokens).float()
        for i, block in enumerate(self.model["layers"]):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, partial(attend, i), use_reentrant=False)
            else:
                x = block(x, rope, partial(attend, i))
        return self.model["norm"](x)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.width, c.eps)
        self.post_attention_layernorm = nn.RMSNorm(c.width, c.eps)
        self.self_attn, self.mlp = Attention(c), MLP(c)

    def forward(self, x, rope, attend):
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, c.eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.eps) if c.qk_norm else nn.Identity()

    def forward(self, x, rope, attend):
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim))                  # (..., heads, D)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q.float()), rope), rotate(self.k_norm(k.float()), rope)
        return self.o_proj(attend(q, k, v).flatten(-2))


def rotate(x, rope):
    a, b = x.chunk(2, -1)
    return x * rope[0] + torch.cat((-b, a), -1) * rope[1]


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.hidden, bias=False)
        self.up_proj = nn.Linear(c.width, c.hidden, bias=False)
        self.down_proj = nn.Linear(c.hidden, c.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ------------------------------------------------------------------------------------------ tasks
# A task has defaults, a dict of its own defaults for flags, and
#   prompt(rng) -> (text, key)     a fresh puzzle in its only spelling (names, edges, terms sorted):
#                                  a hash of the text decides whether it is trained or evaluated on
#   check(key, answer) -> score    1.0 is right; values in [0, 1) give partial credit
#   guess(rng, key) -> answer      for the warm start: right in form, blind to the solution
#   split(text) -> split           optional, where data come with a split; by default hash_split
class KnightsKnaves:
    """Knights tell the truth, knaves lie; who is what? Every puzzle has exactly one solution."""
    people, kinds, joints = "ABC", ("knight", "knave"), {"and": all, "or": any}
    defaults = {}

    def prompt(self, rng):
        worlds = [dict(zip(self.people, w)) for w in itertools.product(self.kinds, repeat=3)]
        while True:
            said = {}                   # speaker -> a claim: "B is a knave or C is a knight"
            for speaker in self.people:
                n = rng.choice((1, 2, 2))
                about = sorted(zip(rng.sample(self.people, n), rng.choices(self.kinds, k=n)))
                said[speaker] = rng.choice(list(self.joints)), about
            fits = [world for world in worlds if self.consistent(world, said)]
            if len(fits) == 1:
                claims = [f"{speaker} says " + f" {joint} ".join(f"{x} is a {k}" for x, k in about)
                          for speaker, (joint, about) in said.items()]
                return ". ".join(claims) + ". Who?", fits[0]

    def consistent(self, world, said):
        """Whether the knights of world, and only they, said something true."""
        return all((world[speaker] == "knight")
                   == self.joints[joint](world[x] == kind for x, kind in about)
                   for speaker, (joint, about) in said.items())

    def check(self, key, answer):
        """The share of people given the right kind, if each is named once, in any order."""
        words = answer.split()                                  # B knave A knight C knave
        said = dict(zip(words[::2], words[1::2]))
        if len(words) != 2 * len(key) or said.keys() != key.keys():
            return 0.0
        return mean(float(said[person] == kind) for person, kind in key.items())

    def guess(self, rng, key):
        return "".join(f" {person} {rng.choice(self.kinds)}" for person in self.people)


class GraphColor:
    """Give six nodes three colors, so that no edge joins equal colors; any such is right."""
    nodes, colors = "ABCDEF", ("red", "green", "blue")
    edges = ["-".join(pair) for pair in itertools.combinations(nodes, 2)]
    defaults = {}

    def prompt(self, rng):
        while True:
            edges = sorted(rng.sample(self.edges, rng.randint(4, 8)))
            if any(self.proper(edges, c) for c in itertools.product(self.colors, repeat=6)):
                return "Color" + "".join(" " + e for e in edges) + ":", edges

    def proper(self, edges, colors):
        color = dict(zip(self.nodes, colors))
        return all(color[e[0]] != color[e[2]] for e in edges)

    def check(self, key, answer):
        colors = answer.split()
        fits = len(colors) == 6 and set(colors) <= set(self.colors)
        return float(fits and self.proper(key, colors))

    def guess(self, rng, key):
        return "".join(" " + rng.choice(self.colors) for _ in self.nodes)


class Addition:
    """a + b of one or two digits each."""
    defaults = {"max_new_tokens": 4}

    def prompt(self, rng):
        a, b = sorted(rng.randrange(10 ** rng.randint(1, 2)) for _ in range(2))
        return f"{a}+{b}=", str(a + b)

    def check(self, key, answer):
        return float(answer == key)

    def guess(self, rng, key):
        return str(rng.randrange(10 ** rng.randint(1, 3)))


TASKS = {"graph_color": GraphColor(), "knights_knaves": KnightsKnaves(), "addition": Addition()}


def hash_split(text):
    """By a hash of the text, 8 of 10 puzzles are in train, 1 in heldout, 1 in test."""
    return {0: "heldout", 1: "test"}.get(zlib.crc32(text.encode()) % 10, "train")


def puzzles(task, rng, n, split):
    """n (text, key) pairs of a split: train, heldout or test."""
    split_of = getattr(task, "split", hash_split)
    drawn = (task.prompt(rng) for _ in range(1000 * n))
    found = list(itertools.islice((p for p in drawn if split_of(p[0]) == split), n))
    if len(found) < n:
        fail(f"--task: {len(found)} of {1000 * n} drawn puzzles are in the split {split}: too few")
    return found


@cache
def eval_items(task, split, n):
    """The puzzles of an evaluation, all different and the same for every seed."""
    rng, found = random.Random(split), {}
    for _ in range(20 * n + 1000):              # enough to meet all n of a task that has n
        if len(found) < n:
            found.update(puzzles(task, rng, 1, split))
    if len(found) < n:
        print(f"--eval-puzzles {n}: the split {split} has {len(found)}, all are used")
    return list(found.items())


class Vocabulary:
    """Tokens: the pieces of 2,000 puzzles and guesses of a task, and the end token, the last id.

    A piece is a word with the space before it, or any other single character.
    """
    piece = r" ?[A-Za-z-]+|[\s\S]"

    def __init__(self, task):
        rng, pieces = random.Random(0), set()
        for text, key in (task.prompt(rng) for _ in range(2000)):
            pieces.update(re.findall(self.piece, text))
            pieces.update(re.findall(self.piece, task.guess(rng, key)))
        ranks = {piece.encode(): i for i, piece in enumerate(sorted(pieces))}
        self.encoding = tiktoken.Encoding("task", pat_str=self.piece, mergeable_ranks=ranks,
                                          special_tokens={"<|end|>": len(ranks)})
        self.size, self.ends = self.encoding.n_vocab, [len(ranks)]

    def encode(self, text):
        try:
            return [self.encoding.encode_single_token(p) for p in re.findall(self.piece, text)]
        except KeyError as error:
            fail(f"--task: {error.args[0].decode()!r} of {text!r} is not among the words of 2,000 "
                 "puzzles and guesses")

    def decode(self, ids):
        return self.encoding.decode(ids)


# ------------------------------------------------------------------------------ files and errors
def fail(message, status=2):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


def write(path, value):
    """A str, or anything torch.save takes: beside path, flushed, renamed. Never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as f:
            f.write(value.encode()) if isinstance(value, str) else torch.save(value, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:        # torch.save: RuntimeError if the disk is full
        with suppress(OSError):
            temporary.unlink()
        fail(f"cannot write {path} ({str(error).splitlines()[0]}); what stood there is intact", 1)


def load(c, path):
    """The checkpoint at path, if c may continue it."""
    wanted = asdict(c) | {"device": pick_device(c.device).type}
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        before = saved["config"] | {"device": saved["device"]}
        if before.keys() != wanted.keys():
            raise ValueError("of another version")
    except Exception as error:                      # a damaged file raises one of many types
        fail(f"{path} cannot be read ({type(error).__name__}): it is damaged, or no checkpoint of "
             "this version; delete it and leave out --resume")
    free = {"resume", "plot", "out", "compile", "micro_tokens", "recompute", "export"}
    for name in wanted.keys() - free:
        if before[name] != wanted[name]:
            fail(f"{flag_name(name)} {wanted[name]}: --resume needs {before[name]}, as in {path}")
    return saved


def peak_mb(device):
    """Largest memory in MB: of the GPU's allocator, else of the process; None if unknown."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    with suppress(ImportError):                                         # Windows has none
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def pick_device(name):
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=name).item()                      # meta has no items
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {name}: {str(error).splitlines()[0]}; allowed are auto, cpu, and if "
             "present cuda, cuda:N and mps")


# ------------------------------------------------------------------------------- flags and output
def flag_name(name):
    return "--" + name.replace("_", "-")


def parse(argv, trainer):
    """A config for each method of --algo: defaults, then TUNED's, then the task's, then flags."""
    parser = argparse.ArgumentParser(description=trainer.__doc__, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = fail
    flags = [f for f in fields(trainer.Config) if f.metadata]
    for f in flags:
        kind = {"type": f.type, "metavar": f.type.__name__}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        text = f"{f.metadata['help']} [{f.default}]"
        parser.add_argument(flag_name(f.name), help=text, **kind)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        names = " ".join(flag_name(f.name) for f in flags)
        fail(f"{unknown[0]} is not a flag; the flags are {names}")
    given = vars(given)                                         # only those on the command line
    task = trainer.find_task(trainer.Config(**given))
    algos = given.pop("algo", trainer.Config.algo).split(",")
    configs = []
    for algo in algos:
        if algo not in METHODS or algos.count(algo) > 1:
            fail(f"--algo {algo}: allowed are {', '.join(METHODS)}, each once")
        once = dict(epochs=1) if METHODS[algo].epochs == 1 else {}
        defaults = trainer.tuned.get(algo, once) | task.defaults
        configs.append(trainer.Config(**defaults | given, algo=algo))
        validate(configs[-1])
    return configs


def validate(c):
    """One line and exit status 2 on a value that cannot work."""
    at_least_one = ("steps", "prompts", "candidates", "epochs", "eval_every", "eval_puzzles",
                    "max_new_tokens", "layers", "width", "heads", "kv_heads", "micro_tokens")
    rules = [(name, getattr(c, name) >= 1, "1 or more") for name in at_least_one]
    rules += [("eval_set", c.eval_set in ("heldout", "test"), "heldout, test"),
              ("warm_steps", c.warm_steps >= 0, "0 or more"),
              ("seed", 0 <= c.seed < 2**63, "0 to 2^63 - 1"),
              ("anchor", 0 <= c.anchor < math.inf, "finite numbers from 0"),
              ("lr", 0 < c.lr < math.inf, "finite numbers above 0"),
              ("eta", 1e-6 <= c.eta <= 1e6, "numbers from 1e-6 to 1e6")]
    for name, fine, allowed in rules:
        if not fine:
            fail(f"{flag_name(name)} {getattr(c, name)}: allowed are {allowed}")
    if c.candidates < 2 and METHODS[c.algo].per != "sample":
        fail(f"--candidates {c.candidates}: {c.algo} compares the candidates of one prompt; "
             "allowed are 2 or more")
    if c.width % (2 * c.heads) or c.heads % c.kv_heads:
        fail(f"--width {c.width}: allowed are multiples of 2 x --heads {c.heads}, those of "
             f"--kv-heads {c.kv_heads}")
    pick_device(c.device)


def run_folder(c, several):
    out = c.out.replace("{task}", c.task.replace(":", "-")).replace("{seed}", str(c.seed))
    if several and "{algo}" not in out:                     # one --out for several: subfolders
        return Path(out) / c.algo
    return Path(out.replace("{algo}", c.algo))


def label(config):
    """The run's name, with alpha: curves of different anchors are different methods."""
    return config["algo"] + (f" (alpha {config['anchor']:g})" if config["algo"] == "tpo" else "")


def progress(r, steps):
    left = r["seconds"] / max(r["step"], 1) * (steps - r["step"])
    step = f"{r['step']:{len(str(steps))}}/{steps}"
    text = f"{step} pass@1 {r['pass1']:.3f} greedy {r['greedy']:.3f}"
    if "reward" not in r:
        return f"{text} (before the first update)"
    return (f"{text} reward {r['reward']:.2f} KL(q||p) {r['kl']:.2f} informative "
            f"{r['informative']:.0%} {r['train_tok_s']:.0f} tok/s {left:.0f} s left")


def compare(logs):
    """A table of several runs: pass@1 at the end, and where it passed 50% and 90%."""
    print(f"\n{'algorithm':<20}{'before':>8}{'after':>8}{'greedy':>8}"
          f"{'50% after':>18}{'90% after':>18}")
    for config, *records, r in logs:
        evaluations = [e for e in records if e["kind"] == "eval"]
        half, most = (next((f"{e['step']} ({e['seconds']:.0f} s)" for e in evaluations
                            if e["pass1"] >= bar), "-") for bar in (0.5, 0.9))
        print(f"{label(config):<20}{r['pass1_before']:>8.3f}{r['pass1_after']:>8.3f}"
              f"{r['greedy_after']:>8.3f}{half:>18}{most:>18}")


@contextmanager
def stop_on_signals():
    """A list that gets an item at Ctrl-C or SIGTERM; the same again ends the process at once."""
    stop = []

    def ask_to_stop(signum, _):
        stop.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        with suppress(OSError):                 # a pipe's reader gets Ctrl-C too, and may be gone
            os.write(1, b"stopping soon, with a checkpoint; the same again stops at once\n")

    before = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def main(argv=None, trainer=Trainer):
    # without it sums in MKL depend on addresses and thread timing, and a resume has other bits
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    configs = parse(sys.argv[1:] if argv is None else argv, trainer)
    if configs[0].plot:
        draw = run_path(str(Path(__file__).parent / "results" / "plot.py"))["llm"]
    several = len(configs) > 1
    folders = [run_folder(c, several) for c in configs]
    started = [folder / "checkpoint.pt" for folder in folders]
    if configs[0].resume and not any(path.exists() for path in started):
        fail(f"--resume: there is no {started[0]}; leave it out, or name the run's folder by --out")
    for c, folder, path in zip(configs, folders, started):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--out {folder}: cannot be written ({error.strerror})")
        if several and c.resume and path.exists():
            load(c, path)                       # told now, not after hours of other runs
    with stop_on_signals() as stop:
        logs = [trainer(c).run(folder, stop) for c, folder in zip(configs, folders)]
    if several:
        compare(logs)
    if configs[0].plot:
        draw(sum(logs, []), folders[-1] / "pass1.png")


if __name__ == "__main__":
    main()
