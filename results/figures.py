#!/usr/bin/env python3
"""Plot figures/win_rate.png and figures/excess.png from results/toy.csv and results/imdb.csv.

    python results/figures.py

A point is a method at one setting: the mean over seeds, with the standard error over seeds, or over
prompts if there is one seed.
"""
import csv
import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import vbon

HERE = Path(__file__).resolve().parent
TITLES = {"toy": "toy task, exact", "imdb": "IMDb, small models"}
# Label of a setting beside its point, by the name of its runs in results/toy.sh and imdb.sh.
LABELS = {"vbon": "N = 16", "vbon-N16-M200": "N = 16", "vbon-N16-M2000": "N = 16, M = 2000",
          "vbon-N64-M200": "N = 64", "vbon-N4": "N = 4", "vbon-N64": "N = 64",
          "vbon-long": "30,720 ep.", "paper": "paper's PPO", "critic-only": "no token bias",
          "bias-only": "no prefix critic", "bound": "N = 16", "bond": "", "bon": "",
          "rlhf-beta0.5": "β = 0.5", "rlhf-beta0.7": "β = 0.7", "rlhf-beta1": "β = 1",
          "rlhf-beta0.03": "β = 0.03", "rlhf-beta0.05": "β = 0.05", "dpo": "β = 0.1",
          "dpo-beta0.1": "β = 0.1", "bon-sft": "N = 16", "bon-sft-N16": "N = 16",
          "bonbon": "N = 16", "bonbon-N16": "N = 16"}
# Places of labels that would overlap, in points from the point.
PLACES = {"vbon": (-14, 9), "vbon-N16-M200": (-36, 8), "vbon-N64-M200": (-44, 6),
          "vbon-N64": (-44, 6), "rlhf-beta0.05": (6, -15), "rlhf-beta0.7": (-46, -14),
          "paper": (8, 5), "critic-only": (-24, 9), "vbon-long": (8, -12),
          "vbon-N16-M2000": (8, 6)}
# Settings of vBoN that the first figure leaves out, and marks of the second one.
DETAILS = {"vbon-N16-M2000", "vbon-long", "critic-only", "bias-only"}
MARKS = {"vbon-N4": "v", "vbon-N64": "^", "vbon-N64-M200": "^", "paper": "s", "critic-only": "D",
         "bias-only": "P", "vbon-long": "*", "vbon-N16-M2000": "D"}


def read_points(task):
    """Read a CSV file: {name of the setting: (method, {metric: (mean, standard error)})}."""
    groups = {}
    with open(HERE / f"{task}.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = re.sub(r"-seed\d+$", "", Path(row["run"]).name)
            groups.setdefault(name, []).append(row)
    points = {}
    for name, rows in [(name, rows) for name, rows in groups.items() if name in LABELS]:
        metrics = {}
        for key in evaluate.METRICS:
            column = "exact/" + key if task == "toy" else key
            values = [float(row[column]) for row in rows]
            error = (statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else
                     float(rows[0].get(column + "_se") or 0))
            metrics[key] = statistics.fmean(values), error
        points[name] = evaluate.METHODS[rows[0]["objective"]], metrics
    return points


def plot_points(axes, points, x, y, marks):
    """Plot the points with their error bars. Colors are the methods'. The settings of vBoN and PPO
    stand beside the points, those of the other methods in the legend."""
    colors = {method: f"C{i}" for i, method in enumerate(evaluate.METHODS.values())}
    colors["BoN"] = "black"
    seen = set()
    for name, (method, metrics) in points.items():
        (a, a_error), (b, b_error) = metrics[x], metrics[y]
        one_setting = method not in ("vBoN", "PPO")
        label = f"{method}, {LABELS[name]}" if one_setting and LABELS[name] else method
        axes.errorbar(a, b, b_error, a_error, fmt=marks.get(name, "o"), color=colors[method],
                      ms=6, lw=1, label=None if method in seen else label)
        seen.add(method)
        if not one_setting:
            axes.annotate(LABELS[name], (a, b), xytext=PLACES.get(name, (7, -10)),
                          textcoords="offset points", fontsize=9, color=colors[method])


def plot_win_rate(path, tasks):
    """Win rate against KL to the reference model, beside Best-of-N (the paper's Figure 2)."""
    with evaluate.picture(path, "", len(tasks), loc="lower right") as panels:
        for axes, (task, points) in zip(panels, tasks.items()):
            points = {name: p for name, p in points.items() if name not in DETAILS}
            plot_points(axes, points, "kl_to_ref", "win_rate", {})
            high = 1.15 * max(metrics["kl_to_ref"][0] for _, metrics in points.values())
            Ns = [1.05 ** i for i in range(200) if vbon.bon_kl(1.05 ** i) <= high]
            axes.plot([*map(vbon.bon_kl, Ns)], [*map(vbon.bon_win_rate, Ns)], color="black", lw=1,
                      label="Best-of-N, exact")
            axes.set(xlim=(0, high), ylim=(0.48, 1.01), title=TITLES[task],
                     xlabel="KL(π_θ ‖ π_ref), nats", ylabel="win rate against π_ref")


def plot_excess(path, tasks):
    """Excess KL against effective N."""
    with evaluate.picture(path, "", len(tasks), loc="upper left") as panels:
        for axes, (task, points) in zip(panels, tasks.items()):
            plot_points(axes, points, "effective_N", "excess_kl", MARKS)
            axes.axhline(0, color="black", lw=1, label="Best-of-N, exact")
            highest = max(metrics["excess_kl"][0] for _, metrics in points.values())
            axes.set(xscale="log", title=TITLES[task], xlabel="effective N",
                     ylabel="excess KL, nats", ylim=(-0.05 * highest, 1.35 * highest))
            low, high = (math.log2(N) for N in axes.get_xlim())
            axes.set_xlim(2 ** math.floor(low), 2 ** (math.ceil(high) + 0.5))
            evaluate.set_ticks(axes.xaxis, evaluate.DOUBLINGS)


def main():
    tasks = {task: read_points(task) for task in TITLES}
    plot_win_rate("figures/win_rate.png", tasks)
    plot_excess("figures/excess.png", tasks)


if __name__ == "__main__":
    sys.exit(vbon.run_script("figures.py", lambda: None, lambda _: main()))
