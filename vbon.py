#!/usr/bin/env python3
"""Variational Best-of-N alignment (vBoN), from scratch, in one file.

Best-of-N samples N responses from a language model and returns the one with the highest reward.
vBoN fine-tunes the model so that one sample from it is distributed like that best response.
Paper: Amini, Vieira, Ash, Cotterell, "Variational Best-of-N Alignment", ICLR 2025.

    python vbon.py                                # toy task: no download, exact KL, two minutes
    python vbon.py --task imdb --N 16             # the paper's sentiment task, from the model hub
    python vbon.py --task imdb --ref DIR --reward DIR --dataset DIR    # your own models and data
    python vbon.py --objective rlhf --beta 0.1    # baseline: KL-regularized RL with the same PPO
    python evaluate.py runs/imdb-*                # test the trained policies

Algorithm 1:

    sample M responses per prompt from the reference model π_ref and score them (once, cached)
    π_θ ← π_ref
    repeat:
        for each prompt x of a batch, sample a response y ~ π_θ(·|x) and score it
        estimate F(y) = P(a sample of π_ref scores lower than y) from the M reference rewards
        π_bon(y) = (F(y) + π_ref(y))^N − F(y)^N        # probability of y under Best-of-N
        reward: (log π_bon(y) − log π_ref(y)) / N on the last token,
                −(log π_θ − log π_ref) / N on every token, in sum (log π_bon(y) − log π_θ(y)) / N
        PPO: GAE, whitened advantages, clipped policy loss, clipped value loss

Sections 1 to 4 are this algorithm. Formulas and losses are pure functions of tensors that can be
copied alone. Section 5 has two methods that are not in the paper. Left out on purpose: LoRA,
sharding, training the reward model, an adaptive KL coefficient and an entropy bonus (the objective
fixes both weights).

Notation: prompt x, response y, reward r, p = π_ref(y|x). KL and log-probs are in nats. Shapes: P
prompts, M reference samples per prompt, B responses, T response tokens, L prompt tokens, hidden
size H, vocabulary V. K is the number of trained layers. Equation numbers are the paper's.
"""
import argparse
import collections
import contextlib
import copy
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import runpy
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# Number of this process and of all processes. torchrun sets them.
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class UserError(ValueError):
    """A mistake that the user can fix. It is printed as one line, with exit code 2."""


def all_sum(x):
    """Sum of x, a number or CPU tensor, over the processes."""
    gathered = [x] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(gathered, x)
    return sum(gathered)


def autocast(args):
    """Run forward passes in bfloat16 with --dtype bfloat16."""
    device = torch.device(args.device).type
    return torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16")


# ========== 1. Mathematics =======================================================================

def log_bon_pmf(log_F, log_p, N):
    """Exact log-probability of a response under Best-of-N, in nats (Prop. 1, Eq. 4).

    π_bon(y) = (F + p)^N − F^N = P(all N samples rank at most as high as y) − P(all rank lower).
    The paper's Σ_i C(N,i) F^(N−i) p^i is the same number, but takes O(N) steps and overflows.

    Args: log_F = log P(r(y') < r(y)) for y' ~ π_ref, may be −inf; log_p = log π_ref(y|x), with EOS;
    N, real, at least 1. All are broadcast. Raises: ValueError if N is below 1.
    Returns: log π_bon(y), float64, differentiable, with an error below 1e-10·max(1, |log π_bon|).
    """
    log_F, log_p, N = (torch.as_tensor(x, dtype=torch.double) for x in (log_F, log_p, N))
    if not (N >= 1).all():
        raise ValueError(f"N must be at least 1, got {N.min().item():g}")
    # π_bon = (F+p)^N · (1 − (F/(F+p))^N), where F/(F+p) = exp(−softplus(d)) and d = log p − log F.
    d = torch.where(log_F == -torch.inf, torch.inf, log_p - log_F)
    log_factor = torch.log(-torch.expm1(-N * torch.nn.functional.softplus(d.clamp(min=-600))))
    # Below d = −600, where e^d underflows, the factor equals N·e^d.
    log_factor = torch.where(d < -600, torch.log(N) + d, log_factor)
    return N * torch.logaddexp(log_F, log_p) + log_factor


ESTIMATORS = ("add_one", "log_mean", "smooth")


def estimate_log_F(rewards, ref_rewards, estimator="add_one"):
    """Estimate log F(y) = log P(r(y') < r(y)), y' ~ π_ref, from M reference rewards (Eq. 6, 7).

    With k = number of reference rewards below r(y):
      "add_one"   log((k+1) / (M+1)): always finite, as in the authors' code
      "log_mean"  log(k / M): the paper's log of the mean, −inf at k = 0
      "smooth"    −a·exp(−b·r) with a, b of `fit_log_F`
    The first two use ranks only. To break ties, pass ranks without ties.

    Args: rewards (...); ref_rewards (..., M) of the same prompts, or (M,) for all of them.
    Returns: log F̂ (...), float64, in nats.
    Raises: ValueError if M is 0, a reward is NaN, or the estimator is unknown.
    """
    rewards, ref_rewards = (torch.as_tensor(x, dtype=torch.double) for x in (rewards, ref_rewards))
    M = ref_rewards.shape[-1]
    if M == 0 or rewards.isnan().any() or ref_rewards.isnan().any():
        raise ValueError(f"M must be at least 1 and no reward NaN, got M = {M}")
    k = (ref_rewards < rewards.unsqueeze(-1)).sum(-1).double()
    if estimator == "add_one":
        return torch.log((k + 1) / (M + 1))
    if estimator == "log_mean":
        return torch.log(k / M)
    if estimator == "smooth":
        mean = ref_rewards.mean(-1)  # subtracted, so that nothing overflows
        a, b = fit_log_F(ref_rewards - mean.unsqueeze(-1))
        return -a * torch.exp(-b * (rewards - mean))
    raise ValueError(f"estimator must be add_one, log_mean or smooth, got {estimator!r}")


def fit_log_F(ref_rewards):
    """Least-squares fit of −a·exp(−b·r) to the "add_one" log F̂ of the reference rewards (§6).

    For a given b the best a has a closed form. b is searched on a grid with steps of 5 %.

    Args: ref_rewards (..., M). Returns: a and b, both positive, (...), float64.
    Raises: ValueError if M is below 3, a reward is not finite, or exp(b·r) overflows.
    """
    r = torch.as_tensor(ref_rewards, dtype=torch.double).sort(-1).values
    M = r.shape[-1]
    if M < 3 or not r.isfinite().all():
        raise ValueError("fit_log_F needs at least 3 finite reference rewards per prompt")
    log_F = torch.log((torch.searchsorted(r, r) + 1).double() / (M + 1)).unsqueeze(-2)
    # Rewards shifted to start at 0 and scaled to unit spread, so that no exponential overflows.
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
        raise ValueError("a = exp(b·r) overflows: subtract the mean from the rewards first")
    return a.squeeze(-1), b.squeeze(-1)


OBJECTIVES = ("vbon", "bound", "bound1", "rlhf")


def vbon_reward(log_F, log_p, N, objective="vbon"):
    """Return the terminal reward of each response, in nats.

    With a penalty of (log π_θ − log π_ref) / N on every token, PPO maximizes −KL(π_θ ‖ π_bon) / N
    or a lower bound of it. The reward is 1/N, which gives all N one scale, times
      "vbon"    log π_bon(y) − log p                      the objective itself    (Eq. 5)
      "bound"   (N−1)·log F                               its lower bound L       (Eq. 8)
      "bound1"  N(N−1)/2·log F + (N(N+1)/2 − 1)·log p     a looser bound, L1      (Eq. 16)
    Where log p < −30 and F̂ > 0, "vbon" is "bound" plus the constant log(N)/N, to 1e-10. A trainer
    that subtracts a baseline can therefore use "bound" with log_p = 0.

    Args: log_F, log_p, N as in `log_bon_pmf`. Returns: the broadcast shape, float64.
    Raises: ValueError if N is below 1 or the objective is unknown.
    """
    log_F, log_p, N = (torch.as_tensor(x, dtype=torch.double) for x in (log_F, log_p, N))
    if not (N >= 1).all():
        raise ValueError(f"N must be at least 1, got {N.min().item():g}")
    if objective == "vbon":
        return (log_bon_pmf(log_F, log_p, N) - log_p) / N
    weighted_log_F = torch.where(N == 1, 0.0, (N - 1) / N * log_F)  # 0 at N = 1, also for F = 0
    if objective == "bound":
        return weighted_log_F + torch.zeros_like(log_p)
    if objective == "bound1":
        return N / 2 * weighted_log_F + (N * (N + 1) / 2 - 1) / N * log_p
    raise ValueError(f"objective must be vbon, bound or bound1, got {objective!r}")


def bon_kl(N):
    """KL(π_bon ‖ π_ref) in nats for a continuous reward, otherwise an upper bound."""
    return math.log(N) - (N - 1) / N


def bon_win_rate(N):
    """Probability that Best-of-N beats one sample of π_ref, for a continuous reward."""
    return N / (N + 1)


def mid_ranks(rewards, ref_rewards):
    """Number of the M reference rewards (..., M) below each reward (...). A tie counts half."""
    rewards = rewards.unsqueeze(-1)
    return ((ref_rewards < rewards).sum(-1) + (ref_rewards <= rewards).sum(-1)).double() / 2


def kl_to_bon(kl_to_ref, mean_log_F, N):
    """KL(π_θ ‖ π_bon) in nats from KL(π_θ ‖ π_ref) and E_{π_θ}[log F]. It needs p ≪ F, as for
    text, where log π_bon = log p + log N + (N−1)·log F."""
    return kl_to_ref - math.log(N) - (N - 1) * mean_log_F


def effective_N(mean_log_F):
    """The N that minimizes `kl_to_bon`, from E_{π_θ}[log F] in nats. It is 1 for π_ref."""
    return -1 / mean_log_F


