"""Draw the recorded runs as PNGs beside them: python results/plot.py [FILE.jsonl ...]"""
import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    raise SystemExit("plots need matplotlib: pip install matplotlib")

HERE = Path(__file__).parent
STUDIES = "llm/compare", "llm/knights_knaves", "llm/aloud"              # of llm/compare.py
LOGS = "bandit/*", "seqtask/*", "llm/tpo", *STUDIES, "llm/lag", "long/smollm2"
LOOKS = {                                                               # name and color of a curve
    "tpo": ("TPO", "#d62728"), "tpo_token": ("TPO", "#d62728"),
    "tpo anchor 0": ("TPO α=0", "#17becf"), "tpo anchor 0.1": ("TPO α=.1", "#9467bd"),
    "tpo anchor 0.25": ("TPO α=.25", "#d62728"),
    "tpo anchor 0.5": ("TPO α=.5", "#d62728"), "tpo anchor 1": ("TPO α=1", "#d62728"),
    "tpo scale 1": ("TPO, scale-free α", "#d62728"),
    "tpo anchor 1 token-mean 1": ("TPO α=1, token means", "#7f7f7f"),
    "tpo_no_anchor": ("TPO, no anchor", "#e377c2"),
    "grpo": ("GRPO", "#ff7f0e"), "grpo_token": ("GRPO", "#ff7f0e"),
    "grpo_no_kl": ("GRPO, no KL", "#bcbd22"), "grpo_masked": ("GRPO, masked", "#17becf"),
    "dg": ("DG", "#2ca02c"),
    "pg": ("PG", "#1f77b4"), "group_pg": ("Group PG", "#9467bd"),
    "ce": ("CE", "#7f7f7f"), "ppo": ("PPO", "#8c564b"),
    "rloo": ("RLOO", "#1f77b4"), "maxrl": ("MaxRL", "#111111"), "rebel": ("REBEL", "#2ca02c"),
    "grpo_token_ratio": ("GRPO per token", "#1f77b4"), "lpo_rev": ("LPO, reverse KL", "#e377c2"),
    "lpo": ("LPO", "#e377c2"), "vcpo": ("VCPO", "#1f77b4"), "ddpg": ("DDPG", "#2ca02c"),
    "oapl": ("OAPL", "#9467bd"), "dr_grpo": ("Dr. GRPO", "#ff7f0e"), "dapo": ("DAPO", "#8c564b"),
    "gspo": ("GSPO", "#e377c2"), "cispo": ("CISPO", "#bcbd22"), "kondo": ("Kondo", "#17becf")}
TITLES = {"single": "1 context, 100 arms", "multi": "100 contexts, 10 arms", "mnist": "MNIST",
          "graph_color": "graph coloring", "knights_knaves": "knights and knaves",
          "aloud": "graph coloring, thinking aloud",
          "heldout": "held-out"}


def bandit(records, path):
    """Error and misalignment of the bandit tasks in the records, a row per task."""
    evals = [r for r in records if r["kind"] == "eval"]
    seeds = {r["task"]: r["seeds"] for r in records if r["kind"] == "result"}
    figure, rows = panels(len(seeds), 2, (10, 3.6 * len(seeds)))
    for task, row in zip(seeds, rows):
        for axis, key in zip(row, ("error", "misalignment")):
            # single's misalignment hangs on rare samples at the end
            n = 10 if (task, key) == ("single", "misalignment") else 1
            curves = {}
            for r in evals:
                # ce's misalignment is 0 by definition
                if r["task"] == task and (r["algo"], key) != ("ce", "misalignment"):
                    point = r["step"], r[key], r[key + "_se"] or 0
                    curves.setdefault(r["algo"], []).append(point)
            for algo, points in curves.items():
                blocks = [points[i:i + n] for i in range(0, len(points), n)]
                curves[algo] = [tuple(map(mean, zip(*block))) for block in blocks]
            draw(axis, curves, floor=1e-8)
            axis.set_xlabel("step")
            note = f", mean of {n} steps" if n > 1 else ""
            axis.set_title(f"{TITLES[task]}, {seeds[task]} seeds: {key}{note}", fontsize=10)
    save(figure, path)


def llm(records, path):
    """pass@1 of llm_rlvr.py's runs, one log after the other, against updates and seconds."""
    runs = {}
    for r in records:
        if r["kind"] == "config":
            log = []
            runs.setdefault(r["algo"], []).append(log)
        elif r["kind"] == "eval":
            log.append(r)
    seeds, c = len(next(iter(runs.values()))), records[0]
    task, split = (TITLES.get(name, name) for name in (c["task"], c["eval_set"]))
    title = f"{task}: pass@1 on {c['eval_puzzles']} {split} puzzles, {seeds} seeds"
    labels = {"step": "update", "seconds": "seconds, warm start included"}
    figure, [axes] = panels(1, 2, (11, 3.6))
    for axis, (across, label) in zip(axes, labels.items()):
        axis.set(xlabel=label, ylim=(0, 1))             # first: labels go to the ends of curves
        draw(axis, {algo: over_seeds(logs, across, "pass1") for algo, logs in runs.items()})
        axis.set_title(title, fontsize=10)
    save(figure, path)


