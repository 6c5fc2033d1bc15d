"""Shared by the benchmarks: flags, models, PPO iterations, processes, tables and CSV files.

Without --ref, --reward and --dataset the benchmarks use models with random weights, written to a
temporary folder. Speed and memory do not depend on the weights as long as responses have the same
length. Random models almost never sample EOS, so their responses have the maximal length.
"""
import argparse
import atexit
import csv
import ctypes
import itertools
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in vbon.setup, but before the first tensor

import torch

import vbon

PARTS = ("rollout", "score", "update")
SIZES = {  # layers, width, heads and vocabulary; layers and width of the reward model
    "mini": (4, 256, 4, 8192, 2, 192),
    "gpt2": (12, 768, 12, 50257, 6, 768),
}
# Shape of an iteration of --task tldr, with a small width: 8 M parameters.
TLDR = {"size": (32, 128, 4, 6144, 2, 192), "prompt_words": (490, 490), "neox": True}


# ---- command line -------------------------------------------------------------------------------


def make_parser(description):
    """Return an argparse parser with the flags of all benchmarks."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ref", help="reference model, a hub name or folder [random weights of --size]")
    add("--reward", help="reward model, a hub name or folder; pass it with --ref")
    add("--dataset", help="prompts, a hub name, folder or .jsonl file; pass it with --ref")
    add("--size", choices=SIZES, help="size of the random models [gpt2 on a GPU, mini on a CPU]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1 [auto]")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of forward passes [float32]")
    add("--threads", type=positive, help="number of CPU threads [torch's default]")
    add("--rollouts", type=positive, default=128, help="responses per PPO iteration [%(default)s]")
    add("--max-new-tokens", type=positive, default=40, help="tokens per response [%(default)s]")
    add("--rounds", type=positive, default=5, help="measured rounds after a warm-up [%(default)s]")
    add("--csv", help="file to write the numbers to")
    return parser


def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse(parser, argv=None, own=("ref", "reward", "dataset")):
    """Parse the options and check them before anything is loaded. The flags `own` go together."""
    options = parser.parse_args(argv)
    given = [bool(getattr(options, name)) for name in own]
    if any(given) and not all(given):
        raise vbon.UserError(f"--{', --'.join(own)}: pass all, or none for random models")
    if options.csv and not os.path.isdir(os.path.dirname(options.csv) or "."):
        raise vbon.UserError(f"--csv {options.csv}: the folder must exist")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "auto":
        options.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    with vbon.loading(f"--device {options.device}"):
        options.device = str(torch.empty(0, device=options.device).device)
    options.size = options.size or ("gpt2" if options.device.startswith("cuda") else "mini")
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return options


def run(main):
    """Call main(). A user's mistake is printed as one line, with exit code 2."""
    sys.exit(vbon.run_script(os.path.basename(sys.argv[0]), lambda: None, lambda _: main()))


def vbon_args(flags):
    """Parse a list of vbon.py's flags."""
    return vbon.parse_args(flags)


# ---- models -------------------------------------------------------------------------------------


def flags_of(options, folder, size=None, **shape):
    """Return vbon.py's flags for the options. Without --ref, write random models to the folder.

    Args: size, like a value of SIZES, by default that of --size; shape, passed to `make_models`.
    """
    if not options.ref:
        longest = max(shape.get("prompt_words", (8,))) + options.max_new_tokens + 8
        make_models(folder, *(size or SIZES[options.size]), positions=max(128, longest), **shape)
        options.ref, options.reward = f"{folder}/ref", f"{folder}/reward"
        options.dataset = f"{folder}/prompts.jsonl"
    flags = {"task": "imdb", "ref": options.ref, "reward": options.reward,
             "dataset": options.dataset, "device": options.device, "dtype": options.dtype,
             "max-new-tokens": options.max_new_tokens, "train-prompts": 256,
             "rollouts": options.rollouts, "minibatch": min(32, options.rollouts), "ppo-epochs": 4,
             "prefix-critic": 0, "token-bias-lr": 0,  # the paper's PPO
             "episodes": 1_000_000, "out": f"{folder}/run", "samples": f"{folder}/samples"}
    return [text for name, value in flags.items() for text in ("--" + name, str(value))]