def excess_kl(kl_to_ref, mean_log_F):
    """KL(π_θ ‖ π_bon) in nats for N = `effective_N`, the closest Best-of-N distribution."""
    N = -1 / mean_log_F
    return kl_to_ref - (math.log(N) - (N - 1) / N)


# ========== 2. PPO: advantages and losses ========================================================

def masked_mean(x, mask):
    """Mean of x over the entries where the mask is 1."""
    return torch.where(mask.bool(), x, 0.0).sum() / mask.sum()


def whiten(advantages, mask):
    """Shift and scale to mean 0 and variance 1 over the mask. Entries outside it become 0."""
    centered = torch.where(mask.bool(), advantages - masked_mean(advantages, mask), 0.0)
    return centered * torch.rsqrt(masked_mean(centered ** 2, mask) + 1e-8)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalized advantage estimation (Schulman et al. 2016).

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}. V and A are 0 after the last token.

    Args: rewards, values, mask, all (B, T). The mask is 1 on response tokens.
    Returns: advantages A and returns A + V, both (B, T), 0 where the mask is 0.
    """
    rewards, values = (torch.where(mask.bool(), x, 0.0) for x in (rewards, values))
    advantages, next_advantage, next_value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        advantages[:, t], next_value = next_advantage, values[:, t]
    return advantages, advantages + values


def policy_loss(log_probs, old_log_probs, advantages, mask, clip=0.2):
    """PPO's clipped policy loss, −min(ρA, clip(ρ, 1−ε, 1+ε)·A) with ρ = π_θ/π_old. All (B, T)."""
    ratio = torch.exp(torch.where(mask.bool(), log_probs - old_log_probs, 0.0))
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.maximum(-advantages * ratio, -advantages * clipped), mask)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """PPO's clipped value loss, ½ max((V − R)², (clip(V, V_old ± ε) − R)²). All (B, T)."""
    values = torch.where(mask.bool(), values, 0.0)
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


# ========== 3. Language model: sampling and log-probs ============================================

@dataclass
class Rollout:
    """B sampled responses. Indexing it by rows indexes every tensor."""
    input_ids: Tensor             # (B, L+T−1) left-padded prompt, response without its last token
    attention_mask: Tensor        # (B, L+T−1) false on padding
    tokens: Tensor                # (B, T) response, EOS included
    mask: Tensor                  # (B, T) true up to and including EOS
    log_probs: Tensor = None      # (B, T) under the policy that sampled them, 0 after EOS
    values: Tensor = None         # (B, T) value estimates, 0 after EOS
    advantages: Tensor = None     # (B, T) whitened
    returns: Tensor = None        # (B, T) values + unwhitened advantages
    frozen_hidden: Tensor = None  # (B, L+T−1, H) output of the last frozen layer
    layer_type: type = Tensor     # what a layer of this architecture returns: Tensor or tuple

    def __getitem__(self, rows):
        return Rollout(**{k: x[rows] if torch.is_tensor(x) else x for k, x in vars(self).items()})


def pad(rows, value, side, device="cpu"):
    """Pad lists of token ids on one side. Returns ids and mask (false on padding), both (B, T)."""
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, -1, side)
    return ids.masked_fill(ids < 0, value).to(device), (ids >= 0).to(device)


def token_lists(rollout):
    """The B responses as lists of token ids, EOS included."""
    return [row[:n] for row, n in zip(rollout.tokens.tolist(), rollout.mask.sum(1).tolist())]


def decode(task, prompts, responses):
    """Decode token ids of responses to texts. EOS becomes `task.end`. Prompt and response are
    decoded together, because some tokenizers drop the space before a text."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    starts = [task.encode(p) for p in prompts]
    ended = [ids[-1] in task.eos for ids in responses]
    whole = [start + ids[:len(ids) - end] for start, ids, end in zip(starts, responses, ended)]
    heads, texts = (task.tokenizer.batch_decode(rows, **options) for rows in (starts, whole))
    return [text[len(head):] + task.end * end for head, text, end in zip(heads, texts, ended)]


def forward(lm, ids, mask, keep, temperature, cache=None):
    """Logits / temperature (B, keep, V) and hidden states (B, keep, H) at the last positions. With
    a cache, ids (B, T) are the new tokens only. mask: (B, cached + T)."""
    hidden, positions = [], (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]

    def keep_hidden(_, inputs):
        hidden.append(inputs[0].contiguous())  # multiplying a slice is slower
        return hidden[0]
    with lm.get_output_embeddings().register_forward_pre_hook(keep_hidden):
        logits = lm(input_ids=ids, attention_mask=mask.long(), position_ids=positions,
                    past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep).logits
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    return logits, hidden[0].float()


def sample_tokens(logits, uniforms):
    """Sample tokens (B,) from logits (B, V) by inverting the CDF at uniforms (B,), and return their
    log-probs (B,). `torch.multinomial` is several times slower."""
    pi = logits.softmax(-1)
    cdf = pi.cumsum(-1)
    u = uniforms.unsqueeze(1) * (1 - 2 ** -22) * cdf[:, -1:]  # stays below the total when rounded
    tokens = torch.searchsorted(cdf, u, right=True).clamp(max=logits.shape[1] - 1)
    # A GPU's cumsum is not exactly monotone, so a token of probability 0 may be selected.
    log_probs = pi.gather(1, tokens).clamp(min=torch.finfo(pi.dtype).tiny).log()
    return tokens.squeeze(1), log_probs.squeeze(1)


@torch.no_grad()
def generate(lm, prompts, uniforms, eos, temperature, value_head=None):
    """Sample B responses, equally many per prompt (a list of token ids). Returns a Rollout.

    uniforms (B, T): a random number per token, rows grouped by prompt. eos: the token ids that end
    a response. Ended responses leave the batch.
    """
    from transformers import DynamicCache  # takes seconds to import
    device, (B, T), samples = uniforms.device, uniforms.shape, len(uniforms) // len(prompts)

    # Read every prompt once and repeat its KV cache.
    ids, attention = pad(prompts, eos[0], "left", device)
    cache = DynamicCache(config=lm.config)
    inputs = ids, attention, *forward(lm, ids, attention, 1, temperature, cache)
    cache.batch_repeat_interleave(samples)
    ids, attention, logits, hidden = (x.repeat_interleave(samples, 0) for x in inputs)
    prompt_mask, tokens = attention, torch.full((B, T), eos[0], device=device)
    mask = torch.zeros(B, T, dtype=torch.bool, device=device)
    log_probs, values = torch.zeros(B, T, device=device), torch.zeros(B, T, device=device)

    # Sample token by token. `alive` are the rows whose response has not ended.
    alive, ends = torch.arange(B, device=device), torch.tensor(eos, device=device)
    for t in range(T):
        token, log_prob = sample_tokens(logits[:, -1], uniforms[alive, t])
        tokens[alive, t], log_probs[alive, t], mask[alive, t] = token, log_prob, True
        if value_head is not None:
            values[alive, t] = value_head(hidden[:, -1]).squeeze(-1).float()
        growing = torch.isin(token, ends, invert=True).nonzero().squeeze(1)
        if t + 1 == T or len(growing) == 0:
            break
        if len(growing) < len(alive):
            cache.batch_select_indices(growing)
            alive, token, attention = alive[growing], token[growing], attention[growing]
        attention = torch.cat([attention, attention.new_ones(len(alive), 1)], 1)
        logits, hidden = forward(lm, token.unsqueeze(1), attention, 1, temperature, cache)
    return Rollout(torch.cat([ids, tokens[:, :-1]], 1), torch.cat([prompt_mask, mask[:, :-1]], 1),
                   tokens, mask, log_probs, values)


def transformer_layers(lm):
    """The list of transformer layers and the module that holds it, in any architecture."""
    number = lm.config.get_text_config().num_hidden_layers
    for module in lm.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == number:
                return child, module
    raise UserError(f"cannot find the layers of a {type(lm).__name__}: pass --unfrozen-layers -1")


@contextlib.contextmanager
def frozen_layers(lm, K, output=None):
    """Yield a list that collects, per pass, the output of the layer just below the top K. With
    `output`, the frozen layers compute nothing and return it. They stay in place, so that layer
    indices, masks and positions are the model's own."""
    frozen, outputs = list(transformer_layers(lm)[0][:-K]) if K > 0 else [], []
    with contextlib.ExitStack() as stack:
        for layer in frozen if output is not None else []:
            layer.forward = lambda *args, **kwargs: output
            stack.callback(vars(layer).pop, "forward")
        for layer in frozen[-1:]:
            stack.enter_context(layer.register_forward_hook(lambda *x: outputs.append(x[-1])))
        yield outputs


def response_log_probs(lm, batch, temperature, K=-1):
    """log π(y_t | x, y_<t) of the tokens of a Rollout, (B, T), nats, and hidden states (B, T, H).
    If the Rollout has `frozen_hidden`, only the top K layers are computed."""
    output, tokens = batch.frozen_hidden, batch.tokens
    K = -1 if output is None else K
    with frozen_layers(lm, K, (output,) if batch.layer_type is tuple else output):
        logits, hidden = forward(lm, batch.input_ids, batch.attention_mask, tokens.shape[1],
                                 temperature)
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    return -nll.view_as(tokens), hidden


@torch.no_grad()
def reference_log_probs(ref, rollout, args):
    """log π_ref of the response tokens, (B, T), nats, 0 after EOS. Sets `rollout.frozen_hidden`."""
    minibatches = torch.arange(len(rollout.tokens), device=args.device).split(args.minibatch)
    with autocast(args), frozen_layers(ref, args.unfrozen_layers) as outputs:
        log_probs = torch.cat([response_log_probs(ref, rollout[rows], args.temperature)[0]
                               for rows in minibatches])
    if outputs:
        rollout.layer_type = tuple if isinstance(outputs[0], tuple) else Tensor
        rollout.frozen_hidden = torch.cat([x[0] if isinstance(x, tuple) else x for x in outputs])
    return torch.where(rollout.mask, log_probs, 0.0)


