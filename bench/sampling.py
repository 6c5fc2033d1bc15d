#!/usr/bin/env python3
"""Sampled tokens per second: vbon.py's hand-written sampler, transformers' generate, and vLLM, on one model and one machine.

    python bench/sampling.py --ref DIR --dataset DIR                          # your model and prompts
    python bench/sampling.py --ref DIR --dataset DIR --vllm PYTHON            # and vLLM, in the environment of that interpreter
    python bench/sampling.py                                                  # random weights in the shape of GPT-2, nothing to download

The samplers take turns, so that whatever else the machine does meets all of them. Tokens count up to and including EOS. Speeds
are medians over the turns, ratios are taken turn by turn. "of matmul" is the multiplications that the sampled tokens need, per
second, over the rate of bare torch.matmul with the model's own weights and one row per response, measured in the same turns.
"""
import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from types import SimpleNamespace

import torch

import common
import vbon
from vbon import UserError

ROWS = 512  # responses that are decoded at a time


# --- model and prompts ------------------------------------------------------------------------------------------------


def random_model(count, device):
    """GPT-2's smallest shape (124M) with random weights, prompts of eight random tokens, and an EOS that no model ever draws."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    lm = vbon.with_fused_gelu(GPT2LMHeadModel(GPT2Config()))
    return lm.to(device).eval(), torch.randint(lm.config.vocab_size, (count, 8)).tolist(), lm.config.vocab_size


def own_model(args, count, device):
    """--ref and the first prompts of --dataset, drawn as training draws them: the model, token lists, the id of EOS."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = vbon.load("ref", AutoTokenizer, args.ref)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of --ref {args.ref} has no EOS token")
    lm = vbon.load("ref", AutoModelForCausalLM, args.ref, dtype=torch.float32).to(device).eval()
    settings = SimpleNamespace(dataset=args.dataset, data_seed=0, task="imdb", train_prompts=count, test_prompts=1)
    context = getattr(lm.config, "max_position_embeddings", None) or sys.maxsize
    prompts = [tokenizer.encode(p) for p in vbon.read_prompts(settings, tokenizer, min(512, context - args.new_tokens))[0]]
    if len(prompts) < count:
        raise UserError(f"--dataset {args.dataset} gave {len(prompts)} prompts, {count} are needed")
    if not all(0 < len(p) <= context - args.new_tokens for p in prompts):
        raise UserError(f"a prompt is empty, or with {args.new_tokens} new tokens exceeds the model's context of {context}")
    return lm, prompts, tokenizer.eos_token_id


def prompts_for(M):
    """How many prompts make a measurement: 512 responses or so, 128 of single ones."""
    return 128 if M == 1 else max(1, ROWS // M)


def batches(prompts, M):
    """(prompts, copies of each) of one batch after the other, of at most ROWS responses."""
    at_once = max(1, ROWS // M)
    for i in range(0, len(prompts), at_once):
        for start in range(0, M, ROWS):
            yield prompts[i:i + at_once], min(ROWS, M - start)


# --- the samplers: (prompts, M) -> seconds, lengths of the responses in tokens ------------------------------------------


def clock(device):
    """Seconds, once the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def hand_sampler(lm, eos, args, device):
    """vbon.generate."""
    generator = torch.Generator(device).manual_seed(0)

    def sample(prompts, M):
        start, masks = clock(device), []
        for part, copies in batches(prompts, M):
            uniforms = torch.rand(len(part) * copies, args.new_tokens, generator=generator, device=device)
            masks.append(vbon.generate(lm, part, uniforms, eos, 1.0)[1])
        seconds = clock(device) - start
        return seconds, torch.cat(masks).sum(1).tolist()
    return sample


def transformers_sampler(lm, eos, args, device):
    """model.generate, which repeats each prompt for each of its samples."""
    ends = eos if eos < lm.config.vocab_size else None

    @torch.no_grad()
    def sample(prompts, M):
        start, drawn = clock(device), []
        for part, copies in batches(prompts, M):
            ids, mask = vbon.pad(part, eos, "left", device)
            out = lm.generate(input_ids=ids, attention_mask=mask.long(), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=ends,
                              num_return_sequences=copies, max_new_tokens=args.new_tokens, pad_token_id=eos)
            drawn.append(out[:, ids.shape[1]:])
        seconds = clock(device) - start
        return seconds, [row.index(eos) + 1 if eos in row else len(row) for part in drawn for row in part.tolist()]
    return sample


def serve_vllm(settings):
    """What the interpreter of --vllm runs: loads the model once, then answers each line {"prompts", "M"} with {"seconds", "lengths"}."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    import vllm
    args = json.loads(settings)
    llm = vllm.LLM(model=args["ref"], dtype="float32", seed=0, enable_prefix_caching=True, max_num_seqs=ROWS, max_model_len=args["context"],
                   skip_tokenizer_init=args["endless"], enforce_eager=args["eager"], gpu_memory_utilization=0.5)
    print(json.dumps({"vllm": vllm.__version__}), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        params = vllm.SamplingParams(n=request["M"], temperature=1.0, top_p=1.0, top_k=0, max_tokens=args["new_tokens"], detokenize=False,
                                     ignore_eos=args["endless"])
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in request["prompts"]], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "lengths": [len(y.token_ids) for x in outputs for y in x.outputs]}), file=replies, flush=True)


