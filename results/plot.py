"""Draw results/*.jsonl as PNGs beside them: python results/plot.py [FILE.jsonl ...]"""
import json
import sys
from pathlib import Path
from statistics import mean, stdev

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    raise SystemExit("plots need matplotlib: pip install matplotlib")

NAMES = {"tpo": ("TPO", "#d62728"), "grpo": ("GRPO", "#ff7f0e"), "pg": ("PG", "#1f77b4"), "dg": ("DG", "#2ca02c"),
         "dg:lr=1e-3:epochs=2": ("DG, 2 epochs", "#98df8a"),
         "group_pg": ("Group PG", "#9467bd"), "ce": ("CE", "#7f7f7f"), "ppo": ("PPO", "#8c564b"),
         "tpo:anchor=1": ("TPO α=1", "#d62728"), "tpo:anchor=0.25": ("TPO α=.25", "#e377c2"),
         "tpo:anchor=0": ("TPO α=0", "#17becf"), "tpo:anchor=0.05": ("TPO α=.05", "#9467bd"),
         "tpo:anchor=1:length_normalize": ("TPO, token means", "#7f7f7f"), "grpo_no_kl": ("GRPO, no KL", "#bcbd22"),
         "grpo_masked": ("GRPO, masked", "#17becf"), "tpo_no_anchor": ("TPO, no anchor", "#e377c2"),
         "tpo_token": ("TPO", "#d62728"), "grpo_token": ("GRPO", "#ff7f0e"), "rloo": ("RLOO", "#1f77b4"),
         "maxrl": ("MaxRL", "#d62728"), "rebel": ("REBEL", "#2ca02c"), "oapl": ("OAPL", "#9467bd"), "dr_grpo": ("Dr. GRPO", "#ff7f0e"),
         "dapo": ("DAPO", "#8c564b"), "gspo": ("GSPO", "#e377c2"), "cispo": ("CISPO", "#bcbd22"), "kondo": ("Kondo", "#17becf")}
TITLES = {"single": "1 context, 100 arms", "multi": "100 contexts, 10 arms", "mnist": "MNIST"}


