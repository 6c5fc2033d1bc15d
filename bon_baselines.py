#!/usr/bin/env python3
"""Baselines of "Variational Best-of-N Alignment" on the tasks and reference samples of vbon.py.

    python bon_baselines.py bon --N 16        # Best-of-N itself, no training
    python bon_baselines.py bon-sft --N 16    # maximum likelihood on Best-of-N responses
    python bon_baselines.py dpo --task imdb   # direct preference optimization, Rafailov et al. 2023
    python bon_baselines.py bonbon --N 16     # BoNBoN, Gui et al. 2024
    python bon_baselines.py bond              # J-BOND, Sessa et al. 2024: repeated Best-of-2

All flags of vbon.py are accepted. Those of PPO have no effect. --episodes counts training examples
(bond: prompts). bond samples during training. The others learn from cached reference samples. The
losses are pure functions of log-probs of whole responses, (B,), in nats, with EOS.
"""
import argparse
import itertools
import json
import math
import random
import sys
import time

import torch
from tqdm import tqdm

import vbon

# ========== 1. Best-of-N and the losses ==========================================================

def best_of_n(rewards):
    """Index of the highest of N rewards, (..., N) -> (...). The first of equal ones."""
    return torch.as_tensor(rewards).argmax(-1)


def expected_best_of_n(rewards, N):
    """Mean maximum of N out of M rewards, (..., M) -> (...), float64: an unbiased estimate of
    Best-of-N's expected reward. Raises ValueError if N is no whole number from 1 to M."""
    ascending = torch.as_tensor(rewards).double().sort(-1).values
    M = ascending.shape[-1]
    if not (1 <= N <= M and N == int(N)):
        raise ValueError(f"N must be a whole number from 1 to M = {M}, got {N}")
    # The k-th lowest reward is the maximum of C(k−1, N−1) of the C(M, N) subsets, a share w_k of
    # them: w_M = N/M and w_{k−1} / w_k = (k−N) / (k−1). Logs, because binomials overflow.
    k = torch.arange(2, M + 1, dtype=torch.double, device=ascending.device)
    log_steps = torch.log(((k - N) / (k - 1)).clamp(min=0))
    log_w = torch.cat([log_steps.flip(0).cumsum(0).flip(0), log_steps.new_zeros(1)])
    return torch.where(log_w == -torch.inf, 0.0, ascending * log_w.exp()).sum(-1) * N / M


def sft_loss(log_probs):
    """Maximum likelihood: −mean log π_θ(y) over the responses, (B,)."""
    return -log_probs.mean()


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """−mean log σ(β·h), h = log π_θ/π_ref of chosen − that of rejected (Rafailov et al., Eq. 7)."""
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -torch.nn.functional.logsigmoid(beta * h).mean()


def bonbon_beta(N):
    """β* = 1 / (2(N−1)·Σ_{k<N} 1/k) (Gui et al. 2024, Theorem 3), infinite at N = 1.
    Under Best-of-N the log-ratio of the best of N is on average 1/(2β*) above that of the worst."""
    if not (N >= 1 and N == int(N)):
        raise ValueError(f"N must be a whole number from 1, got {N}")
    gap = (N - 1) * sum(1 / k for k in range(1, int(N)))
    return 1 / (2 * gap) if gap else math.inf


def bonbon_loss(policy_best, policy_worst, ref_best, ref_worst, N, alpha=None):
    """−α·mean log π_θ(best) + (1−α)·mean (h − 1/(2β*))², h as in `dpo_loss`. alpha=None makes both
    terms equal at every call, as in both papers, without gradient through α. This α starts near 1
    and falls with the second term. The code of Gui et al. has a constant 0.005."""
    h = (policy_best - ref_best) - (policy_worst - ref_worst)
    likelihood, contrast = sft_loss(policy_best), (h - 1 / (2 * bonbon_beta(N))).square().mean()
    if alpha is None:
        alpha = (contrast / (likelihood + contrast).clamp(min=1e-12)).detach()
    return alpha * likelihood + (1 - alpha) * contrast


def bond_reward(rewards, anchor_rewards):
    """−log 16 if the reward (B,) is below both anchor_rewards (B, 2), otherwise 0 (Sessa et al.,
    Eq. 17). It replaces log F under the anchor. Its mean −log 16·(1−F)² equals log F at F = ½."""
    return -math.log(16) * (rewards < anchor_rewards.amin(1)).double()


