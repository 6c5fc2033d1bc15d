#!/usr/bin/env python3
"""The baselines of "Variational Best-of-N Alignment", on the tasks, samples and models of vbon.py.

    python bon_baselines.py bon --N 16                 # Best-of-N itself: trains nothing, draws N and keeps the best
    python bon_baselines.py bon-sft --N 16             # maximum likelihood on Best-of-N's responses
    python bon_baselines.py dpo --beta 0.1             # direct preference optimization (Rafailov et al. 2023)
    python bon_baselines.py bonbon --N 16              # BoNBoN (Gui et al. 2024)
    python bon_baselines.py dpo --task imdb            # the same on the sentiment task; --ref, --reward, --dataset as in vbon.py
    python bon_baselines.py --help

The fifth, PPO on the reward itself, is `python vbon.py --objective rlhf`. All of vbon.py's flags are understood, so that one
line of them serves every method; those of PPO's loop have no effect here.

The losses come first and are pure functions of tensors. They take log-probabilities of whole responses, in nats: of a
prompt's response under the policy or the reference model, summed over its tokens, EOS included and prompt not. All
methods learn from the scored samples of π_ref that vbon.py keeps, so that N needs new samples only where it is above M.
"""
import itertools
import json
import math
import random
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn import functional
from tqdm import tqdm

import vbon
from vbon import UserError, flag, number

# ======================================================================================================================
# 1. Best-of-N and the losses
# ======================================================================================================================


def best_of_n(rewards):
    """The place of the highest of N rewards: (..., N) -> (...). The first of equal ones."""
    return torch.as_tensor(rewards).argmax(-1)


def expected_best_of_n(rewards, N):
    """E[max of N draws without replacement] from M ≥ N stored rewards: (..., M) -> (...), float64; N a whole number.

    The unbiased estimate of Best-of-N's expected reward, Σ_k r_(k)·C(k−1, N−1)/C(M, N) over the rewards in ascending
    order: the k-th is the best of C(k−1, N−1) of the C(M, N) subsets. Its weights w_k come from w_M = N/M and
    w_{k−1}/w_k = (k−N)/(k−1) in logs, so that no binomial is ever formed. Raises ValueError unless 1 ≤ N ≤ M.
    """
    ascending = torch.as_tensor(rewards).double().sort(-1).values
    M = ascending.shape[-1]
    if not (1 <= N <= M and N == int(N)):
        raise ValueError(f"the best of N = {N} cannot be estimated from M = {M} rewards: N must be a whole number from 1 to M")
    k = torch.arange(2, M + 1, dtype=torch.double, device=ascending.device)
    log_steps = torch.log(((k - N) / (k - 1)).clamp(min=0))  # from w_k to w_{k−1}; −inf below k = N, for such are never best
    log_w = math.log(N / M) + torch.cat([log_steps.flip(0).cumsum(0).flip(0), log_steps.new_zeros(1)])
    return torch.where(log_w == -torch.inf, 0.0, ascending * log_w.exp()).sum(-1)


def sft_loss(logps):
    """Maximum likelihood: −mean of log π_θ(y) over responses. logps: (B,)."""
    return -logps.mean()


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """−mean log σ(β·h), h = log[π_θ/π_ref](chosen) − log[π_θ/π_ref](rejected). All (B,) (Rafailov et al. 2023, Eq. 7)."""
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -functional.logsigmoid(beta * h).mean()


def bonbon_beta(N):
    """β* = 1 / (2(N−1)·Σ_{k<N} 1/k): under Best-of-N the log-ratio of the best of N exceeds that of the worst by 1/(2β*) nats
    on average (Gui et al. 2024, Theorem 3). Infinite at N = 1, where best and worst are one. Raises ValueError unless N is a
    whole number from 1."""
    if not (N >= 1 and N == int(N)):
        raise ValueError(f"N must be a whole number from 1, not {N}")
    gap = (N - 1) * sum(1 / k for k in range(1, int(N)))
    return 1 / (2 * gap) if gap else math.inf