def make_policy(ref, K, own_output=False):
    """Copy the reference model. K ≥ 1 trains, in float32, the top K layers and what the model lists
    after them (mostly the final norm), K = −1 everything. Other tensors are shared with the
    reference model. own_output: copy the output weight too. For K ≥ 1 only `step_token_bias`
    changes it."""
    ref.requires_grad_(False)
    shared = {}
    if K != -1:
        layers, owner = transformer_layers(ref)
        if not 1 <= K <= len(layers):
            raise UserError(f"--unfrozen-layers must be -1 or from 1 to {len(layers)}, got {K}")
        first = next(layers[-K].parameters())
        trained = set(itertools.dropwhile(lambda p: p is not first, owner.parameters()))
        shared = {id(p): p for p in ref.parameters() if p not in trained}
    policy = copy.deepcopy(ref, dict(shared))  # deepcopy does not copy what its memo holds
    for p in policy.parameters():
        if id(p) not in shared:
            p.requires_grad_().data = p.data.float()
    if own_output:
        output = policy.get_output_embeddings()
        output.weight = nn.Parameter(output.weight.detach().float().clone(), requires_grad=K == -1)
        policy.config.tie_word_embeddings = False
    return policy


# ========== 4. Training ==========================================================================

CLIP = 0.2          # policy ratios are clipped to 1 ± CLIP, values to old values ± CLIP
REWARD_CLIP = 10.0  # terminal rewards are clipped to ± REWARD_CLIP


def terminal_reward(scores, ref_rewards, log_ref, args):
    """Reward of the last token (B,): the score for KL-regularized RL, otherwise `vbon_reward`.
    scores (B,), ref_rewards (M,) or (B, M), log_ref = log π_ref(y|x) (B,), in nats."""
    if args.objective == "rlhf":
        return scores.clamp(-REWARD_CLIP, REWARD_CLIP)
    log_F = estimate_log_F(scores, ref_rewards, args.estimator)
    reward = vbon_reward(log_F, log_ref, args.N, args.objective)
    limit = math.inf if args.objective == "bound1" else REWARD_CLIP  # its N/2·log p is large
    return reward.clamp(-limit, limit)


@torch.no_grad()
def collect(policy, value_head, task, prompts, ref_rewards, args, generator):
    """First half of an iteration: sample responses, compute rewards, values and advantages.

    Args: B prompts and the rewards (B, M) of their reference samples. Returns: Rollout, metrics.
    """
    start, B = time.perf_counter(), len(prompts)

    # Sample one response per prompt with the policy, with log-probs and values.
    uniforms = torch.rand(B, args.max_new_tokens, generator=generator, device=args.device)
    with autocast(args):
        rollout = generate(policy, [task.encode(p) for p in prompts], uniforms, task.eos,
                           args.temperature, value_head)
    mask, responses = rollout.mask, decode(task, prompts, token_lists(rollout))
    sampled = time.perf_counter()

    # Log-probs of the same tokens under the reference model.
    ref_log_probs = reference_log_probs(task.ref, rollout, args)
    log_ratio = rollout.log_probs - ref_log_probs

    # Score the responses. The terminal reward follows from log F̂, an estimate from the prompt's
    # reference rewards. vBoN and KL-regularized RL differ only here.
    scores = torch.tensor(task.score(prompts, responses), dtype=torch.double)
    log_ref = ref_log_probs.cpu().double().sum(1)
    terminal = terminal_reward(scores, ref_rewards, log_ref, args)

    # Per-token rewards: the KL penalty on every token, the terminal reward on the last.
    rewards = -args.kl_coef * log_ratio
    rewards[torch.arange(B), mask.sum(1) - 1] += terminal.to(rewards)

    # Values: the value head's, or with --prefix-critic a regression on scores of partial responses.
    if args.prefix_critic:
        u = score_prefixes(task, prompts, rollout, ref_rewards, args.prefix_critic)
        values = prefix_values(u, rewards, mask, args.prefix_critic, all_sum)
        rollout.values = values.to(rewards)

    # GAE, whitening.
    advantages, rollout.returns = gae(rewards, rollout.values, mask, gamma=1.0, lam=args.lam)
    rollout.advantages = whiten(advantages, mask)

    log_pi = rollout.log_probs.cpu().double().sum(1)
    metrics = {"reward": scores, "kl_to_ref": log_pi - log_ref, "entropy": -log_pi,
               "length": mask.sum(1).double()}
    if ref_rewards.shape[1]:
        metrics["win_rate"] = mid_ranks(scores, ref_rewards) / ref_rewards.shape[1]
        log_bon = log_bon_pmf(estimate_log_F(scores, ref_rewards), log_ref, args.N)
        metrics["kl_to_bon"] = log_pi - log_bon  # noisy; π_bon > 1 if F̂ + p > 1
    return rollout, {f"objective/{name}": x.mean().item() for name, x in metrics.items()} | {
        "time/rollout": sampled - start, "time/score": time.perf_counter() - sampled}


def update(policy, value_head, optimizer, rollout, token_counts, args, generator):
    """Second half of an iteration: PPO on the rollout. Returns metrics."""
    start, losses, parameters = time.perf_counter(), [], optimizer.param_groups[0]["params"]

    # For each epoch and minibatch: clipped policy loss, clipped value loss, one optimizer step.
    for _ in range(args.ppo_epochs):
        order = torch.randperm(len(rollout.tokens), generator=generator, device=args.device)
        hidden_states = []
        for rows in order.split(len(order) * args.minibatch // args.rollouts):
            batch = rollout[rows]
            mask, values = batch.mask, batch.values
            with autocast(args):
                log_probs, hidden = response_log_probs(policy, batch, args.temperature,
                                                       args.unfrozen_layers)
                if value_head is not None:
                    values = value_head(hidden).squeeze(-1).float()
            pg_loss = policy_loss(log_probs, batch.log_probs, batch.advantages, mask, CLIP)
            vf_loss = value_loss(values, batch.values, batch.returns, mask, CLIP)
            optimizer.zero_grad()
            (pg_loss + args.value_coef * vf_loss).backward()
            average_gradients(parameters)
            optimizer.step()
            with torch.no_grad():
                log_ratio = log_probs - batch.log_probs
                kl = masked_mean(torch.expm1(log_ratio) - log_ratio, mask)
                clip_fraction = masked_mean((torch.expm1(log_ratio).abs() > CLIP).float(), mask)
                losses.append(torch.stack([pg_loss, vf_loss, kl, clip_fraction]))
                hidden_states.append(hidden[mask])

    # With --token-bias-lr: one natural-gradient step on the output bias.
    lr = optimizer.param_groups[0]["lr"]
    if args.token_bias_lr:
        step_token_bias(policy.get_output_embeddings().weight, torch.cat(hidden_states), rollout,
                        token_counts, args.token_bias_lr * lr / args.lr, args.kl_coef)

    check_finite([*parameters, policy.get_output_embeddings().weight])
    names = ("ppo/policy_loss", "ppo/value_loss", "ppo/approx_kl", "ppo/clip_fraction")
    means = dict(zip(names, torch.stack(losses).mean(0).tolist()))
    return means | {"ppo/lr": lr, "time/update": time.perf_counter() - start}


def train(args):
    """Run Algorithm 1. Returns the content of result.json."""
    start, task = time.perf_counter(), setup(args)
    torch.manual_seed(args.seed)
    policy = make_policy(task.ref, args.unfrozen_layers, own_output=args.token_bias_lr > 0)
    output = policy.get_output_embeddings().weight
    token_counts, width = torch.zeros(len(output), dtype=torch.double), output.shape[1]
    value_head = None if args.prefix_critic else nn.Sequential(
        nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1)).to(args.device)
    open_run(args)

    # Rewards of the M reference samples per prompt, (P, M). KL-regularized RL needs them only for
    # the prefix critic.
    clock, ref_rewards = time.perf_counter(), torch.zeros(len(task.prompts), 0)
    if args.objective != "rlhf" or args.prefix_critic:
        ref_rewards = reference_samples(task, args)
    result = {"seconds_sampling": time.perf_counter() - clock}
    toy = ExactToy(task, args, ref_rewards) if args.task == "toy" else None

    # With --resume, continue after the last checkpoint.
    optimizer, generator = make_optimizer([policy, value_head], args), torch.Generator(args.device)
    state = dict(enumerate([*optimizer.param_groups[0]["params"], output, token_counts]))
    done, iterations = load_checkpoint(args, task, state, optimizer), args.episodes // args.rollouts
    order = shuffled(range(len(task.prompts)), args.seed, skip=done * args.rollouts)

    with tqdm(total=iterations, initial=done, desc="PPO", unit="iteration") as bar:
        for iteration in range(done, iterations):
            decay = 1 - iteration / iterations if args.lr_schedule == "linear" else 1
            optimizer.param_groups[0]["lr"] = args.lr * decay
            seed = (args.seed * iterations + iteration) * WORLD_SIZE + RANK
            generator.manual_seed(seed % 2 ** 63)

            # Each process takes its share of the prompts.
            rows = list(itertools.islice(order, args.rollouts))[RANK::WORLD_SIZE]
            rollout, metrics = collect(policy, value_head, task, [task.prompts[i] for i in rows],
                                       ref_rewards[rows], args, generator)
            metrics |= update(policy, value_head, optimizer, rollout, token_counts, args, generator)

            done, metrics["episode"] = iteration + 1, (iteration + 1) * args.rollouts
            if toy and done * 8 // iterations > iteration * 8 // iterations:  # every eighth
                name = f"π_θ, {metrics['episode']:,} episodes"
                metrics |= toy.report(name, toy.log_probs(policy))
            log_metrics(args, metrics, bar)
            if args.save_every and done % args.save_every == 0:
                save_checkpoint(args, task, done, state, optimizer)

    result |= {"episodes": iterations * args.rollouts, "seconds": time.perf_counter() - start}
    return save_run(args, task, policy, result | (toy.optimum if toy else {}))


