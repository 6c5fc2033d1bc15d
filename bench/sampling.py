#!/usr/bin/env python3
"""Measure sampled tokens per second of vbon.py, transformers' generate and vLLM on one model.

    python bench/sampling.py --ref DIR --dataset DIR                   # your model and prompts
    python bench/sampling.py --ref DIR --dataset DIR --vllm PYTHON     # with vLLM
    python bench/sampling.py                                           # random weights, no download

PYTHON is the interpreter of an environment with vLLM. The samplers take turns, so that other
programs disturb all of them alike. Tokens are counted up to and including EOS. Ratios are taken
within a round and shown as median (lowest–highest). "% of matmul" is the rate of the products that
the sampled tokens need over the rate of torch.matmul with the model's own weights and one row per
response, measured in the same rounds.
"""
import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import torch

import common
import vbon

ROWS = 512  # maximal number of responses that are decoded together


def load(options, count):
    """Load --ref and the first training prompts: the model, token lists and the id of EOS."""
    lm, tokenizer, _ = vbon.load_model("ref", options.ref, options.device)
    if tokenizer.eos_token_id is None:
        raise vbon.UserError(f"--ref {options.ref}: the tokenizer must have an EOS token")
    args = SimpleNamespace(task="imdb", dataset=options.dataset, data_seed=0, train_prompts=count)
    room = getattr(lm.config, "max_position_embeddings", sys.maxsize) - options.max_new_tokens
    with vbon.loading(f"cannot load prompts from --dataset {options.dataset}"):
        prompts = [tokenizer.encode(p)
                   for p in vbon.load_prompts(args, "train", tokenizer, min(512, room))]
    if len(prompts) < count:
        raise vbon.UserError(f"--dataset must have {count} prompts, got {len(prompts)}")
    if not all(0 < len(p) <= room for p in prompts):
        raise vbon.UserError(f"prompts must have 1 to {room} tokens with --max-new-tokens "
                             f"{options.max_new_tokens}, got {max(map(len, prompts))}")
    return lm, prompts, tokenizer.eos_token_id


def prompts_for(M):
    """Return the number of prompts of a measurement: about ROWS responses, or 128 single ones."""
    return 128 if M == 1 else ROWS // M


# ---- samplers: (prompts, M) -> seconds, lengths of the responses in tokens -----------------------


def our_sampler(lm, eos, options):
    """Sample with vbon.generate."""
    generator = torch.Generator(options.device).manual_seed(0)

    def sample(prompts, M):
        start, size = common.clock(options.device), (len(prompts) * M, options.max_new_tokens)
        uniforms = torch.rand(size, generator=generator, device=options.device)
        rollout = vbon.generate(lm, prompts, uniforms, [eos], 1.0)
        return common.clock(options.device) - start, rollout.mask.sum(1).tolist()
    return sample


def transformers_sampler(lm, eos, options):
    """Sample with model.generate, which reads a prompt once per sample."""
    @torch.no_grad()
    def sample(prompts, M):
        start = common.clock(options.device)
        ids, mask = vbon.pad(prompts, eos, "left", options.device)
        out = lm.generate(input_ids=ids, attention_mask=mask.long(), do_sample=True,
                          temperature=1.0, top_k=0, top_p=1.0, eos_token_id=eos, pad_token_id=eos,
                          num_return_sequences=M, max_new_tokens=options.max_new_tokens)
        rows = out[:, ids.shape[1]:].tolist()
        return (common.clock(options.device) - start,
                [row.index(eos) + 1 if eos in row else len(row) for row in rows])
    return sample


def serve_vllm(ref, context, new_tokens, eager):
    """Answer (prompts, M) with (seconds, lengths), in the interpreter of --vllm."""
    answer = common.answers()
    import vllm
    llm = vllm.LLM(model=ref, dtype="float32", seed=0, enable_prefix_caching=True,
                   max_num_seqs=ROWS, max_model_len=context, enforce_eager=eager,
                   gpu_memory_utilization=0.5)
    answer(vllm.__version__)
    for line in sys.stdin:
        prompts, M = json.loads(line)
        params = vllm.SamplingParams(n=M, temperature=1.0, top_p=1.0, top_k=0,
                                     max_tokens=new_tokens, detokenize=False)
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        lengths = [len(y.token_ids) for x in outputs for y in x.outputs]
        answer((time.perf_counter() - start, lengths))


def vllm_sampler(options, context):
    """Return the sampler of another interpreter, and vLLM's version.

    On a CPU it has --threads threads and its own OpenMP. Variables that the user has set win.
    Between turns the process is stopped, because it may wait actively.
    """
    threads, cores = torch.get_num_threads(), range(torch.get_num_threads())
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))[:threads]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
                   "OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "4",
                   "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    openmp = os.path.join(os.path.dirname(options.vllm), "..", "lib", "libiomp5.so")
    if os.path.exists(openmp):
        environment["LD_PRELOAD"] = openmp
    if os.path.isdir(options.ref):
        environment["HF_HUB_OFFLINE"] = "1"
    settings = json.dumps([options.ref, context, options.max_new_tokens, options.vllm_eager])
    command = [options.vllm, os.path.abspath(__file__), "--serve-vllm", settings]
    side = common.Side("--vllm", command, environment | os.environ)

    def sample(prompts, M):
        side.signal(signal.SIGCONT)
        answer = side.ask((prompts, M))
        side.signal(signal.SIGSTOP)
        return answer
    return sample, side.first


