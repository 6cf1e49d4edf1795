"""What becomes of the target when completions are long: the anchor's health for several alpha on a real language model.

    python results/long_completions.py spread MODEL GSM8K       5 groups of 16 completions each of gsm8k and rg:chain_sum
    python results/long_completions.py table                    the table of long_completions.md

MODEL is a folder with SmolLM2-135M-Instruct, GSM8K one with train.jsonl and test.jsonl; reasoning-gym and safetensors are needed.
Writes long_spread.jsonl, a line per group; what is already in it is not repeated.
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


def lines():
    return [json.loads(line) for line in SPREAD.read_text().splitlines()] if SPREAD.exists() else []


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


if __name__ == "__main__":
    {"spread": spread, "table": table}[sys.argv[1]](*sys.argv[2:])
