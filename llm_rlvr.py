"""RL with verifiable rewards on a small GPT by Target Policy Optimization (Kaddour, arXiv 2604.06159).

    python llm_rlvr.py --algo tpo                                 3 minutes on two CPU cores
    python llm_rlvr.py --algo tpo,grpo,dg:epochs=1                each from the same warm start, then one table
    python llm_rlvr.py --algo tpo,tpo:anchor=1,grpo:lr=1e-3       settings of one run behind its name
    python llm_rlvr.py --task knights_knaves                      another task; --help lists every flag
    python llm_rlvr.py --algo tpo --resume                        go on after Ctrl-C or a crash

The last line to expect from the first command, up to what rounding does to one seed:
    tpo (alpha 0.25) took graph_color from 8.3% to 90.9% pass@1 (greedy 91.8%) on 256 heldout puzzles in 750 ...
Logs and the checkpoint go to out/<task>-<algo>-<seed>/. The algorithm is Trainer.update; the rest is what it needs.
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
import tempfile
import time
import unicodedata
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

import baselines
from tpo import standardize, tpo_loss, tpo_target


# ------------------------------------------------------------------------------------------------------------- settings
def flag(default, help):
    """A field that becomes a command-line flag of the same name, type and default."""
    return field(default=default, metadata={"help": help})


# defaults with --init-from: batch and learning rate are the paper's; alpha: see results/long_completions.md
PRETRAINED = dict(steps=100, prompts=16, epochs=1, lr=1e-5, anchor=0.0, eval_every=10, eval_puzzles=64,
                  max_new_tokens=256, warm_steps=0, micro_tokens=2048)


@dataclass(frozen=True)
class Config:
    algo: str = flag("tpo", "tpo, tpo_no_anchor, group_pg, grpo, grpo_no_kl, grpo_masked, rloo, maxrl, rebel, oapl, "
                            "pg, ppo, dg, kondo, dr_grpo, dapo, gspo, cispo, or a comma list; NAME:FLAG=VALUE:... "
                            "sets flags for that run alone")
    task: str = flag("graph_color", "graph_color, knights_knaves or addition; with --init-from also gsm8k, jsonl "
                                    "(your own lines) or rg:NAME (a dataset of Reasoning Gym)")
    data: str = flag("", "folder of train.jsonl and test.jsonl (gsm8k), or the .jsonl file (jsonl)")
    shots: int = flag(0, "solved training examples before each gsm8k question, for models without a chat template")
    init_from: str = flag("", "folder of a pretrained Llama, Qwen2 or Qwen3 checkpoint; without it a small GPT from "
                              "random weights")
    steps: int = flag(750, "RL updates, one rollout batch each")
    prompts: int = flag(32, "prompts per update, B")
    candidates: int = flag(16, "completions per prompt, K")
    epochs: int = flag(2, "gradient steps per rollout batch; dg, pg, group_pg and kondo are made for 1")
    lr: float = flag(2e-3, "AdamW learning rate: rises over 30 updates, and falls linearly to 0")
    eta: float = flag(1.0, "temperature of the target (tpo, tpo_no_anchor) or of the gate (dg), or rebel's eta")
    anchor: float = flag(0.25, "alpha in q ~ p_old^alpha exp(u / eta): 1 is the paper, 0 the uniform anchor")
    length_normalize: bool = flag(False, "per-token means of log-probs instead of sums in grouped losses, as the "
                                         "author's trainer port does: another fixed point")
    seed: int = flag(0, "of the weights, the training prompts and the sampling")
    eval_every: int = flag(50, "updates between evaluations; a checkpoint precedes each")
    eval_set: str = flag("heldout", "which fixed puzzles to evaluate on: heldout, or test for final numbers")
    eval_puzzles: int = flag(256, "how many of them")
    max_new_tokens: int = flag(7, "longest completion, its end token included, T")
    warm_steps: int = flag(100, "supervised steps on random answers of the right form")
    layers: int = flag(2, "transformer blocks")
    width: int = flag(128, "embedding width, a multiple of 2 x heads")
    heads: int = flag(4, "query heads")
    kv_heads: int = flag(2, "key/value heads, a divisor of heads")
    lora_rank: int = flag(0, "train low-rank branches of this rank instead of the weights, which on CUDA are kept in "
                             "bf16; 0 is full training")
    micro_tokens: int = flag(8192, "tokens in one backward pass: lower it when memory runs out; the gradient "
                                   "stays the same")
    recompute: bool = flag(False, "keep no activations for the backward pass but those between blocks: slower, "
                                  "less memory")
    export: str = flag("", "folder for the trained model in Hugging Face layout")
    out: str = flag("out/{task}-{algo}-{seed}", "folder of log.jsonl and checkpoint.pt")
    resume: bool = flag(False, "continue from the checkpoint in --out; without it the run there is replaced")
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    compile: bool = flag(False, "torch.compile the training pass")
    plot: bool = flag(False, "draw pass@1 into --out (needs matplotlib)")


# -------------------------------------------------------------------------------- several GPUs: torchrun sets the ranks
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gather(x):
    """The parts (b, ...) of all ranks in order, (RANKS * b, ...)."""
    if RANKS == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(RANKS)]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------- tasks
# A task has defaults, a dict of its own defaults for flags, and
#   prompt(rng) -> (text, key)       a fresh puzzle in its only spelling (names, edges, terms sorted), because a hash of
#                                    the text decides whether it is trained or evaluated on; key is what check needs
#   check(key, answer) -> score      1.0 is right; values in [0, 1) give partial credit
#   guess(rng, key) -> answer        for the warm start: right in form, drawn without looking at the solution
#   split(text) -> split             optional, where the data come with a split; by default hash_split
class KnightsKnaves:
    """Knights tell the truth, knaves lie; who is what? Every puzzle has exactly one solution."""
    people, kinds, joints = "ABC", ("knight", "knave"), {"and": all, "or": any}
    defaults = {}

    def prompt(self, rng):
        worlds = [dict(zip(self.people, w)) for w in itertools.product(self.kinds, repeat=len(self.people))]
        while True:
            said = {}                                          # speaker -> a claim: "B is a knave or C is a knight"
            for speaker in self.people:
                n = rng.choice((1, 2, 2))
                about = sorted(zip(rng.sample(self.people, n), rng.choices(self.kinds, k=n)))
                said[speaker] = rng.choice(list(self.joints)), about
            fits = [w for w in worlds if all((w[p] == "knight") == self.joints[joint](w[x] == kind for x, kind in about)
                                             for p, (joint, about) in said.items())]
            if len(fits) == 1:
                claims = {p: f" {joint} ".join(f"{x} is a {k}" for x, k in about) for p, (joint, about) in said.items()}
                return "".join(f"{p} says {claim}. " for p, claim in claims.items()) + "Who?", fits[0]

    def check(self, key, answer):
        """The share of people given the right kind, if each is named once, in any order: "B knave A knight C knave"."""
        words = answer.split()
        said = dict(zip(words[::2], words[1::2]))
        if len(words) != 2 * len(key) or said.keys() != key.keys():
            return 0.0
        return mean(float(said[person] == kind) for person, kind in key.items())

    def guess(self, rng, key):
        return "".join(f" {p} {rng.choice(self.kinds)}" for p in self.people)


class GraphColor:
    """Give six nodes three colors so that no edge joins equal colors; any proper coloring is right."""
    edges, colors = ["-".join(e) for e in itertools.combinations("ABCDEF", 2)], ("red", "green", "blue")
    defaults = {}

    def prompt(self, rng):
        while True:
            edges = sorted(rng.sample(self.edges, rng.randint(4, 8)))
            if any(self.proper(edges, c) for c in itertools.product(self.colors, repeat=6)):
                return "Color" + "".join(" " + e for e in edges) + ":", edges

    @staticmethod
    def proper(edges, colors):
        color = dict(zip("ABCDEF", colors))
        return all(color[e[0]] != color[e[2]] for e in edges)

    def check(self, key, answer):
        colors = answer.split()
        return float(len(colors) == 6 and set(colors) <= set(self.colors) and self.proper(key, colors))

    def guess(self, rng, key):
        return "".join(" " + rng.choice(self.colors) for _ in range(6))


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


PIECE = r" ?[A-Za-z-]+|[\s\S]"          # one token: a word with the space before it, or any other single character
TASKS = {"graph_color": GraphColor(), "knights_knaves": KnightsKnaves(), "addition": Addition()}


# Tasks for pretrained models: no guess, hence no warm start.
NUMBER = r"(?:(?<![\w)])[-−])?\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)"     # the minus of 5-3 is no sign
MARK = r"####|\\boxed\{|answer(?: is|\W{0,2}:)"


def final_number(text):
    r"""The number after the last ####, \boxed{, "answer is" or "answer:", else the text's last; None without one."""
    text = text.replace("{,}", ",")                                                  # LaTeX writes 1{,}080
    *before, tail = re.split(MARK, text, flags=re.IGNORECASE)
    numbers = before and re.findall(NUMBER, tail)[:1] or re.findall(NUMBER, text)[-1:]
    return Decimal(re.sub("[$,]", "", numbers[0]).replace("−", "-")) if numbers else None


