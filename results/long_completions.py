"""What becomes of the target when completions are long: the anchor's health on a real language model, learning on a small one.

    python results/long_completions.py spread MODEL GSM8K       5 groups of 16 completions each of gsm8k and rg:chain_sum
    python results/long_completions.py learn                    learning curves on graph coloring with thinking aloud, 30 runs
    python results/long_completions.py smol MODEL [METHOD ...]  learning curves of the real model on rg:gcd, an hour and a half on two cores
    python results/long_completions.py table                    the tables of long_completions.md

MODEL is a folder with SmolLM2-135M-Instruct, GSM8K one with train.jsonl and test.jsonl; reasoning-gym and safetensors are needed.
Writes long_spread.jsonl, a line per group, and long_tune.jsonl, long_learn.jsonl and long_smol.jsonl, a line per run; what is there is not
repeated.
"""
import json
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import llm_rlvr
from tpo import tpo_target

SPREAD = HERE / "long_spread.jsonl"
ALPHAS = 1.0, 0.25, 0.05, 0.0


TUNE, LEARN, SMOL = HERE / "long_tune.jsonl", HERE / "long_learn.jsonl", HERE / "long_smol.jsonl"
METHODS = ("tpo:anchor=1", "tpo:anchor=0.25", "tpo:anchor=0.05", "tpo:anchor=0", "tpo:anchor=1:length_normalize", "grpo")
RATES, TUNING, SEEDS = (1e-3, 2e-3), 100, (0, 1, 2)
SMOL_METHODS, SMOL_RATES, SMOL_SEEDS = ("tpo:anchor=0", "grpo", "tpo:anchor=1:length_normalize", "tpo:anchor=1"), (3e-5, 6e-5), (0, 1)


class Aloud(llm_rlvr.GraphColor):
    """Graph coloring after 0 to 24 words of thinking aloud, which the reward does not look at.

    Lengths differ within a group and so, by tens of nats, do the log-probs of whole completions, as with an LLM.
    """
    defaults = {"max_new_tokens": 34}
    words = "hm well let me see now if this one is there then maybe that or not".split()

    def check(self, key, answer):
        _, found, colors = answer.partition(" so")
        return super().check(key, colors) if found else 0.0

    def guess(self, rng, key):
        often = [1 / (i + 1) for i in range(len(self.words))]                                               # Zipf
        aloud = rng.choices(self.words, often, k=rng.randrange(25))
        return "".join(" " + word for word in aloud) + " so" + super().guess(rng, key)


def lines(path=SPREAD):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(file, task, method, lr, seed, flags):
    """The line of file with this setting, after running llm_rlvr.py if there is none."""
    setting = dict(task=task, algo=method, setting=lr, seed=seed)
    for r in lines(file):
        if setting == {k: r[k] for k in setting}:
            return r
    name, *changes = method.split(":")
    flags = (f"--task {task} --algo {name} --lr {lr} --seed {seed} {flags} --epochs 1 --device cpu "
             f"--out out/long/{method.replace(':', '-')}-{lr}-{seed} " + " ".join("--" + c.replace("_", "-") for c in changes)).split()
    llm_rlvr.main(flags)
    log = lines(Path(flags[flags.index("--out") + 1]) / "log.jsonl")
    keep = ("step", "seconds", "pass1", "greedy", "reward", "informative", "unfinished", "entropy", "anchor_max", "anchor_size",
            "anchor_shift", "anchor_dead")
    r = setting | {"command": "python llm_rlvr.py " + " ".join(flags),
                   "curve": [{k: e[k] for k in keep if k in e} for e in log if e["kind"] == "eval"],
                   **{name: [e[key] for e in log if e["kind"] == "update"] for name, key in
                      (("rewards", "reward"), ("lengths", "tokens"), ("shifts", "anchor_shift"))}}
    with file.open("a") as f:
        f.write(json.dumps(r) + "\n")
    return r


def learn():
    """Each method at the better of two learning rates on a tuning seed, then three fresh seeds on the test puzzles."""
    llm_rlvr.TASKS["aloud"] = Aloud()
    flags = "--steps 200 --prompts 8 --eval-every 25 --eval-puzzles 128 --eval-set "
    for method in METHODS:
        tried = {lr: run(TUNE, "aloud", method, lr, TUNING, flags + "heldout")["curve"] for lr in RATES}
        best = max(RATES, key=lambda lr: tried[lr][-1]["pass1"] + mean(e["pass1"] for e in tried[lr]))
        for seed in SEEDS:
            run(LEARN, "aloud", method, best, seed, flags + "test")


def smol(model, *methods):
    """Each method at two learning rates with the first seed, then at the better one, by all rewards, with the other seeds."""
    flags = f"--init-from {model} --steps 40 --prompts 2 --max-new-tokens 64 --eval-every 20 --eval-puzzles 32"
    for method in methods or SMOL_METHODS:
        tried = {lr: mean(run(SMOL, "rg:gcd", method, lr, SMOL_SEEDS[0], flags)["rewards"]) for lr in SMOL_RATES}
        for seed in SMOL_SEEDS[1:]:
            run(SMOL, "rg:gcd", method, max(tried, key=tried.get), seed, flags)


