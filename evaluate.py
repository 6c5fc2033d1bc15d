#!/usr/bin/env python3
"""Judges finished runs of vbon.py and bon_baselines.py, and draws the paper's figures.

    python evaluate.py runs/*                                 # a table: reward, win rate, KL, effective N, …
    python evaluate.py runs/* --csv all.csv --figures DIR     # … every run as a row, and the figures
    python evaluate.py runs/* --figures DIR --curves          # … the distance to Best-of-N in training
    python evaluate.py runs/* --responses 3                   # … the responses to three prompts (Table 2)
    python evaluate.py runs/* --temperatures .25 .5 1         # draws anew at other temperatures (Figure 5)
    python evaluate.py runs/* --reward DIR                    # judges by a reward that was not trained on
    python evaluate.py --export samples/imdb-… FILE           # samples as lines of prompt, responses, rewards

Runs that differ in their seeds alone are one row: mean ± standard error over seeds (one seed: over prompts).
"""
import argparse
import contextlib
import csv
import io
import json
import math
import os
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

import bon_baselines
import vbon
from vbon import bon_kl, bon_win_rate, need

METHODS = {"vbon": "vBoN", "bound": "L bound", "bound1": "L1 bound", "rlhf": "PPO",
           "dpo": "DPO", "bonbon": "BoNBoN", "bon-sft": "BoN-SFT", "bond": "BOND", "bon": "BoN"}
METRICS = {"reward": "reward", "win_rate": "win rate", "kl_to_ref": "KL to π_ref", "kl_to_bon": "KL to π_bon",
           "effective_N": "effective N", "excess_kl": "excess KL"}
COLUMNS = METRICS | {"exact/" + key: "exact " + label for key, label in METRICS.items()} | {
    "in/reward": "in-distribution reward", "in/win_rate": "in-distribution win rate",
    "out/reward": "out-of-distribution reward", "out/win_rate": "out-of-distribution win rate"}

# Settings that say where and how a run was made, not what it is.
PLACES = (*vbon.PLACES, "backend")

# ========== 1. Reading runs ===============================================================================


def read_run(folder):
    """One run: name, settings, metrics, result and test samples. Raises UserError if it is not finished."""
    def read(name):
        with open(f"{folder}/{name}", encoding="utf-8") as file:
            return [json.loads(line) for line in file] if name.endswith("l") else json.load(file)
    with vbon.reading(f"{folder} is not a finished run: train it to the end, or leave it out"):
        config = read("config.json")
        method = METHODS[config["objective"]]
        # What sets how far this method moves from π_ref.
        symbol, strength = ("β", config["beta"]) if method in ("PPO", "DPO") else ("N", config["N"])
        if method == "BOND":
            symbol, strength = "steps", config["episodes"] // config["minibatch"]
        shared = ", shared" if config.get("estimator") == "shared" else ""
        # Best-of-N trains nothing.
        metrics = [] if method == "BoN" else read("metrics.jsonl")
        return {"folder": folder, "method": method, "name": f"{method}, {symbol} = {strength:.5g}{shared}",
                "strength": strength, "judged": "", "config": config, "metrics": metrics,
                "result": read("result.json"), "samples": read("samples.jsonl")}


