"""What the benchmarks share: the command line, the pieces that they run on, PPO phases of vbon.py, tables and CSV files.

Without --ref, --reward and --dataset they run on models with random weights, which are made in a temporary folder: speed and
memory do not depend on what a model has learned, as long as responses have the same length (random models never end one).
"""
import argparse
import csv
import itertools
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as vbon.begin does, but before there are any models

import torch

import vbon

SIZES = {  # layers, width, heads, vocabulary; layers and width of the reward model
    "mini": (4, 256, 4, 8192, 2, 192),
    "gpt2": (12, 768, 12, 50257, 6, 768),
}


# --- the command line -------------------------------------------------------------------------------------------------


def parser_of(description):
    """An argparse parser with the flags that all benchmarks have; its errors are one line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def one_line(message):
        raise vbon.UserError(message + " (see --help)")
    parser.error = one_line
    parser.add_argument("--ref", help="reference model, a hub name or folder; default: random weights of --size")
    parser.add_argument("--reward", help="reward model, a hub name or folder; goes with --ref")
    parser.add_argument("--dataset", help="prompts, a hub name, folder or .jsonl file; goes with --ref")
    parser.add_argument("--size", choices=SIZES, help="of the random models; default: gpt2 on a GPU, mini on a CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 [auto]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="arithmetic of the forward passes [float32]")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: torch's own choice")
    parser.add_argument("--rollouts", type=positive, default=128, help="responses per PPO phase [128]")
    parser.add_argument("--max-new-tokens", type=positive, default=40, help="tokens per response [40]")
    parser.add_argument("--rounds", type=positive, default=5, help="measurements of everything, after a warm-up [5]")
    parser.add_argument("--csv", help="also write the table here")
    return parser


def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse(parser, argv=None):
    """The options, checked as far as they can be before anything is loaded."""
    options = parser.parse_args(argv)
    given = [bool(x) for x in (options.ref, options.reward, options.dataset)]
    if any(given) and not all(given):
        raise vbon.UserError("--ref, --reward and --dataset go together: pass all three, or none for random models")
    if options.csv and not os.path.isdir(os.path.dirname(options.csv) or "."):
        raise vbon.UserError(f"--csv {options.csv}: there is no such folder")
    if options.threads:
        torch.set_num_threads(options.threads)
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return options


def run(main):
    """Calls main(), telling the user's errors in one line with exit code 2."""
    try:
        main()
    except vbon.UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# --- the pieces -------------------------------------------------------------------------------------------------------


def pieces(options, folder, shape=None):
    """vbon.py's flags for the given models, or for random ones that are made in the folder (shape: as in SIZES)."""
    if not options.ref:
        size = options.size or ("gpt2" if vbon.pick_device(options.device).type == "cuda" else "mini")
        make_models(folder, *(shape or SIZES[size]), positions=max(128, options.max_new_tokens + 16))
        options = SimpleNamespace(**vars(options) | {"ref": f"{folder}/ref", "reward": f"{folder}/reward", "dataset": f"{folder}/prompts.jsonl"})
    return ["--task", "imdb", "--ref", options.ref, "--reward", options.reward, "--dataset", options.dataset,
            "--device", options.device, "--dtype", options.dtype, "--train-prompts", "256", "--test-prompts", "8",
            "--rollouts", str(options.rollouts), "--minibatch", str(min(32, options.rollouts)), "--max-new-tokens", str(options.max_new_tokens),
            "--episodes", "1000000", "--out", f"{folder}/run", "--samples", f"{folder}/samples.jsonl"]


