#!/usr/bin/env python3
"""vbon.py's PPO beside TRL's (trl.experimental.ppo): seconds per phase and peak memory, all else alike.

    python bench/ppo_vs_trl.py                                 # random models; makes TRL's environment first
    python bench/ppo_vs_trl.py --ref DIR --reward DIR --dataset DIR --threads 1 --csv FILE
    python bench/ppo_vs_trl.py --trl-python PYTHON             # an environment that has TRL already

Each side is a process of its own, which loads once and then runs a phase when told to: one runs at a time,
and they take turns. A phase is --rollouts responses, their rewards, and 4 epochs of minibatches of 32, in all
sides with AdamW and --dtype.

TRL takes rewards from a causal classifier on the policy's own tokens and reads `.score` off the last of them,
so a DistilBERT does not go in as it is. Here a stand-in decodes the tokens and calls the very reward function
of vbon.py: same texts, same cost. TRL trains all layers of the policy and of a value model of the same size,
which has its own backbone; vbon.py's value head sits on the policy. That is part of what is compared, as are
the fused GELU and the larger memory pages that vbon.py sets up. TRL has no flag for freezing: "TRL, top 2"
sets requires_grad by hand, in both.
"""
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import torch

import common
import vbon

PACKAGES = ["torch==2.13.0", "transformers>=5.16.1,<5.20", "trl==1.12.0", "accelerate", "psutil", "pandas",
            "numpy>=2", "tqdm", "datasets>=4"]
SIDES = {"vBoN, all layers": ("vbon", -1), "vBoN, top 2": ("vbon", 2),
         "TRL, all layers": ("trl", -1), "TRL, top 2": ("trl", 2)}
PARTS = ("seconds", *common.PARTS)


# --- the sides: a line on stdin asks for a phase, a line on stdout answers ----------------------------------


def serve_vbon(request, answer):
    """A phase of vbon.py for each line, which names the objective."""
    l = common.learner(request.flags)
    answer("ready")
    for line in sys.stdin:
        m = common.phase(l, objective=json.loads(line))
        answer({"seconds": m["seconds"], **{part: m["time/" + part] for part in common.PARTS},
                "length": m["objective/length"], "memory": common.memory_mb(l.args.device)})


def serve_trl(request, answer):
    """A phase of TRL's PPOTrainer for each line: its loop waits before it generates, which ends a phase."""
    from trl.experimental.ppo import ppo_trainer
    generate, whiten, marks = ppo_trainer.batch_generation, ppo_trainer.masked_whiten, []

    def waiting_generate(*args, **kwargs):
        device, length = str(args[1].device), args[4].max_new_tokens
        marks.append(common.clock(device))
        if len(marks) == 4:
            times = [b - a for a, b in zip(marks, marks[1:])]
            answer(dict(zip(PARTS, [sum(times), *times]))
                   | {"length": length, "memory": common.memory_mb(device)})
        else:
            answer("ready")
        if not sys.stdin.readline():
            os._exit(0)
        marks[:] = [time.perf_counter()]
        out = generate(*args, **kwargs)
        marks.append(common.clock(device))
        return out

    def marking_whiten(values, mask, shift_mean=True):  # the last step before the updates
        out = whiten(values, mask, shift_mean)
        marks.append(common.clock(str(values.device)))
        return out
    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = waiting_generate, marking_whiten
    trl_trainer(ppo_trainer, request).train()


def trl_trainer(ppo_trainer, request):
    """TRL's trainer on vbon.py's pieces and settings, without gradient checkpointing, saving or reports."""
    import copy
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig
    args = vbon.parse_args(request.flags)
    task = vbon.setup(args)
    tokenizer, task.ref = task.tokenizer, common.stock(task.ref)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # TRL masks it out and never embeds it
    tokenizer.padding_side = "left"
    policy = copy.deepcopy(task.ref)
    value = AutoModelForSequenceClassification.from_pretrained(args.ref, num_labels=1, dtype=torch.float32)
    if args.unfrozen_layers > 0:
        for model in (policy, value):
            freeze(model, args.unfrozen_layers)
    config = PPOConfig(
        output_dir=args.out, per_device_train_batch_size=args.rollouts, gradient_accumulation_steps=1,
        num_mini_batches=args.rollouts // args.minibatch, num_ppo_epochs=args.ppo_epochs,
        total_episodes=1000 * args.rollouts, local_rollout_forward_batch_size=request.trl_batch,
        response_length=args.max_new_tokens, temperature=args.temperature, stop_token="eos",
        learning_rate=args.lr, kl_coef=0.05, num_sample_generations=0, gradient_checkpointing=False,
        bf16=args.dtype == "bfloat16", use_cpu=args.device == "cpu", report_to="none", save_strategy="no",
        disable_tqdm=True)
    return ppo_trainer.PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=task.ref, value_model=value,
        reward_model=reward_of_texts(task), eval_dataset=Dataset.from_dict({"input_ids": [[0]]}),
        train_dataset=Dataset.from_dict({"input_ids": [tokenizer.encode(p) for p in task.train_prompts]}))


def freeze(model, K):
    """Gradients for the top K layers and what stands behind them only, as vbon.make_policy has it."""
    owner, name = vbon.transformer_layers(model)
    layers, children = getattr(owner, name), list(owner.children())
    model.requires_grad_(False)
    for module in [*layers[-K:], *children[children.index(layers) + 1:]]:
        module.requires_grad_(True)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)


