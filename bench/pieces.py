#!/usr/bin/env python3
"""What each fast piece of vbon.py brings: the time of a PPO phase without it over the time with it.

    python bench/pieces.py                                         # random models
    python bench/pieces.py --ref DIR --reward DIR --dataset DIR --threads 1 --csv results/bench-pieces.csv

In each round a phase runs with a piece and, next to it, one without, on the same weights (the learning rate
is next to zero), prompts and random numbers, so that both draw the same responses; which comes first
alternates. Ratios are taken round by round. "processor" is processor time, which other programs disturb less.
All layers are trained, but for the shared trunk, which is there with two. Pages of 2 MB, which torch sets up
for a whole process, are compared between two processes.
"""
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
from transformers import DynamicCache
from transformers.activations import NewGELUActivation

import common
import vbon

M, RESPONSES = 64, 512  # of what is sampled to measure what reading a prompt once brings
TIMES = ("phase", *common.PARTS, "processor")
generate, patched = vbon.generate, partial(mock.patch.multiple, vbon)


# What stands in for the pieces: generate and token_log_probs without them.
def without_trunk(lm, prompts, uniforms, eos, temperature, value_head=None, K=-1):
    return generate(lm, prompts, uniforms, eos, temperature, value_head)


def another_pass(lm, prompts, uniforms, eos, temperature, value_head=None, K=-1):
    rollout = generate(lm, prompts, uniforms, eos, temperature)
    for rows in torch.arange(len(uniforms)).split(32):
        log_probs, hidden, _ = vbon.response_log_probs(lm, rollout[rows], temperature)
        rollout.log_probs[rows] = torch.where(rollout.mask[rows], log_probs, 0.0)
        rollout.values[rows] = torch.where(rollout.mask[rows], value_head(hidden).squeeze(-1).float(), 0.0)
    return rollout


def repeated_prompts(lm, prompts, uniforms, *rest):
    return generate(lm, [p for p in prompts for _ in range(len(uniforms) // len(prompts))], uniforms, *rest)


def all_log_probs(logits, tokens, temperature=1.0):
    log_pi = vbon.at_temperature(logits, temperature).log_softmax(-1)
    return log_pi.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def phase(l, i):
    """A phase on the prompts and random numbers of round i."""
    l.generator.manual_seed(i)
    common.reset_peak(l.args.device)
    m = common.phase(l, random.Random(i).choices(l.task.train_prompts, k=l.args.rollouts))
    return {"phase": m["seconds"], **{part: m["time/" + part] for part in common.PARTS},
            "processor": m["processor"], "peak MB": common.memory_mb(l.args.device)}


def sampling(l, i):
    """M responses to each of a few prompts, the seconds as those of a rollout."""
    size, device = (RESPONSES, l.args.max_new_tokens), l.args.device
    uniforms = torch.rand(size, generator=l.generator.manual_seed(i), device=device)
    prompts = [l.task.encode(p) for p in random.Random(i).choices(l.task.train_prompts, k=RESPONSES // M)]
    common.reset_peak(device)
    start, busy = common.clock(device), time.process_time()
    with vbon.autocast(l.args):
        vbon.generate(l.task.ref, prompts, uniforms, l.task.tokenizer.eos_token_id, l.args.temperature)
    seen = {"rollout": common.clock(device) - start, "processor": time.process_time() - busy}
    return dict.fromkeys(TIMES) | seen | {"peak MB": common.memory_mb(device)}


PIECES = {  # how many layers are trained, what is measured, what takes the piece away
    "shared trunk, two layers trained": (2, phase, patched(generate=without_trunk)),
    "log-probs and values known from decoding": (-1, phase, patched(generate=another_pass)),
    "log-prob of one token (TakenLogProb)": (-1, phase, patched(token_log_probs=all_log_probs)),
    f"KV cache with room to grow, {RESPONSES} samples": (
        -1, sampling, patched(roomy_cache=lambda lm: DynamicCache(config=lm.config))),
    f"a prompt read once for {M} samples": (-1, sampling, patched(generate=repeated_prompts)),
    "GELU in one pass": (-1, phase, mock.patch.object(torch.nn.GELU, "forward", NewGELUActivation.forward)),
}


def measure(options, flags):
    """{piece: [{True: what was measured with it, False: without}]}, of rounds after the first, a warm-up."""
    def rounds(turn):
        return [{on: turn(on, i) for on in (i % 2 == 0, i % 2 == 1)} for i in range(options.rounds + 1)][1:]

    def turn(l, run, without, on, i):
        with nullcontext() if on else without:
            return run(l, i)
    seen = {}
    for layers in (2, -1):
        l = common.learner([*flags, "--unfrozen-layers", str(layers)])
        seen |= {piece: rounds(partial(turn, l, run, without))
                 for piece, (trained, run, without) in PIECES.items() if trained == layers}
    if sys.platform == "linux" and options.device == "cpu":
        threads, request = str(torch.get_num_threads()), json.dumps([*flags, "--unfrozen-layers", "-1"])
        command = [sys.executable, os.path.abspath(__file__), "--threads", threads, "--serve", request]
        sides = [common.Side("pages", command, {"THP_MEM_ALLOC_ENABLE": on}) for on in "01"]
        seen["memory in pages of 2 MB"] = rounds(lambda on, i: sides[on].ask(i))
    return seen


def serve(flags):
    """What each of the two processes runs: a phase for each line, which names the round."""
    answer = common.answers()
    l = common.learner(flags)
    answer("ready")
    for line in sys.stdin:
        answer(phase(l, int(line)))


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("--serve", help=common.argparse.SUPPRESS)
    options = common.parse(parser)
    if options.serve:
        return serve(json.loads(options.serve))
    with common.temporary_folder() as folder:
        flags = [*common.flags_of(options, folder), "--lr", "1e-12"]
        seen = measure(options, flags)
    shown, rows = [], []
    for piece, found in seen.items():
        columns = {"time without ÷ with": piece}
        for part in TIMES:
            ratios = [pair[False][part] / pair[True][part] for pair in found if pair[True][part]]
            columns[part] = common.spread(ratios) if ratios else None
        peak = [f"{statistics.median(pair[on]['peak MB'] for pair in found):.0f}" for on in (False, True)]
        shown.append(columns | {"peak MB, without → with": " → ".join(peak)})
        rows += [{"piece": piece, "round": i, "with": on} | pair[on]
                 for i, pair in enumerate(found) for on in pair]
    same = {"rollouts": options.rollouts, "max_new_tokens": options.max_new_tokens, "dtype": options.dtype,
            "machine": common.machine(options.device)}
    print("\n" + "; ".join(f"{key} {value}" for key, value in same.items()) + f"; {options.rounds} rounds")
    common.table(shown)
    common.write_csv(options.csv, rows, **same)


if __name__ == "__main__":
    common.run(main)