def make_models(folder, layers, width, heads, vocab, reward_layers, reward_width, positions,
                prompt_words=(2, 8), neox=False):
    """Write a GPT-2 (or GPT-NeoX) and a DistilBERT with random weights, and 512 prompts of random
    words w1, w2, …, of a random length in the range `prompt_words`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (DistilBertConfig, DistilBertForSequenceClassification, GPT2Config,
                              GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM,
                              PreTrainedTokenizerFast)
    words = {"<eos>": 0} | {f"w{i}": i for i in range(1, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>",
                                        pad_token="<eos>", model_max_length=positions)
    torch.manual_seed(0)
    if neox:
        ref = GPTNeoXForCausalLM(GPTNeoXConfig(
            vocab_size=vocab, max_position_embeddings=positions, hidden_size=width,
            intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
            bos_token_id=0, eos_token_id=0))
    else:
        ref = GPT2LMHeadModel(GPT2Config(
            vocab_size=vocab, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads,
            bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    reward = DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=vocab, max_position_embeddings=positions, dim=reward_width,
        hidden_dim=4 * reward_width, n_layers=reward_layers, n_heads=reward_width // 32,
        id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1}))
    for name, model in (("ref", ref), ("reward", reward)):
        model.save_pretrained(f"{folder}/{name}")
        tokenizer.save_pretrained(f"{folder}/{name}")
    rng = random.Random(0)
    with open(f"{folder}/prompts.jsonl", "w", encoding="utf-8") as file:
        for _ in range(512):
            count = rng.randint(*prompt_words)
            prompt = " ".join(f"w{rng.randrange(1, vocab)}" for _ in range(count))
            file.write(json.dumps({"prompt": prompt}) + "\n")


def stock(lm):
    """Copy the model as transformers builds it, because vbon.py replaces its GELU."""
    with torch.device(lm.device):
        copy = type(lm)(lm.config)
    copy.load_state_dict(lm.state_dict())
    return copy.eval()


# ---- PPO iterations of vbon.py ------------------------------------------------------------------


def learner(flags, M=200):
    """Return everything that a PPO iteration takes. The rewards of the reference samples are random
    numbers, which does not change the time of an iteration."""
    args = vbon_args([*flags, "--M", str(M)])
    task = vbon.setup(args)
    torch.manual_seed(0)
    policy = vbon.make_policy(task.ref, args.unfrozen_layers, own_output=args.token_bias_lr > 0)
    vocabulary, width = policy.get_output_embeddings().weight.shape
    value_head = None if args.prefix_critic else torch.nn.Sequential(
        torch.nn.Linear(width, 2 * width), torch.nn.ReLU(), torch.nn.Linear(2 * width, 1))
    if value_head is not None:
        value_head.to(args.device)
    P = len(task.prompts)
    return SimpleNamespace(
        args=args, task=task, policy=policy, value_head=value_head,
        token_counts=torch.zeros(vocabulary, dtype=torch.double),
        ref_rewards=torch.rand(P, M, dtype=torch.double),
        optimizer=vbon.make_optimizer([policy, value_head], args),
        generator=torch.Generator(args.device), order=vbon.shuffled(range(P), 0))


def iteration(l, rows=None, **changed):
    """Run one PPO iteration of a learner on the prompts `rows`, by default the next ones.

    Args: changed, settings such as N.
    Returns: metrics, with the wall time ("seconds") and the processor time ("processor").
    """
    vars(l.args).update(changed)
    rows = rows or list(itertools.islice(l.order, l.args.rollouts))
    prompts = [l.task.prompts[i] for i in rows]
    start, busy = clock(l.args.device), time.process_time()
    rollout, metrics = vbon.collect(l.policy, l.value_head, l.task, prompts, l.ref_rewards[rows],
                                    l.args, l.generator)
    metrics |= vbon.update(l.policy, l.value_head, l.optimizer, rollout, l.token_counts, l.args,
                           l.generator)
    return metrics | {"seconds": clock(l.args.device) - start,
                      "processor": time.process_time() - busy}


def clock(device):
    """Return the time in seconds after the device has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory_mb(device, peak=True):
    """Return the (peak) memory of this process in MB: GPU memory of torch, or resident memory.

    On Linux it is VmHWM, because ru_maxrss includes memory of the parent process.
    """
    if device.startswith("cuda"):
        measured = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return measured(device) / 2 ** 20
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            name = "VmHWM" if peak else "VmRSS"
            return next(int(line.split()[1]) for line in file if line.startswith(name)) / 2 ** 10
    except FileNotFoundError:
        import resource
        unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak(device):
    """Reset the peak memory. This works on a GPU and on Linux."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # return freed memory to the system
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")


def matmul_rate(rows, inner, columns, device, dtype="float32", seconds=0.2):
    """Return the FLOP/s of torch's matrix product (rows, inner) × (inner, columns)."""
    kind = {"device": device, "dtype": getattr(torch, dtype)}
    a, b = torch.randn(rows, inner, **kind), torch.randn(inner, columns, **kind)
    out = a @ b
    count, repeats, spent = 0, 1, 0.0
    while spent < seconds:
        start = clock(device)
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        spent += clock(device) - start
        count, repeats = count + repeats, repeats * 2
    return 2 * rows * inner * columns * count / spent