def bandit(records, path):
    """Error and misalignment of the bandit tasks in the records, a row per task: mean over seeds, band of one s.e."""
    evals = [r for r in records if r["kind"] == "eval"]
    seeds = {r["task"]: r["seeds"] for r in records if r["kind"] == "result"}
    figure, rows = plt.subplots(len(seeds), 2, figsize=(10, 3.6 * len(seeds)), squeeze=False, layout="constrained")
    for task, row in zip(seeds, rows):
        for axis, key in zip(row, ("error", "misalignment")):
            n = 10 if (task, key) == ("single", "misalignment") else 1      # at the end it hangs on rare samples
            curves = {}
            for r in evals:
                if r["task"] == task and (r["algo"], key) != ("ce", "misalignment"):                # 0 by definition
                    curves.setdefault(r["algo"], []).append((r["step"], r[key], r[key + "_se"] or 0))
            draw(axis, {algo: [tuple(map(mean, zip(*points[i:i + n]))) for i in range(0, len(points), n)]
                        for algo, points in curves.items()}, floor=1e-8)
            axis.set_xlabel("step")
            note = f", mean of {n} steps" if n > 1 else ""
            axis.set_title(f"{TITLES[task]}, {seeds[task]} seeds: {key}{note}", fontsize=10)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def llm(records, path):
    """pass@1 of llm_rlvr.py's runs, one log after the other, against updates and seconds: mean over seeds, band of one s.e."""
    runs = {}
    for r in records:
        if r["kind"] == "config":
            name = r["algo"] if r["algo"] in NAMES else r["algo"].split(":")[0]
            log = []
            runs.setdefault(name, []).append(log)
        elif r["kind"] == "eval":
            log.append(r)
    n = len(next(iter(runs.values())))
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for axis, (label, across) in zip(axes, {"update": "step", "seconds on one core, warm start included": "seconds"}.items()):
        curves = {algo: [(mean(e[across] for e in same), mean(e["pass1"] for e in same),
                          stdev(e["pass1"] for e in same) / n**0.5 if n > 1 else 0) for same in zip(*logs)]
                  for algo, logs in runs.items()}
        draw(axis, curves, floor=0)
        axis.set(xlabel=label, ylim=(0, 1))
        axis.set_title(f"graph coloring: pass@1 on 256 held-out puzzles, {n} seeds", fontsize=10)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def compare(runs, path):
    """The runs of compare.py, a row per task: pass@1 against updates and seconds, entropy, share of equal groups."""
    tasks = list(dict.fromkeys(r["task"] for r in runs))
    columns = {"pass@1 by update": ("step", "pass1"), "pass@1 by seconds": ("seconds", "pass1"),
               "entropy, nats per token": ("step", "entropy"), "share of informative groups": ("step", "informative")}
    figure, rows = plt.subplots(len(tasks), 4, figsize=(20, 3.8 * len(tasks)), squeeze=False, layout="constrained")
    for task, row in zip(tasks, rows):
        for axis, (title, (across, key)) in zip(row, columns.items()):
            curves = {}
            for algo in dict.fromkeys(r["algo"] for r in runs):
                seeds = [r["curve"] for r in runs if (r["task"], r["algo"]) == (task, algo)]
                points = [(mean(e[across] for e in same), [e[key] for e in same]) for same in zip(*seeds) if key in same[0]]
                curves[algo] = [(x, mean(v), stdev(v) / len(v)**0.5 if len(v) > 1 else 0) for x, v in points]
            draw(axis, curves, floor=0)
            axis.set_title(f"{task}, {len(seeds)} seeds: {title}", fontsize=10)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def smol(runs, path):
    """Training reward and length of the runs of long_completions.py on a pretrained model: means of five updates."""
    best = {}                                                         # algorithm -> the setting that all seeds were run with
    for r in runs:
        best.setdefault(r["algo"], {}).setdefault(r["setting"], []).append(r)
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for axis, key in zip(axes, ("rewards", "lengths")):
        curves = {}
        for algo, settings in best.items():
            same = max(settings.values(), key=len)
            blocks = [[mean(r[key][i:i + 5]) for r in same] for i in range(0, len(same[0][key]), 5)]
            curves[algo] = [(5 * i + 3, mean(v), stdev(v) / len(v)**0.5 if len(v) > 1 else 0) for i, v in enumerate(blocks)]
        draw(axis, curves, floor=0)
        axis.set_xlabel("update")
        title = {"rewards": "training reward", "lengths": "tokens per completion"}[key]
        axis.set_title(f"SmolLM2-135M-Instruct on rg:gcd: {title}", fontsize=10)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def seq(records, path):
    """Error of seqtask.py's runs against episodes, a panel per setting: mean over seeds, band of one s.e."""
    panels, dense = {}, False
    names = ["target", "reward", "length", "vocab", "candidates", "batch", "eta", "match", "seeds"]
    epochs = {(r["algo"], r["epochs"]) for r in records if r["kind"] == "curve"}
    names += ["epochs"] * (len(epochs) > len({algo for algo, _ in epochs}))          # dg's differ, but are not a setting
    for r in records:
        if r["kind"] == "curve":
            setting = {k: r[k] for k in names}
            panels.setdefault(tuple(setting.items()), {})[r["algo"]] = r
            dense = dense or r["reward"] != "terminal"
    varied = {k for k in dict(next(iter(panels))) if len({dict(s)[k] for s in panels}) > 1}
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", figsize=(5 * columns, 3.6 * rows))
    for axis, (setting, curves) in zip(axes.flat, panels.items()):
        draw(axis, {algo: [(r["every"] * (i + 0.5), m, s) for i, (m, s) in
                           enumerate(zip(r["error"], r["error_se"] or [0] * len(r["error"])))]
                    for algo, r in curves.items()}, floor=1e-4 if dense else 0)
        shown = varied | {"reward", "length", "vocab", "seeds"}
        title = [v if isinstance(v, str) else f"{k} {v:g}" for k, v in setting if k in shown]
        axis.set_title(", ".join(title), fontsize=9)
        axis.set_xlabel("episode")
        axis.set_ylabel("error")
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def draw(axis, curves, floor):
    """Curves {algo: [(x, mean, s.e.), ...]} on a log axis that ends at the floor (0: linear), each labelled at its end."""
    axis.set_yscale("log" if floor else "linear")
    look = lambda algo: NAMES.get(algo, (algo, "#555555"))                                               # name, color
    for algo, points in curves.items():
        (_, color), (x, y, se) = look(algo), zip(*points)
        low, high = ([max(m + sign * s, floor / 10) for m, s in zip(y, se)] for sign in (-1, 1))
        axis.plot(x, [max(m, floor / 10) for m in y], color=color, linewidth=2)
        axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axis.margins(x=0)
    axis.set_ylim(bottom=max(floor, axis.get_ylim()[0]))
    axis.spines[["top", "right"]].set_visible(False)
    to_height = lambda y: (axis.transData + axis.transAxes.inverted()).transform((0, max(y, floor)))[1]
    labels = sorted([to_height(points[-1][1]), algo] for algo, points in curves.items())
    for _ in range(100):                                                    # push labels that overlap apart
        for below, above in zip(labels, labels[1:]):
            push = max(0, 0.07 - above[0] + below[0]) / 2
            below[0], above[0] = below[0] - push, above[0] + push
    for height, algo in labels:
        name, color = look(algo)
        axis.text(1.02, height, name, color=color, transform=axis.transAxes, va="center")


if __name__ == "__main__":
    here = Path(__file__).parent
    for log in map(Path, sys.argv[1:] or [*sorted(here.glob("bandit_*.jsonl")), *sorted(here.glob("seq_*.jsonl")),
                                          *(here / f"{name}.jsonl" for name in ("llm_compare", "llm_default", "long_learn", "long_smol"))]):
        records = [json.loads(line) for line in log.read_text().splitlines()]
        figure = next((f for key, f in dict(preset=seq, init_from=llm, rewards=smol, setting=compare).items() if key in records[0]), bandit)
        figure(records, log.with_suffix(".png"))
