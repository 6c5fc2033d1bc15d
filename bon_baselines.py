#!/usr/bin/env python3
"""The baselines of "Variational Best-of-N Alignment", on the tasks, samples and models of vbon.py.

    python bon_baselines.py bon --N 16         # Best-of-N itself: trains nothing, draws N and keeps the best
    python bon_baselines.py bon-sft --N 16     # maximum likelihood on Best-of-N's responses
    python bon_baselines.py dpo --beta 0.1     # direct preference optimization (Rafailov et al. 2023)
    python bon_baselines.py bonbon --N 16      # BoNBoN (Gui et al. 2024)
    python bon_baselines.py bond               # J-BOND (Sessa et al. 2024): Best-of-2, again and again
    python bon_baselines.py dpo --task imdb    # another task; --ref, --reward, --dataset as in vbon.py
    python bon_baselines.py --help

PPO on the reward itself is `python vbon.py --objective rlhf`. All flags of vbon.py go here too, so that one
line of them serves every method; those of PPO alone have no effect on training.

The losses come first and are pure functions of tensors. They take log-probabilities of whole responses, in
nats: summed over the tokens, EOS included and prompt not. All methods but bond, which samples as it learns,
learn from the scored samples of π_ref that vbon.py keeps: N needs new ones only where it is above M.
"""
import itertools
import math
import os
import random
import sys
import time
from dataclasses import dataclass, replace

import torch
from torch.nn import functional
from tqdm import tqdm

import vbon
from vbon import flag, need, number

# ========== 1. Best-of-N and the losses ===================================================================


def best_of_n(rewards):
    """The place of the highest of N rewards: (..., N) -> (...). The first of equal ones."""
    return torch.as_tensor(rewards).argmax(-1)


def expected_best_of_n(rewards, N):
    """E[max of N draws without replacement] from M stored rewards: (..., M) -> (...), float64.

    This unbiased estimate of Best-of-N's expected reward is Σ_k r_(k)·C(k−1, N−1)/C(M, N) over the rewards in
    ascending order: the k-th is the best of C(k−1, N−1) of the C(M, N) subsets.
    Raises ValueError unless N is a whole number from 1 to M.
    """
    ascending = torch.as_tensor(rewards).double().sort(-1).values
    M = ascending.shape[-1]
    if not (1 <= N <= M and N == int(N)):
        raise ValueError(f"the best of N = {N} cannot be estimated from M = {M} rewards: "
                         "N must be a whole number from 1 to M")
    k = torch.arange(2, M + 1, dtype=torch.double, device=ascending.device)
    # The weights in logs, so that no binomial is formed: w_M = N/M, w_{k−1}/w_k = (k−N)/(k−1), 0 where k < N.
    log_steps = torch.log(((k - N) / (k - 1)).clamp(min=0))
    log_w = math.log(N / M) + torch.cat([log_steps.flip(0).cumsum(0).flip(0), log_steps.new_zeros(1)])
    return torch.where(log_w == -torch.inf, 0.0, ascending * log_w.exp()).sum(-1)


def sft_loss(logps):
    """Maximum likelihood: −mean of log π_θ(y) over responses. logps: (B,)."""
    return -logps.mean()


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """−mean log σ(β·h), h = log[π_θ/π_ref](chosen) − log[π_θ/π_ref](rejected). All (B,). (Rafailov, Eq. 7)"""
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -functional.logsigmoid(beta * h).mean()


def bonbon_beta(N):
    """β* = 1 / (2(N−1)·Σ_{k<N} 1/k) (Gui et al. 2024, Theorem 3).

    Under Best-of-N the log-ratio of the best of N exceeds that of the worst by 1/(2β*) nats on average.
    Infinite at N = 1, where best and worst are one. Raises ValueError unless N is a whole number from 1.
    """
    if not (N >= 1 and N == int(N)):
        raise ValueError(f"N must be a whole number from 1, not {N}")
    gap = (N - 1) * sum(1 / k for k in range(1, int(N)))
    return 1 / (2 * gap) if gap else math.inf


