#!/usr/bin/env python3
"""Compare vbon.py with TRL: RLOO and GRPO of version 1.16, PPO of 1.12, the last one that has it.

    python bench/vs_trl.py times                     # seconds per iteration and peak memory
    python bench/vs_trl.py toy --seeds 3             # exact KL to Best-of-16 after training
    python bench/vs_trl.py imdb --ref DIR --reward DIR --dataset DIR --seeds 3     # estimated
    python bench/vs_trl.py imdb --ref … --runs sweeps/long -- --episodes 20480     # vbon.py flags

The first call makes two environments with TRL. Every side is a process of its own, and only one
runs at a time. `times` loads each side once, then they take turns; it has the flags --size,
--rollouts, --max-new-tokens and --rounds. `toy` and `imdb` train what is missing in --runs, test it
as evaluate.py does, and report the minutes of processor time of training: pass --threads 1.

All sides have the same prompts, reference samples, rollouts and minibatches per iteration, AdamW,
learning rate and decay, and train all layers. TRL's reward function is the README's. TRL clips
gradients at norm 1, its default. A hook passes position ids to its models, because TRL does not.
PPO of TRL 1.12 takes rewards from a causal classifier on the policy's own tokens. Here a stand-in
decodes them and calls vbon.py's reward. Its value model is a second language model.
"""
import copy
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
import evaluate
import vbon
from results.curves import curve
from vbon import UserError

HERE, PARTS = os.path.dirname(os.path.abspath(__file__)), common.PARTS
PACKAGES = ["torch==2.13.0", "transformers>=5.16.1,<5.20", "accelerate", "psutil", "pandas",
            "datasets>=4"]
# The trainer; flags of vbon.py, or settings of TRL's trainer; the parts that it is in.
NO_CRITIC = "--prefix-critic 0 --value-coef 0 --lam 1 --token-bias-lr 0"
UNSCALED = {"scale_rewards": "none", "loss_type": "dr_grpo"}
SIDES = {
    "vBoN": ("vbon", "", "times toy imdb"),
    "vBoN, no critic": ("vbon", NO_CRITIC, "times imdb"),
    "TRL 1.16 RLOO": ("RLOO", {}, "times toy imdb"),
    "TRL 1.16 GRPO, unscaled": ("GRPO", UNSCALED, "toy"),
    "TRL 1.16 GRPO": ("GRPO", {}, "toy"),
    "TRL 1.12 PPO": ("PPO", {}, "times"),
}
FLAGS = {  # vbon.py's flags for all sides
    "times": "--prefix-critic 2 --ppo-epochs 1",
    "toy": "--task toy --episodes 57344",
    "imdb": "--task imdb --episodes 3840 --train-prompts 256 --lr 1e-4 --unfrozen-layers -1"}


# ---- TRL's trainers -----------------------------------------------------------------------------


