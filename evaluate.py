#!/usr/bin/env python3
"""Test trained policies: reward, win rate, KL to the reference model and to Best-of-N.

    python evaluate.py runs/imdb-*                        # table: mean ± standard error over seeds
    python evaluate.py runs/imdb-* --csv FILE --figures DIR
    python evaluate.py runs/imdb-* --responses 3          # show sampled responses (Table 2)
    python evaluate.py runs/imdb-* --temperatures .5 1    # other sampling temperatures (Figure 5)
    python evaluate.py runs/imdb-* --reward DIR           # another reward model as the evaluator
    python evaluate.py runs/toy-*                         # toy: the exact numbers of training
    python evaluate.py --export samples/imdb-… FILE       # reference samples as JSON lines

Each policy samples responses to the test prompts. They are scored, and ranked among reference
samples of the same prompts. Each test is cached in the run's folder as eval-<hash>.json.
results/curves.py plots training curves.
"""
import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import bon_baselines
import vbon
from vbon import UserError, bon_kl, bon_win_rate

METHODS = {"vbon": "vBoN", "bound": "L bound", "bound1": "L1 bound", "rlhf": "PPO", "dpo": "DPO",
           "bonbon": "BoNBoN", "bon-sft": "BoN-SFT", "bond": "BOND", "bon": "BoN"}
METRICS = {"reward": "reward", "win_rate": "win rate", "kl_to_ref": "KL to π_ref",
           "kl_to_bon": "KL to π_bon", "effective_N": "effective N", "excess_kl": "excess KL"}
COLUMNS = METRICS | {"exact/" + key: "exact " + label for key, label in METRICS.items()} | {
    "in/reward": "in-distribution reward", "in/win_rate": "in-distribution win rate",
    "out/reward": "out-of-distribution reward", "out/win_rate": "out-of-distribution win rate"}

BELOW = {"ncols": 3, "columnspacing": 1, "handletextpad": 0.3, "loc": "upper center",
         "bbox_to_anchor": (0.5, -0.16)}  # place of a legend
DOUBLINGS = [2.0 ** i for i in range(-9, 30)]  # ticks of an axis of N

# Settings of the machine and of files. They do not change what a run computes.
MACHINE = {"device", "backend", "sample_batch", "samples", "out", "overwrite", "resume",
           "save_every"}

# The models and prompts of a test depend on these settings of a run.
TASK_SETTINGS = ("task", "ref", "reward", "dataset", "no_eos_reward", "max_new_tokens", "data_seed",
                 "dtype", "backend")

# ========== 1. Metrics of sampled responses ======================================================

def policy_log_F(k, M):
    """Estimate E[log F] of a policy, in nats: values (...) whose mean is the estimate.

    If y is from Best-of-a, F(y) is Beta(a, 1) and E[log F | k] = ψ(k+a) − ψ(M+a+1). Here a is the
    `effective_N` of the estimate, at most 10 M. With a = 1, which is right for π_ref, the mean of a
    better policy is too low by about 1/M. Ties add a bias: if a fifth of the rewards are equal,
    π_ref gets an effective N of 1.07. Args: k, mid-ranks among M reference rewards (...), float64.
    """
    a = 1.0
    for _ in range(200):
        log_F = torch.digamma(k + a) - torch.digamma(torch.full_like(k, M + a + 1))
        a = vbon.effective_N(log_F.mean()).clamp(0.1, 10 * M)
    # A better response also raises a. The stretch accounts for that in the standard error.
    trigamma = torch.polygamma(1, k + a) - torch.polygamma(1, torch.full_like(k, M + a + 1))
    return log_F.mean() + (log_F - log_F.mean()) / (1 - a ** 2 * trigamma.mean())


def bon_metrics(kls, k, M, N):
    """Metrics of a policy relative to Best-of-N: values per response, with the mean and, to first
    order, the standard error of each metric. Args: kls in nats and mid-ranks k, both (...)."""
    log_F = policy_log_F(k, M)
    a = vbon.effective_N(log_F.mean()).item()
    # The excess has its minimum at a, so the error of a does not count.
    return {"log_f": log_F, "effective_N": a + a ** 2 * (log_F - log_F.mean()),
            "excess_kl": vbon.kl_to_bon(kls, log_F, a), "kl_to_bon": vbon.kl_to_bon(kls, log_F, N)}