# ---- FLOPs --------------------------------------------------------------------------------------


def multiplied_weights(lm):
    """Return the matrices of a forward pass, (in, out) each. The last one is the LM head's."""
    head = lm.get_output_embeddings()
    inner = [m for m in lm.modules() if m is not head and type(m).__name__ in ("Linear", "Conv1D")]
    return [m.weight.detach() if type(m).__name__ == "Conv1D" else m.weight.detach().t()
            for m in [*inner, head]]


def needed_flops(lm, prompts, M, lengths):
    """Return the FLOPs that sampling these responses needs: 2 per weight and token, 4·context·d per
    layer of attention, each prompt read once, and the LM head once per sampled token."""
    *inner, head = multiplied_weights(lm)
    d, layers = lm.config.hidden_size, lm.config.num_hidden_layers
    ends = [(len(prompts[i // M]), n) for i, n in enumerate(lengths)]
    # The last token of a response is never an input.
    read = sum(map(len, prompts)) + sum(n - 1 for _, n in ends)
    seen = sum(L * (L + 1) // 2 for L in map(len, prompts))
    seen += sum((n - 1) * L + n * (n - 1) // 2 for L, n in ends)
    # All M first tokens of a prompt come from one distribution.
    sampled = sum(lengths) - len(lengths) + len(prompts)
    products = read * sum(w.numel() for w in inner) + sampled * head.numel()
    return 2 * products + 4 * layers * d * seen


@torch.no_grad()
def matmul_rate(weights, rows, device, least=0.3):
    """Return the FLOP/s of torch.matmul with every weight, as in decoding `rows` tokens at once."""
    inputs = {w.shape[0]: torch.randn(rows, w.shape[0], device=device) for w in weights}
    outputs = {w.shape[1]: torch.empty(rows, w.shape[1], device=device) for w in weights}
    passes, start = 0, common.clock(device)
    while common.clock(device) - start < least:
        for w in weights:
            torch.matmul(inputs[w.shape[0]], w, out=outputs[w.shape[1]])
        passes += 1
    return passes * 2 * rows * sum(w.numel() for w in weights) / (common.clock(device) - start)


# ---- measurements -------------------------------------------------------------------------------


def measure(lm, prompts, M, samplers, options):
    """Return a row per sampler and round, after a warm-up. torch.matmul takes turns with them."""
    weights, rows = multiplied_weights(lm), []
    for i in range(options.rounds + 1):
        turns = {name: sample(prompts, M) for name, sample in samplers.items()}
        peak = matmul_rate(weights, len(prompts) * M, options.device)
        for name, (seconds, lengths) in turns.items() if i else ():
            share = needed_flops(lm, prompts, M, lengths) / seconds / peak
            rows.append({"M": M, "prompts": len(prompts), "sampler": name, "round": i - 1,
                         "seconds": seconds, "tokens": sum(lengths), "share_of_matmul": share,
                         "matmul_gflops": peak / 1e9})
    return rows


def shown(rows):
    """Return the table of these rows: medians (lowest–highest)."""
    table = []
    for name in dict.fromkeys(row["sampler"] for row in rows):
        own, ours = ([row for row in rows if row["sampler"] == x] for x in (name, "vbon.py"))
        speed, our_speed = ([row["tokens"] / row["seconds"] for row in x] for x in (own, ours))
        ratios = [x / y for x, y in zip(our_speed, speed)]
        shares = [100 * row["share_of_matmul"] for row in own]
        table.append({"sampler": name, "M": own[0]["M"], "prompts": own[0]["prompts"],
                      "tokens/s": common.spread(speed, 0),
                      "vbon.py over it": common.spread(ratios),
                      "% of matmul": common.spread(shares, 0)})
    return table


def measure_all(options):
    """Print a table for every M. The CSV is written again after each one."""
    import transformers
    with common.temporary_folder() as folder:
        common.flags_of(options, folder)
        lm, prompts, eos = load(options, max(map(prompts_for, options.M)))
        samplers, version, rows = {"vbon.py": our_sampler(lm, eos, options)}, None, []
        samplers["transformers"] = transformers_sampler(common.stock(lm), eos, options)
        if options.vllm:
            context = max(map(len, prompts)) + options.max_new_tokens
            samplers["vllm"], version = vllm_sampler(options, context)
    same = {"max_new_tokens": options.max_new_tokens, "parameters": lm.num_parameters(),
            "machine": common.machine(options.device), "transformers": transformers.__version__,
            "vllm": version}
    print("; ".join(f"{key} {value}" for key, value in same.items()), flush=True)
    for M in options.M:
        rows += measure(lm, prompts[:prompts_for(M)], M, samplers, options)
        common.table(shown([row for row in rows if row["M"] == M]))
        common.write_csv(options.csv, rows, **same)


def main():
    if sys.argv[1:2] == ["--serve-vllm"]:
        return serve_vllm(*json.loads(sys.argv[2]))
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--M", type=common.positive, nargs="+", default=[1, 16, 64, 256], help="samples per prompt")
    add("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM")
    add("--vllm-eager", action="store_true", help="no torch.compile, which takes minutes")
    options = common.parse(parser, own=("ref", "dataset"))
    if max(options.M) > ROWS:
        raise vbon.UserError(f"--M must be at most {ROWS}, got {max(options.M)}")
    measure_all(options)


if __name__ == "__main__":
    common.run(main)
