"""What becomes of the target when completions are long: the anchor's health, and learning.

    python results/long/long.py spread MODEL GSM8K        5 groups each of gsm8k and rg:chain_sum
    python results/long/long.py learn                     graph coloring, thinking aloud: 30 runs
    python results/long/long.py smol MODEL [METHOD ...]   the real model on rg:gcd, 90 min, 2 cores
    python results/long/long.py table                     the tables of README.md beside this file

MODEL is a folder with SmolLM2-135M-Instruct, GSM8K one with train.jsonl and test.jsonl; needed are
transformers and reasoning-gym. Writes spread.jsonl, a line per group, and tune.jsonl, learn.jsonl
and smol.jsonl, a line per run; what is there is not repeated.
"""
import json
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
import llm_rlvr
import pretrained
from tpo import tpo_target

SPREAD, TUNE = HERE / "spread.jsonl", HERE / "tune.jsonl"
LEARN, SMOL = HERE / "learn.jsonl", HERE / "smol.jsonl"
ALPHAS = 1.0, 0.25, 0.05, 0.0
# a method and its flags
METHODS = ("tpo:anchor=1", "tpo:anchor=0.25", "tpo:anchor=0.05", "tpo:anchor=0",
           "tpo:anchor=1:length_normalize", "grpo")
RATES, TUNING_SEED, SEEDS = (1e-3, 2e-3), 100, (0, 1, 2)
SMOL_METHODS = "tpo:anchor=0", "grpo", "tpo:anchor=1:length_normalize", "tpo:anchor=1"
SMOL_RATES, SMOL_SEEDS = (3e-5, 6e-5), (0, 1)
KEPT = ("step", "seconds", "pass1", "greedy", "reward", "informative", "unfinished", "entropy",
        "anchor_max", "anchor_size", "anchor_shift", "anchor_dead")


class Aloud(llm_rlvr.GraphColor):
    """Graph coloring after 0 to 24 words of thinking aloud, which the reward does not look at.

    Lengths differ within a group and so, by tens of nats, do the log-probs of whole completions,
    as with an LLM.
    """
    defaults = {"max_new_tokens": 34}
    words = "hm well let me see now if this one is there then maybe that or not".split()

    def check(self, key, answer):
        _, found, colors = answer.partition(" so")
        return super().check(key, colors) if found else 0.0

    def guess(self, rng, key):
        often = [1 / (i + 1) for i in range(len(self.words))]                           # Zipf
        aloud = rng.choices(self.words, often, k=rng.randrange(25))
        return "".join(" " + word for word in aloud) + " so" + super().guess(rng, key)


def read(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append(path, record):
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(record) + "\n")


def run(file, script, task, method, lr, seed, flags):
    """The line of file with this setting, after a run of the script if there is none."""
    setting = dict(task=task, algo=method, setting=lr, seed=seed)
    for r in read(file):
        if setting == {k: r[k] for k in setting}:
            return r
    name, *changes = method.split(":")
    changes = " ".join("--" + change.replace("_", "-") for change in changes)
    out = f"out/long/{method.replace(':', '-')}-{lr}-{seed}"
    flags = (f"{flags} --task {task} --algo {name} --lr {lr} --seed {seed} --epochs 1 "
             f"--device cpu --out {out} {changes}")
    script.main(flags.split())
    log = read(Path(out, f"{task.replace(':', '-')}-{name}-{seed}", "log.jsonl"))
    curve = [{k: e[k] for k in KEPT if k in e} for e in log if e["kind"] == "eval"]
    path = Path(script.__file__).relative_to(ROOT)
    record = setting | dict(command=f"python {path} {flags}", curve=curve)
    if file == SMOL:
        updates = [e for e in log if e["kind"] == "update"]
        record |= dict(rewards=[e["reward"] for e in updates],
                       lengths=[e["tokens"] for e in updates],
                       shifts=[e["anchor_shift"] for e in updates])
    append(file, record)
    return record


def learn():
    """Each method at the better of two learning rates on a tuning seed, then three fresh seeds on
    the test puzzles."""
    llm_rlvr.TASKS["aloud"] = Aloud()
    flags = "--steps 200 --prompts 8 --eval-every 25 --eval-puzzles 128 --eval-set "
    for method in METHODS:
        value = {}
        for lr in RATES:
            tuning = run(TUNE, llm_rlvr, "aloud", method, lr, TUNING_SEED, flags + "heldout")
            pass1 = [e["pass1"] for e in tuning["curve"]]
            value[lr] = pass1[-1] + mean(pass1)
        for seed in SEEDS:
            best = max(value, key=value.get)
            run(LEARN, llm_rlvr, "aloud", method, best, seed, flags + "test")


def smol(model, *methods):
    """Each method at two learning rates with the first seed, then at the better one, by all
    rewards, with the other seeds."""
    flags = (f"{model} --steps 40 --prompts 2 --max-new-tokens 64 --eval-every 20 "
             "--eval-puzzles 32")
    for method in methods or SMOL_METHODS:
        value = {}
        for lr in SMOL_RATES:
            first = run(SMOL, pretrained, "rg:gcd", method, lr, SMOL_SEEDS[0], flags)
            value[lr] = mean(first["rewards"])
        for seed in SMOL_SEEDS[1:]:
            run(SMOL, pretrained, "rg:gcd", method, max(value, key=value.get), seed, flags)