def group_seeds(runs):
    """[(name, runs)]: runs that differ in seeds and places alone, under a readable name, method by method.

    Raises UserError where a seed comes twice.
    """
    def order(run):
        return list(METHODS.values()).index(run["method"]), run["strength"], run["config"]["M"]
    groups = {}
    for run in sorted(runs, key=order):
        name, ignored = run["name"], {"seed", "data_seed", *PLACES}
        plain_ppo = run["method"] == "PPO" and not run["config"].get("critic_every")
        if plain_ppo or run["method"] in ("BoN", "BOND"):
            # These know nothing of F.
            ignored |= {"M", "estimator"}
        else:
            name += f", M = {run['config']['M']}"
        settings = frozenset((k, str(v)) for k, v in run["config"].items() if k not in ignored)
        groups.setdefault((name + run["judged"], settings), []).append(run)
    named = []
    for (name, settings), members in groups.items():
        # Rows that would share a name are told apart by the settings in which they differ.
        common = frozenset.intersection(*(s for n, s in groups if n == name))
        named.append((", ".join([name, *(f"{k} = {v}" for k, v in sorted(settings - common))]), members))
        seeds = {(run["config"]["seed"], run["config"]["data_seed"]) for run in members}
        folders = ", ".join(run["folder"] for run in members)
        need(len(seeds) == len(members), f"a seed comes twice among {folders}: leave one out")
    return named


def mean_and_error(runs, key):
    """The mean over runs and its standard error; of a single run, its own standard error over prompts."""
    values = [run["result"][key] for run in runs]
    if len(values) == 1:
        return values[0], runs[0]["result"].get(key + "_se")
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def measured(run, key):
    """(value, standard error) of a metric of a run: exact, without an error, where the toy knows it."""
    return mean_and_error([run], "exact/" + key if "exact/" + key in run["result"] else key)


def point(run, value):
    """(KL to π_ref, value) of a run."""
    return measured(run, "kl_to_ref")[0], measured(run, value)[0]


def pareto_front(points):
    """Which of the points (cost, value) no other one beats: a list of bools.

    To beat a point is to cost at most as much, be worth at least as much, and be better in one of the two.
    """
    return [not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
            for cost, value in points]


def front_shares(runs, value):
    """{method: share of the points on the common front that are its own}, as the paper reports them.

    BoN itself stays out. A point that a method reaches with several seeds counts once.
    """
    points = dict.fromkeys((run["method"], point(run, value)) for run in runs if run["method"] != "BoN")
    on_front = pareto_front([place for _, place in points])
    winners = [method for (method, _), wins in zip(points, on_front) if wins]
    return {method: winners.count(method) / len(winners) for method, _ in points}


# ========== 2. Tables =====================================================================================


def aligned(rows):
    """Rows of strings as a text table, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
                     for row in rows)


def table(groups):
    """The groups as text. Below them Best-of-N's closed forms, for the N of the BoN runs if there are any.
    Where every run knows the exact value of a metric, its estimate stays out."""
    runs = [run for _, members in groups for run in members]
    results = [run["result"] for run in runs]
    keys = [k for k in COLUMNS
            if any(k in r for r in results) and not all("exact/" + k in r for r in results)]

    def cell(members, key):
        if not all(key in run["result"] for run in members):
            return ""
        mean, error = mean_and_error(members, key)
        return f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}")
    rows = [["", "seeds", *(COLUMNS[k] for k in keys)]]
    rows += [[name, str(len(members)), *(cell(members, k) for k in keys)] for name, members in groups]
    with_N = [run for run in runs if run["method"] not in ("PPO", "DPO")]
    best = [run for run in runs if run["method"] == "BoN"]
    for N in sorted({run["strength"] for run in best or with_N}):
        closed = {"win_rate": f"{bon_win_rate(N):.3f}", "kl_to_ref": f"≤ {bon_kl(N):.3f}", "kl_to_bon": "0",
                  "effective_N": f"{N:.5g}", "excess_kl": "0"}
        cells = (closed.get(k.removeprefix("exact/"), "") for k in keys)
        rows.append([f"BoN, N = {N:.5g}, closed forms", "", *cells])
    return aligned(rows)


def shares_table(runs):
    """Each method's share of the Pareto front of all."""
    shares = [front_shares(runs, value) for value in ("win_rate", "reward")]
    return aligned([["", "win rate", "reward"],
                    *([method, *(f"{100 * s[method]:.0f} %" for s in shares)] for method in shares[0])])