def vllm_environment(args):
    """vLLM's CPU build with --threads threads in one process, and the OpenMP library that it asks for. What the user has set stays."""
    cores = sorted(os.sched_getaffinity(0))[:args.threads] if hasattr(os, "sched_getaffinity") else range(args.threads)
    ours = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "OMP_NUM_THREADS": str(args.threads), "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    openmp = os.path.join(os.path.dirname(args.vllm), "..", "lib", "libiomp5.so")
    if os.path.exists(openmp):
        ours["LD_PRELOAD"] = openmp
    if args.ref is None or os.path.isdir(args.ref):
        ours["HF_HUB_OFFLINE"] = "1"
    return ours | os.environ


def start_vllm(args, folder, context, endless, log):
    """Starts the other interpreter in a session of its own: (sampler, its process, vLLM's version). Between its turns it is stopped:
    an engine that idles may spin. Raises UserError with the last line of its log if it dies."""
    settings = json.dumps({"ref": folder, "context": context, "endless": endless, "eager": args.vllm_eager, "new_tokens": args.new_tokens})
    try:
        process = subprocess.Popen([args.vllm, os.path.abspath(__file__), "serve-vllm", settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=log, text=True, env=vllm_environment(args), start_new_session=True)
    except OSError as error:
        raise UserError(f"--vllm {args.vllm}: {error.strerror}") from None

    def answer():
        line = process.stdout.readline()
        if not line:
            log.seek(0)
            errors = [line.strip() for line in deque(log, 400) if "Error" in line] or ["no message"]
            raise UserError(f"--vllm {args.vllm} ended: {errors[-1][:200]}")
        return json.loads(line)

    def sample(prompts, M):
        os.killpg(process.pid, signal.SIGCONT)
        print(json.dumps({"prompts": prompts, "M": M}), file=process.stdin, flush=True)
        reply = answer()
        os.killpg(process.pid, signal.SIGSTOP)
        return reply["seconds"], reply["lengths"]
    try:
        return sample, process, answer()["vllm"]
    except BaseException:
        stop_vllm(process)
        raise


def stop_vllm(process):
    """Ends the other interpreter and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


# --- what the machine can do --------------------------------------------------------------------------------------------


def multiplied_weights(lm):
    """The matrices that every token is multiplied with, (in, out) each: Linear's, Conv1D's and, last, the LM head's."""
    head = lm.get_output_embeddings()
    inner = [m for m in lm.modules() if m is not head and type(m).__name__ in ("Linear", "Conv1D")]
    return [m.weight.detach() if type(m).__name__ == "Conv1D" else m.weight.detach().t() for m in inner + [head]]


def needed_flops(lm, prompts, M, lengths):
    """Floating-point operations without which these responses cannot be had: 2 per weight and token, 4·context·d per layer of attention;
    each prompt read once, the LM head once per sampled token. The last token of a response is never read."""
    *inner, head = multiplied_weights(lm)
    d, layers = lm.config.hidden_size, lm.config.num_hidden_layers
    ends = [(len(prompts[i // M]), n) for i, n in enumerate(lengths)]
    read = sum(map(len, prompts)) + sum(n - 1 for _, n in ends)
    seen = sum(L * (L + 1) // 2 for L in map(len, prompts)) + sum((n - 1) * L + n * (n - 1) // 2 for L, n in ends)
    sampled = sum(lengths) - len(lengths) + len(prompts)  # the first token of all M samples has one distribution
    return 2 * read * sum(w.numel() for w in inner) + 2 * sampled * head.numel() + 4 * layers * d * seen


@torch.no_grad()
def matmul_rate(weights, rows, device, least=0.3):
    """FLOP/s of torch.matmul through all of the weights, one after the other as in decoding, for `rows` tokens at once."""
    inputs = {w.shape[0]: torch.randn(rows, w.shape[0], device=device) for w in weights}
    outputs = {w.shape[1]: torch.empty(rows, w.shape[1], device=device) for w in weights}
    passes, start = 0, clock(device)
    while clock(device) - start < least:
        for w in weights:
            torch.matmul(inputs[w.shape[0]], w, out=outputs[w.shape[1]])
        passes += 1
    return passes * 2 * rows * sum(w.numel() for w in weights) / (clock(device) - start)


# --- measuring ----------------------------------------------------------------------------------------------------------


def measure(lm, prompts, M, samplers, args, device):
    """Warms up, then lets the samplers and torch.matmul take turns. Returns a row of numbers for each sampler."""
    weights, rows = multiplied_weights(lm), min(ROWS, len(prompts) * M)
    for sample in samplers.values():
        sample(prompts, M)
    matmul_rate(weights, rows, device)
    speeds, rates, flops = {name: [] for name in samplers}, [], []
    for _ in range(args.pairs):
        for name, sample in samplers.items():
            seconds, lengths = sample(prompts, M)
            speeds[name].append(sum(lengths) / seconds)
            if name == "hand":
                flops.append(needed_flops(lm, prompts, M, lengths) / sum(lengths))
        rates.append(matmul_rate(weights, rows, device))
    found = []
    for name, speed in speeds.items():
        ratios = [x / y for x, y in zip(speed, speeds["hand"])]
        share = statistics.median(x * f / rate for x, f, rate in zip(speed, flops, rates))
        found.append({"M": M, "prompts": len(prompts), "sampler": name, "tokens_per_s": round(statistics.median(speed), 1),
                      "tokens_per_s_min": round(min(speed), 1), "tokens_per_s_max": round(max(speed), 1),
                      "ratio_to_hand": round(statistics.median(ratios), 3), "ratio_min": round(min(ratios), 3), "ratio_max": round(max(ratios), 3),
                      "share_of_matmul": round(share, 3), "matmul_gflops": round(statistics.median(rates) / 1e9, 1), "turns": args.pairs})
    return found


def show(row):
    print(f"{row['M']:5}{row['prompts']:9}  {row['sampler']:<13}{row['tokens_per_s']:10,.0f}  {row['tokens_per_s_min']:>8,.0f} – "
          f"{row['tokens_per_s_max']:<8,.0f}{row['ratio_to_hand']:7.2f}  {row['ratio_min']:6.2f} – {row['ratio_max']:<6.2f}"
          f"{100 * row['share_of_matmul']:8.0f} %{row['matmul_gflops']:10,.0f}", flush=True)


def run(args):
    """The whole benchmark: a table on the screen, a CSV that is written anew after every M."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    device = vbon.pick_device(args.device)
    count = max(map(prompts_for, args.M))
    lm, prompts, eos = own_model(args, count, device) if args.ref else random_model(count, device)
    samplers = {"hand": hand_sampler(lm, eos, args, device), "transformers": transformers_sampler(common.stock(lm), eos, args, device)}
    vllm_process, version, rows = None, None, []
    try:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", errors="replace") as log:
            if args.vllm:
                if not args.ref:
                    lm.save_pretrained(folder)
                context = max(map(len, prompts)) + args.new_tokens
                samplers["vllm"], vllm_process, version = start_vllm(args, args.ref or folder, context, args.ref is None, log)
            machine = {"new_tokens": args.new_tokens, "parameters": lm.num_parameters(),
                       "model": lm.config.model_type if args.ref else "gpt2, random",
                       "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, "cpu": common.cpu_name(),
                       "cores": os.cpu_count(), "threads": args.threads, "torch": torch.__version__, "transformers": transformers.__version__,
                       "vllm": version}
            print("  ".join(f"{key} {value}" for key, value in machine.items() if value is not None))
            print("    M  prompts  sampler        tokens/s       min – max      ratio to hand (min – max)  of matmul   GFLOP/s", flush=True)
            for M in args.M:
                for row in measure(lm, prompts[:prompts_for(M)], M, samplers, args, device):
                    rows.append(row | machine)
                    show(row)
                common.write_csv(args.csv, rows)
    finally:
        if vllm_process:
            stop_vllm(vllm_process)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", help="model: a hub name or folder; without it GPT-2's shape (124M) with random weights")
    parser.add_argument("--dataset", help="prompts, as vbon.py's --dataset")
    parser.add_argument("--M", type=int, nargs="+", default=[1, 16, 64, 256], help="samples per prompt; default 1 16 64 256")
    parser.add_argument("--pairs", type=int, default=5, help="turns that each sampler has; default 5")
    parser.add_argument("--new-tokens", type=int, default=40, help="longest response in tokens; default 40")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                        help="CPU threads of every sampler; default: all cores")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment that has vLLM")
    parser.add_argument("--vllm-eager", action="store_true", help="vLLM without torch.compile, which takes a minute or more to start")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda; default auto")
    parser.add_argument("--csv", default="results/bench-sampling.csv", help="where the numbers go; default results/bench-sampling.csv")
    args = parser.parse_args(argv)
    if bool(args.ref) != bool(args.dataset):
        raise UserError("--ref and --dataset go together")
    if min(args.M + [args.pairs, args.threads, args.new_tokens]) < 1:
        raise UserError("--M, --pairs, --threads and --new-tokens must be at least 1")
    if args.csv and not os.path.isdir(os.path.dirname(args.csv) or "."):
        raise UserError(f"--csv {args.csv}: there is no such folder")
    return args


def main(argv):
    if argv[:1] == ["serve-vllm"]:
        return serve_vllm(argv[1])
    try:
        run(parse_args(argv))
    except UserError as error:
        print(f"sampling.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
