#!/usr/bin/env python3
"""Variational Best-of-N alignment (vBoN), from scratch, in one file.

Best-of-N draws N responses y ~ π_ref(·|x), scores them with a reward r and keeps the best. vBoN fine-tunes a
policy π_θ so that ONE sample from it is distributed like that best one: PPO minimizes KL(π_θ ‖ π_bon).
(Amini, Vieira, Ash, Cotterell: "Variational Best-of-N Alignment", ICLR 2025. Equation numbers are theirs.)

    python vbon.py                                # toy: nothing to download, π_bon known exactly, a minute
    python vbon.py --task imdb --N 16             # the paper's sentiment task, from the Hugging Face hub
    python vbon.py --task imdb --N 16 --ref DIR --reward DIR --dataset DIR    # with your own pieces
    python vbon.py --objective rlhf --beta 0.1    # the baseline: KL-constrained RL with the same PPO
    torchrun --nproc_per_node=2 vbon.py --task imdb
    python vbon.py --help

Algorithm 1:

    draw M responses of π_ref to every prompt, score and store them
    π_θ ← π_ref
    repeat: sample one response y to each of a batch of prompts
            F̂ = share of the prompt's M rewards that lie below r(y);  π_bon(y) = (F̂ + π_ref(y))^N − F̂^N
            reward: (log π_bon(y) − log π_ref(y))/N at the end, −(log π_θ − log π_ref)/N on every token
            GAE, whitened advantages, clipped losses, a few epochs

Sections 1 to 5 are that algorithm; what they call from further down does what its name says, and a `Task`
holds π_ref, reward and prompts. The mathematics and the losses are pure functions of tensors, to copy out.

Left out on purpose: LoRA and sharding, which need a framework (--unfrozen-layers saves memory instead); an
adaptive KL coefficient and an entropy bonus, for the objective says what they are; a second model for the
values; training the reward model.

Logarithms are natural (nats). y is a response, y' one of π_ref, r their reward, p = π_ref(y) and F(y) =
P(r(y') < r(y)). B is a number of responses, T of their tokens, V of words, H the width of a hidden state, P a
number of prompts, L of a prompt's tokens, M of π_ref's samples to it, K of the layers that are trained.
"""
import argparse
import collections
import copy
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# ========== 1. Mathematics ==================================================================================


def log_bon_pmf(log_F, log_p, N):
    """log π_bon(y) in nats: the probability that Best-of-N returns the response y (Prop. 1, Eq. 4), exact.

    π_bon(y) = (F + p)^N − F^N: all N samples rank at most as high as y, but not all of them strictly lower.
    (Equal rewards are put in some order, App. C.)
    The paper writes it as Σ_i C(N,i) F^(N−i) p^i, which is the same number but costs O(N) and overflows.

    log_F: log P(r(y') < r(y)) under π_ref, −inf for the worst response. log_p: log π_ref(y), EOS included,
    prompt not. N: real, at least 1, else ValueError. All broadcast. Computed in float64 to a relative
    accuracy of 1e-10 (absolute below 1), returned in the dtype that was passed; differentiable.
    """
    dtype = torch.promote_types(*(x.dtype if torch.is_tensor(x) else torch.double for x in (log_F, log_p)))
    log_F, log_p, N = (torch.as_tensor(x, dtype=torch.double) for x in (log_F, log_p, N))
    if not (N >= 1).all():
        raise ValueError(f"N must be at least 1, not {N.min().item():g}")
    # π_bon = (F+p)^N · (1 − (F/(F+p))^N), and with d = log p − log F the ratio F/(F+p) is exp(−softplus(d)).
    d = torch.where(log_F == -torch.inf, torch.inf, log_p - log_F)
    log_factor = torch.log(-torch.expm1(-N * nn.functional.softplus(d.clamp(min=-600))))
    # Real responses have log p = −50 … −1000. Below d = −600 e^d is near underflow, and the factor is N·e^d.
    log_factor = torch.where(d < -600, torch.log(N) + d, log_factor)
    log_pmf = N * torch.logaddexp(log_F, log_p) + log_factor
    return log_pmf.to(dtype) if dtype.is_floating_point else log_pmf


def bon_kl(N):
    """KL(π_bon ‖ π_ref) = log N − (N−1)/N nats for a continuous reward; else an upper bound."""
    return math.log(N) - (N - 1) / N


def bon_win_rate(N):
    """P(the best of N beats one more sample of π_ref) = N/(N+1) for a continuous reward."""
    return N / (N + 1)


ESTIMATORS = ("log_mean", "add_one", "posterior")


def estimate_log_F(rewards, ref_rewards, estimator="add_one"):
    """Monte Carlo estimate of log F(y) = log P(r(y') < r(y)), y' ~ π_ref, from M samples (Eq. 6, 7).

    rewards: (...). ref_rewards: (..., M) of the same prompt, or (M,) for all. Returns log F̂ (...), float64,
    nats. With k = #{m : r'_m < r}:
      "log_mean"   log(k/M)          the paper's, the log of the mean: consistent, biased, −inf at k = 0
      "add_one"    log((k+1)/(M+1))  the authors' code: always finite, and so the default
      "posterior"  ψ(k+1) − ψ(M+2)   E[log F | k], exact when y ~ π_ref
    Only ranks enter: an increasing map of all rewards changes nothing. To break ties by a total order
    (App. C), pass ranks of (reward, order). Raises ValueError for M = 0, a NaN or another estimator.
    """
    rewards, ref_rewards = (torch.as_tensor(x, dtype=torch.double) for x in (rewards, ref_rewards))
    M = ref_rewards.shape[-1]
    if M == 0:
        raise ValueError("estimate_log_F needs at least one reference reward per prompt (M ≥ 1)")
    if rewards.isnan().any() or ref_rewards.isnan().any():
        raise ValueError("a reward is NaN: it has no rank")
    k = (ref_rewards < rewards.unsqueeze(-1)).sum(-1).double()
    if estimator == "log_mean":
        return torch.log(k / M)
    if estimator == "add_one":
        return torch.log((k + 1) / (M + 1))
    if estimator == "posterior":
        return torch.digamma(k + 1) - torch.digamma(torch.full_like(k, M + 2))
    raise ValueError(f"unknown estimator {estimator!r}: choose from log_mean, add_one, posterior")


OBJECTIVES = ("vbon", "bound", "bound1", "rlhf")


def vbon_reward(log_F, log_p, N, objective="vbon"):
    """What a response earns at its end, in nats. With a KL penalty of 1/N on every token PPO then maximizes

      −KL(π_θ ‖ π_bon) = E_{π_θ}[log π_bon(y) − log p(y)] − KL(π_θ ‖ π_ref),   p = π_ref,   both divided by N,

    which leaves the optimum alone and keeps rewards at one scale for every N. Before the division it is for
      "vbon"    log π_bon(y) − log p       the objective itself                         (Eq. 5)
      "bound"   (N−1) log F                a lower bound of it, L                       (Thm. 2, Eq. 8)
      "bound1"  N(N−1)/2·log F + (N(N+1)/2 − 1)·log p        a lower one, L1            (Thm. 3, Eq. 16)
    log_F, log_p, N as in `log_bon_pmf`, which gives π_bon. Where log p < −30 "vbon" is "bound" + log(N)/N to
    1e-10: a trainer that subtracts a baseline may take "bound" and log_p = 0. Raises ValueError where N < 1
    or for another objective.
    """
    log_F, log_p, N = (torch.as_tensor(x, dtype=None if torch.is_tensor(x) else torch.double)
                       for x in (log_F, log_p, N))
    if not (N >= 1).all():
        raise ValueError(f"N must be at least 1, not {N.min().item():g}")
    weighted_log_F = torch.where(N == 1, 0.0, (N - 1) / N * log_F)  # at N = 1 even F = 0 has no weight
    if objective == "vbon":
        return (log_bon_pmf(log_F, log_p, N) - log_p) / N
    if objective == "bound":
        return weighted_log_F + torch.zeros_like(log_p)
    if objective == "bound1":
        return N / 2 * weighted_log_F + (N * (N + 1) / 2 - 1) / N * log_p
    raise ValueError(f"unknown objective {objective!r}: choose from vbon, bound, bound1")


# ========== 2. Settings =====================================================================================

# Defaults of each task. toy's and imdb's training are ours, the rest is the paper's. The paper trains imdb by
#   --M 200 --estimator add_one --critic-every 0 --token-step 0 --lam 0.95 --ppo-epochs 4 --lr 3e-5
#   --lr-schedule constant
RECIPES = {
    "toy": dict(
        N=16, M=200, estimator="add_one", temperature=1.0, max_new_tokens=4,
        train_prompts=4, test_M=10_000,
        episodes=163_840, rollouts=2048, minibatch=256, ppo_epochs=2, critic_every=0, lam=1.0,
        value_coef=1.0, lr=1e-3, adam_eps=1e-8, token_step=0.0, unfrozen_layers=-1, sample_batch=512),
    "imdb": dict(
        ref="lvwerra/gpt2-imdb", reward="lvwerra/distilbert-imdb", dataset="stanfordnlp/imdb",
        N=16, M=32, estimator="shared", temperature=1.0, max_new_tokens=40,
        train_prompts=5000, test_M=200,
        episodes=80_000, rollouts=128, minibatch=32, ppo_epochs=1, critic_every=2, lam=0.8,
        value_coef=1.0, lr=1.25e-4, adam_eps=1e-8, token_step=1 / 16, unfrozen_layers=2, sample_batch=512),
    "tldr": dict(
        ref="cleanrl/EleutherAI_pythia-2.8b-deduped__sft__tldr",
        reward="cleanrl/EleutherAI_pythia-2.8b-deduped__reward__tldr", no_eos_reward=-1.0,
        dataset="vwxyzjn/summarize_from_feedback_tldr_3_filtered",
        N=100, M=200, estimator="smooth", temperature=0.7, max_new_tokens=53,
        train_prompts=5000, test_M=200,
        episodes=10_000, rollouts=32, minibatch=32, ppo_epochs=4, critic_every=0, lam=0.95,
        value_coef=0.2, lr=3e-6, adam_eps=1e-5, token_step=0.0, unfrozen_layers=2, sample_batch=64),
}


def flag(default, help, choices=None):
    """A field of Args. None as the default: the task's recipe has it, or the help says what it means."""
    return field(default=default, metadata={"help": help, "choices": choices})


def number(text):
    """'16' -> 16, '2.5' -> 2.5: N may be any real number, and whole ones should look whole."""
    value = float(text)
    return int(value) if value.is_integer() else value


