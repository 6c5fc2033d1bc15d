#!/usr/bin/env python3
"""vbon.py beside TRL: RLOO, which has the same objective, and GRPO of TRL 1.16, and TRL 1.12's PPO, the last.

    python bench/vs_trl.py times                     # seconds per phase and peak memory, on random models
    python bench/vs_trl.py toy --seeds 3             # the exact distance to Best-of-16
    python bench/vs_trl.py imdb --ref DIR --reward DIR --dataset DIR --seeds 3             # its estimate
    python bench/vs_trl.py imdb --ref … --runs sweeps/long -- --episodes 20480             # vbon.py's flags

It makes two environments for TRL first. Every side is a process of its own, and one runs at a time. `times`:
each loads once, then they take turns; --size, --rollouts, --max-new-tokens and --rounds are for this part.
`toy` and `imdb` train and test what --runs does not hold yet, and give minutes of the processor, without
tests: pass --threads 1.

All sides have the same prompts, samples of π_ref, phases of as many rollouts and minibatches, AdamW,
learning rate and decay, and train all layers. TRL's reward is the README's function; its gradients are
clipped at norm 1, its default; a hook gives its models the positions that TRL does not. TRL 1.12 takes
rewards from a causal classifier on the policy's own tokens: a stand-in decodes them and calls vbon.py's
reward. Its value model is a second language model.
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

HERE, PARTS = os.path.dirname(os.path.abspath(__file__)), common.PARTS
PACKAGES = ["torch==2.13.0", "transformers>=5.16.1,<5.20", "accelerate", "psutil", "pandas", "datasets>=4"]
SIDES = {  # the trainer; flags of vbon.py, or settings of TRL's trainer; where it takes part
    "vBoN": ("vbon", "", "times toy imdb"),
    "vBoN, no critic": ("vbon", "--critic-every 0 --value-coef 0 --lam 1 --token-step 0", "times imdb"),
    "TRL 1.16 RLOO": ("RLOO", {}, "times toy imdb"),
    "TRL 1.16 GRPO, unscaled": ("GRPO", {"scale_rewards": "none", "loss_type": "dr_grpo"}, "toy"),
    "TRL 1.16 GRPO": ("GRPO", {}, "toy"),
    "TRL 1.12 PPO": ("PPO", {}, "times"),
}
FLAGS = {  # of vbon.py, for all sides
    "times": "--critic-every 2 --ppo-epochs 1",
    "toy": "--task toy --episodes 57344",
    "imdb": "--task imdb --episodes 3840 --train-prompts 256 --lr 1e-4 --unfrozen-layers -1"}


# --- TRL's trainers -----------------------------------------------------------------------------------------


def group_trainer(kind, settings, args, task, ref_rewards, at_phase):
    """TRL's RLOO or GRPO. Calls at_phase(trainer, numbers of the phase before, None at first) before each
    phase; the trainer's `tell` does so after the last."""
    import trl
    from datasets import Dataset
    G, steps = 8 if args.task == "toy" else 4, args.rollouts // args.minibatch

    def reward(prompts, completions, **_):
        scores = torch.tensor(task.score(prompts, completions), dtype=torch.double)
        ref = torch.stack([ref_rewards["train", p] for p in prompts])
        Trainer.k = vbon.ranks(scores.unsqueeze(1), ref).squeeze(1)
        return vbon.vbon_reward(vbon.estimate_log_F(scores, ref), 0, args.N, "bound").tolist()

    class Trainer(getattr(trl, kind + "Trainer")):
        marks, numbers = [], {}

        def _generate(self, *inputs):
            out = super()._generate(*inputs)
            self.marks.append(common.clock(args.device))
            return out

        def _generate_and_score_completions(self, inputs):
            self.tell()
            self.marks[:] = [time.perf_counter()]
            out = super()._generate_and_score_completions(inputs)
            self.marks.append(common.clock(args.device))
            if kind == "RLOO":  # GRPO measures its KL later and otherwise
                tokens = out["completion_mask"].sum(1).float().mean().item()
                kl, log_F = self._metrics["train"]["kl"][-1], vbon.policy_log_F(self.k, args.M).mean().item()
                self.numbers = {"objective/kl_to_bon": vbon.kl_to_bon(kl * tokens, log_F, args.N)}
            return out

        def tell(self):
            at_phase(self, self.numbers | times(self.marks, args.device) if self.marks else None)

    common.stock(task.ref).save_pretrained(f"{args.out}/ref")  # TRL loads π_ref by its name
    # Not in a column: accelerate walks over the M numbers of every row at every step.
    rows = [{"prompt": prompt} for prompt in task.train_prompts]
    config = getattr(trl, kind + "Config")(
        beta=1 / args.N, temperature=args.temperature, max_completion_length=args.max_new_tokens,
        disable_dropout=True, model_init_kwargs={"dtype": "float32"}, num_generations=G, seed=args.seed,
        steps_per_generation=steps, gradient_accumulation_steps=1, num_iterations=args.ppo_epochs,
        max_steps=args.episodes // args.rollouts * steps * args.ppo_epochs, logging_strategy="no",
        lr_scheduler_type=args.lr_schedule, adam_beta2=0.95, adam_epsilon=args.adam_eps, weight_decay=1e-6,
        **settings, **same_settings(args))
    copies = -(-args.rollouts // (G * len(rows)))  # a phase takes no row twice
    trainer = Trainer(f"{args.out}/ref", reward_funcs=reward, args=config, processing_class=task.tokenizer,
                      train_dataset=Dataset.from_list(rows * copies))
    for lm in (trainer.model, trainer.ref_model):
        lm.register_forward_pre_hook(fill_positions, with_kwargs=True)
    return trainer


def times(marks, device):
    """Seconds of the parts of a phase, from its three marks and now."""
    return {"time/" + part: b - a for part, a, b in zip(PARTS, marks, [*marks[1:], common.clock(device)])}


def same_settings(args):
    """Of both versions' configurations."""
    return dict(output_dir=args.out, per_device_train_batch_size=args.minibatch, learning_rate=args.lr,
                gradient_checkpointing=False, bf16=args.dtype == "bfloat16", use_cpu=args.device == "cpu",
                report_to="none", save_strategy="no", disable_tqdm=True)


def fill_positions(lm, inputs, named):
    """The positions that a left-padded prompt needs, where TRL passes none."""
    if named.get("position_ids") is None:
        named["position_ids"] = (named["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return inputs, named


def ppo_trainer(args, task, at_phase):
    """The PPO trainer of TRL 1.12. Its loop tells of a phase when it generates for the next."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, ppo_trainer as module
    generate, whiten, marks = module.batch_generation, module.masked_whiten, []

    def telling_generate(*inputs, **named):
        at_phase(None, times(marks, args.device) if marks else None)
        marks[:] = [time.perf_counter()]
        out = generate(*inputs, **named)
        marks.append(common.clock(args.device))
        return out

    def marking_whiten(values, mask, shift_mean=True):  # the last step before the updates
        out = whiten(values, mask, shift_mean)
        marks.append(common.clock(args.device))
        return out
    module.batch_generation, module.masked_whiten = telling_generate, marking_whiten
    tokenizer, ref = task.tokenizer, common.stock(task.ref)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # TRL masks it out and never embeds it
    tokenizer.padding_side = "left"
    config = PPOConfig(
        num_mini_batches=args.rollouts // args.minibatch, num_ppo_epochs=args.ppo_epochs, kl_coef=1 / args.N,
        total_episodes=1000 * args.rollouts, response_length=args.max_new_tokens, stop_token="eos",
        temperature=args.temperature, num_sample_generations=0, gradient_accumulation_steps=1,
        **same_settings(args) | {"per_device_train_batch_size": args.rollouts})
    value = AutoModelForSequenceClassification.from_pretrained(args.ref, num_labels=1, dtype=torch.float32)
    return module.PPOTrainer(
        args=config, processing_class=tokenizer, model=copy.deepcopy(ref), ref_model=ref, value_model=value,
        reward_model=reward_of_texts(task), eval_dataset=Dataset.from_dict({"input_ids": [[0]]}),
        train_dataset=Dataset.from_dict({"input_ids": [tokenizer.encode(p) for p in task.train_prompts]}))


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


# --- a side's process ---------------------------------------------------------------------------------------


def serve(kind, settings, flags):
    """Runs a phase whenever a line on stdin asks for it."""
    answer, device, busy = common.answers(), vbon.pick_device("auto"), [0.0]

    def at_phase(_, numbers):
        spent = {"processor": time.process_time() - busy[0], "MB": common.memory_mb(device)}
        answer(numbers and {part: numbers["time/" + part] for part in PARTS} | spent)
        if not sys.stdin.readline():
            os._exit(0)
        busy[0] = time.process_time()
    if kind == "vbon":
        l, numbers = common.learner(flags), None
        while True:
            at_phase(None, numbers)
            numbers = common.phase(l)
    args = vbon.parse_args(flags)
    task = vbon.setup(args)
    made_up = {("train", p): torch.rand(args.M).double() for p in task.train_prompts}
    (ppo_trainer(args, task, at_phase) if kind == "PPO" else
     group_trainer(kind, settings, args, task, made_up, at_phase)).train()


def train(kind, settings, flags):
    """Trains by vbon.py, or by RLOO or GRPO into a folder like those of vbon.py."""
    args, done, busy = vbon.parse_args(flags), [], [0.0]
    if kind == "vbon":
        collect, update = vbon.collect, vbon.update

        def starting_collect(*inputs):
            busy[0] = time.process_time()
            return collect(*inputs)
        vbon.collect = starting_collect
        vbon.update = lambda *inputs: update(*inputs) | {"time/processor": time.process_time() - busy[0]}
        return vbon.train(args)
    task, phases = vbon.setup(args), args.episodes // args.rollouts
    lock = vbon.open_run(args)  # noqa: F841, held until this function ends
    ref_rewards, policy = vbon.reference_samples(task, args), vbon.make_policy(task.ref, -1)
    exact_world = vbon.ExactWorld(task, args, ref_rewards) if args.task == "toy" else None

    def at_phase(trainer, numbers):
        if numbers:
            numbers |= {"time/processor": time.process_time() - busy[0]}
            done.append(numbers | {"episode": (len(done) + 1) * args.rollouts})
            policy.load_state_dict(trainer.model.state_dict())
            if exact_world and vbon.is_milestone(len(done) - 1, phases):
                name = f"π_θ, {done[-1]['episode']} ep."
                done[-1] |= exact_world.report(name, exact_world.log_probs(policy))
        busy[0] = time.process_time()
    trainer = group_trainer(kind, settings, args, task, ref_rewards, at_phase)
    trainer.train()
    trainer.tell()
    vbon.write_whole(f"{args.out}/metrics.jsonl", "".join(json.dumps(row) + "\n" for row in done))
    drawn = vbon.sample_policy(policy, task, args)
    metrics, samples = vbon.test_metrics(task, *drawn, ref_rewards, args)
    exact = {name: x for name, x in done[-1].items() if name.startswith("exact/")}
    vbon.save_results(args, task, exact_world, metrics | exact | {"episodes": args.episodes}, samples, policy)


# --- the conductor ------------------------------------------------------------------------------------------


def environment(version, given):
    """The interpreter that has this TRL: the given one, or that of a folder here, made on the first call."""
    folder = os.path.join(HERE, ".venv-trl-" + version)
    python, made = given or os.path.join(folder, "bin", "python"), os.path.join(folder, "complete")
    if not (given or os.path.exists(made)):
        print(f"making TRL {version}'s environment in {folder} (some minutes)", flush=True)
        install = [python, "-m", "pip", "install", "-q"]
        cpu_only = ["--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "0"]
        for command in ([sys.executable, "-m", "venv", "--clear", folder],
                        [*install, *([] if torch.version.cuda else cpu_only), PACKAGES[0]],
                        [*install, *PACKAGES, "trl==" + version]):
            failed = subprocess.run(command).returncode
            vbon.need(not failed, f"{' '.join(command[:4])} … failed: pass --trl or --trl-ppo")
        vbon.write_whole(made, "")
    return python


def command_of(name, job, options, first):
    """The command line of a side, and what its environment has of its own."""
    kind, own, _ = SIDES[name]
    own = own.split() if kind == "vbon" else []
    flags = [*first, *FLAGS[options.part].split(), "--device", options.device, "--dtype", options.dtype]
    flags += [*own, *options.more]
    pages = str(int(kind == "vbon"))  # memory in large pages is vbon.py's own
    environ = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "THP_MEM_ALLOC_ENABLE": pages}
    version = ("1.12.0", options.trl_ppo) if kind == "PPO" else ("1.16.0", options.trl)
    python = sys.executable if kind == "vbon" else environment(*version)
    return [python, os.path.abspath(__file__), "--side", json.dumps([name, job, flags])], environ


def measure(names, options):
    """A row for each side and round after the first, a warm-up. They take turns."""
    with common.temporary_folder() as folder:
        first, rows = [*common.flags_of(options, folder), "--unfrozen-layers", "-1"], []
        sides = {name: common.Side(name, *command_of(name, "serve", options, first)) for name in names}
        for i in range(options.rounds + 1):
            for name, side in sides.items():
                seen = side.ask("phase")
                if i > 0:
                    rows.append({"side": name, "round": i, "phase": sum(seen[part] for part in PARTS)} | seen)
            print(f"round {i} of {options.rounds}", file=sys.stderr)
    return rows


def report_times(rows, options):
    """Medians of each side, and its ratios to the critic-free vbon.py round by round."""
    def of(name, key):
        return [row[key] for row in rows if row["side"] == name]
    names = list(dict.fromkeys(row["side"] for row in rows))
    base = "vBoN, no critic" if "vBoN, no critic" in names else names[0]
    print(f"\n{common.machine(options.device)}; {options.dtype}; phases of {options.rollouts} responses of "
          f"{options.max_new_tokens} tokens; seconds, medians of {options.rounds} rounds; ÷ {base}")
    common.table([
        {"side": name} | {key: statistics.median(of(name, key)) for key in ("phase", *PARTS, "processor")}
        | {"ms/episode": 1000 * statistics.median(of(name, "phase")) / options.rollouts}
        | {key + " ÷": common.spread([a / b for a, b in zip(of(name, key), of(base, key))])
           for key in ("phase", "processor")} | {"peak MB": max(of(name, "MB"))} for name in names])


def train_missing(names, options):
    """[(side, its runs as evaluate.py reads them, one for each seed)], after training what is not there."""
    groups = {name: [] for name in names}
    own = [x for key in ("ref", "reward", "dataset") if getattr(options, key)
           for x in ("--" + key, getattr(options, key))]
    for seed in range(options.seeds):
        for name, runs in groups.items():
            out = f"{options.runs}/{options.part}-{name.replace(',', '').replace(' ', '-')}-seed{seed}"
            if not os.path.exists(f"{out}/result.json"):
                print(f"\n--- {out}", flush=True)
                own_run = [*own, "--seed", str(seed), "--out", out]
                command, environ = command_of(name, "train", options, own_run)
                failed = subprocess.run(command, env=os.environ | environ).returncode
                vbon.need(not failed, f"{out}: training failed; a second call goes on from here")
            runs.append(evaluate.read_run(out))
            for flag, value in zip(options.more[::2], options.more[1::2]):
                made = runs[-1]["config"][flag.strip("-").replace("-", "_")]
                vbon.need(type(made)(value) == made, f"{out} has {flag} {made}: pass another --runs")
            runs[-1]["result"]["minutes"] = max(minutes_of(runs[-1]).values())
    return list(groups.items())


def minutes_of(run):
    """{episode: minutes of one core that training took until then}, without tests."""
    seconds = itertools.accumulate(row["time/processor"] for row in run["metrics"])
    return {row["episode"]: s / 60 for row, s in zip(run["metrics"], seconds)}


def report_training(groups, options):
    """The table of evaluate.py, and the distance to Best-of-N over minutes and over episodes."""
    timed = [(f"{name}, {statistics.fmean(run['result']['minutes'] for run in runs):.1f} min", runs)
             for name, runs in groups]
    print(f"\n{common.machine(options.device)}\n" + evaluate.table(timed))
    if options.csv:
        evaluate.write_csv(options.csv, [run for _, runs in groups for run in runs])
    if options.figure:
        title = f"{options.part}: vbon.py beside TRL, means over {options.seeds} seeds"
        with evaluate.picture(options.figure, title, 2) as (left, right):
            for name, runs in groups:
                curves, minutes = [evaluate.curve(run, "kl_to_bon") for run in runs], [*map(minutes_of, runs)]
                episodes = list(curves[0])
                y, x = ([statistics.fmean(c[e] for c in of) for e in episodes] for of in (curves, minutes))
                left.plot(x, y, label=name)
                right.plot(episodes, y, label=name)
            left.set(xlabel="minutes of one core", ylabel="KL(π_θ ‖ π_bon), nats", yscale="log")
            right.set(xlabel="episodes", yscale="log")


def main():
    if sys.argv[1:2] == ["--side"]:
        name, job, flags = json.loads(sys.argv[2])
        return {"serve": serve, "train": train}[job](*SIDES[name][:2], flags)
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("part", choices=FLAGS)
    add("--trl", metavar="PYTHON", help="has TRL 1.16 [a folder in bench/, which is made]")
    add("--trl-ppo", metavar="PYTHON", help="has TRL 1.12 [the same]")
    add("--skip", nargs="*", choices=SIDES, default=[], help="sides to leave out")
    add("--seeds", type=common.positive, default=1, help="of toy and imdb [1]")
    add("--runs", default="sweeps/vs_trl", help="folder of their runs [%(default)s]")
    add("--figure", metavar="FILE", help="where to draw their distance in training")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = common.parse(parser, sys.argv[1:cut])
    options.more = sys.argv[cut + 1:]
    names = [name for name in SIDES if options.part in SIDES[name][2].split() and name not in options.skip]
    if options.part == "times":
        rows = measure(names, options)
        report_times(rows, options)
        common.write_csv(options.csv, rows, machine=common.machine(options.device))
    else:
        report_training(train_missing(names, options), options)


if __name__ == "__main__":
    common.run(main)
