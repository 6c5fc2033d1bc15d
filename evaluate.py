#!/usr/bin/env python3
"""Judges finished runs of vbon.py and bon_baselines.py, and reproduces the paper's comparison of methods.

    python evaluate.py runs/*                                            # a table: reward, win rate, KL, by method
    python evaluate.py runs/* --csv results/toy.csv --figures figures    # … every run as a row, and the figures
    python evaluate.py runs/* --responses 3                              # … and what each answers to three prompts (Table 2)
    python evaluate.py runs/* --temperatures .25 .5 .75 1                # draws anew at other temperatures (Figure 5)
    python evaluate.py runs/* --reward DIR                               # … judges by a reward that was not trained on
    python evaluate.py --sweep paper --task toy --figures figures        # App. F: trains what is missing, then all of the above
    python evaluate.py --export samples/imdb-….jsonl theirs.jsonl        # the samples in the authors' format
    python evaluate.py --log-F samples/imdb-….jsonl --figures figures    # how many samples does F need? (Table 1, Figure 3)

Runs that differ in their seeds alone are one row: mean ± standard error over seeds (one seed: over test prompts).
A sweep can be stopped and started again: finished runs are skipped. Flags after `--` go to every run of it.
"""
import argparse
import contextlib
import csv
import hashlib
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

import torch
from tqdm import tqdm

import bon_baselines
import vbon
from vbon import UserError, bon_kl, bon_win_rate, write_whole

METHODS = {"vbon": "vBoN", "bound": "L bound", "bound1": "L1 bound", "rlhf": "PPO", "dpo": "DPO", "bonbon": "BoNBoN",
           "bon-sft": "BoN-SFT", "bon": "BoN"}
COLUMNS = {"reward": "reward", "win_rate": "win rate", "kl_to_ref": "KL to π_ref", "kl_to_ref_plain": "… plain estimate",
           "kl_to_ref_k3": "… k3 estimate", "exact/kl_to_bon": "exact KL to π_bon", "exact/kl_to_nearest_bon": "… to nearest N",
           "exact/kl_to_ref": "exact KL to π_ref", "exact/reward": "exact reward", "exact/win_rate": "exact win rate",
           "in/reward": "reward, in-distribution", "in/win_rate": "win rate, in", "out/reward": "reward, out of it", "out/win_rate": "win rate, out"}

# ======================================================================================================================
# 1. Reading runs
# ======================================================================================================================


def read_run(folder):
    """The result, configuration and metrics of one run. Raises UserError where it is not a finished one."""
    def read(name):
        with open(f"{folder}/{name}", encoding="utf-8") as file:
            return file.read()
    try:
        result, config = json.loads(read("result.json")), json.loads(read("config.json"))
        has_metrics = os.path.exists(f"{folder}/metrics.jsonl")  # Best-of-N trains nothing
        metrics = [json.loads(line) for line in read("metrics.jsonl").splitlines()] if has_metrics else []
        if config["objective"] not in METHODS:
            raise ValueError(f"unknown objective {config['objective']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a finished run ({error}): train it to the end, or leave it out") from None
    return {"folder": folder, "result": result, "config": config, "metrics": metrics, "method": METHODS[config["objective"]]}


def strength(run):
    """(name, value) of what sets how far this run's method moves from π_ref."""
    config = run["config"]
    return ("β", config["beta"]) if config["objective"] in ("rlhf", "dpo") else ("N", config["N"])


def group_seeds(runs):
    """[(name, runs)]: runs that differ in seeds and places alone, under a readable name, method by method. Raises UserError
    where a seed comes twice."""
    groups = {}
    for run in runs:
        same = {k: v for k, v in run["config"].items() if k not in ("seed", "data_seed", *vbon.PLACES)}
        symbol, value = strength(run)
        name = f"{run['method']}, {symbol} = {value:.5g}"
        if run["config"]["objective"] in ("rlhf", "bon"):  # these know nothing of F
            same = {k: v for k, v in same.items() if k not in ("M", "estimator")}
        else:
            name += f", M = {run['config']['M']}"
        name += run.get("suffix", "")
        order = list(METHODS.values()).index(run["method"]), value, same.get("M", 0)
        groups.setdefault((order, name, json.dumps(same, sort_keys=True)), []).append(run)
    settings = {}  # rows that would share a name are told apart by the settings in which they differ
    for _, name, same in sorted(groups):
        settings.setdefault(name, []).append(json.loads(same))
    named = []
    for key in sorted(groups):
        _, name, same = key
        ours = json.loads(same)
        differing = [k for k in ours if len({json.dumps(other.get(k)) for other in settings[name]}) > 1]
        named.append((", ".join([name, *(f"{k} = {ours[k]}" for k in differing)]), groups[key]))
        seeds = [(run["config"]["seed"], run["config"]["data_seed"]) for run in groups[key]]
        if len(set(seeds)) < len(seeds):
            raise UserError(f"a seed comes twice among {', '.join(run['folder'] for run in groups[key])}: leave one out")
    return named