def bonbon_loss(policy_best, policy_worst, ref_best, ref_worst, N, alpha=None):
    """α·(−log π_θ(best)) + (1−α)·(h − 1/(2β*))², h as in `dpo_loss`, averaged over pairs of N; all (B,).

    alpha=None sets α on each call so that both terms are equally large, as both papers say; no gradient flows
    into it. So α starts near 1, where −log π_θ of a long response is the smaller term, and falls towards 0 as
    the second term vanishes. The released configuration of Gui et al. keeps 0.005 throughout.
    """
    h = (policy_best - ref_best) - (policy_worst - ref_worst)
    likelihood, contrast = sft_loss(policy_best), (h - 1 / (2 * bonbon_beta(N))).square().mean()
    if alpha is None:
        alpha = (contrast / (likelihood + contrast).clamp(min=1e-12)).detach()
    return alpha * likelihood + (1 - alpha) * contrast


def bond_reward(rewards, anchor_rewards):
    """−log 16 for a response that is worse than both of the anchor's, else 0 (Sessa et al. 2024, Eq. 17).

    rewards: (B,). anchor_rewards: (B, 2). Returns (B,), float64, nats. It stands for log F under the anchor:
    on average it is −log 16·(1−F)², which is log F at the median, F = ½.
    """
    return -math.log(16) * (rewards < anchor_rewards.amin(1)).double()


def bond_loss(best, own, anchor_own, reward, beta=0.5, gamma=0.0):
    """J-BOND's (1−β)·FW + β·BW + γ·REG (Sessa et al. 2024, Algorithm 2), a scalar. All (B,), nats.

    best: log π_θ of the better of the anchor's two responses. own, anchor_own: log π_θ and log π_anchor of a
    response y of the policy. reward: `bond_reward` of y. D = log π_θ(y) − log π_anchor(y), without gradient.
      FW   −log π_θ(best)             has the gradient of KL(Best-of-2 of the anchor ‖ π_θ)
      BW   −log π_θ(y)·(reward − D)   that of KL(π_θ ‖ Best-of-2), as far as the reward is log F
      REG  −log π_θ(y)·(−D)           that of KL(π_θ ‖ π_anchor)
    The factor of log π_θ(y) is taken less its mean over the other responses of the batch: less noise.
    """
    D = (own - anchor_own).detach()
    weight = beta * (reward - D) - gamma * D
    others = (weight.sum() - weight) / max(1, len(weight) - 1)
    return -(1 - beta) * best.mean() - ((weight - others) * own).mean()


# ========== 2. Settings ===================================================================================

METHODS = ("bon", "bon-sft", "dpo", "bonbon", "bond")

# dpo takes six responses to a prompt, and twelve of their fifteen pairs (§5).
DPO_RESPONSES, DPO_PAIRS = 6, 12

# bond's β = ½, η = 0.02 and −log 16 are those of Sessa et al. (Gemma 7B in §6, Eq. 17), as others quote them:
# we have not seen the paper's whole text. Of the γ of their Figure 6, 0 to 2, γ = 0 is our choice. Their
# steps take 128 prompts, after a warm-up; ours are as below.

# The tasks are vbon.py's, the training is not. log F is never smoothed here.
COMMON = dict(M=200, beta=0.1, estimator="add_one")
RECIPES = {
    "toy": vbon.RECIPES["toy"] | COMMON | dict(episodes=81_920, lr=1e-3),
    "imdb": vbon.RECIPES["imdb"] | COMMON | dict(episodes=10_240, lr=1e-4),
    "tldr": vbon.RECIPES["tldr"] | COMMON | dict(episodes=10_240, lr=3e-6),
}