def write_csv(path, runs):
    """One row per run: its folder, its settings and its results."""
    rows = [{"run": run["folder"], "judged": run["judged"].strip(", ")} | run["config"]
            | {"reward_model": run["config"]["reward"]} | run["result"] for run in runs]
    names = dict.fromkeys(k for row in rows for k in row if k not in PLACES)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    vbon.write_whole(path, text.getvalue())


def show_responses(groups, number):
    """What one run of each group answers to the first test prompts, with its rewards (Table 2)."""
    width = max(len(name) for name, _ in groups)
    prompts = dict.fromkeys(s["prompt"] for s in groups[0][1][0]["samples"])
    for prompt in list(prompts)[:number]:
        print(f"\n{prompt}")
        for name, runs in groups:
            for s in [s for s in runs[0]["samples"] if s["prompt"] == prompt][:1]:
                print(f"  {name:<{width}}  {s['reward']:6.2f}  " + s["response"].replace("\n", " ").strip())


# ========== 3. Other temperatures, another judge ==========================================================


def draw_anew(run, temperature, reward):
    """The test metrics and samples of a run at this temperature, by this reward model (None: its own).

    π_ref's samples, which win rates are measured against, are drawn at the same temperature and judged alike.
    """
    from transformers import AutoModelForCausalLM
    script = bon_baselines if run["config"]["objective"] in bon_baselines.METHODS else vbon
    changes = {"temperature": temperature, "overwrite": True, "resume": False}
    with vbon.reading(f"{run['folder']}/config.json is of another version"):
        args = script.Args(**run["config"] | changes)
    task = judge = replace(vbon.setup(args), train_prompts=[])
    if reward:
        score, reward_id = vbon.load_reward(reward, args.device, task.end, args.no_eos_reward)
        judge = replace(task, score=score, reward_id=reward_id)
        score_anew(*(vbon.samples_folder(by, args) for by in (task, judge)), score)
    if args.objective == "bon":
        # It chooses by the reward that it always had.
        drawn = bon_baselines.sample_best(task, vbon.reference_samples(task, args), args)
    else:
        policy, _ = vbon.load("policy", AutoModelForCausalLM, f"{run['folder']}/policy", args.device)
        drawn = vbon.sample_policy(policy, task, args)
    metrics, samples = vbon.test_metrics(judge, *drawn, vbon.reference_samples(judge, args), args)
    return {"result": metrics | {"temperature": temperature}, "samples": samples}


def score_anew(source, target, score):
    """Stores π_ref's test samples of a folder in another one, scored anew: so they need not be drawn anew."""
    for path in tqdm(sorted(Path(source).glob("test-*.json")), desc=f"{source} -> {target}", leave=False):
        if not Path(target, path.name).exists():
            batch = json.loads(path.read_text("utf-8"))
            batch["rewards"] = [score([prompt] * len(responses), responses)
                                for prompt, responses in zip(batch["prompts"], batch["responses"])]
            vbon.write_whole(f"{target}/{path.name}", json.dumps(batch, ensure_ascii=False))


def judge_anew(runs, temperatures, reward):
    """All runs, judged anew at all temperatures, or each at its own."""
    need(all(t > 0 for t in temperatures), f"--temperatures must be above 0, not {temperatures}")
    judge = f", judge {os.path.basename(os.path.normpath(reward))}" if reward else ""
    anew = []
    # What the tasks print goes where the bar is, beside the table.
    with contextlib.redirect_stdout(sys.stderr), tqdm(runs, desc="judging", unit="run") as bar:
        for run in bar:
            for t in temperatures or [run["config"]["temperature"]]:
                anew.append(run | draw_anew(run, t, reward) | {"judged": f", T = {t:g}{judge}"})
    return anew


# ========== 4. Figures ====================================================================================

# For --against: what the figure of a key is called, and its axis.
AXES = {"temperature": ("temperatures", "sampling temperature"),
        "M": ("M", "M, samples of π_ref to each prompt"),
        "seconds_sampling": ("M", "seconds to draw and score π_ref's samples")}


