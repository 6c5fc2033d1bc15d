#!/usr/bin/env python3
"""Judges finished runs of vbon.py and bon_baselines.py, and draws the paper's figures.

    python evaluate.py runs/*                                 # a table: reward, win rate, KL, effective N, …
    python evaluate.py runs/* --curves --figures DIR          # the distance to Best-of-N in training
    python evaluate.py runs/* --csv all.csv --figures DIR     # … every run as a row, and the figures
    python evaluate.py runs/* --responses 3                   # … the responses to three prompts (Table 2)
    python evaluate.py runs/* --temperatures .25 .5 1         # draws anew at other temperatures (Figure 5)
    python evaluate.py runs/* --reward DIR                    # judges by a reward that was not trained on
    python evaluate.py --export samples/imdb-….jsonl THEIRS   # samples in the format of the paper's authors
    python evaluate.py --import-samples THEIRS samples/mine.jsonl -- --task imdb    # … flags of vbon.py

Runs that differ in their seeds alone are one row: mean ± standard error over seeds (one seed: over prompts).
"""
import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import statistics
import sys
from dataclasses import replace

import torch
from tqdm import tqdm

import bon_baselines
import vbon
from vbon import bon_kl, bon_win_rate, need

METHODS = {"vbon": "vBoN", "bound": "L bound", "bound1": "L1 bound", "rlhf": "PPO",
           "dpo": "DPO", "bonbon": "BoNBoN", "bon-sft": "BoN-SFT", "bon": "BoN"}
METRICS = {"reward": "reward", "win_rate": "win rate", "kl_to_ref": "KL to π_ref", "kl_to_bon": "KL to π_bon",
           "effective_N": "effective N", "excess_kl": "excess KL"}
PARTS = {"": "", "exact/": "exact ", "in/": "in-distribution ", "out/": "out-of-distribution "}
COLUMNS = {part + key: words + label for part, words in PARTS.items() for key, label in METRICS.items()
           if part in ("", "exact/") or key in ("reward", "win_rate")}

# Settings that say where and how a run was made, not what it is.
PLACES = (*vbon.PLACES, "samples", "backend")

# ========== 1. Reading runs ===============================================================================


def read_run(folder):
    """One run: its result, settings, metrics and test samples. Raises UserError where it is not finished."""
    def read(name):
        with open(f"{folder}/{name}", encoding="utf-8") as file:
            return [json.loads(line) for line in file] if name.endswith("l") else json.load(file)
    with vbon.reading(f"{folder} is not a finished run: train it to the end, or leave it out"):
        config = read("config.json")
        # Best-of-N trains nothing.
        metrics = [] if config["objective"] == "bon" else read("metrics.jsonl")
        return {"folder": folder, "method": METHODS[config["objective"]], "judged": "", "config": config,
                "metrics": metrics, "result": read("result.json"), "samples": read("samples.jsonl")}


def strength(run):
    """(symbol, value) of what sets how far this run's method moves from π_ref."""
    name, symbol = ("beta", "β") if run["method"] in ("PPO", "DPO") else ("N", "N")
    return symbol, run["config"][name]


def name_of(run):
    symbol, value = strength(run)
    shared = ", shared" if run["config"].get("estimator") == "shared" else ""
    return f"{run['method']}, {symbol} = {value:.5g}{shared}"


def group_seeds(runs):
    """[(name, runs)]: runs that differ in seeds and places alone, under a readable name, method by method.

    Raises UserError where a seed comes twice.
    """
    def order(run):
        return list(METHODS.values()).index(run["method"]), strength(run)[1], run["config"]["M"]
    groups = {}
    for run in sorted(runs, key=order):
        name, ignored = name_of(run), {"seed", "data_seed", *PLACES}
        if run["method"] == "BoN" or run["method"] == "PPO" and not run["config"].get("critic_every"):
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
    result = run["result"]
    if "exact/" + key in result:
        return result["exact/" + key], None
    return result[key], result.get(key + "_se")


def point(run, value):
    """(KL to π_ref, value) of a run."""
    return measured(run, "kl_to_ref")[0], measured(run, value)[0]