# ---- other processes: one line of JSON per request and answer ----------------------------------


class Side:
    """Another process, in a session of its own.

    It sends one answer after loading, then one per request. Its stderr is captured for errors.
    """

    def __init__(self, name, command, environment=None):
        self.name, self.log = name, tempfile.TemporaryFile("w+", errors="replace")
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
                env=os.environ | (environment or {}), start_new_session=True)
        except OSError as error:
            raise vbon.UserError(f"cannot run {command[0]}: {error.strerror}") from None
        atexit.register(self.stop)
        self.first = self.answer()

    def ask(self, request):
        with suppress(BrokenPipeError):  # `answer` reports it
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        said = [text.strip() for text in self.log if text.strip()] or ["no output"]
        reason = ([text for text in said if "Error" in text] or said)[-1]
        raise vbon.UserError(f"{self.name}: the process ended: {reason[:300]}")

    def signal(self, number):
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def stop(self):
        """Kill the process and its children."""
        self.signal(signal.SIGKILL)
        self.process.wait()


def answers():
    """Return a function that sends an answer to the parent process. Redirects stdout to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda message: print(json.dumps(message), file=out, flush=True)


# ---- output -------------------------------------------------------------------------------------


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = (line.split(":", 1)[1] for line in file if line.startswith("model name"))
            return next(names).strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(device):
    """Return one line with the CPU, the GPU and torch's version."""
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    versions = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    return f"{cpu_name()}, {os.cpu_count()} cores{gpu}, {versions}"


def spread(values, digits=2):
    """Format values as 'median (lowest–highest)'."""
    median, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{median} ({low}–{high})"


def table(rows):
    """Print rows, dicts with the same keys, as aligned columns."""
    def text(x):
        return f"{x:.4g}" if isinstance(x, float) else "" if x is None else str(x)
    cells = [list(rows[0])] + [list(map(text, row.values())) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        aligned = (x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths)))
        print("  ".join(aligned).rstrip(), flush=True)


def write_csv(path, rows, **same):
    """Write rows to a CSV file. `same` are columns with one value. The write is atomic."""
    if not path:
        return
    with open(path + ".tmp", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *same])
        writer.writeheader()
        writer.writerows([row | same for row in rows])
    os.replace(path + ".tmp", path)
    print(f"written: {path}", file=sys.stderr)


def temporary_folder():
    return tempfile.TemporaryDirectory(prefix="vbon-bench-")