def scoreboard(runs, path):
    """The runs of llm/compare.py: all losses' ends, curves of some, pass@1 against alpha."""
    found = by_name(runs)
    shown = ["tpo anchor 0.25", "lpo", "maxrl", "rloo", "ppo", "grpo", "dg"]
    ends = {name: mean_and_se([100 * c[-1]["pass1"] for c in curves])
            for name, curves in found.items()}
    best = sorted(ends, key=ends.get)
    figure, [[axis, curves, alphas]] = panels(1, 3, (15, 5.5))
    labels = [LOOKS.get(name, (name,))[0] for name in best]
    colors = ["#d62728" if name.startswith("tpo ") or name == "lpo" else "#7f7f7f" for name in best]
    axis.barh(labels, [ends[name][0] for name in best], xerr=[ends[name][1] for name in best],
              color=colors)
    axis.tick_params(axis="y", labelsize=8)
    title = f"{TITLES[runs[0]['task']]}: pass@1 in % after {runs[0]['steps']} updates"
    axis.set_title(f"{title}, {len(found['lpo'])} seeds", fontsize=9)
    curves.set(xlabel="update", ylim=(0, 1))
    draw(curves, {name: over_seeds(found[name], "step", "pass1")
                  for name in shown if name in found})
    curves.set_title("pass@1 by update", fontsize=10)
    draw_alphas(alphas, found)
    alphas.set_title("TPO by alpha (0: LPO)", fontsize=10)
    save(figure, path)


def by_name(runs, key="curve"):
    """This of llm/compare.py's runs by the entry's name there."""
    found = {}
    for r in runs:
        f = r["flags"]
        name = " ".join([r["algo"], *(f"{flag} {f[flag]:g}" for flag in
                                      ("anchor", "scale", "token-mean") if flag in f)])
        found.setdefault(name, []).append(r[key])
    return found


def draw_alphas(axis, found):
    names = {0: "lpo"} | {alpha: f"tpo anchor {alpha:g}" for alpha in (0.1, 0.25, 0.5, 1)}
    names = {alpha: name for alpha, name in names.items() if name in found}
    for key, label in dict(pass1="pass@1", greedy="greedy", pass4="pass@4").items():
        values = [mean_and_se([c[-1][key] for c in found[name]]) for name in names.values()]
        axis.errorbar(list(names), *zip(*values), marker="o", label=label)
    axis.set(xlabel="alpha", ylim=(0, 1))
    axis.legend(frameon=False)


def alpha(studies, path):
    """TPO by alpha on the tasks of llm/compare.py."""
    figure, [axes] = panels(1, len(studies), (4.5 * len(studies), 3.6))
    for axis, runs in zip(axes, studies):
        draw_alphas(axis, by_name(runs))
        axis.set_title(f"{TITLES[runs[0]['task']]}, {runs[0]['steps']} updates", fontsize=10)
    save(figure, path)


def smol(runs, path):
    """Of long/long.py's runs on a pretrained model, means of five updates."""
    titles = dict(reward="training reward", tokens="tokens per completion",
                  drift="tokens that the target asks to add")
    figure, [axes] = panels(1, len(titles), (16, 3.6))
    for axis, (key, title) in zip(axes, titles.items()):
        curves = {}
        for name, seeds in by_name(runs, key).items():
            if key != "drift" or name.startswith("tpo"):        # the other losses have no target
                fives = [[mean(x[i:i + 5]) for i in range(0, len(x), 5)] for x in seeds]
                curves[name] = [(5 * i + 3, *mean_and_se(same))
                                for i, same in enumerate(zip(*fives))]
        draw(axis, curves, floor=-math.inf if key == "drift" else 0)
        axis.set_xlabel("update")
        axis.set_title(f"SmolLM2 on rg:gcd: {title}", fontsize=10)
    save(figure, path)


def lag(runs, path):
    """pass@1 at the end of llm/lag.py's runs against how old the sampler is."""
    found = {}
    for r in runs:
        found.setdefault(r["algo"], {}).setdefault(r["flags"]["lag"], []).append(
            r["pass1_after"])
    figure, [[axis]] = panels(1, 1, (6, 3.6))
    draw(axis, {algo: [(x, *mean_and_se(values)) for x, values in sorted(at.items())]
                for algo, at in found.items()})
    seeds, r = len(next(iter(next(iter(found.values())).values()))), runs[0]
    axis.set_title(f"graph coloring: pass@1 after {r['steps']} updates, {seeds} seeds", fontsize=10)
    axis.set_xlabel("updates between the sampler and the policy")
    save(figure, path)