def pareto_front(points):
    """Which (cost, value) points no other one beats: (n, 2) -> (n,) bool.

    To beat a point is to cost at most as much, be worth at least as much, and be better in one of the two.
    """
    cost, value = torch.as_tensor(points, dtype=torch.double).view(-1, 2).T
    no_worse = (cost <= cost.unsqueeze(1)) & (value >= value.unsqueeze(1))
    better = (cost < cost.unsqueeze(1)) | (value > value.unsqueeze(1))
    return ~(no_worse & better).any(1)


def front_shares(runs, value):
    """{method: share of the points on the common front that are its own}, as the paper reports them.

    BoN itself stays out. A point that a method reaches with several seeds counts once.
    """
    points = {(run["method"], *point(run, value)): None for run in runs if run["method"] != "BoN"}
    counts = dict.fromkeys((method for method, *_ in points), 0)
    for (method, *_), on_front in zip(points, pareto_front([p[1:] for p in points]).tolist()):
        counts[method] += on_front
    return {method: count / max(1, sum(counts.values())) for method, count in counts.items()}


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
    with_N = [run for run in runs if strength(run)[0] == "N"]
    for N in sorted({run["config"]["N"] for run in [r for r in with_N if r["method"] == "BoN"] or with_N}):
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
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


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


def prepare(run, **changes):
    """The run's settings, as an Args of the script that made it, and its task."""
    kind = bon_baselines.Args if run["config"]["objective"] in bon_baselines.METHODS else vbon.Args
    with vbon.reading(f"{run['folder']}/config.json is of another version"):
        args = kind(**run["config"] | changes | {"overwrite": True, "resume": False})
    return args, vbon.setup(args)


def load_policy(run, args):
    from transformers import AutoModelForCausalLM
    return vbon.load("policy", AutoModelForCausalLM, f"{run['folder']}/policy", args.device)[0]


def cached(run, name, compute):
    """compute() of a run, kept beside its other files until the run is trained anew."""
    path, trained = f"{run['folder']}/{name}.json", os.path.getmtime(f"{run['folder']}/result.json")
    if not os.path.exists(path) or os.path.getmtime(path) < trained:
        with contextlib.redirect_stdout(sys.stderr):
            vbon.write_whole(path, json.dumps(compute(), indent=2) + "\n")
    with vbon.reading(f"{path} is damaged: remove it"), open(path, encoding="utf-8") as file:
        return json.load(file)


def evaluate_anew(run, temperature, reward=None, judge_id="own"):
    """The run with the test metrics of new samples at this temperature, by this reward model (None: its own).

    π_ref's samples, which win rates are measured against, are drawn at the same temperature and judged alike.
    judge_id is the content of the reward model, which the cache goes by.
    """
    def compute():
        args, task = prepare(run, temperature=temperature, samples=None)
        task = judge = replace(task, train_prompts=[])
        if reward:
            score, reward_id = vbon.load_reward(reward, args.device, task.end, args.no_eos_reward)
            judge = replace(task, score=score, reward_id=reward_id)
        if args.objective == "bon":  # chooses by the reward it always had
            drawn = bon_baselines.sample_best(task, vbon.reference_samples(task, args), args)
        else:
            drawn = vbon.sample_policy(load_policy(run, args), task, args)
        metrics, samples = vbon.test_metrics(judge, *drawn, vbon.reference_samples(judge, args), args)
        return {"result": metrics | {"temperature": temperature}, "samples": samples}
    judged = f", T = {temperature:g}"
    if reward:
        judged += f", judge {os.path.basename(os.path.normpath(reward))}"
    place = hashlib.sha256(judge_id.encode()).hexdigest()[:8]
    # "2": older files know nothing of the distance to Best-of-N.
    return run | cached(run, f"eval2-T{temperature:g}-{place}", compute) | {"judged": judged}


def judge_anew(runs, temperatures, reward):
    """All runs, judged anew at all temperatures, or each at its own."""
    need(all(t > 0 for t in temperatures), f"--temperatures must be above 0, not {temperatures}")
    with contextlib.redirect_stdout(sys.stderr), tqdm(runs, desc="judging", unit="run") as bar:
        judge = (reward, vbon.load_reward(reward, "cpu")[1]) if reward else ()
        return [evaluate_anew(run, t, *judge)
                for run in bar for t in temperatures or [run["config"]["temperature"]]]


# ========== 4. Figures ====================================================================================

COLORS = {method: f"C{i}" for i, method in enumerate(METHODS.values())} | {"BoN": "black"}