def mean_and_error(runs, key):
    """Mean over runs and its standard error; with a single run, that run's own standard error over prompts."""
    values = [run["result"][key] for run in runs]
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, runs[0]["result"].get(key + "_se")
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def pareto_front(points):
    """Which (cost, value) points no other one beats: (n, 2) -> (n,) bool. A point is beaten by one that costs at most as
    much and is worth at least as much, and is better in one of the two."""
    points = torch.as_tensor(points, dtype=torch.double).view(-1, 2)
    cost, value = points.T
    no_worse = (cost <= cost.unsqueeze(1)) & (value >= value.unsqueeze(1))
    better = (cost < cost.unsqueeze(1)) | (value > value.unsqueeze(1))
    return ~(no_worse & better).any(1)


def point(run, value):
    """(KL to π_ref, value) of a run, exact where the toy knows it."""
    result = run["result"]
    return result.get("exact/kl_to_ref", result["kl_to_ref"]), result.get("exact/" + value, result[value])


def front_shares(runs, value):
    """{method: share of the points on the common front that are its own}, as the paper reports them. BoN itself stays out, and
    a point that a method reaches with several seeds (N = 1 may train nothing) counts once."""
    points = list(dict.fromkeys((run["method"], *point(run, value)) for run in runs if run["method"] != "BoN"))
    counts = {method: 0 for method, _, _ in points}
    for (method, _, _), on_front in zip(points, pareto_front([p[1:] for p in points]).tolist()):
        counts[method] += on_front
    return {method: count / max(1, sum(counts.values())) for method, count in counts.items()}


# ======================================================================================================================
# 2. Tables
# ======================================================================================================================


def aligned(rows):
    """Rows of strings as a text table, the first column to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows)


def table(groups):
    """The groups as text; below, Best-of-N's closed forms for the N of the BoN runs, or where there are none for every N."""
    keys = [k for k in COLUMNS if any(k in run["result"] for _, runs in groups for run in runs)]
    rows = [["", "seeds", *(COLUMNS[k] for k in keys)]]
    for name, runs in groups:
        cells = [mean_and_error(runs, k) if all(k in run["result"] for run in runs) else None for k in keys]
        rows.append([name, str(len(runs)), *("" if c is None else f"{c[0]:.3f}" + ("" if c[1] is None else f" ± {c[1]:.3f}") for c in cells)])
    Ns = {method: {run["config"]["N"] for _, runs in groups for run in runs if strength(run)[0] == "N" and method in (None, run["method"])}
          for method in ("BoN", None)}
    for N in sorted(Ns["BoN"] or Ns[None]):
        closed = {"win_rate": f"{bon_win_rate(N):.3f}", "kl_to_ref": f"≤ {bon_kl(N):.3f}"}
        rows.append([f"BoN, N = {N:.5g}, closed forms", "", *(closed.get(k, "") for k in keys)])
    return aligned(rows)


def write_csv(path, runs):
    """One row per run: its folder, its settings and its results."""
    rows = [{"run": run["folder"], "judged": run.get("suffix", "").strip(", ")} | run["config"] | {"reward_model": run["config"]["reward"]}
            | run["result"] for run in runs]
    names = list(dict.fromkeys(k for row in rows for k in row if k not in vbon.PLACES))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path + ".tmp", path)


def show_responses(groups, number):
    """What one run of each group answers to the first test prompts, with its rewards (the paper's Table 2)."""
    samples = []
    for name, runs in groups:
        try:
            with open(f"{runs[0]['folder']}/samples.jsonl", encoding="utf-8") as file:
                samples.append((name, runs[0].get("samples") or [json.loads(line) for line in file]))
        except OSError as error:
            raise UserError(f"{runs[0]['folder']} has no readable samples.jsonl: {error.strerror}") from None
    prompts = list(dict.fromkeys(s["prompt"] for s in samples[0][1]))[:number]
    for prompt in prompts:
        print(f"\n{prompt}")
        for name, lines in samples:
            for s in [s for s in lines if s["prompt"] == prompt][:1]:
                print(f"  {name:<{max(len(name) for name, _ in samples)}}  {s['reward']:6.2f}  " + s["response"].replace("\n", " ").strip())


