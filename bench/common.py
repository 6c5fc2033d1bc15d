"""What the benchmarks share: flags, models, PPO phases of vbon.py, other processes, tables and CSV files.

Without --ref, --reward and --dataset they run on models with random weights, made in a temporary folder:
speed and memory do not depend on what a model has learned, as long as responses have the same length (random
models almost never end one).
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

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as vbon.setup does, but before there are any tensors

import torch

import vbon

PARTS = ("rollout", "score", "update")
SIZES = {  # layers, width, heads, vocabulary; layers and width of the reward model
    "mini": (4, 256, 4, 8192, 2, 192),
    "gpt2": (12, 768, 12, 50257, 6, 768),
}


# --- the command line ---------------------------------------------------------------------------------------


def parser_of(description):
    """An argparse parser with the flags that all benchmarks have."""
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=as_it_is)
    add = parser.add_argument
    add("--ref", help="reference model, a hub name or folder; default: random weights of --size")
    add("--reward", help="reward model, a hub name or folder; goes with --ref")
    add("--dataset", help="prompts, a hub name, folder or .jsonl file; goes with --ref")
    add("--size", choices=SIZES, help="of the random models; default: gpt2 on a GPU, mini on a CPU")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 [auto]")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="arithmetic of phases [float32]")
    add("--threads", type=positive, help="CPU threads; default: torch's own choice")
    add("--rollouts", type=positive, default=128, help="responses per PPO phase [128]")
    add("--max-new-tokens", type=positive, default=40, help="tokens per response [40]")
    add("--rounds", type=positive, default=5, help="measurements of everything, after a warm-up [5]")
    add("--csv", help="also write the numbers here")
    return parser


def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse(parser, argv=None, own=("ref", "reward", "dataset")):
    """The options, checked as far as they can be before anything is loaded. `own` go together."""
    options = parser.parse_args(argv)
    given = [bool(getattr(options, name)) for name in own]
    vbon.need(all(given) or not any(given), f"--{', --'.join(own)}: pass all, or none for random models")
    vbon.need(not options.csv or os.path.isdir(os.path.dirname(options.csv) or "."),
              f"--csv {options.csv}: there is no such folder")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.device = vbon.pick_device(options.device)
    options.size = options.size or ("gpt2" if options.device.startswith("cuda") else "mini")
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return options


def run(main):
    """Calls main(), telling the user's errors in one line with exit code 2."""
    sys.exit(vbon.run_script(os.path.basename(sys.argv[0]), main))


# --- models -------------------------------------------------------------------------------------------------


def flags_of(options, folder, shape=None):
    """vbon.py's flags for the options. Where they name no models, makes random ones in the folder."""
    if not options.ref:
        make_models(folder, *(shape or SIZES[options.size]), positions=max(128, options.max_new_tokens + 16))
        options.ref, options.reward = f"{folder}/ref", f"{folder}/reward"
        options.dataset = f"{folder}/prompts.jsonl"
    flags = {"task": "imdb", "ref": options.ref, "reward": options.reward, "dataset": options.dataset,
             "device": options.device, "dtype": options.dtype, "max-new-tokens": options.max_new_tokens,
             "train-prompts": 256, "test-prompts": 8, "rollouts": options.rollouts,
             "minibatch": min(32, options.rollouts), "ppo-epochs": 4,
             "critic-every": 0, "token-step": 0,  # the paper's PPO
             "episodes": 1_000_000, "out": f"{folder}/run",
             "samples": f"{folder}/samples"}
    return [text for name, value in flags.items() for text in ("--" + name, str(value))]


def make_models(folder, layers, width, heads, vocab, reward_layers, reward_width, positions):
    """A GPT-2 and a DistilBERT of random weights, words w1, w2, …, and 512 prompts of 2 to 8 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (DistilBertConfig, DistilBertForSequenceClassification, GPT2Config,
                              GPT2LMHeadModel, PreTrainedTokenizerFast)
    words = {"<eos>": 0} | {f"w{i}": i for i in range(1, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>",
                                        model_max_length=positions)
    torch.manual_seed(0)
    ref = GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    reward = DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=vocab, max_position_embeddings=positions, dim=reward_width, hidden_dim=4 * reward_width,
        n_layers=reward_layers, n_heads=reward_width // 32, id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1}))
    for name, model in (("ref", ref), ("reward", reward)):
        model.save_pretrained(f"{folder}/{name}")
        tokenizer.save_pretrained(f"{folder}/{name}")
    rng = random.Random(0)
    with open(f"{folder}/prompts.jsonl", "w", encoding="utf-8") as file:
        for _ in range(512):
            prompt = " ".join(f"w{rng.randrange(1, vocab)}" for _ in range(rng.randint(2, 8)))
            file.write(json.dumps({"prompt": prompt}) + "\n")


def stock(lm):
    """A copy of the model as transformers builds it, for the peers: vbon.py puts a faster GELU in."""
    with torch.device(lm.device):
        copy = type(lm)(lm.config)
    copy.load_state_dict(lm.state_dict())
    return copy.eval()


# --- PPO phases of vbon.py ----------------------------------------------------------------------------------


def learner(flags, M=200):
    """All that a PPO phase takes. The rewards of π_ref's samples are made up: a phase does not notice."""
    args = vbon.parse_args([*flags, "--M", str(M)])
    task = vbon.setup(args)
    torch.manual_seed(0)
    policy = vbon.make_policy(task.ref, args.unfrozen_layers, args.token_step > 0)
    critic = vbon.make_critic(policy, args)
    counts = torch.zeros(len(policy.get_output_embeddings().weight), dtype=torch.double)
    trained = [*policy.parameters()] + ([] if args.critic_every else [*critic.parameters()])
    return SimpleNamespace(
        args=args, task=task, policy=policy, critic=critic, counts=counts,
        ref_rewards={p: torch.rand(M, dtype=torch.double).sort().values for p in task.train_prompts},
        optimizer=vbon.make_optimizer(trained, args),
        generator=torch.Generator(args.device), stream=vbon.shuffled(task.train_prompts, 0))