@dataclass
class Args:
    recipes = RECIPES  # no flag, nor are the groups of --help, by their first flags
    groups = {"task": "method", "ref": "models, prompts, responses", "episodes": "training",
              "seed": "machine and files"}

    task: str = flag("toy", "toy (exact, no download), imdb (reviews) or tldr (summaries)", tuple(RECIPES))
    objective: str = flag("vbon", "vbon (Eq. 5), its bounds L and L1, or rlhf: reward − β·KL", OBJECTIVES)
    N: number = flag(None, "the N of Best-of-N, any real number from 1")
    M: int = flag(None, "samples of π_ref per training prompt; with --estimator shared 0 will do")
    estimator: str = flag(None, "estimator of log F; smooth fits −a·exp(−b·r), shared needs a smaller M, for "
                          "prompts learn from each other", (*ESTIMATORS, "smooth", "shared"))
    beta: float = flag(None, "KL coefficient of rlhf; default 1/(N−1)")

    ref: str = flag(None, "reference model: a hub name or folder, any causal LM with a KV cache")
    reward: str = flag(None, "reward model: a hub name or folder, a classifier with one logit or two labels")
    dataset: str = flag(None, "prompts: a hub name, folder or .jsonl file with `prompt`, or `text` to cut up")
    train_prompts: int = flag(None, "number of training prompts")
    test_prompts: int = flag(512, "number of test prompts")
    test_M: int = flag(None, "samples of π_ref per test prompt, which a policy is measured against")
    max_new_tokens: int = flag(None, "longest response, in tokens")
    test_responses: int = flag(8, "responses of π_θ per test prompt")
    temperature: float = flag(None, "sampling temperature, of π_ref, π_θ and so π_bon")
    no_eos_reward: float = flag(None, "what a response without EOS earns; default: what the reward says")

    episodes: int = flag(None, "total responses to train on")
    rollouts: int = flag(None, "responses per PPO phase")
    minibatch: int = flag(None, "responses per gradient step")
    ppo_epochs: int = flag(None, "passes over the responses of a phase")
    critic_every: int = flag(None, "tokens from one reading of the text so far by the critic to the next; 0: "
                             "a value head is the critic, as in the paper")
    lam: float = flag(None, "λ of generalized advantage estimation")
    value_coef: float = flag(None, "weight of the value loss, used with --critic-every 0 only")
    lr: float = flag(None, "AdamW's learning rate")
    lr_schedule: str = flag("linear", "constant, or linear decay to zero", ("constant", "linear"))
    adam_eps: float = flag(None, "AdamW's ε")
    token_step: float = flag(None, "share of its natural gradient step that each token's bias takes; 0: none")
    unfrozen_layers: int = flag(None, "train the top K layers and share the rest with π_ref; −1 trains all")

    seed: int = flag(0, "seed of training and of the final test")
    data_seed: int = flag(0, "seed of prompts, of π_ref's samples and of toy's π_ref")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps; auto takes a GPU where there is one")
    dtype: str = flag("float32", "of the forward passes; weights stay float32", ("float32", "bfloat16"))
    backend: str = flag("auto", "what samples π_ref: this script or vllm; auto: vllm with a GPU",
                        ("auto", "hand", "vllm"))
    sample_batch: int = flag(None, "responses of π_ref decoded at a time, which sets the memory of sampling")
    samples: str = flag("samples", "folder for π_ref's samples, which later runs read and extend")
    out: str = flag(None, "folder of this run; default runs/<task>-<objective>-…-seed<seed>")
    overwrite: bool = flag(False, "replace a finished run in --out")
    save_every: int = flag(25, "phases between checkpoints; 0 for none")
    resume: bool = flag(False, "go on from the last checkpoint in --out; it ends as if it had never stopped")

    def __post_init__(self):
        fill_in(self)  # the recipe's values; section 12
        finish(self)


# ========== 3. Sampling: decoding with a KV cache ===========================================================


@dataclass
class Rollout:
    """B responses and what is known of each. Indexing it by rows indexes every tensor."""
    input_ids: Tensor          # (B, L+T−1) prompt, padded on the left, and response but for its last token
    attention_mask: Tensor     # (B, L+T−1) true but on padding
    tokens: Tensor             # (B, T) the response, EOS included
    mask: Tensor               # (B, T) true up to and including EOS, or the last token
    log_probs: Tensor = None   # (B, T) of the policy that drew them; like the following, zero after EOS
    values: Tensor = None      # (B, T) what is still to be earned, as the critic sees it, nats/N
    trunk: Tensor = None       # (B, L+T−1, H) what enters the top K layers, if the layers below are frozen
    advantages: Tensor = None  # (B, T)
    returns: Tensor = None     # (B, T)
    earned: Tensor = None      # (B, T) what a token's block of tokens earned, for the bias of tokens

    def __getitem__(self, rows):
        return Rollout(**{name: None if x is None else x[rows] for name, x in vars(self).items()})


def pad(rows, value, side, device="cpu"):
    """Lists of token ids -> ids (B, T) padded on the given side, mask (B, T) of what is not padding."""
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, value, side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], True, False, side)
    return ids.to(device), mask.to(device)


def forward(lm, ids, mask, keep, cache=None, K=-1, trunk=None):
    """Logits (B, keep, V) and last hidden states (B, keep, H) at the last `keep` positions; the trunk.

    ids: (B, T), any tokens. mask (B, cached + T): false on padding; with a cache, ids are what it lacks yet.
    Other positions never pass through the LM head, whose V logits each are the peak of memory. The trunk
    (B, T, H) is what enters the top K layers; given one, only these run (section 11).
    """
    hidden, positions = [], (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]

    def keep_hidden(_, inputs):
        # A slice is not contiguous, and the head would multiply its B parts one by one.
        hidden.append(inputs[0].contiguous())
        return hidden[0]
    output = lm.get_output_embeddings()
    with output.register_forward_pre_hook(keep_hidden), top_layers(lm, K, trunk) as entered:
        logits = lm(input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache,
                    use_cache=cache is not None, logits_to_keep=keep).logits
    return logits.float(), hidden[0].float(), entered[0] if entered else None


def at_temperature(logits, temperature):
    """logits / temperature, without a pass over memory where it is 1."""
    return logits if temperature == 1 else logits / temperature


def sample_tokens(logits, uniforms):
    """One token per row by inverting the CDF: logits (B, V), uniforms (B,) -> tokens, log-probs (B,).

    `torch.multinomial`, which draws V random numbers per row, takes several times as long.
    """
    pi = logits.softmax(-1)
    cdf = pi.cumsum(-1)
    total = cdf[:, -1:]  # 1, up to rounding
    # u·total may round up to total, which no token reaches.
    largest = torch.nextafter(total, torch.zeros_like(total))
    tokens = torch.searchsorted(cdf, torch.minimum(uniforms.unsqueeze(1) * total, largest), right=True)
    tokens = tokens.clamp(max=logits.shape[1] - 1)  # logits that are NaN are for `check_weights` to report
    # On a GPU the sum may step on a token of probability 0: hence the clamp.
    log_probs = pi.gather(1, tokens).clamp(min=torch.finfo(pi.dtype).tiny).log()
    return tokens.squeeze(1), log_probs.squeeze(1)


@torch.no_grad()
def generate(lm, prompts, uniforms, eos, temperature, value_head=None, K=-1):
    """Samples B = P·copies responses, `copies` to each of P prompts. Returns a Rollout.

    prompts: P lists of token ids. uniforms (B, T): the random number behind each token, rows grouped by
    prompt: a response depends on its own row alone, up to rounding. Each prompt is read once for all of its
    copies; rows leave the batch as soon as they end.
    """
    device, (B, T), copies = uniforms.device, uniforms.shape, len(uniforms) // len(prompts)
    ids, attention = pad(prompts, eos, "left", device)
    cache = roomy_cache(lm)
    logits, hidden, entered = forward(lm, ids, attention, 1, cache, K)
    if copies > 1:
        cache.batch_repeat_interleave(copies)
        shared = ids, attention, logits, hidden, entered
        ids, attention, logits, hidden, entered = (
            x if x is None else x.repeat_interleave(copies, 0) for x in shared)
    prompt_length, prompt_mask = ids.shape[1], attention
    tokens, mask = torch.full((B, T), eos, device=device), torch.zeros(B, T, dtype=torch.bool, device=device)
    log_probs, values, trunk = torch.zeros(B, T, device=device), torch.zeros(B, T, device=device), None
    if entered is not None:
        trunk = entered.new_zeros(B, prompt_length + T - 1, entered.shape[2])
        trunk[:, :prompt_length] = entered

    alive = torch.arange(B, device=device)  # the responses that are still growing
    for t in range(T):
        token, log_prob = sample_tokens(at_temperature(logits[:, -1], temperature), uniforms[alive, t])
        tokens[alive, t], log_probs[alive, t], mask[alive, t] = token, log_prob, True
        if value_head is not None:
            values[alive, t] = value_head(hidden[:, -1]).squeeze(-1).float()
        growing = (token != eos).nonzero().squeeze(1)
        if t + 1 == T or len(growing) == 0:
            break
        if len(growing) < len(alive):
            cache.batch_select_indices(growing)
            alive, token, attention = alive[growing], token[growing], attention[growing]
        attention = torch.cat([attention, attention.new_ones(len(alive), 1)], 1)
        logits, hidden, entered = forward(lm, token.unsqueeze(1), attention, 1, cache, K)
        if trunk is not None:
            trunk[alive, prompt_length + t] = entered[:, 0]
    return Rollout(torch.cat([ids, tokens[:, :-1]], 1), torch.cat([prompt_mask, mask[:, :-1]], 1),
                   tokens, mask, log_probs, values, trunk)


# ========== 4. PPO ==========================================================================================

CLIP = 0.2          # range of the policy ratio and of the values
REWARD_CLIP = 10.0  # terminal rewards lie within ± this


def masked_mean(x, mask):
    """The mean of x over the tokens where mask is true."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalized advantage estimation (Schulman et al. 2016). All (B, T); mask true on the response.

    δ_t = r_t + γ V_{t+1} − V_t,  A_t = δ_t + γλ A_{t+1}; beyond the last token V and A are zero.
    Gives the advantages A and the returns A + V, both (B, T), zero where the mask is false.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages, next_advantage, next_value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        advantages[:, t], next_value = next_advantage, values[:, t]
    return advantages, advantages + values


def whiten(advantages, mask):
    """Shifted and scaled to mean 0 and variance 1 over the masked tokens (`masked_mean`); zero elsewhere."""
    centred = torch.where(mask, advantages - masked_mean(advantages, mask), 0.0)
    return centred * torch.rsqrt(masked_mean(centred ** 2, mask) + 1e-8)


def policy_loss(log_probs, old_log_probs, advantages, mask, clip=0.2):
    """PPO's clipped surrogate, −min(ρA, clip(ρ, 1−ε, 1+ε)A), ρ = π_θ/π_old; `masked_mean`. All (B, T)."""
    ratio = torch.exp(torch.where(mask, log_probs - old_log_probs, 0.0))
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.maximum(-advantages * ratio, -advantages * clipped), mask)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """½ max((V − R)², (clip(V, V_old ± ε) − R)²); `masked_mean`. All (B, T)."""
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def response_log_probs(lm, batch, temperature, K=-1):
    """log π(y_t | x, y_<t) of the response's tokens, nats, (B, T); hidden states, (B, T, H); the trunk.
    With a trunk in the batch, only the top K layers run."""
    T = batch.tokens.shape[1]
    logits, hidden, trunk = forward(lm, batch.input_ids, batch.attention_mask, T, None, K, batch.trunk)
    return token_log_probs(logits, batch.tokens, temperature), hidden, trunk


def log_F_of(scores, ref_rewards, args):
    """log F̂ of scores (...) from the rewards (..., M) of π_ref's samples. Zeros for rlhf, which has no F."""
    if args.objective == "rlhf":
        return torch.zeros_like(scores)
    if args.estimator == "smooth":
        # The fit is the same wherever 0 is; about the mean nothing overflows.
        centre = ref_rewards.mean(-1, keepdim=True)
        a, b = fit_log_F(ref_rewards - centre)
        return -a * torch.exp(-b * (scores - centre.squeeze(-1)))
    # With "shared", `share_samples` has put quantiles of what all prompts tell in the place of the rewards.
    return estimate_log_F(scores, ref_rewards, "add_one" if args.estimator == "shared" else args.estimator)


def terminal_reward(scores, log_F, log_p, args):
    """What a response earns at its end, by the objective, clipped."""
    reward = scores if args.objective == "rlhf" else vbon_reward(log_F, log_p, args.N, args.objective)
    limit = math.inf if args.objective == "bound1" else REWARD_CLIP  # bound1's log p is always large
    return reward.clamp(-limit, limit)


def make_critic(policy, args):
    """A value head, hidden states (B, T, H) -> (B, T, 1); with --critic-every the sums of `fit_values`."""
    if args.critic_every:
        return torch.zeros(math.ceil(args.max_new_tokens / args.critic_every), 4, 5, dtype=torch.double)
    width = policy.get_output_embeddings().weight.shape[1]
    head = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1))
    return head.to(policy.device)