def make_optimizer(modules, args):
    """AdamW over the trained parameters, with the constants of trlx, a PPO library."""
    trained = [p for m in modules if m is not None for p in m.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, args.lr, (0.9, 0.95), args.adam_eps, 1e-6, fused=True)


def average_gradients(parameters):
    """Replace every gradient by its mean over the processes."""
    for p in parameters:
        if WORLD_SIZE > 1 and p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= WORLD_SIZE


def check_finite(parameters):
    """Raise UserError if a weight is not finite."""
    if not sum(p.detach().square().sum() for p in parameters).isfinite():
        raise UserError("the weights are no longer finite: pass a smaller --lr")


def shuffled(items, seed, skip=0):
    """Yield the items forever, in a new random order in every pass, without the first `skip`."""
    rng = random.Random(seed)
    passes = (rng.sample(items, len(items)) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(passes), skip, None)


def atomic_write(path, text):
    """Write a file under a temporary name, then rename it."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    Path(f"{path}.{os.getpid()}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.{os.getpid()}.tmp", path)


def open_run(args):
    """Write config.json. First remove the results of an earlier run, unless it is resumed."""
    if args.resume and not Path(args.out, "checkpoint.pt").exists():
        print(f"--resume: no checkpoint in {args.out}, training starts from the beginning")
        args.resume = False
    if RANK == 0:
        names = ("result.json", "checkpoint.pt", "metrics.jsonl", "policy", "eval-*.json")
        for path in () if args.resume else itertools.chain(*map(Path(args.out).glob, names)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        atomic_write(f"{args.out}/config.json", json.dumps(vars(args), indent=2) + "\n")


def summary(metrics):
    """The training metrics that are worth watching, as text."""
    names = [k for k in ("reward", "kl_to_ref", "win_rate", "loss") if "objective/" + k in metrics]
    return ", ".join(f"{k} {metrics['objective/' + k]:z.3f}" for k in names)


def log_metrics(args, metrics, bar):
    """Append a line to metrics.jsonl and show it on the progress bar."""
    if RANK == 0:
        with open(f"{args.out}/metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
    bar.set_postfix_str(summary(metrics), refresh=False)
    bar.update()


def save_checkpoint(args, task, done, tensors, optimizer):
    """Save the state after `done` iterations. It has no generators: each iteration seeds them."""
    if RANK == 0:
        torch.save({"done": done, "ref": task.ref_id, "tensors": tensors,
                    "optimizer": optimizer.state_dict()}, f"{args.out}/checkpoint.tmp")
        os.replace(f"{args.out}/checkpoint.tmp", f"{args.out}/checkpoint.pt")


def load_checkpoint(args, task, tensors, optimizer):
    """With --resume, restore tensors and optimizer in place. Returns the finished iterations."""
    path, metrics = Path(args.out, "checkpoint.pt"), Path(args.out, "metrics.jsonl")
    if not args.resume:
        return 0
    with loading(f"cannot resume from {path} (--overwrite starts again)"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["ref"] != task.ref_id:
            raise UserError(f"--resume: {path} was saved with other weights behind --ref")
        for name, x in tensors.items():
            x.data.copy_(state["tensors"][name])
        optimizer.load_state_dict(state["optimizer"])
    print(f"resumed after {state['done']} iterations")
    if RANK == 0:  # drop the metrics of iterations that are repeated
        lines = metrics.read_text("utf-8").splitlines(True)
        atomic_write(metrics, "".join(lines[:state["done"]]))
    return state["done"]


def save_run(args, task, policy, result):
    """Save the policy as a Hugging Face folder, then result.json, which marks a finished run."""
    if RANK > 0:
        return result
    from transformers import AutoModelForCausalLM, GenerationConfig
    folder = f"{args.out}/policy"
    # Sample with the settings of training, which may differ from the base model's.
    policy.generation_config = GenerationConfig(do_sample=True, temperature=args.temperature,
                                                top_k=0, eos_token_id=task.eos)
    policy.cpu().float().save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)

    # The saved policy must be the trained one.
    ids = torch.tensor([task.encode(task.prompts[0])])
    with torch.no_grad(), loading(f"cannot load the saved policy {folder}"):
        saved = AutoModelForCausalLM.from_pretrained(folder).eval()
        error = (saved(ids).logits - policy(ids).logits).abs().max()
    if not error < TOLERANCE["float32"]:
        raise UserError(f"{folder}: the logits of the saved policy are off by {error:.2g}")

    rows = [*map(json.loads, open(f"{args.out}/metrics.jsonl", encoding="utf-8"))]
    last = rows[-max(1, len(rows) // 16):]
    means = {k: np.mean([row[k] for row in last if k in row]) for k in last[-1] if "/" in k}
    settings = {k: getattr(args, k) for k in ("task", "objective", "N", "M", "beta", "seed")}
    result = settings | means | result
    atomic_write(f"{args.out}/result.json", json.dumps(result, indent=2) + "\n")
    Path(args.out, "checkpoint.pt").unlink(missing_ok=True)
    print(f"means over the last sixteenth of training: {summary(means)}")
    print(f"finished in {result['seconds']:.0f} s; to test it: python evaluate.py {args.out}")
    return result


# ========== 5. Beyond the paper: prefix critic and token bias ====================================

def score_prefixes(task, prompts, rollout, ref_rewards, every):
    """Score the first t tokens of each response for t = every, 2·every, … Returns the scores' ranks
    as normal quantiles, u[:, t] = Φ⁻¹((k + ½) / (M + 1)), (B, T), where k is the mid-rank among the
    prompt's M reference rewards (B, M), and 0 where nothing is scored."""
    tokens, u = token_lists(rollout), torch.zeros(rollout.mask.shape, dtype=torch.double)
    cuts = [(b, t) for b, ids in enumerate(tokens) for t in range(every, len(ids), every)]
    if cuts:
        rows, columns = torch.tensor(cuts).T
        prompts = [prompts[b] for b, _ in cuts]
        texts = decode(task, prompts, [tokens[b][:t] for b, t in cuts])
        scores = task.score(prompts, [text + task.end for text in texts])
        k = mid_ranks(torch.tensor(scores, dtype=torch.double), ref_rewards[rows])
        u[rows, columns] = torch.special.ndtri((k + 0.5) / (ref_rewards.shape[1] + 1))
    return u


def prefix_values(u, rewards, mask, every, total=lambda x: x):
    """Values (B, T) from scores of partial responses: one ridge regression per block of `every`
    tokens. The return at the first token of a block is regressed on (1, u, u², u³) over the
    responses that reach it. Every token of the block gets the fitted value, 0 where the mask is 0.
    The fit sees the returns that its values are subtracted from, which adds a small gradient bias.

    Args: u of `score_prefixes`, rewards, mask, all (B, T); total sums a tensor over processes.
    """
    mask = mask.bool().cpu()
    returns = torch.where(mask, rewards.cpu().double(), 0.0).flip(1).cumsum(1).flip(1)
    x = torch.stack([torch.ones_like(u), u, u ** 2, u ** 3], -1)[:, ::every]
    xy = torch.cat([x, returns[:, ::every, None]], -1)
    moments = total(torch.einsum("bki,bkj->kij", x * mask[:, ::every, None], xy))  # [XᵀX | Xᵀy]
    # Few responses reach the last blocks, where a cubic without a penalty is unstable.
    ridge = torch.diag(torch.tensor([0.01, 1.0, 4.0, 16.0], dtype=torch.double))
    fit = torch.linalg.solve(moments[..., :4] + ridge, moments[..., 4])
    values = torch.einsum("bki,ki->bk", x, fit).repeat_interleave(every, 1)[:, :u.shape[1]]
    return torch.where(mask, values, 0.0)


@torch.no_grad()
def step_token_bias(weight, hidden, rollout, counts, step, kl_coef):
    """One natural-gradient step on a bias of the logits (V,): a token's summed advantages over its
    count and kl_coef. A plain gradient moves frequent tokens too much, which costs more KL for the
    same reward. The output weight (V, H) gets bias·vᵀ, where hidden·v = 1 by least squares (exact
    after a LayerNorm).

    Args: hidden (n, H), the output layer's inputs; counts (V,), a running mean of how often each
    token is sampled, updated in place; step, 0 to 1.
    """
    tokens = rollout.tokens[rollout.mask].cpu()
    advantages = (rollout.returns - rollout.values)[rollout.mask].cpu().double()  # not whitened
    sums = all_sum(torch.bincount(tokens, advantages, len(counts)))
    n = all_sum(torch.bincount(tokens, minlength=len(counts)).double())
    counts.lerp_(n, step if counts.any() else 1.0)
    bias = sums / kl_coef / (counts / step + 20)  # + 20: rare tokens, whose sums are noisy
    # Limit its KL to 0.005 nats per token. Without a limit it diverges for a large N.
    nats = 0.5 * (counts * bias ** 2).sum() / counts.sum()
    bias *= (0.005 / nats).sqrt().clamp(max=1.0)

    hidden = hidden.cpu().double()
    gram, mean = all_sum(hidden.T @ hidden), all_sum(hidden.sum(0))
    ridge = 1e-8 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.double)
    weight.add_(torch.outer(bias, torch.linalg.solve(gram + ridge, mean)).to(weight))


# ========== 6. Reference samples: sampled once, cached, resumable ================================