def spread(model, data, groups=5):
    """A line per group: the log-probs l (16,) of its completions, their lengths and scores."""
    for task in ("gsm8k", "rg:chain_sum"):
        flags = ["--init-from", model, "--task", task, "--max-new-tokens", "200", "--prompts", "1"]
        t = llm_rlvr.Trainer(llm_rlvr.parse(flags + (["--data", data] if task == "gsm8k" else [])))
        for i in range(sum(r["task"] == task for r in lines()), groups):
            t.generator.manual_seed(i)
            prompt = llm_rlvr.encode_prompts(t.encode, t.exam[i:i + 1], t.device)
            y, real, logp = llm_rlvr.sample(t.model, *prompt, 16, 200, t.end, t.generator)
            R = llm_rlvr.score(t.task, t.enc, t.end, t.exam[i:i + 1], y)
            record = dict(task=task, group=i, logp=logp.sum(-1)[0].tolist(), tokens=real.sum(-1)[0].tolist(), score=R[0].tolist())
            with SPREAD.open("a") as f:
                f.write(json.dumps(record) + "\n")
            print(task, i, record["tokens"], f"reward {R.mean():.2f}", flush=True)


def health(rows, alpha, per_token):
    """Means over groups of max_i and effective size of the anchor, and the share of dead targets if one of 16 is right.

    The right one is each candidate in turn: the model's own successes are too few for a share.
    """
    l = torch.tensor([r["logp"] for r in rows])                                                     # (groups, 16)
    l = l / torch.tensor([r["tokens"] for r in rows]) if per_token else l
    anchor = (alpha * l).softmax(-1)
    q = tpo_target(l.expand(16, -1, -1), torch.eye(16)[:, None].expand(16, len(rows), 16), anchor=alpha)
    shift = (q - anchor).abs().sum(-1)                                                              # (16, groups)
    return anchor.amax(-1).mean(), (1 / anchor.square().sum(-1)).mean(), shift.mean(), (shift < 1e-3).float().mean()


def table():
    rows = lines()
    print("| task | anchor | max | effective size of 16 | mean sum abs(q - anchor) | dead targets |\n|" + "---|" * 6)
    for task in dict.fromkeys(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == task]
        for alpha, per_token in [(a, False) for a in ALPHAS] + [(1.0, True)]:
            values = " | ".join(f"{float(x):.3f}" for x in health(mine, alpha, per_token))
            print(f"| {task} | {'per-token means' if per_token else f'alpha {alpha:g}'} | {values} |")
        print(f"\n{task}: tokens {mean(mean(r['tokens']) for r in mine):.0f}, sd of l within a group "
              f"{mean(stdev(r['logp']) for r in mine):.1f} nats, reward {mean(mean(r['score']) for r in mine):.3f}, {len(mine)} groups\n")

    print("| method | lr | before | after 100 | after 200 | greedy | effective size | dead targets | seconds |\n|" + "---|" * 9)
    share = lambda v: f"{100 * mean(v):.1f} ± {100 * stdev(v) / len(v)**0.5:.1f}"
    for method in METHODS:
        curves = [r["curve"] for r in lines(LEARN) if r["algo"] == method]
        lr = next(r["setting"] for r in lines(LEARN) if r["algo"] == method)
        at = lambda step, key: share([next(e[key] for e in curve if e["step"] == step) for curve in curves])
        anchors = [f"{mean(mean(e[k] for e in c[1:]) for c in curves):.2f}" for k in ("anchor_size", "anchor_dead")]
        print(f"| {method} | {lr} | {at(0, 'pass1')} | {at(100, 'pass1')} | {at(200, 'pass1')} | {at(200, 'greedy')} | "
              f"{' | '.join(anchors)} | {mean(c[-1]['seconds'] for c in curves):.0f} |")

    print("\n| method | lr | seeds | reward of updates 1 to 5 | 16 to 20 | 36 to 40 | tokens, 1 to 5 | 36 to 40 | pass@1 after | sum abs(q - a), 1 to 5 | "
          "minutes |\n|" + "---|" * 11)
    runs = lines(SMOL)
    for method, lr in dict.fromkeys((r["algo"], r["setting"]) for r in runs):
        same = [r for r in runs if (r["algo"], r["setting"]) == (method, lr)]
        part = lambda key, i: f"{mean(mean(r[key][i:i + 5]) for r in same):.3g}"
        print("", method, lr, ", ".join(str(r["seed"]) for r in same), *(part("rewards", i) for i in (0, 15, 35)),
              *(part("lengths", i) for i in (0, 35)), ", ".join(f"{100 * r['curve'][-1]['pass1']:.0f} %" for r in same), part("shifts", 0),
              f"{mean(r['curve'][-1]['seconds'] for r in same) / 60:.0f}", "", sep=" | ")


if __name__ == "__main__":
    {"spread": spread, "learn": learn, "smol": smol, "table": table}[sys.argv[1]](*sys.argv[2:])