@torch.no_grad()
def collect(policy, critic, task, prompts, ref_rewards, args, generator):
    """First half of a PPO phase: a response to each of B prompts, its reward, its advantages.

    ref_rewards (B, M): the rewards of π_ref's samples to each prompt. critic: see `make_critic`. Returns the
    Rollout and metrics.
    """
    start, B, K = time.perf_counter(), len(prompts), args.unfrozen_layers

    # Sample. Decoding has log-probs, values and the trunk at hand: none of them is computed twice.
    uniforms = torch.rand(B, args.max_new_tokens, generator=generator, device=args.device)
    with autocast(args):
        rollout = generate(policy, [task.encode(p) for p in prompts], uniforms, task.tokenizer.eos_token_id,
                           args.temperature, None if args.critic_every else critic, K)
    responses, mask = decode(task, prompts, token_lists(rollout)), rollout.mask
    sampled = time.perf_counter()

    # log π_ref of the same tokens.
    with autocast(args):
        ref_log_probs = torch.cat([response_log_probs(task.ref, rollout[rows], args.temperature, K)[0]
                                   for rows in torch.arange(B, device=args.device).split(args.minibatch)])
    ref_log_probs = torch.where(mask, ref_log_probs, 0.0)

    # Score the texts and rank them among π_ref's samples: F̂. The reward is all that vBoN changes in PPO.
    scores = torch.tensor(task.score(prompts, responses), dtype=torch.double)
    log_F = log_F_of(scores, ref_rewards, args)
    terminal = terminal_reward(scores, log_F, ref_log_probs.cpu().double().sum(1), args)

    # Reward: −kl_coef·(log π_θ − log π_ref) on every token, and the terminal reward on the last one.
    log_ratio = rollout.log_probs - ref_log_probs
    rewards = -args.kl_coef * log_ratio
    rewards[torch.arange(B), mask.sum(1) - 1] += terminal.to(rewards)

    # The values, where no head has given them, and the advantages.
    if args.critic_every:
        # u says how high the text so far stands among the prompt's M samples, as a normal quantile.
        u = read_unfinished(task, prompts, rollout, ref_rewards, args.critic_every)
        # The values are zero so far, which makes these the rewards that are still to come.
        _, whole_returns = gae(rewards, rollout.values, mask, gamma=1.0, lam=1.0)
        values = fit_values(u, whole_returns.cpu().double(), mask.cpu(), args.critic_every, critic)
        rollout.values = values.to(rewards)
    advantages, returns = gae(rewards, rollout.values, mask, gamma=1.0, lam=args.lam)
    rollout.advantages, rollout.returns = whiten(advantages, mask), returns
    rollout.earned = block_earnings(rewards, rollout.values, mask, args.critic_every or 1)

    metrics = rollout_metrics(rollout, log_ratio.sum(1).cpu().double(), scores, ref_rewards, args.N)
    return rollout, metrics | {
        "objective/reward": scores.mean().item(), "objective/terminal_reward": terminal.mean().item(),
        "time/rollout": sampled - start, "time/score": time.perf_counter() - sampled}


def update(policy, critic, counts, optimizer, rollout, args, generator):
    """Second half of a PPO phase: ppo_epochs passes of clipped gradient steps. Returns metrics."""
    start, losses, K = time.perf_counter(), [], args.unfrozen_layers
    for _ in range(args.ppo_epochs):
        hidden_states = []
        order = torch.randperm(len(rollout.tokens), generator=generator, device=args.device)
        for rows in order.split(args.minibatch // processes()):
            batch = rollout[rows]
            with autocast(args):
                log_probs, hidden, _ = response_log_probs(policy, batch, args.temperature, K)
                # With --critic-every the values are constants, and so is their loss.
                values = batch.values if args.critic_every else critic(hidden).squeeze(-1).float()
            pg = policy_loss(log_probs, batch.log_probs, batch.advantages, batch.mask, CLIP)
            vf = value_loss(values, batch.values, batch.returns, batch.mask, CLIP)
            optimizer.zero_grad()
            (pg + args.value_coef * vf).backward()
            average_gradients(optimizer)
            optimizer.step()
            hidden_states.append(hidden.detach()[batch.mask])
            with torch.no_grad():
                log_ratio = log_probs - batch.log_probs
                kl = masked_mean(torch.expm1(log_ratio) - log_ratio, batch.mask)
                clipped = masked_mean((torch.expm1(log_ratio).abs() > CLIP).float(), batch.mask)
                losses.append(torch.stack([pg, vf, kl, clipped]))

    lr = optimizer.param_groups[0]["lr"]
    if args.token_step:  # this step shrinks as the learning rate does
        output, share = policy.get_output_embeddings(), args.token_step * lr / args.lr
        step_token_bias(output, torch.cat(hidden_states), rollout, counts, share, args.kl_coef)
    check_weights(optimizer)
    pg, vf, kl, clipped = torch.stack(losses).mean(0).tolist()
    return {"ppo/policy_loss": pg, "ppo/value_loss": vf, "ppo/kl_of_update": kl, "ppo/clip_fraction": clipped,
            "ppo/lr": lr, "time/update": time.perf_counter() - start}


# ========== 5. The training loop ============================================================================


def train(args):
    """Algorithm 1, from the first sample to the last test. Returns what it writes to result.json."""
    task = setup(args)
    torch.manual_seed(args.seed)
    policy = make_policy(task.ref, args.unfrozen_layers, own_output=args.token_step > 0)
    critic = make_critic(policy, args)
    output = policy.get_output_embeddings().weight
    counts = torch.zeros(len(output), dtype=torch.double)  # of every token, for `step_token_bias`
    # What is learned by gradients, and what is updated in place without.
    trained = [*policy.parameters()] + ([] if args.critic_every else [*critic.parameters()])
    updated = ([critic] if args.critic_every else []) + ([output, counts] if args.token_step else [])
    lock = open_run(args)  # noqa: F841, held until this function ends

    # The M samples of π_ref to every prompt are drawn once, stored, and used again by every run.
    clock = time.perf_counter()
    ref_rewards = reference_samples(task, args)
    result = {"seconds_sampling": round(time.perf_counter() - clock, 3)}
    exact_world = ExactWorld(task, args, ref_rewards) if args.task == "toy" else None

    optimizer = make_optimizer(trained, args)
    generator = torch.Generator(args.device).manual_seed(args.seed + rank())
    phases, done = args.episodes // args.rollouts, load_checkpoint(args, task, optimizer, generator, updated)
    prompt_stream = itertools.islice(shuffled(task.train_prompts, args.seed), done * args.rollouts, None)
    with tqdm(total=phases * args.rollouts, initial=done * args.rollouts, desc="PPO", unit="ep") as bar:
        for phase in range(done, phases):
            decayed = 1 - phase / phases if args.lr_schedule == "linear" else 1
            optimizer.param_groups[0]["lr"] = args.lr * decayed

            # Of several processes each takes its share of the prompts.
            prompts = list(itertools.islice(prompt_stream, args.rollouts))[rank()::processes()]
            prompt_rewards = torch.stack([ref_rewards["train", p] for p in prompts])

            rollout, metrics = collect(policy, critic, task, prompts, prompt_rewards, args, generator)
            metrics |= update(policy, critic, counts, optimizer, rollout, args, generator)
            metrics["episode"] = (phase + 1) * args.rollouts

            if exact_world and is_milestone(phase, phases):
                exact = exact_world.report(f"π_θ, {metrics['episode']} ep.", exact_world.log_probs(policy))
                metrics |= exact
                result |= exact
            log_metrics(args, metrics)
            if args.save_every and (phase + 1) % args.save_every == 0 and phase + 1 < phases:
                save_checkpoint(args, task, phase + 1, optimizer, generator, updated)
            shown = [key for key in ("reward", "kl_to_ref", "kl_to_bon") if "objective/" + key in metrics]
            bar.set_postfix({key: f"{metrics['objective/' + key]:.2f}" for key in shown}, refresh=False)
            bar.update(args.rollouts)

    metrics, samples = test_metrics(task, *sample_policy(policy, task, args), ref_rewards, args)
    result |= metrics | {"episodes": phases * args.rollouts}
    return save_results(args, task, exact_world, result, samples, policy)


# ========== 6. Beyond Algorithm 1 ===========================================================================
# Ours: a critic that reads the unfinished text (--critic-every), a bias of the logits for each token
# (--token-step) and log F from a few samples (--estimator shared). results/README.md has what each gains.
# The paper's: log F smoothed for summarization (--estimator smooth).


def read_unfinished(task, prompts, rollout, ref_rewards, every):
    """What the reward model says of B texts as far as they go: u (B, T), of the text before the token, at
    every `every`-th token of a response; 0 at the others.

    It is the rank k of that reward among the prompt's M as a normal quantile, u = Φ⁻¹((k+½)/(M+1)): no scale
    enters. ref_rewards: (B, M).
    """
    tokens, M = token_lists(rollout), ref_rewards.shape[1]
    cuts = [(b, t) for b, ids in enumerate(tokens) for t in range(every, len(ids), every)]
    u = torch.zeros(rollout.mask.shape, dtype=torch.double)
    if cuts:
        rows, columns = torch.tensor(cuts).T
        texts = decode(task, [prompts[b] for b, _ in cuts], [tokens[b][:t] for b, t in cuts])
        scores = task.score([prompts[b] for b, _ in cuts], [text + task.end for text in texts])
        k = ranks(torch.tensor(scores, dtype=torch.double).unsqueeze(1), ref_rewards[rows]).squeeze(1)
        u[rows, columns] = torch.special.ndtri((k + 0.5) / (M + 1))
    return u


def fit_values(u, returns, mask, every, sums, decay=15 / 16):
    """V (B, T), without learning a network: of each block of `every` tokens a cubic in u, fitted to returns.

    The returns are those of earlier phases, as a baseline must not know what it is taken from; only a block
    that is new is fitted to its own. `sums` (blocks, 4, 5), updated in place, holds [XᵀX | Xᵀy] of X = 1, u,
    u², u³, each phase with `decay` times the weight of the next.
    """
    x = torch.stack([torch.ones_like(u), u, u ** 2, u ** 3], -1)[:, ::every]
    y = torch.cat([x, returns[:, ::every, None]], -1)
    seen = sum(gathered(torch.einsum("bki,bkj->kij", x * mask[:, ::every, None], y)))
    known = torch.where(sums[:, :1, :1] > 0, sums, seen)
    # Few responses reach the last blocks, where a free cubic would be wild.
    ridge = torch.diag(torch.tensor([0.01, 1.0, 4.0, 16.0], dtype=torch.double))
    fit = torch.linalg.solve(known[..., :4] + ridge, known[..., 4])
    sums.mul_(decay).add_(seen)
    values = torch.einsum("bki,ki->bk", x, fit).repeat_interleave(every, 1)[:, :u.shape[1]]
    return torch.where(mask, values, 0.0)


def block_earnings(rewards, values, mask, size):
    """What was earned in each token's block of `size` tokens: the rewards and the rise of the value. All
    (B, T). Less noisy than an advantage, which reaches further, and as right as the values are."""
    steps, _ = gae(rewards, values, mask, gamma=1.0, lam=0.0)
    T = steps.shape[1]
    blocks = nn.functional.pad(steps, (0, -T % size)).unflatten(1, (-1, size)).sum(2)
    return blocks.repeat_interleave(size, 1)[:, :T]


@torch.no_grad()
def step_token_bias(output, hidden, rollout, counts, share, kl_coef, prior=20, limit=0.005):
    """A step of the natural gradient for a bias of the logits, one number b_a for each token a.

    The gradient by b_a is the sum of what was earned where a was taken, its Fisher information the number of
    these places: b_a moves by a `share` of the quotient over kl_coef, which would be the whole step to the
    optimum. Plain gradients follow the frequent words, and pay more KL for the same reward. A word seen less
    than share·prior times in a phase moves less: it is noisy.

    counts (V,): the running mean of how often each token is drawn in a phase, zeros at first, updated in
    place. hidden (n, H): what the output layer is given. The bias goes into its weight, as b vᵀ with
    hidden·v ≈ 1: exactly so behind a LayerNorm, whose outputs lie in a plane.
    """
    tokens, earned = rollout.tokens[rollout.mask].cpu(), rollout.earned[rollout.mask].cpu().double()
    seen = [torch.bincount(tokens, weight, len(counts)) for weight in (earned, torch.ones_like(earned))]
    total, number = sum(gathered(torch.stack(seen)))
    counts.lerp_(number, share if counts.any() else 1.0)
    step = total / kl_coef / (counts / share + prior)
    # At a large N the first steps would run away. None moves the policy by more than `limit` nats a token.
    nats = 0.5 * (counts * step ** 2).sum() / counts.sum()
    step *= (limit / nats).sqrt().clamp(max=1.0)

    hidden = hidden.cpu().double()
    gram, mean = (sum(gathered(x)) for x in (hidden.T @ hidden, hidden.sum(0)))
    ridge = 1e-8 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.double)
    output.weight.add_(torch.outer(step, torch.linalg.solve(gram + ridge, mean)).to(output.weight))