def bonbon_loss(policy_best, policy_worst, ref_best, ref_worst, N, alpha=None):
    """α·(−log π_θ(best)) + (1−α)·(h − 1/(2β*))², h as in `dpo_loss`, averaged over (best, worst) of N; all (B,).

    alpha=None sets α on each call so that both terms are equally large, as both papers say; no gradient flows into it. So α
    falls as training goes: from near 1 at first, where −log π_θ of a long response is the smaller term, towards 0 as the
    second term vanishes. The released configuration of Gui et al. keeps 0.005 throughout.
    """
    h = (policy_best - ref_best) - (policy_worst - ref_worst)
    likelihood, contrast = sft_loss(policy_best), (h - 1 / (2 * bonbon_beta(N))).square().mean()
    if alpha is None:
        alpha = (contrast / (likelihood + contrast).clamp(min=1e-12)).detach()
    return alpha * likelihood + (1 - alpha) * contrast


# ======================================================================================================================
# 2. Settings
# ======================================================================================================================

METHODS = ("bon", "bon-sft", "dpo", "bonbon")
DPO_RESPONSES, DPO_PAIRS = 6, 12  # six responses to a prompt, and twelve of their fifteen pairs (§5)


@dataclass
class Args(vbon.Args):
    objective: str = flag("the method", choices=METHODS)
    N: number = flag("the N of Best-of-N, a whole number; dpo has none, and toy measures its distance to this one", low=1, high=1e6,
                     toy=16, imdb=16, tldr=100)
    M: int = flag("stored samples of π_ref per training prompt to learn from; more are drawn where N asks for more", 200, low=1)
    beta: float = flag("dpo: how close the policy is held to π_ref", above=0, toy=0.1, imdb=0.1, tldr=0.1)
    alpha: float = flag("bonbon: weight of the likelihood term; default: both terms weigh the same", low=0, high=1)
    episodes: int = flag("training examples in all: best responses, or pairs", low=1, toy=81_920, imdb=10_240, tldr=10_240)
    lr_schedule: str = flag("constant, or linear decay to zero", "linear", ("constant", "linear"))
    lr: float = flag("AdamW's learning rate", above=0, toy=1e-3, imdb=1e-4, tldr=3e-6)

    def check(self):
        if self.objective != "dpo" and self.N != int(self.N):
            raise UserError(f"--N must be a whole number here, not {self.N}: so many responses are drawn")
        if self.minibatch > self.episodes:
            raise UserError(f"need --minibatch ≤ --episodes, not {self.minibatch}, {self.episodes}")
        # bon learns nothing. toy has four prompts only: with M near N it would have four best responses to learn by heart.
        least = {"bon": 1, "dpo": DPO_RESPONSES}.get(self.objective, int(self.N) * (10 if self.task == "toy" else 1))
        self.M = least if self.objective == "bon" else max(self.M, least)
        strength = {"dpo": f"beta{self.beta:g}-M{self.M}", "bon": f"N{self.N}"}.get(self.objective, f"N{self.N}-M{self.M}")
        self.out = self.out or f"runs/{self.task}-{self.objective}-{strength}-seed{self.seed}"


PPO_ONLY = ("estimator", "rollouts", "ppo_epochs", "gamma", "lam", "clip", "value_clip", "value_coef", "reward_clip")


# ======================================================================================================================
# 3. Data from the stored samples, and the log-probabilities that the losses take
# ======================================================================================================================