def reference_samples(task, args, tokens=False):
    """Rewards of M reference samples per prompt, (P, M) float64. Missing samples are generated.
    They are seeded by the prompt, its split and --data-seed. tokens: also return P lists of M lists
    of token ids."""
    folder, header = samples_folder(task, args)
    columns = ("rewards", "tokens") if tokens else ("rewards",)
    samples, keys = read_samples(folder, columns), [json.dumps(p) for p in task.prompts]
    cached = {key: min(map(len, samples[key].values())) for key in keys}
    missing = {key: n for key, n in cached.items() if n < args.M}
    if missing and RANK == 0:
        sample_missing(task, args, missing, folder, header)
    all_sum(0)  # the other processes wait
    samples = read_samples(folder, columns) if missing else samples
    rewards = torch.tensor([samples[key]["rewards"][:args.M] for key in keys], dtype=torch.double)
    return (rewards, [samples[key]["tokens"][:args.M] for key in keys]) if tokens else rewards


def samples_folder(task, args):
    """Folder named by a hash of everything that the samples depend on, and its header.json."""
    header = {"ref": task.ref_id, "reward": task.reward_id, "split": task.split,
              "temperature": args.temperature, "max_new_tokens": args.max_new_tokens,
              "dtype": args.dtype, "backend": args.backend, "data_seed": args.data_seed}
    text = json.dumps(header, indent=2) + "\n"
    return Path(args.samples, f"{args.task}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"), text


def read_samples(folder, columns=("rewards",)):
    """Read a samples folder: {prompt as JSON: {column: its samples in order}}."""
    samples = collections.defaultdict(lambda: {name: [] for name in columns})
    for path in sorted(Path(folder).glob("*.jsonl")):
        with loading(f"cannot read {path} (remove it to generate its samples again)"):
            for row in map(json.loads, path.open(encoding="utf-8")):
                known = samples[json.dumps(row["prompt"])]
                new = len(known[columns[0]]) - row["start"]  # files of two runs may overlap
                for name in columns if new >= 0 else ():
                    known[name] += row[name][new:]
    return samples