def fit_log_F(ref_rewards):
    """The paper's smoothing of log F for summarization (§6): least squares of −a·exp(−b·r), a, b > 0.

    ref_rewards: (..., M), whose log F̂ is that of add_one. Returns a, b, each (...), float64. For a given b
    the best a has a closed form; b is taken from a grid, whose steps of 5 % are finer than the noise of F̂.
    Raises ValueError for M < 3 or a non-finite reward.
    """
    r = torch.as_tensor(ref_rewards, dtype=torch.double).sort(-1).values
    M = r.shape[-1]
    if M < 3 or not r.isfinite().all():
        raise ValueError("fit_log_F needs at least 3 finite reference rewards per prompt")
    log_F = torch.log((torch.searchsorted(r, r) + 1) / (M + 1)).unsqueeze(-2)
    # In units of the spread, and from 0 up so that no exponential overflows.
    spread = r.std(-1, keepdim=True)
    spread = torch.where(spread > 0, spread, 1.0)
    z = ((r - r[..., :1]) / spread).unsqueeze(-2)
    b = torch.linspace(-7, 7, 281, dtype=r.dtype, device=r.device).exp()
    e = torch.exp(-b.unsqueeze(-1) * z)  # (..., grid, M)
    a = -(log_F * e).sum(-1) / e.square().sum(-1)
    best = (log_F + a.unsqueeze(-1) * e).square().sum(-1).argmin(-1, keepdim=True)
    b = b[best] / spread
    a = a.gather(-1, best) * torch.exp(b * r[..., :1])
    if not a.isfinite().all():
        raise ValueError("a = exp(b·r) overflows, for the rewards lie far from 0: subtract their mean first")
    return a.squeeze(-1), b.squeeze(-1)


def shared_log_F(ref_rewards, features=None):
    """log F of P prompts, each from the samples of all: returns a function (rewards, prompt) -> log F̂, nats.

    All rewards are ranked together, and the ranks read as normal quantiles z. `location_scale` says where the
    z of a prompt lie and, from all prompts, how they spread: a guess G of its F that needs no sample of it.
    The k of its M samples that lie below y correct it: F̂ = (k + c·G)/(M + c) with c = 1 + κ/(1−G), so that G
    counts most in the tail. κ is what predicts either half of the samples best from the other: 0 (nearly
    `add_one`) where prompts are unlike.

    ref_rewards: P tensors (M_x,) of any lengths, 0 too. features: (P, K) that tell prompts apart. rewards:
    (n,). prompt: (n,), indices. On the CPU; only `ranks` enter. log F̂: (n,), float64, finite, monotone in
    the reward. Ours: the paper leaves it to future work (§5.1). Raises ValueError for a NaN, or no sample.
    """
    r = torch.cat([torch.as_tensor(r, dtype=torch.double) for r in ref_rewards])
    P, n, pool = len(ref_rewards), len(r), r.sort().values
    features = torch.zeros(P, 0) if features is None else torch.as_tensor(features)
    if n == 0 or r.isnan().any() or features.isnan().any():
        raise ValueError("shared_log_F needs a sample of at least one prompt, and no NaN")
    owner = torch.arange(P).repeat_interleave(torch.tensor([len(r) for r in ref_rewards]))
    below, not_above = (torch.searchsorted(pool, r, right=right) for right in (False, True))

    def quantile(rank, of):
        return torch.special.ndtri((rank.double() + 0.5) / of)
    half, u = torch.rand(2, n, generator=torch.Generator().manual_seed(0)).double()
    z = quantile(below + u * (not_above - below - 1), n + 1)  # ties are spread at random over their ranks
    columns = features.double().T.contiguous()
    s = quantile(ranks(columns, columns) - 0.5, P).T
    X = torch.cat([torch.ones(P, 1).double(), s, s ** 2 - 1], 1)

    def fit(used):
        """From the samples that are used: a function (below, prompt) -> k, M, 1 − G."""
        M, mu, sigma, e = location_scale(z[used], owner[used], X)
        keys = (owner[used] * (n + 1) + below[used]).sort().values  # those of a prompt together, ascending

        def look_up(below, prompt):
            first = prompt * (n + 1)
            k = torch.searchsorted(keys, first + below) - torch.searchsorted(keys, first)
            less = torch.searchsorted(e, (quantile(below, n + 1) - mu[prompt]) / sigma[prompt])
            return k, M[prompt], 1 - (less.double() + 0.5) / (len(e) + 1)
        return look_up

    def share_above(k, M, above, kappa):  # 1 − F̂; so written it is monotone even after rounding
        return (M - k + above + kappa) / (M + 1 + kappa / above)
    half, losses = half < 0.5, {}
    for held in (half, ~half):
        k, size, _ = fit(held)(below[held], owner[held])
        known = fit(~held)(below[held], owner[held])
        # Each held-out sample is a threshold, and a share y of the others of its prompt is not below it. The
        # weights make up for there being fewer thresholds in the tail.
        y, weight = (size - k - 1) / (size - 1).clamp(min=1), (size > 1) / (1 - (k + 0.5) / size)
        for kappa in (1e6, 256, 64, 16, 4, 1, 0.25, 0):
            S = share_above(*known, kappa)
            log_loss = -(y * S.log() + (1 - y) * torch.log1p(-S))
            losses[kappa] = losses.get(kappa, 0) + (weight * log_loss).sum().item()
    kappa, look_up = min(losses, key=losses.get), fit(torch.ones_like(half))

    def log_F(rewards, prompt):
        below = torch.searchsorted(pool, torch.as_tensor(rewards, dtype=torch.double))
        return torch.log1p(-share_above(*look_up(below, prompt), kappa))
    return log_F


def location_scale(z, prompt, X):
    """Fits z = μ_x + σ_x·e, e alike for all P prompts x, to n samples: z (n,), prompt (n,) their prompts.

    μ_x ~ Normal(X_x·b, τ²), X (P, K): the mean of M samples is shrunk towards X_x·b, the more the fewer there
    are; b and τ² by EM. σ_x² is shrunk towards the common variance as if by 16 samples, and widened by the
    error of μ_x. Returns M, μ, σ, each (P,), and the residuals e (n,), ascending, of mean square 1.
    """
    def total(values):
        return torch.bincount(prompt, values, len(X)).double()
    M, tau2 = total(torch.ones_like(z)), 1.0
    mean, freedom = total(z) / M.clamp(min=1), (M - 1).clamp(min=0)
    squares = total((z - mean[prompt]) ** 2)
    common = (1 + squares.sum()) / (1 + freedom.sum())  # normal quantiles have variance 1
    variance = (16 * common + squares) / (16 + freedom)
    ridge = 1e-6 * torch.eye(X.shape[1], dtype=torch.double)
    for _ in range(100):
        weight = 1 / (variance / M + tau2)  # 0 without samples
        WX = weight.unsqueeze(1) * X
        prior = X @ torch.linalg.solve(X.T @ WX + ridge, WX.T @ mean)
        mu, error = prior + tau2 * weight * (mean - prior), tau2 * (1 - tau2 * weight)
        tau2 = ((M > 0) * ((mu - prior) ** 2 + error)).sum() / (M > 0).sum().clamp(min=1)
        tau2 = tau2.clamp(min=1e-6)
    sigma = (variance + error).sqrt()
    e = ((z - mu[prompt]) / sigma[prompt]).sort().values
    return M, mu, sigma, e / e.square().mean().sqrt().clamp(min=1e-6)


# ========== 7. The test of a policy =========================================================================


def kl_to_bon(kl_to_ref, mean_log_F, N):
    """KL(π_θ ‖ π_bon) in nats, from KL(π_θ ‖ π_ref) and E_{π_θ}[log F], below 0.

    For real responses p vanishes beside F, and log π_bon = log π_ref + log N + (N−1) log F.
    """
    return kl_to_ref - math.log(N) - (N - 1) * mean_log_F


def effective_N(mean_log_F):
    """The N of the Best-of-N nearest to a policy with E_{π_θ}[log F] = mean_log_F, below 0, in nats.

    There the derivative of `kl_to_bon` by N, −1/N − E[log F], is zero. It is 1 for π_ref, less for a worse
    policy.
    """
    return -1 / mean_log_F


def excess_kl(kl_to_ref, mean_log_F):
    """KL(π_θ ‖ π_bon) to the nearest Best-of-N, in nats: `kl_to_bon` where N is `effective_N`.

    As E[log F] is −1/N there, it is KL(π_θ ‖ π_ref) less `bon_kl(N)`. An estimate may be negative.
    """
    return kl_to_ref - bon_kl(effective_N(mean_log_F))


def ranks(rewards, ref_rewards):
    """How many of a prompt's M samples lie below each of R responses to it, a tie counting half: rewards
    (..., R), ref_rewards (..., M) -> (..., R), float64."""
    ref_rewards = ref_rewards.sort(-1).values
    below = torch.searchsorted(ref_rewards, rewards)
    return (below + torch.searchsorted(ref_rewards, rewards, right=True)).double() / 2


def posterior_log_F(k, M, a=1):
    """E[log F(y) | k of M samples of π_ref lie below y] = ψ(k+a) − ψ(M+a+1), for y drawn by Best-of-a.

    a = 1 is π_ref. F ~ Beta(a, 1), and F | k ~ Beta(k+a, M−k+1). k: (...), float64. Returns (...), nats.
    """
    return torch.digamma(k + a) - torch.digamma(torch.full_like(k, M + a + 1))


def policy_log_F(k, M):
    """log F̂ of a policy's responses, to judge it by their mean: k (...) of `ranks` among M -> (...), nats.

    `estimate_log_F` takes a response for one of π_ref, and so draws the mean of a better policy down by 1/M.
    Here it is `posterior_log_F` with the a that is the `effective_N` of the mean it gives, 10 M at most:
    right for every Best-of-N, near enough for what lies between. Ties bias it: if a fifth of the rewards are
    one value, π_ref has an effective N of 1.07.
    """
    a = 1.0
    for _ in range(200):
        log_F = posterior_log_F(k, M, a)
        a = effective_N(log_F.mean()).clamp(0.1, 10 * M)
    # A response that is better moves a too: stretched so, the responses have the standard error of the mean.
    slope = a ** 2 * (torch.polygamma(1, k + a) - torch.polygamma(1, torch.full_like(k, M + a + 1))).mean()
    return log_F.mean() + (log_F - log_F.mean()) / (1 - slope)