def bond_loss(best, own, anchor_own, reward, beta=0.5, gamma=0.0):
    """J-BOND's loss (1−β)·FW + β·BW + γ·REG (Sessa et al. 2024, Algorithm 2).

    best is log π_θ of the better of two responses of the anchor. For responses y ~ π_θ, own is
    log π_θ(y), anchor_own is log π_anchor(y), reward is `bond_reward`. With D = own − anchor_own:
      FW   −best               has the gradient of KL(Best-of-2 of the anchor ‖ π_θ)
      BW   −own·(reward − D)   has that of KL(π_θ ‖ Best-of-2), if the reward is log F
      REG  −own·(−D)           has that of KL(π_θ ‖ π_anchor)
    The factor of own has no gradient and is centered by its mean over the other responses.
    """
    D = (own - anchor_own).detach()
    weight = beta * (reward - D) - gamma * D
    others = (weight.sum() - weight) / max(1, len(weight) - 1)
    return -(1 - beta) * best.mean() - ((weight - others) * own).mean()


# ========== 2. Training ==========================================================================

def training_pairs(prompts, rewards, tokens, args):
    """Yield (prompt, better response, worse response) forever, the responses as token lists. Every
    pass takes a new random group of each prompt's reference samples: bon-sft and bonbon the best
    and the worst of N, dpo pairs without ties. Args: rewards (P, M), tokens P lists of M."""
    if (rewards == rewards[:, :1]).all():
        raise vbon.UserError("reference samples must differ in reward: pass a larger --M")
    rng = random.Random(args.seed)
    while True:
        examples = []
        for prompt, r, responses in zip(prompts, rewards, tokens):
            if args.objective == "dpo":
                group = rng.sample(range(len(r)), DPO_RESPONSES)
                pairs = [(i, j) if r[i] > r[j] else (j, i)
                         for i, j in itertools.combinations(group, 2) if r[i] != r[j]]
                pairs = rng.sample(pairs, min(DPO_PAIRS, len(pairs)))
            else:
                group = rng.sample(range(len(r)), int(args.N))
                pairs = [(group[best_of_n(r[group])], group[best_of_n(-r[group])])]
            examples += [(prompt, responses[i], responses[j]) for i, j in pairs]
        yield from rng.sample(examples, len(examples))


def sequence_log_probs(lm, batch, args):
    """log π of the responses of a Rollout, (B,), nats."""
    with vbon.autocast(args):
        log_probs, _ = vbon.response_log_probs(lm, batch, args.temperature, args.unfrozen_layers)
    return torch.where(batch.mask, log_probs, 0.0).sum(1)


def response_log_probs(policy, task, prompts, responses, args):
    """log π_θ and log π_ref of B responses, given as token lists: both (B,), nats."""
    ids, attention = vbon.pad([task.encode(p) for p in prompts], task.eos[0], "left", args.device)
    tokens, mask = vbon.pad(responses, task.eos[0], "right", args.device)
    batch = vbon.Rollout(torch.cat([ids, tokens[:, :-1]], 1),
                         torch.cat([attention, mask[:, :-1]], 1), tokens, mask)
    log_ref = vbon.reference_log_probs(task.ref, batch, args).sum(1)  # computes the frozen layers
    return sequence_log_probs(policy, batch, args), log_ref


def pair_loss(policy, task, examples, args):
    """Loss of a minibatch, and the mean of h (see `dpo_loss`), or of log π_θ/π_ref with bon-sft."""
    prompts, better, worse = map(list, zip(*examples))
    if args.objective == "bon-sft":
        best, ref_best = response_log_probs(policy, task, prompts, better, args)
        return sft_loss(best), (best - ref_best).detach().mean()
    both, ref_both = response_log_probs(policy, task, prompts * 2, better + worse, args)
    pairs = *both.chunk(2), *ref_both.chunk(2)
    loss = (dpo_loss(*pairs, args.beta) if args.objective == "dpo" else
            bonbon_loss(*pairs, int(args.N), args.alpha))
    chosen, rejected = (both - ref_both).detach().chunk(2)
    return loss, chosen.mean() - rejected.mean()


