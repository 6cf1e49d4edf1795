"""Results of seqtask.py beside the paper's: python results/seqtask/paper.py LOG.jsonl ...

Both are means over seeds, ours over the number shown, the paper's over 20: the episode at which the
mean error is first below 1% (Table 1), and the final error (Table 3), ours over the last ten
episodes, the paper's of the last one.
"""
import json
import sys
from pathlib import Path

DENSE = {"tpo_token": {2: 58, 4: 74, 8: 103, 16: 102},           # Table 1: algorithm, V, episodes
         "grpo_token": {2: 904, 4: 141, 8: 124, 16: 148},
         "dg": {2: 199, 4: 273, 8: 314, 16: 393},
         "ppo": {2: 872, 4: 181, 8: 191, 16: 259}}
TERMINAL = {"prompts": {"tpo": (6.9, 8.6, 6.1, 7.4),             # Table 3: matching, algorithm,
                        "grpo": (14.5, 27.6, 30.0, 50.4),        # error in % at H = 7, 8, 9, 10;
                        "grpo_no_kl": (66.6, 92.5, 95, 95),      # 95 stands for "above 95"
                        "ppo": (12.0, 26.3, 90.6, 95),
                        "dg": (33.8, 58.8, 95, 95)},
            "interactions": {"tpo": (1.8, 2.8, 5.3, 19.0),
                             "grpo": (9.6, 23.2, 36.2, 48.7),
                             "grpo_no_kl": (78.1, 83.8, 95, 95),
                             "ppo": (38.6, 62.1, 66.2, 95),
                             "dg": (47.7, 69.4, 95, 95)}}
COMMON = dict(target="reverse_copy", candidates=8, batch=100, eta=1, lr=1e-3)


def paper(r):
    """What the paper prints at the setting of a result, or a dash."""
    here = lambda **setting: all(r[name] == value for name, value in setting.items())
    if not here(**COMMON, epochs=1 if r["algo"] == "dg" else 4):
        return "-"
    if here(reward="bag", length=10, match="prompts", episodes=1000):
        step = DENSE.get(r["algo"], {}).get(r["vocab"])
        return f"1% at {step}" if step else "-"
    errors = TERMINAL[r["match"]].get(r["algo"])
    if errors and here(reward="terminal", vocab=2, episodes=2000) and 7 <= r["length"] <= 10:
        error = errors[r["length"] - 7]
        return f"> {error}%" if error == 95 else f"{error}%"
    return "-"


def main(logs):
    print(f"{'':13s}{'setting':40s}{'seeds':>6}{'1% at':>7}{'final error ± s.e.':>20}"
          f"{'solved':>8}{'paper':>12}")
    for log in logs:
        lines = Path(log).read_text(encoding="utf-8").splitlines()
        for r in filter(lambda r: r["kind"] == "result", map(json.loads, lines)):
            setting = (f"{r['target']} {r['reward']} H {r['length']} V {r['vocab']} "
                       f"E {r['epochs']} {r['match']}")
            step = "-" if r["steps_to_1pct"] is None else r["steps_to_1pct"]
            se = "" if r["final_error_se"] is None else f" ± {r['final_error_se']:.1%}"
            error = f"{r['final_error']:.1%}{se}"
            print(f"{r['algo']:13s}{setting:40s}{r['seeds']:6}{step:>7}{error:>20}"
                  f"{r['solved']:8.0%}{paper(r):>12}")


if __name__ == "__main__":
    main(sys.argv[1:])