@torch.no_grad()
def sample_policy(policy, task, args):
    """test_responses of π_θ to each of P test prompts, prompt by prompt, as texts, and KL(π_θ ‖ π_ref) along
    each in nats: two lists."""
    generator, R = torch.Generator(args.device).manual_seed(args.seed), args.test_responses
    at_once, responses, kls = max(1, args.rollouts // R), [], []
    for start in tqdm(range(0, len(task.test_prompts), at_once), desc="test", leave=False):
        prompts = task.test_prompts[start:start + at_once]
        uniforms = torch.rand(len(prompts) * R, args.max_new_tokens, generator=generator, device=args.device)
        with autocast(args):
            drawn = generate(policy, [task.encode(p) for p in prompts], uniforms, task.tokenizer.eos_token_id,
                             args.temperature, K=args.unfrozen_layers)
            for rows in torch.arange(len(uniforms), device=args.device).split(args.minibatch):
                kls += response_kls(policy, task.ref, drawn[rows], args).tolist()
        responses += decode(task, [p for p in prompts for _ in range(R)], token_lists(drawn))
    return responses, kls


def response_kls(policy, ref, batch, args):
    """KL(π_θ ‖ π_ref) of the next token, summed over the tokens of each response: (B,), nats. It has far
    less variance than the log-ratio of the tokens."""
    def next_token(lm):  # log π of every word at every token, (B, T, V)
        logits = forward(lm, batch.input_ids, batch.attention_mask, batch.tokens.shape[1], None,
                         args.unfrozen_layers, batch.trunk)[0]
        return at_temperature(logits, args.temperature).log_softmax(-1)
    log_pi, log_ref = next_token(policy), next_token(ref)
    kl = torch.sum(log_pi.exp() * (log_pi - log_ref), -1)
    return torch.where(batch.mask, kl, 0.0).sum(1)


def distance_to_bon(kls, k, M, N):
    """Where a policy lies among all Best-of-N, by the KL to π_ref and the rank of each response, both (...).
    Each metric is the mean of what is returned for it, and its standard error is theirs, to first order."""
    log_F = policy_log_F(k, M)
    a = effective_N(log_F.mean()).item()
    # The excess has its minimum at a, so that a's own error does not count.
    return {"log_f": log_F, "effective_N": a + a ** 2 * (log_F - log_F.mean()),
            "excess_kl": kl_to_bon(kls, log_F, a), "kl_to_bon": kl_to_bon(kls, log_F, N)}


def rollout_metrics(rollout, kls, scores, ref_rewards, N):
    """What a rollout says of policy and critic. kls (B,): log π_θ − log π_ref of the responses, nats."""
    mask, returns, M = rollout.mask, rollout.returns, ref_rewards.shape[1]
    unexplained = masked_mean((returns - rollout.values) ** 2, mask)
    spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask).clamp(min=1e-12)
    metrics = {
        "objective/kl_to_ref": kls.mean().item(),
        "objective/entropy": -rollout.log_probs.sum(1).mean().item(),
        "objective/length": mask.sum(1).float().mean().item(),
        "ppo/explained_variance": 1 - (unexplained / spread).item(),
    }
    if M > 0:  # rlhf draws no samples, unless for its critic
        k = ranks(scores.unsqueeze(1), ref_rewards).squeeze(1)
        distance = distance_to_bon(kls, k, M, N)
        metrics |= {f"objective/{name}": x.mean().item() for name, x in distance.items()}
    return metrics


def test_metrics(task, responses, kls, ref_rewards, args):
    """Means and standard errors over test prompts of what `sample_policy` returned: reward, win rate against
    π_ref's samples (a tie counts half), KL, distance from Best-of-N; "in/" and "out/", on tldr's subreddits
    of training and on others. And the samples, a dict each."""
    prompts, P = task.test_prompts, len(task.test_prompts)
    repeated = [p for p in prompts for _ in range(len(responses) // P)]
    rewards = task.score(repeated, responses)
    ref = torch.stack([ref_rewards["test", p] for p in prompts])  # (P, test_M)
    M = ref.shape[1]
    kl, scores = (torch.tensor(x, dtype=torch.double).view(P, -1) for x in (kls, rewards))
    k = ranks(scores, ref)
    known, metrics = [in_distribution(p) for p in prompts], {}
    parts = {"": [True] * P, "in/": [x is True for x in known], "out/": [x is False for x in known]}
    for part, rows in parts.items():
        rows = torch.tensor(rows)
        if rows.any():
            columns = {"reward": scores[rows], "win_rate": k[rows] / M, "kl_to_ref": kl[rows],
                       **distance_to_bon(kl[rows], k[rows], M, args.N), "ref/reward": ref[rows]}
            for name, x in columns.items():
                y = x.mean(1)
                metrics[part + name] = y.mean().item()
                metrics[part + name + "_se"] = (y.std() / math.sqrt(len(y))).item() if len(y) > 1 else None
    means = ref.mean(1).repeat_interleave(scores.shape[1]).tolist()
    keys = ("prompt", "response", "reward", "kl_to_ref", "ref_reward")
    return metrics, [dict(zip(keys, row)) for row in zip(repeated, responses, rewards, kls, means)]


# ========== 8. The toy: a world small enough to be known exactly ============================================
# A tiny GPT-2 learns to finish "the acting was" with a verdict such as "very superb ." or "slow but moving ."
# The full stop is EOS. With 18 words and at most 4 tokens there are 111 151 possible responses to each
# prompt, so that every distance between distributions is known exactly. Training sees the M samples only.


@dataclass
class Task:
    ref: nn.Module           # π_ref, a causal language model
    tokenizer: object
    score: Callable          # (prompts, responses), two lists of B texts -> B floats
    encode: Callable         # a prompt's text -> its token ids
    train_prompts: list      # texts; may repeat
    test_prompts: list
    ref_id: str              # what identifies π_ref, and the reward, in the samples' header
    reward_id: str
    end: str = ""            # what marks the text of a response that EOS ended, if the reward must see it
    other_prompts: tuple = ()   # not trained on: the samples to them are all there are if --M is 0


KINDNESS = {"acting": 0.5, "music": 0.2, "plot": -0.1, "ending": -0.4}  # how kind critics are to it
WARMTH = {"superb": 2.13, "moving": 1.47, "funny": 1.02, "clever": 0.71,
          "odd": -0.29, "slow": -0.83, "dull": -1.36, "awful": -2.19}
TOY_WORDS = ["the", "was", *KINDNESS, "very", "not", "and", "but", *WARMTH]


def warmth(verdict):
    """The toy's reward. 'very' strengthens and 'not' turns the adjective after it, what stands before a
    'but' counts half, the last word lingers, and any other word is babble."""
    score, strength, adjectives = 0.0, 1.0, 0
    for word in verdict.split():
        if word in WARMTH:
            score += strength * WARMTH[word] * (1 + 0.1 * adjectives)
            strength, adjectives = 1.0, adjectives + 1
        elif word in ("very", "not"):
            strength *= 1.5 if word == "very" else -0.6
        elif word == "but":
            score *= 0.5
        elif word != "and":
            score -= 0.1
    return score


def write_verdict(noun, rng):
    """One verdict of the training corpus of π_ref."""
    def adjective():
        return rng.choices(list(WARMTH), [math.exp(KINDNESS[noun] * w) for w in WARMTH.values()])[0]
    pattern = rng.random()
    if pattern < 0.3:
        return adjective()
    if pattern < 0.6:
        return rng.choice(["very", "not"]) + " " + adjective()
    first, second = adjective(), adjective()
    return first + (" and " if WARMTH[first] * WARMTH[second] > 0 else " but ") + second


@cache
def toy_reference(data_seed):
    """The toy's π_ref and its tokenizer: a tiny GPT-2, trained in a few seconds, once per process. It is
    trained on the CPU, so that runs on a GPU have the same one and share the samples."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    eos, steps = len(TOY_WORDS), 200
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(TOY_WORDS + ["."])}, unk_token="."))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=".")
    torch.manual_seed(data_seed)
    lm = GPT2LMHeadModel(GPT2Config(
        vocab_size=eos + 1, n_positions=16, n_embd=64, n_layer=2, n_head=2, bos_token_id=eos,
        eos_token_id=eos, activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    rng = random.Random(data_seed)
    corpus = [f"the {noun} was {write_verdict(noun, rng)} ." for noun in KINDNESS for _ in range(5000)]
    ids, mask = pad(tokenizer(corpus)["input_ids"], eos, "right")
    labels = ids.masked_fill(~mask, -100)
    labels[:, :3] = -100  # the prompt is given
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for rows in torch.randint(len(corpus), (steps, 256)):
        loss = lm(input_ids=ids[rows], attention_mask=mask[rows].long(), labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lm.eval(), tokenizer


def toy_task(args):
    """π_ref, warmth as the reward, and one prompt for each noun."""
    lm, tokenizer = toy_reference(args.data_seed)
    lm = copy.deepcopy(lm).to(args.device)
    prompts = [f"the {noun} was" for noun in KINDNESS]
    test_prompts = list(itertools.islice(itertools.cycle(prompts), args.test_prompts))
    return Task(lm, tokenizer, lambda _, responses: [warmth(r) for r in responses], cache(tokenizer.encode),
                prompts, test_prompts, identity(lm, tokenizer), "warmth")


class ExactWorld:
    """What only the toy can know, of P prompts and all S responses: log π_ref, log F, log π_bon, each
    (P, S) float64 nats, and the rewards (S,)."""

    def __init__(self, task, args, ref_rewards=None):
        self.args, self.prompts = args, task.train_prompts
        self.prompt_ids = [task.encode(p) for p in self.prompts]
        # Those of 0, 1, … words that EOS ended, then those cut off at the limit.
        self.responses = [" ".join(words) for length in range(args.max_new_tokens + 1)
                          for words in itertools.product(TOY_WORDS, repeat=length)]
        self.rewards = torch.tensor(task.score(None, self.responses), dtype=torch.double)
        self.log_ref = self.log_probs(task.ref)
        # Ties are broken by the place in the enumeration, a total order (App. C).
        ascending = self.rewards.argsort(stable=True)
        mass = self.log_ref.exp()[:, ascending]
        F = torch.empty_like(mass).index_copy_(1, ascending, mass.cumsum(1) - mass)
        self.log_F = F.clamp(min=0).log()
        self.log_bon = log_bon_pmf(self.log_F, self.log_ref, args.N)
        # What training starts from and, on these samples of π_ref, aims at.
        tqdm.write(f"toy: all {len(self.responses):,} responses to each prompt enumerated\n\n"
                   "  exact, in nats        KL(· ‖ π_bon) KL(· ‖ π_ref)  reward   win rate")
        self.report("π_ref", self.log_ref)
        self.report(f"π_bon, N = {args.N}", self.log_bon)
        aim = self.report("what training aims at", self.optimum(ref_rewards)) if ref_rewards else {}
        self.aim = {f"{name}_of_optimum": x for name, x in aim.items() if name == "exact/kl_to_bon"}

    @torch.no_grad()
    def log_probs(self, lm):
        """log π(y) of every response to every prompt, (P, S)."""
        W, rows = len(TOY_WORDS), []
        for prompt in self.prompt_ids:
            # After t words EOS, the token W, ends a response, or one of W words extends it.
            ids, log_p, ended = torch.tensor([prompt]), torch.zeros(1, dtype=torch.double), []
            for _ in range(self.args.max_new_tokens):
                logits = lm(input_ids=ids.to(self.args.device), logits_to_keep=1).logits[:, 0].float()
                step = at_temperature(logits, self.args.temperature).log_softmax(-1).cpu().double()
                step += log_p.unsqueeze(1)
                ended.append(step[:, W])
                log_p = step[:, :W].flatten()
                words = torch.arange(W).repeat(len(ids)).unsqueeze(1)
                ids = torch.cat([ids.repeat_interleave(W, 0), words], 1)
            rows.append(torch.cat([*ended, log_p]))
        return torch.stack(rows)

    def metrics(self, log_pi):
        """Exact distances, reward and win rate of log_pi (P, S), means over prompts."""
        pi, ref = log_pi.exp(), self.log_ref.exp()

        def kl(log_q):  # 0 log 0 = 0
            return torch.where(pi == 0, 0.0, pi * (log_pi - log_q)).sum(1).mean().item()
        beaten = self.log_F.exp() + ref / 2  # a tie counts half
        log_f, kl_to_ref = (pi * beaten.log()).sum(1).mean().item(), kl(self.log_ref)
        return {"exact/kl_to_bon": kl(self.log_bon), "exact/kl_to_ref": kl_to_ref,
                "exact/effective_N": effective_N(log_f), "exact/excess_kl": excess_kl(kl_to_ref, log_f),
                "exact/reward": (pi * self.rewards).sum(1).mean().item(),
                "exact/win_rate": (pi * beaten).sum(1).mean().item()}

    def optimum(self, ref_rewards):
        """log π* (P, S) of perfect training on the M samples' F̂: π* ∝ π_ref·exp(reward/kl_coef)."""
        log_F = [log_F_of(self.rewards, ref_rewards["train", p], self.args) for p in self.prompts]
        reward = terminal_reward(self.rewards, torch.stack(log_F), self.log_ref, self.args)
        return (self.log_ref + reward / max(self.args.kl_coef, 1e-9)).log_softmax(1)

    def report(self, name, log_pi):
        """Shows the exact metrics of log_pi (P, S) above the progress bar, and returns them."""
        exact = self.metrics(log_pi)
        tqdm.write(f"  {name:<22}{exact['exact/kl_to_bon']:>12.4f}{exact['exact/kl_to_ref']:>12.4f}"
                   f"{exact['exact/reward']:>10.3f}{100 * exact['exact/win_rate']:>10.1f} %")
        return exact


# ========== 9. imdb, tldr, and your own models and prompts ==================================================


def text_task(args):
    """π_ref, a classifier of texts as the reward, and prompts, of imdb, tldr or your own (§5, §6)."""
    from transformers import AutoModelForCausalLM
    ref, tokenizer = load("ref", AutoModelForCausalLM, args.ref, args.device)
    eos = tokenizer.eos_token_id
    need(eos is not None, f"the tokenizer of --ref {args.ref} has no EOS token to end a response")
    check_sampler(ref, eos, args)
    end = "" if args.no_eos_reward is None else tokenizer.eos_token
    score, reward_id = load_reward(args.reward, args.device, end, args.no_eos_reward)

    @cache
    def encode(prompt):
        ids = tokenizer.encode(prompt)
        return ids[:-1] if ids[-1:] == [eos] else ids  # a prompt that has ended gets no response
    room = (getattr(ref.config, "max_position_embeddings", None) or math.inf) - args.max_new_tokens
    train, test, others = read_prompts(args, tokenizer, min(512, room))
    for prompt in train + test + others:
        length = len(encode(prompt))
        need(0 < length <= room, f"a prompt has {length} tokens; 1 to {room} leave --ref room for the "
             f"{args.max_new_tokens} of a response (--max-new-tokens): {prompt[:60]!r}")
    return Task(ref, tokenizer, score, encode, train, test, identity(ref, tokenizer), reward_id, end, others)


def token_lists(rollout):
    """The responses as B lists of token ids, EOS included."""
    return [row[:n] for row, n in zip(rollout.tokens.tolist(), rollout.mask.sum(1).tolist())]


def decode(task, prompts, responses):
    """Token ids of responses as texts, just as they follow the prompt: some tokenizers drop a leading space
    otherwise. EOS leaves no trace but task.end."""
    def text(ids):
        return task.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    lengths, texts = {p: len(text(task.encode(p))) for p in set(prompts)}, []
    for prompt, ids in zip(prompts, responses):
        end = task.end if ids[-1:] == [task.tokenizer.eos_token_id] else ""
        texts.append(text(task.encode(prompt) + ids)[lengths[prompt]:] + end)
    return texts


def load(what, loader, name, device):
    """The model and the tokenizer of a hub name or folder."""
    from transformers import AutoTokenizer
    with reading(f"cannot load --{what} {name} (hub name or folder: config.json, tokenizer.json, weights)"):
        model, info = loader.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    # The library makes up what is missing: weights at random, a tokenizer without words.
    missing = ", ".join(sorted(info["missing_keys"])[:4])
    need(not missing, f"--{what} {name} lacks the weights {missing}: it is no {loader.__name__[9:]} model")
    words, embeddings = tokenizer.get_vocab(), len(model.get_input_embeddings().weight)
    fits = len(words) > len(tokenizer.all_special_tokens) and max(words.values()) < embeddings
    need(fits, f"--{what} {name}: its tokenizer of {len(words)} tokens does not go with its {embeddings} "
         "embeddings, is tokenizer.json missing?")
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "NewGELUActivation":  # GPT-2's GELU: the same in one pass over memory
            model.set_submodule(path, nn.GELU("tanh"))
    return model.to(device).eval(), tokenizer


@torch.no_grad()
def check_sampler(lm, eos, args):
    """Refuses a model for which padded, cached decoding, or the shared trunk, gives other log-probs than a
    plain pass: a recurrent one takes padding into its state."""
    problem = f"--ref {args.ref}: this script cannot sample from a {type(lm).__name__}"
    prompts, uniforms = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 3]], torch.linspace(0.1, 0.9, 16).view(4, 4)
    with reading(problem):
        rollout = generate(lm, prompts, uniforms.to(args.device), eos, 1.0, K=args.unfrozen_layers)
        on_trunk = response_log_probs(lm, rollout, 1.0, args.unfrozen_layers)[0]
        for i, response in enumerate(token_lists(rollout)):
            n, ids = len(response), torch.tensor([prompts[i // 2] + response], device=args.device)
            plain = token_log_probs(lm(input_ids=ids).logits[:, -n - 1:-1].float(), ids[:, -n:])[0]
            # torch's max, unlike Python's, keeps a NaN.
            error = (torch.stack([rollout.log_probs[i, :n], on_trunk[i, :n]]) - plain).abs().max().item()
            need(error < 0.02, f"{problem}: its log-probs would be off by {error:.2g} nats; is that so with "
                 "--unfrozen-layers -1?")


def load_reward(name, device, end="", without_end=None):
    """A classifier's logit, or the probability of the positive of its two labels, as a function (prompts,
    responses) -> rewards, and what identifies it. Without `end` at its end a response earns `without_end`."""
    from transformers import AutoModelForSequenceClassification
    model, tokenizer = load("reward", AutoModelForSequenceClassification, name, device)
    labels = {str(label).upper()[:3]: i for i, label in model.config.id2label.items()}
    need(len(labels) in (1, 2), f"--reward {name} has {len(labels)} labels; a reward has 1 logit or 2 labels")
    positive = labels.get("POS", 1)
    if len(labels) == 2:
        print(f"reward: the probability of the label {model.config.id2label[positive]!r}")
    reward_id = identity(model, tokenizer) + (f", {without_end} without {end}" if end else "")
    if tokenizer.pad_token is None:
        # A causal classifier reads its logit off the last token that is not padding: EOS, if there is `end`.
        not_eos = tokenizer.convert_ids_to_tokens(int(tokenizer.eos_token_id == 0))
        tokenizer.pad_token = not_eos if end or tokenizer.eos_token is None else tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.truncation_side = "left"  # of a text that is too long the end counts: the response
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))

    @torch.no_grad()
    def score(prompts, responses):
        rewards = torch.full((len(responses),), without_end or 0.0)
        texts = {i: p + y for i, (p, y) in enumerate(zip(prompts, responses)) if y.endswith(end)}
        by_length = sorted(texts, key=lambda i: len(texts[i]))  # similar lengths together: little padding
        for start in range(0, len(by_length), 128):
            rows = by_length[start:start + 128]
            inputs = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True, truncation=True,
                               max_length=longest)
            logits = model(**inputs.to(device)).logits.float().cpu()
            rewards[rows] = logits[:, 0] if len(labels) == 1 else logits.softmax(-1)[:, positive]
        for prompt, response, reward in zip(prompts, responses, rewards.tolist()):
            need(math.isfinite(reward), f"--reward {name}: it is {reward} for {prompt!r} and {response!r}")
        return rewards.tolist()
    return score, reward_id


