"""RL with verifiable rewards on a small GPT by Target Policy Optimization (arXiv 2604.06159).

    python llm_rlvr.py --algo tpo                    1 to 3 min on two CPU cores
    python llm_rlvr.py --algo tpo,grpo,ppo,dg        each as it was tuned, then a line of each
    python llm_rlvr.py --task knights_knaves         another task; --help lists every flag
    python llm_rlvr.py --algo tpo --resume           go on after Ctrl-C or a crash

One update (Trainer.update): sample K completions y_i to each of B prompts from the policy pi_old;
score them by a rule; u = their z-scores, l_i = log pi(y_i|x) summed over tokens; the target
q_i ~ exp(alpha l_i_old + u_i / eta) says which should gain probability; then a few gradient steps
on the cross-entropy of p = softmax(l - (1 - alpha) l_old) to q: its slope p - q is 0 once p = q.

The last line to expect from the first command, up to what rounding does to one seed:
    tpo (alpha 0.25) took graph_color from 8.2% to 90.1% pass@1 (greedy 91.0%) on 256 heldout ...
Log and checkpoint go to out/<task>-<algo>-<seed>/.
"""
import argparse
import json
import math
import os
import random
import re
import sys
import time
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial, reduce
from itertools import combinations, product, takewhile
from operator import and_
from pathlib import Path
from runpy import run_path
from statistics import mean
from typing import NamedTuple
from zipfile import ZipFile

import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from baselines import METHODS
from tpo import standardize, tpo_target


# --------------------------------------------------------------------------------------- settings
def flag(default, help, low=None, high=math.inf):
    """A field that becomes a command-line flag of the same name, type, default and range."""
    return field(default=default, metadata=dict(help=help, low=low, high=high))


@dataclass(frozen=True)
class Config:
    algo: str = flag("tpo", ", ".join(METHODS) + ", or a comma list")
    task: str = flag("graph_color", "graph_color, knights_knaves or addition")
    steps: int = flag(900, "updates, each with rollouts of its own", 1)
    prompts: int = flag(32, "prompts per update, B", 1)
    candidates: int = flag(16, "completions per prompt, K", 1)
    epochs: int = flag(2, "gradient steps on each batch of rollouts", 1)
    lr: float = flag(1e-2, "of Muon, 5 times AdamW's; up in 30 updates, then down to 0", 1e-12, 1e6)
    eta: float = flag(1.0, "temperature of TPO's target, of dg's gate; rebel's eta", 1e-6, 1e6)
    clip: float = flag(0.2, "of ratios, in ppo, dr_grpo and the forms of grpo", 0, 1)
    beta: float = flag(0.04, "weight of the KL to the sampler in the forms of grpo", 0, 1e6)
    anchor: float = flag(0.25, "alpha in q ~ p_old^alpha exp(u / eta): 1 paper, 0 LPO", 0, 1e6)
    seed: int = flag(0, "of the weights, the training prompts and the sampling", 0, 2**63 - 1)
    eval_every: int = flag(50, "updates between evaluations; a checkpoint precedes each", 1)
    eval_set: str = flag("heldout", "puzzles to evaluate on: heldout, or test for final numbers")
    eval_puzzles: int = flag(256, "how many of them, all different", 1)
    max_new_tokens: int = flag(7, "longest completion, its end token included, T", 1)
    warm_steps: int = flag(100, "supervised steps on random answers of the right form", 0)
    layers: int = flag(2, "transformer blocks", 1)
    width: int = flag(64, "embedding width, a multiple of 2 x heads", 1)
    heads: int = flag(4, "query heads", 1)
    kv_heads: int = flag(2, "key/value heads, a divisor of heads", 1)
    micro_tokens: int = flag(2**15, "tokens in one backward pass: less needs less memory", 1)
    recompute: bool = flag(False, "keep no activations inside blocks: slower, less memory")
    out: str = flag("out", "folder for the run's folder, <task>-<algo>-<seed>")
    resume: bool = flag(False, "go on from the run's checkpoint, if there is one; else start anew")
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    compile: bool = flag(False, "torch.compile the training pass")
    plot: bool = flag(False, "draw pass@1 into the first run's folder (needs matplotlib)")

    @property
    def folder(self):
        return Path(self.out, f"{self.task.replace(':', '-')}-{self.algo}-{self.seed}")


# Each method's best of seven settings after 300 updates of graph_color (results/llm/compare.py),
# where not the default; tpo's were chosen for 900. A task's defaults, then flags, replace these.
TUNED = {"lpo": dict(lr=2e-2), "pg": dict(epochs=1), "tpo_no_anchor": dict(epochs=1),
         **dict.fromkeys(("maxrl", "oapl"), dict(lr=2e-2, epochs=1)),
         **dict.fromkeys(("dg", "ddpg"), dict(lr=4e-2, epochs=1)),
         **dict.fromkeys(("lpo_rev", "vcpo", "kondo", "dapo", "gspo"), dict(lr=5e-3)),
         **dict.fromkeys(("group_pg", "rloo", "cispo"), dict(lr=5e-3, epochs=1))}
ADAMW = dict(betas=(0.9, 0.95), weight_decay=0.0, fused=True)