def measure(task, responses, kls, ref_rewards, N):
    """Score responses to the test prompts and compute the metrics of their policy.

    Args:
        responses, kls: P·R texts, grouped by prompt, and KL(π_θ ‖ π_ref) along each in nats.
        ref_rewards: (P, M), rewards of reference samples of the prompts.
    Returns:
        {metric: mean, metric_se: its standard error over prompts, None for P = 1}. Metrics are
        METRICS, "log_f", "ref/reward"; for tldr also "in/" (training subreddits) and "out/".
        P·R rows {"prompt", "response", "reward", "kl_to_ref", "ref_reward": the prompt's mean}.
    """
    P, M = ref_rewards.shape
    prompts = [prompt for prompt in task.prompts for _ in range(len(responses) // P)]
    rewards = task.score(prompts, responses)
    scores, kl = (torch.tensor(x, dtype=torch.double).view(P, -1) for x in (rewards, kls))
    k = vbon.mid_ranks(scores, ref_rewards.unsqueeze(1))

    inside = [str(p).startswith(vbon.TLDR_SUBREDDITS) for p in task.prompts]
    outside = [str(p).startswith("SUBREDDIT") and not x for p, x in zip(task.prompts, inside)]
    parts, metrics = {"": [True] * P, "in/": inside, "out/": outside}, {}
    for part, rows in [(part, rows) for part, rows in parts.items() if any(rows)]:
        values = {"reward": scores[rows], "win_rate": k[rows] / M, "kl_to_ref": kl[rows],
                  **bon_metrics(kl[rows], k[rows], M, N), "ref/reward": ref_rewards[rows]}
        for name, x in values.items():
            x, n = x.mean(1), sum(rows)
            metrics[part + name] = x.mean().item()
            metrics[f"{part}{name}_se"] = (x.std() / math.sqrt(n)).item() if n > 1 else None

    means = ref_rewards.mean(1).repeat_interleave(scores.shape[1]).tolist()
    names = ("prompt", "response", "reward", "kl_to_ref", "ref_reward")
    return metrics, [dict(zip(names, row)) for row in zip(prompts, responses, rewards, kls, means)]


# ========== 2. Testing a run: sample, score, measure, cache ======================================

@torch.no_grad()
def sample_policy(policy, task, args, R, seed):
    """Sample R responses per test prompt. Returns P·R texts, grouped by prompt, and KL(π_θ ‖ π_ref)
    along each in nats."""
    generator, responses, kls = torch.Generator(args.device).manual_seed(seed), [], []
    size = max(1, args.sample_batch // R)
    for start in tqdm(range(0, len(task.prompts), size), desc="test responses", leave=False):
        prompts = task.prompts[start:start + size]
        shape = len(prompts) * R, args.max_new_tokens
        uniforms = torch.rand(shape, generator=generator, device=args.device)
        with vbon.autocast(args):
            rollout = vbon.generate(policy, [task.encode(p) for p in prompts], uniforms, task.eos,
                                    args.temperature)
            for rows in torch.arange(len(uniforms), device=args.device).split(args.minibatch):
                kls += response_kls(policy, task.ref, rollout[rows], args.temperature).tolist()
        prompts = [prompt for prompt in prompts for _ in range(R)]
        responses += vbon.decode(task, prompts, vbon.token_lists(rollout))
    return responses, kls


def response_kls(policy, ref, batch, temperature):
    """KL(π_θ ‖ π_ref) of the next token, summed over the tokens of each response: (B,), nats. The
    log-ratio of the sampled tokens has the same mean, but a much higher variance."""
    inputs = batch.input_ids, batch.attention_mask, batch.tokens.shape[1], temperature
    log_pi, log_ref = (vbon.forward(lm, *inputs)[0].log_softmax(-1) for lm in (policy, ref))
    kl = torch.sum(log_pi.exp() * (log_pi - log_ref), -1)
    return torch.where(batch.mask, kl, 0.0).sum(1)


@functools.lru_cache(maxsize=1)
def load_task(settings, device, reward):
    """Load the test task of settings, given as pairs. Returns the task, the task with another
    reward if there is one, and the resolved device and backend."""
    args = argparse.Namespace(**dict(settings), device=device, temperature=1.0, unfrozen_layers=-1,
                              minibatch=32)
    task = evaluator = vbon.setup(args, split="test")
    if reward:
        score, key = vbon.load_reward(reward, args.device, task.end, args.no_eos_reward, args.dtype)
        evaluator = dataclasses.replace(task, score=score, reward_id=key)
    return task, evaluator, {"device": args.device, "backend": args.backend}


@functools.cache
def hash_folder(name):
    """Hash of the files in a model folder or of a Python file. A hub name stands for itself."""
    script = name.rpartition(":")[0]
    paths = [Path(script)] if script.endswith(".py") else sorted(Path(name).glob("*"))
    files, digest = [path for path in paths if path.is_file()], hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16] if files else name


def evaluate_run(run, options, temperature=None):
    """Test a run of `read_run`, or read its cached test, which loads no model. Returns the run with
    its metrics added to "result", and the rows of `measure` as "samples"."""
    config, folder = run["config"], run["folder"]
    if config["task"] == "toy":  # result.json has its exact metrics
        return run
    temperature = float(temperature or config["temperature"])
    settings = run["settings"] | {
        "test_prompts": options.test_prompts,
        "backend": "hand" if config["backend"] == "hand" else "auto"}  # vLLM needs a GPU

    # The file is named by a hash of everything that the test depends on.
    key = settings | {
        "temperature": temperature, "test_M": options.test_M, "responses": options.test_responses,
        "seed": options.seed, "objective": config["objective"], "N": config["N"],
        "policy": hash_folder(f"{folder}/policy") if config["objective"] != "bon" else None,
        "ref": hash_folder(config["ref"]), "trained_reward": hash_folder(config["reward"]),
        "reward": hash_folder(options.reward or config["reward"])}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = Path(folder, f"eval-{digest[:12]}.json")

    if not path.exists():
        tested = {"key": key} | test_policy(run, settings, options, temperature)
        vbon.atomic_write(path, json.dumps(tested, ensure_ascii=False) + "\n")
    with vbon.loading(f"cannot read {path} (remove it to test the run again)"):
        tested = json.loads(path.read_text("utf-8"))
        result = run["result"] | tested["metrics"] | {"temperature": temperature}
    label = f", T = {temperature:g}" if options.temperatures else ""
    if options.reward:
        result["evaluator"] = options.reward
        label += f", evaluator {Path(options.reward).name}"
    return run | {"result": result, "samples": tested["samples"], "label": label}


def test_policy(run, settings, options, temperature):
    """Sample responses of a run's policy, or of Best-of-N, and `measure` them."""
    config, R = run["config"], options.test_responses
    task, evaluator, machine = load_task(tuple(settings.items()), options.device, options.reward)
    args = argparse.Namespace(**config | machine | {
        "temperature": temperature, "M": options.test_M,
        "samples": options.samples or config["samples"]})
    if options.reward:
        rescore(task, evaluator, args)
    ref_rewards = vbon.reference_samples(evaluator, args)

    if args.objective == "bon":
        # Best-of-N selects by its own reward, even if another one evaluates it.
        own_rewards = vbon.reference_samples(task, args)
        responses, kls = bon_baselines.sample_best(task, own_rewards, args, R, options.seed)
    else:
        folder = f"{run['folder']}/policy"
        policy = vbon.load_model("policy", folder, args.device)[0]
        responses, kls = sample_policy(policy, task, args, R, options.seed)
    metrics, samples = measure(evaluator, responses, kls, ref_rewards, args.N)
    if args.objective == "bon" and not options.reward and args.N <= args.M:
        expected = bon_baselines.expected_best_of_n(ref_rewards, int(args.N))
        metrics["bon/expected_reward"] = expected.mean().item()
    return {"metrics": metrics, "samples": samples}


def rescore(task, evaluator, args):
    """Score the task's cached reference samples with the evaluator's reward, into its folder."""
    (source, _), (target, header) = (vbon.samples_folder(by, args) for by in (task, evaluator))
    missing = {path.name for path in source.glob("*.jsonl") if not (target / path.name).exists()}
    for name in tqdm(sorted(missing), desc="rescore reference samples", leave=False):
        with vbon.loading(f"cannot read {source / name} (remove it to sample again)"):
            rows = [*map(json.loads, (source / name).open(encoding="utf-8"))]
            pairs = [(row["prompt"], response) for row in rows for response in row["responses"]]
        rewards = iter(evaluator.score(*map(list, zip(*pairs))))
        rows = [row | {"rewards": [next(rewards) for _ in row["responses"]]} for row in rows]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        vbon.atomic_write(target / "header.json", header)
        vbon.atomic_write(target / name, "".join(lines))


def evaluate_runs(runs, options):
    """Test all runs, at each of --temperatures. Runs with the same models follow each other."""
    load_task.cache_clear()
    hash_folder.cache_clear()
    runs = sorted(runs, key=lambda run: str(run["settings"]))
    jobs = [(run, temperature) for run in runs for temperature in options.temperatures or [None]]
    bar = tqdm(jobs, desc="test", unit="run", leave=False)
    with contextlib.redirect_stdout(sys.stderr), bar:  # stdout has the table only
        return [evaluate_run(run, options, temperature) for run, temperature in bar]


# ========== 3. Reading and grouping runs =========================================================

def read_run(folder):
    """Read a finished run into a dict. `evaluate_run` sets its label and samples."""
    with vbon.loading(f"{folder} is not a finished run of this version (train it again)"):
        config, result = (json.loads(Path(folder, name).read_text("utf-8"))
                          for name in ("config.json", "result.json"))
        method = METHODS[config["objective"]]
        lines = [] if method == "BoN" else Path(folder, "metrics.jsonl").open(encoding="utf-8")
        # The setting that determines how far a method moves from the reference model.
        symbol, strength = ("β", config["beta"]) if method in ("PPO", "DPO") else ("N", config["N"])
        if method == "BOND":
            symbol, strength = "steps", config["episodes"] // config["minibatch"]
        return {"folder": str(folder), "config": config, "result": result, "method": method,
                "name": f"{method}, {symbol} = {strength:.5g}", "strength": strength, "label": "",
                "metrics": [*map(json.loads, lines)], "samples": [],
                "settings": {name: config[name] for name in TASK_SETTINGS}}


def read_runs(options):
    """Read the runs of the command line. Unfinished ones are skipped with a warning."""
    finished = {f: Path(f, "result.json").exists() for f in map(os.path.normpath, options.runs)}
    for folder in [folder for folder in finished if not finished[folder]]:
        print(f"warning: skipped {folder}, which has no result.json", file=sys.stderr)
    runs = [read_run(folder) for folder in finished if finished[folder]]
    if not runs:
        raise UserError("no finished run: pass folders such as runs/* after training")
    tasks = sorted({run["config"]["task"] for run in runs})
    if len(tasks) > 1:
        raise UserError(f"runs must be of one task, got {' and '.join(tasks)}")
    if tasks == ["toy"] and (options.temperatures or options.reward or options.responses):
        raise UserError("the toy is exact: leave out --temperatures, --reward and --responses")
    group_seeds(runs)  # refuses before any sampling
    return runs


def group_seeds(runs):
    """Group runs that differ only in their seeds: [(readable name, runs)], ordered by method."""
    def order(run):
        return list(METHODS.values()).index(run["method"]), run["strength"], run["config"]["M"]
    groups = {}
    for run in sorted(runs, key=order):
        name, ignored = run["name"], {"seed", "data_seed", "kl_coef"} | MACHINE
        ppo_without_samples = run["method"] == "PPO" and not run["config"].get("prefix_critic")
        if ppo_without_samples or run["method"] in ("BoN", "BOND"):
            ignored |= {"M", "estimator"}  # these methods do not estimate F
        else:
            name += f", M = {run['config']['M']}"
        settings = frozenset((k, str(v)) for k, v in run["config"].items() if k not in ignored)
        groups.setdefault((name + run["label"], settings), []).append(run)

    named = []
    for (name, settings), members in groups.items():
        # Rows of the same name also show the settings in which they differ.
        common = frozenset.intersection(*(s for n, s in groups if n == name))
        name = ", ".join([name, *(f"{k} = {v}" for k, v in sorted(settings - common))])
        named.append((name, members))
        seeds = {(run["config"]["seed"], run["config"]["data_seed"]) for run in members}
        if len(seeds) < len(members):
            raise UserError("runs of the same settings need different seeds, got "
                            + ", ".join(run["folder"] for run in members))
    return named


def mean_and_error(runs, key):
    """Mean over runs and its standard error, which is over prompts for a single run."""
    key = "exact/" + key if "exact/" + key in runs[0]["result"] else key
    values = [run["result"][key] for run in runs]
    if len(values) == 1:
        return values[0], runs[0]["result"].get(key + "_se")
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def point(run, value):
    """(KL to π_ref, value) of a run."""
    return mean_and_error([run], "kl_to_ref")[0], mean_and_error([run], value)[0]


def pareto_front(points):
    """Whether each point (cost, value) is on the Pareto front: no other one dominates it."""
    return [not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
            for cost, value in points]


def front_shares(runs, value):
    """{method: its share of the points on the common Pareto front}, without BoN."""
    points = dict.fromkeys((r["method"], point(r, value)) for r in runs if r["method"] != "BoN")
    on_front = pareto_front([place for _, place in points])
    winners = [method for (method, _), wins in zip(points, on_front) if wins]
    return {method: winners.count(method) / len(winners) for method, _ in points}


# ========== 4. Tables and figures ================================================================

def aligned(rows):
    """Format rows of strings as a text table, the first column left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
                     for row in rows)


def table(groups):
    """Format groups as a table. The last rows are the closed forms of Best-of-N."""
    runs = [run for _, members in groups for run in members]
    keys = [key for key in COLUMNS if any(key in run["result"] for run in runs)]

    def cell(members, key):
        if not all(key in run["result"] for run in members):
            return ""
        mean, error = mean_and_error(members, key)
        return f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}")
    rows = [["", "seeds", *(COLUMNS[key] for key in keys)]]
    for name, members in groups:
        rows.append([name, str(len(members)), *(cell(members, key) for key in keys)])

    best = [run for run in runs if run["method"] == "BoN"] or [
        run for run in runs if run["method"] not in ("PPO", "DPO", "BOND")]
    for N in sorted({run["strength"] for run in best}):
        closed = {"win_rate": f"{bon_win_rate(N):.3f}", "kl_to_ref": f"≤ {bon_kl(N):.3f}",
                  "kl_to_bon": "0", "effective_N": f"{N:.5g}", "excess_kl": "0"}
        cells = (closed.get(key.removeprefix("exact/"), "") for key in keys)
        rows.append([f"BoN, N = {N:.5g}, closed forms", "", *cells])
    return aligned(rows)


def write_csv(path, runs):
    """Write one row per run: its folder, settings and results."""
    rows = [{"run": run["folder"]}
            | {"reward_model" if k == "reward" else k: x for k, x in run["config"].items()}
            | run["result"] for run in runs]
    names = dict.fromkeys(name for row in rows for name in row
                          if name not in MACHINE and not name.startswith(("ppo/", "time/")))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    vbon.atomic_write(path, text.getvalue())


def show_responses(groups, R, number):
    """Print a response of each group to the first test prompts (Table 2)."""
    width = max(len(name) for name, _ in groups)
    for first in groups[0][1][0]["samples"][::R][:number]:
        prompt = first["prompt"]
        prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        print(f"\n{prompt}\n  reference samples: mean reward {first['ref_reward']:.2f}")
        for name, runs in groups:
            for s in [s for s in runs[0]["samples"] if s["prompt"] == first["prompt"]][:1]:
                print(f"  {name:<{width}}  reward {s['reward']:.2f}, KL {s['kl_to_ref']:.2f} nats: "
                      + s["response"].replace("\n", " ").strip())


def export_samples(folder, path):
    """Write a samples folder as lines {"prompt", "responses", "rewards"}, the authors' format."""
    if "converted" in Path(folder, "header.json").read_text("utf-8"):
        raise UserError(f"--export needs responses, got the converted rewards of {folder}")
    samples = vbon.read_samples(folder, ("responses", "rewards"))
    rows = [{"prompt": json.loads(prompt)} | columns for prompt, columns in samples.items()]
    vbon.atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path}: {sum(len(row['rewards']) for row in rows):,} samples of {len(rows):,} prompts")


@contextlib.contextmanager
def picture(path, title, panels, **legend):
    """Yield a row of axes to plot into, then add the legends and write the figure."""
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
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(path)


def set_ticks(axis, values):
    """Set ticks at the values that are in view, as plain numbers."""
    low, high = axis.get_view_interval()
    seen = [x for x in values if low <= x <= high]
    axis.set_ticks(seen, [f"{x:g}" for x in seen])
    axis.set_ticks([], minor=True)


def scatter(axes, runs, x, y, shares):
    """Plot a point per run, with error bars where a metric is estimated. Given {method: share of
    the front}, the legend shows it, and points off their method's own front are faded."""
    for i, method in enumerate(METHODS.values()):
        found = [(*mean_and_error([run], x), *mean_and_error([run], y))
                 for run in runs if run["method"] == method]
        marker, color = ("x", "black") if method == "BoN" else ("o", f"C{i}")
        style = {"fmt": marker, "color": color, "ms": 5, "lw": 0.8}
        on_front = pareto_front([(a, b) for a, _, b, _ in found])
        for (a, a_error, b, b_error), best in zip(found, on_front):
            axes.errorbar(a, b, b_error, a_error, **style, alpha=1 if best or not shares else 0.25)
        if found:
            share = f" ({100 * shares[method]:.0f} % of the front)" if method in shares else ""
            axes.errorbar([], [], **style, label=method + share)


def plot_front(path, title, runs):
    """Plot win rate and reward against KL, beside Best-of-N (Figures 2, 6 and 7)."""
    labels = {"win_rate": "win rate against π_ref", "reward": "mean reward"}
    with picture(path, title, 2, **BELOW) as panels:
        for axes, value in zip(panels, labels):
            scatter(axes, runs, "kl_to_ref", value, front_shares(runs, value))
            # The reward of Best-of-N has no closed form. A line connects its measured points.
            line, name = sorted(point(r, value) for r in runs if r["method"] == "BoN"), None
            if value == "win_rate":
                Ns, name = [1.1 ** i for i in range(80)], "BoN, closed forms"
                line = [(bon_kl(N), bon_win_rate(N)) for N in Ns if bon_kl(N) <= axes.get_xlim()[1]]
            axes.plot([kl for kl, _ in line], [y for _, y in line], color="black", lw=1, label=name)
            # A square-root scale shows N from 1 to 512 and outliers of tens of nats.
            axes.set_xscale("function", functions=(lambda x: x.clip(0) ** 0.5, lambda x: x ** 2))
            axes.set_xlim(left=0)
            axes.set(xlabel="KL(π_θ ‖ π_ref), nats", ylabel=labels[value])
            set_ticks(axes.xaxis, (0, 0.1, 0.5, 1, 2, 3, 5, 10, 20, 30))


def plot_excess(path, title, runs):
    """Plot the KL to the closest Best-of-N against its N."""
    with picture(path, title, 1) as (axes,):
        scatter(axes, runs, "effective_N", "excess_kl", {})
        axes.axhline(0, color="black", lw=1, label="BoN, exact")
        axes.set(xscale="log", xlabel="effective N = −1 / E[log F]", ylabel="excess KL, nats")
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_ylim(min(-0.05, axes.get_ylim()[0]), 1.5 * axes.get_ylim()[1])
        low, high = (math.log2(N) for N in axes.get_xlim())
        axes.set_xlim(2 ** math.floor(low), 2 ** math.ceil(high))
        set_ticks(axes.xaxis, DOUBLINGS)


# ========== 5. Command line ======================================================================

def make_parser(description):
    """A parser with the flags of a test, to which the caller can add flags."""
    def error(message):
        raise UserError(message)
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = error
    parser.set_defaults(responses=0)
    add = parser.add_argument_group("test").add_argument
    add("runs", nargs="*", help="folders of finished runs of one task")
    add("--test-prompts", type=int, default=512, help="number of prompts of the test split")
    add("--test-M", type=int, default=200, help="number of reference samples per test prompt")
    add("--test-responses", type=int, default=8, help="number of sampled responses per test prompt")
    add("--temperatures", metavar="T", type=float, nargs="+", default=[],
        help="sampling temperatures of policy and reference model; by default training's")
    add("--reward", metavar="MODEL", help="another reward: hub name, folder or file.py:function")
    add("--seed", type=int, default=0, help="seed of the sampled responses")
    add("--samples", metavar="DIR", help="folder of cached reference samples; by default the run's")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    add("--figures", metavar="DIR", help="folder for the figures")
    return parser


def parse_options(parser, argv=None):
    """Parse argv and check ranges."""
    options = parser.parse_args(argv)
    least = {"test_prompts": 1, "test_M": 1, "test_responses": 1, "responses": 0, "seed": 0}
    for name, low in least.items():
        if (value := getattr(options, name)) < low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    if not all(0 < t < math.inf for t in options.temperatures):
        raise UserError(f"--temperatures must be above 0, got {options.temperatures}")
    if vbon.WORLD_SIZE > 1:
        raise UserError("evaluation runs in one process, got torchrun: start it with python")
    return options


def run_evaluation(options):
    """Test the runs and print the table. Write the CSV file, the figures and the export."""
    if options.export:
        export_samples(*options.export)
        if not options.runs:
            return
    if os.path.isdir(options.csv or ""):
        raise UserError(f"--csv must be a file, got the folder {options.csv}")
    runs = evaluate_runs(read_runs(options), options)
    task, groups = runs[0]["config"]["task"], group_seeds(runs)

    print(table(groups))
    if len({run["method"] for run in runs} - {"BoN"}) > 1 and not options.temperatures:
        win_rate, reward = (front_shares(runs, value) for value in ("win_rate", "reward"))
        rows = [[m, f"{win_rate[m]:.0%}", f"{reward[m]:.0%}"] for m in win_rate]
        print("\nshare of the Pareto front\n" + aligned([["", "win rate", "reward"], *rows]))
    show_responses(groups, options.test_responses, options.responses)
    if options.csv:
        write_csv(options.csv, runs)
    if options.figures:
        start, title = f"{options.figures}/{task}", "faded if not on its method's Pareto front"
        plot_front(f"{start}-pareto.png", f"{task}: one point per run, {title}", runs)
        bounds = [run for run in runs if run["method"] in ("vBoN", "L bound", "L1 bound")]
        if len({run["method"] for run in bounds}) > 1:
            plot_front(f"{start}-bound.png", f"{task}: vBoN (Eq. 5) and its lower bounds", bounds)
        plot_excess(f"{start}-excess.png", f"{task}: KL to the closest Best-of-N", runs)


def main(argv=None):
    def parse():
        parser = make_parser(__doc__.partition("\n\nEach")[0])
        add = parser.add_argument_group("output").add_argument
        add("--csv", metavar="FILE", help="file with one row per run")
        add("--responses", metavar="K", type=int, default=0, help="number of test prompts to show")
        add("--export", metavar=("SAMPLES", "FILE"), nargs=2, help="write samples as JSON lines")
        return parse_options(parser, argv)
    return vbon.run_script("evaluate.py", parse, run_evaluation)


if __name__ == "__main__":
    sys.exit(main())