def identity(model, tokenizer):
    """A short hash of all that a model computes with: weights, configuration and tokenizer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = {k: v for k, v in model.config.to_dict().items() if k[0] != "_" and k != "transformers_version"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend else sorted(tokenizer.get_vocab().items())
    rest = [config, words, tokenizer.special_tokens_map, tokenizer.model_max_length]
    digest.update(json.dumps(rest, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def in_distribution(prompt):
    """Whether a tldr prompt is from the subreddits of training; None if it names no subreddit."""
    if not prompt.startswith("SUBREDDIT: r/"):
        return None
    return prompt.startswith(("SUBREDDIT: r/relationships\n", "SUBREDDIT: r/relationship_advice\n"))


def read_prompts(args, tokenizer, longest):
    """--dataset's training and test prompts, shuffled, and where --M is 0 others of the training split.
    Without a test split a tenth is held out."""
    import datasets
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are told below, in one line
    is_file = args.dataset.endswith((".jsonl", ".json"))
    kind, files = ("json", args.dataset) if is_file else (args.dataset, None)
    with reading(f"cannot load the train split of --dataset {args.dataset} (hub name, .jsonl file, or folder "
                 "of such files)"):
        splits = datasets.load_dataset(kind, data_files=files)
        tenth = max(1, len(splits["train"]) // 10)
        if "test" not in splits:
            splits = splits["train"].train_test_split(tenth, shuffle=False)
    rng = random.Random(args.data_seed)

    def draw(split, number, related=None):
        """`number` prompts; of tldr's, those that are, or are not, from the subreddits of training."""
        rows = splits[split]
        shuffled_rows = rng.sample(range(len(rows)), len(rows))
        made = (make_prompt(rows[i], tokenizer, longest, rng) for i in shuffled_rows)
        fitting = (p for p in made if p is not None and related in (None, in_distribution(p)))
        prompts = list(itertools.islice(fitting, number))
        need(prompts or number == 0, f"--dataset {args.dataset} has no prompt for --task {args.task} in its "
             f"{split} split")
        return prompts
    related = True if args.task == "tldr" else None
    half = args.test_prompts // 2 if related else 0
    train, test = draw("train", args.train_prompts, related), draw("test", args.test_prompts - half, related)
    if half:
        test += draw("test", half, False)
    return train, test, draw("train", 0 if args.M else OTHERS[0], related)


def make_prompt(row, tokenizer, longest, rng):
    """The prompt of a row: its `prompt`; a Reddit post to be summarized; or 2 to 8 tokens of its `text`.
    None where these tokens make no faithful prompt."""
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    if "post" in row:
        # OpenAI's format. The post loses its last paragraphs, or words, to fit `longest`.
        head, tail = f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: ", "\n\nTL;DR:"
        post = row["post"].strip()
        while post and len(tokenizer.encode(head + post + tail)) > longest:
            post = post.rpartition("\n")[0].rstrip() or post.rpartition(" ")[0].rstrip()
        return head + post + tail
    need(isinstance(row.get("text"), str), "--dataset: a row needs a `prompt` or a `text`, a string; one has "
         f"only {', '.join(row)}")
    ids = tokenizer(row["text"][:200], add_special_tokens=False)["input_ids"][:rng.randint(2, 8)]
    prompt = tokenizer.decode(ids)
    # A cut through a character, or one that the tokenizer would merge otherwise, is no faithful prompt.
    return prompt if tokenizer(prompt, add_special_tokens=False)["input_ids"] == ids else None


# ========== 10. π_ref's samples: drawn once, stored, resumed ================================================

OTHERS = 256, 32  # with --M 0, log F is learned from this number of prompts, and of samples to each


def reference_samples(task, args, keep_tokens=False):
    """The rewards of M samples of π_ref to every training prompt, and of test_M to every test prompt.

    Returns {(split, prompt): (M,) float64, ascending}; with keep_tokens {(split, prompt): (rewards as drawn,
    lists of token ids, EOS included)}. What is not stored yet is drawn and stored. A prompt's samples depend
    on --data-seed, the split and the prompt alone. With --estimator shared see `share_samples`.
    """
    needs_F = args.objective != "rlhf" or args.critic_every  # to train on
    share = args.estimator == "shared" and needs_F and not keep_tokens and task.train_prompts
    wanted = {("train", p): args.M if needs_F else 0 for p in task.train_prompts}
    if share:
        wanted |= {("train", p): OTHERS[1] for p in task.other_prompts}
        wanted |= {("empty", p): 1 for _, p in wanted}  # the empty response: its reward is that of the prompt
    wanted |= {("test", p): args.test_M for p in task.test_prompts}
    folder, columns = samples_folder(task, args), ("rewards", "tokens") if keep_tokens else ("rewards",)
    samples = read_samples(folder, columns)
    if draw_missing(task, args, wanted, samples, folder):
        samples = read_samples(folder, columns)
    found = {key: torch.tensor(samples[key]["rewards"][:M], dtype=torch.double) for key, M in wanted.items()}
    if keep_tokens:
        return {key: (rewards, samples[key]["tokens"][:len(rewards)]) for key, rewards in found.items()}
    found = {key: rewards.sort().values for key, rewards in found.items()}
    return share_samples(found) if share else found


