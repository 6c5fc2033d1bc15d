#!/usr/bin/env python3
"""What the objective costs: time of a PPO phase with --objective vbon over rlhf, with N = 512 over N = 2.

    python bench/cost_of_N.py                                          # toy and random models
    python bench/cost_of_N.py --ref DIR --reward DIR --dataset DIR --threads 1 --csv FILE

log F̂ is read off ranks and the reward is in closed form, so nothing should grow with N. In each round every
objective runs one phase on the same weights (the learning rate is next to zero), prompts and random numbers,
so that they draw the same responses; the order rotates. Shown are means of the ratios within a round, ± one
standard error over rounds, in time of the clock and of the processor. The last column is direct: the
microseconds of log F̂ and the terminal reward alone, as a share of the phase.
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
    """{objective: [(wall, processor seconds)]}, a phase in every round after the first, which warms up."""
    seen, names = {name: [] for name in OBJECTIVES}, list(OBJECTIVES)
    for i in range(rounds + 1):
        prompts = list(itertools.islice(l.stream, l.args.rollouts))
        for name in names[i % len(names):] + names[:i % len(names)]:
            objective, N = OBJECTIVES[name]
            l.generator.manual_seed(i)
            m = common.phase(l, prompts, objective=objective, N=N)
            seen[name] += [(m["seconds"], m["processor"])] * (i > 0)
    return seen


def seconds_of_reward(l, name, repeats=20):
    """Seconds of log F̂ and the terminal reward of one phase, alone; the least of `repeats`."""
    l.args.objective, l.args.N = OBJECTIVES[name]
    prompts, least = list(itertools.islice(l.stream, l.args.rollouts)), math.inf
    ref_rewards = torch.stack([l.ref_rewards[p] for p in prompts])
    scores, log_p = torch.rand(2, len(prompts), dtype=torch.double) * torch.tensor([[1.0], [-80.0]])
    for _ in range(repeats):
        start = time.perf_counter()
        vbon.terminal_reward(scores, vbon.log_F_of(scores, ref_rewards, l.args), log_p, l.args)
        least = min(least, time.perf_counter() - start)
    return least


def mean_pm(values):
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def rows_of(task, l, rounds):
    """The table's rows for one task."""
    seen, rows = measure(l, rounds), []
    alone = {name: seconds_of_reward(l, name) for name in OBJECTIVES}
    for above, below in RATIOS:
        wall, cpu = ([a[i] / b[i] for a, b in zip(seen[above], seen[below])] for i in (0, 1))
        phase = statistics.median(a[0] for a in seen[below])
        rows.append({"task": task, "phase of": above, "over that of": below, "seconds of that": phase,
                     "ratio, clock": mean_pm(wall), "median": statistics.median(wall),
                     "ratio, processor": mean_pm(cpu), "reward alone, µs": 1e6 * alone[above],
                     "more of the phase": f"{100 * (alone[above] - alone[below]) / phase:+.3f} %"})
    return rows


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=("toy", "imdb"), default=["toy", "imdb"], help="[both]")
    parser.add_argument("--M", type=common.positive, default=200, help="samples of π_ref per prompt [200]")
    parser.set_defaults(rounds=12)
    options = common.parse(parser)
    vbon.need(options.rounds >= 2, "--rounds must be at least 2 for a standard error")
    rows = []
    with common.temporary_folder() as folder:
        for task in options.tasks:
            flags = ["--task", "toy", "--device", options.device, "--dtype", options.dtype]
            if task == "imdb":
                flags = common.flags_of(options, folder)
            rows += rows_of(task, common.learner([*flags, "--lr", "1e-12"], options.M), options.rounds)
    machine = common.machine(options.device)
    print(f"\n{machine}; M = {options.M}; {options.rounds} rounds, ± one standard error")
    common.table(rows)
    common.write_csv(options.csv, rows, rounds=options.rounds, M=options.M, machine=machine)


if __name__ == "__main__":
    common.run(main)