@contextlib.contextmanager
def picture(path, title, panels, **legend):
    """A row of panels to draw into. Then it gets its legends and is written to the path."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6 * panels, 4.6))
    figure.suptitle(title)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    yield axes
    figure.tight_layout()  # before the legends, which may be wider than their panel
    for a in axes:
        a.grid(alpha=0.3)
        if a.get_legend_handles_labels()[1]:
            a.legend(fontsize=8, **legend)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(path)


BELOW = {"ncols": 3, "columnspacing": 1, "handletextpad": 0.3, "loc": "upper center",
         "bbox_to_anchor": (0.5, -0.16)}  # a legend there
DOUBLINGS = [2.0 ** i for i in range(-9, 30)]  # the ticks of an axis of N


def set_ticks(axis, values):
    """Ticks at those of the values that are in view, as plain numbers."""
    low, high = axis.get_view_interval()
    seen = [x for x in values if low <= x <= high]
    axis.set_ticks(seen, [f"{x:g}" for x in seen])
    axis.set_ticks([], minor=True)


def scatter(axes, runs, x, y, shares):
    """A point for each run, with error bars where a metric is estimated. Given the methods' shares of the
    front of all, the legend tells them, and points off their method's own front are faded."""
    for i, method in enumerate(METHODS.values()):
        found = [(measured(run, x), measured(run, y)) for run in runs if run["method"] == method]
        style = {"fmt": "o", "color": f"C{i}", "ms": 5, "lw": 0.8}
        if method == "BoN":
            style |= {"fmt": "x", "color": "black"}
        on_front = pareto_front([(cost, value) for (cost, _), (value, _) in found])
        for ((a, a_error), (b, b_error)), best in zip(found, on_front):
            axes.errorbar(a, b, b_error, a_error, **style, alpha=1 if best or not shares else 0.25)
        if found:
            share = f" ({100 * shares[method]:.0f} % of the front)" if method in shares else ""
            axes.errorbar([], [], **style, label=method + share)


def plot_front(path, title, runs):
    """Figures 2, 6 and 7: win rate and reward against KL, beside Best-of-N."""
    with picture(path, title, 2, **BELOW) as panels:
        for axes, value, label in zip(panels, ("win_rate", "reward"), ("win rate over π_ref", "mean reward")):
            scatter(axes, runs, "kl_to_ref", value, front_shares(runs, value))
            if value == "win_rate":
                Ns = [1.1 ** i for i in range(80) if bon_kl(1.1 ** i) <= max(axes.get_xlim()[1], 0.1)]
                line, name = [(bon_kl(N), bon_win_rate(N)) for N in Ns], "BoN, closed forms"
            else:
                # The reward has no closed form: a line through what was measured.
                line, name = sorted(point(run, value) for run in runs if run["method"] == "BoN"), None
            axes.plot([kl for kl, _ in line], [y for _, y in line], color="black", lw=1, label=name)
            # On a scale of the square root N from 1 to 512 and strays of tens of nats fit in.
            axes.set_xscale("function", functions=(lambda x: x.clip(0) ** 0.5, lambda x: x ** 2))
            axes.set_xlim(left=0)
            axes.set(xlabel="KL(π_θ ‖ π_ref), nats", ylabel=label)
            set_ticks(axes.xaxis, (0, 0.1, 0.5, 1, 2, 3, 5, 10, 20, 30))


def plot_excess(path, title, runs):
    """What each policy pays above the least price of acting like the Best-of-N nearest to it."""
    with picture(path, title, 1) as (axes,):
        scatter(axes, runs, "effective_N", "excess_kl", {})
        axes.axhline(0, color="black", lw=1, label="BoN, exact")
        axes.set(xscale="log", xlabel="effective N = −1 / E[log F]", ylabel="KL above Best-of-N's, nats")
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_ylim(-0.05, 1.5 * axes.get_ylim()[1])
        low, high = (math.log2(N) for N in axes.get_xlim())
        axes.set_xlim(2 ** math.floor(low), 2 ** math.ceil(high))
        set_ticks(axes.xaxis, DOUBLINGS)