def final_line(text):
    return (text.strip().splitlines() or [""])[-1].strip().casefold().removeprefix("answer:").strip()


def read_jsonl(path, name, wanted, form):
    """{text: answer} of the lines {name: text, "answer": answer} of a file; the others are reported and left out."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        fail(f"--data {path}: cannot be read ({error.strerror})")
    found, bad = {}, []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            text, answer = row[name], row["answer"]
            fine = text.encode().strip() and type(answer) in (str, int, float) and re.search(wanted, str(answer))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):           # of JSON, field or type
            fine = False
        if fine:
            found[text] = str(answer)
        elif line.strip():
            bad.append(number)
    for number in bad[:10]:
        print(f'{path}:{number}: not {{"{name}": text, "answer": {form}}}', file=sys.stderr)
    if bad:
        print(f"{path}: left out {len(bad)} of {len(lines)} lines", file=sys.stderr)
    if not found:
        fail(f'--data {path}: has no line {{"{name}": text, "answer": {form}}}')
    return found


class Gsm8k:
    """School math in words (Cobbe et al., arXiv 2110.14168). test.jsonl is the test split, 1 of 10 others heldout."""
    def __init__(self, folder, shots):
        if shots < 0:
            fail(f"--shots {shots}: allowed are 0 or more")
        train, test = (read_jsonl(Path(folder) / name, "question", r"####\s*" + NUMBER, "text with #### number")
                       for name in ("train.jsonl", "test.jsonl"))
        part = {q: "heldout" if hash_split(q) == "heldout" else "train" for q in train}
        part.update(dict.fromkeys(test, "test"))
        ask, solved = "Question: {}\nAnswer:".format, [q for q in part if part[q] == "train"][:shots]
        self.head = 'Think step by step and end with "The answer is N."\n\n'
        for q in solved:
            steps, _, n = re.sub("<<.*?>>", "", train[q]).rpartition("####")
            self.head += f"{ask(q)} {steps.strip()}\nThe answer is {n.strip()}.\n\n"
            del part[q]                                                          # a shot's answer is in every prompt
        self.keys = [(ask(q), final_number(answer)) for q, answer in (train | test).items() if q in part]
        self.part = {ask(q): split for q, split in part.items()}

    def prompt(self, rng):
        question, key = rng.choice(self.keys)
        return self.head + question, key

    def split(self, text):
        return self.part[text.removeprefix(self.head)]

    def check(self, key, answer):
        return float(final_number(answer) == key)


class Jsonl:
    """Your own lines {"prompt": text, "answer": text or number}: numbers compare as in gsm8k, else the last line."""
    def __init__(self, path):
        self.items = list(read_jsonl(path, "prompt", r"\S", "text or number").items())

    def prompt(self, rng):
        return rng.choice(self.items)

    def check(self, key, answer):
        read = final_number if re.fullmatch(NUMBER, key.strip()) else final_line
        return float(read(answer) == read(key))


class ReasoningGym:
    """A dataset of Reasoning Gym (arXiv 2505.24760), its prompts and scores. Entry i is made from seed 0 + i."""
    def __init__(self, name):
        try:
            import reasoning_gym
        except ImportError:
            fail(f"--task rg:{name} needs reasoning-gym: pip install reasoning-gym")
        self.size = 20_000 if name in ("acre", "word_ladder") else 10**6         # one is made whole, one has this limit
        try:
            self.data = reasoning_gym.create_dataset(name, seed=0, size=self.size)
        except (ValueError, AssertionError) as error:
            fail(f"--task rg:{name}: {error}; the keys of reasoning_gym.factory.DATASETS are allowed")

    def prompt(self, rng):
        entry = self.data[rng.randrange(self.size)]
        return entry["question"].strip() + "\nPut the final answer inside <answer></answer>.", entry

    def check(self, key, answer):
        tagged = re.findall("<answer>(.*?)</answer>", answer, re.DOTALL)
        try:
            return float(self.data.score_answer((tagged or [answer])[-1].strip(), key))
        except Exception:                                              # some raise on an answer that they cannot read
            return 0.0


@cache
def load_task(task, data, shots):
    return (Gsm8k(data, shots) if task == "gsm8k" else Jsonl(data) if task == "jsonl" else
            ReasoningGym(task.removeprefix("rg:")))


def find_task(c):
    """The task that c names, always the same instance: of TASKS, or one that needs a pretrained model."""
    if c.task not in (*TASKS, "gsm8k", "jsonl") and not c.task.startswith("rg:"):
        fail(f"--task {c.task}: allowed are {', '.join(TASKS)}, gsm8k, jsonl, rg:NAME")
    for name, value, tasks in (("data", c.data, ("gsm8k", "jsonl")), ("shots", c.shots, ("gsm8k",))):
        if value and c.task not in tasks:
            fail(f"--{name} {value}: goes with --task {' or '.join(tasks)}, not with {c.task}")
    if c.task in TASKS:
        return TASKS[c.task]
    if not c.init_from:
        fail(f"--task {c.task}: needs --init-from DIR")
    if not c.data and not c.task.startswith("rg:"):
        fail(f"--task {c.task}: needs --data {'DIR' if c.task == 'gsm8k' else 'FILE.jsonl'}")
    return load_task(c.task, c.data, c.shots)


def hash_split(text):
    """By a hash of the text, 8 of 10 puzzles are in train, 1 in heldout, 1 in test."""
    return {0: "heldout", 1: "test"}.get(zlib.crc32(text.encode()) % 10, "train")


def puzzles(task, rng, n, split):
    """n (text, key) pairs of a split: train, heldout or test."""
    found, split_of = [], getattr(task, "split", hash_split)
    for _ in range(1000 * n):
        text, key = task.prompt(rng)
        if split_of(text) == split:
            found.append((text, key))
            if len(found) == n:
                return found
    fail(f"--task: only {len(found)} of {1000 * n} drawn puzzles are in the split {split}; it needs more puzzles")


@cache
def exam(task, split, n):
    """The fixed puzzles of an evaluation, the same for every seed: n, or fewer in a small task, all different."""
    rng, found = random.Random(split), {}
    for _ in range(5 * n // 2):
        if len(found) < n:
            found.update(puzzles(task, rng, 1, split))
    return list(found.items())


@cache
def make_encoding(task):
    """Tokens: the pieces that occur in 2,000 puzzles and guesses of the task, and the end token as the last id."""
    rng, pieces = random.Random(0), set()
    for text, key in (task.prompt(rng) for _ in range(2000)):
        pieces.update(re.findall(PIECE, text + task.guess(rng, key)))
    ranks = {piece.encode(): i for i, piece in enumerate(sorted(pieces))}
    return tiktoken.Encoding("task", pat_str=PIECE, mergeable_ranks=ranks, special_tokens={"<|end|>": len(ranks)})


def encode(enc, text):
    try:
        return [enc.encode_single_token(piece) for piece in re.findall(PIECE, text)]
    except KeyError as error:
        fail(f"--task: {error.args[0].decode()!r} of {text!r} is not among the words of 2,000 puzzles and guesses")


def encode_prompts(encode, items, device):
    """Left-padded prompts, so that every completion starts at the same column: tokens (B, P) and valid (B, P)."""
    rows = [encode(text) for text, _ in items]
    P = max(map(len, rows))
    tokens = torch.tensor([[0] * (P - len(r)) + r for r in rows])
    valid = torch.tensor([[False] * (P - len(r)) + [True] * len(r) for r in rows])
    return tokens.to(device), valid.to(device)


# ---------------------------------------------------------------------------------------------------------------- model
@dataclass(frozen=True)
class ModelConfig:
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int                    # of the MLP
    qkv_bias: bool = False         # Qwen2
    qk_norm: bool = True           # Qwen3
    tied: bool = False             # the head is the token embedding
    theta: float = 10_000.0        # of the rotary positions
    eps: float = 1e-6              # of the RMSNorms


class GPT(nn.Module):
    """Decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention; parameters named as in HF Llama and Qwen."""

    def __init__(self, c):
        super().__init__()
        self.config, self.recompute = c, False         # recompute: keep no activations inside blocks for the backward
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(c.vocab, c.width),
                                    "layers": nn.ModuleList(Block(c) for _ in range(c.layers)),
                                    "norm": nn.RMSNorm(c.width, c.eps)})
        self.lm_head = nn.Linear(c.width, c.vocab, bias=False)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):     # what each block adds to the residual stream
                nn.init.normal_(p, std=(2 * c.layers * p.shape[1]) ** -0.5)
            elif p.ndim == 2:
                nn.init.normal_(p, std=1.0 if "embed_tokens" in name and not c.tied else p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if c.tied:
            self.lm_head.weight = self.model["embed_tokens"].weight

    def forward(self, tokens, pos, attend):
        """Final hidden states (..., width) of tokens (...) at rotary positions pos (...).

        Who sees whom is the caller's: attend(i, q, k, v) is the attention of layer i, from queries (..., heads, D) and
        keys and values (..., kv_heads, D), D = head_dim, to (..., heads, D).
        """
        c = self.config
        frequency = c.theta ** -(torch.arange(0, c.head_dim, 2, device=tokens.device) / c.head_dim)
        angle = torch.cat((pos[..., None] * frequency,) * 2, -1)[..., None, :]                           # (..., 1, D)
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
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(c.width, c.eps), nn.RMSNorm(c.width, c.eps)
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
        if c.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(c.head_dim, c.eps), nn.RMSNorm(c.head_dim, c.eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, rope, attend):
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q.float()), rope), rotate(self.k_norm(k.float()), rope)             # (..., heads, D)
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


# ----------------------------------------------------------------------------------------------- pretrained checkpoints
FAMILIES = {"LlamaForCausalLM": dict(qkv_bias=False, qk_norm=False),                  # what sets them apart in `GPT`
            "Qwen2ForCausalLM": dict(qkv_bias=True, qk_norm=False),
            "Qwen3ForCausalLM": dict(qkv_bias=False, qk_norm=True)}


def read_json(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"--init-from: {path} cannot be read ({getattr(error, 'strerror', None) or error})")
    return found if isinstance(found, dict) else fail(f"--init-from: {path} is no JSON object")


def read_config(path):
    """ModelConfig of a Hugging Face config.json."""
    j = read_json(path)
    family = str((j.get("architectures") or ["none"])[0])
    if family not in FAMILIES:
        fail(f"--init-from: {path} has the architecture {family}; allowed are {', '.join(FAMILIES)}")
    rope = {"rope_theta": j.get("rope_theta", 10_000.0)} | (j.get("rope_parameters") or {})
    scaling = j.get("rope_scaling") or rope                                         # the older key wins in transformers
    j["rope_type"] = scaling.get("rope_type", scaling.get("type", "default"))
    for name, allowed in dict(rope_type="default", hidden_act="silu", attention_bias=False, mlp_bias=False,
                              use_sliding_window=False, quantization_config=None).items():
        if j.get(name, allowed) != allowed:
            fail(f"--init-from: {path} has {name} {j[name]!r}; allowed is {allowed!r}")
    try:
        width, heads = j["hidden_size"], j["num_attention_heads"]
        c = ModelConfig(j["vocab_size"], width, j["num_hidden_layers"], heads, j.get("num_key_value_heads") or heads,
                        j.get("head_dim") or width // heads, j["intermediate_size"],
                        tied=j.get("tie_word_embeddings", False),
                        theta=scaling.get("rope_theta", rope["rope_theta"]), eps=j["rms_norm_eps"], **FAMILIES[family])
        if min(c.vocab, c.width, c.layers, c.heads, c.kv_heads, c.head_dim, c.hidden) < 1 or c.heads % c.kv_heads:
            raise ValueError(f"{c.heads} heads, {c.kv_heads} key heads, width {c.width}, ...")
        return c
    except KeyError as error:
        fail(f"--init-from: {path} lacks {error}")
    except (TypeError, ValueError, ZeroDivisionError) as error:
        fail(f"--init-from: {path} has sizes that are none ({error})")


def read_model(folder):
    """GPT in fp32 from a Hugging Face folder: config.json and model.safetensors, or shards with their index."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        fail("--init-from needs safetensors: pip install safetensors")
    with torch.device("meta"):                                                              # no time for random weights
        model = GPT(read_config(folder / "config.json"))
    index, found = folder / "model.safetensors.index.json", {}
    for file in sorted({*read_json(index).get("weight_map", {}).values()}) if index.exists() else ["model.safetensors"]:
        try:
            with safe_open(folder / file, "pt") as tensors:
                found.update((name, tensors.get_tensor(name)) for name in tensors.keys() if "rotary_emb" not in name)
        except (OSError, SafetensorError) as error:
            fail(f"--init-from: {folder / file} cannot be read ({str(error).splitlines()[0]})")
    if model.config.tied:
        found["lm_head.weight"] = found.get("model.embed_tokens.weight", torch.empty(0))
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for name in sorted(wanted.keys() | found.keys()):
        x = found.get(name)
        if x is None or tuple(x.shape) != wanted.get(name):
            fail(f"--init-from: {folder}: {name} is {'missing' if x is None else tuple(x.shape)} in the safetensors; "
                 f"config.json wants {wanted.get(name, 'no such tensor')}")
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not x.isfinite().all():
            fail(f"--init-from: {folder}: {name} is {x.dtype} or not finite; allowed are finite fp32, fp16, bf16")
    model.load_state_dict({name: x.float() for name, x in found.items()}, assign=True)
    if model.config.tied:
        model.lm_head.weight = model.model["embed_tokens"].weight
    return model