def make_models(folder, layers, width, heads, vocab, reward_layers, reward_width, positions=128):
    """A GPT-2 and a DistilBERT classifier with random weights over the words w0, w1, …, and 512 prompts of 2 to 8 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (DistilBertConfig, DistilBertForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast)
    backend = Tokenizer(models.WordLevel({"<eos>": 0} | {f"w{i}": i for i in range(1, vocab)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ref = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads,
                                     bos_token_id=0, eos_token_id=0, **no_dropout))
    reward = DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=vocab, max_position_embeddings=positions, dim=reward_width, hidden_dim=4 * reward_width, n_layers=reward_layers,
        n_heads=reward_width // 32, id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1}))
    for name, model in (("ref", ref), ("reward", reward)):
        model.save_pretrained(f"{folder}/{name}")
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", model_max_length=positions).save_pretrained(
            f"{folder}/{name}")
    rng = random.Random(0)
    with open(f"{folder}/prompts.jsonl", "w", encoding="utf-8") as file:
        for _ in range(512):
            words = (f"w{rng.randrange(1, vocab)}" for _ in range(rng.randint(2, 8)))
            file.write(json.dumps({"prompt": " ".join(words)}) + "\n")


def stock(lm):
    """A copy of the model as transformers builds it, for the peers: vbon.py puts a faster GELU in."""
    with torch.device(lm.device):
        copy = type(lm)(lm.config)
    copy.load_state_dict(lm.state_dict())
    return copy.eval()


# --- PPO phases of vbon.py --------------------------------------------------------------------------------------------


def learner(flags, M=200):
    """All that a PPO phase takes. Rewards of π_ref's samples are made up, sorted as vbon.py keeps them: drawing them is not the phase's."""
    args = vbon.parse_args([*flags, "--overwrite", "--M", str(M)])
    device, task = vbon.begin(args)
    torch.manual_seed(0)
    policy, value_head = vbon.make_policy(task.ref, args.unfrozen_layers)
    trained = [p for p in [*policy.parameters(), *value_head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, args.adam_beta2), eps=args.adam_eps, weight_decay=args.weight_decay, fused=True)
    ref_rewards = {p: torch.rand(M, dtype=torch.double).sort().values for p in sorted(set(task.train_prompts))}
    return SimpleNamespace(args=args, device=device, task=task, policy=policy, value_head=value_head, optimizer=optimizer,
                           generator=torch.Generator(device), ref_rewards=ref_rewards, stream=vbon.shuffled(task.train_prompts, random.Random(0)))


def phase(l, prompts=None, **changed):
    """One PPO phase; its metrics, with the wall-clock seconds of the whole as "seconds". `changed`: arguments such as objective and N."""
    for name, value in changed.items():
        setattr(l.args, name, value)
    prompts = prompts or list(itertools.islice(l.stream, l.args.rollouts))
    ref_rewards = torch.stack([l.ref_rewards[p] for p in prompts])
    synchronize(l.device)
    start = time.perf_counter()
    metrics = vbon.ppo_phase(l.policy, l.value_head, l.task.ref, l.optimizer, l.task, prompts, ref_rewards, l.args, l.generator)
    synchronize(l.device)
    return metrics | {"seconds": time.perf_counter() - start}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_mb(peak=True, device=None):
    """(Peak) memory of this process, MB: of the GPU where there is one, else resident.

    On Linux VmHWM, which starts afresh with a program; ru_maxrss would count what the parent process held when it forked.
    """
    if device is not None and device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)) / 2 ** 20
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM" if peak else "VmRSS")) / 2 ** 10
    except FileNotFoundError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def matmul_rate(rows, inner, columns, device, dtype="float32", seconds=0.2):
    """FLOP/s of torch's matrix product (rows, inner) × (inner, columns)."""
    kind = getattr(torch, dtype)
    a, b = torch.randn(rows, inner, device=device, dtype=kind), torch.randn(inner, columns, device=device, dtype=kind)
    out = a @ b
    count, repeats, spent = 0, 1, 0.0
    while spent < seconds:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        synchronize(device)
        spent += time.perf_counter() - start
        count, repeats = count + repeats, repeats * 2
    return 2 * rows * inner * columns * count / spent


# --- what is shown ----------------------------------------------------------------------------------------------------


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(device=None):
    """One line that says what the numbers were measured on."""
    gpu = f", {torch.cuda.get_device_name(device)}" if device is not None and device.type == "cuda" else ""
    return f"{cpu_name()}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def spread(values, digits=2):
    """'median (lowest–highest)'."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(rows):
    """Rows, dicts with the same keys, as aligned columns: the first to the left, the others to the right."""
    cells = [list(rows[0])] + [[f"{x:.4g}" if isinstance(x, float) else "" if x is None else str(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths))).rstrip())


def write_csv(path, rows, **same):
    """Rows to a file, with what is the same in all of them; under a temporary name first, so that it is whole or not there."""
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