def curve(run, name):
    """{episode: value} in training: exact at milestones, or else a running mean over 1/16 of the phases."""
    metrics = run["metrics"]
    exact = {m["episode"]: m["exact/" + name] for m in metrics if "exact/" + name in m}
    points = [(m["episode"], m["objective/" + name]) for m in metrics if "objective/" + name in m]
    width = max(1, len(points) // 16)
    means = {points[i][0]: statistics.fmean(y for _, y in points[i - width + 1:i + 1])
             for i in range(width - 1, len(points), max(1, width // 4))}
    return exact or means


def plot_curves(path, title, groups):
    """Distance to Best-of-N, effective N and excess in training: mean and range over seeds."""
    with picture(path, title, 3, **BELOW | {"ncols": 2}) as panels:
        for axes, key in zip(panels, ("kl_to_bon", "effective_N", "excess_kl")):
            for i, (name, runs) in enumerate(groups):
                curves = [curve(run, key) for run in runs]
                episodes = sorted(set.intersection(*map(set, curves)))
                values = [[c[e] for c in curves] for e in episodes]
                line, color = "-" if runs[0]["method"] == "vBoN" else "--", f"C{i}"
                label = name if axes is panels[1] else None
                axes.plot(episodes, [*map(statistics.fmean, values)], line, color=color, label=label)
                axes.fill_between(episodes, [*map(min, values)], [*map(max, values)], color=color, alpha=0.2)
            axes.set(xlabel="episodes", ylabel=METRICS[key])
        panels[0].set_yscale("symlog", linthresh=0.01)  # an estimate may be below 0
        set_ticks(panels[0].yaxis, (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20))
        panels[1].set_yscale("log")
        set_ticks(panels[1].yaxis, DOUBLINGS)


def plot_against(path, task, groups, key, xlabel):
    """Figures 4 and 5: reward, win rate and KL to π_bon against a number of result.json, mean and error over
    seeds."""
    results = [run["result"] for _, runs in groups for run in runs]
    need(all(isinstance(r.get(key), (int, float)) for r in results), f"not every run has a number {key}")
    parts = ["in/", "out/"] if all("in/reward" in r and "out/reward" in r for r in results) else [""]
    panels = [part + value for part in parts for value in ("reward", "win_rate")]
    panels += ["kl_to_bon"] if all("kl_to_bon" in r for r in results) else []
    with picture(path, task, len(panels)) as axes:
        for a, value in zip(axes, panels):
            lines = {}
            for _, runs in groups:
                row = mean_and_error(runs, key)[0], *mean_and_error(runs, value)
                lines.setdefault(runs[0]["name"], []).append(row)
            for label, rows in lines.items():
                x, mean, error = zip(*sorted(rows, key=lambda row: row[0]))
                a.errorbar(x, mean, [e or 0 for e in error], fmt="o-", capsize=3, label=label)
            a.set(xlabel=xlabel, ylabel=COLUMNS[value])


def draw_figures(start, task, runs, groups, options):
    """The figures that these runs and options allow; `start` is the start of their paths."""
    key = "temperature" if options.temperatures else options.against
    if key:
        name, label = AXES.get(key, ("against-" + key.replace("/", "-"), key))
        plot_against(f"{start}-{name}.png", task, groups, key, label)
    elif options.curves:
        drawn = [(name, members) for name, members in groups if all(curve(r, "kl_to_bon") for r in members)]
        what = "toy, exact" if task == "toy" else f"{task}, running means of the rollouts"
        plot_curves(f"{start}.png", f"{what}: mean and range over seeds", drawn)
    else:
        plot_front(f"{start}-pareto.png", f"{task}: a point is a run, faded if off its method's front", runs)
        bounds = [run for run in runs if run["method"] in ("vBoN", "L bound", "L1 bound")]
        if len({run["method"] for run in bounds}) > 1:
            plot_front(f"{start}-bound.png", f"{task}: vBoN (Eq. 5) against its lower bounds", bounds)
        if all("excess_kl" in run["result"] for run in runs):
            plot_excess(f"{start}-excess.png", f"{task}: what a policy pays above Best-of-N's price", runs)


# ========== 5. Samples for other programs =================================================================


def export_samples(folder, target):
    """Writes the training samples of a folder as the authors' lines: {"prompt", "responses", "rewards"}."""
    need(os.path.exists(f"{folder}/header.json"), f"--export {folder}: this is no folder of samples")
    samples = vbon.read_samples(folder, ("rewards", "responses"))
    rows = [{"prompt": prompt} | known for (split, prompt), known in samples.items() if split == "train"]
    vbon.write_whole(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{target}: {sum(len(row['rewards']) for row in rows)} samples of {len(rows)} training prompts")


# ========== 6. The command line ===========================================================================


def parse_options(argv):
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("runs", nargs="*", help="folders of finished runs of one task")
    add("--csv", metavar="FILE", help="write every run as a row")
    add("--figures", metavar="DIR", help="draw the figures that these runs allow into this folder")
    add("--responses", metavar="K", type=int, default=0, help="show the responses to K test prompts")
    add("--reward", metavar="DIR", help="judge by this reward model, a hub name or a folder")
    add("--export", metavar=("SAMPLES", "FILE"), nargs=2,
        help="write a folder of samples as JSON lines of prompt, responses, rewards")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--curves", action="store_true", help="with --figures: the distance to Best-of-N in training instead")
    add("--against", metavar="KEY", help="with --figures: metrics against this key of result.json")
    add("--temperatures", metavar="T", type=float, nargs="+", default=[], help="sample anew at these")
    return parser.parse_args(argv)


def judge_runs(options):
    """Reads the runs, judges them anew if asked to, and shows them as text, CSV and figures."""
    need(options.runs, "nothing to evaluate: name folders of runs (see --help)")
    runs = [read_run(folder) for folder in dict.fromkeys(map(os.path.normpath, options.runs))]
    task, *others = sorted({run["config"]["task"] for run in runs})
    need(not others, f"runs of different tasks cannot stand in one table: {', '.join([task, *others])}")
    need(task != "toy" or not options.reward, "--reward is another judge for --task imdb; toy's is a formula")
    need(options.figures or not (options.curves or options.against), "--curves, --against: pass --figures")
    need(not options.curves or any(curve(run, "kl_to_bon") for run in runs),
         "--curves: none of these runs measured its distance to Best-of-N in training")
    need(options.responses >= 0, f"--responses must be at least 0, not {options.responses}")
    need(not os.path.isdir(options.csv or ""), f"--csv {options.csv} is a folder: name a file")
    groups = group_seeds(runs)  # refuses what cannot stand in one table, before work
    if options.temperatures or options.reward:
        runs = judge_anew(runs, options.temperatures, options.reward)
        groups = group_seeds(runs)

    print(table(groups))
    if len({run["method"] for run in runs} - {"BoN"}) > 1 and not options.temperatures:
        print("\nshare of the Pareto front\n" + shares_table(runs))
    if options.responses:
        show_responses(groups, options.responses)
    if options.csv:
        write_csv(options.csv, runs)
    if options.figures:
        draw_figures(f"{options.figures}/{task}", task, runs, groups, options)


def main(argv=None):
    def run():
        options = parse_options(argv)
        if options.export:
            export_samples(*options.export)
        else:
            judge_runs(options)
    return vbon.run_script("evaluate.py", run)


if __name__ == "__main__":
    sys.exit(main())