@dataclass
class Args(vbon.Args):
    recipes, groups = RECIPES, vbon.Args.groups | {"alpha": "bonbon and bond"}

    objective: str = flag(None, "the method", METHODS)
    N: number = flag(None, "the N of Best-of-N, a whole number; dpo and bond are only measured against it")
    M: int = flag(None, "samples of π_ref per training prompt to learn from, more where N asks for more; "
                  "bon and bond draw none")
    beta: float = flag(None, "dpo: how close the policy is held to π_ref")
    alpha: float = flag(None, "bonbon: weight of the likelihood; default: both terms weigh the same")
    eta: float = flag(0.02, "bond: how far the anchor moves towards the policy after each step")
    gamma: float = flag(0.0, "bond: how close the policy is held to the anchor, beyond what Best-of-2 is")
    episodes: int = flag(None, "training examples in all: best responses, or pairs; bond: prompts")
    rollouts: int = flag(None, "training examples per phase, which is a line of metrics")

    def __post_init__(self):
        vbon.fill_in(self)
        need(self.objective in ("dpo", "bond") or self.N == int(self.N),
             f"--N must be a whole number, not {self.N}")
        need(self.beta > 0, f"--beta must be above 0, not {self.beta}")
        for name, value, high in ("alpha", self.alpha, 1), ("eta", self.eta, 1), ("gamma", self.gamma, 1e9):
            fits = value is None or 0 <= value <= high
            need(fits, f"--{name} must be from 0 to {high:g}, not {value}")
        need(os.environ.get("WORLD_SIZE", "1") == "1", "this runs in one process: start it without torchrun")
        if self.objective == "dpo":
            self.M = max(self.M, DPO_RESPONSES)
        elif self.objective in ("bon-sft", "bonbon"):
            # toy has four prompts only: with M near N it would have four best responses to learn by heart.
            self.M = max(self.M, int(self.N) * (10 if self.task == "toy" else 1))
        strength = {"bon": f"N{self.N}", "bond": f"{self.episodes}ep", "dpo": f"beta{self.beta:g}-M{self.M}"}
        strength = strength.get(self.objective, f"N{self.N}-M{self.M}")
        self.out = self.out or f"runs/{self.task}-{self.objective}-{strength}-seed{self.seed}"
        vbon.finish(self)


# ========== 3. What the losses take =======================================================================


def training_pairs(samples, prompts, args, rng):
    """Endless (prompt, better, worse): token lists of two responses to it, from its stored samples.

    In every pass over the prompts each gets a new random group of its M samples. bon-sft and bonbon take best
    and worst of N. dpo takes 12 pairs of 6, without those of equal rewards, which are no preference. The
    examples of a pass come shuffled.
    """
    while True:
        examples = []
        for prompt in prompts:
            rewards, tokens = samples["train", prompt]
            if args.objective == "dpo":
                group = rng.sample(range(len(rewards)), DPO_RESPONSES)
                pairs = [(i, j) if rewards[i] > rewards[j] else (j, i)
                         for i, j in itertools.combinations(group, 2) if rewards[i] != rewards[j]]
                pairs = rng.sample(pairs, min(DPO_PAIRS, len(pairs)))
            else:
                group = rng.sample(range(len(rewards)), int(args.N))
                pairs = [(group[best_of_n(rewards[group])], group[best_of_n(-rewards[group])])]
            examples += [(prompt, tokens[i], tokens[j]) for i, j in pairs]
        yield from rng.sample(examples, len(examples))


def sequence_log_probs(lm, batch, args):
    """log π of the whole responses of a Rollout, (B,), nats. A trunk that the batch lacks is kept in it."""
    with vbon.autocast(args):
        log_probs, _, trunk = vbon.response_log_probs(lm, batch, args.temperature, args.unfrozen_layers)
    batch.trunk = trunk if batch.trunk is None else batch.trunk
    return (log_probs * batch.mask).sum(1)


def response_log_probs(policy, task, prompts, responses, args):
    """log π_θ and log π_ref of whole responses, each (B,), nats. A frozen trunk runs once for both models."""
    eos = task.tokenizer.eos_token_id
    ids, attention = vbon.pad([task.encode(p) for p in prompts], eos, "left", args.device)
    tokens, mask = vbon.pad(responses, eos, "right", args.device)
    batch = vbon.Rollout(torch.cat([ids, tokens[:, :-1]], 1), torch.cat([attention, mask[:, :-1]], 1),
                         tokens, mask)
    with torch.no_grad():
        log_ref = sequence_log_probs(task.ref, batch, args)
    return sequence_log_probs(policy, batch, args), log_ref


