#!/usr/bin/env python3
"""Plot training curves, or metrics of finished runs against a setting.

    python results/curves.py runs/toy-*                       # KL to Best-of-N during training
    python results/curves.py runs/imdb-* --against M          # a key of config.json or result.json
    python results/curves.py runs/imdb-* --against temperature --temperatures .25 .5 1    # Figure 5

The first plot reads metrics.jsonl only. The second one tests the runs as evaluate.py does, with the
same flags and cached tests. Runs that differ only in their seeds are one curve.
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import vbon
from vbon import UserError

# For --against: name of the figure and label of the axis.
AXES = {"temperature": ("temperatures", "sampling temperature"),
        "M": ("M", "M, reference samples per prompt"),
        "seconds_sampling": ("M", "seconds to generate and score the reference samples")}


def curve(run, name):
    """{episode: value} of a metric during training: exact where the toy measured it, otherwise a
    running mean over a sixteenth of the iterations."""
    metrics = run["metrics"]
    exact = {m["episode"]: m["exact/" + name] for m in metrics if "exact/" + name in m}
    points = [(m["episode"], m["objective/" + name]) for m in metrics if "objective/" + name in m]
    width = max(1, len(points) // 16)
    means = {points[i][0]: statistics.fmean(y for _, y in points[i - width + 1:i + 1])
             for i in range(width - 1, len(points), max(1, width // 4))}
    return exact or means


def plot_curves(path, title, groups):
    """Plot KL to Best-of-N and two more metrics over episodes, the mean and the range over seeds.
    The others are effective N and excess on the toy, win rate and KL to π_ref for text."""
    names = [name for name in ("kl_to_bon", "effective_N", "excess_kl", "win_rate", "kl_to_ref")
             if all(curve(run, name) for _, runs in groups for run in runs)][:3]
    with evaluate.picture(path, title, len(names), **evaluate.BELOW | {"ncols": 2}) as panels:
        for axes, key in zip(panels, names):
            for i, (name, runs) in enumerate(groups):
                curves = [curve(run, key) for run in runs]
                episodes = sorted(set.intersection(*map(set, curves)))
                values = [[c[e] for c in curves] for e in episodes]
                line, color = "-" if runs[0]["method"] == "vBoN" else "--", f"C{i}"
                mean, low, high = ([*map(f, values)] for f in (statistics.fmean, min, max))
                label = name if axes is panels[len(panels) // 2] else None
                axes.plot(episodes, mean, line, color=color, label=label)
                axes.fill_between(episodes, low, high, color=color, alpha=0.2)
            axes.set(xlabel="episodes", ylabel=evaluate.METRICS[key])
            if key == "kl_to_bon":
                axes.set_yscale("symlog", linthresh=0.01)  # an estimate may be negative
                ticks = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
                evaluate.set_ticks(axes.yaxis, ticks)
            elif key == "effective_N":
                axes.set_yscale("log")
                evaluate.set_ticks(axes.yaxis, evaluate.DOUBLINGS)


def settings(run):
    """Settings and results of a run in one dict."""
    return run["config"] | run["result"]


def plot_against(path, title, groups, key, label):
    """Plot reward, win rate and KL to Best-of-N against a number of each run, the mean and its
    standard error over seeds (Figures 4 and 5)."""
    runs = [run for _, members in groups for run in members]
    parts = ["in/", "out/"] if all("out/reward" in run["result"] for run in runs) else [""]
    values = [part + value for part in parts for value in ("reward", "win_rate")] + ["kl_to_bon"]
    with evaluate.picture(path, title, len(values)) as axes:
        for a, value in zip(axes, values):
            lines = {}
            for _, members in groups:
                x = statistics.fmean(settings(run)[key] for run in members)
                row = x, *evaluate.mean_and_error(members, value)
                lines.setdefault(members[0]["name"], []).append(row)
            for name, rows in lines.items():
                x, mean, error = zip(*sorted(rows, key=lambda row: row[0]))
                a.errorbar(x, mean, [e or 0 for e in error], fmt="o-", capsize=3, label=name)
            a.set(xlabel=label, ylabel=evaluate.COLUMNS[value])


def plot(options):
    """Read the runs, test them if metrics are needed, and plot one figure."""
    runs = evaluate.read_runs(options)
    task = runs[0]["config"]["task"]
    if options.against:
        key = options.against
        if not all(isinstance(settings(run).get(key), (int, float)) for run in runs):
            raise UserError("--against must be a number in config.json or result.json of all runs, "
                            f"got {key}")
        name, label = AXES.get(key, ("against-" + key.replace("/", "-"), key))
        groups = evaluate.group_seeds(evaluate.evaluate_runs(runs, options))
        return plot_against(f"{options.figures}/{task}-{name}.png", task, groups, key, label)
    groups = [(name, members) for name, members in evaluate.group_seeds(runs)
              if all(curve(run, "kl_to_bon") for run in members)]
    if not groups:
        raise UserError("a curve needs runs whose metrics.jsonl has the KL to Best-of-N, got none: "
                        "pass runs of vbon.py, or runs of the toy")
    what = "toy, exact" if task == "toy" else f"{task}, running means of the training responses"
    plot_curves(f"{options.figures}/{task}.png", f"{what}: mean and range over seeds", groups)


def main(argv=None):
    def parse():
        parser = evaluate.make_parser(__doc__)
        parser.set_defaults(figures="figures")
        parser.add_argument("--against", metavar="KEY", help="plot metrics against this setting")
        options = evaluate.parse_options(parser, argv)
        if not options.against and (options.temperatures or options.reward):
            raise UserError("--temperatures and --reward need --against, because the curves are of "
                            "training: pass --against temperature")
        return options
    return vbon.run_script("curves.py", parse, plot)


if __name__ == "__main__":
    sys.exit(main())