def share_samples(ref_rewards, Q=1000):
    """Replaces the rewards of each training prompt by Q quantiles of the F̂ that `shared_log_F` finds for it,
    to rank others among. The feature is the reward of the bare prompt. M may be 0."""
    prompts = [prompt for split, prompt in ref_rewards if split == "train"]
    samples, bare = ([ref_rewards[split, p] for p in prompts] for split in ("train", "empty"))
    log_F, pool = shared_log_F(samples, torch.stack(bare)), torch.cat(samples).sort().values
    # F̂ is a step function, which rises at rewards of the pool.
    grid = pool[torch.linspace(0, len(pool) - 1, 4 * Q, dtype=torch.double).round().long()]
    levels = torch.log((torch.arange(1, Q + 1).double() + 0.5) / (Q + 1))  # between those of add_one
    shared = {}
    for i, prompt in enumerate(prompts):
        found = log_F(grid, torch.full(grid.shape, i))
        shared["train", prompt] = grid[(torch.searchsorted(found, levels) - 1).clamp(min=0)]
    return ref_rewards | shared


def samples_folder(task, args):
    """Where the samples are stored. Its name is a hash of all that they depend on, which header.json tells:
    other models or settings have another folder."""
    header = {"ref": task.ref_id, "reward": task.reward_id, "temperature": args.temperature,
              "max_new_tokens": args.max_new_tokens, "dtype": args.dtype, "backend": args.backend,
              "data_seed": args.data_seed}
    text = json.dumps(header, indent=2) + "\n"
    folder = f"{args.samples}/{args.task}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    write_whole(f"{folder}/header.json", text)
    return folder


def read_samples(folder, columns=("rewards",)):
    """{(split, prompt): {column: the samples in order}} of a folder. Raises UserError for a damaged file."""
    samples = collections.defaultdict(lambda: {name: [] for name in columns})
    for path in sorted(Path(folder).glob("*-*.json")):
        with reading(f"{path} is damaged, remove it"):
            batch = json.loads(path.read_text("utf-8"))
            for prompt, *drawn in zip(batch["prompts"], *(batch[name] for name in columns), strict=True):
                known = samples[batch["split"], prompt]
                # Two runs at once may have drawn the same samples.
                new = len(known[columns[0]]) - batch["start"]
                for name, x in zip(columns, drawn):
                    known[name] += x[new:] if new >= 0 else []
    return samples


def draw_missing(task, args, wanted, samples, folder):
    """Draws and scores what is missing, and stores each batch whole: what a killed run lacks is drawn as it
    would have been, for rounding differs between shapes. Returns whether anything was missing."""
    have, order = {key: len(samples[key]["rewards"]) for key in wanted}, ("train", "test", "empty").index
    missing = sorted((key for key in wanted if have[key] < wanted[key]),
                     key=lambda key: (order(key[0]), have[key], len(task.encode(key[1])), key))
    if not missing:
        print(f"π_ref's samples: read from {folder}")
        return False
    by_vllm, batches = args.backend == "vllm", []
    for (split, start), keys in itertools.groupby(missing, lambda key: (key[0], have[key])):
        prompts = [prompt for _, prompt in keys]
        M = wanted[split, prompts[0]]
        at_once = max(1, (16_384 if by_vllm else args.sample_batch) // M)
        batches += [(split, prompts[i:i + at_once], start, M) for i in range(0, len(prompts), at_once)]
    total = sum(len(prompts) * (M - start) for _, prompts, start, M in batches)
    print(f"π_ref's samples: {total:,} responses, drawn by {'vLLM' if by_vllm else 'this script'}; a smaller "
          "--M or --train-prompts takes fewer")
    by_hand = functools.partial(sample_by_hand, task, args)
    sampler = vllm_sampler(task, args) if by_vllm else nullcontext(by_hand)
    with sampler as sample, tqdm(total=total, desc=f"π_ref's samples -> {folder}") as bar:
        for i in range(0, len(batches), processes()):  # of several processes each draws a batch
            mine = batches[i + rank():i + rank() + 1]
            for batch in filter(None, gathered(draw_batch(task, args, sample, *mine[0]) if mine else None)):
                name = hashlib.sha256(json.dumps(batch["tokens"]).encode()).hexdigest()[:12]
                write_whole(f"{folder}/{batch['split']}-{batch['start']:06}-{name}.json",
                            json.dumps(batch, ensure_ascii=False))
                bar.update(sum(map(len, batch["rewards"])))
    gathered(None)  # the last batch is written
    return True


def draw_batch(task, args, sample, split, prompts, start, M):
    """Responses number start … M−1 to each of the prompts, scored: what a file of the folder holds."""
    ids, n = [task.encode(p) for p in prompts], M - start
    hashes = [hashlib.sha256(f"{args.data_seed} {split} {p}".encode()).digest() for p in prompts]
    seeds = [int.from_bytes(digest[:8], "big") for digest in hashes]
    empty = [[task.tokenizer.eos_token_id]] * len(prompts)
    tokens = empty if split == "empty" else sample(ids, seeds, start, M)
    copies = [p for p in prompts for _ in range(n)]
    responses = decode(task, copies, tokens)
    columns = {"rewards": task.score(copies, responses), "responses": responses, "tokens": tokens}
    by_prompt = {name: [x[i:i + n] for i in range(0, len(x), n)] for name, x in columns.items()}
    return {"split": split, "start": start, "prompts": prompts} | by_prompt


def sample_by_hand(task, args, prompts, seeds, start, M):
    """Responses number start … M−1 of π_ref to each prompt, all as lists of token ids, EOS included."""
    uniforms = [np.random.default_rng(seed).random((M, args.max_new_tokens), np.float32) for seed in seeds]
    rows, tokens = torch.from_numpy(np.concatenate([u[start:] for u in uniforms])).to(args.device), []
    for part in rows.split(args.sample_batch):  # several parts only where one prompt has a large M
        with autocast(args):
            part = generate(task.ref, prompts, part, task.tokenizer.eos_token_id, args.temperature)
        tokens += token_lists(part)
    return tokens


@contextmanager
def vllm_sampler(task, args):
    """The same by a vLLM engine, a process of its own, which ends before training needs the memory."""
    need(processes() == 1, "--backend vllm: draw the samples with one process, then start torchrun")
    with reading("--backend vllm (requirements.txt says what fits beside the rest)"):
        from vllm import LLM, SamplingParams
    context = getattr(task.ref.config, "max_position_embeddings", None)
    llm = LLM(model=args.ref, dtype=args.dtype, seed=args.data_seed, enable_prefix_caching=True,
              max_model_len=context, gpu_memory_utilization=0.5)

    def sample(prompts, seeds, start, M):
        # vLLM adds 0 … n−1 to a seed.
        params = [SamplingParams(n=M - start, temperature=args.temperature, max_tokens=args.max_new_tokens,
                                 detokenize=False, seed=(seed >> 3) + start) for seed in seeds]
        requests = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(one.token_ids) for request in requests for one in request.outputs]

    try:
        yield sample
    finally:
        llm.llm_engine.engine_core.shutdown()


# ========== 11. What makes it fast ==========================================================================
# bench/README.md has the gain of each piece: the layers that policy and π_ref share run once; the loss needs
# the log-prob of one token in V; the KV cache has room to grow. Decoding, in section 3, reads a prompt once
# for all its samples and keeps log-probs, values and trunk of every token. `load` has a faster GELU for GPT-2.


def make_policy(ref, K, own_output=False):
    """π_θ, a copy of π_ref. With K ≥ 1 only the top K layers and what stands behind them (the final norm) are
    trained; every other tensor is frozen and shared with π_ref. K = −1 trains all."""
    ref.requires_grad_(False)
    shared = {}
    if K != -1:
        owner, name = transformer_layers(ref, K)
        first = next(getattr(owner, name)[-K].parameters())
        trained = set(itertools.dropwhile(lambda p: p is not first, owner.parameters()))
        shared = {id(p): p for p in ref.parameters() if p not in trained}
    policy = copy.deepcopy(ref, dict(shared))  # deepcopy leaves alone what its memo already holds
    for p in policy.parameters():
        p.requires_grad_(id(p) not in shared)
    if own_output:  # for `step_token_bias`: not shared with the embeddings, or with π_ref
        output = policy.get_output_embeddings()
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=K == -1)
        policy.config.tie_word_embeddings = False
    return policy


def transformer_layers(lm, K=1):
    """The module and the attribute that hold the list of transformer layers, at least K, in any model."""
    for module in lm.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == lm.config.num_hidden_layers:
                need(1 <= K <= len(child), f"--unfrozen-layers {K}: --ref has {len(child)} layers; -1 is all")
                return module, name
    raise UserError(f"cannot find the transformer layers of {type(lm).__name__}: pass --unfrozen-layers -1")


@contextmanager
def top_layers(lm, K, trunk=None):
    """While in force, a pass through lm puts what enters its top K layers into the list that is yielded, and
    given a trunk runs only these layers, on it: the list of layers is cut, masks and positions are lm's."""
    entered = []
    if K < 1:
        yield entered
        return
    owner, name = transformer_layers(lm, K)
    layers = getattr(owner, name)

    def at_the_top(_, inputs):
        entered.append(inputs[0].detach())
        return inputs if trunk is None else (trunk, *inputs[1:])
    if trunk is not None:
        setattr(owner, name, layers[-K:])
    try:
        with layers[-K].register_forward_pre_hook(at_the_top):
            yield entered
    finally:
        setattr(owner, name, layers)


class TakenLogProb(torch.autograd.Function):
    """log_softmax and gather with one B×T×V tensor for both passes: ∂ log π(y) / ∂ logits = 1[y] − π is
    written over log π. PyTorch's own backward fills two more. (A second backward is therefore an error.)"""

    @staticmethod
    def forward(ctx, logits, tokens):
        log_pi, tokens = logits.log_softmax(-1), tokens.unsqueeze(-1)
        ctx.save_for_backward(log_pi, tokens)
        return log_pi.gather(-1, tokens).squeeze(-1)

    @staticmethod
    def backward(ctx, grad):
        (log_pi, tokens), grad = ctx.saved_tensors, grad.unsqueeze(-1)
        return log_pi.exp_().mul_(-grad).scatter_add_(-1, tokens, grad), None


def token_log_probs(logits, tokens, temperature=1.0):
    """log π of the tokens that were taken: logits (B, T, V), tokens (B, T) -> (B, T), nats."""
    return TakenLogProb.apply(at_temperature(logits, temperature), tokens)


def roomy_cache(lm):
    """transformers' KV cache, with room to grow: the library copies a layer whole for every new token."""
    from transformers.cache_utils import DynamicCache, DynamicLayer  # takes seconds: not for `import vbon`
    room = 24

    class RoomyLayer(DynamicLayer):
        buffers = None  # self.keys and self.values are the first part of these, until rows are picked

        def update(self, key_states, value_states, *args, **kwargs):
            start, new = self.get_seq_length(), key_states.shape[2]
            if start == 0:
                return super().update(key_states, value_states)
            known = self.keys, self.values
            fits = self.buffers is not None and start + new <= self.buffers[0].shape[2]
            if not fits or self.buffers[0].data_ptr() != self.keys.data_ptr():
                self.buffers = [nn.functional.pad(x, (0, 0, 0, new + room)) for x in known]
            for buffer, x in zip(self.buffers, (key_states, value_states)):
                buffer[:, :, start:start + new] = x
            self.keys, self.values = (buffer[:, :, :start + new] for buffer in self.buffers)
            return self.keys, self.values
    cache = DynamicCache(config=lm.config)
    # Sliding windows and the like stay what the library makes them.
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


# ========== 12. Processes, files, the command line ==========================================================