def seq(records, path):
    """Error of seqtask.py's runs against episodes, a panel per setting."""
    found = [r for r in records if r["kind"] == "curve"]
    if "gradient_norm" in found[0]:
        return mechanism(found, path)
    names = ["target", "reward", "length", "vocab", "candidates", "batch", "eta", "match"]
    epochs = {(r["algo"], r["epochs"]) for r in found}
    if len(epochs) > len({algo for algo, _ in epochs}):     # else dg's differ, but are no setting
        names.append("epochs")
    settings = {}
    for r in found:
        setting = tuple((name, r[name]) for name in names)
        settings.setdefault(setting, {})[r["algo"]] = r
    varied = {name for name in names if len({dict(s)[name] for s in settings}) > 1}
    shown = varied | {"reward", "length", "vocab"}
    floor = 1e-4 if any(r["reward"] != "terminal" for r in found) else 0
    columns = min(4, len(settings))
    rows = -(-len(settings) // columns)
    figure, axes = panels(rows, columns, (5 * columns, 3.6 * rows))
    for axis, (setting, runs) in zip(axes.flat, settings.items()):
        draw(axis, {algo: over_episodes(r, "error") for algo, r in runs.items()}, floor)
        title = [v if isinstance(v, str) else f"{k} {v:g}" for k, v in setting if k in shown]
        counts = sorted({r["seeds"] for r in runs.values()})
        title.append(f"{' and '.join(map(str, counts))} seeds")
        axis.set_title(", ".join(title), fontsize=9)
        axis.set_xlabel("episode")
        axis.set_ylabel("error")
    for axis in axes.flat[len(settings):]:
        axis.set_axis_off()
    save(figure, path)


def mechanism(found, path):
    """What seqtask.py --diagnostics records of a setting: the first epoch of each episode."""
    shown = {"error": "error", "gradient_norm": "gradient norm",
             "zero_variance": "share of groups with equal scores",
             "weight_success": "mean weight of a success (q, or |u|)"}
    figure, [axes] = panels(1, len(shown), (4.4 * len(shown), 3.6))
    for axis, (key, name) in zip(axes, shown.items()):
        curves = {r["algo"]: points for r in found if (points := over_episodes(r, key))}
        draw(axis, curves, floor=1e-5 * (key == "gradient_norm"))
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("episode")
    r = found[0]
    figure.suptitle(f"H {r['length']}, K {r['candidates']}, B {r['batch']}, {r['seeds']} seeds")
    save(figure, path)


def over_episodes(r, key):
    """The points [(episode, mean, s.e.), ...] of a curve of seqtask.py; 0 where no s.e. is kept."""
    errors = r.get(f"{key}_se") or [0] * len(r[key])
    return [(r["every"] * (i + 0.5), *point) for i, point in enumerate(zip(r[key], errors))
            if point[0] is not None]


def panels(rows, columns, size):
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def save(figure, path, dpi=150):
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    print(f"wrote {path}")


def mean_and_se(values):
    return mean(values), stdev(values) / len(values)**0.5 if len(values) > 1 else 0


def over_seeds(logs, across, key):
    """The points [(x, mean, s.e.), ...] of the evaluations that have the key, one log per seed."""
    return [(mean(e[across] for e in same), *mean_and_se([e[key] for e in same]))
            for same in zip(*logs) if key in same[0]]


def draw(axis, curves, floor=0):
    """Curves {algo: [(x, mean, s.e.), ...]}, each with a band of one s.e. and labelled at its end.

    The axis ends at the floor; above 0, it is logarithmic.
    """
    axis.set_yscale("log" if floor > 0 else "linear")
    looks = {algo: LOOKS.get(algo, (algo, "#555555")) for algo in curves}
    for algo, points in curves.items():
        color, (x, y, se) = looks[algo][1], zip(*points)
        low, high = ([max(m + sign * s, floor / 10) for m, s in zip(y, se)] for sign in (-1, 1))
        axis.plot(x, [max(m, floor / 10) for m in y], color=color, linewidth=2)
        axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axis.margins(x=0)
    axis.set_ylim(bottom=max(floor, axis.get_ylim()[0]))
    axis.spines[["top", "right"]].set_visible(False)
    to_height = axis.transData + axis.transAxes.inverted()
    ends = {algo: max(points[-1][1], floor) for algo, points in curves.items()}
    labels = sorted([to_height.transform((0, end))[1], algo] for algo, end in ends.items())
    for _ in range(100):                                        # push labels that overlap apart
        for below, above in zip(labels, labels[1:]):
            push = max(0, 0.07 - above[0] + below[0]) / 2
            below[0], above[0] = below[0] - push, above[0] + push
    for height, algo in labels:
        name, color = looks[algo]
        axis.text(1.02, height, name, color=color, transform=axis.transAxes, va="center")


def read(log):
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    recorded = [log for name in LOGS for log in sorted(HERE.glob(f"{name}.jsonl"))]
    kinds = {"preset": seq, "warm_steps": llm, "drift": smol, "lag": lag, "flags": scoreboard}
    for log in map(Path, sys.argv[1:] or recorded):
        records = read(log)
        keys = records[0] | records[0].get("flags", {})
        figure = next((kinds[key] for key in kinds if key in keys), bandit)
        figure(records, log.with_suffix(".png"))
    if not sys.argv[1:]:
        alpha([read(HERE / f"{name}.jsonl") for name in STUDIES], HERE / "llm/alpha.png")