def spread(model, data, groups=5):
    """A line per group: the log-probs l (16,) of its completions, their lengths and scores."""
    for task, folder in (("gsm8k", data), ("rg:chain_sum", "")):
        t = pretrained.Pretrained(pretrained.Config(init_from=model, task=task, data=folder))
        for i in range(sum(r["task"] == task for r in read(SPREAD)), groups):
            t.generator.manual_seed(i)
            items = t.eval_items[i:i + 1]
            y, logp = llm_rlvr.sample(t.model, t.encode_prompts(items), 16, 200, t.ends,
                                      t.generator)                                # (1, 16, 200)
            tokens, scores = (y >= 0).sum(-1), t.score(items, y)                        # (1, 16)
            append(SPREAD, dict(task=task, group=i, logp=logp.sum(-1)[0].tolist(),
                                tokens=tokens[0].tolist(), score=scores[0].tolist()))
            print(task, i, tokens[0].tolist(), f"reward {scores.mean():.2f}", flush=True)


def health(groups, alpha, per_token):
    """Means over groups of max_i and effective size of the anchor, and the share of dead targets
    if one of 16 is right.

    The right one is each candidate in turn: the model's own successes are too few for a share.
    """
    l = torch.tensor([r["logp"] for r in groups])                                 # (groups, 16)
    if per_token:
        l = l / torch.tensor([r["tokens"] for r in groups])
    anchor = (alpha * l).softmax(-1)
    scores = torch.eye(16)[:, None].expand(16, len(groups), 16)
    q = tpo_target(l.expand(16, -1, -1), scores, anchor=alpha)
    shift = (q - anchor).abs().sum(-1)                                            # (16, groups)
    size = 1 / anchor.square().sum(-1)
    return [x.item() for x in (anchor.amax(-1).mean(), size.mean(), shift.mean(),
                               (shift < 1e-3).float().mean())]


def header(*columns):
    print("\n|", " | ".join(columns), "|\n|" + "---|" * len(columns))


def row(*cells):
    print("|", " | ".join(map(str, cells)), "|")


def spread_table():
    tasks = {}
    for r in read(SPREAD):
        tasks.setdefault(r["task"], []).append(r)
    header("task", "anchor", "max", "effective size of 16", "mean sum abs(q - anchor)",
           "dead targets")
    for task, groups in tasks.items():
        for alpha in ALPHAS:
            row(task, f"alpha {alpha:g}", *(f"{x:.3f}" for x in health(groups, alpha, False)))
        row(task, "per-token means", *(f"{x:.3f}" for x in health(groups, 1.0, True)))
    header("task", "groups", "tokens", "sd of l within a group", "reward")
    for task, groups in tasks.items():
        row(task, len(groups), f"{mean(mean(r['tokens']) for r in groups):.0f}",
            f"{mean(stdev(r['logp']) for r in groups):.1f} nats",
            f"{mean(mean(r['score']) for r in groups):.3f}")


def percent(values):
    return f"{100 * mean(values):.1f} ± {100 * stdev(values) / len(values)**0.5:.1f}"


def learn_table():
    header("method", "lr", "before", "after 100", "after 200", "greedy", "effective size",
           "dead targets", "seconds")
    methods = {}
    for r in read(LEARN):
        methods.setdefault((r["algo"], r["setting"]), []).append(r["curve"])
    for (method, lr), curves in methods.items():
        at = [{e["step"]: e for e in curve} for curve in curves]
        size, dead = ([mean(e[key] for e in curve[1:]) for curve in curves]
                      for key in ("anchor_size", "anchor_dead"))
        row(method, lr, *(percent([e[step]["pass1"] for e in at]) for step in (0, 100, 200)),
            percent([e[200]["greedy"] for e in at]), f"{mean(size):.2f}", f"{mean(dead):.2f}",
            f"{mean(curve[-1]['seconds'] for curve in curves):.0f}")


def smol_table():
    header("method", "lr", "seeds", "reward of updates 1 to 5", "16 to 20", "36 to 40",
           "tokens, 1 to 5", "36 to 40", "pass@1 after", "sum abs(q - a), 1 to 5", "minutes")
    methods = {}
    for r in read(SMOL):
        methods.setdefault((r["algo"], r["setting"]), []).append(r)
    for (method, lr), runs in methods.items():
        def five(key, start):
            return f"{mean(mean(r[key][start:start + 5]) for r in runs):.3g}"

        last = [r["curve"][-1] for r in runs]
        row(method, lr, ", ".join(str(r["seed"]) for r in runs),
            *(five("rewards", start) for start in (0, 15, 35)),
            *(five("lengths", start) for start in (0, 35)),
            ", ".join(f"{100 * e['pass1']:.0f} %" for e in last), five("shifts", 0),
            f"{mean(e['seconds'] for e in last) / 60:.0f}")


def table():
    spread_table()
    learn_table()
    smol_table()


if __name__ == "__main__":
    commands = {"spread": spread, "learn": learn, "smol": smol, "table": table}
    commands[sys.argv[1]](*sys.argv[2:])
