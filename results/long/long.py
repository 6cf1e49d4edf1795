"""What becomes of the target when completions are long: the anchor's health, and learning.

    python results/long/long.py spread MODEL GSM8K        5 groups each of gsm8k and rg:chain_sum
    python results/long/long.py smol MODEL                the real model on rg:gcd: 25 runs
    python results/long/long.py run MODEL --token-mean    then any flag of recipes/pretrained.py
    python results/long/long.py table                     most of README.md's tables, without s.e.

MODEL is a folder with SmolLM2-135M-Instruct, as seen from the repository's root, GSM8K one with
train.jsonl and test.jsonl; needed are transformers and reasoning-gym. Writes spread.jsonl, a line
per group, and smollm2_tune.jsonl and smollm2.jsonl, a line per run; what is there is not repeated.
Learning on a task of our own is a study of ../llm/compare.py: aloud.
"""
import json
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes"), str(ROOT / "results" / "llm")]
import llm_rlvr
import pretrained
from compare import Study, chosen, name, read, record, tune, variant
from tpo import tpo_target

SPREAD, ALPHAS = HERE / "spread.jsonl", (1.0, 0.25, 0.05, 0.0)
ENTRIES = [{"algo": "tpo", "anchor": 0}, {"algo": "tpo", "anchor": 1},
           {"algo": "tpo", "anchor": 1, "token-mean": True}, {"algo": "grpo"},
           {"algo": "grpo_token_ratio"}]


def study(model):
    """Small updates of a real model: 40 of 2 prompts x 16 completions of at most 64 tokens."""
    return Study("../long/smollm2_tune.jsonl", "../long/smollm2.jsonl",
                 {"task": "rg:gcd", "steps": 40, "prompts": 2, "epochs": 1,
                  "max-new-tokens": 64, "eval-every": 40, "eval-puzzles": 16, "device": "cpu"},
                 ENTRIES, lambda entry: [{"lr": lr} for lr in (3e-5, 6e-5)], tuning=(0,),
                 seeds=(50, 51, 52), script=f"results/long/long.py run {model}",
                 series=("reward", "tokens", "drift"),
                 value=lambda r: mean(r["reward"]))     # pass@1 hangs on the form of an answer


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
            group = dict(task=task, group=i, logp=logp.sum(-1)[0].tolist(),
                         tokens=tokens[0].tolist(), score=scores[0].tolist())
            with SPREAD.open("a", encoding="utf-8") as f:
                f.write(json.dumps(group) + "\n")
            print(task, i, tokens[0].tolist(), f"reward {scores.mean():.2f}", flush=True)


def health(groups, alpha, per_token):
    """Means over groups of max_i and effective size of the anchor and of sum_i |q_i - a_i|, and the
    share of dead targets, if one of 16 is right.

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


def smol_table():
    header("method", "lr", "seeds", "reward of updates 1 to 5", "16 to 20", "36 to 40",
           "tokens, 1 to 5", "36 to 40", "drift, all", "pass@1 after", "greedy", "minutes")
    for entry in ENTRIES:
        runs = chosen(entry, study(""))
        if runs:
            five = {(key, start): f"{mean(mean(r[key][start:start + 5]) for r in runs):.3g}"
                    for key in ("reward", "tokens") for start in (0, 15, 35)}
            ends = [r["curve"][-1] for r in runs]
            row(name(entry), runs[0]["flags"]["lr"], len(runs),
                *(five["reward", start] for start in (0, 15, 35)),
                *(five["tokens", start] for start in (0, 35)),
                f"{mean(mean(r['drift']) for r in runs):.3g}" if entry["algo"] == "tpo" else "-",
                *(", ".join(f"{100 * e[key]:.0f} %" for e in ends) for key in ("pass1", "greedy")),
                f"{mean(e['seconds'] for e in ends) / 60:.0f}")


def smol(model):
    tune(study(model))
    record(study(model))


def run(*argv):
    torch.set_float32_matmul_precision("medium")    # products in bf16 where a CPU has them, as AMX
    pretrained.main(list(argv), variant(pretrained.Pretrained))


def table():
    spread_table()
    smol_table()


if __name__ == "__main__":
    commands = {"spread": spread, "smol": smol, "run": run, "table": table}
    name, *arguments = sys.argv[1:] or [""]
    fitting = {"spread": [2], "smol": [1], "run": range(1, 99), "table": [0]}
    if len(arguments) not in fitting.get(name, ()):
        raise SystemExit(f"long.py {' '.join(sys.argv[1:])}: allowed are spread MODEL GSM8K, "
                         "smol MODEL, run MODEL FLAGS, table")
    commands[name](*arguments)
