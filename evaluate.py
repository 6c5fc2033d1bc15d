#!/usr/bin/env python3
"""Reads finished runs of vbon.py: a table for the terminal, results/*.csv for work, learning curves for looking.

    python evaluate.py runs/*                                  # the table
    python evaluate.py runs/toy-* --csv results/toy.csv        # … and every run as a row
    python evaluate.py runs/toy-* --figure figures/toy.png     # … and exact distances against episodes

Runs that differ in their seeds alone are one row: mean ± standard error over seeds (one seed: over test prompts).
"""
import argparse
import csv
import json
import math
import os
import sys

from vbon import UserError, bon_kl, bon_win_rate

COLUMNS = {"reward": "reward", "win_rate": "win rate", "kl_to_ref": "KL to π_ref", "exact/kl_to_bon": "exact KL to π_bon",
           "exact/kl_to_ref": "exact KL to π_ref", "exact/reward": "exact reward", "exact/win_rate": "exact win rate"}


def read_run(folder):
    """The result, configuration and metrics of one run. Raises UserError where it is not a finished one."""
    try:
        result, config = (json.load(open(f"{folder}/{name}.json", encoding="utf-8")) for name in ("result", "config"))
        metrics = [json.loads(line) for line in open(f"{folder}/metrics.jsonl", encoding="utf-8")]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a finished run ({error}): train it to the end, or leave it out") from None
    return {"folder": folder, "result": result, "config": config, "metrics": metrics}


def group_seeds(runs):
    """Runs whose configurations differ in seeds, places and evaluation rhythm alone, together, under a readable name."""
    groups = {}
    for run in runs:
        c = run["config"]
        same = {k: v for k, v in c.items() if k not in ("seed", "data_seed", "out", "samples", "eval_every", "overwrite", "device")}
        if c["objective"] == "rlhf":  # KL-constrained RL knows nothing of F; N stays, for exact distances are to Best-of-N
            name = f"PPO, β = {c['beta']:.3g}"
            same = {k: v for k, v in same.items() if k not in ("M", "estimator")}
        else:
            name = {"vbon": "vBoN", "bound": "L bound", "bound1": "L1 bound"}[c["objective"]] + f", N = {c['N']}, M = {c['M']}"
        groups.setdefault((name, json.dumps(same, sort_keys=True)), []).append(run)
    return [(name, members) for (name, _), members in groups.items()]


def mean_and_error(runs, key):
    """Mean over runs and its standard error; with a single run, that run's own standard error over prompts."""
    values = [run["result"][key] for run in runs]
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, runs[0]["result"].get(key + "_se")
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def table(groups):
    """The rows as text, columns aligned."""
    keys = [k for k in COLUMNS if all(k in run["result"] for _, runs in groups for run in runs)]
    rows = [["", "seeds", *(COLUMNS[k] for k in keys)]]
    for name, runs in groups:
        cells = [mean_and_error(runs, k) for k in keys]
        rows.append([name, str(len(runs)), *(f"{m:.3f}" + ("" if e is None else f" ± {e:.3f}") for m, e in cells)])
    strengths = sorted({run["config"]["N"] for _, runs in groups for run in runs if run["config"]["objective"] != "rlhf"})
    for N in strengths:
        measured = [run["result"]["bon/reward"] for _, runs in groups for run in runs
                    if run["config"]["N"] == N and "bon/reward" in run["result"] and run["config"]["objective"] != "rlhf"]
        cells = {"reward": f"{sum(measured) / len(measured):.3f}" if measured else "", "win_rate": f"{bon_win_rate(N):.3f}",
                 "kl_to_ref": f"≤ {bon_kl(N):.3f}", "exact/kl_to_bon": "0"}
        rows.append([f"Best-of-{N}", "", *(cells.get(k, "") for k in keys)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows)


def write_csv(path, runs):
    """One row per run: its folder, its settings and its results."""
    rows = [{"run": run["folder"]} | run["config"] | run["result"] for run in runs]
    names = list(dict.fromkeys(k for row in rows for k in row if k not in ("out", "samples", "overwrite")))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path + ".tmp", path)


def plot(path, groups):
    """Toy: exact KL(π_θ ‖ π_bon) as training goes, mean and range over seeds, and where each policy ends beside Best-of-N."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    if not all("exact/kl_to_bon" in run["result"] for _, runs in groups for run in runs):
        raise UserError("--figure draws exact distances, which toy runs alone have")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for i, (name, runs) in enumerate(groups):
        color, style = f"C{i}", "-" if "PPO" not in name else "--"
        curves = [[m for m in run["metrics"] if "exact/kl_to_bon" in m] for run in runs]
        episodes = [m["episode"] for m in min(curves, key=len)]
        values = list(zip(*([m["exact/kl_to_bon"] for m in curve[:len(episodes)]] for curve in curves)))
        left.plot(episodes, [sum(v) / len(v) for v in values], style, color=color, label=f"{name} ({len(runs)} seed{'s' * (len(runs) > 1)})")
        left.fill_between(episodes, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2, lw=0)
        right.plot([run["result"]["exact/kl_to_ref"] for run in runs], [run["result"]["exact/win_rate"] for run in runs],
                   "o" if style == "-" else "D", color=color, alpha=0.7, ms=5, label=name)
    Ns = [1 + 0.05 * 1.1 ** i for i in range(90)]
    points = [(bon_kl(N), bon_win_rate(N)) for N in Ns if bon_kl(N) <= right.get_xlim()[1]]
    right.plot(*zip(*points), color="black", lw=1, label="Best-of-N, closed forms")
    left.set(yscale="log", xlabel="episodes", ylabel="exact KL(π_θ ‖ π_bon), nats", title="Distance to Best-of-N")
    right.set(xlabel="exact KL(π_θ ‖ π_ref), nats", ylabel="exact win rate over π_ref", title="Where training ends, one mark per seed")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path + ".tmp", dpi=150, format="png")
    os.replace(path + ".tmp", path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of finished runs of one task")
    parser.add_argument("--csv", metavar="FILE", help="write every run as a row")
    parser.add_argument("--figure", metavar="FILE.png", help="draw the exact learning curves of toy runs")
    args = parser.parse_args(argv)
    try:
        runs = [read_run(folder) for folder in args.runs]
        tasks = {run["config"]["task"] for run in runs}
        if len(tasks) > 1:
            raise UserError(f"runs of different tasks cannot stand in one table: {', '.join(sorted(tasks))}")
        groups = group_seeds(runs)
        print(table(groups))
        if args.csv:
            write_csv(args.csv, runs)
        if args.figure:
            plot(args.figure, groups)
    except UserError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