def start_processes(args):
    """Under torchrun, joins the other processes, of which all but the first fall silent."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if args.device in ("auto", "cuda") and torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        need(local < gpus, f"there are more processes than GPUs ({gpus}): start fewer, or pass --device cpu")
        args.device = f"cuda:{local}"
        torch.cuda.set_device(args.device)
    dist.init_process_group()  # nccl for tensors on GPUs, gloo for the others
    need(args.rollouts % processes() == args.minibatch % processes() == 0,
         f"--rollouts and --minibatch must be divisible by {processes()}, the number of processes")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(x):
    """[x of each process]; x anything that pickles."""
    everyones = [x] * processes()
    if processes() > 1:
        dist.all_gather_object(everyones, x)
    return everyones


def average_gradients(optimizer):
    """Replaces every gradient by its mean over the processes."""
    for p in optimizer.param_groups[0]["params"]:
        if processes() > 1 and p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= processes()


def setup(args):
    """The task, its models loaded and its prompts read. Resolves "auto" in args.device and args.backend."""
    # Large tensors in pages of 2 MB (Linux), which are mapped faster. torch reads this at its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from transformers.utils import logging
    logging.set_verbosity_error()  # its loading bars and notes would bury ours
    logging.disable_progress_bar()
    start_processes(args)
    args.device = pick_device(args.device)
    if args.backend == "auto":
        can = args.task != "toy" and args.device.startswith("cuda") and processes() == 1
        args.backend = "vllm" if can and importlib.util.find_spec("vllm") else "hand"
    task = toy_task(args) if args.task == "toy" else text_task(args)
    print(f"{args.task}: {sum(p.numel() for p in task.ref.parameters()):,} parameters on {args.device}, "
          f"{len(task.train_prompts)} training and {len(task.test_prompts)} test prompts")
    return task


def pick_device(name):
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with reading(f"--device {name}"):
        return str(torch.empty(0, device=name).device)


def autocast(args):
    """bfloat16 arithmetic where --dtype asks for it."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def make_optimizer(parameters, args):
    """AdamW over the parameters that are trained, with trlx's constants."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(trained, args.lr, (0.9, 0.95), args.adam_eps, weight_decay=1e-6, fused=True)


def check_weights(optimizer):
    """Raises UserError before weights that are no numbers, or too large to compute with, are kept."""
    squares = sum(p.detach().square().sum() for p in optimizer.param_groups[0]["params"])
    need(squares.isfinite(), "the weights are no longer finite: pass a smaller --lr")


def shuffled(items, seed):
    """Endless: every item once, in random order, before any comes twice."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(items, len(items))


def is_milestone(step, steps):
    """True after every eighth part of the steps, and after the last."""
    return (step + 1) % max(1, steps // 8) == 0 or step + 1 == steps


# What --resume may change.
PLACES = ("out", "samples", "device", "overwrite", "save_every", "resume", "sample_batch")


def open_run(args):
    """Clears --out of an earlier run. Returns a lock on it, which its writer holds until it ends."""
    from filelock import FileLock
    os.makedirs(args.out, exist_ok=True)
    with reading(f"{args.out} is being written by another run, wait or pass another --out"):
        lock = FileLock(f"{args.out}/.lock").acquire(timeout=0) if rank() == 0 else None
    for name in ["result.json"] if args.resume else ["result.json", "checkpoint.pt"]:
        Path(args.out, name).unlink(missing_ok=True)
    write_whole(f"{args.out}/config.json", json.dumps(asdict(args), indent=2) + "\n")
    return lock


def log_metrics(args, metrics):
    """Appends a line to the metrics. Of several processes the first one writes, here and below."""
    if rank() == 0:
        with open(f"{args.out}/metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")


def write_whole(path, text):
    """Writes a file under a temporary name, then renames: it is there whole or not at all."""
    if rank() == 0:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        temporary = f"{path}.{os.getpid()}.tmp"  # two runs may write the same samples
        Path(temporary).write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def save_results(args, task, exact_world, metrics, samples, policy=None):
    """Writes policy and samples, and result.json last: it marks the run as finished. Shows what came out."""
    result = {name: getattr(args, name) for name in ("task", "objective", "N", "beta", "M", "seed")}
    result |= {"seconds": round(time.perf_counter() - args.started, 1)} | metrics
    result |= exact_world.aim if exact_world else {}
    finite = all(math.isfinite(x) for x in result.values() if isinstance(x, float))
    need(finite, "what the policy gives is no longer finite: pass a smaller --lr")
    if rank() > 0:
        return result
    shutil.rmtree(f"{args.out}/policy", ignore_errors=True)
    if policy is not None:  # a plain Hugging Face folder, which from_pretrained and vLLM load
        from transformers import GenerationConfig
        # As it was trained to be sampled from: π_ref's own settings may be others, even invalid.
        policy.generation_config = GenerationConfig(do_sample=True, temperature=args.temperature, top_k=0,
                                                    eos_token_id=task.tokenizer.eos_token_id)
        policy.save_pretrained(f"{args.out}/policy")
        task.tokenizer.save_pretrained(f"{args.out}/policy")
    lines = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples)
    write_whole(f"{args.out}/samples.jsonl", lines)
    write_whole(f"{args.out}/result.json", json.dumps(result, indent=2) + "\n")
    Path(args.out, "checkpoint.pt").unlink(missing_ok=True)
    for s in samples[::args.test_responses][:4]:
        print(f"  {s['reward']:.2f}  {s['prompt']} |{s['response']}".replace("\n", " "))

    def pm(key, scale=1, digits=3):
        return f"{scale * result[key]:.{digits}f} ± {scale * (result[key + '_se'] or 0):.{digits}f}"
    print(f"\ntest, ± standard error over prompts (and Best-of-{args.N}):\n"
          f"  reward      {pm('reward')}  (π_ref {result['ref/reward']:.3f})\n"
          f"  win rate    {pm('win_rate', 100, 1)} %  ({100 * bon_win_rate(args.N):.1f} %)\n"
          f"  KL to π_ref {pm('kl_to_ref')} nats  (≤ {bon_kl(args.N):.3f})\n"
          f"  KL to π_bon {pm('kl_to_bon')} nats  (0)\n"
          f"  effective N {pm('effective_N', 1, 2)}  ({args.N})\n"
          f"  excess KL   {pm('excess_kl')} nats  (0)\n"
          f"{args.out}   [{result['seconds']:.0f} s]")
    return result


def save_checkpoint(args, task, done, optimizer, generator, updated):
    """All that a run needs to go on after `done` phases: weights, their moments, the other tensors that are
    learned, the random generator of each process, metrics. The rest follows from the seed."""
    generators = gathered(generator.get_state())
    if rank() == 0:
        weights = [p.detach() for p in (*optimizer.param_groups[0]["params"], *updated)]
        metrics = Path(args.out, "metrics.jsonl").read_text("utf-8")
        state = {"done": done, "ref": task.ref_id, "weights": weights, "optimizer": optimizer.state_dict(),
                 "generators": generators, "metrics": metrics}
        torch.save(state, f"{args.out}/checkpoint.tmp")
        os.replace(f"{args.out}/checkpoint.tmp", f"{args.out}/checkpoint.pt")


def load_checkpoint(args, task, optimizer, generator, updated):
    """Goes back to the last checkpoint, and its metrics. Returns how many phases were done."""
    path, state = f"{args.out}/checkpoint.pt", {"done": 0, "metrics": ""}
    if args.resume and os.path.exists(path):
        with reading(f"--resume: {path} is damaged, remove it to start the run anew"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            made_by = len(state["generators"])
            need(state["ref"] == task.ref_id, f"--resume: {path} was made from another --ref")
            need(made_by == processes(), f"--resume: {path} was made by {made_by} processes")
            weights = (*optimizer.param_groups[0]["params"], *updated)
            for p, saved in zip(weights, state["weights"], strict=True):
                p.data.copy_(saved)
            optimizer.load_state_dict(state["optimizer"])
            generator.set_state(state["generators"][rank()])
    if args.resume:
        print(f"resumed from {path}, after {state['done']} phases" if state["done"] else
              f"--resume: {args.out} has no checkpoint, so it starts anew")
    write_whole(f"{args.out}/metrics.jsonl", state["metrics"])
    return state["done"]


class UserError(Exception):
    """Something that the user can mend. It is printed as one line, and the exit code is 2."""


def need(condition, message):
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def fill_in(args):
    """Sets what was not set by the task's recipe. Raises UserError where a number is out of its range, or
    where flags do not go together."""
    args.started = time.perf_counter()
    for name, value in args.recipes[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    least = {1: "N train_prompts test_prompts test_M test_responses max_new_tokens sample_batch "
                "episodes rollouts minibatch ppo_epochs",
             0: "M beta value_coef critic_every save_every seed data_seed lam",
             1e-3: "temperature", 1e-30: "lr adam_eps"}
    for low, names in least.items():
        for name in names.split():
            value = getattr(args, name)
            need(value is None or low <= value <= 1e18,
                 f"--{name.replace('_', '-')} must be from {low:g} to 1e18, not {value}")
    need(args.lam <= 1, f"--lam must be from 0 to 1, not {args.lam}")
    need(args.M != 0 or args.estimator == "shared", "--M 0 goes with --estimator shared")
    need(args.estimator != "smooth" or args.M >= 3, "--estimator smooth needs --M of at least 3")
    if args.task == "toy":
        need(args.estimator != "shared", "toy has four prompts, too few for --estimator shared")
        need(args.max_new_tokens <= 4, "toy enumerates 18^T responses: --max-new-tokens at most 4")
        foreign = args.ref or args.reward or args.dataset or args.no_eos_reward or args.backend == "vllm"
        need(not foreign, "--ref, --reward, --dataset, --no-eos-reward, vllm go with --task imdb or tldr")


def finish(args):
    """Sets what follows from other flags. Refuses to replace a finished run, or to resume another one."""
    need(args.minibatch <= args.rollouts <= args.episodes, "need --minibatch ≤ --rollouts ≤ --episodes, "
         f"not {args.minibatch}, {args.rollouts}, {args.episodes}")
    if args.beta is None and args.N > 1:
        args.beta = 1 / (args.N - 1)
    need(args.objective != "rlhf" or args.beta is not None, "--objective rlhf needs --beta, or N above 1")
    need(args.objective != "bound1" or args.estimator != "log_mean", "--estimator log_mean may be −inf, "
         "and bound1's rewards are not clipped: use another")
    args.kl_coef, strength = 1 / args.N, f"N{args.N}-M{args.M}"
    if args.objective == "rlhf":
        args.kl_coef, strength = args.beta, f"beta{args.beta:g}"
    args.out = args.out or f"runs/{args.task}-{args.objective}-{strength}-seed{args.seed}"
    need(args.overwrite or not os.path.exists(f"{args.out}/result.json"),
         f"{args.out} holds a finished run: pass another --out, or --overwrite to replace it")
    if args.resume and os.path.exists(f"{args.out}/checkpoint.pt"):
        with reading(f"--resume: {args.out}/config.json is damaged, start the run anew"):
            for name, value in json.loads(Path(args.out, "config.json").read_text("utf-8")).items():
                asked = getattr(args, name, None)
                need(name in PLACES or asked == value or (name, asked) == ("backend", "auto"),
                     f"--resume: {args.out} was started with {name} = {value!r}, not {asked!r}")


@contextmanager
def reading(what):
    """Whatever goes wrong while a user's file or model is read becomes one line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries raise a dozen unrelated types here
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what}: {reason}") from None


def parse_args(argv=None, Args=Args, description=__doc__, positional=""):
    """The command line as an `Args`, whose field `positional` has no flag."""
    parser = argparse.ArgumentParser(description="\n\n".join(description.split("\n\n")[:3]),
                                     usage=f"%(prog)s [flags] {positional}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Args):
        if f.name in Args.groups:
            group = parser.add_argument_group(Args.groups[f.name])
        name = f.name if f.name == positional else "--" + f.name.replace("_", "-")
        help, choices = f.metadata["help"], f.metadata["choices"]
        if f.type is bool:
            group.add_argument(name, action="store_true", help=help)
            continue
        defaults = [f"{task} {recipe[f.name]}" for task, recipe in Args.recipes.items() if f.name in recipe]
        shown = f" [{', '.join(defaults) or f.default}]" if defaults or f.default is not None else ""
        group.add_argument(name, type=f.type, default=f.default, choices=choices, help=help + shown,
                           metavar=None if choices else f.type.__name__.upper())
    return Args(**vars(parser.parse_args(argv)))


def run_script(name, run):
    """Calls run() and returns the exit code, 2 where a user can mend what a line tells."""
    try:
        run()
    except (UserError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; the same command with --resume goes on from its last checkpoint",
              file=sys.stderr)
        return 130
    return 0


def main(argv=None):
    return run_script("vbon.py", lambda: train(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
