"""What becomes of the target when completions are long: the anchor's health for several alpha on a real language model.

    python results/long_completions.py spread MODEL GSM8K       5 groups of 16 completions each of gsm8k and rg:chain_sum
    python results/long_completions.py learn MODEL              learning curves on rg:chain_sum, one run after another
    python results/long_completions.py table                    the tables of long_completions.md

MODEL is a folder with SmolLM2-135M-Instruct, GSM8K one with train.jsonl and test.jsonl; reasoning-gym and safetensors are needed.
Writes long_spread.jsonl (a line per group) and long_learn.jsonl (a line per run). What is already in a file is not repeated.
"""
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import llm_rlvr
from tpo import tpo_target

SPREAD, LEARN = HERE / "long_spread.jsonl", HERE / "long_learn.jsonl"
ALPHAS = 1.0, 0.25, 0.05, 0.0
RUNS = [f"tpo:anchor={a:g}" for a in ALPHAS] + ["tpo:anchor=1:length-normalize=1", "grpo"]
FLAGS = "--task rg:chain_sum --steps 12 --prompts 4 --candidates 16 --max-new-tokens 64 --lr 2e-5 --eval-every 4 --eval-puzzles 16"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path, record):
    with path.open("a") as f:
        f.write(json.dumps(record) + "\n")


def spread(model, data, groups=5):
    """A line per group: the log-probs l (16,) of its completions, their lengths and scores."""
    for task in ("gsm8k", "rg:chain_sum"):
        flags = ["--init-from", model, "--task", task, "--max-new-tokens", "200", "--prompts", "1"]
        t = llm_rlvr.Trainer(llm_rlvr.parse(flags + (["--data", data] if task == "gsm8k" else [])))
        for i in range(sum(r["task"] == task for r in lines(SPREAD)), groups):
            t.generator.manual_seed(i)
            prompt = llm_rlvr.encode_prompts(t.encode, t.exam[i:i + 1], t.device)
            y, real, logp = llm_rlvr.sample(t.model, *prompt, 16, 200, t.end, t.generator, share=1)
            R = llm_rlvr.score(t.task, t.enc, t.end, t.exam[i:i + 1], y)
            append(SPREAD, dict(task=task, group=i, logp=logp.sum(-1)[0].tolist(), tokens=real.sum(-1)[0].tolist(), score=R[0].tolist()))
            print(task, i, lines(SPREAD)[-1]["tokens"], f"reward {R.mean():.2f}", flush=True)


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


def learn(model):
    done = {(r["algo"], r["seed"]) for r in lines(LEARN)}
    for seed in (0, 1, 2):
        for algo in RUNS:
            if (algo, seed) in done:
                continue
            words = f"llm_rlvr.py --algo {algo} --seed {seed} {FLAGS}".replace(":length-normalize=1", "").split()
            words += ["--length-normalize"] if "length" in algo else []
            out = f"out/long/{algo.replace(':', '-')}-{seed}"
            subprocess.run([sys.executable, *words, "--init-from", model, "--out", out], cwd=HERE.parent, check=True)
            records = lines(HERE.parent / out / "log.jsonl")
            append(LEARN, dict(records[-1], algo=algo, seed=seed, command=" ".join(["python", *words]), records=records[1:-1]))


def table():
    rows = lines(SPREAD)
    print("| task | anchor | max | effective size of 16 | mean sum abs(q - anchor) | dead targets |\n|" + "---|" * 6)
    for task in dict.fromkeys(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == task]
        for alpha, per_token in [(a, False) for a in ALPHAS] + [(1.0, True)]:
            values = " | ".join(f"{float(x):.3f}" for x in health(mine, alpha, per_token))
            print(f"| {task} | {'per-token means' if per_token else f'alpha {alpha:g}'} | {values} |")
        print(f"\n{task}: tokens {mean(mean(r['tokens']) for r in mine):.0f}, sd of l within a group "
              f"{mean(stdev(r['logp']) for r in mine):.1f} nats, reward {mean(mean(r['score']) for r in mine):.3f}, {len(mine)} groups\n")
    print("| algorithm | seed | reward, first 4 updates | last 4 updates | greedy before | after |\n|" + "---|" * 6)
    for r in lines(LEARN):
        rewards = [u["reward"] for u in r["records"] if u["kind"] == "update"]
        greedy = [e["greedy"] for e in r["records"] if e["kind"] == "eval"]
        print(f"| {r['algo']} | {r['seed']} | {mean(rewards[:4]):.3f} | {mean(rewards[-4:]):.3f} | {greedy[0]:.3f} | {greedy[-1]:.3f} |")


if __name__ == "__main__":
    {"spread": spread, "learn": learn, "table": table}[sys.argv[1]](*sys.argv[2:])
