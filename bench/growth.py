#!/usr/bin/env python3
"""How time and peak memory grow when the rollouts, the length of responses, the model or M grow four-fold, one at a time.

    python bench/growth.py --threads 1 --csv results/bench-growth.csv

The models have random weights; their layers, not their width, grow four-fold. Each measurement is a process of its own, so that
peak memory is its own: it draws and scores M samples of π_ref for four prompts, then runs PPO phases with them, of which the first
warms up. On a CPU memory is resident memory, libraries included ("start": before the models); on a GPU what torch allocated.
"""
import json
import os
import statistics
import subprocess
import sys
import time

import common
import vbon

STEPS = {"rollouts": (32, 128, 512), "response length": (10, 40, 160), "layers": (1, 4, 16), "M": (50, 200, 800)}
MIDDLE = {name: values[1] for name, values in STEPS.items()}


def measure(point, options):
    """One process's answer: seconds of sampling and of a phase, peak memory."""
    options.rollouts, options.max_new_tokens = point["rollouts"], point["response length"]
    size = options.size or ("gpt2" if vbon.pick_device(options.device).type == "cuda" else "mini")
    start = common.memory_mb(False)
    with common.temporary_folder() as folder:
        flags = common.pieces(options, folder, (point["layers"], *common.SIZES[size][1:]))
        l = common.learner([*flags, "--train-prompts", "4", "--test-prompts", "1", "--test-M", "1", "--unfrozen-layers",
                            str(options.unfrozen_layers)], point["M"])
        clock = time.perf_counter()
        drawn = vbon.reference_samples(l.task, l.args, l.device)
        sampling = time.perf_counter() - clock
        l.ref_rewards = {prompt: rewards for (split, prompt), rewards in drawn.items() if split == "train"}
        after_sampling = common.memory_mb(True, l.device)
        seconds = [common.phase(l)["seconds"] for _ in range(options.rounds + 1)][1:]
        return {"parameters": sum(p.numel() for p in l.task.ref.parameters()), "sampling s": sampling, "phase s": statistics.median(seconds),
                "phase low": min(seconds), "phase high": max(seconds), "start MB": start, "MB after sampling": after_sampling,
                "peak MB": common.memory_mb(True, l.device), "machine": common.machine(l.device)}


def in_a_process(point):
    """`measure` in a process of its own, with this one's flags."""
    done = subprocess.run([sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--point", json.dumps(point)], capture_output=True, text=True)
    if done.returncode:
        raise vbon.UserError(f"{point}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--unfrozen-layers", type=int, default=-1, help="as in vbon.py [-1]")
    parser.add_argument("--point", help=common.argparse.SUPPRESS)
    parser.set_defaults(rounds=3)
    options = common.parse(parser)
    if options.ref:
        raise vbon.UserError("models of several sizes are needed: random ones, so without --ref, --reward and --dataset")
    if options.point:
        print(json.dumps(measure(json.loads(options.point), options)))
        return
    middle, rows = in_a_process(MIDDLE), []
    for name, values in STEPS.items():
        before = None
        for value in values:
            m = middle if value == MIDDLE[name] else in_a_process(MIDDLE | {name: value})
            rows.append({"grows": name, "to": value} | {key: m[key] for key in m if key != "machine"}
                        | {f"{key} ×": m[key] / before[key] if before else None for key in ("sampling s", "phase s", "peak MB")})
            before = m
            print(f"{name} {value}: {m['phase s']:.2f} s", file=sys.stderr)
    print(f"\n{middle['machine']}; {options.dtype}; --unfrozen-layers {options.unfrozen_layers}; otherwise "
          + ", ".join(f"{name} {value}" for name, value in MIDDLE.items()) + "; × over the row above")
    common.table([{key: x for key, x in row.items() if key not in ("phase low", "phase high")} for row in rows])
    common.write_csv(options.csv, rows, dtype=options.dtype, unfrozen_layers=options.unfrozen_layers, machine=middle["machine"])


if __name__ == "__main__":
    common.run(main)