def export_model(model, folder, source):
    """The model as transformers loads it, in fp32, with the tokenizer of the folder source if there is one."""
    from safetensors.torch import save_file
    c = model.config
    family = next(name for name, has in FAMILIES.items() if has == dict(qkv_bias=c.qkv_bias, qk_norm=c.qk_norm))
    kept = {"max_position_embeddings": 32768}                                                # of what this file ignores
    if source:
        j = read_json(Path(source) / "config.json")
        kept |= {k: j[k] for k in ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id") if k in j}
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "config.json", json.dumps(dict(
        architectures=[family], model_type=family.removesuffix("ForCausalLM").lower(), vocab_size=c.vocab,
        hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, head_dim=c.head_dim, rms_norm_eps=c.eps, hidden_act="silu",
        rope_theta=c.theta, rope_parameters=dict(rope_type="default", rope_theta=c.theta), tie_word_embeddings=c.tied,
        attention_bias=False, dtype="float32", **kept), indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if source and (Path(source) / name).exists():
            write(folder / name, (Path(source) / name).read_text(encoding="utf-8"))
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()
               if not (c.tied and name == "lm_head.weight")}
    if not RANK:
        save_file(tensors, folder / "model.safetensors.tmp", {"format": "pt"})
        os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_DIGITS = r"\s+(?=\p{N})|\p{N}|" + GPT2                         # SmolLM2: each digit alone, no space before it


def split_pattern(pre):
    """The pattern of a tokenizer.json's pre_tokenizer; None if it is of another kind than those below."""
    match (pre or {}).get("pretokenizers", [pre]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:                              # GPT-2
            return GPT2
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_DIGITS
        case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:                     # Qwen, Llama 3
            return regex


def read_tokenizer(folder):
    """(tiktoken.Encoding, end token, encode(text) -> ids of a prompt) of a byte-level BPE tokenizer.json.

    The prompt is one user message in the model's chat template, or the bare text if it has none. tiktoken merges the
    pair whose result has the lowest id: the merges must be in the order of their results' ids.
    """
    path, path_config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    j, config = read_json(path), read_json(path_config) if path_config.exists() else {}
    bpe, pattern = j.get("model") or {}, split_pattern(j.get("pre_tokenizer"))
    normal = j.get("normalizer") or {"type": None}
    merged = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in bpe.get("merges") or ()]
    ids = [bpe.get("vocab", {}).get(piece, -1) for piece in merged]
    for fine, what in ((bpe.get("type") == "BPE" and ids, "no byte-level BPE with merges"),
                       (ids == sorted(ids) and min(ids, default=0) >= 0,
                        "merges that are not in the order of their ids"),
                       (pattern, f"the pre_tokenizer {json.dumps(j.get('pre_tokenizer'))[:200]}"),
                       (normal["type"] in (None, "NFC"), f"the normalizer {normal['type']}")):
        if not fine:
            fail(f"--init-from: {path} has {what}; allowed are tokenizers as of Llama 3, Qwen2, Qwen3 and SmolLM2")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes other bytes as 256, 257 ...
    byte = dict(zip(map(chr, [*printable, *range(256, 324)]), printable + sorted({*range(256)} - {*printable})))
    pieces = bpe["vocab"].keys() if bpe.get("ignore_merges") else [*(byte.keys() & bpe["vocab"].keys()), *merged]
    special = {t["content"]: t["id"] for t in j.get("added_tokens") or ()}
    enc = tiktoken.Encoding("pretrained", pat_str=pattern, special_tokens=special, mergeable_ranks={
        bytes(byte[char] for char in piece): bpe["vocab"][piece] for piece in pieces if piece not in special})

    bos, eos = (t["content"] if isinstance(t, dict) else t for t in map(config.get, ("bos_token", "eos_token")))
    if eos not in special:
        fail(f"--init-from: {path_config} has the eos_token {eos!r}, which is not among the added_tokens of {path}")
    template = folder / "chat_template.jinja"
    template = template.read_text(encoding="utf-8") if template.exists() else config.get("chat_template")
    if not template and (not bos or bos not in json.dumps(j.get("post_processor"), ensure_ascii=False)):
        bos = ""
    render = chat_template(template, bos, eos) if template else lambda text: bos + text

    def encode(text):
        text = unicodedata.normalize("NFC", render(text)) if normal["type"] else render(text)
        return enc.encode(text, allowed_special="all")

    return enc, special[eos], encode


def chat_template(template, bos, eos):
    """render(text) -> the prompt of one user message, in transformers' sandbox with its helpers."""
    from jinja2 import TemplateError                                                                # torch needs jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
    sandbox.globals.update(strftime_now=time.strftime, raise_exception=lambda message: fail(f"--init-from: {message}"))

    compiled = cache(sandbox.from_string)                               # on first use, so that one place tells errors

    def render(text):
        try:
            return compiled(template).render(
                messages=[{"role": "user", "content": text}], bos_token=bos, eos_token=eos,
                add_generation_prompt=True, enable_thinking=False)
        except TemplateError as error:
            fail(f"--init-from: the chat template does not render ({error})")

    return render


class LoRA(nn.Module):
    """y = W x + 2 B A x (Hu et al., arXiv 2106.09685, with its alpha = 2 rank). W is frozen, and B = 0 at the start."""

    def __init__(self, base, rank, dtype):
        super().__init__()
        self.base = base.to(dtype)                           # frozen: autocast would round it again for every token
        self.A = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features ** -0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + 2 * F.linear(F.linear(x, self.A), self.B)


def add_lora(model, rank, dtype):
    """Freeze the model, its matrices kept in dtype, and give those inside blocks a trained fp32 branch."""
    model.requires_grad_(False)
    for table in (model.model["embed_tokens"], model.lm_head):
        table.to(dtype)
    for block in model.model["layers"]:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, LoRA(child, rank, dtype))