def training_pairs(samples, prompts, args, rng):
    """Endless (prompt, better, worse): token lists of two responses to it, from its stored samples.

    In every pass over the prompts each gets a new random group of its M samples: bon-sft and bonbon take best and worst of
    N, dpo 12 pairs of 6 (equal rewards are no preference: such pairs are left out). A pass's examples come shuffled.
    """
    while True:
        examples = []
        for prompt in prompts:
            rewards, tokens = samples["train", prompt]
            if args.objective == "dpo":
                pairs = list(itertools.combinations(rng.sample(range(len(rewards)), DPO_RESPONSES), 2))
                pairs = [(i, j) if rewards[i] > rewards[j] else (j, i) for i, j in pairs if rewards[i] != rewards[j]]
                pairs = rng.sample(pairs, min(DPO_PAIRS, len(pairs)))
            else:
                group = rng.sample(range(len(rewards)), int(args.N))
                pairs = [(group[best_of_n(rewards[group])], group[best_of_n(-rewards[group])])]
            examples += [(prompt, tokens[i], tokens[j]) for i, j in pairs]
        yield from rng.sample(examples, len(examples))


def response_log_probs(policy, ref, task, prompts, responses, args, device):
    """log π_θ and log π_ref of whole responses, each (B,), in nats. A frozen trunk is run once for both models."""
    eos, K = task.tokenizer.eos_token_id, args.unfrozen_layers
    left, left_mask = vbon.pad([task.encode(p) for p in prompts], eos, "left", device)
    tokens, mask = vbon.pad(responses, eos, "right", device)
    inputs = torch.cat([left, tokens[:, :-1]], 1), torch.cat([left_mask, mask[:, :-1]], 1), tokens.shape[1]

    def summed(logits):
        return (vbon.token_log_probs(logits, tokens, args.temperature) * mask).sum(1)
    with vbon.autocast(args, device):
        with torch.no_grad(), vbon.trunk_output(ref, K) if K > 0 else nullcontext() as trunk:
            log_ref = summed(vbon.forward(ref, *inputs)[0])
        with vbon.top_layers(policy, K, trunk[0]) if K > 0 else nullcontext():
            return summed(vbon.forward(policy, *inputs)[0]), log_ref


@torch.no_grad()
def sample_best(task, ref_rewards, args, device):
    """Best-of-N on the test prompts: the best of N new samples of π_ref for each, and log π_bon(y) − log π_ref(y), whose
    mean is the KL, with F̂ from the stored test samples."""
    generator, N, T = torch.Generator(device).manual_seed(args.seed), int(args.N), args.max_new_tokens
    responses, kls = [], []
    for prompt in tqdm(task.test_prompts, desc=f"Best-of-{N}"):
        texts, log_p = [], []
        for rows in torch.rand(N, T, generator=generator, device=device).split(512):
            with vbon.autocast(args, device):
                tokens, mask, log_probs, _ = vbon.generate(task.ref, [task.encode(prompt)], rows, task.tokenizer.eos_token_id, args.temperature)
            texts += vbon.decode(task, [prompt] * len(rows), vbon.token_lists(tokens, mask))
            log_p += log_probs.double().sum(1).tolist()
        rewards = torch.tensor(vbon.checked_scores(task, [prompt] * N, texts), dtype=torch.double)
        best = best_of_n(rewards).item()
        log_F = vbon.estimate_log_F(rewards[best], ref_rewards["test", prompt])
        responses.append(texts[best])
        kls.append(N * vbon.vbon_reward(log_F, torch.tensor(log_p[best], dtype=torch.double), N).item())
    return responses, {"kl_to_ref": kls}


# ======================================================================================================================
# 4. The run
# ======================================================================================================================


