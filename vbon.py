#!/usr/bin/env python3
"""Variational Best-of-N alignment (vBoN), from scratch, in one file.

Best-of-N draws N responses y ~ π_ref(·|x), scores them with a reward r and keeps the best. vBoN fine-tunes a policy
π_θ so that ONE sample from it is distributed like that best one: it minimizes KL(π_θ ‖ π_bon) with PPO.
(Amini, Vieira, Ash, Cotterell: "Variational Best-of-N Alignment", ICLR 2025. Equation numbers below are theirs.)

    python vbon.py                                     # toy: nothing to download, π_bon known exactly, about two minutes
    python vbon.py --task imdb --N 16                  # the paper's sentiment task, from the Hugging Face hub
    python vbon.py --task imdb --N 16 --ref DIR --reward DIR --dataset DIR     # the same with your own pieces
    python vbon.py --objective rlhf --beta 0.1         # the baseline: KL-constrained RL with the same PPO
    python vbon.py --help                              # every flag, its meaning and its default in each task

The file reads from top to bottom:  1 mathematics  ·  2 settings  ·  3 tasks  ·  4 sampling  ·  5 log F  ·  6 PPO  ·
7 training and evaluation  ·  8 plumbing (files, loading, vLLM, several processes), which you may pass over; of what is there,
`reference_samples` draws and stores the M samples and `decode` makes texts of tokens. Section 1 and the losses of section 6 are
pure functions of tensors: copy them out as they are.
All logarithms are natural (nats). B is a batch of responses, T a number of tokens, V the vocabulary, P prompts.
"""
import argparse
import copy
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

# ======================================================================================================================
# 1. The mathematics
# ======================================================================================================================


def log_bon_pmf(log_F, log_p, N):
    """log π_bon(y), the exact log-probability that Best-of-N returns the response y (Prop. 1, Eq. 4), in nats.

    π_bon(y) = (F + p)^N − F^N: all N samples rank at most as high as y, but not all of them strictly lower. The paper
    writes it as the binomial sum Σ_i C(N,i) F^(N−i) p^i, which is the same number but costs O(N) and overflows.

    log_F: log P(r(y') < r(y)) under π_ref, −inf for the worst response. log_p: log π_ref(y), EOS included, prompt not.
    N: real, at least 1. All broadcast. Relative accuracy 1e-10 in float64 (absolute below 1), differentiable.
    Raises ValueError where N < 1.
    """
    log_F, log_p = torch.as_tensor(log_F), torch.as_tensor(log_p)
    N = torch.as_tensor(N, dtype=torch.result_type(log_F, log_p), device=log_p.device)
    if not (N >= 1).all():
        raise ValueError(f"N must be at least 1, not {N.min().item():g}")
    # log(F + p). Where the sum is near 1 its log is near 0, and N times a rounding error would show: there as log1p((e^high − 1) + e^low).
    # (The clamp changes nothing there; it keeps the other rows, and their gradients, finite.)
    high, low = torch.maximum(log_F, log_p), torch.minimum(log_F, log_p)
    near_one = torch.log1p(torch.expm1(high.clamp(min=-1)) + torch.exp(low))
    log_sum = torch.where(high > -0.7, near_one, torch.logaddexp(log_F, log_p))
    # log π_bon = N log(F+p) + log(1 − (F/(F+p))^N) = N log(F+p) + log(−expm1(−N log1p(e^d))), with d = log p − log F.
    # A real response has log p = −50 … −1000 and log F = 0 … −7, so e^d may underflow: then the second term is log N + d.
    d = torch.where(log_F == -torch.inf, torch.inf, log_p - log_F)
    underflow = -600.0 if d.dtype == torch.float64 else -80.0
    log_not_all_below = torch.log(-torch.expm1(-N * torch.logaddexp(d.clamp(min=underflow), torch.zeros_like(d))))
    return N * log_sum + torch.where(d < underflow, torch.log(N) + d, log_not_all_below)


def bon_kl(N):
    """KL(π_bon ‖ π_ref) = log N − (N−1)/N nats for a continuous reward; an upper bound when single responses have mass."""
    return math.log(N) - (N - 1) / N


def bon_win_rate(N):
    """P(the best of N beats one more sample of π_ref) = N/(N+1) for a continuous reward."""
    return N / (N + 1)


ESTIMATORS = ("log_mean", "add_one", "posterior")


def estimate_log_F(rewards, ref_rewards, estimator="add_one", order=None, ref_order=None):
    """Monte Carlo estimate of log F(y) = log P(r(y') < r(y)), y' ~ π_ref, from M samples of the same prompt (Eq. 6, 7).

    rewards: (...). ref_rewards: (..., M), or (M,) for all. Returns log F̂ (...), float64, nats. With k = #{m : r'_m < r}:
      "log_mean"   log(k/M)          the paper's: the log of the mean. Consistent, biased, −inf at k = 0
      "add_one"    log((k+1)/(M+1))  the authors' code: always finite
      "posterior"  ψ(k+1) − ψ(M+2)   E[log F | k], exact when y ~ π_ref, since then F | k ~ Beta(k+1, M−k+1)
    Only ranks enter, so a strictly increasing map of all rewards changes nothing, not even a bit (App. C).
    order (...), ref_order (..., M): breaks ties by a total order; tied samples that come earlier then count as lower.
    Raises ValueError for another estimator, M = 0, a NaN, or one order without the other.
    """
    rewards, ref_rewards = torch.as_tensor(rewards), torch.as_tensor(ref_rewards)
    M = ref_rewards.shape[-1]
    if M == 0:
        raise ValueError("estimate_log_F needs at least one reference reward per prompt (M ≥ 1)")
    if rewards.isnan().any() or ref_rewards.isnan().any():
        raise ValueError("a reward is NaN: it has no rank")
    if (order is None) != (ref_order is None):
        raise ValueError("order and ref_order go together")
    if order is not None:  # one integer key per sample that sorts by (reward, order)
        def rank(a, b):
            ranks = torch.unique(torch.cat([a.flatten(), b.flatten()]), return_inverse=True)[1]
            return ranks[:a.numel()].view(a.shape), ranks[a.numel():].view(b.shape)
        (r, ref_r), (o, ref_o) = rank(rewards, ref_rewards), rank(torch.as_tensor(order), torch.as_tensor(ref_order))
        rewards, ref_rewards = r * (o.numel() + ref_o.numel()) + o, ref_r * (o.numel() + ref_o.numel()) + ref_o
    dtype = torch.promote_types(rewards.dtype, ref_rewards.dtype)  # compared exactly: the narrower is widened, never the wider rounded
    ascending = ref_rewards.to(dtype)
    if (ascending[..., 1:] < ascending[..., :-1]).any():  # a caller that keeps them sorted pays for it once only
        ascending = ascending.sort(-1).values
    if ascending.ndim == 1:
        k = torch.searchsorted(ascending, rewards.to(dtype).contiguous())
    else:
        shape = torch.broadcast_shapes(rewards.shape, ascending.shape[:-1])
        ascending, values = ascending.expand(*shape, M), rewards.to(dtype).expand(shape)
        k = torch.searchsorted(ascending.contiguous(), values.unsqueeze(-1).contiguous()).squeeze(-1)
    k = k.double()
    if estimator == "log_mean":
        return torch.log(k / M)
    if estimator == "add_one":
        return torch.log((k + 1) / (M + 1))
    if estimator == "posterior":
        return torch.digamma(k + 1) - torch.digamma(torch.full_like(k, M + 2))
    raise ValueError(f"unknown estimator {estimator!r}: choose from {', '.join(ESTIMATORS)}")


def fit_log_F(ref_rewards):
    """The paper's smoothing of log F for summarization (§6): least-squares a, b of f(r) = −a·exp(−b·r), a > 0, b > 0.

    The curve is fitted to (sorted rewards, log F̂ by add_one). ref_rewards: (..., M). Returns a, b, each (...), float64;
    `smooth_log_F(r, a, b)` evaluates. For a given b the best a is in closed form, so that only b is searched for:
    a grid over its scale, then golden sections. Raises ValueError for M < 3 or a non-finite reward.
    """
    r = torch.as_tensor(ref_rewards).double().sort(-1).values
    M = r.shape[-1]
    if M < 3 or not r.isfinite().all():
        raise ValueError("fit_log_F needs at least 3 finite reference rewards per prompt")
    y = estimate_log_F(r, r.unsqueeze(-2).expand(*r.shape, M)) if r.ndim > 1 else estimate_log_F(r, r)
    scale = r.std(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    z = (r - r[..., :1]) / scale  # from 0 up, so that no exponential overflows

    def solve(log_b):  # (...,) -> the best a for this b, and the squared error that is left
        e = torch.exp(-log_b.exp().unsqueeze(-1) * z)
        a = -(y * e).sum(-1) / (e * e).sum(-1)
        return a, (y + a.unsqueeze(-1) * e).square().sum(-1)

    grid = torch.linspace(-7, 7, 57, dtype=r.dtype, device=r.device)
    errors = torch.stack([solve(b.expand(r.shape[:-1]))[1] for b in grid])
    best = grid[errors.argmin(0)]
    low, high = best - 0.25, best + 0.25
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - golden * (high - low), low + golden * (high - low)
        go_left = solve(left)[1] < solve(right)[1]
        low, high = torch.where(go_left, low, left), torch.where(go_left, right, high)
    log_b = (low + high) / 2
    a, b = solve(log_b)[0], log_b.exp() / scale.squeeze(-1)
    a = a * torch.exp(b * r[..., 0])
    if not a.isfinite().all():
        raise ValueError("a = exp(b·r) overflows: the rewards lie far from 0 for their spread; subtract their mean first")
    return a, b


def smooth_log_F(rewards, a, b):
    """The curve that `fit_log_F` found: log F ≈ −a·exp(−b·r), in nats. All broadcast."""
    return -a * torch.exp(-b * torch.as_tensor(rewards))


OBJECTIVES = ("vbon", "bound", "bound1", "rlhf")


def vbon_reward(log_F, log_p, N, objective="vbon"):
    """What a response earns at its end, in nats. With a KL penalty of 1/N on every token it makes PPO maximize the objective:

      −KL(π_θ ‖ π_bon) = E_{π_θ}[log π_bon(y) − log p(y)] − KL(π_θ ‖ π_ref),   p = π_ref,   all of it divided by N,

    which leaves the optimum alone and keeps rewards at one scale for every N. Before the division the reward is for
      "vbon"    log π_bon(y) − log p         the objective itself                       (Eq. 5)
      "bound"   (N−1) log F                  a lower bound of it, L                     (Thm. 2, Eq. 8)
      "bound1"  γ log F + (β−1) log p        a lower one, L1; γ = N(N−1)/2, β = N(N+1)/2  (Thm. 3, Eq. 16)
    log_F, log_p as in `log_bon_pmf`. Raises ValueError for another objective.
    """
    log_F, log_p = torch.as_tensor(log_F), torch.as_tensor(log_p)
    weighted_log_F = torch.zeros_like(log_F) if N == 1 else (N - 1) / N * log_F  # at N = 1 even F = 0 has no weight
    if objective == "vbon":
        return (log_bon_pmf(log_F, log_p, N) - log_p) / N
    if objective == "bound":
        return weighted_log_F + torch.zeros_like(log_p)
    if objective == "bound1":
        return N / 2 * weighted_log_F + (N * (N + 1) / 2 - 1) / N * log_p
    raise ValueError(f"unknown objective {objective!r}: choose from vbon, bound, bound1")


# ======================================================================================================================
# 2. Settings: every flag, its meaning and its default in each task
# ======================================================================================================================


class UserError(Exception):
    """Something that the user can mend. `main` prints it as one line and exits with code 2."""


def flag(help, default=None, choices=None, low=None, above=None, high=None, **per_task):
    """A dataclass field with its help text and what it may be; defaults that depend on the task go by the task's name."""
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, above=above, high=high, per_task=per_task))