# ======================================================================================================================
# 3. Other temperatures, another judge, the exact distance to the nearest Best-of-N
# ======================================================================================================================


def read_args(run, **changes):
    """The run's settings, as an Args of the script that made it."""
    kind = bon_baselines.Args if run["config"]["objective"] in bon_baselines.METHODS else vbon.Args
    try:
        return kind(**run["config"] | changes | {"overwrite": True, "resume": False})
    except TypeError as error:
        raise UserError(f"{run['folder']}/config.json is of another version: {error}") from None


def load_policy(run, device):
    from transformers import AutoModelForCausalLM
    return vbon.load("policy", AutoModelForCausalLM, f"{run['folder']}/policy", dtype=torch.float32).to(device).eval()


def cached(run, name, compute):
    """compute() of a run, kept beside its other files until the run is trained anew."""
    path = f"{run['folder']}/{name}.json"
    if not os.path.exists(path) or os.path.getmtime(path) < os.path.getmtime(f"{run['folder']}/result.json"):
        write_whole(path, json.dumps(compute(), indent=2) + "\n")
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def evaluate_anew(run, temperature, reward):
    """The run with the test metrics of new samples at this temperature, judged by this reward model (None: its own).

    π_ref's samples, which win rates are measured against, are drawn at the same temperature and judged alike.
    """
    def compute():
        with contextlib.redirect_stdout(sys.stderr):
            args = read_args(run, temperature=temperature, samples=None)
            device, task = vbon.begin(args)
            judge = replace(task, train_prompts=[])
            if reward:
                score, reward_id = vbon.load_reward(reward, device, task.end, args.no_eos_reward)
                judge = replace(judge, score=score, reward_id=reward_id)
            ref_rewards = vbon.reference_samples(judge, args, device)
            if args.objective == "bon":  # chooses by the reward it always had
                own_rewards = vbon.reference_samples(replace(task, train_prompts=[]), args, device)
                drawn = bon_baselines.sample_best(task, own_rewards, args, device)
            else:
                drawn = vbon.sample_policy(load_policy(run, device), task, args, device)
            metrics, samples = vbon.judge(judge, *drawn, ref_rewards, {})
            return {"result": metrics, "samples": samples}
    suffix = f", T = {temperature:g}" + (f", judge {os.path.basename(os.path.normpath(reward))}" if reward else "")
    place = hashlib.sha256(os.path.abspath(reward).encode()).hexdigest()[:8] if reward else "own"
    return run | cached(run, f"eval-T{temperature:g}-{place}", compute) | {"suffix": suffix, "temperature": temperature}


def add_nearest_bon(run):
    """toy: adds the exact KL(π_θ ‖ π_bon) to the nearest Best-of-N of any real N, so that methods without an N compare too."""
    def compute():
        args = read_args(run)
        with contextlib.redirect_stdout(sys.stderr):
            device, task = vbon.begin(args)
        world = vbon.exact_world(task, args)
        log_pi = world["log_bon"] if args.objective == "bon" else vbon.enumerate_policy(load_policy(run, device), world, args)

        def distance(log_N):
            world["log_bon"] = vbon.log_bon_pmf(world["log_F"], world["log_ref"], math.exp(log_N))
            return vbon.exact_metrics(log_pi, world)["exact/kl_to_bon"]
        low, high, golden = 0.0, math.log(2000), (math.sqrt(5) - 1) / 2
        while high - low > 0.05:
            left, right = high - golden * (high - low), low + golden * (high - low)
            low, high = (low, right) if distance(left) < distance(right) else (left, high)
        return {"exact/kl_to_nearest_bon": distance(low), "exact/nearest_N": math.exp(low)}
    return run | {"result": run["result"] | cached(run, "eval-nearest", compute)}


# ======================================================================================================================
# 4. Figures
# ======================================================================================================================

COLORS = {method: f"C{i}" for i, method in enumerate(METHODS.values())} | {"BoN": "black"}


def save(figure, path):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.tight_layout()
    figure.savefig(path + ".tmp", dpi=150, format="png")
    os.replace(path + ".tmp", path)
    print(f"{path}")


