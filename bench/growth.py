#!/usr/bin/env python3
"""Measure time and peak memory while rollouts, response length, layers or M grow by four.

    python bench/growth.py --threads 1 --csv results/bench-growth.csv

One of the four grows at a time. The models have random weights and grow in layers, not in width.
Each measurement is a process of its own, because peak memory belongs to a process. It samples and
scores M reference samples for four prompts, then runs PPO iterations with them; the first one is a
warm-up. On a CPU memory is resident memory, libraries included, and "start MB" is its value before
models are loaded.
"""
import argparse
import json
import os
import statistics
import sys
import time

import common
import vbon

STEPS = {"rollouts": (32, 128, 512), "response length": (10, 40, 160), "layers": (1, 4, 16),
         "M": (50, 200, 800)}
MIDDLE = {name: values[1] for name, values in STEPS.items()}


def measure(point, options):
    """Measure one point in this process: seconds of sampling and of an iteration, peak memory."""
    options.rollouts, options.max_new_tokens = point["rollouts"], point["response length"]
    start = common.memory_mb(options.device, peak=False)
    with common.temporary_folder() as folder:
        size = (point["layers"], *common.SIZES[options.size][1:])
        flags = [*common.flags_of(options, folder, size), "--train-prompts", "4",
                 "--unfrozen-layers", str(options.unfrozen_layers)]
        l = common.learner(flags, point["M"])
        clock = time.perf_counter()
        l.ref_rewards = vbon.reference_samples(l.task, l.args)
        sampling = time.perf_counter() - clock
        sampled = common.memory_mb(options.device)
        seconds = [common.iteration(l)["seconds"] for _ in range(options.rounds + 1)][1:]
    return {"parameters": sum(p.numel() for p in l.task.ref.parameters()), "sampling s": sampling,
            "iteration s": statistics.median(seconds), "iteration low": min(seconds),
            "iteration high": max(seconds), "start MB": start, "MB after sampling": sampled,
            "peak MB": common.memory_mb(options.device)}


def in_a_process(point):
    """Run `measure` in another process with the flags of this one."""
    flags = [*sys.argv[1:], "--point", json.dumps(point)]
    return common.Side(str(point), [sys.executable, os.path.abspath(__file__), *flags]).first


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--unfrozen-layers", type=int, default=-1, help="as in vbon.py [-1]")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.set_defaults(rounds=3)
    options = common.parse(parser)
    if options.ref:
        raise vbon.UserError("models of several sizes have random weights: pass no --ref")
    if options.point:
        answer = common.answers()
        return answer(measure(json.loads(options.point), options))

    middle, rows = in_a_process(MIDDLE), []
    for name, values in STEPS.items():
        before = None
        for value in values:
            m = middle if value == MIDDLE[name] else in_a_process(MIDDLE | {name: value})
            rows.append({"grows": name, "to": value} | m)
            for key in ("sampling s", "iteration s", "peak MB"):
                rows[-1][f"{key} ×"] = m[key] / before[key] if before else None
            before = m
            print(f"{name} {value}: {m['iteration s']:.2f} s", file=sys.stderr)

    machine = common.machine(options.device)
    middle = ", ".join(f"{name} {value}" for name, value in MIDDLE.items())
    print(f"\n{machine}; {options.dtype}; --unfrozen-layers {options.unfrozen_layers}; otherwise "
          f"{middle}; × over the row above")
    hidden = ("iteration low", "iteration high")
    common.table([{key: row[key] for key in row if key not in hidden} for row in rows])
    common.write_csv(options.csv, rows, dtype=options.dtype, machine=machine,
                     unfrozen_layers=options.unfrozen_layers)


if __name__ == "__main__":
    common.run(main)
