#!/usr/bin/env python3
"""Measure the cost of the objective: time of a PPO iteration of vBoN over rlhf, and N = 512 over 2.

    python bench/cost_of_N.py                                          # toy and random models
    python bench/cost_of_N.py --ref DIR --reward DIR --dataset DIR --threads 1 --csv FILE

log F̂ comes from ranks and the reward has a closed form, so no cost should grow with N. In each
round every objective runs one iteration on the same weights (the learning rate is almost zero),
prompts and random numbers, so that all sample the same responses. The order rotates. The table has
means of the ratios within a round, ± one standard error over rounds, in wall time and processor
time. The last two columns time log F̂ and the terminal reward alone.
"""
import itertools
import math
import statistics
import time

import torch

import common
import vbon

OBJECTIVES = {"rlhf": ("rlhf", 16)} | {f"vbon, N = {N}": ("vbon", N) for N in (2, 16, 512)}
RATIOS = (("vbon, N = 16", "rlhf"), ("vbon, N = 512", "rlhf"), ("vbon, N = 512", "vbon, N = 2"))


def measure(l, rounds):
    """Return {objective: [(wall time, processor time) of an iteration, one per round]}."""
    seconds, names = {name: [] for name in OBJECTIVES}, list(OBJECTIVES)
    for i in range(rounds + 1):  # the first one is a warm-up
        rows = list(itertools.islice(l.order, l.args.rollouts))
        for name in names[i % len(names):] + names[:i % len(names)]:
            objective, N = OBJECTIVES[name]
            l.generator.manual_seed(i)
            m = common.iteration(l, rows, objective=objective, N=N)
            seconds[name] += [(m["seconds"], m["processor"])] * (i > 0)
    return seconds


def seconds_of_reward(l, name, repeats=20):
    """Return the least seconds that log F̂ and the terminal reward of one iteration take."""
    l.args.objective, l.args.N = OBJECTIVES[name]
    rows, least = list(itertools.islice(l.order, l.args.rollouts)), math.inf
    scores = torch.rand(len(rows), dtype=torch.double)
    log_p = -80 * torch.rand(len(rows), dtype=torch.double)
    for _ in range(repeats):
        start = time.perf_counter()
        vbon.terminal_reward(scores, l.ref_rewards[rows], log_p, l.args)
        least = min(least, time.perf_counter() - start)
    return least


def mean_and_error(values):
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.4f} ± {error:.4f}"


def rows_of(task, l, rounds):
    """Return the table's rows for one task."""
    seconds, rows = measure(l, rounds), []
    alone = {name: seconds_of_reward(l, name) for name in OBJECTIVES}
    for above, below in RATIOS:
        pairs = list(zip(seconds[above], seconds[below]))
        wall, cpu = ([a[i] / b[i] for a, b in pairs] for i in (0, 1))
        median = statistics.median(b[0] for _, b in pairs)
        more = 100 * (alone[above] - alone[below]) / median
        rows.append({"task": task, "iteration of": above, "over that of": below,
                     "seconds of that": median, "ratio, wall time": mean_and_error(wall),
                     "median": statistics.median(wall), "ratio, processor": mean_and_error(cpu),
                     "reward alone, µs": 1e6 * alone[above],
                     "more of the iteration": f"{more:+.3f} %"})
    return rows


def main():
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=("toy", "imdb"), default=["toy", "imdb"], help="[both]")
    add("--M", type=common.positive, default=200, help="reference samples per prompt [200]")
    parser.set_defaults(rounds=12)
    options = common.parse(parser)
    if options.rounds < 2:
        raise vbon.UserError(f"--rounds must be at least 2, got {options.rounds}")

    rows = []
    with common.temporary_folder() as folder:
        for task in options.tasks:
            flags = ["--task", "toy", "--device", options.device, "--dtype", options.dtype,
                     "--out", f"{folder}/run"]
            if task == "imdb":
                flags = common.flags_of(options, folder)
            l = common.learner([*flags, "--lr", "1e-12"], options.M)
            rows += rows_of(task, l, options.rounds)
    machine = common.machine(options.device)
    print(f"\n{machine}; M = {options.M}; {options.rounds} rounds, ± one standard error")
    common.table(rows)
    common.write_csv(options.csv, rows, rounds=options.rounds, M=options.M, machine=machine)


if __name__ == "__main__":
    common.run(main)