def group_trainer(kind, settings, args, task, ref_rewards, at_iteration):
    """Return TRL's RLOO or GRPO trainer.

    It calls at_iteration(trainer, metrics of the previous iteration or None) before each iteration.
    The trainer's `report` does so after the last one. Args: ref_rewards (P, M).
    """
    import trl
    from datasets import Dataset
    G, steps = 8 if args.task == "toy" else 4, args.rollouts // args.minibatch
    index = {prompt: i for i, prompt in enumerate(task.prompts)}

    def reward(prompts, completions, **_):
        scores = torch.tensor(task.score(prompts, completions), dtype=torch.double)
        ref = ref_rewards[[index[prompt] for prompt in prompts]]
        Trainer.k = vbon.mid_ranks(scores, ref)
        return vbon.vbon_reward(vbon.estimate_log_F(scores, ref), 0, args.N, "bound").tolist()

    class Trainer(getattr(trl, kind + "Trainer")):
        marks, numbers = [], {}

        def _generate(self, *inputs):
            out = super()._generate(*inputs)
            self.marks.append(common.clock(args.device))
            return out

        def _generate_and_score_completions(self, inputs):
            self.report()
            self.marks[:] = [time.perf_counter()]
            out = super()._generate_and_score_completions(inputs)
            self.marks.append(common.clock(args.device))
            if kind == "RLOO":  # GRPO computes another KL, and later
                tokens = out["completion_mask"].sum(1).float().mean().item()
                kl = self._metrics["train"]["kl"][-1] * tokens
                log_F = evaluate.policy_log_F(self.k, args.M).mean().item()
                self.numbers = {"objective/kl_to_bon": vbon.kl_to_bon(kl, log_F, args.N)}
            return out

        def report(self):
            seconds = times(self.marks, args.device) if self.marks else {}
            at_iteration(self, self.numbers | seconds if self.marks else None)

    common.stock(task.ref).save_pretrained(f"{args.out}/ref")  # TRL loads the reference by name
    # The M rewards are no column, because accelerate iterates over every number at every step.
    rows = [{"prompt": prompt} for prompt in task.prompts]
    config = getattr(trl, kind + "Config")(
        beta=1 / args.N, temperature=args.temperature, max_completion_length=args.max_new_tokens,
        disable_dropout=True, model_init_kwargs={"dtype": "float32"}, num_generations=G,
        seed=args.seed, steps_per_generation=steps, gradient_accumulation_steps=1,
        num_iterations=args.ppo_epochs, logging_strategy="no",
        max_steps=args.episodes // args.rollouts * steps * args.ppo_epochs,
        lr_scheduler_type=args.lr_schedule, adam_beta2=0.95, adam_epsilon=args.adam_eps,
        weight_decay=1e-6, **settings, **same_settings(args))
    copies = -(-args.rollouts // (G * len(rows)))  # an iteration takes no row twice
    trainer = Trainer(f"{args.out}/ref", reward_funcs=reward, args=config,
                      processing_class=task.tokenizer,
                      train_dataset=Dataset.from_list(rows * copies))
    for lm in (trainer.model, trainer.ref_model):
        lm.register_forward_pre_hook(fill_positions, with_kwargs=True)
    return trainer


def times(marks, device):
    """Return the seconds of each part of an iteration, from its three time stamps and now."""
    ends = [*marks[1:], common.clock(device)]
    return {"time/" + part: b - a for part, a, b in zip(PARTS, marks, ends)}


def same_settings(args):
    """Return settings of both versions of TRL."""
    return dict(output_dir=args.out, per_device_train_batch_size=args.minibatch,
                learning_rate=args.lr, gradient_checkpointing=False, bf16=args.dtype == "bfloat16",
                use_cpu=args.device == "cpu", report_to="none", save_strategy="no",
                disable_tqdm=True)


def fill_positions(lm, inputs, named):
    """Pass the positions of left-padded prompts where TRL passes none."""
    if named.get("position_ids") is None:
        named["position_ids"] = (named["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs, named


def ppo_trainer(args, task, at_iteration):
    """Return the PPO trainer of TRL 1.12. An iteration ends where the next one starts."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, ppo_trainer as module
    generate, whiten, marks = module.batch_generation, module.masked_whiten, []

    def marked_generate(*inputs, **named):
        at_iteration(None, times(marks, args.device) if marks else None)
        marks[:] = [time.perf_counter()]
        out = generate(*inputs, **named)
        marks.append(common.clock(args.device))
        return out

    def marked_whiten(values, mask, shift_mean=True):  # the last step before the updates
        out = whiten(values, mask, shift_mean)
        marks.append(common.clock(args.device))
        return out
    module.batch_generation, module.masked_whiten = marked_generate, marked_whiten
    tokenizer, ref = task.tokenizer, common.stock(task.ref)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # TRL masks it and never embeds it
    tokenizer.padding_side = "left"
    config = PPOConfig(
        num_mini_batches=args.rollouts // args.minibatch, num_ppo_epochs=args.ppo_epochs,
        kl_coef=1 / args.N, total_episodes=1000 * args.rollouts, stop_token="eos",
        response_length=args.max_new_tokens, temperature=args.temperature,
        num_sample_generations=0, gradient_accumulation_steps=1,
        **same_settings(args) | {"per_device_train_batch_size": args.rollouts})
    value = AutoModelForSequenceClassification.from_pretrained(args.ref, num_labels=1,
                                                               dtype=torch.float32)
    prompts = Dataset.from_dict({"input_ids": [tokenizer.encode(p) for p in task.prompts]})
    return module.PPOTrainer(
        args=config, processing_class=tokenizer, model=copy.deepcopy(ref), ref_model=ref,
        value_model=value, reward_model=reward_of_texts(task), train_dataset=prompts,
        eval_dataset=Dataset.from_dict({"input_ids": [[0]]}))


def reward_of_texts(task):
    """Wrap vbon.py's reward as a causal classifier that returns it at every position."""
    def backbone(input_ids, attention_mask, **_):
        plain = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts = [task.tokenizer.decode(ids[mask], **plain)
                 for ids, mask in zip(input_ids, attention_mask)]
        rewards = torch.tensor(task.score([""] * len(texts), texts), device=input_ids.device)
        return SimpleNamespace(hidden_states=[rewards.view(-1, 1, 1).expand(*input_ids.shape, 1)])
    model = torch.nn.Module()
    model.base_model_prefix, model.backbone, model.score = "backbone", backbone, torch.nn.Identity()
    return model


# ---- the process of a side ----------------------------------------------------------------------


def serve(kind, settings, flags):
    """Run an iteration per line of stdin."""
    answer, busy = common.answers(), [0.0]
    device = flags[flags.index("--device") + 1]

    def at_iteration(_, numbers):
        spent = {"processor": time.process_time() - busy[0], "MB": common.memory_mb(device)}
        answer(numbers and {part: numbers["time/" + part] for part in PARTS} | spent)
        if not sys.stdin.readline():
            os._exit(0)
        busy[0] = time.process_time()
    if kind == "vbon":
        l, numbers = common.learner(flags), None
        while True:
            at_iteration(None, numbers)
            numbers = common.iteration(l)
    args = common.vbon_args(flags)
    task = vbon.setup(args)
    random = torch.rand(len(task.prompts), args.M, dtype=torch.double)
    (ppo_trainer(args, task, at_iteration) if kind == "PPO" else
     group_trainer(kind, settings, args, task, random, at_iteration)).train()


def train(kind, settings, flags):
    """Train with vbon.py, or with RLOO or GRPO into a run's folder of the same format."""
    start, args, done, busy = time.perf_counter(), common.vbon_args(flags), [], [0.0]
    if kind == "vbon":
        collect, update = vbon.collect, vbon.update

        def timed_collect(*inputs):
            busy[0] = time.process_time()
            return collect(*inputs)

        def timed_update(*inputs):
            return update(*inputs) | {"time/processor": time.process_time() - busy[0]}
        vbon.collect, vbon.update = timed_collect, timed_update
        return vbon.train(args)

    task, iterations = vbon.setup(args), args.episodes // args.rollouts
    vbon.open_run(args)
    ref_rewards, policy = vbon.reference_samples(task, args), vbon.make_policy(task.ref, -1)
    sampled = time.perf_counter() - start
    toy = vbon.ExactToy(task, args, ref_rewards) if args.task == "toy" else None

    def at_iteration(trainer, numbers):
        if numbers:
            numbers |= {"time/processor": time.process_time() - busy[0]}
            done.append(numbers | {"episode": (len(done) + 1) * args.rollouts})
            policy.load_state_dict(trainer.model.state_dict())
            if toy and len(done) * 8 // iterations > (len(done) - 1) * 8 // iterations:
                name = f"π_θ, {done[-1]['episode']:,} episodes"
                done[-1] |= toy.report(name, toy.log_probs(policy))
        busy[0] = time.process_time()
    trainer = group_trainer(kind, settings, args, task, ref_rewards, at_iteration)
    trainer.train()
    trainer.report()
    lines = "".join(json.dumps(row) + "\n" for row in done)
    vbon.atomic_write(f"{args.out}/metrics.jsonl", lines)
    result = {"episodes": args.episodes, "seconds": time.perf_counter() - start,
              "seconds_sampling": sampled} | (toy.optimum if toy else {})
    vbon.save_run(args, task, policy, result)


# ---- the main process ---------------------------------------------------------------------------


def environment(version, given):
    """Return an interpreter with this version of TRL: the given one, or that of a folder in
    bench/, which the first call makes."""
    folder = os.path.join(HERE, ".venv-trl-" + version)
    python = given or os.path.join(folder, "bin", "python")
    complete = os.path.join(folder, "complete")
    if not (given or os.path.exists(complete)):
        print(f"making an environment with TRL {version} in {folder} (minutes)", flush=True)
        install = [python, "-m", "pip", "install", "-q"]
        cpu = ["--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "0"]
        for command in ([sys.executable, "-m", "venv", "--clear", folder],
                        [*install, *([] if torch.version.cuda else cpu), PACKAGES[0]],
                        [*install, *PACKAGES, "trl==" + version]):
            if subprocess.run(command).returncode:
                raise UserError(f"{' '.join(command[:4])} … failed: pass --trl or --trl-ppo")
        vbon.atomic_write(complete, "")
    return python


def command_of(name, job, options, first):
    """Return the command line of a side and its environment variables."""
    kind, own, _ = SIDES[name]
    own = own.split() if kind == "vbon" else []
    flags = [*first, *FLAGS[options.part].split(), "--device", options.device,
             "--dtype", options.dtype, *own, *options.more]
    pages = str(int(kind == "vbon"))  # pages of 2 MB are a feature of vbon.py
    environ = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "THP_MEM_ALLOC_ENABLE": pages}
    version = ("1.12.0", options.trl_ppo) if kind == "PPO" else ("1.16.0", options.trl)
    python = sys.executable if kind == "vbon" else environment(*version)
    return [python, os.path.abspath(__file__), "--side", json.dumps([name, job, flags])], environ


def measure(names, options):
    """Return a row per side and round, after a warm-up. The sides take turns."""
    with common.temporary_folder() as folder:
        first, rows = [*common.flags_of(options, folder), "--unfrozen-layers", "-1"], []
        sides = {name: common.Side(name, *command_of(name, "serve", options,
                                                     [*first, "--out", f"{folder}/{i}"]))
                 for i, name in enumerate(names)}
        for i in range(options.rounds + 1):
            for name, side in sides.items():
                measured = side.ask("iteration")
                total = sum(measured[part] for part in PARTS)
                if i > 0:
                    rows.append({"side": name, "round": i, "iteration": total} | measured)
            print(f"round {i} of {options.rounds}", file=sys.stderr)
    return rows


def report_times(rows, options):
    """Print medians of each side, and its ratios within a round to vbon.py without a critic."""
    def of(name, key):
        return [row[key] for row in rows if row["side"] == name]

    def ratios(name, key):
        return common.spread([a / b for a, b in zip(of(name, key), of(base, key))])
    names = list(dict.fromkeys(row["side"] for row in rows))
    base = "vBoN, no critic" if "vBoN, no critic" in names else names[0]
    print(f"\n{common.machine(options.device)}; {options.dtype}; iterations of {options.rollouts} "
          f"responses of {options.max_new_tokens} tokens; seconds, medians of {options.rounds} "
          f"rounds; ÷ {base}")
    table = []
    for name in names:
        medians = {key: statistics.median(of(name, key))
                   for key in ("iteration", *PARTS, "processor")}
        table.append({"side": name} | medians
                     | {"ms/episode": 1000 * medians["iteration"] / options.rollouts}
                     | {key + " ÷": ratios(name, key) for key in ("iteration", "processor")}
                     | {"peak MB": max(of(name, "MB"))})
    common.table(table)


def train_missing(names, options):
    """Train what is missing in --runs, then test it. Returns [(side, its runs, one per seed)]."""
    groups = {name: [] for name in names}
    own = [x for key in ("ref", "reward", "dataset") if getattr(options, key)
           for x in ("--" + key, getattr(options, key))]
    for seed in range(options.seeds):
        for name, folders in groups.items():
            short = name.replace(",", "").replace(" ", "-")
            out = f"{options.runs}/{options.part}-{short}-seed{seed}"
            if not os.path.exists(f"{out}/result.json"):
                print(f"\n--- {out}", flush=True)
                again = "--resume" if SIDES[name][0] == "vbon" else "--overwrite"
                own_run = [*own, "--seed", str(seed), "--out", out, again]
                command, environ = command_of(name, "train", options, own_run)
                if subprocess.run(command, env=os.environ | environ).returncode:
                    raise UserError(f"{out}: training failed, the same command continues")
            folders.append(out)

    flags = [*options.test.split(), "--device", options.device]
    for name, folders in groups.items():
        parser = evaluate.make_parser("")
        test = evaluate.parse_options(parser, [*folders, *flags])
        runs = [evaluate.read_run(folder) for folder in folders]
        pairs = zip(options.more[::2], options.more[1::2])
        for run, (flag, value) in itertools.product(runs, pairs):
            used = run["config"][flag.strip("-").replace("-", "_")]
            if type(used)(value) != used:
                raise UserError(f"{run['folder']} has {flag} {used}, got {value}: "
                                "pass another --runs")
        groups[name] = evaluate.evaluate_runs(runs, test)
        for run in groups[name]:
            run["result"]["minutes"] = max(minutes_of(run).values())
    return list(groups.items())


def minutes_of(run):
    """Return {episode: minutes of processor time of training until then}."""
    seconds = itertools.accumulate(row["time/processor"] for row in run["metrics"])
    return {row["episode"]: s / 60 for row, s in zip(run["metrics"], seconds)}


def report_training(groups, options):
    """Print evaluate.py's table and plot the KL to Best-of-N over minutes and over episodes."""
    def minutes(runs):
        return statistics.fmean(run["result"]["minutes"] for run in runs)
    timed = [(f"{name}, {minutes(runs):.1f} min", runs) for name, runs in groups]
    print(f"\n{common.machine(options.device)}\n" + evaluate.table(timed))
    if options.csv:
        evaluate.write_csv(options.csv, [run for _, runs in groups for run in runs])
    if options.figure:
        title = f"{options.part}: vbon.py and TRL, means over {options.seeds} seeds"
        with evaluate.picture(options.figure, title, 2) as (left, right):
            for name, runs in groups:
                curves = [curve(run, "kl_to_bon") for run in runs]
                clocks = [minutes_of(run) for run in runs]
                episodes = list(curves[0])
                y, x = ([statistics.fmean(c[e] for c in of) for e in episodes]
                        for of in (curves, clocks))
                left.plot(x, y, label=name)
                right.plot(episodes, y, label=name)
            left.set(xlabel="minutes of one core", ylabel="KL(π_θ ‖ π_bon), nats", yscale="log")
            right.set(xlabel="episodes", yscale="log")


def main():
    if sys.argv[1:2] == ["--side"]:
        name, job, flags = json.loads(sys.argv[2])
        return {"serve": serve, "train": train}[job](*SIDES[name][:2], flags)
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("part", choices=FLAGS)
    add("--trl", metavar="PYTHON", help="interpreter with TRL 1.16 [a new one in bench/]")
    add("--trl-ppo", metavar="PYTHON", help="interpreter with TRL 1.12 [a new one in bench/]")
    add("--skip", nargs="*", choices=SIDES, default=[], help="sides to leave out")
    add("--seeds", type=common.positive, default=1, help="number of seeds of toy and imdb [1]")
    add("--runs", default="sweeps/vs_trl", help="folder of their runs [%(default)s]")
    add("--test", metavar="FLAGS", default="", help="evaluate.py's flags, --test='--test-M 64 …'")
    add("--figure", metavar="FILE", help="figure of the KL to Best-of-N during training")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = common.parse(parser, sys.argv[1:cut])
    options.more = sys.argv[cut + 1:]
    names = [name for name, (_, _, parts) in SIDES.items()
             if options.part in parts.split() and name not in options.skip]
    if options.part == "times":
        rows = measure(names, options)
        report_times(rows, options)
        common.write_csv(options.csv, rows, machine=common.machine(options.device))
    else:
        report_training(train_missing(names, options), options)


if __name__ == "__main__":
    common.run(main)
