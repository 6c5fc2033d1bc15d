#!/usr/bin/env python3
"""Compare the FLOP/s of a PPO iteration with the machine's rate of matrix products.

    python bench/limit.py                                          # random models
    python bench/limit.py --ref DIR --reward DIR --dataset DIR --threads 1 --unfrozen-layers 2

"needed" counts the FLOPs of the algorithm, without padding and without prompt positions in the LM
head: a token costs 2P with P weights, attention costs 4·width·context per layer, a backward pass
costs two forward passes, and the output of a frozen layer is needed once per iteration. "done" is
torch's own count. The limit is the rate of torch's matrix product at the shapes of each part,
weighted by their FLOPs and measured in turns with the iterations. "% of large" compares with a
product of two large square matrices instead.
"""
import itertools
import statistics
from contextlib import contextmanager
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import common
import vbon
from common import PARTS

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


# ---- needed and executed FLOPs ------------------------------------------------------------------


def layer_matrices(lm):
    """Return the shapes of the matrices in one transformer layer."""
    layers, _ = vbon.transformer_layers(lm)
    return [tuple(p.shape) for p in layers[0].parameters() if p.dim() == 2]


def trained_layers(l):
    K = l.args.unfrozen_layers
    return l.task.ref.config.num_hidden_layers if K == -1 else K


def needed_flops(l, prompts, length, reward_flops):
    """Return {part: FLOPs} of an iteration whose responses have `length` tokens."""
    lm, weights = l.task.ref, sum(a * b for a, b in layer_matrices(l.task.ref))
    layers, trained = lm.config.num_hidden_layers, trained_layers(l)
    head = 2 * lm.get_output_embeddings().weight.numel()
    # A frozen head passes the gradient on, but needs none for its weights.
    head_passes = 3 if trained == layers else 2
    value_head = sum(2 * p.numel() for p in l.value_head.parameters() if p.dim() == 2)
    needed = {"rollout": 0, "score": reward_flops, "update": 0}
    for prompt in prompts:
        tokens = len(l.task.encode(prompt)) + length - 1  # the last token is never an input
        per_layer = 2 * weights * tokens + 4 * lm.config.hidden_size * tokens * (tokens + 1) / 2
        needed["rollout"] += layers * per_layer + length * (head + value_head)
        needed["score"] += trained * per_layer + length * head
        heads = length * (head_passes * head + 3 * value_head)
        needed["update"] += l.args.ppo_epochs * (3 * trained * per_layer + heads)
    return needed


def counter():
    """Return torch's FLOP counter, extended by attention on a CPU."""
    aten = torch.ops.aten

    def forward(q, k, v, *args, out_shape=None, **kwargs):
        return sdpa_flop_count(q, k, v)

    def backward(grad, q, k, v, *args, out_shape=None, **kwargs):
        return sdpa_backward_flop_count(grad, q, k, v)
    return FlopCounterMode(display=False, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward})


@contextmanager
def parts(enter):
    """Call enter(part) at the start of each part of an iteration, and enter(None) at the end."""
    generate, update = vbon.generate, vbon.update

    def rollout(*args):
        enter("rollout")
        out = generate(*args)
        enter("score")
        return out

    def marked_update(*args):
        enter("update")
        return update(*args)
    with mock.patch.multiple(vbon, generate=rollout, update=marked_update):
        yield
    enter(None)


def done_flops(l, rows):
    """Return {part: FLOPs} as torch counts them, the reward model's share and the mean length."""
    marks, reward, score = [], [], l.task.score

    def counted_score(*args):
        before = count.get_total_flops()
        out = score(*args)
        reward.append(count.get_total_flops() - before)
        return out
    with (mock.patch.object(l.task, "score", counted_score), counter() as count,
          parts(lambda part: marks.append(count.get_total_flops()))):
        metrics = common.iteration(l, rows)
    done = dict(zip(PARTS, (b - a for a, b in itertools.pairwise(marks))))
    return done, sum(reward), metrics["objective/length"]


# ---- the limit, and the time outside of matrix products -----------------------------------------


def shapes(l, prompts):
    """Return {part: [(rows, inner, columns, times)]}, the language model's matrix products."""
    V, H = l.task.ref.get_output_embeddings().weight.shape
    layers, trained = l.task.ref.config.num_hidden_layers, trained_layers(l)
    B, T = len(prompts), l.args.max_new_tokens
    kept = l.args.minibatch * T
    rows = l.args.minibatch * (max(len(l.task.encode(p)) for p in prompts) + T)
    matrices = layer_matrices(l.task.ref)
    update = [(kept, H, V, 1), (kept, V, H, 1)] + [(V, kept, H, 1)] * (trained == layers)
    for a, b in matrices:
        update += [(rows, a, b, trained), (rows, b, a, trained), (a, rows, b, trained)]
    return {"rollout": [(B, a, b, layers) for a, b in matrices] + [(B, H, V, 1)],
            "score": [(rows, a, b, trained) for a, b in matrices] + [(kept, H, V, 1)],
            "update": update}


