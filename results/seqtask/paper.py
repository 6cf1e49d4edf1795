"""Results of seqtask.py beside the paper's: python results/seqtask/paper.py LOG.jsonl ...

The episode at which the mean error over seeds is first below 1%, and the final error (Table 3),
ours over the last ten episodes, the paper's of the last one. The paper has 20 seeds or, in Table 2
and the sweep of eta, 10. That episode hangs on the slowest seed; so beside it stand the median of
our seeds' own and how many get there, in the log's points, each a mean of up to 10 episodes.
"""
import json
import math
import sys
from pathlib import Path
from statistics import median

DENSE = {"tpo_token": {2: 58, 4: 74, 8: 103, 16: 102},           # Table 1: algorithm, V, episodes
         "grpo_token": {2: 904, 4: 141, 8: 124, 16: 148},
         "dg": {2: 199, 4: 273, 8: 314, 16: 393},
         "ppo": {2: 872, 4: 181, 8: 191, 16: 259}}
BAG = {"copy": (81, 338, 219, 170), "flip": (56, 104, 201, 146),     # Table 2: target, episodes of
       "reverse_copy": (55, 352, 202, None),                         # DENSE's algorithms
       "reverse_flip": (59, 209, 200, 143)}
SEQUENTIAL = {"copy": (295, None, 439, None), "flip": (321, None, 349, None),
              "reverse_copy": (159, None, 515, None), "reverse_flip": (276, None, 309, None)}
ETA = {0.25: 72, 0.5: 67, 1: 96, 2: 141, 4: 260}                     # tpo_token
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
COMMON = dict(candidates=8, batch=100, lr=1e-3)


def first_below(r):
    """What the paper prints for a dense reward: Table 1, Table 2 and the sweep of eta."""
    plain = (r["target"], r["reward"]) == ("reverse_copy", "bag")
    found = []
    if r["eta"] == 1 and plain:
        found.append(DENSE[r["algo"]].get(r["vocab"]))
    if r["eta"] == 1 and r["vocab"] == 2:
        row = (BAG if r["reward"] == "bag" else SEQUENTIAL)[r["target"]]
        found.append(dict(zip(DENSE, row))[r["algo"]])
    if plain and r["vocab"] == 2 and r["algo"] == "tpo_token":
        found.append(ETA.get(r["eta"]))
    return [str(step) for step in found if step]


def paper(r):
    """What the paper prints at the setting of a result, or a dash."""
    here = lambda **setting: all(r[name] == value for name, value in setting.items())
    if not here(**COMMON, epochs=1 if r["algo"] == "dg" else 4):
        return "-"
    if r["algo"] in DENSE and r["reward"] != "terminal":
        steps = first_below(r) if here(length=10, match="prompts", episodes=1000) else []
        return f"1% at {', '.join(steps)}" if steps else "-"
    # for a group the two matchings are one setting, which the paper ran twice
    matches = [r["match"]] if r["algo"] in ("ppo", "dg") else TERMINAL
    found = [TERMINAL[match][r["algo"]] for match in matches if r["algo"] in TERMINAL[match]]
    if found and here(target="reverse_copy", reward="terminal", vocab=2, episodes=2000, eta=1) and (
            7 <= r["length"] <= 10):
        errors = [errors[r["length"] - 7] for errors in found]
        return ", ".join(f"> {error}%" if error == 95 else f"{error}%" for error in errors)
    return "-"


def passages(curve):
    """The episode at which each seed's first point below 1% begins, inf without one."""
    return [next((i * curve["every"] for i, error in enumerate(errors) if error < 0.01), math.inf)
            for errors in curve["error_per_seed"]]


def main(logs, width=58):
    print(f"{'':13s}{'setting':{width}s}{'seeds':>6}{'1% at':>7}{'median':>8}{'get there':>11}"
          f"{'final error ± s.e.':>20}{'solved':>8}  paper")
    episode = lambda x: "-" if x in (None, math.inf) else f"{x:g}"
    for log in logs:
        for r in map(json.loads, Path(log).read_text(encoding="utf-8").splitlines()):
            if r["kind"] == "curve":
                firsts = passages(r)                            # of the result on the next line
            if r["kind"] != "result":
                continue
            setting = (f"{r['target']} {r['reward']} H {r['length']} V {r['vocab']} "
                       f"E {r['epochs']} eta {r['eta']:g} T {r['episodes']} {r['match']}")
            there = f"{sum(map(math.isfinite, firsts))} of {r['seeds']}"
            se = "" if r["final_error_se"] is None else f" ± {r['final_error_se']:.1%}"
            error = f"{r['final_error']:.1%}{se}"
            print(f"{r['algo']:13s}{setting:{width}s}{r['seeds']:6}{episode(r['steps_to_1pct']):>7}"
                  f"{episode(median(firsts)):>8}{there:>11}{error:>20}{r['solved']:8.0%}  "
                  f"{paper(r)}")


if __name__ == "__main__":
    main(sys.argv[1:])