def sample(lm, task, prompts, uniforms, args):
    """Sample and score B responses, the same number per prompt. Args: uniforms (B, T), grouped by
    prompt. Returns: Rollout, texts, rewards (B,) float64."""
    with vbon.autocast(args):
        batch = vbon.generate(lm, [task.encode(p) for p in prompts], uniforms, task.eos,
                              args.temperature)
    prompts = [p for p in prompts for _ in range(len(uniforms) // len(prompts))]
    texts = vbon.decode(task, prompts, vbon.token_lists(batch))
    return batch, texts, torch.tensor(task.score(prompts, texts), dtype=torch.double)


def on_policy_loss(policy, anchor, task, prompts, args, generator):
    """`bond_loss` of B prompts, and the mean log π_θ/π_ref of the policy's responses."""
    # Sample one response per prompt with the policy and two with the anchor.
    B = len(prompts)
    uniforms = torch.rand(3 * B, args.max_new_tokens, generator=generator, device=args.device)
    own, _, rewards = sample(policy, task, prompts, uniforms[:B], args)
    pairs, _, anchor_rewards = sample(anchor, task, prompts, uniforms[B:], args)
    best = pairs[best_of_n(anchor_rewards.view(B, 2)) + 2 * torch.arange(B)]

    log_ref = vbon.reference_log_probs(task.ref, own, args).sum(1)  # computes the frozen layers
    with torch.no_grad():
        anchor_own = sequence_log_probs(anchor, own, args)
    log_best, log_own = (sequence_log_probs(policy, batch, args) for batch in (best, own))
    reward = bond_reward(rewards, anchor_rewards.view(B, 2)).to(log_own)
    loss = bond_loss(log_best, log_own, anchor_own, reward, gamma=args.gamma)
    return loss, (log_own - log_ref).detach().mean()


def train(args):
    """Train a policy with bon-sft, dpo, bonbon or bond. Returns the content of result.json."""
    start, task, bond = time.perf_counter(), vbon.setup(args), args.objective == "bond"
    policy = vbon.make_policy(task.ref, args.unfrozen_layers)
    anchor = vbon.make_policy(task.ref, args.unfrozen_layers) if bond else None
    vbon.open_run(args)

    # bond learns from prompts, the others from pairs of reference samples.
    clock = time.perf_counter()
    examples = vbon.shuffled(task.prompts, args.seed) if bond else training_pairs(
        task.prompts, *vbon.reference_samples(task, args, tokens=True), args)
    result = {"seconds_sampling": time.perf_counter() - clock}
    toy = vbon.ExactToy(task, args) if args.task == "toy" else None

    # With --resume, continue after the last checkpoint.
    optimizer, generator = vbon.make_optimizer([policy], args), torch.Generator(args.device)
    trained = optimizer.param_groups[0]["params"]
    anchored = [p for p in anchor.parameters() if p.requires_grad] if bond else []
    state, iterations = dict(enumerate(trained + anchored)), args.episodes // args.rollouts
    done = vbon.load_checkpoint(args, task, state, optimizer)
    examples = itertools.islice(examples, done * args.rollouts, None)

    with tqdm(total=iterations, initial=done, desc=args.objective, unit="iteration") as bar:
        for iteration in range(done, iterations):
            clock, history = time.perf_counter(), []
            generator.manual_seed(args.seed * iterations + iteration)
            for row in range(0, args.rollouts, args.minibatch):
                if args.lr_schedule == "linear":
                    progress = (iteration + row / args.rollouts) / iterations
                    optimizer.param_groups[0]["lr"] = args.lr * (1 - progress)
                batch = [*itertools.islice(examples, min(args.minibatch, args.rollouts - row))]
                loss, log_ratio = (on_policy_loss(policy, anchor, task, batch, args, generator)
                                   if bond else pair_loss(policy, task, batch, args))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                for a, p in zip(anchored, trained):
                    a.data.lerp_(p.data, args.eta)
                history.append(torch.stack([loss.detach(), log_ratio]))
            vbon.check_finite(trained)

            done, (loss, log_ratio) = iteration + 1, torch.stack(history).mean(0).tolist()
            metrics = {"episode": done * args.rollouts, "objective/loss": loss,
                       "objective/" + ("kl_to_ref" if bond else "log_ratio_margin"): log_ratio,
                       "time/update": time.perf_counter() - clock}
            if toy and done * 8 // iterations > iteration * 8 // iterations:  # every eighth
                name = f"π_θ, {metrics['episode']:,} episodes"
                metrics |= toy.report(name, toy.log_probs(policy))
            vbon.log_metrics(args, metrics, bar)
            if args.save_every and done % args.save_every == 0:
                vbon.save_checkpoint(args, task, done, state, optimizer)

    result |= {"episodes": iterations * args.rollouts, "seconds": time.perf_counter() - start}
    return vbon.save_run(args, task, policy, result)


def run_bon(args):
    """Write result.json, on the toy with exact metrics. evaluate.py samples the responses."""
    start, task = time.perf_counter(), vbon.setup(args)
    vbon.open_run(args)
    result = {k: getattr(args, k) for k in ("task", "objective", "N", "M", "beta", "seed")}
    result |= {"episodes": 0, "seconds": time.perf_counter() - start, "seconds_sampling": 0.0}
    if args.task == "toy":
        toy = vbon.ExactToy(task, args)
        result |= toy.metrics(toy.log_bon)
    vbon.atomic_write(f"{args.out}/result.json", json.dumps(result, indent=2) + "\n")
    print(f"finished; to test it: python evaluate.py {args.out}")


@torch.no_grad()
def sample_best(task, ref_rewards, args, R, seed):
    """Sample the best of N new samples of the reference model, R times per test prompt. Returns:
    P·R texts, grouped by prompt, and log π_bon − log π_ref of each in nats, whose mean estimates
    KL(π_bon ‖ π_ref). Args: ref_rewards (P, M)."""
    generator = torch.Generator(args.device).manual_seed(seed)
    N, M, best_texts, kls = int(args.N), ref_rewards.shape[1], [], []
    for prompt, r in zip(tqdm(task.prompts, desc=f"Best-of-{N}", leave=False), ref_rewards):
        uniforms = torch.rand(R * N, args.max_new_tokens, generator=generator, device=args.device)
        batches, texts, rewards = zip(*(sample(task.ref, task, [prompt], rows, args)
                                        for rows in uniforms.split(args.sample_batch)))
        texts, rewards = sum(texts, []), torch.cat(rewards)
        log_p = torch.cat([batch.log_probs.double().sum(1).cpu() for batch in batches])
        best = best_of_n(rewards.view(-1, N)) + N * torch.arange(R)
        best_texts += [texts[i] for i in best]
        # E[log F | k of M reference rewards are lower], with the prior of Best-of-N, Beta(N, 1).
        k = vbon.mid_ranks(rewards[best], r)
        log_F = torch.digamma(k + N) - torch.digamma(torch.full_like(k, M + N + 1))
        kls += (vbon.log_bon_pmf(log_F, log_p[best], N) - log_p[best]).tolist()
    return best_texts, kls


# ========== 3. Command line ======================================================================

METHODS = ("bon", "bon-sft", "dpo", "bonbon", "bond")
COMMON = dict(M=200, beta=0.1, estimator="add_one", prefix_critic=0, token_bias_lr=0.0)
RECIPES = {task: vbon.RECIPES[task] | COMMON | dict(episodes=episodes, lr=lr) for task, episodes, lr
           in (("toy", 81_920, 1e-3), ("imdb", 10_240, 1e-4), ("tldr", 10_240, 3e-6))}
DPO_RESPONSES, DPO_PAIRS = 6, 12  # per prompt and pass: 12 of the 15 pairs of 6 responses (§5)


def parse_args(argv=None):
    """Parse the flags of vbon.py and those of the baselines."""
    parser = vbon.make_parser(RECIPES, __doc__, argv)
    parser.add_argument("--objective", choices=METHODS, help=argparse.SUPPRESS)  # positional here
    parser.add_argument("objective", choices=METHODS, help="method")
    add = parser.add_argument_group("baselines").add_argument
    add("--N", type=float, help="N of Best-of-N, a whole number; not used by dpo and bond")
    add("--M", type=int, help="reference samples per training prompt, raised if N needs more")
    add("--beta", type=float, help="dpo: weight β of the KL penalty")
    add("--alpha", type=float, help="bonbon: weight of the likelihood; by default terms balance")
    # η, and β = ½ in bond_loss, are those of Sessa et al. for Gemma 7B (§6), as cited by others.
    add("--eta", type=float, default=0.02, help="bond: step size of the anchor")
    add("--gamma", type=float, default=0.0, help="bond: weight of the KL to the anchor")
    return vbon.parse_args(argv, parser, derive)


def derive(args):
    """Check flags that depend on each other, raise M to what N needs, set --out."""
    if vbon.WORLD_SIZE > 1:
        raise vbon.UserError("bon_baselines.py runs in one process: start it without torchrun")
    if args.objective not in ("dpo", "bond") and args.N != int(args.N):
        raise vbon.UserError(f"--N must be a whole number for {args.objective}, got {args.N}")
    for name, least, most in ("beta", 1e-9, 1e9), ("alpha", 0, 1), ("eta", 0, 1), ("gamma", 0, 1e9):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise vbon.UserError(f"--{name} must be from {least:g} to {most:g}, got {value}")

    # With M near N, the toy's four prompts would have four best responses to memorize.
    enough = int(args.N) * (10 if args.task == "toy" else 1)
    args.M = max(args.M, {"bon": 1, "dpo": DPO_RESPONSES, "bond": 1}.get(args.objective, enough))
    args.kl_coef, M = 1 / args.N, f"-M{args.M}"
    strength = {"bon": f"N{args.N}", "dpo": f"beta{args.beta:g}{M}", "bond": f"{args.episodes}ep"}
    strength = strength.get(args.objective, f"N{args.N}{M}")
    args.out = args.out or f"runs/{args.task}-{args.objective}-{strength}-seed{args.seed}"


def main(argv=None):
    return vbon.run_script("bon_baselines.py", lambda: parse_args(argv),
                           lambda args: (run_bon if args.objective == "bon" else train)(args))


if __name__ == "__main__":
    sys.exit(main())