@torch.no_grad()
def merge_lora(model):
    """Add the branches to their weights: the model as it was named before, in fp32."""
    for table in (model.model["embed_tokens"], model.lm_head):
        table.float()
    for block in model.model["layers"]:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, LoRA):
                    setattr(part, name, child.base.float())
                    child.base.weight += 2 * child.B @ child.A
    return model


# ------------------------------------------------------------------- one prompt, K completions: sample, log-prob, score
def attention(q, k, v, mask):
    """From queries (B, S, heads, D) on keys and values (B, S', kv_heads, D); mask (B, 1, S, S') is True where one sees.

    The G query heads of a key head become further queries: on CUDA no fused kernel takes both a mask and enable_gqa.
    """
    S, kv_heads, G = q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    q = q.unflatten(2, (kv_heads, G)).permute(0, 2, 3, 1, 4).flatten(2, 3)                   # (B, kv_heads, G * S, D)
    y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask.repeat(1, 1, G, 1))
    return y.unflatten(2, (G, S)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def causal(valid):
    """Mask (B, 1, P, P) of left-padded prompts, valid (B, P) False on padding, and their rotary positions (B, P)."""
    mask = torch.ones(valid.shape[1], valid.shape[1], dtype=torch.bool, device=valid.device).tril() & valid[:, None]
    mask = mask | torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)      # a softmax over nothing is NaN
    return mask[:, None], (valid.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def sample(model, tokens, valid, K, T, end, generator, greedy=False, shard=(0, 1)):
    """K completions y (B, K, T) of each prompt, real (B, K, T): True up to the end token and on it, fp32 log-probs.

    Temperature 1 without top-k or top-p: any other sampler is not the policy whose log-probs are trained.
    shard (rank, ranks): random numbers are drawn for all ranks, so that the samples do not depend on their number.
    """
    c, (B, P), kind, (rank, ranks) = model.config, tokens.shape, tokens.device.type, shard
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    cache = [torch.empty(2, B * K, c.kv_heads, P + T - 1, c.head_dim, device=tokens.device, dtype=dtype)
             for _ in range(c.layers)]                                          # the last token is never an input
    mask, pos = causal(valid)

    def read_prompts(i, q, k, v):                           # a prompt is computed once and copied to its K completions
        cache[i][:, :, :, :P] = torch.stack((k, v)).transpose(2, 3).repeat_interleave(K, 1)
        return attention(q, k, v, mask)

    def read_token(i, q, k, v):                                 # q (rows, 1, heads, D), at slot P + t of the cache
        # two products: for one query a row they take half the time of scaled_dot_product_attention on a CPU
        cache[i][0, :, :, P + t], cache[i][1, :, :, P + t] = k[:, 0], v[:, 0]
        k, v = cache[i][:, :, :, :P + t + 1]                                               # (rows, kv_heads, slots, D)
        weight = (q.view(len(q), c.kv_heads, -1, c.head_dim) * c.head_dim ** -0.5) @ k.mT  # (rows, kv_heads, G, slots)
        weight = weight.masked_fill(~sees[:, None, None, :P + t + 1], -torch.inf).softmax(-1)
        return (weight.to(v) @ v).view(q.shape)

    h = model(tokens, pos, read_prompts)[:, -1:].repeat_interleave(K, 0)                             # (rows, 1, width)
    pos, sees = (x.repeat_interleave(K, 0) for x in (pos[:, -1:], F.pad(valid, (0, T - 1), value=True)))
    y = torch.full((B * K, T), end, device=tokens.device)
    logps, rows = torch.zeros(y.shape, device=tokens.device), torch.arange(B * K, device=tokens.device)
    if not greedy:
        u = torch.rand(ranks * B * K, T, generator=generator, device=tokens.device)[rank * B * K:]
    for t in range(T):
        logp = model.lm_head(h[:, 0]).float().log_softmax(-1)                                              # (rows, V)
        if greedy:
            token = logp.argmax(-1, keepdim=True)                                                          # (rows, 1)
        else:                             # the inverse of the cdf: one random number a row, since V of them took three
            cdf = logp.exp().cumsum(-1)                                   # quarters of a CPU step at V = 49,152
            token = torch.searchsorted(cdf, u[rows, t, None] * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)
        y[rows, t], logps[rows, t] = token[:, 0], logp.gather(-1, token)[:, 0]
        if t == T - 1:
            break
        if t % 16 == 15:                                    # the batch shrinks; it costs a host sync, so not each token
            going = ~(y[rows, :t + 1] == end).any(-1)                                                      # (rows,)
            if not going.any():
                break
            if going.float().mean() <= 0.75:
                rows, sees, pos, token = (x[going] for x in (rows, sees, pos, token))
                for i, x in enumerate(cache):
                    cache[i] = x[:, going]
        h = model(token, pos + 1 + t, read_token)
    y, logps = y.view(B, K, T), logps.view(B, K, T)
    real = up_to_end(y, end)
    return y, real, logps.masked_fill(~real, 0)


def up_to_end(y, end):
    """True up to and including the first end token: it is sampled, scored and trained; what follows is padding."""
    return (y == end).cumsum(-1) - (y == end).int() == 0


def token_logp(model, tokens, valid, y, of):
    """fp32 log-probs (R, T) of completions y (R, T), with gradient. y[i] follows prompt of[i] of tokens (B, P).

    Prompts and completions go through the model as one list of tokens, so that a prompt is computed once for all of
    its completions; a completion attends to its prompt and to itself.
    """
    (B, P), (R, T) = tokens.shape, y.shape
    mask, pos = causal(valid)
    own = torch.ones(T - 1, T - 1, dtype=torch.bool, device=y.device).tril().expand(R, -1, -1)
    sees = torch.cat((valid[of][:, None].expand(-1, T - 1, -1), own), 2)[:, None]             # (R, 1, T - 1, P + T - 1)
    later = pos[of, -1:] + 1 + torch.arange(T - 1, device=y.device)                                     # (R, T - 1)

    def parts(x):                                           # of the list, (B, P, ...) and (R, T - 1, ...)
        return x[:B * P].unflatten(0, (B, P)), x[B * P:].unflatten(0, (R, T - 1))

    def attend(_, q, k, v):
        (q, q_own), (k, k_own), (v, v_own) = parts(q), parts(k), parts(v)
        k_all, v_all = (torch.cat((x.index_select(0, of), x_own), 1) for x, x_own in ((k, k_own), (v, v_own)))
        out, out_own = attention(q, k, v, mask), attention(q_own, k_all, v_all, sees)
        return torch.cat((out.flatten(0, 1), out_own.flatten(0, 1)))

    h, h_own = parts(model(torch.cat((tokens.flatten(), y[:, :-1].flatten())),
                           torch.cat((pos.flatten(), later.flatten())), attend))
    h = torch.cat((h[:, -1:].index_select(0, of), h_own), 1)                   # the last prompt token predicts each y_1

    def nll(h, target):
        return F.cross_entropy(model.lm_head(h).float(), target, reduction="none")

    at_once = max(1, 2**24 // model.config.vocab)              # 64 MB of logits, made again in the backward, not R*T*V
    chunks = list(zip(h.flatten(0, 1).split(at_once), y.flatten().split(at_once)))
    chunks = [nll(*chunk) if len(chunks) == 1 else checkpoint(nll, *chunk, use_reentrant=False) for chunk in chunks]
    return -torch.cat(chunks).view(R, T)


def score(task, enc, end, items, y):
    """Scores (B, K) on the CPU. A completion cut off before its end token has not answered: 0."""
    def one(key, ids):
        if end not in ids:
            return 0.0
        try:
            text = enc.decode(ids[:ids.index(end)])
        except KeyError:                                               # an id of a padded vocabulary, which no text has
            return 0.0
        return task.check(key, text)

    return torch.tensor([[one(key, ids) for ids in candidates] for (_, key), candidates in zip(items, y.tolist())],
                        dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------------ algorithm
def algorithms(c):
    """name -> (loss, grouped, at_rest). grouped: takes summed log-probs (B, K), otherwise token log-probs (B, K, T).

    at_rest: on the first epoch a zero-variance group has exactly zero gradient and may be left out.
    """
    return {"tpo": (partial(tpo_loss, eta=c.eta, anchor=c.anchor), True, True),
            "tpo_no_anchor": (partial(baselines.tpo_no_anchor_loss, eta=c.eta), True, False),
            "group_pg": (baselines.group_pg_loss, True, True),
            "grpo": (baselines.grpo_loss, True, True),
            "grpo_no_kl": (partial(baselines.grpo_loss, beta=0.0), True, True),
            "grpo_masked": (baselines.grpo_masked_loss, True, False),
            "rloo": (baselines.rloo_loss, True, True),
            "maxrl": (baselines.maxrl_loss, True, True),
            "rebel": (partial(baselines.rebel_loss, eta=c.eta), True, True),
            "oapl": (baselines.oapl_loss, True, True),
            "pg": (baselines.pg_loss, False, False),
            "ppo": (baselines.ppo_loss, False, False),
            "dg": (partial(baselines.dg_loss, eta=c.eta), False, False),
            "kondo": (baselines.kondo_loss, False, False),
            "dr_grpo": (partial(baselines.dr_grpo_loss, length=c.max_new_tokens), False, True),
            "dapo": (baselines.dapo_loss, False, False),
            "gspo": (baselines.gspo_loss, False, True),
            "cispo": (baselines.cispo_loss, False, False)}


class Batch(NamedTuple):
    """The rollouts of one update on this rank: b prompts, b * K rows."""
    tokens: torch.Tensor     # (b, P) prompts, padded on the left
    valid: torch.Tensor      # (b, P) False on padding
    y: torch.Tensor          # (b * K, T) completions
    real: torch.Tensor       # (b * K, T) True up to and including the end token
    of: torch.Tensor         # (b * K,) the prompt of each row


ADAMW = dict(betas=(0.9, 0.95), weight_decay=0.0, fused=True)


class Trainer:
    """One run: model, optimizer, random states, log. Everything a checkpoint must hold is in `state`."""

    def __init__(self, c):
        self.c, self.task, self.device = c, find_task(c), pick_device(c.device)
        self.loss, self.grouped, self.at_rest = algorithms(c)[c.algo.split(":")[0]]
        torch.manual_seed(c.seed)
        torch.backends.cuda.enable_cudnn_sdp(False)     # it plans anew for each shape, and here every batch has its own
        if c.init_from:
            self.enc, self.end, self.encode = read_tokenizer(Path(c.init_from))
            self.model = read_model(Path(c.init_from))
        else:
            self.enc = make_encoding(self.task)
            self.end, self.encode = self.enc.n_vocab - 1, partial(encode, self.enc)
            self.model = GPT(ModelConfig(self.enc.n_vocab, c.width, c.layers, c.heads, c.kv_heads, c.width // c.heads,
                                         hidden=8 * math.ceil(c.width / 3)))
        if c.lora_rank:
            add_lora(self.model, c.lora_rank, torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.model.to(self.device).recompute = c.recompute
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.token_logp = torch.compile(token_logp) if c.compile else token_logp
        if RANKS == 1:
            self.optimizer = torch.optim.AdamW(self.trained, c.lr, **ADAMW)
        else:                                              # each rank keeps the moments of a part of the parameters
            from torch.distributed.optim import ZeroRedundancyOptimizer
            self.optimizer = ZeroRedundancyOptimizer(self.trained, torch.optim.AdamW, lr=c.lr, **ADAMW)
        self.rng, self.generator = random.Random(c.seed), torch.Generator(self.device).manual_seed(c.seed)
        self.exam = exam(self.task, c.eval_set, c.eval_puzzles)
        self.step, self.seconds = 0, 0.0                                     # updates done, time spent on them
        self.records, self.recent = [{"kind": "config", **asdict(c)}], []   # the log; metrics since the last evaluation
        self.tally = dict.fromkeys(("sample_tokens", "sample_seconds", "train_tokens", "train_seconds"), 0.0)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def update(self):
        """sample -> score -> target -> fit, once. Returns the metrics. A non-finite step is a FloatingPointError."""
        c, begun = self.c, time.time()
        B, K, b = c.prompts, c.candidates, c.prompts // RANKS
        mine = slice(RANK * b, RANK * b + b)                                             # whole groups to each rank
        items = puzzles(self.task, self.rng, B, "train")[mine]
        tokens, valid = encode_prompts(self.encode, items, self.device)
        with self.autocast():
            y, real, logp = sample(self.model, tokens, valid, K, c.max_new_tokens, self.end, self.generator,
                                   shard=(RANK, RANKS))                                                # (b, K, T)
        R = gather(score(self.task, self.enc, self.end, items, y).to(self.device))                     # (B, K)
        if not R.isfinite().all():
            fail(f"--task {c.task}: its check returned a score that is not finite", 1)
        informative = (standardize(R) != 0).any(-1)                                                    # (B,)
        seen, logp_old, ended = gather(real), gather(logp), gather((y == self.end).any(-1))
        metrics = diagnose(self.total(logp_old, seen), logp_old, seen, ended, R, c)
        metrics["grad_norm"] = R.new_zeros(())                                  # of the first epoch; 0 if there is none
        sampled, sampled_tokens, trained_tokens = time.time(), int(seen.sum()), 0

        T = int(seen.sum(-1).max())
        seen, logp_old, y, real = (x[..., :T] for x in (seen, logp_old, y, real))
        batch = Batch(tokens, valid, y.flatten(0, 1), real.flatten(0, 1),
                      torch.arange(b, device=self.device).repeat_interleave(K))
        # p = p_old is known from sampling, but in bf16 a second epoch needs p_old from a forward like its own
        known = c.epochs == 1 or self.device.type != "cuda"
        self.optimizer.param_groups[0]["lr"] = c.lr * warmup(self.step) * (1 - self.step / c.steps)
        for epoch in range(c.epochs if not self.at_rest or informative.any() else 0):
            # a group without gradient is left out: AdamW would make a step of its rounding error
            groups = informative if self.at_rest and epoch == 0 else torch.ones_like(informative)      # (B,)
            parts, graph = self.micro_batches(batch, groups[mine]), None
            if epoch == 0 and known:
                logp = logp_old.clone()
            else:
                logp, graph = self.log_policy_in_parts(batch, parts)
                if epoch == 0:
                    logp = logp + self.log_policy_in_parts(batch, self.micro_batches(batch, ~groups[mine]))[0]
                logp = gather(logp.view(b, K, T))
                if epoch == 0:
                    logp_old = logp.detach()
            logp.requires_grad_()                                                                      # (B, K, T)
            now, old, r, mask = (x[groups] for x in (logp, logp_old, R, seen))
            if self.grouped:                                                       # tpo_loss builds q from old and r
                loss = self.loss(self.total(now, mask), self.total(old, mask), r)
            else:
                loss = self.loss(now, old, r, mask=mask)
            loss = loss * groups.float().mean()                          # groups left out count in the mean over groups
            slope = torch.autograd.grad(loss, logp)[0][mine].flatten(0, 1)           # (b * K, T): tpo has p - q here
            for rows in parts:                                                # dL/dlogp is exact however rows are split
                if graph is not None:
                    graph.backward(slope[rows])
                elif len(rows := rows[slope[rows].any(-1)]):                         # zero weight needs no backward
                    self.log_policy(batch, rows).backward(slope[rows])
            self.add_gradients()
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained])
            if not (loss + norm).isfinite():
                raise FloatingPointError(f"loss {loss:g}, gradient norm {norm:g} at update {self.step}, epoch {epoch}")
            if epoch == 0:
                metrics["grad_norm"] = norm
            self.optimizer.step()
            self.optimizer.zero_grad()
            trained_tokens += int(valid[groups[mine]].sum() + real[groups[mine]].sum()) * RANKS

        metrics = dict(zip(metrics, (round(x, 5) for x in torch.stack(list(metrics.values())).tolist())))
        for name, amount in dict(sample_tokens=sampled_tokens, sample_seconds=sampled - begun,
                                 train_tokens=trained_tokens,
                                 train_seconds=time.time() - sampled).items():
            self.tally[name] += amount
        return metrics

    def micro_batches(self, batch, groups):
        """Rows of the prompts that groups (b,) names, by prompt and length, in parts of about --micro-tokens tokens."""
        T, P = batch.y.shape[1], batch.tokens.shape[1]
        rows = (batch.of * (T + 1) - batch.real.sum(-1)).argsort()
        rows = rows[groups[batch.of[rows]]]
        return rows.split(max(1, self.c.micro_tokens // (T + P // self.c.candidates))) if len(rows) else ()

    def log_policy(self, batch, rows):
        """Log-probs (rows, T) under the current policy, 0 on padding, with gradient."""
        t, (prompts, of) = int(batch.real[rows].sum(-1).max()), batch.of[rows].unique(return_inverse=True)
        with self.autocast():
            logp = self.token_logp(self.model, batch.tokens[prompts], batch.valid[prompts], batch.y[rows, :t], of)
        return F.pad(logp, (0, batch.y.shape[1] - t)).masked_fill(~batch.real[rows], 0)

    def log_policy_in_parts(self, batch, parts):
        """Log-probs (b * K, T) of the rows in parts, detached, 0 elsewhere; with gradient as well if it is one part."""
        logp, graph = torch.zeros(batch.y.shape, device=self.device), None
        for rows in parts:
            with torch.set_grad_enabled(len(parts) == 1):
                graph = self.log_policy(batch, rows)
            logp[rows] = graph.detach()
        return logp, graph if len(parts) == 1 else None

    def total(self, logp, real):
        """Log-probs (..., K) of whole completions, or with --length-normalize their means over tokens."""
        return logp.sum(-1) / (real.sum(-1) if self.c.length_normalize else 1)

    def add_gradients(self):
        """Of all ranks: the loss is a mean over the groups of all. Without rows to train on they are zeros."""
        for p in self.trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if RANKS > 1:
                distributed.all_reduce(p.grad)

    def evaluate(self):
        """pass@1 on the fixed puzzles: four samples each at temperature 1, and greedy."""
        rates, n = {}, max(1, self.c.prompts * self.c.candidates // 4)        # as many rows at once as in an update
        for name, K, greedy in (("pass1", 4, False), ("greedy", 1, True)):
            generator, right = torch.Generator(self.device).manual_seed(0), []
            for i in range(0, len(self.exam), n):
                items = self.exam[i:i + n]
                with self.autocast():
                    y, *_ = sample(self.model, *encode_prompts(self.encode, items, self.device), K,
                                   self.c.max_new_tokens, self.end, generator, greedy)
                right.append((score(self.task, self.enc, self.end, items, y) == 1).float())
            rates[name] = torch.cat(right).mean().item()
        return rates

    def warm_start(self, folder, stop):
        """Supervised steps on random answers: they teach the form, nothing of the solution. Cached for other runs."""
        c, begun = self.c, time.time()
        if not c.warm_steps:
            return
        made_by = (c.layers, c.width, c.heads, c.kv_heads, c.lora_rank, c.warm_steps, self.device.type,
                   Path(__file__).read_text())
        path = folder / f"warm-{c.task}-{c.seed}-{zlib.crc32(repr(made_by).encode()):08x}.pt"  # edited code: a new file
        if path.exists():
            saved = load(path)
            self.model.load_state_dict(saved["model"])
            self.seconds = saved["seconds"]
            return print(f"warm start ({self.seconds:.0f} s of training) read from {path}")
        rng, optimizer = random.Random(f"warm {c.seed}"), torch.optim.AdamW(self.trained, 2e-3, **ADAMW)
        for step in range(c.warm_steps):
            if stop:
                fail("stopped in the warm start: there is nothing to resume yet", 130)
            items = puzzles(self.task, rng, 64, "train")
            tokens, valid = encode_prompts(self.encode, items, self.device)
            answers = [self.encode(self.task.guess(rng, key)) + [self.end] for _, key in items]
            T = max(map(len, answers))
            y = torch.tensor([a + [self.end] * (T - len(a)) for a in answers], device=self.device)         # (64, T)
            optimizer.param_groups[0]["lr"] = 2e-3 * warmup(step)
            with self.autocast():
                logp = token_logp(self.model, tokens, valid, y, torch.arange(len(y), device=self.device))
            loss = -logp[up_to_end(y, self.end)].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.seconds = time.time() - begun
        write(path, {"model": self.model.state_dict(), "seconds": self.seconds})

    def state(self):
        if RANKS > 1:
            self.optimizer.consolidate_state_dict()                                # to the first process, which writes
            if self.device.type == "cuda":
                torch.cuda.synchronize()                                           # its copies are asynchronous
        optimizer = {} if RANK else self.optimizer.state_dict()
        return dict(config=asdict(self.c), device=self.device.type, step=self.step, seconds=self.seconds,
                    records=self.records, recent=self.recent, tally=self.tally, rng=self.rng.getstate(),
                    generator=self.generator.get_state(), optimizer=optimizer,
                    model={name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad})

    def restore(self, path):
        saved = load_run(self.c, path)
        self.model.load_state_dict(saved["model"], strict=False)                  # what was not trained is not in it
        self.optimizer.load_state_dict(saved["optimizer"])
        if RANKS > 1:
            self.optimizer.state.clear()                                 # a second copy, of which nothing makes use
        self.rng.setstate(saved["rng"])
        self.generator.set_state(saved["generator"])
        self.step, self.seconds, self.records, self.recent, self.tally = (
            saved[k] for k in ("step", "seconds", "records", "recent", "tally"))

    def run(self, folder, warm_folder):
        """Warm start or resume, then updates, with a checkpoint and an evaluation every eval_every. Returns the log."""
        stop = []

        def ask_to_stop(signum, _):
            stop.append(signum)
            signal.signal(signum, signal.SIG_DFL)                               # the second Ctrl-C does not wait
            with suppress(OSError):                           # a pipe's reader gets Ctrl-C as well, and may be gone
                os.write(1, b"" if RANK else b"stopping soon, with a checkpoint; the same again stops at once\n")

        handlers = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self.learn(folder, warm_folder, stop)
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def learn(self, folder, warm_folder, stop):
        c, path = self.c, folder / "checkpoint.pt"
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)                    # of this run, not of those before it
        for unfinished in folder.glob("*.tmp") if not RANK else ():                     # of a run killed while it wrote
            unfinished.unlink()
        if c.resume and path.exists():
            self.restore(path)
        else:
            self.warm_start(warm_folder, stop)
        for p in self.model.parameters() if RANKS > 1 else ():
            distributed.broadcast(p.data, 0)                       # warm starts on several GPUs may differ by rounding
        params = sum(p.numel() for p in self.model.parameters())
        print(f"{c.algo}: {params:,} parameters, {self.enc.n_vocab} tokens, {self.device}; "
              f"e.g. {self.exam[0][0][:200]!r}")
        begun, first, spent = time.time() - self.seconds, self.step, self.seconds
        while True:
            self.seconds = time.time() - begun
            due = self.step % c.eval_every == 0 or self.step == c.steps
            stopped = bool(gather(torch.tensor([len(stop)], device=self.device)).any())          # one signal stops all
            if due or stopped:
                write(path, self.state())                       # before the evaluation, which a resumed run does again
            if stopped:
                fail(f"stopped after {self.step} updates; --resume continues from {path}", 130)
            if due:
                names = self.recent[0] if self.recent else ()                             # none before the first update
                means = {name: round(mean(m[name] for m in self.recent), 5) for name in names}
                self.recent = []
                self.records.append(dict(kind="eval", step=self.step, seconds=round(self.seconds, 2), **self.evaluate(),
                                         **means, sample_tok_s=self.rate("sample"), train_tok_s=self.rate("train")))
                self.write_log(folder)
                left = (self.seconds - spent) / max(self.step - first, 1) * (c.steps - self.step)
                print(progress(self.records[-1], c.steps, left), flush=True)
            if self.step == c.steps:
                break
            try:
                self.recent.append(self.update())
            except FloatingPointError as error:
                write(folder / "last-good.pt", {"config": asdict(c), "model": self.model.state_dict()})
                fail(f"{error}; the weights before that step are in {folder / 'last-good.pt'}: start again with a "
                     f"lower --lr (now {c.lr}) or a higher --eta (now {c.eta})", 1)
            self.step += 1
            self.records.append({"kind": "update", "step": self.step, **self.recent[-1]})

        evals = [r for r in self.records if r["kind"] == "eval"]
        before, after, greedy = evals[0]["pass1"], evals[-1]["pass1"], evals[-1]["greedy"]
        seconds = round(time.time() - begun, 2)
        self.records.append(dict(kind="result", task=c.task, algo=c.algo, seed=c.seed, params=params, steps=c.steps,
                                 pass1_before=before, pass1_after=after, greedy_after=greedy, seconds=seconds,
                                 sample_tok_s=self.rate("sample"), train_tok_s=self.rate("train"),
                                 peak_mb=peak_mb(self.device)))
        self.write_log(folder)
        print(f"{label(asdict(c))} took {c.task} from {before:.1%} to {after:.1%} pass@1 (greedy {greedy:.1%}) on "
              f"{len(self.exam)} {c.eval_set} puzzles in {c.steps} updates and {seconds:.0f} s, warm start included")
        if c.export:
            export_model(merge_lora(self.model), Path(c.export), c.init_from)
            print(f"wrote the model to {c.export}")
        if stop:
            fail("stopped after the last update; the run is complete", 130)
        return self.records

    def write_log(self, folder):
        write(folder / "log.jsonl", "".join(json.dumps(r) + "\n" for r in self.records))

    def rate(self, phase):
        return round(self.tally[phase + "_tokens"] / (self.tally[phase + "_seconds"] or 1))


def warmup(step):
    return min(1.0, (step + 1) / 30)                     # AdamW's first steps have full size whatever the gradient


@torch.no_grad()
def diagnose(logp_old, logp, real, ended, R, c):
    """How far q asks the policy to move, and the anchor's health: what to look at before believing that TPO learns."""
    q, anchor = tpo_target(logp_old, R, c.eta, c.anchor), (c.anchor * logp_old).softmax(-1)            # (B, K)
    shift = (q - anchor).abs().sum(-1)                                                                 # (B,)
    return dict(reward=R.mean(), kl=torch.xlogy(q, q / anchor.clamp(min=1e-38)).sum(-1).mean(),
                informative=(standardize(R) != 0).any(-1).float().mean(), entropy=-logp.sum() / real.sum(),
                tokens=real.sum(-1).float().mean(), unfinished=1 - ended.float().mean(),
                anchor_max=anchor.amax(-1).mean(), anchor_size=(1 / anchor.square().sum(-1)).mean(),
                anchor_shift=shift.mean(), anchor_dead=(shift < 1e-3).float().mean())


def progress(r, steps, left):
    text = f"{r['step']:5d}/{steps}  pass@1 {r['pass1']:.3f}  greedy {r['greedy']:.3f}  {r['seconds']:4.0f} s"
    if "reward" not in r:
        return text + "  (before the first update)"
    return text + (f", {left:.0f} s left  reward {r['reward']:.3f}  KL(q||p) {r['kl']:.3f}  "
                   f"informative {r['informative']:.2f}  tokens {r['tokens']:.1f}  unfinished {r['unfinished']:.2f}  "
                   f"entropy {r['entropy']:.3f}  "
                   f"anchor max {r['anchor_max']:.2f} size {r['anchor_size']:.1f}  "
                   f"sample {r['sample_tok_s']:,} train {r['train_tok_s']:,} tok/s")


# ----------------------------------------------------------------------------------------------------- files and errors
def fail(message, status=2):
    print(f"llm_rlvr.py: {message}", file=sys.stderr)
    raise SystemExit(status)


def write(path, value):
    """A str, or anything torch.save takes: written beside path, flushed to disk, renamed. Never half a file at path."""
    if RANK:                                                                                 # the first process writes
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")                  # two runs may share a warm start
    try:
        with temporary.open("wb") as f:
            f.write(value.encode()) if isinstance(value, str) else torch.save(value, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                            # torch.save turns a full disk into RuntimeError
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path} ({str(error).splitlines()[0]}); what stood there is intact", 1)


def load(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                               # a truncated file raises one of many types
        fail(f"{path} cannot be read ({type(error).__name__}), it is damaged: delete it and leave out any --resume")


def load_run(c, path):
    """The checkpoint at path if c may continue it."""
    saved = load(path)
    if not isinstance(saved, dict) or saved.keys() != {"config", "device", "step", "seconds", "records", "recent",
                                                       "tally", "rng", "generator", "optimizer", "model"}:
        fail(f"--resume: {path} is no checkpoint of this version of this script")
    for name, value in (asdict(c) | {"device": pick_device(c.device).type}).items():
        was = saved["device"] if name == "device" else saved["config"].get(name)
        if name not in ("resume", "plot", "out", "compile", "export") and was != value:
            fail(f"{flag_name(name)} {value}: --resume needs {was} as in {path}")
    return saved


def peak_mb(device):
    """Largest memory in MB: of the GPU's allocator, else of the process; None where the system does not tell."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        import resource
    except ImportError:                                                                                      # Windows
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def pick_device(name):
    if name in ("auto", "cuda") and RANKS > 1 and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    elif name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    reason = "not a device"
    if name.split(":")[0] in ("cpu", "cuda", "mps"):
        try:
            return torch.zeros(1, device=name).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
    fail(f"--device {name}: {reason}; allowed are auto, cpu, and if present cuda, cuda:N and mps")


def flag_name(name):
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    def error(self, message):                                   # such as: argument --lr: invalid float value: 'fast'
        fail(re.sub(r"argument (\S+): invalid (\w+) value: '(.*)'", r"\1 \3: allowed are \2 values", message))


def parse(argv):
    """Config from defaults, then the task's own defaults, then the flags."""
    pretrained = ", ".join(f"{flag_name(name)} {value}" for name, value in PRETRAINED.items())
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False, epilog=f"With --init-from: {pretrained}")
    for f in fields(Config):
        kind = ({"action": argparse.BooleanOptionalAction} if f.type is bool else
                {"type": f.type, "metavar": f.type.__name__})
        parser.add_argument(flag_name(f.name), default=f.default, help=f"{f.metadata['help']} [{f.default}]", **kind)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        fail(f"{unknown[0]} is not a flag; the flags are {' '.join(flag_name(f.name) for f in fields(Config))}")
    task = find_task(given)
    parser.set_defaults(**PRETRAINED if given.init_from else task.defaults)
    return Config(**vars(parser.parse_args(argv)))


def validate(c):
    """One line and exit status 2 on a value that cannot work."""
    name, known = c.algo.split(":")[0], algorithms(c)
    rules = [("algo", name in known, ", ".join(known)),
             ("eval_set", c.eval_set in ("heldout", "test"), "heldout, test"),
             *((f, getattr(c, f) >= 1, "1 or more") for f in ("steps", "prompts", "candidates", "epochs", "eval_every",
                                                              "eval_puzzles", "max_new_tokens", "layers", "width",
                                                              "heads", "kv_heads", "micro_tokens")),
             ("warm_steps", c.warm_steps == 0 or c.warm_steps > 0 and not c.init_from, "0 or more, with --init-from 0"),
             ("lora_rank", c.lora_rank >= 0, "0 or more"),
             ("prompts", c.prompts % RANKS == 0, f"multiples of the {RANKS} processes"),
             ("seed", 0 <= c.seed < 2**63, "0 to 2^63 - 1"),
             ("anchor", 0 <= c.anchor < math.inf, "finite numbers from 0"),
             ("lr", 0 < c.lr < math.inf, "finite numbers above 0"),
             ("eta", 1e-6 <= c.eta <= 1e6, "numbers from 1e-6 to 1e6")]
    for field_name, fine, allowed in rules:
        if not fine:
            fail(f"{flag_name(field_name)} {getattr(c, field_name)}: allowed are {allowed}")
    if c.candidates < 2 and name not in ("pg", "ppo", "dg", "kondo"):
        fail(f"--candidates {c.candidates}: {name} compares the candidates of one prompt; allowed are 2 or more")
    if c.width % (2 * c.heads) or c.heads % c.kv_heads:
        fail(f"--width {c.width}: allowed are multiples of 2 x --heads {c.heads}, those of --kv-heads {c.kv_heads}")
    pick_device(c.device)


def plan(argv):
    """[(config, folder, folder of the shared warm start)] of the runs that the flags ask for; the folders are made."""
    shared = parse(argv)
    entries, runs = shared.algo.split(","), []
    if len(set(entries)) < len(entries):
        fail(f"--algo {shared.algo}: allowed are lists without repeats")
    if shared.export and len(entries) > 1:
        fail(f"--export {shared.export}: allowed with one algorithm, not with a list")
    if shared.export:
        try:
            import safetensors  # noqa: F401
        except ImportError:
            fail("--export needs safetensors: pip install safetensors")
    shared_flags = "algo", "task", "data", "shots", "init_from", "out", "resume", "device", "compile", "plot"
    own = [f.name for f in fields(Config) if f.name not in shared_flags]
    for entry in entries:
        changes = [change.partition("=") for change in entry.split(":")[1:]]
        for name, _, _ in changes:
            if name.replace("-", "_") not in own:
                fail(f"--algo {entry}: allowed behind a name are FLAG=VALUE, the flags being {', '.join(own)}")
        c = parse([*argv, *(f"{flag_name(name)}={value}" for name, _, value in changes), "--algo", entry])
        validate(c)
        label, task = entry.replace(":", "-"), c.task.replace(":", "-")
        folder = Path(c.out.replace("{task}", task).replace("{algo}", label).replace("{seed}", str(c.seed)))
        warm_folder = folder.parent if "{algo}" in c.out else folder
        if "{algo}" not in c.out and len(entries) > 1:                               # one --out for several: subfolders
            folder = folder / label
        runs.append((c, folder, warm_folder))
    if shared.resume and not any((folder / "checkpoint.pt").exists() for _, folder, _ in runs):
        fail(f"--resume: there is no {runs[0][1] / 'checkpoint.pt'}; leave it out, or name the run's folder with --out")
    for c, folder, _ in runs:
        if len(runs) > 1 and c.resume and (folder / "checkpoint.pt").exists():
            load_run(c, folder / "checkpoint.pt")                              # before hours of other runs, not after
        for name, place in [("--out", folder)] + [("--export", Path(c.export))] * bool(c.export):
            try:
                place.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=place).close()
            except OSError as error:
                fail(f"{name} {place}: cannot be written ({error.strerror}); allowed are folders that can")
    return runs


def label(config):
    """The run's name, with alpha: curves of different anchors are different methods."""
    plain_tpo = config["algo"].split(":")[0] == "tpo" and "anchor" not in config["algo"]
    return config["algo"] + (f" (alpha {config['anchor']:g})" if plain_tpo else "")


def compare(logs):
    """A table of several runs: pass@1 at the end, and where it passed 50% and 90%."""
    print(f"\n{'algorithm':<28}{'before':>8}{'after':>8}{'greedy':>8}{'50% after':>20}{'90% after':>20}")
    for config, *records, r in logs:
        half, most = (next((f"{e['step']} ({e['seconds']:.0f} s)" for e in records
                            if e["kind"] == "eval" and e["pass1"] >= bar), "-") for bar in (0.5, 0.9))
        print(f"{label(config):<28}{r['pass1_before']:>8.3f}{r['pass1_after']:>8.3f}{r['greedy_after']:>8.3f}"
              f"{half:>20}{most:>20}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")        # else sums in MKL depend on addresses and thread timing
    if RANK:
        sys.stdout = open(os.devnull, "w")                                                   # the first process speaks
    if parse(argv).plot:
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            fail("--plot needs matplotlib: pip install matplotlib")
    runs = plan(argv)
    if RANKS > 1:
        distributed.init_process_group("nccl" if pick_device(runs[0][0].device).type == "cuda" else "gloo")
    logs = [Trainer(c).run(folder, warm_folder) for c, folder, warm_folder in runs]
    if len(logs) > 1:
        compare(logs)
    if runs[0][0].plot:
        figure, axis = plt.subplots()
        for records in logs:
            steps, rates = zip(*((e["step"], e["pass1"]) for e in records if e["kind"] == "eval"))
            axis.plot(steps, rates, label=label(records[0]))
        axis.set(xlabel="update", ylabel="pass@1", ylim=(0, 1))
        axis.legend()
        figure.savefig(runs[-1][1] / "pass1.png", dpi=150)
        print(f"wrote {runs[-1][1] / 'pass1.png'}")


if __name__ == "__main__":
    main()