def number(text):
    """'16' -> 16, '2.5' -> 2.5: N may be any real number, and whole ones should look whole."""
    value = float(text)
    return int(value) if value.is_integer() else value


TASKS = ("toy", "imdb", "tldr")


@dataclass
class Args:
    task: str = flag("what to align: toy (exact, nothing to download), imdb (positive reviews), tldr (summaries of posts)", "toy", TASKS)
    objective: str = flag("vbon (Eq. 5), its bounds L and L1, or rlhf: reward − β·KL", "vbon", OBJECTIVES)
    N: number = flag("the N of Best-of-N, any real number from 1", low=1, high=1e9, toy=16, imdb=16, tldr=100)
    M: int = flag("samples of π_ref per training prompt that estimate F; vBoN ends about (N−1)/(4M) nats from BoN", 200, low=1)
    estimator: str = flag("how log F is read off the M samples; smooth fits −a·exp(−b·r) to add_one's", None, (*ESTIMATORS, "smooth"),
                          toy="add_one", imdb="add_one", tldr="smooth")
    beta: float = flag("KL coefficient of rlhf; default 1/(N−1), the strength that matches N", low=0, high=1e9)

    ref: str = flag("reference model: a hub name or folder, any causal LM with a KV cache", imdb="lvwerra/gpt2-imdb",
                    tldr="cleanrl/EleutherAI_pythia-2.8b-deduped__sft__tldr")
    reward: str = flag("reward model: a hub name or folder, any classifier with one logit (the reward) or two "
                       "(the reward is the probability of the positive label)", imdb="lvwerra/distilbert-imdb",
                       tldr="cleanrl/EleutherAI_pythia-2.8b-deduped__reward__tldr")
    dataset: str = flag("prompts: a hub name, a folder, or a .jsonl file, with a `prompt` field, or with a `text` field "
                        "to cut prefixes from; tldr takes `subreddit`, `title` and `post` too", imdb="stanfordnlp/imdb",
                        tldr="vwxyzjn/summarize_from_feedback_tldr_3_filtered")
    train_prompts: int = flag("number of training prompts", low=1, toy=4, imdb=5000, tldr=5000)
    test_prompts: int = flag("number of test prompts", low=1, toy=512, imdb=512, tldr=512)
    test_M: int = flag("samples of π_ref per distinct test prompt, which win rates are measured against", low=1, toy=1000, imdb=64, tldr=16)
    max_new_tokens: int = flag("longest response, in tokens", low=1, toy=4, imdb=40, tldr=53)
    temperature: float = flag("sampling temperature; π_ref, π_θ and π_bon are all meant at it", above=0, toy=1.0, imdb=1.0, tldr=0.7)
    no_eos_reward: float = flag("what a response without EOS earns, whatever the reward model says; default: what that says", tldr=-1.0)

    episodes: int = flag("responses that are trained on in all", toy=163_840, imdb=80_000, tldr=10_000)
    rollouts: int = flag("responses per PPO phase", low=1, toy=2048, imdb=128, tldr=32)
    minibatch: int = flag("responses per gradient step", low=1, toy=256, imdb=32, tldr=32)
    ppo_epochs: int = flag("passes over the responses of a phase", low=1, toy=2, imdb=4, tldr=4)
    lr: float = flag("AdamW's learning rate", above=0, toy=1e-3, imdb=3e-5, tldr=3e-6)
    lr_schedule: str = flag("constant, or linear decay to zero", None, ("constant", "linear"), toy="linear", imdb="constant", tldr="linear")
    adam_beta2: float = flag("AdamW's second-moment decay (the first is 0.9)", 0.95, low=0, high=0.99999)
    adam_eps: float = flag("AdamW's ε", low=0, toy=1e-8, imdb=1e-8, tldr=1e-5)
    weight_decay: float = flag("AdamW's weight decay", 1e-6, low=0)
    gamma: float = flag("discount", 1.0, low=0, high=1)
    lam: float = flag("λ of generalized advantage estimation", low=0, high=1, toy=1.0, imdb=0.95, tldr=0.95)
    clip: float = flag("clip range of the policy ratio", 0.2, above=0)
    value_clip: float = flag("clip range of the value function", 0.2, above=0)
    value_coef: float = flag("weight of the value loss", low=0, toy=1.0, imdb=1.0, tldr=0.2)
    reward_clip: float = flag("terminal rewards are clipped to ± this (not those of bound1, which hold log p)", 10.0, above=0)
    unfrozen_layers: int = flag("train the top K layers only and share the rest with π_ref; −1 trains all", toy=-1, imdb=2, tldr=2)

    seed: int = flag("seed of training and of the final evaluation", 0)
    data_seed: int = flag("seed of the prompts, of the M samples and of toy's π_ref: runs that differ in --seed share them", 0)
    device: str = flag("auto, cpu, cuda, cuda:1, mps; auto takes a GPU where there is one", "auto")
    dtype: str = flag("arithmetic of the forward passes; weights stay float32", "float32", ("float32", "bfloat16"))
    out: str = flag("folder of this run; default runs/<task>-<objective>-…-seed<seed>")
    samples: str = flag("file of π_ref's scored samples, read and extended; default samples/<task>-<fingerprint>.jsonl")
    import_samples: str = flag("a file of the authors' lines (prompt, responses, rewards, or prompt, text, reward) to take into --samples")
    backend: str = flag("what samples π_ref: hand (this script), vllm, or auto: vllm where it is installed and a GPU is there", "auto",
                        ("auto", "hand", "vllm"))
    sample_batch: int = flag("responses of π_ref decoded at a time, which sets the memory of sampling", low=1, toy=512, imdb=512, tldr=64)
    eval_every: int = flag("toy: phases between exact evaluations", 10, low=1)
    overwrite: bool = flag("replace a finished run in --out", False)
    save_every: int = flag("phases between checkpoints; 0 for none", low=0, toy=20, imdb=25, tldr=25)
    resume: bool = flag("go on from the last checkpoint in --out; the run ends as if it had never stopped", False)

    def __post_init__(self):
        self.started = time.perf_counter()
        for f in fields(self):
            name, value, may = "--" + f.name.replace("_", "-"), getattr(self, f.name), f.metadata
            if value is None:
                value = may["per_task"].get(self.task)
                setattr(self, f.name, value)
            if may["choices"] and value not in may["choices"]:
                raise UserError(f"{name}: unknown value {value!r}; choose from {', '.join(may['choices'])}")
            low, above, high = may["low"], may["above"], may["high"]
            if value is not None and (low, above) != (None, None) and not (
                    (low is None or value >= low) and (above is None or value > above) and value <= (high or sys.float_info.max)):
                raise UserError(f"{name} must be " + (f"at least {low}" if above is None else f"above {above}")
                                + (f" and at most {high:g}" if high else "") + f", not {value}")
        if self.task == "toy" and self.max_new_tokens > 4:
            raise UserError("toy enumerates 18^T responses: --max-new-tokens at most 4")
        if self.task == "toy" and (self.ref or self.reward or self.dataset):
            raise UserError("--ref, --reward and --dataset go with --task imdb or tldr; toy brings its own")
        if self.task == "toy" and (self.backend == "vllm" or self.no_eos_reward is not None):
            raise UserError("--backend vllm and --no-eos-reward go with --task imdb or tldr")
        self.check()
        if os.path.exists(f"{self.out}/result.json") and not self.overwrite:
            raise UserError(f"{self.out} holds a finished run: pass another --out, or --overwrite to replace it")
        if self.resume and os.path.exists(f"{self.out}/checkpoint.pt"):
            with open(f"{self.out}/config.json", encoding="utf-8") as file:
                started = json.load(file)
            for name, value in asdict(self).items():
                if (name not in PLACES or name == "samples") and started.get(name) != value:
                    raise UserError(f"--resume: {self.out} was started with {name} = {started.get(name)!r}, not {value!r}")

    def check(self):
        """What must hold between the flags of this script, and the defaults that follow from others."""
        if not self.minibatch <= self.rollouts <= self.episodes:
            raise UserError(f"need --minibatch ≤ --rollouts ≤ --episodes, not {self.minibatch}, {self.rollouts}, {self.episodes}")
        if self.beta is None and self.N > 1:
            self.beta = 1 / (self.N - 1)
        if self.objective == "rlhf" and self.beta is None:
            raise UserError("--objective rlhf needs --beta, a number from 0 (or --N above 1, which sets β = 1/(N−1))")
        if self.objective == "bound1" and self.estimator == "log_mean":
            raise UserError("--estimator log_mean is −inf at k = 0, and bound1's rewards are not clipped: use add_one or posterior")
        if self.estimator == "smooth" and self.M < 3:
            raise UserError("--estimator smooth needs --M of at least 3")
        if self.out is None:
            strength = f"beta{self.beta:g}" if self.objective == "rlhf" else f"N{self.N}-M{self.M}"
            self.out = f"runs/{self.task}-{self.objective}-{strength}-seed{self.seed}"


PLACES = ("out", "samples", "device", "overwrite", "save_every", "resume", "eval_every", "import_samples", "backend", "sample_batch")  # where and how a run is made, not what


# ======================================================================================================================
# 3. Tasks: a reference model, a reward, prompts
# ======================================================================================================================