@contextlib.contextmanager
def picture(path, title, panels, **legend):
    """A row of panels to draw into. Then it gets its legends and is written to the path."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6 * panels, 4.6))
    figure.suptitle(title)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    yield axes
    for a in axes:
        a.grid(alpha=0.3)
        a.legend(fontsize=8, **legend)
    figure.tight_layout()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(path, dpi=150)
    print(path)


def kl_axis(axes):
    """KL to the right, on a scale of its square root: N from 1 to 512 and strays of tens of nats fit in."""
    axes.set_xscale("function", functions=(lambda x: x.clip(0) ** 0.5, lambda x: x ** 2))
    axes.set_xlim(left=0)
    ticks = [t for t in (0, 0.1, 0.5, 1, 2, 3, 5, 10, 20, 30) if t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xlabel("KL(π_θ ‖ π_ref), nats")


def plot_closed_forms(axes):
    """Best-of-N's win rate against its KL."""
    Ns = [1.1 ** i for i in range(80) if bon_kl(1.1 ** i) <= max(axes.get_xlim()[1], 0.1)]
    kls, win_rates = [bon_kl(N) for N in Ns], [bon_win_rate(N) for N in Ns]
    axes.plot(kls, win_rates, color="black", lw=1, label="BoN, closed forms")


def mark_of(method):
    """errorbar's style for the runs of a method."""
    return {"fmt": "x" if method == "BoN" else "o", "color": COLORS[method], "ms": 5, "lw": 0.8}


def scatter(axes, runs, value):
    """A point for each run, faded off its method's own front, with error bars where the metric is estimated.
    The legend tells each method's share of the front of all."""
    shares = front_shares(runs, value)
    for method in METHODS.values():
        own = [run for run in runs if run["method"] == method]
        points = [point(run, value) for run in own]
        style = mark_of(method)
        for run, on_front in zip(own, pareto_front(points).tolist()):
            (x, x_error), (y, y_error) = measured(run, "kl_to_ref"), measured(run, value)
            axes.errorbar(x, y, y_error, x_error, **style, alpha=1 if on_front else 0.25)
        if own:
            share = f" ({100 * shares[method]:.0f} % of the front)" if method in shares else ""
            axes.errorbar([], [], **style, label=method + share)


def plot_front(path, title, runs):
    """Figures 2, 6 and 7: win rate and reward against KL, beside Best-of-N."""
    below = {"ncols": 3, "columnspacing": 1, "handletextpad": 0.3, "loc": "upper center",
             "bbox_to_anchor": (0.5, -0.16)}
    with picture(path, title, 2, **below) as (left, right):
        scatter(left, runs, "win_rate")
        plot_closed_forms(left)
        scatter(right, runs, "reward")
        # The reward has no closed form: a line through what was measured.
        line = sorted(point(run, "reward") for run in runs if run["method"] == "BoN")
        right.plot([x for x, _ in line], [y for _, y in line], color="black", lw=1)
        left.set_ylabel("win rate over π_ref")
        right.set_ylabel("mean reward")
        kl_axis(left)
        kl_axis(right)