def phase(l, prompts=None, **changed):
    """One PPO phase: its metrics, and its "seconds" and "processor" time. `changed`: settings such as N."""
    vars(l.args).update(changed)
    prompts = prompts or list(itertools.islice(l.stream, l.args.rollouts))
    ref_rewards = torch.stack([l.ref_rewards[p] for p in prompts])
    start, busy = clock(l.args.device), time.process_time()
    rollout, metrics = vbon.collect(l.policy, l.critic, l.task, prompts, ref_rewards, l.args, l.generator)
    metrics |= vbon.update(l.policy, l.critic, l.counts, l.optimizer, rollout, l.args, l.generator)
    return metrics | {"seconds": clock(l.args.device) - start, "processor": time.process_time() - busy}


def clock(device):
    """Seconds, once the device has done all that it was asked for."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory_mb(device, peak=True):
    """(Peak) memory of this process, MB: what torch holds of a GPU, else what is resident.

    On Linux VmHWM, which starts afresh with a program; ru_maxrss would count what the parent process held.
    """
    if device.startswith("cuda"):
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device) / 2 ** 20
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            name = "VmHWM" if peak else "VmRSS"
            return next(int(line.split()[1]) for line in file if line.startswith(name)) / 2 ** 10
    except FileNotFoundError:
        import resource
        unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak(device):
    """Lets peak memory start afresh, where that can be done: on a GPU and on Linux."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # else what was freed before would count
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")


def matmul_rate(rows, inner, columns, device, dtype="float32", seconds=0.2):
    """FLOP/s of torch's matrix product (rows, inner) × (inner, columns)."""
    kind = getattr(torch, dtype)
    a, b = (torch.randn(*shape, device=device, dtype=kind) for shape in ((rows, inner), (inner, columns)))
    out = a @ b
    count, repeats, spent = 0, 1, 0.0
    while spent < seconds:
        start = clock(device)
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        spent += clock(device) - start
        count, repeats = count + repeats, repeats * 2
    return 2 * rows * inner * columns * count / spent


# --- other processes: JSON, a line for a line ---------------------------------------------------------------


class Side:
    """Another process, in a session of its own. It speaks first, once it has loaded, then answers requests.
    Its stderr is kept, to tell why it ended."""

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
        with suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        said = [text.strip() for text in self.log if text.strip()] or ["it said nothing"]
        reason = ([text for text in said if "Error" in text] or said)[-1]
        raise vbon.UserError(f"{self.name}: its process ended: {reason[:300]}")

    def signal(self, number):
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def stop(self):
        """Ends the process and all that it started."""
        self.signal(signal.SIGKILL)
        self.process.wait()


def answers():
    """For the other process: a function that sends an answer. What is printed from now on goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda message: print(json.dumps(message), file=out, flush=True)


# --- what is shown ------------------------------------------------------------------------------------------


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(device):
    """One line that says what the numbers were measured on."""
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    versions = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    return f"{cpu_name()}, {os.cpu_count()} cores{gpu}, {versions}"


def spread(values, digits=2):
    """'median (lowest–highest)'."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(rows):
    """Rows, dicts with the same keys, as aligned columns: the first to the left, the others to the right."""
    def text(x):
        return f"{x:.4g}" if isinstance(x, float) else "" if x is None else str(x)
    cells = [list(rows[0])] + [list(map(text, row.values())) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        aligned = (x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths)))
        print("  ".join(aligned).rstrip(), flush=True)


def write_csv(path, rows, **same):
    """Rows to a file, with what is the same in all; under a temporary name first, so that it is whole."""
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