def rate(products, device, dtype):
    """Return the FLOP/s of a list of matrix products, one after the other."""
    flops = [2 * m * k * n * times for m, k, n, times in products]
    rates = [common.matmul_rate(m, k, n, device, dtype, 0.03) for m, k, n, _ in products]
    return sum(flops) / sum(f / r for f, r in zip(flops, rates))


def profiles(l, rows):
    """Return {part: (share of matrix products in the self time, largest other shares)}."""
    on_gpu, running, events = l.args.device.startswith("cuda"), [], {}
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu

    def enter(part):
        if running:
            name, profiler = running.pop()
            common.clock(l.args.device)
            profiler.stop()
            events[name] = profiler.key_averages()
        if part:
            running.append((part, profile(activities=activities)))
            running[-1][1].start()
    with parts(enter):
        common.iteration(l, rows)
    out = {}
    for part, averages in events.items():
        times = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total
                 for e in averages}
        total = sum(times.values()) or 1
        others = sorted((t, key) for key, t in times.items() if key not in PRODUCTS)[:-4:-1]
        losses = [f"{key.removeprefix('aten::')} {100 * t / total:.0f} %" for t, key in others]
        out[part] = sum(times.get(key, 0) for key in PRODUCTS) / total, losses
    return out


def measure(l, options):
    """Return {part: [(seconds, limit, rate of a large product), one per round]}, the needed FLOPs,
    the executed FLOPs and the profiles."""
    rows = list(itertools.islice(itertools.cycle(range(len(l.task.prompts))), options.rollouts))
    prompts = [l.task.prompts[i] for i in rows]
    done, reward_flops, length = done_flops(l, rows)
    needed, products = needed_flops(l, prompts, length, reward_flops), shapes(l, prompts)
    large = 8192 if options.device.startswith("cuda") else 1024
    common.iteration(l, rows)  # warm-up
    seconds = {part: [] for part in PARTS}
    for _ in range(options.rounds):
        metrics = common.iteration(l, rows)
        best = common.matmul_rate(large, large, large, options.device, options.dtype)
        for part in PARTS:
            limit = rate(products[part], options.device, options.dtype)
            seconds[part].append((metrics["time/" + part], limit, best))
    return seconds, needed, done, profiles(l, rows)


def report(measured, needed, done, profiled, options):
    rows = []
    for part in PARTS:
        share = [100 * needed[part] / seconds / limit for seconds, limit, _ in measured[part]]
        seconds, limit, large = (statistics.median(x) for x in zip(*measured[part]))
        speed = needed[part] / seconds
        rows.append({"part": part, "GFLOP needed": needed[part] / 1e9, "done": done[part] / 1e9,
                     "seconds": seconds, "GFLOP/s": speed / 1e9, "limit GFLOP/s": limit / 1e9,
                     "% of limit": common.spread(share, 0), "% of large": 100 * speed / large,
                     "self time in products": f"{100 * profiled[part][0]:.0f} %"})
    machine = common.machine(options.device)
    print(f"\n{machine}; {options.dtype}; {options.rollouts} rollouts of {options.max_new_tokens} "
          f"tokens; --unfrozen-layers {options.unfrozen_layers}; medians of {options.rounds}")
    common.table(rows)
    print("\nlargest shares of the self time outside of matrix products")
    for part in PARTS:
        print(f"  {part:<8}", " · ".join(profiled[part][1]))
    rows = [row | {"losses": "; ".join(profiled[row["part"]][1])} for row in rows]
    common.write_csv(options.csv, rows, unfrozen_layers=options.unfrozen_layers,
                     rollouts=options.rollouts, max_new_tokens=options.max_new_tokens,
                     dtype=options.dtype, machine=machine)


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--unfrozen-layers", type=int, default=-1, help="as in vbon.py [-1]")
    options = common.parse(parser)
    with common.temporary_folder() as folder:
        flags = common.flags_of(options, folder)
        l = common.learner([*flags, "--unfrozen-layers", str(options.unfrozen_layers)])
    report(*measure(l, options), options)


if __name__ == "__main__":
    common.run(main)