@dataclass
class Task:
    ref: nn.Module                    # π_ref, a causal language model
    tokenizer: object
    score: Callable                   # (prompts, responses), two lists of B texts -> B floats
    encode: Callable                  # a prompt's text -> its token ids
    train_prompts: list               # texts; may repeat
    test_prompts: list
    reward_id: str                    # what identifies the reward in the file of samples
    end: str = ""                     # what marks, in its text, a response that EOS ended; nothing unless the reward must see it


# --- toy: film verdicts of at most four tokens, each one of which can be enumerated -----------------------------------
# A tiny GPT-2 learns to finish "the acting was" with a verdict such as "very superb ." or "slow but moving ." The full
# stop is EOS. With 18 words and at most 4 tokens there are 111 151 possible responses to each prompt, so that π_ref,
# F, π_bon and every distance between distributions are known exactly. Training sees none of that: it works from the M
# samples like the real tasks.

KINDNESS = {"acting": 0.5, "music": 0.2, "plot": -0.1, "ending": -0.4}  # how kind critics are to it
WARMTH = {"superb": 2.13, "moving": 1.47, "funny": 1.02, "clever": 0.71, "odd": -0.29, "slow": -0.83, "dull": -1.36, "awful": -2.19}
TOY_WORDS = ["the", "was", *KINDNESS, "very", "not", "and", "but", *WARMTH]


def warmth(verdict):
    """The toy's reward: how warm a verdict is. 'very' strengthens and 'not' turns the adjective after it, what stands
    before a 'but' counts half, the last word lingers, and any other word is babble."""
    score, strength, adjectives = 0.0, 1.0, 0
    for word in verdict.split():
        if word in WARMTH:
            score += strength * WARMTH[word] * (1 + 0.1 * adjectives)
            strength, adjectives = 1.0, adjectives + 1
        elif word == "very":
            strength *= 1.5
        elif word == "not":
            strength *= -0.6
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
def toy_reference(data_seed, device):
    """The toy's π_ref and its tokenizer: a tiny GPT-2, trained on verdicts in a few seconds, once per process."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    eos = len(TOY_WORDS)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(TOY_WORDS + ["."])}, unk_token="."))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=".")
    torch.manual_seed(data_seed)
    lm = GPT2LMHeadModel(GPT2Config(
        vocab_size=eos + 1, n_positions=16, n_embd=64, n_layer=2, n_head=2, bos_token_id=eos, eos_token_id=eos,
        activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).to(device)
    rng, steps = random.Random(data_seed), 200
    corpus = [f"the {noun} was {write_verdict(noun, rng)} ." for noun in KINDNESS for _ in range(5000)]
    ids, mask = pad(tokenizer(corpus)["input_ids"], eos, "right", device)
    labels = ids.masked_fill(~mask, -100)
    labels[:, :3] = -100  # the prompt is given
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for rows in tqdm(torch.randint(len(corpus), (steps, 256)).to(device), desc="training toy's π_ref", leave=False):
        loss = lm(input_ids=ids[rows], attention_mask=mask[rows].long(), labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(), schedule.step()
    return lm.eval(), tokenizer


def toy_task(args, device):
    """π_ref, warmth as the reward, and one prompt for each noun."""
    lm, tokenizer = toy_reference(args.data_seed, device)
    prompts = [f"the {noun} was" for noun in KINDNESS]
    return Task(lm, tokenizer, lambda prompts, responses: [warmth(r) for r in responses], cache(tokenizer.encode),
                train_prompts=prompts, test_prompts=[prompts[i % len(prompts)] for i in range(args.test_prompts)], reward_id="warmth")


def enumerate_log_p(lm, prompt_ids, args):
    """log π(y) of every response y to one toy prompt, (111151,) float64 nats, in the order of `enumerate_responses`.

    Walks the tree of prefixes level by level: after t words either EOS ends the response or one of W words extends it.
    """
    W, eos, device = len(TOY_WORDS), len(TOY_WORDS), next(lm.parameters()).device
    prefixes, log_p, ended = torch.empty(1, 0, dtype=torch.long), torch.zeros(1, dtype=torch.double), []
    for _ in range(args.max_new_tokens):
        ids = torch.cat([torch.tensor(prompt_ids).expand(len(prefixes), -1), prefixes], 1)
        step = torch.cat([next_token_log_probs(lm, chunk.to(device), args.temperature).cpu().double() for chunk in ids.split(8192)])
        step = step + log_p.unsqueeze(1)
        ended.append(step[:, eos])
        log_p = step[:, :W].flatten()
        prefixes = torch.cat([prefixes.repeat_interleave(W, 0), torch.arange(W).repeat(len(prefixes)).unsqueeze(1)], 1)
    return torch.cat(ended + [log_p])


def next_token_log_probs(lm, ids, temperature):
    """log π(next token | ids), (B, V), for unpadded ids (B, T)."""
    with torch.no_grad():
        return lm(input_ids=ids, logits_to_keep=1).logits[:, 0].float().div(temperature).log_softmax(-1)


def enumerate_responses(max_new_tokens):
    """Every response the toy's model can give: those of 0, 1, … words that EOS ended, then those cut off at the limit."""
    return [" ".join(words) for length in range(max_new_tokens + 1) for words in itertools.product(TOY_WORDS, repeat=length)]


def exact_world(task, args):
    """What only the toy can know: for each prompt and every response log π_ref, log F, log π_bon, (P, S), and r, (S,)."""
    texts = list(dict.fromkeys(task.train_prompts))
    prompts = [task.encode(p) for p in texts]
    responses = enumerate_responses(args.max_new_tokens)
    rewards = torch.tensor(task.score(None, responses), dtype=torch.double)
    log_ref = torch.stack([enumerate_log_p(task.ref, p, args) for p in prompts])
    ascending = rewards.argsort(stable=True)  # by (reward, place in the enumeration): a total order (App. C)
    mass = log_ref.exp()[:, ascending]
    F = torch.empty_like(mass).index_copy_(1, ascending, mass.cumsum(1) - mass)
    log_F = F.clamp(min=0).log()
    return {"texts": texts, "prompts": prompts, "responses": responses, "rewards": rewards, "log_ref": log_ref, "log_F": log_F,
            "log_bon": log_bon_pmf(log_F, log_ref, args.N)}


def exact_optimum(world, ref_rewards, args):
    """log π* (P, S), what perfect training would reach: π* ∝ π_ref·exp(reward/c), with the F̂ of the M samples.

    Its distance from π_bon is the price of the estimate (about (N−1)/(4M) nats), or of another objective than BoN's.
    """
    log_F = torch.stack([log_F_of(world["rewards"], r, args) for r in ref_rewards])
    reward, c = terminal_reward(world["rewards"], log_F, world["log_ref"], args)
    return (world["log_ref"] + reward / max(c, 1e-9)).log_softmax(1)


def exact_metrics(log_pi, world):
    """The exact distances, reward and win rate of a distribution log_pi (P, S) over all responses, averaged over prompts."""
    pi, ref = log_pi.exp(), world["log_ref"].exp()

    def kl(log_q):  # 0 log 0 = 0
        return torch.where(pi == 0, 0.0, pi * (log_pi - log_q)).sum(1).mean().item()
    return {
        "exact/kl_to_bon": kl(world["log_bon"]),
        "exact/kl_to_ref": kl(world["log_ref"]),
        "exact/reward": (pi * world["rewards"]).sum(1).mean().item(),
        "exact/win_rate": (pi * (world["log_F"].exp() + ref / 2)).sum(1).mean().item(),  # a tie counts half
    }


# --- imdb and tldr, and your own models and prompts -------------------------------------------------------------------


def text_task(args, device):
    """π_ref, a classifier of texts as the reward, and prompts, of imdb, tldr or your own (§5, §6)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = load("ref", AutoTokenizer, args.ref)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of --ref {args.ref} has no EOS token, so no response could end: set its eos_token")
    ref = load("ref", AutoModelForCausalLM, args.ref, dtype=torch.float32).to(device).eval()
    end = "" if args.no_eos_reward is None else tokenizer.eos_token
    score, reward_id = load_reward(args.reward, device, end, args.no_eos_reward)
    context = getattr(ref.config, "max_position_embeddings", None) or math.inf
    train, test = read_prompts(args, tokenizer, min(512, context - args.max_new_tokens))
    for prompt in train + test:
        length = len(tokenizer.encode(prompt))
        if length == 0:
            raise UserError("--dataset has an empty prompt, and there is no token to start from: remove it")
        if length + args.max_new_tokens > context:
            raise UserError(f"a prompt of {length} tokens and --max-new-tokens {args.max_new_tokens} exceed the model's "
                            f"context of {context}: {prompt[:60]!r}…")
    return Task(ref, tokenizer, score, cache(tokenizer.encode), train, test, reward_id, end)


def load_reward(name, device, end="", without_end=None):
    """A sequence classifier as a function (prompts, responses) -> rewards, and what identifies it. With `end`, responses
    whose text does not end so earn the fixed reward `without_end`."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    tokenizer = load("reward", AutoTokenizer, name)
    classifier = load("reward", AutoModelForSequenceClassification, name, dtype=torch.float32).to(device).eval()
    if classifier.config.num_labels not in (1, 2):
        raise UserError(f"--reward {name} has {classifier.config.num_labels} labels; a reward has 1 logit or 2 labels")

    def score(prompts, responses):  # of the whole text, as a reader sees it
        ended = [i for i, response in enumerate(responses) if response.endswith(end)]
        rewards = [without_end] * len(responses)
        for i, r in zip(ended, classifier_rewards(classifier, tokenizer, [prompts[i] + responses[i] for i in ended])):
            rewards[i] = r
        return rewards
    return score, fingerprint(classifier) + (f", {without_end} without {end}" if end else "")


@torch.no_grad()
def classifier_rewards(model, tokenizer, texts, batch=128):
    """r(text) for each text: a single logit as it is, or the probability of the positive one of two labels."""
    if tokenizer.pad_token is None:  # causal classifiers read off the last token that is not padding, which may be EOS
        ends_with_eos = tokenizer.eos_token and texts and texts[0].endswith(tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(int(tokenizer.eos_token_id == 0)) if ends_with_eos else tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.truncation_side = "left"  # of a text that is too long the end counts: the response
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
    labels = {str(name).upper()[:3]: i for i, name in model.config.id2label.items()}
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # similar lengths together: little padding
    rewards = torch.empty(len(texts))
    for start in range(0, len(texts), batch):
        rows = by_length[start:start + batch]
        inputs = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True, truncation=True, max_length=longest)
        logits = model(**inputs.to(model.device)).logits.float().cpu()
        rewards[rows] = logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, labels.get("POS", 1)]
    return rewards.tolist()