def sample_missing(task, args, missing, folder, header):
    """Generate, score and cache samples. missing: {prompt as JSON: number cached}. Each batch is
    one atomic write. A resumed run repeats whole batches, so that rounding is the same."""
    path = folder / "header.json"
    if path.exists() and "converted" in json.loads(path.read_text("utf-8")):
        raise UserError(f"{folder} was converted and has no tokens or too few rewards: convert it "
                        "again, or pass another --samples or --M")
    atomic_write(path, header)
    flags = "--M or --train-prompts" if task.split == "train" else "--test-M or --test-prompts"
    print(f"reference samples: {args.M * len(missing) - sum(missing.values()):,} to generate, "
          f"{args.M} for each of {len(missing):,} prompts (a smaller {flags} reduces them)")

    vllm = args.backend == "vllm"
    sample, stop = vllm_sampler(task, args) if vllm else (sample_by_hand, lambda: None)
    size = max(1, (16_384 if vllm else args.sample_batch) // args.M)
    order = sorted(missing, key=lambda key: (missing[key], len(task.encode(json.loads(key))), key))
    batches = [order[i:i + size] for i in range(0, len(order), size)]
    for keys in tqdm(batches, desc="reference samples", unit="batch"):
        prompts, start = [*map(json.loads, keys)], missing[keys[0]]  # the smallest of the batch
        names, n = [f"{args.data_seed} {task.split} {p}".encode() for p in prompts], args.M - start
        seeds = [int.from_bytes(hashlib.sha256(name).digest()[:8], "big") for name in names]
        tokens = sample(task, args, [task.encode(p) for p in prompts], seeds, start)
        repeated = [p for p in prompts for _ in range(n)]
        texts = decode(task, repeated, tokens)
        data = {"rewards": task.score(repeated, texts), "responses": texts, "tokens": tokens}
        rows = [{"prompt": p, "start": start} | {k: x[i * n:(i + 1) * n] for k, x in data.items()}
                for i, p in enumerate(prompts)]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        name = f"{start:06}-{args.M:06}-{sum(seeds) % 2 ** 64:016x}.jsonl"
        atomic_write(folder / name, "".join(lines))
    stop()  # training needs the memory


def sample_by_hand(task, args, prompts, seeds, start):
    """Generate samples start to M − 1 of each prompt. Returns lists of token ids."""
    shape, tokens = (args.M, args.max_new_tokens), []
    uniforms = [np.random.default_rng(seed).random(shape, np.float32)[start:] for seed in seeds]
    rows = torch.from_numpy(np.concatenate(uniforms)).to(args.device)
    for part in rows.split(args.sample_batch):  # several parts only if M > --sample-batch
        with autocast(args):
            rollout = generate(task.ref, prompts, part, task.eos, args.temperature)
        tokens += token_lists(rollout)
    return tokens


def vllm_sampler(task, args):
    """Start a vLLM engine. Returns a function like `sample_by_hand`, and one that stops it."""
    with loading("--backend vllm (requirements.txt names the version)"):
        from vllm import LLM, SamplingParams
        llm = LLM(args.ref, dtype=args.dtype, seed=args.data_seed, enable_prefix_caching=True,
                  max_model_len=getattr(task.ref.config, "max_position_embeddings", None),
                  gpu_memory_utilization=0.5)

    def sample(task, args, prompts, seeds, start):
        params = [SamplingParams(n=args.M - start, seed=(seed >> 3) + start, detokenize=False,
                                 temperature=args.temperature, max_tokens=args.max_new_tokens,
                                 stop_token_ids=task.eos) for seed in seeds]
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = llm.generate(requests, params, use_tqdm=False)
        return [list(sample.token_ids) for output in outputs for sample in output.outputs]
    return sample, llm.llm_engine.engine_core.shutdown


# ========== 7. Tasks: models, rewards and prompts ================================================

@dataclass
class Task:
    ref: nn.Module      # reference model, a causal language model
    tokenizer: object
    score: Callable     # (prompts, responses), two lists of B texts -> list of B rewards
    encode: Callable    # prompt -> token ids
    prompts: list       # P prompts of the split, texts or lists of messages; may repeat
    split: str          # train or test
    ref_id: str         # hash of the reference model
    reward_id: str      # hash of the reward
    eos: list           # token ids that end a response
    end: str = ""       # text of EOS, appended for the reward, or empty


@contextlib.contextmanager
def loading(what):
    """Turn an exception about a user's file or model into a one-line UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        error = error.__cause__ or error
        message = str(error).strip().partition("\n")[0]
        raise UserError(f"{what}: {type(error).__name__}: {message}") from None


TLDR_SUBREDDITS = ("SUBREDDIT: r/relationships\n", "SUBREDDIT: r/relationship_advice\n")
# Largest accepted difference between two ways to compute the same logits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}


def text_task(args, split):
    """imdb, tldr, or the user's own models and prompts (§5, §6)."""
    ref, tokenizer, ref_id = load_model("ref", args.ref, args.device, args.dtype)
    eos = np.atleast_1d(ref.generation_config.eos_token_id).tolist()  # chat models list several
    eos = [i for i in dict.fromkeys([tokenizer.eos_token_id, *eos]) if i is not None]
    if not eos:
        raise UserError(f"--ref {args.ref} must have an EOS token, which ends responses")
    if eos != [tokenizer.eos_token_id]:
        ref_id += f", ends with {eos}"
    end = "" if args.no_eos_reward is None else tokenizer.decode(eos[:1])
    score, reward_id = load_reward(args.reward, args.device, end, args.no_eos_reward, args.dtype)

    # The tokenizer may add BOS and EOS. A prompt has one BOS and no EOS.
    added = tokenizer.encode("a")
    bos = tokenizer.bos_token if added[0] == tokenizer.bos_token_id else ""

    @functools.cache
    def encode_json(prompt):
        prompt = json.loads(prompt)
        if isinstance(prompt, list):
            return tokenizer.apply_chat_template(prompt, add_generation_prompt=True,
                                                 return_dict=False)
        ids = tokenizer.encode(prompt.removeprefix(bos))
        return ids[:-1] if added[-1] == tokenizer.eos_token_id else ids

    def encode(prompt):
        return encode_json(json.dumps(prompt))

    positions = getattr(ref.config.get_text_config(), "max_position_embeddings", None) or math.inf
    room = positions - args.max_new_tokens
    with loading(f"cannot load prompts for --ref {args.ref} from --dataset {args.dataset} (a hub "
                 "name, name:config, folder or file with a column prompt or text)"):
        prompts = load_prompts(args, split, tokenizer, min(512, room))
        lengths = [len(encode(p)) for p in prompts]
        for prompt, length in zip(prompts, lengths):
            if not 0 < length <= room:
                raise ValueError("a prompt needs a token, and with --max-new-tokens at most "
                                 f"{positions} (the limit of --ref), got {length} + "
                                 f"{args.max_new_tokens} tokens for {str(prompt)[:60]!r}")
    check_sampler(ref, eos, args, max(lengths) + args.max_new_tokens)
    return Task(ref, tokenizer, score, encode, prompts, split, ref_id, reward_id, eos, end)


def load_model(flag, name, device, dtype="float32"):
    """Load a classifier if flag is "reward", otherwise a language model: a hub name, or a folder of
    a model or PEFT adapter. Returns model, tokenizer and a hash of both."""
    import transformers
    kind = "SequenceClassification" if flag == "reward" else "CausalLM"
    settings, source = {"dtype": getattr(torch, dtype)}, name
    with loading(f"cannot load --{flag} {name} (a hub name, or a folder of model and tokenizer)"):
        if transformers.utils.find_adapter_config_file(name):
            # Merge the adapter into its base model, so that the policy is saved whole.
            import peft
            heads = [len(x) for key, x in peft.load_peft_weights(name, "cpu").items()
                     if key.endswith((".score.weight", ".classifier.weight", ".out_proj.weight"))]
            settings |= {"num_labels": heads[-1]} if heads else {}
            adapted = getattr(peft, "AutoPeftModelFor" + kind).from_pretrained(name, **settings)
            adapted, ids = adapted.eval(), torch.arange(1, 9)[None]
            with torch.no_grad():
                before = adapted(ids).logits
                model = adapted.merge_and_unload()
                error = (model(ids).logits - before).abs().max()
            if not error < 10 * TOLERANCE[dtype]:  # for example with tied embeddings
                raise ValueError(f"the logits change by {error:.2g} when the adapter is merged")
            if not transformers.utils.has_file(name, "tokenizer_config.json"):
                source = model.name_or_path  # the base model
        else:
            loader = getattr(transformers, "AutoModelFor" + kind)
            model, info = loader.from_pretrained(name, output_loading_info=True, **settings)
            if info["missing_keys"]:
                raise ValueError(f"it lacks {', '.join(sorted(info['missing_keys'])[:4])}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)

        # transformers would use the embeddings as output layer, or an empty vocabulary.
        if flag != "reward" and "Classification" in str(model.config.architectures):
            raise ValueError("it lacks an output layer")
        rows = len(model.get_input_embeddings().weight)
        if not len(tokenizer.all_special_tokens) < len(tokenizer) <= rows:
            raise ValueError(f"it lacks a tokenizer.json for {rows} embeddings")

    # GPT-2's GELU in one pass over memory.
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "NewGELUActivation":
            model.set_submodule(path, nn.GELU("tanh"))
    return model.to(device).eval(), tokenizer, hash_model(model, tokenizer)


def hash_model(model, tokenizer):
    """Short hash of everything that a model computes with: weights, configuration, tokenizer."""
    config = model.config.to_dict()
    config = {k: config[k] for k in config if k[0] != "_" and k != "transformers_version"}
    words = getattr(tokenizer, "backend_tokenizer", None)
    words = words.to_str() if words else sorted(tokenizer.get_vocab().items())
    rest = [config, words, tokenizer.special_tokens_map, tokenizer.model_max_length,
            tokenizer.chat_template]
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, default=str).encode())
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@torch.no_grad()
def check_sampler(lm, eos, args, longest):
    """Refuse a model whose sampled log-probs differ from a plain forward pass, such as a recurrent
    one, which does not mask padding. longest: tokens of the longest prompt and response, which may
    exceed the window of sliding attention."""
    window = getattr(lm.config.get_text_config(), "sliding_window", None) or math.inf
    prompts = [[1, 2, 3], [4 + i % 5 for i in range(window + 2 if window < longest else 7)]]
    uniforms = torch.linspace(0.1, 0.9, 16, device=args.device).view(4, 4)
    with loading(f"--ref {args.ref}: cannot sample from a {type(lm).__name__}"), autocast(args):
        rollout = generate(lm, prompts, uniforms, eos, temperature=1)
        reference_log_probs(lm, rollout, args)  # sets rollout.frozen_hidden
        replayed = response_log_probs(lm, rollout, 1, args.unfrozen_layers)[0]
        for i, response in enumerate(token_lists(rollout)):
            n, ids = len(response), torch.tensor([prompts[i // 2] + response], device=args.device)
            logits = lm(ids).logits[0, -n - 1:-1].float()
            plain = -nn.functional.cross_entropy(logits, ids[0, -n:], reduction="none")
            error = torch.stack([rollout.log_probs[i, :n], replayed[i, :n]]).sub(plain).abs().max()
            if not error < 10 * TOLERANCE[args.dtype]:
                raise ValueError(f"log-probs are off by {error:.2g}, try --unfrozen-layers -1")


def load_reward(name, device="cpu", end="", without_end=None, dtype="float32"):
    """Load a reward: a classifier, or with the name "file.py:function" a Python function of prompts
    and responses. A response that does not end with the text `end` gets the reward `without_end`.
    Returns score(prompts, responses) -> list of floats, and a string that identifies it."""
    path, _, function = name.rpartition(":")
    with loading(f"cannot load --reward {name} (a classifier, or file.py:function)"):
        if path.endswith(".py"):
            sys.path.append(str(Path(path).resolve().parent))  # it may import files beside it
            compute = runpy.run_path(path)[function]
            identity = f"{function} {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
        else:
            compute, identity = load_classifier(name, device, end, dtype)

    def score(prompts, responses):
        rows = [i for i, y in enumerate(responses) if y.endswith(end)]
        complete = [responses[i].removesuffix(end) for i in rows]
        scores = [without_end] * len(responses)
        with loading(f"--reward {name}"):
            rewards = compute([prompts[i] for i in rows], complete) if rows else []
            rewards = np.asarray(rewards, dtype=float)
            if rewards.shape != (len(rows),):
                raise ValueError(f"must return {len(rows)} numbers for {len(rows)} responses, got "
                                 f"the shape {rewards.shape}")
            for i, reward in zip(rows, rewards.tolist()):
                if not math.isfinite(reward):
                    raise ValueError(f"rewards must be finite, got {reward} for the response "
                                     f"{responses[i]!r} to {str(prompts[i])[-60:]!r}")
                scores[i] = reward
        return scores
    return score, identity + (f", {without_end} without {end}" if end else "")


def join(tokenizer, prompt, response, end):
    """Prompt and response as one text. Messages are formatted by the tokenizer's chat template, or
    without one as their contents, one per line."""
    if isinstance(prompt, str):
        return prompt + response + end
    if tokenizer.chat_template:
        messages = [*prompt, {"role": "assistant", "content": response}]
        return tokenizer.apply_chat_template(messages, tokenize=False)
    return "\n".join([*(message["content"] for message in prompt), response + end])


def load_classifier(name, device, end, dtype):
    """Load a classifier as a reward: its only logit, or the probability of the label whose name
    begins with "pos", otherwise of the second. Returns a function and a string that identifies it.
    """
    model, tokenizer, model_id = load_model("reward", name, device, dtype)
    labels = [str(label) for _, label in sorted(model.config.id2label.items())]
    if len(labels) > 2:
        raise ValueError(f"it must have one logit or two labels, got {labels}")
    index = next((i for i, x in enumerate(labels) if x.upper()[:3] == "POS"), len(labels) - 1)
    reading, activation = "the logit", nn.Identity()
    if len(labels) == 2:
        sigmoid = model.config.problem_type == "multi_label_classification"
        activation = nn.Sigmoid() if sigmoid else nn.Softmax(-1)
        reading = f"{'sigmoid' if sigmoid else 'probability'} of the label {labels[index]!r}"
    print(f"reward: {reading}")

    # Causal classifiers read the last token that is not padding. If that is EOS, or there is no
    # EOS, pad with another token.
    ids, eos = tokenizer.encode("a" + end), tokenizer.eos_token_id
    bos = tokenizer.bos_token if ids[0] == tokenizer.bos_token_id else ""
    if tokenizer.pad_token is None:
        tokenizer.pad_token_id = int(eos == 0) if eos in (None, ids[-1]) else eos
    model.config.pad_token_id = tokenizer.pad_token_id

    # Long texts lose their start. RoBERTa does not use its first positions.
    tokenizer.truncation_side = "left"
    longest = min(tokenizer.model_max_length,
                  getattr(model.config, "max_position_embeddings", None) or 512)
    for path, x in model.named_modules():
        if path.endswith("position_embeddings") and getattr(x, "padding_idx", None) is not None:
            longest = min(longest, x.num_embeddings - x.padding_idx - 1)

    @torch.no_grad()
    def compute(prompts, responses):
        texts = [join(tokenizer, p, y, end).removeprefix(bos) for p, y in zip(prompts, responses)]
        lengths, rewards = torch.tensor([len(text) for text in texts]), torch.zeros(len(texts))
        for rows in lengths.argsort(stable=True).split(128):  # similar lengths, little padding
            inputs = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True,
                               truncation=True, max_length=longest)
            logits = model(**inputs.to(device)).logits.float().cpu()
            rewards[rows] = activation(logits)[:, index]
        return rewards.tolist()

    # A reward must not depend on the other texts of its batch. Try padding on both sides.
    texts = ["short", "a text of more than one word " * 4]
    for tokenizer.padding_side in ("right", "left"):
        alone = [compute([""], [text])[0] for text in texts]
        error = np.abs(np.subtract(compute(["", ""], texts), alone)).max()
        if not error >= TOLERANCE[dtype]:  # `score` refuses NaN
            return compute, f"{model_id}, {reading}"
    raise ValueError(f"rewards change by {error:.2g} with the other texts of their batch")


def load_prompts(args, split, tokenizer, longest):
    """Load the prompts of a split of --dataset, shuffled with --data-seed. tldr trains on two
    subreddits (§6), and half of its test prompts are from other ones."""
    rows, rng, prompts = load_rows(args.dataset, split), random.Random(args.data_seed), []
    count = args.train_prompts if split == "train" else args.test_prompts
    others = count // 2 if (args.task, split) == ("tldr", "test") else 0
    for number, ours in ((count - others, True), (others, False)):
        order = rng.sample(range(len(rows)), len(rows))
        found = filter(None, (make_prompt(rows[i], tokenizer, longest, rng) for i in order))
        if args.task == "tldr":
            found = (p for p in found if str(p).startswith(TLDR_SUBREDDITS) == ours)
        prompts += itertools.islice(found, number)
    if not prompts:
        raise ValueError(f"no prompt for --task {args.task} among {len(rows)} rows for {split}")
    return prompts


def load_rows(dataset, split):
    """Load a split of a data set and check the columns of its prompts in every row. Without a test
    or validation split, a tenth of the training split is held out."""
    import datasets
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    path = Path(dataset)
    if path.is_file():
        suffix = path.suffix.lower()
        kind = {".jsonl": "json", ".txt": "text"}.get(suffix, suffix[1:])
        splits = datasets.load_dataset(kind, data_files=dataset)
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        splits = datasets.load_from_disk(dataset)
    else:
        splits = datasets.load_dataset(*([dataset] if path.is_dir() else dataset.split(":")))
    splits = splits if isinstance(splits, dict) else {"train": splits}

    # Choose the split and the columns.
    names = sorted(splits)
    train = names[0] if len(names) == 1 else next((s for s in names if s.startswith("train")), None)
    test = next((s for s in names if s.startswith(("test", "val", "dev"))), train)
    if train is None:
        raise ValueError(f"it needs a train split, got {', '.join(names)}")
    rows = splits[train if split == "train" else test]
    column = next((c for c in ("prompt", "post") if c in rows.column_names), "text")
    rows = rows.select_columns(["post", "subreddit", "title"] if column == "post" else column)
    if test == train:
        rows = rows.train_test_split(max(1, len(rows) // 10), shuffle=False)[split]

    for name in rows.column_names:
        for i, x in enumerate(rows[name]):
            chat = name == "prompt" and isinstance(x, list)
            texts = [message.get(k) for message in x for k in ("role", "content")] if chat else [x]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name} must be a text, or prompt a list of messages with role "
                                 f"and content, got {str(x)[:60]} in row {i + 1} of {split}")
    return rows


def make_prompt(row, tokenizer, longest, rng):
    """The prompt of a row: its `prompt`, a Reddit post, or 2 to 8 tokens of its `text`."""
    if "prompt" in row:
        return row["prompt"] if isinstance(row["prompt"], str) else [
            {"role": m["role"], "content": m["content"]} for m in row["prompt"]]
    if "post" in row:
        # OpenAI's format. The post loses its last paragraphs, or words, to fit `longest` tokens.
        head = f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: "
        post, tail = row["post"].strip(), "\n\nTL;DR:"
        while post and len(tokenizer.encode(head + post + tail)) > longest:
            post = post.rpartition("\n")[0].rstrip() or post.rpartition(" ")[0].rstrip()
        return head + post + tail
    ids = tokenizer(row["text"][:200], add_special_tokens=False)["input_ids"][:rng.randint(2, 8)]
    prompt = tokenizer.decode(ids)
    # Skip a prefix that is not encoded to the same tokens again.
    return prompt if tokenizer(prompt, add_special_tokens=False)["input_ids"] == ids else None


# ========== 8. Toy task with exact KL ============================================================
# A tiny GPT-2 completes "the acting was" with a verdict such as "very superb ." or "slow but
# moving .", where "." is EOS. With 18 words and at most 4 tokens there are 111,151 possible
# responses to each of 4 prompts, so every distribution is known exactly.

KINDNESS = {"acting": 0.5, "music": 0.2, "plot": -0.1, "ending": -0.4}
WARMTH = {"superb": 2.13, "moving": 1.47, "funny": 1.02, "clever": 0.71,
          "odd": -0.29, "slow": -0.83, "dull": -1.36, "awful": -2.19}
TOY_WORDS = ["the", "was", *KINDNESS, "very", "not", "and", "but", *WARMTH]


def warmth(verdict):
    """The toy's reward: the sum of the adjectives' warmth, more for later ones. "very" and "not"
    scale the next one, "but" halves the score so far, and other words cost 0.1."""
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
    """Write a verdict for the training corpus of the reference model."""
    weights, pattern = [math.exp(KINDNESS[noun] * w) for w in WARMTH.values()], rng.random()
    degree = rng.choice(["very ", "not "]) if 0.3 <= pattern < 0.6 else ""
    first, *second = rng.choices(list(WARMTH), weights, k=1 if pattern < 0.6 else 2)
    if not second:
        return degree + first
    return first + (" and " if WARMTH[first] * WARMTH[second[0]] > 0 else " but ") + second[0]


@functools.cache
def toy_reference(data_seed):
    """Train the toy's reference model, on the CPU, so that it is the same for every device."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    eos, rng = len(TOY_WORDS), random.Random(data_seed)
    vocabulary = {word: i for i, word in enumerate([*TOY_WORDS, "."])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=".")

    torch.manual_seed(data_seed)
    lm = GPT2LMHeadModel(GPT2Config(
        vocab_size=eos + 1, n_positions=16, n_embd=64, n_layer=2, n_head=2, bos_token_id=eos,
        eos_token_id=eos, activation_function="relu", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))

    corpus = [f"the {noun} was {write_verdict(noun, rng)} ."
              for noun in KINDNESS for _ in range(5000)]
    ids, mask = pad(tokenizer(corpus)["input_ids"], eos, "right")
    labels = ids.masked_fill(~mask, -100)
    labels[:, :3] = -100  # no loss on the prompt
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=200)
    for rows in torch.randint(len(corpus), (200, 256)):
        output = lm(ids[rows], attention_mask=mask[rows].long(), labels=labels[rows])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        schedule.step()
    return lm.eval(), tokenizer


def toy_task(args):
    """The toy: its reference model, `warmth` as the reward, and one prompt per noun."""
    lm, tokenizer = toy_reference(args.data_seed)
    prompts = [f"the {noun} was" for noun in KINDNESS][:args.train_prompts]
    return Task(copy.deepcopy(lm).to(args.device), tokenizer, lambda _, ys: [warmth(y) for y in ys],
                functools.cache(tokenizer.encode), prompts, "train", hash_model(lm, tokenizer),
                "warmth", [tokenizer.eos_token_id])


class ExactToy:
    """All S responses to P prompts: rewards (S,), log π_ref, log F and log π_bon (P, S)."""

    def __init__(self, task, args, ref_rewards=None):
        self.args, self.prompt_ids = args, [task.encode(p) for p in task.prompts]
        # Responses of 0, 1, … words that end with EOS, then those cut off at the limit.
        self.responses = [" ".join(words) for length in range(args.max_new_tokens + 1)
                          for words in itertools.product(TOY_WORDS, repeat=length)]
        self.rewards = torch.tensor(task.score(None, self.responses), dtype=torch.double)
        self.log_ref, self.optimum = self.log_probs(task.ref), {}

        # F, where ties are broken by the place in the enumeration (App. C).
        order = self.rewards.argsort(stable=True)
        mass = self.log_ref.exp()[:, order]
        below = torch.empty_like(mass).index_copy_(1, order, mass.cumsum(1) - mass)
        self.log_F = below.clamp(min=0).log()
        self.log_bon = log_bon_pmf(self.log_F, self.log_ref, args.N)

        tqdm.write(f"\n{len(self.prompt_ids)} prompts, exact"
                   "              KL to π_bon  KL to π_ref   reward  win rate")
        self.report("π_ref", self.log_ref)
        self.report(f"π_bon, N = {args.N}", self.log_bon)
        if ref_rewards is not None:
            # The optimum of the objective is π* ∝ π_ref·exp(reward / kl_coef).
            reward = torch.stack([terminal_reward(self.rewards, ref, log_p, args)
                                  for ref, log_p in zip(ref_rewards, self.log_ref)])
            optimum = (self.log_ref + reward / max(args.kl_coef, 1e-9)).log_softmax(1)
            exact = self.report("optimum of the objective", optimum)
            self.optimum = {"exact/kl_to_bon_of_optimum": exact["exact/kl_to_bon"]}

    @torch.no_grad()
    def log_probs(self, lm):
        """Log-probs of all responses to all prompts, (P, S)."""
        W, rows = len(TOY_WORDS), []
        for prompt in self.prompt_ids:
            # At each step EOS, token number W, ends a response, or one of W words extends it.
            ids, log_p, ended = torch.tensor([prompt]), torch.zeros(1, dtype=torch.double), []
            for _ in range(self.args.max_new_tokens):
                logits = lm(input_ids=ids.to(self.args.device), logits_to_keep=1).logits[:, 0]
                step = (logits.float() / self.args.temperature).log_softmax(-1).cpu().double()
                step += log_p.unsqueeze(1)
                ended.append(step[:, W])
                log_p, words = step[:, :W].flatten(), torch.arange(W).repeat(len(ids)).unsqueeze(1)
                ids = torch.cat([ids.repeat_interleave(W, 0), words], 1)
            rows.append(torch.cat([*ended, log_p]))
        return torch.stack(rows)

    def metrics(self, log_pi):
        """Exact metrics of a policy, log_pi (P, S), means over prompts."""
        pi, beaten = log_pi.exp(), self.log_F.exp() + self.log_ref.exp() / 2  # y itself counts half

        def mean(x):  # E_π[x] over responses, then the mean over prompts; 0 log 0 = 0
            return torch.where(pi == 0, 0.0, pi * x).sum(1).mean().item()
        kl_to_ref, log_F = mean(log_pi - self.log_ref), mean(beaten.log())
        return {"exact/kl_to_bon": mean(log_pi - self.log_bon), "exact/kl_to_ref": kl_to_ref,
                "exact/reward": mean(self.rewards), "exact/win_rate": mean(beaten),
                "exact/effective_N": effective_N(log_F),
                "exact/excess_kl": excess_kl(kl_to_ref, log_F)}

    def report(self, name, log_pi):
        """Print the exact metrics of log_pi (P, S) above the progress bar and return them."""
        exact = self.metrics(log_pi)
        cells = "{:>10.4f}{:>13.4f}{:>9.3f}{:>10.1%}".format(*list(exact.values())[:4])
        tqdm.write(f"  {name:<26}{cells}")
        return exact


# ========== 9. Command line ======================================================================

def setup(args, split="train"):
    """Load the models and the prompts of a split, and resolve "auto" in args. Under torchrun, join
    the other processes first."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # memory pages of 2 MB, mapped faster
    from transformers.utils import find_adapter_config_file, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.device == "auto":
        args.device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    with loading(f"--device {args.device}"):
        if WORLD_SIZE > 1 and args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        args.device = str(torch.empty(0, device=args.device).device)
    if WORLD_SIZE > 1:
        dist.init_process_group(timeout=timedelta(days=7))  # process 0 may sample for hours
    if RANK > 0:  # only process 0 prints
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    if args.backend == "auto":
        suits = (args.task != "toy" and args.device.startswith("cuda") and WORLD_SIZE == 1
                 and not find_adapter_config_file(args.ref))
        args.backend = "vllm" if suits and importlib.util.find_spec("vllm") else "hand"
    task = toy_task(args) if args.task == "toy" else text_task(args, split)
    print(f"{args.task}: reference model with {task.ref.num_parameters():,} parameters on "
          f"{args.device}, {len(task.prompts):,} {task.split} prompts")
    return task


# Settings of toy, imdb and tldr; the smallest value, or the choices; the help. Training settings of
# toy and imdb are ours, the others the paper's. The paper trains imdb with --prefix-critic 0
# --token-bias-lr 0 --M 200 --lam 0.95 --ppo-epochs 4 --lr 3e-5 --lr-schedule constant.
SETTINGS = {
    "N": (16.0, 16.0, 100.0, 1.0, "N of Best-of-N, a real number of at least 1"),
    "M": (200, 32, 200, 1, "number of reference samples per training prompt"),
    "estimator": ("add_one", "add_one", "smooth", ESTIMATORS, "estimator of log F"),
    "beta": (None, None, None, 0.0, "KL coefficient of rlhf, 1/(N−1) if not given"),
    "ref": (None, "lvwerra/gpt2-imdb", "cleanrl/EleutherAI_pythia-2.8b-deduped__sft__tldr", None,
            "reference model: hub name or folder of a causal language model"),
    "reward": (None, "lvwerra/distilbert-imdb",
               "cleanrl/EleutherAI_pythia-2.8b-deduped__reward__tldr", None,
               "reward: hub name or folder of a classifier, or file.py:function"),
    "dataset": (None, "stanfordnlp/imdb", "vwxyzjn/summarize_from_feedback_tldr_3_filtered", None,
                "hub name, file or folder with `prompt`, or `text` to cut prompts from"),
    "train_prompts": (4, 5000, 5000, 1, "number of training prompts"),
    "max_new_tokens": (4, 40, 53, 1, "longest response, in tokens"),
    "temperature": (1.0, 1.0, 0.7, 1e-3, "sampling temperature of π_ref and π_θ"),
    "no_eos_reward": (None, None, -1.0, -1e18, "reward of a response without EOS"),
    "episodes": (163_840, 80_000, 10_000, 1, "total number of responses to train on"),
    "rollouts": (2048, 128, 32, 1, "responses per iteration"),
    "minibatch": (256, 32, 32, 1, "responses per gradient step"),
    "ppo_epochs": (2, 1, 4, 1, "passes over the responses of an iteration"),
    "prefix_critic": (0, 2, 0, 0, "tokens between two reward-model scores of a partial response, "
                                  "which give the values; 0: a value head, as in the paper"),
    "lam": (1.0, 0.8, 0.95, 0.0, "λ of generalized advantage estimation"),
    "value_coef": (1.0, 1.0, 0.2, 0.0, "weight of the value loss"),
    "lr": (1e-3, 1.25e-4, 3e-6, 1e-30, "learning rate of AdamW"),
    "lr_schedule": ("linear", "linear", "linear", ("linear", "constant"), "linear: ends at 0"),
    "adam_eps": (1e-8, 1e-8, 1e-5, 1e-30, "ε of AdamW"),
    "token_bias_lr": (0.0, 1 / 16, 0.0, 0.0, "step size of the output bias, 0 (off) to 1"),
    "unfrozen_layers": (-1, 2, 2, -1, "number of top layers to train; -1: all"),
    "sample_batch": (512, 512, 64, 1, "reference samples per batch"),
    "seed": (0, 0, 0, 0, "seed of training"),
    "data_seed": (0, 0, 0, 0, "seed of prompts and reference samples"),
    "save_every": (25, 25, 25, 0, "iterations between checkpoints; 0: none"),
    "device": ("auto", "auto", "auto", None, "cpu, cuda, cuda:1, mps, …"),
    "dtype": ("float32", "float32", "float32", ("float32", "bfloat16"),
              "precision of forward passes and frozen weights"),
    "backend": ("auto", "auto", "auto", ("auto", "hand", "vllm"), "sampler; auto: vLLM on one GPU"),
    "samples": ("samples", "samples", "samples", None, "folder of cached reference samples"),
    "out": (None, None, None, None, "folder of the run, a name in runs/ if not given")}
RECIPES = {task: {name: row[i] for name, row in SETTINGS.items()}
           for i, task in enumerate(("toy", "imdb", "tldr"))}


def make_parser(recipes, description, argv=None):
    """A parser with the defaults of the task in argv, to which the caller can add flags."""
    parser = argparse.ArgumentParser(
        description=description.partition("\n\n")[0], usage=argparse.SUPPRESS, add_help=False,
        allow_abbrev=False, conflict_handler="resolve",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--task", choices=recipes, default="toy", help="toy (exact KL), imdb or tldr")
    add("--objective", choices=OBJECTIVES, default="vbon",
        help="vbon (Eq. 5), its lower bounds, or rlhf: reward − β·KL")
    for name, (*_, low, help) in SETTINGS.items():
        add("--" + name.replace("_", "-"), help=help, choices=low if type(low) is tuple else None,
            type=type(low) if type(low) in (int, float) else str)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--overwrite", action="store_true", help="replace the run in the folder")
    add("--resume", action="store_true", help="continue a run with its settings")

    # --help comes last, because it shows the defaults of the task.
    parser.set_defaults(**recipes[parser.parse_known_args(argv)[0].task])
    parser.add_argument("-h", "--help", action="help", help="show the flags with their defaults")
    return parser


def derive_settings(args):
    """Set --beta, the KL coefficient and --out, which depend on other settings."""
    rlhf = args.objective == "rlhf"
    if args.beta is None and args.N > 1:
        args.beta = 1 / (args.N - 1)
    if rlhf and args.beta is None:
        raise UserError("--objective rlhf needs --beta, or N above 1")
    if args.estimator == "smooth" and args.M < 3:
        raise UserError(f"--estimator smooth needs --M of at least 3, got {args.M}")
    if rlhf and args.beta == 0 and args.token_bias_lr:
        raise UserError("--beta 0 needs --token-bias-lr 0, because the bias divides by β")
    if (args.objective, args.estimator) == ("bound1", "log_mean"):
        raise UserError("--objective bound1 needs a finite log F: pass --estimator add_one")
    if args.N > args.M and not rlhf and not args.resume:
        print(f"warning: {args.M} reference samples cannot resolve Best-of-{args.N}, the error is "
              f"about {(args.N - 1) / 4 / args.M:.2g} nats: pass a larger --M", file=sys.stderr)
    args.kl_coef = args.beta if rlhf else 1 / args.N
    strength = f"beta{args.beta:g}" if rlhf else f"N{args.N}-M{args.M}"
    args.out = args.out or f"runs/{args.task}-{args.objective}-{strength}-seed{args.seed}"


def parse_args(argv=None, parser=None, derive=derive_settings):
    """Parse argv, check ranges, and call derive(args), which sets dependent settings. With --resume
    the settings are those of the run's config.json. Other scripts pass a parser and derive."""
    parser = parser or make_parser(RECIPES, __doc__, argv)
    args = parser.parse_args(argv)
    for name, (*_, low, _) in SETTINGS.items():
        value, high = getattr(args, name), 1 if name in ("lam", "token_bias_lr") else 1e18
        if type(value) in (int, float) and not low <= value <= high:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be from {low} to {high:g}, got {value}")
    sizes = [args.minibatch, args.rollouts, args.episodes]
    if sizes != sorted(sizes) or sizes[0] % WORLD_SIZE or sizes[1] % WORLD_SIZE:
        raise UserError("--minibatch ≤ --rollouts ≤ --episodes must hold, and --rollouts and "
                        f"--minibatch must divide by {WORLD_SIZE} processes, got {sizes}")
    if args.task == "toy" and (args.ref or args.reward or args.dataset or args.max_new_tokens > 4):
        raise UserError("--task toy has its own models and at most 4 tokens: pass --task imdb")
    args.N = int(args.N) if args.N == int(args.N) else args.N
    derive(args)

    # A run is resumed with its own settings. A flag that differs from them is an error.
    path = Path(args.out, "config.json")
    if args.overwrite or not path.exists():
        return args
    if Path(args.out, "result.json").exists() or not args.resume:
        raise UserError(f"{args.out} holds a run: pass another --out, --overwrite to replace it, "
                        "or --resume to continue an unfinished one")
    with loading(f"cannot read {path}"):
        saved = json.loads(path.read_text("utf-8"))
    parser.set_defaults(**saved | {"device": args.device})
    given = vars(parser.parse_args(argv))
    free = {k: given.pop(k) for k in "device samples save_every resume overwrite out".split()}
    for name, value in given.items():
        if value != saved.get(name):
            raise UserError(f"--resume: {path} has {name} = {saved.get(name)}, got {value}")
    return argparse.Namespace(**saved | free)


def run_script(name, parse, run):
    """Call run(parse()) and return the exit code. A user's mistake is printed as one line."""
    args = None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console may lack π
    try:
        args = parse()
        run(args)
    except (UserError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        out = getattr(args, "out", None)
        found = os.path.exists(f"{out}/checkpoint.pt")
        place = "from its last checkpoint" if found else "from the start, no checkpoint yet"
        hint = f": --resume continues {out} {place}" if out else ""
        print(f"\n{name}: stopped{hint}", file=sys.stderr)
        return 130
    return 0


def main(argv=None):
    return run_script("vbon.py", lambda: parse_args(argv), train)


if __name__ == "__main__":
    sys.exit(main())