def plot_excess(path, title, runs):
    """What each policy pays above the least price of acting like the Best-of-N nearest to it."""
    with picture(path, title, 1) as (axes,):
        for method in METHODS.values():
            own = [run for run in runs if run["method"] == method]
            for run in own:
                (x, x_error), (y, y_error) = measured(run, "effective_N"), measured(run, "excess_kl")
                axes.errorbar(x, y, y_error, x_error, **mark_of(method))
            if own:
                axes.errorbar([], [], **mark_of(method), label=method)
        axes.axhline(0, color="black", lw=1, label="BoN, exact")
        axes.set(xscale="log", xlabel="effective N = −1 / E[log F]", ylabel="KL above Best-of-N's, nats")
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_ylim(-0.05, 1.5 * axes.get_ylim()[1])
        low, high = (math.log2(N) for N in axes.get_xlim())
        ticks = [2 ** i for i in range(math.floor(low), math.ceil(high) + 1)]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.set_xticks([], minor=True)


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
    with picture(path, title, 3) as panels:
        for axes, key in zip(panels, ("kl_to_bon", "effective_N", "excess_kl")):
            for i, (name, runs) in enumerate(groups):
                curves = [curve(run, key) for run in runs]
                episodes = sorted(set.intersection(*map(set, curves)))
                values = [[c[e] for c in curves] for e in episodes]
                line, color = "-" if runs[0]["method"] == "vBoN" else "--", f"C{i}"
                axes.plot(episodes, [*map(statistics.fmean, values)], line, color=color, label=name)
                axes.fill_between(episodes, [*map(min, values)], [*map(max, values)], color=color, alpha=0.2)
            axes.set(xlabel="episodes", ylabel=METRICS[key])
        panels[0].set_yscale("symlog", linthresh=0.01)  # an estimate may be below 0
        low, high = panels[0].get_ylim()
        ticks = [t for t in (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low <= t <= high]
        panels[0].set_yticks(ticks, [f"{t:g}" for t in ticks])


def plot_against(path, task, groups, key, xlabel):
    """Figures 4 and 5: reward and win rate against a number of result.json, mean and error over seeds."""
    results = [run["result"] for _, runs in groups for run in runs]
    need(all(isinstance(r.get(key), (int, float)) for r in results), f"not every run has a number {key}")
    parts = ["in/", "out/"] if all("in/reward" in r and "out/reward" in r for r in results) else [""]
    panels = [part + value for part in parts for value in ("reward", "win_rate")]
    with picture(path, task, len(panels)) as axes:
        for a, value in zip(axes, panels):
            lines = {}
            for _, runs in groups:
                row = mean_and_error(runs, key)[0], *mean_and_error(runs, value)
                lines.setdefault(name_of(runs[0]), []).append(row)
            for label, rows in lines.items():
                x, mean, error = zip(*sorted(rows, key=lambda row: row[0]))
                a.errorbar(x, mean, [e or 0 for e in error], fmt="o-", capsize=3, label=label)
            a.set(xlabel=xlabel, ylabel=COLUMNS[value])


# ========== 5. Samples in the formats of the paper's authors ==============================================


def read_samples(path):
    """vbon.read_samples, of a file that must be there, whatever made it."""
    need(os.path.exists(path), f"{path}: no such file of samples")
    return vbon.read_samples(path, {"vbon_samples": 4})


def export_samples(path, target, flat):
    """Writes the training samples of a file as the authors' lines: {"prompt", "responses", "rewards"}, or
    if flat {"prompt", "text", "reward"} for each response, whose text holds the prompt."""
    need(os.path.realpath(path) != os.path.realpath(target), f"--export {path} {target}: these are one file")
    _, _, size = read_samples(path)  # refuses a damaged file
    rows = {}
    with open(path, "rb") as file:
        for line in map(json.loads, file.read(size).splitlines()[1:]):
            if line["split"] == "train":
                for prompt, *pairs in zip(line["prompts"], line["responses"], line["rewards"]):
                    rows.setdefault(prompt, []).extend(zip(*pairs))
    if flat:
        lines = [{"prompt": p, "text": p + y, "reward": r} for p, pairs in rows.items() for y, r in pairs]
    else:
        lines = [{"prompt": p, "responses": [y for y, _ in pairs], "rewards": [r for _, r in pairs]}
                 for p, pairs in rows.items()]
    vbon.write_whole(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    print(f"{target}: {sum(map(len, rows.values()))} samples of {len(rows)} training prompts")


def import_samples(theirs, path, flags):
    """Adds the authors' lines to a file of samples, for the training prompts that have none yet.

    That vbon.py with these flags would have drawn such samples is for the user to know.
    """
    found = read_theirs(theirs)
    args = vbon.parse_args([*flags, "--samples", path, "--overwrite"])  # no run is touched
    task = vbon.setup(args)
    path, header = vbon.samples_file(task, args)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    lock = vbon.take_lock(path + ".lock", wait=True)  # noqa: F841, held until this function ends
    rewards, _, size = vbon.read_samples(path, header)
    if os.path.exists(path):
        os.truncate(path, size)  # a line that a killed run left unfinished
    prompts = list(dict.fromkeys(task.train_prompts))
    taken = [p for p in prompts if found.get(p) and ("train", p) not in rewards]
    for prompt in taken:
        responses, scores = map(list, zip(*found[prompt]))
        tokens = [token_ids(task, prompt, response, args.max_new_tokens) for response in responses]
        vbon.write_line(path, header, {"split": "train", "start": 0, "prompts": [prompt], "rewards": [scores],
                                       "responses": [responses], "tokens": [tokens]})
    print(f"{path}: samples of {len(taken)} of the {len(prompts)} training prompts taken over")


def token_ids(task, prompt, response, limit):
    """A response's text as its tokens. One that is shorter than the limit ended with EOS."""
    start, eos = len(task.encode(prompt)), task.tokenizer.eos_token_id
    ids = task.tokenizer.encode(prompt + response.removesuffix(task.end))[start:]
    return [*(ids[:-1] if ids[-1:] == [eos] else ids), eos][:limit]


def read_theirs(path):
    """{prompt: [(response, reward), …]} of a file of the authors' lines, of either form."""
    found = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            with vbon.reading(f"{path}, line {number} holds no prompt with its responses and rewards"):
                prompt, pairs = their_samples(json.loads(line.decode()))
            found.setdefault(prompt, []).extend(pairs)
    return found


def their_samples(row):
    """The prompt of one of the authors' lines, and its (response, reward) pairs. Raises where it is none."""
    if "responses" not in row:
        if not row["text"].startswith(row["prompt"]):
            raise ValueError("the text does not begin with the prompt")
        row = row | {"responses": [row["text"].removeprefix(row["prompt"])], "rewards": [row["reward"]]}
    if type(row["responses"]) is not list:
        raise ValueError("the responses are no list")
    "".join([row["prompt"], *row["responses"]]).encode()  # raises for what is no text, or half a character
    if not all(type(r) in (int, float) and math.isfinite(r) for r in row["rewards"]):
        raise ValueError("a reward is no finite number")
    return row["prompt"], list(zip(row["responses"], row["rewards"], strict=True))


# ========== 6. The command line ===========================================================================


def evaluate(options, flags):
    need(options.import_samples or not flags, "only --import-samples takes flags after --")
    if options.import_samples:
        import_samples(*options.import_samples, flags)
    elif options.export:
        export_samples(*options.export, options.flat)
    else:
        need(options.runs, "nothing to evaluate: name folders of runs (see --help)")
        judge_runs(options)


def judge_runs(options):
    """Reads the runs, judges them anew if asked to, and shows them as text, CSV and figures."""
    runs = [read_run(folder) for folder in dict.fromkeys(map(os.path.normpath, options.runs))]
    task, *others = sorted({run["config"]["task"] for run in runs})
    need(not others, f"runs of different tasks cannot stand in one table: {', '.join([task, *others])}")
    need(task != "toy" or not options.reward, "--reward is another judge for --task imdb; toy's is a formula")
    need(options.figures or not (options.curves or options.against), "--curves, --against: pass --figures")
    need(not options.curves or any(curve(run, "kl_to_bon") for run in runs),
         "--curves: none of these runs measured its distance to Best-of-N in training")
    group_seeds(runs)  # refuses what cannot stand in one table, before work
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


def draw_figures(start, task, runs, groups, options):
    """The figures that these runs and options allow; `start` is the start of their paths."""
    if options.temperatures:
        plot_against(f"{start}-temperatures.png", task, groups, "temperature", "sampling temperature")
    elif options.against:
        key, name, label = options.against, "against-" + options.against.replace("/", "-"), options.against
        if key == "seconds_sampling":
            name, label = "M", "seconds to draw and score π_ref's samples"
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


def parse_options(argv):
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.error = vbon.refuse
    add = parser.add_argument
    add("runs", nargs="*", help="folders of finished runs of one task")
    add("--csv", metavar="FILE", help="write every run as a row")
    add("--figures", metavar="DIR", help="draw the figures that these runs allow into this folder")
    add("--curves", action="store_true", help="draw the distance to Best-of-N in training instead")
    add("--against", metavar="KEY", help="draw reward and win rate against this key of result.json instead")
    add("--responses", metavar="K", type=int, default=0, help="show the responses to K test prompts")
    add("--temperatures", metavar="T", type=float, nargs="+", default=[], help="draw anew at these")
    add("--reward", metavar="DIR", help="judge by this reward model")
    add("--export", metavar=("FILE", "THEIRS"), nargs=2, help="write a file of samples as the authors' lines")
    add("--flat", action="store_true", help="with --export: a line for each response")
    add("--import-samples", metavar=("THEIRS", "FILE"), nargs=2, help="the way back; -- flags of vbon.py")
    return parser.parse_args(argv)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    return vbon.run_script("evaluate.py", lambda: evaluate(parse_options(argv[:split]), argv[split + 1:]))


if __name__ == "__main__":
    sys.exit(main())
