#!/usr/bin/env python3
"""Measure each fast piece of vbon.py: time of a PPO iteration without it over the time with it.

    python bench/pieces.py                                         # random models
    python bench/pieces.py --ref DIR --reward DIR --dataset DIR --threads 1 --csv FILE
    python bench/pieces.py --tldr --threads 2 --rounds 3         # the frozen layers, tldr's shape

In each round one iteration runs with a piece and one without it, on the same weights (the learning
rate is almost zero), prompts and random numbers, so that both sample the same responses. The order
alternates, and ratios are taken within a round. "processor" is processor time, which depends less
on other programs. All layers are trained, except for the frozen layers' row, which trains two.
Pages of 2 MB are a setting of a whole process, so they are compared between two processes.

--tldr measures only the frozen layers, on a GPT-NeoX with random weights, 32 layers and 8 M
parameters: 32 prompts of 490 tokens, 53 sampled tokens, four epochs, two layers trained.
"""
import argparse
import json
import os
import random
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from unittest import mock

import torch
from transformers.activations import NewGELUActivation

import common
import vbon

M, RESPONSES = 64, 512  # samples per prompt and in total, to measure prompts that are read once
TIMES = ("iteration", *common.PARTS, "processor")
patched = partial(mock.patch.multiple, vbon)
generate, reference_log_probs = vbon.generate, vbon.reference_log_probs


# ---- replacements for the pieces ----------------------------------------------------------------


def without_frozen_hidden(ref, rollout, args):
    """Keep no output of the frozen layers, so that every pass of `update` computes them again."""
    all_layers = argparse.Namespace(**vars(args) | {"unfrozen_layers": -1})
    return reference_log_probs(ref, rollout, all_layers)


def second_pass(lm, prompts, uniforms, eos, temperature, value_head=None):
    """Compute log-probs and values in a pass after decoding."""
    rollout = generate(lm, prompts, uniforms, eos, temperature)
    for rows in torch.arange(len(uniforms)).split(32):
        mask = rollout.mask[rows]
        log_probs, hidden = vbon.response_log_probs(lm, rollout[rows], temperature)
        rollout.log_probs[rows] = torch.where(mask, log_probs, 0.0)
        rollout.values[rows] = torch.where(mask, value_head(hidden).squeeze(-1).float(), 0.0)
    return rollout


def repeated_prompts(lm, prompts, uniforms, *rest):
    """Read every prompt once per sample."""
    samples = len(uniforms) // len(prompts)
    return generate(lm, [p for p in prompts for _ in range(samples)], uniforms, *rest)


# ---- measurements -------------------------------------------------------------------------------


def iteration(l, i):
    """Measure one iteration on the prompts and random numbers of round i."""
    l.generator.manual_seed(i)
    common.reset_peak(l.args.device)
    rows = random.Random(i).choices(range(len(l.task.prompts)), k=l.args.rollouts)
    m = common.iteration(l, rows)
    return {"iteration": m["seconds"], **{part: m["time/" + part] for part in common.PARTS},
            "processor": m["processor"], "peak MB": common.memory_mb(l.args.device)}