def reward_of_texts(task):
    """vbon.py's reward where TRL expects a causal classifier: tokens -> text -> reward, at every position."""
    def backbone(input_ids, attention_mask, **_):
        plain = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts = [task.tokenizer.decode(ids[mask], **plain) for ids, mask in zip(input_ids, attention_mask)]
        rewards = torch.tensor(task.score([""] * len(texts), texts), device=input_ids.device)
        return SimpleNamespace(hidden_states=[rewards.view(-1, 1, 1).expand(*input_ids.shape, 1)])
    model = torch.nn.Module()
    model.base_model_prefix, model.backbone, model.score = "backbone", backbone, torch.nn.Identity()
    return model


# --- the conductor ------------------------------------------------------------------------------------------


def trl_python(given):
    """The interpreter that has TRL: the given one, or bench/.venv-trl's, which is made on the first call."""
    if given:
        return given
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), ".venv-trl")
    python = os.path.join(folder, "bin", "python")
    if not os.path.exists(os.path.join(folder, "complete")):
        print(f"making TRL's environment in {folder} (some minutes)", flush=True)
        cpu_only = ["--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "0"]
        install = [python, "-m", "pip", "install", "-q"]
        torch_first = [*install, *([] if torch.version.cuda else cpu_only), PACKAGES[0]]
        new = [sys.executable, "-m", "venv", "--clear", folder]
        for command in (new, torch_first, [*install, *PACKAGES]):
            vbon.need(subprocess.run(command).returncode == 0, "TRL's environment could not be made "
                      f"({' '.join(command[:4])} …): pass --trl-python PYTHON")
        for name, text in ((".gitignore", "*\n"), ("complete", "")):
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(text)
    return python


def start_side(name, options, flags):
    """The process of one side, loaded."""
    kind, layers = SIDES[name]
    request = {"kind": kind, "threads": torch.get_num_threads(), "trl_batch": options.trl_batch,
               "flags": [*flags, "--unfrozen-layers", str(layers)]}
    python = options.trl_python if kind == "trl" else sys.executable
    pages = {"THP_MEM_ALLOC_ENABLE": "0"} if kind == "trl" else {}  # vbon.setup would set it to 1
    return common.Side(name, [python, os.path.abspath(__file__), "--side", json.dumps(request)], pages)


def side_main(text):
    """What a side's process runs."""
    request = SimpleNamespace(**json.loads(text))
    answer = common.answers()
    common.parse(common.parser_of(""), ["--threads", str(request.threads)])
    (serve_vbon if request.kind == "vbon" else serve_trl)(request, answer)


def main():
    if sys.argv[1:2] == ["--side"]:
        return side_main(sys.argv[2])
    parser = common.parser_of(__doc__)
    parser.add_argument("--trl-python", metavar="PYTHON", help="has TRL [bench/.venv-trl, which is made]")
    parser.add_argument("--trl-batch", type=common.positive, default=64,
                        help="TRL's local_rollout_forward_batch_size [64, its default]")
    parser.add_argument("--skip", nargs="*", choices=SIDES, default=[], help="sides to leave out")
    options = common.parse(parser)
    names = [name for name in SIDES if name not in options.skip]
    if any(SIDES[name][0] == "trl" for name in names):
        options.trl_python = trl_python(options.trl_python)
    with common.temporary_folder() as folder:
        flags = common.flags_of(options, folder)
        report(measure({name: start_side(name, options, flags) for name in names}, options.rounds), options)


def measure(sides, rounds):
    """{(side, objective): answers}, one in every round after the first, a warm-up. Ctrl-C ends it early."""
    turns = [(name, objective) for name in sides
             for objective in (("rlhf", "vbon") if name.startswith("vBoN") else ("rlhf",))]
    seen = {turn: [] for turn in turns}
    try:
        for i in range(rounds + 1):
            answers = [sides[name].ask(objective) for name, objective in turns]
            for turn, answer in zip(turns, answers):
                seen[turn] += [answer] * (i > 0)
            print(f"round {i} of {rounds}", file=sys.stderr)
    except KeyboardInterrupt:
        if not all(seen.values()):
            raise
    return seen


def report(seen, options):
    """Medians of each side, and its ratios to TRL round by round: median (lowest–highest)."""
    def columns(numbers):
        return {("phase" if part == "seconds" else part): numbers(part) for part in PARTS}

    def peak(answers):
        return max(a["memory"] for a in answers)
    machine = common.machine(options.device)
    print(f"\n{machine}; {options.dtype}; {options.rollouts} rollouts of {options.max_new_tokens} tokens; "
          f"seconds, medians of {min(map(len, seen.values()))} rounds")
    common.table([{"side": name, "objective": objective}
                  | columns(lambda part: statistics.median(a[part] for a in answers))
                  | {"episodes/s": statistics.median(options.rollouts / a["seconds"] for a in answers),
                     "peak MB": peak(answers), "tokens": statistics.median(a["length"] for a in answers)}
                  for (name, objective), answers in seen.items()])
    ratios = []
    for ((trl, _), theirs), ((name, objective), ours) in itertools.product(seen.items(), repeat=2):
        if trl[:3] + name[:4] == "TRLvBoN" and (trl, name) != ("TRL, top 2", "vBoN, all layers"):
            pairs = list(zip(theirs, ours))
            ratios.append({"ratio": f"{trl} ÷ {name}", "objective": objective}
                          | columns(lambda part: common.spread([t[part] / o[part] for t, o in pairs]))
                          | {"our peak memory ÷ theirs": f"{peak(ours) / peak(theirs):.2f}"})
    if ratios:
        print("\ntheir time ÷ ours, round by round: median (lowest–highest)")
        common.table(ratios)
    rows = [{"side": name, "objective": objective, "round": i, **answer}
            for (name, objective), answers in seen.items() for i, answer in enumerate(answers)]
    common.write_csv(options.csv, rows, rollouts=options.rollouts, max_new_tokens=options.max_new_tokens,
                     dtype=options.dtype, machine=machine)


if __name__ == "__main__":
    common.run(main)