def subplots(number, title):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, number, figsize=(6 * number, 4.6), squeeze=False)
    figure.suptitle(title)
    for a in axes[0]:
        a.grid(alpha=0.3)
    return figure, axes[0]


def kl_axis(axes):
    """KL to the right, on a scale of its square root: N from 1 to 512 and the strays of tens of nats fit one picture."""
    axes.set_xscale("function", functions=(lambda x: x.clip(0) ** 0.5, lambda x: x ** 2))
    axes.set_xlim(left=0)
    ticks = [t for t in (0, 0.1, 0.5, 1, 2, 3, 5, 10, 20, 30) if t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xlabel("KL(π_θ ‖ π_ref), nats")


def scatter(axes, runs, value, shares=None):
    """One point per run, error bars over prompts where the metric is estimated; off its method's own front it is faded."""
    for method in METHODS.values():
        own = [run for run in runs if run["method"] == method]
        if not own:
            continue
        points, label = [point(run, value) for run in own], method
        if shares and method in shares:
            label += f" ({100 * shares[method]:.0f} % of the front)"
        axes.plot([], [], "x" if method == "BoN" else "o", color=COLORS[method], label=label)
        for run, (x, y), on_front in zip(own, points, pareto_front(points).tolist()):
            estimated = "exact/" + value not in run["result"]
            axes.errorbar(x, y, xerr=run["result"].get("kl_to_ref_se") if estimated else None,
                          yerr=run["result"].get(value + "_se") if estimated else None, fmt="x" if method == "BoN" else "o",
                          color=COLORS[method], alpha=1 if on_front else 0.25, ms=5, lw=0.8)


def legend_below(axes):
    """A legend that hides no point."""
    axes.legend(fontsize=8, ncols=3, columnspacing=1, handletextpad=0.3, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def plot_pareto(folder, task, runs):
    """Figures 2 and 7: win rate and reward against KL, with each method's share of the front, and Best-of-N."""
    figure, axes = subplots(2, f"{task}: each point a run; faded: off its own method's front")
    for a, value, name in zip(axes, ("win_rate", "reward"), ("win rate over π_ref", "mean reward")):
        scatter(a, runs, value, front_shares(runs, value))
        largest = max(point(run, value)[0] for run in runs)
        Ns = [N for N in (1.1 ** i for i in range(80)) if bon_kl(N) <= max(largest, 0.1)]
        if value == "win_rate":
            a.plot([bon_kl(N) for N in Ns], [bon_win_rate(N) for N in Ns], color="black", lw=1, label="BoN, closed forms")
        else:  # the reward has no closed form: a line through what was measured
            measured = sorted(point(run, value) for run in runs if run["method"] == "BoN")
            a.plot([x for x, _ in measured], [y for _, y in measured], color="black", lw=1)
        a.set_ylabel(name)
        kl_axis(a)
        legend_below(a)
    save(figure, f"{folder}/{task}-pareto.png")


def plot_bound(folder, task, runs):
    """Figure 6: vBoN against its lower bounds."""
    runs = [run for run in runs if run["method"] in ("vBoN", "L bound", "L1 bound")]
    figure, axes = subplots(2, f"{task}: vBoN (Eq. 5) against its lower bounds")
    for a, value, name in zip(axes, ("win_rate", "reward"), ("win rate over π_ref", "mean reward")):
        scatter(a, runs, value)
        a.set_ylabel(name)
        kl_axis(a)
        legend_below(a)
    save(figure, f"{folder}/{task}-bound.png")


def plot_distance(folder, runs):
    """What only an exact world can give: the distance to the nearest Best-of-N against the distance to π_ref."""
    figure, (axes,) = subplots(1, "toy: how far each policy is from being a Best-of-N at all")
    for method in METHODS.values():
        points = sorted((run["result"]["exact/kl_to_ref"], run["result"]["exact/kl_to_nearest_bon"]) for run in runs if run["method"] == method)
        if points and method != "BoN":
            axes.plot(*zip(*points), "o", color=COLORS[method], ms=4, alpha=0.7, label=method)
    axes.set(yscale="log", ylabel="min over N of exact KL(π_θ ‖ π_bon), nats")
    kl_axis(axes)
    axes.legend(fontsize=8)
    save(figure, f"{folder}/toy-distance.png")


def plot_curves(folder, groups):
    """toy: exact KL(π_θ ‖ π_bon) as training goes, mean and range over seeds, and where each policy ends beside Best-of-N."""
    figure, (left, right) = subplots(2, "toy: exact distances")
    for i, (name, runs) in enumerate(groups):
        color, style = f"C{i}", "-" if runs[0]["method"] == "vBoN" else "--"
        curves = [[m for m in run["metrics"] if "exact/kl_to_bon" in m] for run in runs]
        episodes = sorted(set.intersection(*({m["episode"] for m in curve} for curve in curves)))
        values = list(zip(*([m["exact/kl_to_bon"] for m in curve if m["episode"] in episodes] for curve in curves)))
        left.plot(episodes, [sum(v) / len(v) for v in values], style, color=color, label=f"{name} ({len(runs)} seed{'s' * (len(runs) > 1)})")
        left.fill_between(episodes, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2, lw=0)
        right.plot(*zip(*(point(run, "win_rate") for run in runs)), "o" if style == "-" else "D", color=color, alpha=0.7, ms=5, label=name)
    Ns = [N for N in (1.1 ** i for i in range(80)) if bon_kl(N) <= right.get_xlim()[1]]
    right.plot([bon_kl(N) for N in Ns], [bon_win_rate(N) for N in Ns], color="black", lw=1, label="Best-of-N, closed forms")
    left.set(yscale="log", xlabel="episodes", ylabel="exact KL(π_θ ‖ π_bon), nats", title="Distance to Best-of-N")
    right.set(xlabel="exact KL(π_θ ‖ π_ref), nats", ylabel="exact win rate over π_ref", title="Where training ends, one mark per seed")
    for a in (left, right):
        a.legend(fontsize=8)
    save(figure, f"{folder}/toy.png")


def plot_against(folder, task, groups, of, xlabel, name):
    """Figures 4 and 5: reward and win rate against of(runs), mean and standard error over seeds, a line per method and strength."""
    apart = task == "tldr" and all("in/reward" in run["result"] and "out/reward" in run["result"] for _, runs in groups for run in runs)
    names = {"reward": "reward", "win_rate": "win rate"}
    parts = {"in/": "in-distribution ", "out/": "out-of-distribution "} if apart else {"": ""}
    panels = {part + value: text + names[value] for part, text in parts.items() for value in names}
    figure, axes = subplots(len(panels), task)
    for a, value in zip(axes, panels):
        lines = {}
        for _, runs in groups:
            symbol, strong = strength(runs[0])
            label = f"{runs[0]['method']}, {symbol} = {strong:.5g}"
            lines.setdefault(label, []).append((of(runs), *mean_and_error(runs, value)))
        for i, (label, rows) in enumerate(lines.items()):
            x, mean, error = zip(*sorted(rows))
            a.errorbar(x, mean, [e or 0 for e in error], fmt="o-", capsize=3, color=f"C{i}", label=label)
        a.set(xlabel=xlabel, ylabel=panels[value])
        a.legend(fontsize=8)
    save(figure, f"{folder}/{task}-{name}.png")


# ======================================================================================================================
# 5. How many samples F needs (Table 1, Figure 3)
# ======================================================================================================================


def kolmogorov_smirnov(a, b):
    """The two-sample statistic sup |F_a − F_b| and its p-value by Kolmogorov's limit law (Numerical Recipes, §14.3)."""
    both = torch.cat([a, b])
    D = (torch.searchsorted(a.sort().values, both, right=True) / len(a) - torch.searchsorted(b.sort().values, both, right=True) / len(b)).abs().max().item()
    n = len(a) * len(b) / (len(a) + len(b))
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * D
    p = 1.0 if x < 0.2 else 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return D, min(1.0, max(0.0, p))


def samples_needed(path, folder, Ms=(5, 20, 32, 100, 200, 250), most=600):
    """Table 1 and Figure 3 from a file of samples: F̂ of the first M samples of a prompt against F̂ of its first 600.

    The M are among the 600, as in the paper: were they others, a test at the level of 5 % would reject 5 % at every M.
    """
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file of samples")
    rewards, _ = vbon.read_samples(path, {"vbon_samples": 3})
    prompts = {prompt: torch.tensor(r[:most], dtype=torch.double) for (split, prompt), r in rewards.items() if len(r) >= most}
    if not prompts:
        raise UserError(f"{path} has no prompt with {most} samples: draw them with vbon.py --M {most}")
    rows = [["M", "rejected at 5 %", "mean statistic", "mean p", "mean statistic of all"]]
    for M in Ms:
        tests = [kolmogorov_smirnov(r[:M], r) for r in prompts.values()]
        rejected = [t for t in tests if t[1] < 0.05]
        means = [f"{sum(t[i] for t in rejected) / len(rejected):.2f}" if rejected else "" for i in (0, 1)]
        rows.append([str(M), f"{100 * len(rejected) / len(tests):.2f} %", *means, f"{sum(t[0] for t in tests) / len(tests):.3f}"])
    print(f"{len(prompts)} prompts, F̂_M against F̂_{most} (Table 1)\n" + aligned(rows))
    if folder:
        ranked = sorted(prompts, key=lambda p: prompts[p].mean().item())
        figure, axes = subplots(3, f"log F̂ from M samples of π_ref (Figure 3)")
        for a, kind, prompt in zip(axes, ("negative", "neutral", "positive"), (ranked[0], ranked[len(ranked) // 2], ranked[-1])):
            grid = torch.linspace(prompts[prompt].min(), prompts[prompt].max(), 400, dtype=torch.double)
            for i, M in enumerate((10, 50, 100, 200, most)):
                a.step(grid, vbon.estimate_log_F(grid, prompts[prompt][:M]), where="post", color=f"C{i}", lw=2 if M == most else 1, label=f"M = {M}")
            a.set(xlabel="reward", ylabel="log F̂, nats", title=f"{kind}: {prompt!r}")
            a.legend(fontsize=8)
        save(figure, f"{folder}/log_F.png")


def export(path, target, flat):
    """The training samples of a file of samples as the authors' lines: {"prompt", "responses", "rewards"}, or with `flat` a line
    {"prompt", "text", "reward"} for each response, whose text holds the prompt. vbon.py --import-samples reads both."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file of samples")
    vbon.read_samples(path, {"vbon_samples": 3})  # refuses a damaged one
    rows = {}
    with open(path, encoding="utf-8") as file:
        for line in list(file)[1:]:
            entry = json.loads(line) if line.endswith("\n") else {"split": "torn"}
            if entry["split"] == "train":
                rows.setdefault(entry["prompt"], []).extend(zip(entry["responses"], entry["rewards"]))
    if flat:
        lines = [{"prompt": p, "text": p + y, "reward": r} for p, pairs in rows.items() for y, r in pairs]
    else:
        lines = [{"prompt": p, "responses": [y for y, _ in pairs], "rewards": [r for _, r in pairs]} for p, pairs in rows.items()]
    write_whole(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    print(f"{target}: {len(lines)} lines, {sum(map(len, rows.values()))} samples of {len(rows)} training prompts")


# ======================================================================================================================
# 6. Sweeps
# ======================================================================================================================

POWERS = [1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512]
BETAS = [.005, .01, .02, .03, .04, .05, .1, .2, .3, .4, .5, 1, 2, 3, 4, 5]
SWEEPS = {  # method: (flag, values, seeds)
    "paper": {"vbon": ("N", POWERS, 3), "bonbon": ("N", POWERS, 3), "bound": ("beta", BETAS, 2), "rlhf": ("beta", BETAS, 2),
              "dpo": ("beta", [.01, .1, .2, .3, .4, .5, 1, 2, 3, 4, 5], 3), "bon-sft": ("N", [*range(10, 600, 40), 600], 2),
              "bon": ("N", POWERS, 1)},
    "small": {"vbon": ("N", [2, 4, 16, 64, 256], 2), "bonbon": ("N", [2, 4, 16, 64, 200], 2), "bound": ("N", [2, 4, 16, 64, 256], 2),
              "rlhf": ("beta", [.01, .02, .05, .1, .3], 2), "dpo": ("beta", [.05, .1, .3, 1, 3], 2),
              "bon-sft": ("N", [2, 4, 16, 64, 200], 2), "bon": ("N", [2, 4, 16, 64], 1)},
    "M": {"vbon": ("M", [4, 8, 16, 32, 100, 200, 600], 3)},  # Figure 4, at N = 10
}


def sweep_jobs(name, task, out, extra):
    """[(folder, method, arguments)] of every run of a sweep."""
    jobs = []
    for method, (flag, values, seeds) in SWEEPS[name].items():
        for value in values:
            for seed in range(seeds):
                folder = f"{out}/{method}-{flag}{value:g}-seed{seed}"
                setting = ["--N", f"{1 / value + 1:.10g}"] if (method, flag) == ("bound", "beta") else [f"--{flag}", f"{value:g}"]
                if name == "M":  # seeds of samples too: their noise is what M governs
                    setting += ["--N", "10", "--data-seed", str(seed)]
                argv = [method] if method in bon_baselines.METHODS else ["--objective", method]
                jobs.append((folder, method, [*argv, "--task", task, *setting, "--seed", str(seed), "--out", folder, *extra]))
    return jobs


def draw_samples(args):
    """Draws π_ref's samples that a run wants, into the file that it will read. Returns the seconds for the training ones."""
    device, task = vbon.begin(args)
    vbon.reference_samples(replace(task, train_prompts=[]), args, device)
    start = time.perf_counter()
    vbon.reference_samples(task, args, device)
    return time.perf_counter() - start


def run_job(folder, method, argv):
    """Trains one run in this process, its output in a log beside its files. Returns the error's line, or None."""
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            code = (bon_baselines if method in bon_baselines.METHODS else vbon).main(argv)
            if code == 0 and argv[argv.index("--task") + 1] == "toy":
                add_nearest_bon(read_run(folder))
        except Exception as error:  # one run's end must not be the sweep's
            traceback.print_exc(file=log)
            return f"{folder}: {type(error).__name__}: {error} (see its log.txt)"
    if code == 0:
        return None
    with open(f"{folder}/log.txt", encoding="utf-8") as log:
        return f"{folder}: {log.read().strip().splitlines()[-1]}"


def sweep(name, task, out, parallel, extra):
    """Trains the runs of a sweep that are not there yet, `parallel` at a time with one thread each. Returns their folders."""
    for flag in ("--task", "--out", "--seed", "--N", "--beta", "--objective", "--samples") + ("--M", "--data-seed") * (name == "M"):
        if flag in (e.split("=")[0] for e in extra):
            raise UserError(f"the sweep itself sets {flag}: leave it out")
    jobs, todo, parsed = sweep_jobs(name, task, out, extra), [], []
    for folder, method, argv in jobs:
        args = (bon_baselines if method in bon_baselines.METHODS else vbon).parse_args([*argv, "--overwrite"])  # bad flags, before work
        if os.path.exists(f"{folder}/result.json"):
            had = read_run(folder)["config"]
            differing = [k for k, v in vars(args).items() if k in had and k not in vbon.PLACES and had[k] != v]
            if differing:
                raise UserError(f"{folder} was trained with other {', '.join(differing)}: pass another --out, or the same flags as before")
        else:
            todo.append((folder, method, argv if method == "bon" else [*argv, "--resume"]))
            parsed.append(args)
    failures = []
    with ProcessPoolExecutor(parallel, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        # π_ref's samples before several runs want them; in the pool, for rounding depends on the number of threads.
        for seed in sorted({args.data_seed for args in parsed}):
            path, seconds = f"{out}/seconds-to-draw-seed{seed}.json", {}
            wanted = {args.M: args for args in parsed if args.data_seed == seed}
            if name == "M" and not os.path.exists(path):  # and how long each M takes, one after the other
                total = 0.0
                for M in sorted(wanted):
                    total += pool.submit(draw_samples, wanted[M]).result()
                    seconds[M] = round(total, 2)
                os.makedirs(out, exist_ok=True)
                write_whole(path, json.dumps(seconds) + "\n")
            else:
                pool.submit(draw_samples, wanted[max(wanted)]).result()
        futures = [pool.submit(run_job, *job) for job in todo]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=f"{name} sweep of {task}", unit="run"):
                failures += [future.result()] if future.result() else []
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise UserError("stopped; the same command goes on from here") from None
    if failures:
        raise UserError(f"{len(failures)} runs failed, the first {failures[0]}")
    return [job[0] for job in jobs]


# ======================================================================================================================
# 7. The command
# ======================================================================================================================


def evaluate(options, extra):
    if options.export:
        return export(*options.export, options.flat)
    if options.log_F:
        return samples_needed(options.log_F, options.figures)
    folders = list(dict.fromkeys(map(os.path.normpath, options.runs)))
    if options.sweep:
        out = options.out or f"sweeps/{options.task}-{options.sweep}"
        if options.jobs < 1:
            raise UserError(f"--jobs must be at least 1, not {options.jobs}")
        folders = list(dict.fromkeys([*folders, *map(os.path.normpath, sweep(options.sweep, options.task, out, options.jobs, extra))]))
    if not folders:
        raise UserError("nothing to evaluate: name run folders, or --sweep, or --log-F (see --help)")
    runs = [read_run(folder) for folder in folders]
    tasks = sorted({run["config"]["task"] for run in runs})
    if len(tasks) > 1:
        raise UserError(f"runs of different tasks cannot stand in one table: {', '.join(tasks)}")
    task = tasks[0]
    group_seeds(runs)  # refuses what cannot stand in one table, before work
    if options.temperatures or options.reward:
        if task == "toy" and options.reward:
            raise UserError("--reward is another judge for --task imdb; toy's reward is a formula")
        if not all(t > 0 for t in options.temperatures or []):
            raise UserError(f"--temperatures must be above 0, not {options.temperatures}")
        with tqdm(runs, desc="judging", unit="run") as bar:
            runs = [evaluate_anew(run, t, options.reward) for run in bar for t in options.temperatures or [run["config"]["temperature"]]]
    elif task == "toy" and options.sweep != "M":
        runs = [add_nearest_bon(run) for run in runs]
    groups = group_seeds(runs)
    print(table(groups))
    methods = {run["method"] for run in runs}
    if len(methods - {"BoN"}) > 1 and not options.temperatures:
        shares = {value: front_shares(runs, value) for value in ("win_rate", "reward")}
        print("\nshare of the Pareto front\n" + aligned([["", "win rate", "reward"], *(
            [m, *(f"{100 * shares[v][m]:.0f} %" for v in shares)] for m in shares["reward"])]))
    if options.responses:
        show_responses(groups, options.responses)
    if options.csv:
        write_csv(options.csv, runs)
    if options.figures and options.temperatures:
        plot_against(options.figures, task, groups, lambda runs: runs[0]["temperature"], "sampling temperature", "temperatures")
    elif options.figures and options.sweep == "M":
        def seconds(runs):
            times = []
            for run in runs:
                with open(f"{out}/seconds-to-draw-seed{run['config']['data_seed']}.json", encoding="utf-8") as file:
                    times.append(json.load(file)[str(run["config"]["M"])])
            return sum(times) / len(times)
        plot_against(options.figures, task, groups, seconds, "seconds to draw and score the M samples of all training prompts", "M")
    elif options.figures and options.curves:
        if task != "toy":
            raise UserError("--curves draws exact distances, which toy runs alone have")
        plot_curves(options.figures, [(name, runs) for name, runs in groups if runs[0]["metrics"]])
    elif options.figures:
        plot_pareto(options.figures, task, runs)
        if methods & {"L bound", "L1 bound"} and "vBoN" in methods:
            plot_bound(options.figures, task, runs)
        if task == "toy":
            plot_distance(options.figures, runs)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    argv, extra = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of finished runs of one task")
    parser.add_argument("--csv", metavar="FILE", help="write every run as a row")
    parser.add_argument("--figures", metavar="DIR", help="draw the figures that these runs allow into this folder")
    parser.add_argument("--curves", action="store_true", help="with --figures: exact learning curves of toy runs instead")
    parser.add_argument("--responses", metavar="K", type=int, default=0, help="show the responses to the first K test prompts")
    parser.add_argument("--temperatures", metavar="T", type=float, nargs="+", help="draw anew at these temperatures")
    parser.add_argument("--reward", metavar="DIR", help="judge by this reward model")
    parser.add_argument("--sweep", choices=list(SWEEPS), help="train what is missing: paper (App. F), small (5 strengths, 2 seeds), M (Figure 4)")
    parser.add_argument("--task", choices=vbon.TASKS, default="toy", help="of the sweep [toy]")
    parser.add_argument("--out", metavar="DIR", help="folder of the sweep's runs [sweeps/<task>-<sweep>]")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1), help="runs at a time, one thread each [number of cores]")
    parser.add_argument("--log-F", metavar="FILE", help="a file of samples: how many F needs (Table 1, Figure 3)")
    parser.add_argument("--export", metavar=("FILE", "TO"), nargs=2, help="write a file of samples as the authors' lines: prompt, responses, rewards")
    parser.add_argument("--flat", action="store_true", help="with --export: a line for each response, prompt, text, reward")

    def one_line(message):
        raise UserError(message + " (see --help)")
    parser.error = one_line
    try:
        evaluate(parser.parse_args(argv), extra)
    except (UserError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