# ======================================================================================================================
# 4. Sampling: hand-written decoding with a KV cache
# ======================================================================================================================


def pad(rows, value, side, device="cpu"):
    """Lists of token ids -> ids (B, T) padded on the given side, mask (B, T) of what is not padding."""
    T = max(map(len, rows))
    fill = [[value] * (T - len(row)) for row in rows]
    ids = torch.tensor([f + row if side == "left" else row + f for f, row in zip(fill, rows)])
    lengths, column = torch.tensor([len(row) for row in rows]).unsqueeze(1), torch.arange(T)
    mask = column >= T - lengths if side == "left" else column < lengths
    return ids.to(device), mask.to(device)


def forward(lm, ids, mask, keep, cache=None):
    """Logits (B, keep, V) and last hidden states (B, keep, H) at the last `keep` positions of ids (B, T).

    mask (B, cached + T) is false on padding; with a cache, ids are only the tokens that it does not hold yet. Prompt
    positions that no loss needs never pass through the LM head, whose V logits would dwarf everything else in memory.
    """
    hidden = []

    def keep_hidden(_, inputs):  # contiguous: of a slice the head would make B small products instead of a large one
        hidden.append(inputs[0].contiguous())
        return hidden[0]
    head = lm.get_output_embeddings().register_forward_pre_hook(keep_hidden)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]
    try:
        logits = lm(input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache,
                    use_cache=cache is not None, logits_to_keep=keep).logits
    finally:
        head.remove()
    return logits.float(), hidden[0].float()


def sample_tokens(logits, uniforms):
    """One token per row by inverting the CDF at a uniform number: logits (B, V), uniforms (B,) -> tokens, log-probs (B,).

    `torch.multinomial`, which draws V random numbers per row, takes several times as long. Probabilities below 1e-38 count as 1e-38.
    """
    pi = logits.softmax(-1)
    cdf = pi.cumsum(-1)
    total = cdf[:, -1:]  # 1, up to rounding
    below = torch.nextafter(total, torch.zeros_like(total))  # u·total may round up to total, which no token reaches
    tokens = torch.searchsorted(cdf, torch.minimum(uniforms.unsqueeze(1) * total, below), right=True)
    return tokens.squeeze(1), pi.gather(1, tokens).clamp(min=torch.finfo(pi.dtype).tiny).log().squeeze(1)  # a GPU's sum may step on π = 0


@torch.no_grad()
def generate(lm, prompts, uniforms, eos, temperature, value_head=None):
    """Samples B = P·copies responses, `copies` to each of P prompts, and what training needs to know about them.

    prompts: P lists of token ids. uniforms (B, T): the random number behind each token, rows grouped by prompt; so a
    response depends on its own row alone (up to rounding), whatever else is in the batch and whenever that finishes.
    Returns tokens (B, T), mask (B, T) true up to and including EOS, log-probs and values (B, T), zero after it.
    Each prompt is read once and its cache shared out; rows leave the batch as soon as they end.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer
    device, (B, T), copies = uniforms.device, uniforms.shape, len(uniforms) // len(prompts)
    ids, attention = pad(prompts, eos, "left", device)
    kv = DynamicCache(config=lm.config)
    kv.layers = [roomy_layer()() if type(layer) is DynamicLayer else layer for layer in kv.layers]
    logits, hidden = forward(lm, ids, attention, 1, kv)
    if copies > 1:
        kv.batch_repeat_interleave(copies)
        attention, logits, hidden = (x.repeat_interleave(copies, 0) for x in (attention, logits, hidden))
    tokens = torch.full((B, T), eos, device=device)
    mask = torch.zeros(B, T, dtype=torch.bool, device=device)
    log_probs, values = torch.zeros(B, T, device=device), torch.zeros(B, T, device=device)
    rows = torch.arange(B, device=device)  # which responses are still growing
    for t in range(T):
        token, log_prob = sample_tokens(logits[:, -1] if temperature == 1 else logits[:, -1] / temperature, uniforms[rows, t])
        tokens[rows, t], log_probs[rows, t], mask[rows, t] = token, log_prob, True
        if value_head is not None:
            values[rows, t] = value_head(hidden[:, -1]).squeeze(-1).float()
        if t + 1 == T:
            break
        alive = (token != eos).nonzero().squeeze(1)
        if len(alive) < len(rows):
            if len(alive) == 0:
                break
            kv.batch_select_indices(alive)
            rows, token, attention = rows[alive], token[alive], attention[alive]
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], 1)
        logits, hidden = forward(lm, token.unsqueeze(1), attention, 1, kv)
    return tokens, mask, log_probs, values


# ======================================================================================================================
# 5. log F, and the reward that is made of it
# ======================================================================================================================


def log_F_of(scores, ref_rewards, args):
    """log F̂ of scores (...) from rewards (..., M) of π_ref's samples as --estimator says; zeros for rlhf, which has no F."""
    if args.objective == "rlhf":
        return torch.zeros_like(scores)
    if args.estimator != "smooth":
        return estimate_log_F(scores, ref_rewards, args.estimator)
    centre = ref_rewards.mean(-1, keepdim=True)  # the fit is the same wherever 0 is; here nothing overflows
    a, b = fit_log_F(ref_rewards - centre)
    return smooth_log_F(scores - centre.squeeze(-1), a, b)


def terminal_reward(scores, log_F, log_p, args):
    """What a response earns at its end, clipped, and the coefficient c of the per-token KL penalty that goes with it."""
    reward = scores if args.objective == "rlhf" else vbon_reward(log_F, log_p, args.N, args.objective)
    limit = math.inf if args.objective == "bound1" else args.reward_clip  # its log p term is large for every response
    return reward.clamp(-limit, limit), args.beta if args.objective == "rlhf" else 1 / args.N


# ======================================================================================================================
# 6. PPO
# ======================================================================================================================


