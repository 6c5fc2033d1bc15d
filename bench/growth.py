#!/usr/bin/env python3
"""How time and peak memory grow when rollouts, response length, the model or M grow four-fold, one at a time.

    python bench/growth.py --threads 1 --csv results/bench-growth.csv

The models have random weights; their layers, not their width, grow four-fold. Each measurement is a process
of its own, so that peak memory is its own: it draws and scores M samples of π_ref for four prompts, then runs
PPO phases with them, of which the first warms up. On a CPU memory is resident memory, libraries included
("start": before the models); on a GPU what torch allocated.
"""
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
    """One process's answer: seconds of sampling and of a phase, peak memory."""
    options.rollouts, options.max_new_tokens = point["rollouts"], point["response length"]
    start = common.memory_mb(options.device, peak=False)
    with common.temporary_folder() as folder:
        flags = common.flags_of(options, folder, (point["layers"], *common.SIZES[options.size][1:]))
        l = common.learner([*flags, "--train-prompts", "4", "--test-prompts", "1", "--test-M", "1",
                            "--unfrozen-layers", str(options.unfrozen_layers)], point["M"])
        clock = time.perf_counter()
        drawn = vbon.reference_samples(l.task, l.args)
        sampling = time.perf_counter() - clock
        l.ref_rewards = {prompt: rewards for (split, prompt), rewards in drawn.items() if split == "train"}
        sampled = common.memory_mb(options.device)
        seconds = [common.phase(l)["seconds"] for _ in range(options.rounds + 1)][1:]
    return {"parameters": sum(p.numel() for p in l.task.ref.parameters()), "sampling s": sampling,
            "phase s": statistics.median(seconds), "phase low": min(seconds), "phase high": max(seconds),
            "start MB": start, "MB after sampling": sampled, "peak MB": common.memory_mb(options.device)}


def in_a_process(point):
    """`measure` in a process of its own, with this one's flags."""
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--point", json.dumps(point)]
    return common.Side(str(point), command).first


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--unfrozen-layers", type=int, default=-1, help="as in vbon.py [-1]")
    parser.add_argument("--point", help=common.argparse.SUPPRESS)
    parser.set_defaults(rounds=3)
    options = common.parse(parser)
    vbon.need(not options.ref, "models of several sizes are needed: random ones, so without --ref")
    if options.point:
        answer = common.answers()
        return answer(measure(json.loads(options.point), options))
    middle, rows = in_a_process(MIDDLE), []
    for name, values in STEPS.items():
        before = None
        for value in values:
            m = middle if value == MIDDLE[name] else in_a_process(MIDDLE | {name: value})
            rows.append({"grows": name, "to": value} | m)
            for key in ("sampling s", "phase s", "peak MB"):
                rows[-1][f"{key} ×"] = m[key] / before[key] if before else None
            before = m
            print(f"{name} {value}: {m['phase s']:.2f} s", file=sys.stderr)
    machine = common.machine(options.device)
    print(f"\n{machine}; {options.dtype}; --unfrozen-layers {options.unfrozen_layers}; otherwise "
          + ", ".join(f"{name} {value}" for name, value in MIDDLE.items()) + "; × over the row above")
    common.table([{key: row[key] for key in row if key not in ("phase low", "phase high")} for row in rows])
    common.write_csv(options.csv, rows, dtype=options.dtype, unfrozen_layers=options.unfrozen_layers,
                     machine=machine)


if __name__ == "__main__":
    common.run(main)