def train(args):
    """Trains by one of the baselines, or runs Best-of-N. Returns what it writes to result.json."""
    device, task = vbon.begin(args)
    if vbon.processes() > 1:
        raise UserError("the baselines train in one process: start this without torchrun")
    torch.manual_seed(args.seed)
    if args.objective == "bon":
        ref_rewards = vbon.reference_samples(task, args, device)
        world = vbon.open_run(args, task)
        exact = vbon.exact_metrics(world["log_bon"], world) if world else {}
        if args.N <= args.test_M:  # without sampling at all, from what is stored
            exact["bon/expected_reward"] = torch.stack([expected_best_of_n(ref_rewards["test", p], int(args.N)) for p in task.test_prompts]).mean().item()
        return vbon.close_run(args, task, world, *vbon.judge(task, *sample_best(task, ref_rewards, args, device), ref_rewards, exact))

    policy, _ = vbon.make_policy(task.ref, args.unfrozen_layers)
    samples = vbon.reference_samples(task, args, device, keep_tokens=True)
    if all((rewards == rewards[0]).all() for (split, _), (rewards, _) in samples.items() if split == "train"):
        raise UserError("every response to a prompt has the same reward: there is nothing to learn from")
    world, exact = vbon.open_run(args, task), {}
    steps, log_every = args.episodes // args.minibatch, 8
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, args.adam_beta2), eps=args.adam_eps, weight_decay=args.weight_decay, fused=True)
    pairs = training_pairs(samples, task.train_prompts, args, random.Random(args.seed))
    done = vbon.load_checkpoint(args, optimizer) * log_every
    pairs = itertools.islice(pairs, done * args.minibatch, None)
    with (open(f"{args.out}/metrics.jsonl", "a", encoding="utf-8") as log,
          tqdm(total=steps * args.minibatch, initial=done * args.minibatch, desc=args.objective, unit="ep") as bar):
        recent, clock = [], time.perf_counter()
        for step in range(done + 1, steps + 1):
            vbon.set_lr(optimizer, args, (step - 1) / steps)
            prompts, better, worse = map(list, zip(*itertools.islice(pairs, args.minibatch)))
            if args.objective == "bon-sft":
                best, ref_best = response_log_probs(policy, task.ref, task, prompts, better, args, device)
                loss, margin = sft_loss(best), (best - ref_best).detach()
            else:  # one pass over both halves
                both, ref_both = response_log_probs(policy, task.ref, task, prompts * 2, better + worse, args, device)
                (best, worst), (ref_best, ref_worst) = both.chunk(2), ref_both.chunk(2)
                loss = (dpo_loss(best, worst, ref_best, ref_worst, args.beta) if args.objective == "dpo" else
                        bonbon_loss(best, worst, ref_best, ref_worst, int(args.N), args.alpha))
                margin = (best - ref_best - worst + ref_worst).detach()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recent.append((loss.item(), margin.mean().item()))
            bar.update(args.minibatch)
            if not math.isfinite(loss.item()):
                raise UserError("the loss is no longer finite: pass a smaller --lr")
            if step % log_every == 0 or step == steps:
                losses, margins = zip(*recent)
                metrics = {"episode": step * args.minibatch, "objective/loss": sum(losses) / len(losses),
                           "objective/log_ratio_margin": sum(margins) / len(margins), "objective/lr": optimizer.param_groups[0]["lr"],
                           "time/episodes_per_second": len(recent) * args.minibatch / (time.perf_counter() - clock)}
                if world and (step == steps or step % (log_every * args.eval_every) == 0):
                    exact = vbon.exact_metrics(vbon.enumerate_policy(policy, world, args), world)
                    metrics |= exact
                    tqdm.write(vbon.exact_row(f"π_θ, {metrics['episode']} ep.", exact))
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                if args.save_every and step % (log_every * args.save_every) == 0 and step < steps:
                    vbon.save_checkpoint(args, step // log_every, optimizer)
                recent, clock = [], time.perf_counter()
    ref_rewards = {key: rewards for key, (rewards, _) in samples.items()}
    extra = {"episodes": steps * args.minibatch} | exact
    return vbon.close_run(args, task, world, *vbon.judge(task, *vbon.sample_policy(policy, task, args, device), ref_rewards, extra), policy)


def parse_args(argv=None):
    return vbon.parse_args(argv, Args, __doc__, positional="objective", hidden=PPO_ONLY)


def main(argv=None):
    try:
        train(parse_args(argv))
    except UserError as error:
        print(f"bon_baselines.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bon_baselines.py: stopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