def masked_mean(x, mask):
    """The mean of x over the tokens where mask is true."""
    return (x * mask).sum() / mask.sum()


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalized advantage estimation (Schulman et al. 2016). All (B, T); mask true on response tokens, false after.

    δ_t = r_t + γ V_{t+1} − V_t,  A_t = δ_t + γλ A_{t+1}; beyond the last token V and A are zero.
    Returns advantages and returns A + V, both (B, T), zero where the mask is false.
    """
    mask = mask.to(values.dtype)
    advantages, following = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] * mask[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def whiten(advantages, mask):
    """Shifted and scaled to mean 0 and variance 1 over the masked tokens; zero elsewhere."""
    centred = advantages - masked_mean(advantages, mask)
    return centred * torch.rsqrt(masked_mean(centred ** 2, mask) + 1e-8) * mask


def policy_loss(log_probs, old_log_probs, advantages, mask, clip=0.2):
    """PPO's clipped surrogate, −min(ρA, clip(ρ, 1−ε, 1+ε)A), ρ = π_θ/π_old, averaged over tokens. All (B, T)."""
    ratio = torch.exp((log_probs - old_log_probs) * mask)
    return masked_mean(torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), mask)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """½ max((V − R)², (clip(V, V_old ± ε) − R)²), averaged over tokens. All (B, T)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


class TakenLogProb(torch.autograd.Function):
    """log_softmax and gather with one B×T×V tensor for both passes: ∂ log π(y) / ∂ logits = 1[y] − π, written over log π.

    PyTorch's own backward fills a tensor of zeros for the gather and a third one for the softmax. At V = 50 000 these
    tensors are what fills the memory. (A second backward through the same graph is therefore an error, and autograd says so.)
    """

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
    return TakenLogProb.apply(logits if temperature == 1.0 else logits / temperature, tokens)


def make_policy(ref, unfrozen_layers):
    """π_θ, a copy of π_ref, and its value head, two layers on the last hidden state.

    With K = unfrozen_layers ≥ 1 only the top K transformer layers and what the model registers behind them (the final norm)
    are trained; every other tensor is frozen and shared with π_ref, not copied: the two models have one trunk. Raises
    UserError if there are fewer layers.
    """
    ref.requires_grad_(False)
    if unfrozen_layers == -1:
        policy = copy.deepcopy(ref).requires_grad_(True)
    else:
        owner, name = transformer_layers(ref)
        layers = getattr(owner, name)
        if not 1 <= unfrozen_layers <= len(layers):
            raise UserError(f"--unfrozen-layers {unfrozen_layers}: the model has {len(layers)} layers (−1 trains all)")
        if len(set(getattr(ref.config, "layer_types", None) or ())) > 1:  # masks then depend on a layer's place in the list
            raise UserError("this model's layers are of several types, so that its trunk cannot be shared: pass --unfrozen-layers -1")
        children = list(owner.children())
        final_norm = children[children.index(layers) + 1:]  # whatever stands behind the layers
        trained = {id(p) for m in [*layers[-unfrozen_layers:], *final_norm] for p in m.parameters()}
        shared = {id(p): p for p in ref.parameters() if id(p) not in trained}
        policy = copy.deepcopy(ref, dict(shared))  # deepcopy leaves alone what its memo says is copied already
        for p in policy.parameters():
            p.requires_grad_(id(p) not in shared)
    width = ref.get_output_embeddings().weight.shape[1]
    value_head = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1))
    return policy, value_head.to(next(ref.parameters()).device)


def transformer_layers(lm):
    """The module and the attribute that hold the list of transformer layers, in any architecture."""
    for module in lm.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == lm.config.num_hidden_layers:
                return module, name
    raise UserError(f"cannot find the transformer layers of {type(lm).__name__}: pass --unfrozen-layers -1")


@contextmanager
def trunk_output(lm, K):
    """While in force, `forward` also stores what enters the top K layers in the list that is yielded."""
    owner, name = transformer_layers(lm)
    layers, stored = getattr(owner, name), []
    hook = layers[-K].register_forward_pre_hook(lambda _, inputs: stored.append(inputs[0].detach()))
    try:
        yield stored
    finally:
        hook.remove()


def whole_trunk(stored, mask):
    """What `trunk_output` stored during `generate`, put together: (B, prompt + T − 1, H), zero where nothing follows a token.

    stored: the prompts' (B, prompt, H), then (rows, 1, H) for each token that another one follows; mask (B, T) of `generate`.
    """
    (B, prompt, H), T = stored[0].shape, mask.shape[1]
    trunk = stored[0].new_zeros(B, prompt + T - 1, H)
    trunk[:, :prompt] = stored[0]
    for t, hidden in enumerate(stored[1:]):
        trunk[mask[:, t + 1], prompt + t] = hidden[:, 0]
    return trunk


@contextmanager
def top_layers(lm, K, trunk):
    """While in force, `forward` runs only the top K layers of lm, on stored trunk activations.

    The frozen trunk gives the same activations to π_ref and in each of PPO's epochs, so it need run only once. The
    model's own code still makes masks and positions; just its list of layers is cut short and fed by the hook.
    """
    owner, name = transformer_layers(lm)
    layers = getattr(owner, name)
    setattr(owner, name, layers[-K:])
    hook = layers[-K].register_forward_pre_hook(lambda _, inputs: (trunk, *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
        setattr(owner, name, layers)


def ppo_phase(policy, value_head, ref, optimizer, task, prompts, ref_rewards, args, generator):
    """One phase of PPO: a response to each of the B prompts, their rewards, and ppo_epochs of clipped updates.

    ref_rewards: (B, M), what estimates F for each prompt. Returns the phase's metrics. Of several processes each samples,
    scores and differentiates its own share of the B rows; all know the rest and take the same steps.
    """
    device, B, T, K = generator.device, len(prompts), args.max_new_tokens, args.unfrozen_layers
    mine = slice(rank() * B // processes(), (rank() + 1) * B // processes())
    clock = [time.perf_counter()]

    # Rollout: one response per prompt, with the log-probs and values that decoding has at hand anyway.
    prompt_ids = [task.encode(p) for p in prompts]
    uniforms = torch.rand(B, T, generator=generator, device=device)
    keep_trunk = trunk_output(policy, K) if K > 0 else nullcontext()
    with autocast(args, device), keep_trunk as stored:
        tokens, mask, old_log_probs, old_values = generate(
            policy, prompt_ids[mine], uniforms[mine], task.tokenizer.eos_token_id, args.temperature, value_head)
    responses = decode(task, prompts[mine], token_lists(tokens, mask))
    clock.append(time.perf_counter())

    # π_ref's log-probs of the same tokens. Policy and π_ref share all layers below the top K, and decoding has just run them on every
    # token: what came out serves here and in the updates.
    left, left_mask = pad(prompt_ids[mine], task.tokenizer.eos_token_id, "left", device)
    ids, ids_mask = torch.cat([left, tokens[:, :-1]], 1), torch.cat([left_mask, mask[:, :-1]], 1)  # nothing follows the last token
    trunk = whole_trunk(stored, mask) if K > 0 else None
    del stored
    ref_log_probs = torch.empty_like(old_log_probs)
    with torch.no_grad(), autocast(args, device):
        for rows in torch.arange(len(ids), device=device).split(args.minibatch):
            with top_layers(ref, K, trunk[rows]) if K > 0 else nullcontext():
                logits, _ = forward(ref, ids[rows], ids_mask[rows], T)
            ref_log_probs[rows] = token_log_probs(logits, tokens[rows], args.temperature) * mask[rows]

    # The reward: per token −c·(log π_θ − log π_ref), at the end what the objective asks for, from log F̂ and log p.
    scores = torch.tensor(checked_scores(task, prompts[mine], responses), dtype=torch.double)
    if processes() > 1:
        everyones = gathered([x.cpu() for x in (mask, old_log_probs, old_values, ref_log_probs, scores)])
        mask, old_log_probs, old_values, ref_log_probs = (torch.cat(x).to(device) for x in list(zip(*everyones))[:4])
        scores = torch.cat([x[4] for x in everyones])
    log_F = log_F_of(scores, ref_rewards, args)
    terminal, kl_coef = terminal_reward(scores, log_F, ref_log_probs.cpu().double().sum(1), args)
    terminal, log_ratio = terminal.to(old_values), old_log_probs - ref_log_probs
    rewards = -kl_coef * log_ratio
    rewards[torch.arange(B), mask.sum(1) - 1] += terminal
    advantages, returns = gae(rewards, old_values, mask, args.gamma, args.lam)
    advantages = whiten(advantages, mask)
    clock.append(time.perf_counter())

    # Updates.
    losses = []
    for _ in range(args.ppo_epochs):
        for rows in torch.randperm(B, generator=generator, device=device).split(args.minibatch):
            all_tokens = mask[rows].sum()
            rows = rows[(mine.start <= rows) & (rows < mine.stop)]
            optimizer.zero_grad()
            losses.append(torch.zeros(4, device=device))
            if len(rows):
                local = rows - mine.start
                with autocast(args, device), top_layers(policy, K, trunk[local]) if K > 0 else nullcontext():
                    logits, hidden = forward(policy, ids[local], ids_mask[local], T)
                    values = value_head(hidden).squeeze(-1).float()
                log_probs = token_log_probs(logits, tokens[local], args.temperature)
                del logits  # B×T×V, of no more use
                pg = policy_loss(log_probs, old_log_probs[rows], advantages[rows], mask[rows], args.clip)
                vf = value_loss(values, old_values[rows], returns[rows], mask[rows], args.value_clip)
                share = mask[rows].sum() / all_tokens  # of this process in the minibatch: 1 where there is but one
                (share * (pg + args.value_coef * vf)).backward()
                with torch.no_grad():
                    step = (log_probs - old_log_probs[rows]) * mask[rows]
                    losses[-1] = share * torch.stack([pg, vf, masked_mean(torch.expm1(step) - step, mask[rows]),
                                                      masked_mean((torch.expm1(step).abs() > args.clip).float(), mask[rows])])
            if processes() > 1:
                for p in optimizer.param_groups[0]["params"]:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                add_up([p.grad for p in optimizer.param_groups[0]["params"]])
            optimizer.step()
    losses = torch.stack(losses)
    add_up([losses])
    clock.append(time.perf_counter())

    residual = masked_mean((returns - old_values) ** 2, mask) / masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    pg, vf, kl, clipped = losses.mean(0).tolist()
    if not math.isfinite(pg + vf):
        raise UserError("the loss is no longer finite: pass a smaller --lr")
    finite = log_F[log_F.isfinite()]
    return {
        "objective/reward": scores.mean().item(), "objective/terminal_reward": terminal.mean().item(),
        "objective/log_F": finite.mean().item() if len(finite) and args.objective != "rlhf" else None, "objective/kl_to_ref": log_ratio.sum(1).mean().item(),
        "objective/entropy": -old_log_probs.sum(1).mean().item(), "objective/length": mask.sum(1).float().mean().item(),
        "ppo/policy_loss": pg, "ppo/value_loss": vf, "ppo/kl_of_update": kl, "ppo/clip_fraction": clipped,
        "ppo/explained_variance": 1 - residual.item(), "ppo/lr": optimizer.param_groups[0]["lr"],
        "time/rollout": clock[1] - clock[0], "time/score": clock[2] - clock[1], "time/update": clock[3] - clock[2],
        "time/episodes_per_second": B / (clock[3] - clock[0]),
    }


# ======================================================================================================================
# 7. Training and evaluation
# ======================================================================================================================


def train(args):
    """The whole run (Algorithm 1). Returns what it writes to result.json."""
    device, task = begin(args)
    if args.rollouts % processes():
        raise UserError(f"--rollouts {args.rollouts} cannot be shared out evenly to {processes()} processes")
    torch.manual_seed(args.seed)
    policy, value_head = make_policy(task.ref, args.unfrozen_layers)
    ref_rewards = reference_samples(task, args, device)
    world, exact = open_run(args, task), {}
    if world:
        optimum = exact_metrics(exact_optimum(world, [ref_rewards["train", p] for p in world["texts"]], args), world)
        print(exact_row("what training aims at", optimum))

    phases = args.episodes // args.rollouts
    trained = [p for p in [*policy.parameters(), *value_head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, args.adam_beta2), eps=args.adam_eps, weight_decay=args.weight_decay, fused=True)
    generator, prompt_stream = torch.Generator(device).manual_seed(args.seed), shuffled(task.train_prompts, random.Random(args.seed))
    done = load_checkpoint(args, optimizer, generator)
    prompt_stream = itertools.islice(prompt_stream, done * args.rollouts, None)
    with (open(f"{args.out}/metrics.jsonl" if rank() == 0 else os.devnull, "a", encoding="utf-8") as log,
          tqdm(total=phases * args.rollouts, initial=done * args.rollouts, desc="PPO", unit="ep") as bar):
        for phase in range(done, phases):
            set_lr(optimizer, args, phase / phases)
            prompts = list(itertools.islice(prompt_stream, args.rollouts))
            prompt_rewards = torch.stack([ref_rewards["train", p] for p in prompts])
            metrics = {"episode": (phase + 1) * args.rollouts} | ppo_phase(
                policy, value_head, task.ref, optimizer, task, prompts, prompt_rewards, args, generator)
            if world and (phase == phases - 1 or (phase + 1) % args.eval_every == 0):
                exact = exact_metrics(enumerate_policy(policy, world, args), world)
                metrics |= exact
                tqdm.write(exact_row(f"π_θ, {metrics['episode']} ep.", exact))
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            if args.save_every and (phase + 1) % args.save_every == 0 and phase + 1 < phases:
                save_checkpoint(args, phase + 1, optimizer, generator)
            bar.set_postfix({"reward": f"{metrics['objective/reward']:.3f}",
                             "KL to π_ref": f"{metrics['objective/kl_to_ref']:.2f}"}, refresh=False)
            bar.update(args.rollouts)

    extra = {"episodes": phases * args.rollouts} | exact
    if world:
        extra["exact/kl_to_bon_of_optimum"] = optimum["exact/kl_to_bon"]
    return close_run(args, task, world, *judge(task, *sample_policy(policy, task, args, device), ref_rewards, extra), policy)


@torch.no_grad()
def sample_policy(policy, task, args, device):
    """One response of π_θ to each test prompt, and three estimates per prompt of KL(π_θ ‖ π_ref), all of the same mean:

    "kl_to_ref"        Σ_t KL of the next-token distributions, summed over the vocabulary: exact at every token
    "kl_to_ref_plain"  Σ_t log π_θ(y_t) − log π_ref(y_t) of the sampled tokens
    "kl_to_ref_k3"     Σ_t e^{−x} − 1 + x with x that difference (Schulman's k3): positive, but of heavy tail
    """
    generator = torch.Generator(device).manual_seed(args.seed)
    eos, T = task.tokenizer.eos_token_id, args.max_new_tokens
    responses, kls = [], {"kl_to_ref": [], "kl_to_ref_plain": [], "kl_to_ref_k3": []}
    for start in tqdm(range(0, len(task.test_prompts), args.minibatch), desc="test", leave=False):
        prompts = task.test_prompts[start:start + args.minibatch]
        prompt_ids = [task.encode(p) for p in prompts]
        with autocast(args, device):
            tokens, mask, _, _ = generate(policy, prompt_ids, torch.rand(len(prompts), T, generator=generator, device=device),
                                          eos, args.temperature)
            left, left_mask = pad(prompt_ids, eos, "left", device)
            inputs = torch.cat([left, tokens[:, :-1]], 1), torch.cat([left_mask, mask[:, :-1]], 1), T
            log_pi, log_ref = (forward(lm, *inputs)[0].div(args.temperature).log_softmax(-1)
                               for lm in (policy, task.ref))
        x = (log_pi - log_ref).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        for name, per_token in (("kl_to_ref", torch.sum(log_pi.exp() * (log_pi - log_ref), -1)), ("kl_to_ref_plain", x),
                                ("kl_to_ref_k3", torch.expm1(-x) + x)):
            kls[name] += torch.where(mask, per_token, 0.0).sum(1).tolist()
        responses += decode(task, prompts, token_lists(tokens, mask))
    return responses, kls


def judge(task, responses, kls, ref_rewards, extra):
    """Test metrics of one response to each test prompt: mean reward, win rate against π_ref's samples (ties count half)
    and the KL, each with its standard error over prompts, π_ref's own reward, and whatever is in `extra`; and the samples."""
    scores = checked_scores(task, task.test_prompts, responses)
    r, ref = torch.tensor(scores, dtype=torch.double).unsqueeze(1), torch.stack([ref_rewards["test", p] for p in task.test_prompts])
    metrics, places = {}, [in_distribution(p) for p in task.test_prompts]
    parts = {"": [True] * len(places)} | {name: [p is place for p in places] for name, place in (("in/", True), ("out/", False)) if place in places}
    for name, x in {"reward": r, "win_rate": (r > ref).double() + 0.5 * (r == ref), **kls, "ref/reward": ref}.items():
        for part, rows in parts.items():  # tldr's test prompts: all, those of the subreddits that were trained on, the others
            y = torch.as_tensor(x, dtype=torch.double).view(len(scores), -1)[torch.tensor(rows)].mean(1)
            metrics[part + name], metrics[part + name + "_se"] = y.mean().item(), (y.std() / math.sqrt(len(y))).item() if len(y) > 1 else None
    samples = [{"prompt": p, "response": y, "reward": s, "kl_to_ref": k, "ref_reward": f}
               for p, y, s, k, f in zip(task.test_prompts, responses, scores, kls["kl_to_ref"], ref.mean(1).tolist())]
    return metrics | extra, samples


# ======================================================================================================================
# 8. Plumbing, to be passed over at a first reading
# ======================================================================================================================

# --- the command line -------------------------------------------------------------------------------------------------


def parse_args(argv=None, Args=Args, description=__doc__, positional=None, hidden=()):
    """The command line as an `Args`; `positional` names a field that is given without a flag, `hidden` those without effect."""
    parser = argparse.ArgumentParser(description="\n\n".join(description.split("\n\n")[:3]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def one_line(message):
        raise UserError(message + " (see --help)")
    parser.error = one_line
    for f in fields(Args):
        default = ", ".join(f"{task} {value}" for task, value in f.metadata["per_task"].items()) or f.default
        help = f.metadata["help"].replace("%", "%%") + ("" if default is None else f" [{default}]")
        help = argparse.SUPPRESS if f.name in hidden else help
        if f.type is bool:
            kind = {"action": "store_true"}
        else:
            choices = f.metadata["choices"]
            kind = {"type": f.type, "metavar": "{" + ",".join(choices) + "}" if choices else f.type.__name__.upper()}
        if f.name == positional:
            parser.add_argument(f.name, help=help, **kind)
        else:
            parser.add_argument("--" + f.name.replace("_", "-"), help=help, default=f.default, **kind)
    return Args(**vars(parser.parse_args(argv)))


# --- loading models and prompts ---------------------------------------------------------------------------------------


def load(what, loader, name, **kwargs):
    """from_pretrained, with its many ways to fail told in one line."""
    try:
        if not kwargs:
            return loader.from_pretrained(name)
        model, info = loader.from_pretrained(name, output_loading_info=True, **kwargs)
        if info["missing_keys"]:  # the library would make them up at random
            raise UserError(f"--{what} {name} lacks the weights {', '.join(sorted(info['missing_keys'])[:4])}: it is no such model")
        return with_fused_gelu(model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot load {what} {name!r} (config.json, tokenizer.json, model.safetensors): {reason} "
                        f"Pass --{what} FOLDER to use a local one.") from None


def with_fused_gelu(model):
    """GPT-2's GELU in one pass over memory. transformers writes it as eight elementwise operations, each of which reads and
    writes the whole tensor and, in training, keeps it for the backward pass."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":  # ½x(1 + tanh(√(2/π)(x + 0.044715x³))), the same function
                setattr(module, name, nn.GELU("tanh"))
    return model


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def autocast(args, device):
    """bfloat16 arithmetic where --dtype asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def read_prompts(args, tokenizer, longest):
    """--dataset's training and test prompts. Without a test split the last tenth is held out for testing."""
    fields_read = ("prompt", "text", "subreddit", "title", "post")
    if args.dataset.endswith((".jsonl", ".json")):
        if not os.path.exists(args.dataset):
            raise UserError(f"--dataset {args.dataset}: no such file")
        rows = []
        with open(args.dataset, encoding="utf-8", errors="replace") as file:
            for i, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    rows.append({key: row[key] for key in fields_read if key in row})
                    if not all(isinstance(value, str) for value in rows[-1].values()) or not rows[-1]:
                        raise ValueError
                except (ValueError, AttributeError, TypeError):
                    raise UserError(f"--dataset {args.dataset}, line {i}: not an object with a string `prompt` or `text`") from None
        splits = {"train": rows}
    else:
        import datasets
        datasets.disable_progress_bars()
        try:
            splits = datasets.load_dataset(args.dataset)
        except Exception as error:  # datasets raises a dozen unrelated types here
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"cannot load dataset {args.dataset!r}: {reason} "
                            "Pass --dataset FOLDER or FILE.jsonl to use a local one.") from None
        if "train" not in splits:
            raise UserError(f"--dataset {args.dataset} has no train split, only {', '.join(splits)}")
    train = splits["train"]
    if len(train) < 2:
        raise UserError(f"--dataset {args.dataset} has {len(train)} training rows: at least two are needed")
    if "test" in splits:
        test = splits["test"]
        train_rows, test_rows = range(len(train)), range(len(test))
    else:
        held_out = max(1, len(train) // 10)
        test, train_rows, test_rows = train, range(len(train) - held_out), range(len(train) - held_out, len(train))
    rng = random.Random(args.data_seed)

    def draw(rows, indices, number, related=None):
        """`number` prompts in random order; of tldr's, those that are or are not from the subreddits that are trained on."""
        prompts = []
        for i in rng.sample(indices, len(indices)):
            if len(prompts) == number:
                break
            row = rows[i]
            if isinstance(row.get("prompt"), str):
                prompt = row["prompt"]
            elif all(isinstance(row.get(key), str) for key in ("subreddit", "title", "post")):
                if related not in (None, row["subreddit"] in IN_DISTRIBUTION):
                    continue
                prompt = tldr_prompt(row, tokenizer, longest)
            elif isinstance(row.get("text"), str):
                ids = tokenizer(row["text"][:200], add_special_tokens=False)["input_ids"][:rng.randint(2, 8)]
                prompt = tokenizer.decode(ids)
                # A cut through a character, or one that the tokenizer would merge otherwise, is no faithful prompt.
                if tokenizer(prompt, add_special_tokens=False)["input_ids"] != ids:
                    continue
            else:
                raise UserError(f"--dataset {args.dataset} has a row without a `prompt` or `text` that is a string, only {', '.join(row)}")
            if related in (None, in_distribution(prompt)):
                prompts.append(prompt)
        if not prompts:
            kind = {None: "", True: " of r/relationships or r/relationship_advice", False: " of other subreddits"}[related]
            raise UserError(f"--dataset {args.dataset} gave no prompt{kind}")
        return prompts

    if args.task != "tldr":
        return draw(train, train_rows, args.train_prompts), draw(test, test_rows, args.test_prompts)
    half = (args.test_prompts + 1) // 2
    return draw(train, train_rows, args.train_prompts, True), [
        *draw(test, test_rows, half, True), *draw(test, test_rows, args.test_prompts - half, False)]


IN_DISTRIBUTION = ("relationships", "relationship_advice")  # tldr trains on these subreddits; tests are half on them, half on others


def in_distribution(prompt):
    """Whether a tldr prompt comes from the subreddits that are trained on; None for a prompt that names no subreddit."""
    return prompt.split("\n")[0][len("SUBREDDIT: r/"):] in IN_DISTRIBUTION if prompt.startswith("SUBREDDIT: r/") else None


def tldr_prompt(row, tokenizer, longest):
    """OpenAI's format for a Reddit post, which loses its last paragraphs, or else its last words, to fit `longest` tokens."""
    head, tail = f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: ", "\n\nTL;DR:"
    post = row["post"].strip()
    while post and len(tokenizer.encode(head + post + tail)) > longest:
        post = post.rpartition("\n")[0].rstrip() or post.rpartition(" ")[0].rstrip()
    return head + post + tail


# --- the KV cache -----------------------------------------------------------------------------------------------------


@cache
def roomy_layer():
    """transformers' cache of one layer, with room to grow: its own concatenates, which copies the whole cache for every token.
    (A class made on the first call, since importing transformers takes seconds that `import vbon` should not.)"""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        room = None  # buffers of keys and values; self.keys and self.values are views of what is in use of them

        def update(self, key_states, value_states, *args, **kwargs):
            B, heads, new, _ = key_states.shape
            length = self.get_seq_length()
            if self.room is None or self.room[0].shape[2] < length + new:
                self.room = [x.new_empty(B, heads, length + new + 24, x.shape[-1]) for x in (key_states, value_states)]
                if length:
                    self.room[0][:, :, :length], self.room[1][:, :, :length] = self.keys, self.values
                self.is_initialized = True
            for buffer, x in zip(self.room, (key_states, value_states)):
                buffer[:B, :, length:length + new] = x
            self.keys, self.values = (buffer[:B, :, :length + new] for buffer in self.room)
            return self.keys, self.values

        def batch_repeat_interleave(self, repeats):
            super().batch_repeat_interleave(repeats)
            self.room = None

        def batch_select_indices(self, indices):  # those that stay move to the front
            super().batch_select_indices(indices)
            for buffer, x in zip(self.room or (), (self.keys, self.values)):
                buffer[:len(indices), :, :x.shape[2]] = x
    return RoomyLayer


# --- π_ref's samples: drawn by hand or by vLLM, kept in a file ---------------------------------------------------------


def reference_samples(task, args, device, keep_tokens=False):
    """The rewards of M samples of π_ref for every training prompt, and of test_M for every test prompt, in ascending order.

    Returns {(split, prompt): (M,) float64}; with keep_tokens {(split, prompt): (rewards in the order drawn, list of lists of
    token ids, EOS included)}. The samples stand in a JSONL file: a header that says what made them, then lines {"split",
    "prompt", "start", "responses", "rewards", "tokens", "crc32"}. A second run reads them; one with a larger M, or more
    prompts, or one that was killed, adds what is missing, and two runs at once take turns. The samples of a prompt depend
    on --data-seed, the split and the prompt alone. Objective rlhf, which has no F, needs none for training.
    """
    header = {"vbon_samples": 3, "task": args.task, "ref": fingerprint(task.ref),
              "tokenizer": hashlib.sha256(json.dumps(sorted(task.tokenizer.get_vocab().items())).encode()).hexdigest()[:16],
              "reward": task.reward_id, "temperature": args.temperature, "max_new_tokens": args.max_new_tokens,
              "dtype": args.dtype, "data_seed": args.data_seed}
    path = args.samples or f"samples/{args.task}-{hashlib.sha256(json.dumps(header).encode()).hexdigest()[:12]}.jsonl"
    M = 0 if args.objective == "rlhf" else args.M
    wanted = {("train", p): M for p in task.train_prompts} | {("test", p): args.test_M for p in task.test_prompts}

    def missing():
        return [key for key in wanted if len(rewards.get(key, ())) < wanted[key]]
    rewards, tokens = from_first(lambda: read_samples(path, header, keep_tokens))
    if args.import_samples or missing():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with (locked(path) if rank() == 0 else nullcontext()):
            rewards, tokens = from_first(lambda: read_samples(path, header, keep_tokens, mend=True))

            def keep(lines):
                append_lines(path, header, lines)
                for line in lines:
                    key = line["split"], line["prompt"]
                    rewards.setdefault(key, []).extend(line["rewards"])
                    tokens.setdefault(key, []).extend(line["tokens"] if keep_tokens else [])
            if args.import_samples:
                keep(imported_lines(args.import_samples, task, args, wanted, {key: len(r) for key, r in rewards.items()}))
            total = sum(wanted[key] - len(rewards.get(key, ())) for key in missing())
            with (sampler(task, args, device) if total else nullcontext((None, 1)) as (sample, rows),
                  tqdm(total=total, desc=f"π_ref's samples -> {path}", unit="", disable=not total) as bar):
                todo = set(missing())
                batches = [b for b in fixed_batches(wanted, rows, lambda p: len(task.encode(p))) if todo & set(b)]
                have = {key: len(r) for key, r in rewards.items()}
                for i in range(0, len(batches), processes()):  # each process draws one batch, if any is left, and gets the lines of all
                    mine = batches[i + rank():i + rank() + 1]
                    for lines in gathered([line for b in mine for line in draw_lines(task, args, b, wanted[b[0]], have, sample)]):
                        keep(lines)
                        bar.update(sum(len(line["rewards"]) for line in lines))
    else:
        print(f"π_ref's samples: read from {path}")

    def first(key, M):
        r = torch.tensor(rewards.get(key, [])[:M], dtype=torch.double)
        return (r, tokens[key][:M]) if keep_tokens else r.sort().values
    return {key: first(key, M) for key, M in wanted.items()}


def fixed_batches(wanted, rows, length):
    """The keys (split, prompt) of `wanted` in batches of about `rows` responses, prompts of similar length together.

    A batch is drawn as a whole, and batches depend on nothing but what is wanted: rounding differs between batches of other
    shapes, so this is what makes a run that was killed and started again end with the very bytes of one that was not.
    """
    batches = []
    for split in ("train", "test"):
        keys = sorted((key for key in wanted if key[0] == split), key=lambda key: (length(key[1]), key))
        per_batch = max([1, *(rows // max(1, wanted[key]) for key in keys[:1])])
        batches += [keys[i:i + per_batch] for i in range(0, len(keys), per_batch)]
    return batches


def draw_lines(task, args, batch, M, have, sample):
    """Draws and scores what is missing of one batch of prompts: the lines for the file, as dicts."""
    drawn = [have.get(key, 0) for key in batch]
    start = min((n for n in drawn if n < M), default=M)
    ids = sample(batch, start, M)
    prompts = [prompt for _, prompt in batch for _ in range(start, M)]
    responses = decode(task, prompts, [row for rows in ids for row in rows])
    rewards = checked_scores(task, prompts, responses)
    lines = []
    for j, ((split, prompt), n) in enumerate(zip(batch, drawn)):
        rows = slice(j * (M - start) + n - start, (j + 1) * (M - start))
        if n < M:
            lines.append({"split": split, "prompt": prompt, "start": n, "responses": responses[rows], "rewards": rewards[rows],
                          "tokens": ids[j][n - start:]})
    return lines


def seed_of(*what):
    return int.from_bytes(hashlib.sha256(" ".join(map(str, what)).encode()).digest()[:8], "big")


def hand_sampler(task, args, device):
    """A function (keys, start, M) -> responses number start … M−1 of π_ref to each prompt, lists of token ids with EOS."""
    def sample(keys, start, M):
        uniforms = np.concatenate([np.random.default_rng(seed_of(args.data_seed, *key)).random((M, args.max_new_tokens), np.float32)[start:]
                                   for key in keys])
        ids = []
        for rows in torch.from_numpy(uniforms).split(args.sample_batch if len(keys) == 1 else len(uniforms)):
            with autocast(args, device):
                tokens, mask, _, _ = generate(task.ref, [task.encode(prompt) for _, prompt in keys], rows.to(device),
                                              task.tokenizer.eos_token_id, args.temperature)
            ids += token_lists(tokens, mask)
        return [ids[i:i + M - start] for i in range(0, len(ids), M - start)]
    return sample


@contextmanager
def sampler(task, args, device):
    """The function that samples π_ref, and how many responses it takes at a time: by hand, or by a vLLM engine, which is shut
    down at the end so that training has the memory."""
    use_vllm = {"auto": importlib.util.find_spec("vllm") is not None and device.type == "cuda" and processes() == 1 and args.task != "toy",
                "hand": False, "vllm": True}[args.backend]
    print(f"π_ref's samples: drawn by {'vLLM' if use_vllm else 'this script'}")
    if not use_vllm:
        yield hand_sampler(task, args, device), args.sample_batch
        return
    if processes() > 1:
        raise UserError("--backend vllm has an engine of its own: draw the samples with one process first, then start torchrun")
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(f"--backend vllm: {error}; see requirements.txt for what fits beside the rest") from None
    llm = LLM(model=args.ref, dtype=args.dtype, seed=args.data_seed, enable_prefix_caching=True,
              max_model_len=getattr(task.ref.config, "max_position_embeddings", None), gpu_memory_utilization=0.5)

    def sample(keys, start, M):
        params = [SamplingParams(n=M - start, temperature=args.temperature, max_tokens=args.max_new_tokens, detokenize=False,
                                 seed=(seed_of(args.data_seed, *key) >> 3) + start) for key in keys]  # vLLM adds 0 … n−1 to it
        prompts = [{"prompt_token_ids": task.encode(prompt)} for _, prompt in keys]
        return [[list(one.token_ids) for one in request.outputs] for request in llm.generate(prompts, params, use_tqdm=False)]
    try:
        yield sample, 16_384
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def token_lists(tokens, mask):
    """Responses (B, T) as B lists of token ids, EOS included."""
    return [row[:n] for row, n in zip(tokens.tolist(), mask.sum(1).tolist())]


def decode(task, prompts, rows):
    """Token ids of responses as texts, just as they follow the prompt: some tokenizers drop a leading space otherwise. EOS
    leaves no trace, unless the reward must see it (task.end)."""
    def text(ids):
        return task.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    starts = {p: (task.encode(p), len(text(task.encode(p)))) for p in set(prompts)}
    eos = task.tokenizer.eos_token_id
    return [text(starts[p][0] + row)[starts[p][1]:] + (task.end if row[-1:] == [eos] else "") for p, row in zip(prompts, rows)]


def checked_scores(task, prompts, responses):
    """The rewards, all finite; else the response that has none is named."""
    scores = task.score(prompts, responses)
    for prompt, response, score in zip(prompts, responses, scores):
        if not math.isfinite(score):
            raise UserError(f"the reward model gave {score} for the prompt {prompt!r} with the response {response!r}")
    return scores


def fingerprint(model):
    """A short hash of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def locked(path):
    """Holds the file of samples against other runs, which wait for their turn. (Windows has no such locks: none is taken.)"""
    try:
        import fcntl
    except ImportError:
        yield
        return
    while True:
        file = open(path, "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another run is filling {path}: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            break
        file.close()  # it was removed meanwhile
    try:
        yield
    finally:
        if os.path.getsize(path) == 0:
            os.remove(path)
        file.close()


def append_lines(path, header, lines):
    """Adds lines to the file of samples, each sealed by a checksum, so that no damage can pass for a reward."""
    if rank() > 0 or not lines:
        return
    with open(path, "ab") as file:
        bodies = [json.dumps(line, ensure_ascii=False)[:-1].encode() for line in lines]
        sealed = b"".join(body + f', "crc32": {zlib.crc32(body)}}}\n'.encode() for body in bodies)
        file.write(sealed if file.tell() else json.dumps(header).encode() + b"\n" + sealed)


def read_samples(path, header, keep_tokens=False, mend=False):
    """{(split, prompt): list of rewards} and the like of token ids from a file of samples; empty if there is none yet.

    Raises UserError where the file was made by other models or settings, or a line is damaged. A last line without its
    line break was being written when a run was killed: it does not count, and `mend` cuts it off.
    """
    rewards, tokens, whole = {}, {}, 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if not line.endswith(b"\n"):
                        if number == 1 and not json.dumps(header).encode().startswith(line):  # not even our own header, torn
                            raise UserError(f"{path} is not a file of samples: pass another with --samples")
                        if mend:
                            os.truncate(path, whole)
                        break
                    whole += len(line)
                    entry = json.loads(line)
                    if number == 1:
                        for key, value in header.items():
                            if entry.get(key) != value:
                                raise UserError(f"{path} was made with {key} = {entry.get(key)!r}, this run has {value!r}: "
                                                "pass another file with --samples, or remove it")
                        continue
                    body, _, checksum = line.rpartition(b', "crc32": ')
                    values = rewards.setdefault((entry["split"], entry["prompt"]), [])
                    if zlib.crc32(body) != int(checksum[:-2]) or entry["start"] != len(values):
                        raise ValueError
                    values += entry["rewards"]
                    if keep_tokens:
                        tokens.setdefault((entry["split"], entry["prompt"]), []).extend(entry["tokens"])
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise UserError(f"{path}, line {number} is damaged: remove the file, or the line and all after it") from None
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return rewards, tokens


def imported_lines(path, task, args, wanted, have):
    """Training samples from a file of the authors' lines, {"prompt", "responses", "rewards"} or {"prompt", "text", "reward"}, for
    the prompts that have none yet. That --ref made them at this temperature is for the user to know. Raises UserError."""
    found = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                texts, rewards = (row["responses"], row["rewards"]) if "responses" in row else ([row["text"]], [row["reward"]])
                if not isinstance(row["prompt"], str) or len(texts) != len(rewards) or not all(isinstance(t, str) for t in texts) \
                        or not all(type(r) in (int, float) and math.isfinite(r) for r in rewards):
                    raise ValueError
                found.setdefault(row["prompt"], []).extend(zip(texts, rewards))
    except OSError as error:
        raise UserError(f"--import-samples {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--import-samples {path}, line {number}: no prompt with its responses and finite rewards") from None
    lines, eos = [], task.tokenizer.eos_token_id
    for prompt, pairs in found.items():
        if ("train", prompt) in wanted and not have.get(("train", prompt)):
            texts = [text.removeprefix(prompt) for text, _ in pairs]  # their "text" holds the prompt too
            start = len(task.encode(prompt))
            ids = [task.tokenizer.encode(prompt + text.removesuffix(task.end))[start:] for text in texts]
            ids = [row + [eos] if len(row) < args.max_new_tokens else row[:args.max_new_tokens] for row in ids]
            lines.append({"split": "train", "prompt": prompt, "start": 0, "responses": texts, "rewards": [r for _, r in pairs], "tokens": ids})
    print(f"{path}: samples of {len(lines)} of the {len(set(task.train_prompts))} training prompts taken over")
    return lines


# --- several processes: torchrun --nproc_per_node=K vbon.py …; with one, these do nothing -----------------------------


def start_processes(args):
    """Under torchrun, joins the other processes; all but the first fall silent. Each takes the GPU of its number."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if args.device in ("auto", "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    signal.signal(signal.SIGTERM, another_ended)  # sent by torchrun where a process has died
    dist.init_process_group()  # nccl for tensors on GPUs, gloo for the others
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


def another_ended(*_):
    """another process of this run ended, see its message; the same command with --resume goes on from the last checkpoint"""
    raise UserError(another_ended.__doc__)


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


def from_first(make):
    """make() of the first process, in all of them."""
    box = [make() if rank() == 0 else None]
    if processes() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def add_up(tensors):
    """Sums tensors over the processes, in place, in one message."""
    if processes() > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))


# --- the run's folder, its checkpoints, what it shows -----------------------------------------------------------------


def begin(args):
    """The device and the task."""
    # Large tensors in pages of 2 MB (Linux): mapping a B×T×V tensor in pages of 4 KB takes time that shows. torch reads this at its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from transformers.utils import logging
    logging.set_verbosity_error()  # its loading bars and notes would bury ours
    logging.disable_progress_bar()
    start_processes(args)
    device = pick_device(args.device)
    task = (toy_task if args.task == "toy" else text_task)(args, device)
    print(f"{args.task}: {sum(p.numel() for p in task.ref.parameters()):,} parameters on {device}, "
          f"{len(task.train_prompts)} training and {len(task.test_prompts)} test prompts")
    return device, task


def open_run(args, task):
    """Called once the input is known to be good: makes the run's folder; for the toy computes its exact world and prints it."""
    os.makedirs(args.out, exist_ok=True)
    for name in ("result.json", "samples.jsonl") + (() if args.resume else ("checkpoint.pt",)):
        if rank() == 0 and os.path.exists(f"{args.out}/{name}"):
            os.remove(f"{args.out}/{name}")
    write_whole(f"{args.out}/config.json", json.dumps(asdict(args), indent=2) + "\n")
    if args.task != "toy":
        return None
    world = exact_world(task, args)
    print(f"toy: all {len(world['responses']):,} responses to each of {len(world['prompts'])} prompts enumerated, "
          f"{time.perf_counter() - args.started:.0f} s\n\n"
          "  exact, in nats        KL(· ‖ π_bon) KL(· ‖ π_ref)  reward   win rate")
    print(exact_row("π_ref", exact_metrics(world["log_ref"], world)))
    print(exact_row(f"π_bon, N = {args.N}", exact_metrics(world["log_bon"], world)))
    return world


def close_run(args, task, world, metrics, samples, policy=None):
    """Writes the test metrics, samples and policy, result.json last: it marks the run as finished. Shows what came out."""
    result = {"task": args.task, "objective": args.objective, "N": args.N, "beta": args.beta, "M": args.M, "seed": args.seed,
              "seconds": round(time.perf_counter() - args.started, 1)} | metrics
    if policy is not None:
        save_policy(policy, task.tokenizer, f"{args.out}/policy")
    write_whole(f"{args.out}/samples.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
    write_whole(f"{args.out}/result.json", json.dumps(result, indent=2) + "\n")
    if rank() > 0:
        return result
    if os.path.exists(f"{args.out}/checkpoint.pt"):
        os.remove(f"{args.out}/checkpoint.pt")
    if world and policy is not None:
        show_responses("before: π_ref (reward)", world, world["log_ref"], args)
        show_responses("after: π_θ, one sample each", world, enumerate_policy(policy, world, args), args)
        show_responses(f"the real Best-of-{args.N}", world, world["log_bon"], args)
    else:
        for s in samples[:4]:
            print(f"  {s['reward']:.2f}  {s['prompt']} |{s['response']}".replace("\n", " "))

    def pm(key, scale=1, digits=3):
        return f"{scale * result[key]:.{digits}f} ± {scale * (result[key + '_se'] or 0):.{digits}f}"
    print(f"\ntest, ± standard error over prompts (and Best-of-{args.N}):\n"
          f"  reward      {pm('reward')}  (π_ref {result['ref/reward']:.3f})\n"
          f"  win rate    {pm('win_rate', 100, 1)} %  ({100 * bon_win_rate(args.N):.1f} %)\n"
          f"  KL to π_ref {pm('kl_to_ref')} nats  (≤ {bon_kl(args.N):.3f})\n"
          f"{args.out}: {', '.join(sorted(os.listdir(args.out)))}   [{result['seconds']:.0f} s]")
    return result


def write_whole(path, text):
    """Writes a file under a temporary name, then renames: it is there whole or not at all. Of several processes the first writes."""
    if rank() > 0:
        return
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


def save_policy(policy, tokenizer, folder):
    """A plain Hugging Face folder, which from_pretrained and vLLM load."""
    if rank() > 0:
        return
    shutil.rmtree(folder + ".tmp", ignore_errors=True)
    policy.save_pretrained(folder + ".tmp")
    tokenizer.save_pretrained(folder + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(folder + ".tmp", folder)


def save_checkpoint(args, done, optimizer, generator=None):
    """All that a run needs to go on after `done` phases (a line of metrics each): weights and their moments, the generator.
    The rest follows from the seed."""
    if rank() > 0:
        return
    torch.save({"done": done, "weights": [p.detach() for p in optimizer.param_groups[0]["params"]],
                "optimizer": optimizer.state_dict(), "generator": generator and generator.get_state()}, f"{args.out}/checkpoint.tmp")
    os.replace(f"{args.out}/checkpoint.tmp", f"{args.out}/checkpoint.pt")


def load_checkpoint(args, optimizer, generator=None):
    """Puts the run back to its last checkpoint, cuts off the metrics of later phases, and returns how many were done."""
    path = f"{args.out}/checkpoint.pt"
    if not (args.resume and os.path.exists(path)):
        write_whole(f"{args.out}/metrics.jsonl", "")
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for p, saved in zip(optimizer.param_groups[0]["params"], state["weights"]):
            p.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    if generator:
        generator.set_state(state["generator"])
    with open(f"{args.out}/metrics.jsonl", encoding="utf-8") as file:
        lines = file.readlines()
    write_whole(f"{args.out}/metrics.jsonl", "".join(lines[:state["done"]]))
    print(f"resumed from {path}")
    return state["done"]


def set_lr(optimizer, args, progress):
    """The learning rate after this share of training."""
    optimizer.param_groups[0]["lr"] = args.lr * (1 - progress if args.lr_schedule == "linear" else 1)


def shuffled(items, rng):
    """Endless: every item once, in random order, before any comes twice."""
    while True:
        yield from rng.sample(items, len(items))


def enumerate_policy(policy, world, args):
    """log π_θ of every response to every toy prompt, (P, S)."""
    return torch.stack([enumerate_log_p(policy, p, args) for p in world["prompts"]])


def exact_row(name, exact):
    return (f"  {name:<22}{exact['exact/kl_to_bon']:>12.4f}{exact['exact/kl_to_ref']:>12.4f}"
            f"{exact['exact/reward']:>10.3f}{100 * exact['exact/win_rate']:>10.1f} %")


def show_responses(title, world, log_pi, args):
    """A few responses to each toy prompt, drawn from a distribution over all of them."""
    generator = torch.Generator().manual_seed(args.seed)
    print(f"\n{title}")
    for prompt, row in zip(world["texts"], log_pi):
        picks = torch.multinomial(row.exp(), 4, replacement=True, generator=generator)
        shown = (f"{world['responses'][i] or '(nothing)'} ({world['rewards'][i]:+.1f})" for i in picks)
        print(f"  {prompt:<16} " + "  ·  ".join(shown))


def main(argv=None):
    try:
        train(parse_args(argv))
    except UserError as error:
        print(f"vbon.py: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # a message to a process that is gone: gloo and NCCL have no class for it
        if processes() == 1 or not any(word in str(error) for word in ("gloo", "NCCL", "onnection")):
            raise
        print(f"vbon.py: {another_ended.__doc__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vbon.py: stopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