# -------------------------------------------------------------------------------------- algorithm
class Rollout(NamedTuple):
    """K completions of each of B prompts; equal ones of a prompt share one of N rows, row[b, k]:
    x[row] makes (B, K, ...) of (N, ...), and gradients add up."""
    prompts: torch.Tensor       # (B, P) padded with -1 on the left
    y: torch.Tensor             # (N, T) up to and including the end token, then -1
    logp_old: torch.Tensor      # (N, T) under the policy that sampled them, 0 on padding
    prompt_of: torch.Tensor     # (N,)
    row: torch.Tensor           # (B, K)


class Trainer:
    """RL with verifiable rewards on a small GPT: one run."""
    Config, tuned = Config, TUNED

    def __init__(self, c):
        self.c, self.task, self.device = c, self.find_task(c), pick_device(c.device)
        self.method = METHODS[c.algo]   # per: what its loss takes; rests: on equal scores
        self.loss = self.method.bind(**asdict(c), length=c.max_new_tokens)
        self.anchor = self.loss.keywords.get("anchor", c.anchor)        # lpo's is 0
        torch.manual_seed(c.seed)
        torch.backends.cuda.enable_cudnn_sdp(False)     # it plans anew for each shape it meets
        self.vocabulary, self.model = self.build()
        self.model.to(self.device).recompute = c.recompute
        self.ends = torch.tensor(self.vocabulary.ends, device=self.device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.params = sum(p.numel() for p in self.model.parameters())
        self.optimizers = self.make_optimizers()
        autocast = torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")
        self.sample = autocast(partial(sample, self.model, T=c.max_new_tokens, ends=self.ends))
        self.token_logp = autocast(torch.compile(token_logp) if c.compile else token_logp)
        self.rng = random.Random(c.seed)
        self.generator = torch.Generator(self.device).manual_seed(c.seed)
        self.eval_items = eval_items(self.task, c.eval_set, c.eval_puzzles)
        self.step, self.seconds = 0, 0.0        # updates done; time, warm start included
        self.records = [{"kind": "config", **asdict(c), "device": self.device.type}]    # the log

    def build(self):
        """The vocabulary and a new model. recipes/pretrained.py reads them from a folder."""
        c, vocabulary = self.c, Vocabulary(self.task)
        return vocabulary, GPT(ModelConfig(vocabulary.size, c.width, c.layers, c.heads, c.kv_heads,
                                           c.width // c.heads, hidden=8 * math.ceil(c.width / 3)))

    def make_optimizers(self):
        """[(optimizer, its share of --lr)]: Muon is for matrices between hidden states."""
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        rest = [p for p in self.trained if p not in set(matrices)]
        muon = Muon(matrices, {"lr": 0.0})                      # update sets every lr
        return [(muon, 1.0), (torch.optim.AdamW(rest, **ADAMW), 0.2)]

    def update(self):
        """Sample, score, target, fit: one update. Returns its metrics."""
        c, start = self.c, time.perf_counter()
        items = puzzles(self.task, self.rng, c.prompts, "train")
        rollout = self.rollout(items)                              # K completions of each prompt
        scores = self.score(items, rollout.y[rollout.row]).to(self.device)                # (B, K)
        l_old = rollout.logp_old[rollout.row].sum(-1)                                     # (B, K)
        q = tpo_target(l_old, scores, c.eta, self.anchor)          # Eq. 2, fixed over the epochs
        metrics = diagnose(q, l_old, rollout, scores, self.ends, self.anchor)
        sampled, norms = time.perf_counter(), []

        decay = warmup(self.step) * (1 - self.step / c.steps)
        for optimizer, share in self.optimizers:
            optimizer.param_groups[0]["lr"] = share * c.lr * decay
        for epoch in range(c.epochs):
            logp = self.current_logp(rollout, epoch)                                      # (N, T)
            slope = self.slope(logp, rollout, scores, q, epoch)    # dL/dlogp: p - q for tpo, Eq. 3
            if not slope.any():         # at rest, where AdamW would still move by its moments
                break
            self.backward(rollout, slope)
            norms.append(self.optimizer_step())

        metrics["grad_norm"] = norms[0] if norms else 0
        metrics = {name: round(float(x), 5) for name, x in metrics.items()}     # waits for a GPU
        tokens, trained = metrics["tokens"] * scores.numel(), time.perf_counter()
        return metrics | dict(sample_tok_s=round(tokens / (sampled - start)),
                              train_tok_s=round(tokens * len(norms) / (trained - sampled)))

    def rollout(self, items):
        """Sample K completions to each puzzle."""
        c, B, K = self.c, len(items), self.c.candidates
        prompts = self.encode_prompts(items)
        y, logp = self.sample(prompts, K, generator=self.generator)                    # (B, K, T)
        y, logp = y.flatten(0, 1), logp.flatten(0, 1)                                  # (B * K, T)
        prompt_of = torch.arange(B, device=self.device).repeat_interleave(K)
        length = (y >= 0).sum(-1)
        key = torch.column_stack((prompt_of, -length, y))          # by prompt, the longest first
        key, row = (x.to(self.device)                              # (N, 2 + T), (B * K,)
                    for x in key.cpu().unique(dim=0, return_inverse=True))     # MPS has none
        T = int(length.max())
        prompt_of, y, logp = key[:, 0], key[:, 2:2 + T], logp[:, :T]
        # of equal completions the largest: they differ by rounding
        logp = logp.new_full(y.shape, -torch.inf).scatter_reduce(
            0, row[:, None].expand_as(logp), logp, "amax")                             # (N, T)
        rollout = Rollout(prompts, y, logp, prompt_of, row.view(B, K))
        if c.epochs > 1 and self.device.type == "cuda":
            # in bf16 later epochs need log-probs of a forward like their own to compare with
            rollout = rollout._replace(logp_old=self.current_logp(rollout, 1))
        return rollout

    def score(self, items, y):
        """Scores (B, K), on the CPU. A completion cut off before its end token scores 0."""
        def one(key, ids):
            text, ended = self.read(ids)
            try:
                score = self.task.check(key, text) if ended else 0
                if math.isfinite(score):
                    return float(score)
            except Exception as error:          # a user's code
                score = error
            fail(f"--task {self.c.task}: its check of {text!r} with the key {key!r} gave "
                 f"{score!r}; allowed are finite numbers", 1)

        return torch.tensor([[one(key, ids) for ids in candidates]
                             for (_, key), candidates in zip(items, y.tolist())])

    @torch.no_grad()
    def current_logp(self, rollout, epoch):
        """Log-probs (N, T) under the current policy; at first it is the one that sampled."""
        if epoch == 0:
            return rollout.logp_old
        rows = torch.arange(len(rollout.y), device=self.device)
        return torch.cat([self.rows_logp(rollout, part) for part in self.parts(rollout, rows)])

    def slope(self, logp, rollout, scores, q, epoch):
        """dL/dlogp (N, T) of the method's loss at logp (N, T)."""
        logp = logp.detach().requires_grad_()
        new, old, y = (x[rollout.row] for x in (logp, rollout.logp_old, rollout.y))    # (B, K, T)
        l, l_old = new.sum(-1), old.sum(-1)                                               # (B, K)
        if self.c.algo == "tpo":
            p = (l - (1 - self.anchor) * l_old).softmax(-1)         # Eq. 1; anchor = 1: softmax(l)
            loss = ((p - q).detach() * l).sum(-1).mean()            # has tpo_loss's slope, Eq. 3
        elif self.method.per == "group":
            loss = self.loss(l, l_old, scores)
        else:
            loss = self.loss(new, old, scores, mask=y >= 0)
        slope, = torch.autograd.grad(loss, logp)
        if epoch == 0 and self.method.rests:    # 0 but for rounding, and AdamW would step by that
            slope[~informative(scores)[rollout.prompt_of]] = 0
        return slope

    def backward(self, rollout, slope):
        """Add dL/dtheta: exact however rows are split; rows without slope need no forward."""
        for rows in self.parts(rollout, slope.any(-1).nonzero()[:, 0]):
            self.rows_logp(rollout, rows).backward(slope[rows])

    def parts(self, rollout, rows):
        """Rows, in parts of at most --micro-tokens tokens, as if each had a prompt of its own."""
        longest = rollout.prompts.shape[1] + rollout.y.shape[1]
        return rows.split(max(1, self.c.micro_tokens // longest))

    def optimizer_step(self):
        """Returns the gradient norm."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained])
        if not norm.isfinite():
            fail(f"gradient norm {norm:g} at update {self.step + 1}: start again with a lower --lr "
                 f"(now {self.c.lr}) or a higher --eta (now {self.c.eta})", 1)
        for optimizer, _ in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def rows_logp(self, rollout, rows):
        """Log-probs (rows, T) under the current policy, 0 on padding, with gradient."""
        y, T = rollout.y[rows], rollout.y.shape[1]
        longest = int((y >= 0).sum(-1).max())
        used, prompt_of = rollout.prompt_of[rows].unique(return_inverse=True)
        logp = self.token_logp(self.model, rollout.prompts[used], y[:, :longest], prompt_of)
        return F.pad(logp, (0, T - longest))

    def read(self, ids):
        """(text, whether it ended) of a completion, -1 behind its end."""
        ids = [token for token in ids if token >= 0]
        ended = ids[-1] in self.vocabulary.ends
        return self.vocabulary.decode(ids[:-1] if ended else ids), ended

    def encode_prompts(self, items):
        """Prompts (B, P), padded with -1 on the left: completions start in one column."""
        rows = [torch.tensor(self.vocabulary.encode(text)) for text, _ in items]
        if not all(map(len, rows)):
            fail(f"--task {self.c.task}: a prompt is empty")
        return pad_sequence(rows, True, padding_value=-1, padding_side="left").to(self.device)

    def evaluate(self):
        """Greedy, and pass@1 and pass@4 of four samples, on the evaluation puzzles; as an example
        two samples of one puzzle, the same one every time."""
        items, generator = self.eval_items, torch.Generator(self.device).manual_seed(0)
        n, y = max(1, self.c.prompts * self.c.candidates // 4), []      # as many rows as in update
        for i in range(0, len(items), n):
            prompts = self.encode_prompts(items[i:i + n])
            greedy, _ = self.sample(prompts, 1, generator=None)
            four, _ = self.sample(prompts, 4, generator=generator)
            y.append(torch.cat((greedy, four), 1))                                     # (n, 5, T)
        y = torch.cat(y)
        scores = self.score(items, y)
        greedy, four = (scores == 1).float().split((1, 4), 1)
        completions = [self.read(ids)[0] for ids in y[0, 1:3].tolist()]
        example = dict(prompt=items[0][0], completions=completions, scores=scores[0, 1:3].tolist())
        return dict(greedy=greedy.mean().item(), pass1=four.mean().item(),
                    pass4=four.amax(-1).mean().item(), example=example)

    def warm_start(self):
        """Supervised steps on random answers: they teach the form, nothing of the solution."""
        rng = random.Random(f"warm {self.c.seed}")
        encode, end = self.vocabulary.encode, self.vocabulary.ends[0]
        optimizer = torch.optim.AdamW(self.trained, 2e-3, **ADAMW)
        for step in range(self.c.warm_steps):
            items = puzzles(self.task, rng, 64, "train")
            y = [torch.tensor([*encode(self.task.guess(rng, key)), end]) for _, key in items]
            y = pad_sequence(y, True, padding_value=-1).to(self.device)                  # (64, T)
            prompt_of = torch.arange(len(y), device=self.device)
            logp = self.token_logp(self.model, self.encode_prompts(items), y, prompt_of)
            optimizer.param_groups[0]["lr"] = 2e-3 * warmup(step)
            loss = -logp[y >= 0].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def run(self):
        """Warm start or resume, then updates, with a checkpoint and an evaluation every
        --eval-every. Returns the log and the line that sums it up."""
        c, folder = self.c, self.c.folder
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)     # of this run, not of those before
        path, previous = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
        files, start = [file for file in (path, previous) if file.exists()], time.monotonic()
        if c.resume and files:
            self.restore(load(files[0], self.records[0]))
        else:
            for file in files:                  # a run killed early would resume an older one
                file.unlink()
                print(f"deleted {file}, from which --resume could have gone on")
            self.warm_start()
        print(f"{c.algo}: {self.params:,} parameters, {self.vocabulary.size} tokens, "
              f"{self.device}; e.g. {self.eval_items[0][0][:200]!r}")
        start -= self.seconds                   # of the run that goes on
        while True:
            if self.step % c.eval_every == 0 or self.step == c.steps:
                self.seconds = time.monotonic() - start
                # before the evaluation: a run killed in it repeats the evaluation, no update
                write(path, self.state(), previous)
                self.record_evaluation()
            if self.step == c.steps:
                return self.records, self.record_result(time.monotonic() - start)
            metrics = self.update()
            self.step += 1
            self.records.append({"kind": "update", "step": self.step, **metrics})

    def record_evaluation(self):
        recent = list(takewhile(lambda r: r["kind"] == "update", reversed(self.records)))
        names = list(recent[0])[2:] if recent else []               # without kind and step
        means = {name: round(mean(r[name] for r in recent), 5) for name in names}
        self.log(kind="eval", step=self.step, seconds=round(self.seconds, 2), **self.evaluate(),
                 **means)
        print(progress(self.records[-1], self.c.steps), flush=True)

    def record_result(self, seconds):
        c, (first, *_, last) = self.c, (r for r in self.records if r["kind"] == "eval")
        self.log(kind="result", task=c.task, algo=c.algo, seed=c.seed, params=self.params,
                 steps=c.steps, pass1_before=first["pass1"], pass1_after=last["pass1"],
                 greedy_after=last["greedy"], seconds=round(seconds, 2),
                 sample_tok_s=last["sample_tok_s"], train_tok_s=last["train_tok_s"],
                 peak_mb=round(torch.cuda.max_memory_allocated(self.device.index) / 2**20))
        example = last["example"]
        print(example["prompt"])
        for text, score in zip(example["completions"], example["scores"]):
            print(f"    {score:g}  {text}")
        name = f"tpo (alpha {c.anchor:g})" if c.algo == "tpo" else c.algo
        summary = (f"{name} took {c.task} from {first['pass1']:.1%} to {last['pass1']:.1%} pass@1 "
                   f"(greedy {last['greedy']:.1%}) on {len(self.eval_items)} {c.eval_set} puzzles "
                   f"in {c.steps} updates and {seconds:.0f} s, warm start included")
        print(summary, flush=True)
        return summary

    def log(self, **record):
        self.records.append(record)
        write(self.c.folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in self.records))

    def state(self):
        """What a checkpoint holds."""
        return dict(step=self.step, seconds=self.seconds, records=self.records,
                    rng=self.rng.getstate(), generator=self.generator.get_state(),
                    optimizers=[optimizer.state_dict() for optimizer, _ in self.optimizers],
                    model={name: p.detach() for name, p in self.model.named_parameters()
                           if p.requires_grad})

    def restore(self, saved):
        self.model.load_state_dict(saved["model"], strict=False)    # what is frozen is not in it
        for (optimizer, _), state in zip(self.optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        self.rng.setstate(saved["rng"])
        self.generator.set_state(saved["generator"])
        self.step, self.seconds, self.records = saved["step"], saved["seconds"], saved["records"]

    @staticmethod
    def find_task(c):
        return TASKS.get(c.task) or fail(f"--task {c.task}: allowed are {', '.join(TASKS)}")


def informative(scores):
    """(B,) groups whose scores (B, K) differ."""
    return standardize(scores).any(-1)


def warmup(step):
    return min(1.0, (step + 1) / 30)        # AdamW's first steps have full size for any gradient


def diagnose(q, l_old, rollout, scores, ends, alpha):
    """How far q (B, K) asks the policy to move, and the anchor's health: look at these first."""
    y, logp = (x[rollout.row] for x in (rollout.y, rollout.logp_old))                  # (B, K, T)
    length, ended = (y >= 0).sum(-1), torch.isin(y, ends).any(-1)                         # (B, K)
    a = (alpha * l_old).softmax(-1)                                               # (B, K) anchor
    shift = (q - a).abs().sum(-1)                                                           # (B,)
    longer = length - length.float().mean(-1, keepdim=True)                               # (B, K)
    drift = ((q - a) * longer).sum(-1)          # tokens: above 0 q asks for longer completions
    return dict(reward=scores.mean(),
                kl=torch.xlogy(q, q / a.clamp(min=1e-38)).sum(-1).mean(),             # KL(q || a)
                informative=informative(scores).float().mean(),
                entropy=-logp.sum() / length.sum(), tokens=length.float().mean(),
                unfinished=1 - ended.float().mean(), anchor_max=a.amax(-1).mean(),
                anchor_size=(1 / a.square().sum(-1)).mean(), anchor_shift=shift.mean(),
                anchor_dead=(shift < 1e-3).float().mean(), drift=drift.mean())


# --------------------------------------------------- one prompt, K completions: sample and log-prob
class Cache:
    """Keys and values of N = B * K rows, a prompt and its completion, for each layer
    (2, N, kv_heads, P + T - 1, D): the last token is never an input. `prompts` and `append` are
    attention functions for GPT.forward."""

    def __init__(self, prompts, K, T):
        self.K, self.T, self.used = K, T, prompts.shape[1]      # used: slots filled
        self.layers, (self.causal, self.pos) = [], causal(prompts)
        self.padding = F.pad(prompts < 0, (0, T - 1)).repeat_interleave(K, 0)

    def prompts(self, i, q, k, v):
        """Of all prompts, (B, P, heads, D): each is computed once and copied to its K rows."""
        kv = torch.stack((k.to(v.dtype), v)).transpose(2, 3)                # (2, B, kv_heads, P, D)
        self.layers.append(F.pad(kv.repeat_interleave(self.K, 1), (0, 0, 0, self.T - 1)))
        return attention(q, k, v, self.causal)

    def append(self, i, q, k, v):
        """Of one more token in each row, (N, 1, heads, D), in the last of the `used` slots. Two
        products: for one query a row faster than scaled_dot_product_attention on a CPU."""
        keys, values = self.layers[i][:, :, :, :self.used]                  # (N, kv_heads, S, D)
        keys[:, :, -1], values[:, :, -1] = k[:, 0], v[:, 0]
        N, kv_heads, _, D = keys.shape
        weight = (q.view(N, kv_heads, -1, D) * D ** -0.5) @ keys.mT         # (N, kv_heads, G, S)
        padding = self.padding[:, None, None, :self.used]
        weight = weight.masked_fill(padding, -torch.inf).softmax(-1)
        return (weight.to(values) @ values).view(q.shape)

    def keep(self, rows):
        """Only these rows go on. Layer by layer: old and new of all would not fit."""
        for i in range(len(self.layers)):
            self.layers[i] = self.layers[i][:, rows]
        self.padding = self.padding[rows]


@torch.no_grad()
def sample(model, prompts, K, T, ends, generator):
    """K completions y (B, K, T) of each prompt, -1 behind their ends, and fp32 log-probs, 0 there.

    Temperature 1 without top-k or top-p: any other sampler is not the policy that is trained.
    Without a generator it is greedy.
    """
    device, N = prompts.device, len(prompts) * K
    kv = Cache(prompts, K, T)
    h = model(prompts, kv.pos, kv.prompts)[:, -1:].repeat_interleave(K, 0)           # (N, 1, width)
    pos = kv.pos[:, -1:].repeat_interleave(K, 0)                                      # (N, 1)
    y, logps = ends[0].repeat(N, T), torch.zeros(N, T, device=device)
    rows = torch.arange(N, device=device)                       # those that still go on
    if generator:
        uniform = torch.rand(N, T, generator=generator, device=device)
    for t in range(T):
        if t:                                   # at first h is that of the prompts
            kv.used += 1
            h = model(token, pos + t, kv.append)
        logp = model.lm_head(h[:, 0]).float().log_softmax(-1)                         # (rows, V)
        if generator:           # by the inverse of the cdf: one random number a row, not V
            cdf = logp.exp().cumsum(-1)
            token = torch.searchsorted(cdf, uniform[rows, t, None] * cdf[:, -1:], right=True)
            token = token.clamp(max=cdf.shape[1] - 1)                                 # (rows, 1)
        else:
            token = logp.argmax(-1, keepdim=True)
        y[rows, t], logps[rows, t] = token[:, 0], logp.gather(-1, token)[:, 0]
        if t % 16 == 15 and t < T - 1:  # rows that ended leave; it costs a host sync, so not each t
            going = (~torch.isin(y[rows, :t + 1], ends).any(-1)).nonzero()[:, 0]
            if not len(going):
                break
            if len(going) <= 0.75 * len(rows):
                rows, pos, token = rows[going], pos[going], token[going]
                kv.keep(going)
    ended = torch.isin(y, ends).int()
    sampled = ended.cumsum(-1) == ended         # up to and including the first end token
    return y.where(sampled, -1).view(-1, K, T), logps.where(sampled, 0).view(-1, K, T)


def token_logp(model, prompts, y, prompt_of):
    """fp32 log-probs (N, T), with gradient, of completions y (N, T) to prompts (B, P), y[n] to
    prompts[prompt_of[n]]; both are padded with -1, where the result is 0.

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
    prompt_causal, prompt_pos = causal(prompts)
    mask, pos = causal(torch.cat((prompts[prompt_of], y[:, :-1]), 1))
    mask, pos = mask[:, :, P:].contiguous(), pos[:, P:]    # (N, 1, T - 1, P + T - 1), (N, T - 1)

    def split(x):                               # the list -> (B, P, ...) and (N, T - 1, ...)
        return x[:B * P].unflatten(0, (B, P)), x[B * P:].unflatten(0, (N, T - 1))

    def join(x, x_y):                           # and back
        return torch.cat((x.flatten(0, 1), x_y.flatten(0, 1)))

    def attend(_, q, k, v):
        (q, q_y), (k, k_y), (v, v_y) = split(q), split(k), split(v)
        keys = torch.cat((k.index_select(0, prompt_of), k_y), 1)
        values = torch.cat((v.index_select(0, prompt_of), v_y), 1)
        return join(attention(q, k, v, prompt_causal), attention(q_y, keys, values, mask))

    h, h_y = split(model(join(prompts, y[:, :-1]), join(prompt_pos, pos), attend))
    h = torch.cat((h[:, -1:].index_select(0, prompt_of), h_y), 1)                   # (N, T, width)

    def nll(h, target):
        return F.cross_entropy(model.lm_head(h).float(), target, ignore_index=-1, reduction="none")

    n = max(1, 2**(27 if h.is_cuda else 24) // model.config.vocab)      # 512 or 64 MB of logits
    losses = [checkpoint(nll, *chunk, use_reentrant=False, preserve_rng_state=False)
              for chunk in zip(h.flatten(0, 1).split(n), y.flatten().split(n))]
    return -torch.cat(losses).view(N, T)


def causal(prompts):
    """Mask (B, 1, P, P) and rotary positions (B, P) of left-padded prompts (B, P), or of such
    with completions behind them."""
    P, real = prompts.shape[1], prompts >= 0
    eye = torch.eye(P, dtype=torch.bool, device=prompts.device)  # a softmax over nothing is NaN
    mask = torch.ones_like(eye).tril() & real[:, None] | eye
    return mask[:, None], (real.cumsum(1) - 1).clamp(min=0)


def attention(q, k, v, mask):
    """From q (B, S, heads, D) to k, v (B, S', kv_heads, D); mask (B, 1, S, S') is True if seen."""
    groups = q.shape[2] // k.shape[2]   # not enable_gqa: no fused kernel of CUDA takes a mask too
    k, v = (x.to(v.dtype).repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask).transpose(1, 2)


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
        frequency = 10_000 ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        self.register_buffer("inv_freq", frequency, persistent=False)                   # (D / 2,)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):    # the residual stream's
                nn.init.normal_(p, std=(2 * c.layers * p.shape[1]) ** -0.5)
            elif p.ndim == 2:
                nn.init.normal_(p, std=1.0 if "embed_tokens" in name else p.shape[1] ** -0.5)

    def forward(self, tokens, pos, attend):
        """Final hidden states (..., width) of tokens (...) at rotary positions pos (...).

        Who sees whom is the caller's: attend(i, q, k, v) is the attention of layer i, from q
        (..., heads, D) and k, v (..., kv_heads, D), D = head_dim, to (..., heads, D).
        """
        angle = torch.cat((pos[..., None] * self.inv_freq,) * 2, -1)[..., None, :]   # (..., 1, D)
        rope = angle.cos(), angle.sin()
        x = self.model.embed_tokens(tokens.clamp(min=0)).float()
        for i, block in enumerate(self.model.layers):
            inputs = x, rope, partial(attend, i)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
        return self.model.norm(x)


class Muon(torch.optim.Optimizer):
    """Each matrix moves along its momentum, made nearly orthogonal by five Newton-Schulz steps:
    by lr sqrt(max(1, rows / columns)) (Jordan et al. 2024, kellerjordan.github.io/posts/muon). In
    fp32 on purpose: torch.optim.Muon's bf16 is far slower on CPUs that lack it."""
    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            x = p.grad + 0.95 * momentum.mul_(0.95).add_(p.grad)                        # Nesterov
            rows, columns = x.shape
            x = (x if rows <= columns else x.T) / (x.norm() + 1e-7)
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
            x = x if rows <= columns else x.T
            p -= self.param_groups[0]["lr"] * max(1, rows / columns) ** 0.5 * x


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, linear = c.head_dim, partial(nn.Linear, bias=False)
        width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.input_layernorm = nn.RMSNorm(c.width, c.eps)
        self.post_attention_layernorm = nn.RMSNorm(c.width, c.eps)
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(c.width, width, c.qkv_bias),
                                        "k_proj": nn.Linear(c.width, kv_width, c.qkv_bias),
                                        "v_proj": nn.Linear(c.width, kv_width, c.qkv_bias),
                                        "o_proj": linear(width, c.width),
                                        "q_norm": nn.RMSNorm(c.head_dim, c.eps),     # Qwen3
                                        "k_norm": nn.RMSNorm(c.head_dim, c.eps)})
        self.mlp = nn.ModuleDict({"gate_proj": linear(c.width, c.hidden),
                                  "up_proj": linear(c.width, c.hidden),
                                  "down_proj": linear(c.hidden, c.width)})

    def forward(self, x, rope, attend):
        h, attn, mlp = self.input_layernorm(x), self.self_attn, self.mlp
        q, k, v = (project(h).unflatten(-1, (-1, self.head_dim))                  # (..., heads, D)
                   for project in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = rotate(attn.q_norm(q.float()), rope), rotate(attn.k_norm(k.float()), rope)
        x = x + attn.o_proj(attend(q, k, v).flatten(-2))
        h = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


def rotate(x, rope):
    a, b = x.chunk(2, -1)
    return x * rope[0] + torch.cat((-b, a), -1) * rope[1]


# ------------------------------------------------------------------------------------------ tasks
# A task has
#   prompt(rng) -> (text, key)     a fresh puzzle in its only spelling (names, edges, terms sorted):
#                                  a hash of the text decides whether it is trained or evaluated on
#   check(key, answer) -> score    1.0 is right; values in [0, 1) give partial credit
#   guess(rng, key) -> answer      for the warm start: right in form, blind to the solution
#   split(text) -> split           optional, where data come with a split; by default hash_split
#   defaults                       optional, a dict of its own defaults for flags
class KnightsKnaves:
    """Knights tell the truth, knaves lie; who is what? Every puzzle has exactly one solution."""
    people, kinds, joints = "ABC", ("knight", "knave"), {"and": all, "or": any}

    def prompt(self, rng):
        while True:
            text, fits = "", [dict(zip(self.people, w)) for w in product(self.kinds, repeat=3)]
            for speaker in self.people:         # A says B is a knave or C is a knight
                n = rng.choice((1, 2, 2))
                about = sorted(zip(rng.sample(self.people, n), rng.choices(self.kinds, k=n)))
                joint = rng.choice(list(self.joints))
                words = f" {joint} ".join(f"{person} is a {kind}" for person, kind in about)
                text += f"{speaker} says {words}. "
                fits = [world for world in fits         # where only a knight would say so
                        if self.joints[joint](world[person] == kind for person, kind in about)
                        == (world[speaker] == "knight")]
            if len(fits) == 1:
                return text + "Who?", fits[0]

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

    def __init__(self):                         # coloring -> its bit; edge -> those it allows
        colorings, self.allowed = product(self.colors, repeat=6), {}
        self.bit = {coloring: 1 << i for i, coloring in enumerate(colorings)}
        for (i, a), (j, b) in combinations(enumerate(self.nodes), 2):
            self.allowed[f"{a}-{b}"] = sum(bit for c, bit in self.bit.items() if c[i] != c[j])

    def right(self, edges):
        return reduce(and_, (self.allowed[edge] for edge in edges))

    def prompt(self, rng):
        while True:
            edges = sorted(rng.sample(list(self.allowed), rng.randint(4, 8)))
            if self.right(edges):
                return "Color" + "".join(" " + edge for edge in edges) + ":", edges

    def check(self, key, answer):
        return float(self.bit.get(tuple(answer.split()), 0) & self.right(key) > 0)

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
    found = []
    for _ in range(1000 * n):
        puzzle = task.prompt(rng)
        if split_of(puzzle[0]) == split:
            found.append(puzzle)
        if len(found) == n:
            return found
    fail(f"--task: {len(found)} of {1000 * n} drawn puzzles are in the split {split}: too few")


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
    """Tokens: the pieces of 2,000 puzzles and guesses of a task, and the end token, the last id. A
    piece is a word with the space before it, or any other single character."""
    piece = r" ?[A-Za-z-]+|[\s\S]"

    def __init__(self, task):
        rng, pieces = random.Random(0), set()
        for text, key in (task.prompt(rng) for _ in range(2000)):
            pieces.update(re.findall(self.piece, text),
                          re.findall(self.piece, task.guess(rng, key)))
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


def write(path, value, previous=None):
    """A str, or anything torch.save takes: beside path, flushed, renamed. Never half a file. What
    stood at path becomes previous, if that is given."""
    temporary = path.with_name(path.name + ".tmp")      # of this process alone: see claim
    try:
        with temporary.open("wb") as f:
            f.write(value.encode()) if isinstance(value, str) else torch.save(value, f)
            f.flush()
            os.fsync(f.fileno())
        if previous and path.exists():
            path.replace(previous)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:        # torch.save: RuntimeError if the disk is full
        with suppress(OSError):
            temporary.unlink()
        fail(f"cannot write {path} ({error!r:.99}); what stood there is intact", 1)


def load(path, config):
    """The checkpoint at path, if it is whole and of a run with this config."""
    try:
        if part := ZipFile(path).testzip():         # by CRC-32s, which torch.load does not look at
            raise ValueError(f"{part} has another checksum")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        before = saved["records"][0]
    except Exception as error:                      # a damaged file raises one of many types
        fail(f"--resume: {path} is damaged ({error!r:.99}): delete it to go on "
             "from the one before it or, without that, to start anew")
    free = {"resume", "plot", "out", "compile", "micro_tokens", "recompute", "export"}
    for name, value in config.items():
        if name not in free and before.get(name) != value:
            fail(f"{flag_name(name)} {value}: {path} needs {before.get(name)} to go on")
    return saved


def claim(c):
    """Make the run's folder and lock it. The lock ends with the process, however that ends."""
    try:
        c.folder.mkdir(parents=True, exist_ok=True)
        lock = open(c.folder / "lock", "a+", encoding="utf-8")
        with suppress(ImportError):                                     # Windows has none
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        print(os.getpid(), end="", file=lock, flush=True)
        return lock
    except BlockingIOError:
        lock.seek(0)
        fail(f"--out {c.out}: process {lock.read()} is writing {c.folder}")
    except OSError as error:
        fail(f"--out {c.out}: {c.folder} cannot be written ({error.strerror})")


def pick_device(name):
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.zeros(1, device=name).item()                      # meta has no items
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: {error!r:.99}; allowed are auto, cpu, and if present "
             "cuda, cuda:N and mps")


# ------------------------------------------------------------------------------- flags and output
def flag_name(name):
    return "--" + name.replace("_", "-")


def parse(argv, trainer):
    """A config for each method of --algo: defaults, then TUNED's, then the task's, then flags."""
    parser = argparse.ArgumentParser(description=trainer.__doc__, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = fail
    flags = {flag_name(f.name): f for f in fields(trainer.Config) if f.metadata}
    for name, f in flags.items():
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(name, help=f"{f.metadata['help']} [{f.default}]", **kind)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        fail(f"{unknown[0]} is not a flag; the flags are {' '.join(flags)}")
    given = vars(given)                                         # only those on the command line
    task = trainer.find_task(trainer.Config(**given))
    configs, taken = [], {name for method in METHODS.values() for name in method.takes}
    for algo in dict.fromkeys(given.pop("algo", trainer.Config.algo).split(",")):
        if algo not in METHODS:
            fail(f"--algo {algo}: allowed are {', '.join(METHODS)}")
        defaults = trainer.tuned.get(algo, {}) | getattr(task, "defaults", {})
        configs.append(trainer.Config(**defaults | given, algo=algo))
        validate(configs[-1])
        if idle := given.keys() & taken - {*METHODS[algo].takes}:
            print(f"the loss of {algo} takes no {', '.join(map(flag_name, sorted(idle)))}")
    return configs


def validate(c):
    """One line and exit status 2 on a value that cannot work."""
    for f in fields(c):
        value, low, high = getattr(c, f.name), f.metadata.get("low"), f.metadata.get("high")
        if low is not None and not low <= value <= high:
            fail(f"{flag_name(f.name)} {value}: allowed are {low:g} to {high:g}")
    if c.eval_set not in ("heldout", "test"):
        fail(f"--eval-set {c.eval_set}: allowed are heldout, test")
    compared = c.candidates * (c.prompts if METHODS[c.algo].per == "sample" else 1)
    if compared < 2:
        fail(f"--candidates {c.candidates}: {c.algo} compares completions of a prompt or, with one "
             "each, of several prompts; allowed are 2 or more")
    if c.width % (2 * c.heads) or c.heads % c.kv_heads:
        fail(f"--width {c.width}: allowed are multiples of 2 x --heads {c.heads}, itself "
             f"a multiple of --kv-heads {c.kv_heads}")


def progress(r, steps):
    step = f"{r['step']:{len(str(steps))}}/{steps}"
    text = f"{step} pass@1 {r['pass1']:.3f} greedy {r['greedy']:.3f}"
    if "reward" in r:                           # not before the first update
        left = r["seconds"] / r["step"] * (steps - r["step"])
        text += (f" reward {r['reward']:.2f} KL(q||p) {r['kl']:.2f} informative "
                 f"{r['informative']:.0%} {r['train_tok_s']:.0f} tok/s {left:.0f} s left")
    return text


def main(argv=None, trainer=Trainer):
    # without it sums in MKL depend on addresses and thread timing, and a resume has other bits
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    with suppress(AttributeError):                      # a notebook's has other methods
        sys.stdout.reconfigure(errors="backslashreplace")       # e.g. of a prompt, if it is ASCII
    configs, logs, summaries = parse(argv, trainer), [], []
    if configs[0].plot:
        draw = run_path(str(Path(__file__).parent / "results" / "plot.py"))["llm"]
    try:
        for c in configs:
            with claim(c):
                log, summary = trainer(c).run()
            logs += log
            summaries.append(summary)
        if len(configs) > 1:
            print(*summaries, sep="\n", flush=True)
    except BrokenPipeError:                 # who reads our output has gone, e.g. head
        os._exit(1)                         # at exit Python would complain
    except KeyboardInterrupt:
        fail("interrupted; --resume goes on from the last checkpoint, if any", 130)
    if configs[0].plot:
        draw(logs, configs[0].folder / "pass1.png")


if __name__ == "__main__":
    main()