def pair_loss(policy, task, examples, args):
    """The loss of a minibatch, and its margin: mean log π_θ/π_ref of the better responses less the worse."""
    prompts, better, worse = map(list, zip(*examples))
    if args.objective == "bon-sft":
        best, ref_best = response_log_probs(policy, task, prompts, better, args)
        return sft_loss(best), (best - ref_best).detach().mean()
    # One pass over both halves.
    both, ref_both = response_log_probs(policy, task, prompts * 2, better + worse, args)
    (best, worst), (ref_best, ref_worst) = both.chunk(2), ref_both.chunk(2)
    if args.objective == "dpo":
        loss = dpo_loss(best, worst, ref_best, ref_worst, args.beta)
    else:
        loss = bonbon_loss(best, worst, ref_best, ref_worst, int(args.N), args.alpha)
    return loss, (best - ref_best - worst + ref_worst).detach().mean()


def sample(lm, task, prompts, uniforms, args, K=-1):
    """Scored responses of lm, one to each row of uniforms (B, T), which are grouped by prompt: the Rollout,
    the texts, the rewards (B,) float64."""
    with vbon.autocast(args):
        batch = vbon.generate(lm, [task.encode(p) for p in prompts], uniforms, task.tokenizer.eos_token_id,
                              args.temperature, K=K)
    prompts = [p for p in prompts for _ in range(len(uniforms) // len(prompts))]
    texts = vbon.decode(task, prompts, vbon.token_lists(batch))
    return batch, texts, torch.tensor(task.score(prompts, texts), dtype=torch.double)


def on_policy_loss(policy, anchor, task, prompts, args, generator):
    """`bond_loss` on B prompts, from a new response of the policy and two of the anchor to each; and the mean
    log π_θ/π_ref of the policy's, which estimates the KL."""
    B, K = len(prompts), args.unfrozen_layers
    uniforms = torch.rand(3 * B, args.max_new_tokens, generator=generator, device=args.device)
    own, _, rewards = sample(policy, task, prompts, uniforms[:B], args, K)
    pairs, _, anchor_rewards = sample(anchor, task, prompts, uniforms[B:], args, K)
    anchor_rewards = anchor_rewards.view(B, 2)
    best = pairs[best_of_n(anchor_rewards) + 2 * torch.arange(B)]
    with torch.no_grad():
        anchor_own, ref_own = (sequence_log_probs(lm, own, args) for lm in (anchor, task.ref))
    log_best, log_own = (sequence_log_probs(policy, batch, args) for batch in (best, own))
    loss = bond_loss(log_best, log_own, anchor_own, bond_reward(rewards, anchor_rewards).to(log_own),
                     gamma=args.gamma)
    return loss, (log_own - ref_own).detach().mean()


# ========== 4. The run ====================================================================================


def train(args):
    """Trains a policy. Returns what it writes to result.json."""
    task, bond = vbon.setup(args), args.objective == "bond"
    torch.manual_seed(args.seed)
    policy = vbon.make_policy(task.ref, args.unfrozen_layers)
    anchor = vbon.make_policy(task.ref, args.unfrozen_layers) if bond else None
    lock = vbon.open_run(args)  # noqa: F841, held until this function ends
    sampled = replace(task, train_prompts=[]) if bond else task
    samples = vbon.reference_samples(sampled, args, keep_tokens=True)
    need(bond or any(len(samples["train", p][0].unique()) > 1 for p in task.train_prompts),
         "every response to a prompt has the same reward: there is nothing to learn from")
    exact_world, exact = vbon.ExactWorld(task, args) if args.task == "toy" else None, {}

    optimizer = vbon.make_optimizer(policy.parameters(), args)
    anchored = [p.requires_grad_(False) for p in anchor.parameters() if p.requires_grad] if bond else []
    generator = torch.Generator(args.device).manual_seed(args.seed)
    phases = args.episodes // args.rollouts
    done = vbon.load_checkpoint(args, task, optimizer, generator, anchored)
    examples = (vbon.shuffled(task.train_prompts, args.seed) if bond else
                training_pairs(samples, task.train_prompts, args, random.Random(args.seed)))
    examples = itertools.islice(examples, done * args.rollouts, None)
    with tqdm(total=phases * args.rollouts, initial=done * args.rollouts, desc=args.objective,
              unit="ep") as bar:
        for phase in range(done, phases):
            start, history = time.perf_counter(), []
            for row in range(0, args.rollouts, args.minibatch):
                progress = (phase + row / args.rollouts) / phases
                decayed = 1 - progress if args.lr_schedule == "linear" else 1
                optimizer.param_groups[0]["lr"] = args.lr * decayed
                batch = list(itertools.islice(examples, min(args.minibatch, args.rollouts - row)))
                loss, log_ratio = (on_policy_loss(policy, anchor, task, batch, args, generator) if bond else
                                   pair_loss(policy, task, batch, args))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                for a, p in zip(anchored, optimizer.param_groups[0]["params"]):
                    a.lerp_(p.detach(), args.eta)
                history.append(torch.stack([loss.detach(), log_ratio]))
                bar.update(len(batch))
            vbon.check_weights(optimizer)
            loss, log_ratio = torch.stack(history).mean(0).tolist()
            metrics = {"episode": (phase + 1) * args.rollouts, "objective/loss": loss,
                       "objective/" + ("kl_to_ref" if bond else "log_ratio_margin"): log_ratio,
                       "objective/lr": optimizer.param_groups[0]["lr"],
                       "time/update": time.perf_counter() - start}
            if exact_world and vbon.is_milestone(phase, phases):
                exact = exact_world.report(f"π_θ, {metrics['episode']} ep.", exact_world.log_probs(policy))
                metrics |= exact
            vbon.log_metrics(args, metrics)
            if args.save_every and (phase + 1) % args.save_every == 0 and phase + 1 < phases:
                vbon.save_checkpoint(args, task, phase + 1, optimizer, generator, anchored)

    ref_rewards = {key: rewards for key, (rewards, _) in samples.items()}
    result, responses = vbon.test_metrics(task, *vbon.sample_policy(policy, task, args), ref_rewards, args)
    result |= {"episodes": phases * args.rollouts} | exact
    return vbon.save_results(args, task, exact_world, result, responses, policy)


def run_bon(args):
    """Best-of-N on the test prompts, without training. Returns what it writes to result.json."""
    task = vbon.setup(args)
    lock = vbon.open_run(args)  # noqa: F841, held until this function ends
    ref_rewards = vbon.reference_samples(replace(task, train_prompts=[]), args)
    exact_world = vbon.ExactWorld(task, args) if args.task == "toy" else None
    result, samples = vbon.test_metrics(task, *sample_best(task, ref_rewards, args), ref_rewards, args)
    if exact_world:
        result |= exact_world.metrics(exact_world.log_bon)
    if args.N <= args.test_M:  # without sampling at all, from what is stored
        stored = torch.stack([ref_rewards["test", p] for p in task.test_prompts])
        result["bon/expected_reward"] = expected_best_of_n(stored, int(args.N)).mean().item()
    return vbon.save_results(args, task, exact_world, result, samples)


@torch.no_grad()
def sample_best(task, ref_rewards, args):
    """The best of N new samples of π_ref, test_responses times to each test prompt, and log π_bon − log π_ref
    of it: two lists. The mean of the second is the KL."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    responses, kls, N, R = [], [], int(args.N), args.test_responses
    for prompt in tqdm(task.test_prompts, desc=f"Best-of-{N}"):
        uniforms = torch.rand(R * N, args.max_new_tokens, generator=generator, device=args.device)
        batches, texts, rewards = zip(*(sample(task.ref, task, [prompt], rows, args)
                                        for rows in uniforms.split(512)))
        texts, rewards = sum(texts, []), torch.cat(rewards)
        log_p = torch.cat([batch.log_probs.double().sum(1).cpu() for batch in batches])
        best = best_of_n(rewards.view(R, N)) + N * torch.arange(R)
        k = vbon.ranks(rewards[best], ref_rewards["test", prompt])
        log_F = vbon.posterior_log_F(k, args.test_M, N)
        responses += [texts[i] for i in best]
        kls += (N * vbon.vbon_reward(log_F, log_p[best], N)).tolist()
    return responses, kls


def main(argv=None):
    def run():
        args = vbon.parse_args(argv, Args, __doc__, positional="objective")
        (run_bon if args.objective == "bon" else train)(args)
    return vbon.run_script("bon_baselines.py", run)


if __name__ == "__main__":
    sys.exit(main())