def sampling(l, i):
    """Measure the sampling of M responses to each of a few prompts, reported as rollout."""
    device, size = l.args.device, (RESPONSES, l.args.max_new_tokens)
    uniforms = torch.rand(size, generator=l.generator.manual_seed(i), device=device)
    chosen = random.Random(i).choices(l.task.prompts, k=RESPONSES // M)
    prompts = [l.task.encode(p) for p in chosen]
    common.reset_peak(device)
    start, busy = common.clock(device), time.process_time()
    with vbon.autocast(l.args):
        vbon.generate(l.task.ref, prompts, uniforms, l.task.eos,
                      l.args.temperature)
    seconds = {"rollout": common.clock(device) - start, "processor": time.process_time() - busy}
    return dict.fromkeys(TIMES) | seconds | {"peak MB": common.memory_mb(device)}


FROZEN = "frozen layers run once, two layers trained"
PIECES = {  # number of trained layers, measurement, patch that removes the piece
    FROZEN: (2, iteration, patched(reference_log_probs=without_frozen_hidden)),
    "log-probs and values from decoding": (-1, iteration, patched(generate=second_pass)),
    f"a prompt read once for {M} samples": (-1, sampling, patched(generate=repeated_prompts)),
    "GELU in one pass": (
        -1, iteration, mock.patch.object(torch.nn.GELU, "forward", NewGELUActivation.forward)),
}


def measure(options, flags):
    """Measure all pieces, or the frozen layers with --tldr.

    Returns: {piece: [{True: measurement with it, False: without it}, one per round]}.
    """
    def rounds(turn):
        found = [{on: turn(on, i) for on in (i % 2 == 0, i % 2 == 1)}
                 for i in range(options.rounds + 1)]
        return found[1:]  # the first one is a warm-up

    def turn(l, run, without, on, i):
        with nullcontext() if on else without:
            return run(l, i)
    results = {}
    for layers in (2,) if options.tldr else (2, -1):
        l = common.learner([*flags, "--unfrozen-layers", str(layers)])
        results |= {piece: rounds(partial(turn, l, run, without))
                    for piece, (trained, run, without) in PIECES.items() if trained == layers}
    if sys.platform == "linux" and options.device == "cpu" and not options.tldr:
        threads = str(torch.get_num_threads())
        request = json.dumps([*flags, "--unfrozen-layers", "-1"])
        command = [sys.executable, os.path.abspath(__file__), "--threads", threads,
                   "--serve", request]
        sides = [common.Side("pages", command, {"THP_MEM_ALLOC_ENABLE": on}) for on in "01"]
        results["memory in pages of 2 MB"] = rounds(lambda on, i: sides[on].ask(i))
    return results


def serve(flags):
    """Run an iteration per line of stdin, which holds the number of the round."""
    answer = common.answers()
    l = common.learner(flags)
    answer("ready")
    for line in sys.stdin:
        answer(iteration(l, int(line)))


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--tldr", action="store_true", help="frozen layers at tldr's shape")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = common.parse(parser)
    if options.serve:
        return serve(json.loads(options.serve))
    if options.tldr and options.ref:
        raise vbon.UserError("--tldr has random models: pass it without --ref, --reward, --dataset")
    if options.tldr:
        options.rollouts, options.max_new_tokens = 32, 53
    with common.temporary_folder() as folder:
        shape = common.TLDR if options.tldr else {}
        flags = [*common.flags_of(options, folder, **shape), "--lr", "1e-12"]
        results = measure(options, flags)

    shown, rows = [], []
    for piece, found in results.items():
        columns = {"time without ÷ with": piece}
        for part in TIMES:
            ratios = [pair[False][part] / pair[True][part] for pair in found if pair[True][part]]
            columns[part] = common.spread(ratios) if ratios else None
        if options.tldr:
            medians = [statistics.median(pair[on]["iteration"] for pair in found)
                       for on in (False, True)]
            columns["seconds, without → with"] = "{:.1f} → {:.1f}".format(*medians)
        peak = [f"{statistics.median(pair[on]['peak MB'] for pair in found):.0f}"
                for on in (False, True)]
        shown.append(columns | {"peak MB, without → with": " → ".join(peak)})
        rows += [{"piece": piece, "round": i, "with": on} | pair[on]
                 for i, pair in enumerate(found) for on in pair]
    same = {"rollouts": options.rollouts, "max_new_tokens": options.max_new_tokens,
            "dtype": options.dtype, "machine": common.machine(options.device)}
    settings = "; ".join(f"{key} {value}" for key, value in same.items())
    print(f"\n{settings}; {options.rounds} rounds")
    common.table(shown)
    common.write_csv(options.csv, rows, **same)


if __name__ == "__main__":
    common.run(main)
