"""Tests of vbon.py, bon_baselines.py, evaluate.py and results/:  python -m pytest test_vbon.py

The mathematics is compared with brute force, 50-digit arithmetic and simulation, the training code
with plain forward passes of the library and examples worked by hand. The command line is called as
a user calls it, offline, with small models that are made here.
"""
import ast
import contextlib
import csv
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import, no test may wait for a hub

import datasets
import mpmath
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

import bon_baselines
import evaluate
import vbon
from results import ceiling, curves, log_F as samples_needed, shared_log_F as sharing

HERE, INF, NAN = Path(__file__).resolve().parent, math.inf, math.nan


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def doubles(*rows):
    tensors = [torch.tensor(row, dtype=torch.double) for row in rows]
    return tensors if len(tensors) > 1 else tensors[0]


def normals(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.double)


def close(a, b, atol=1e-12, rtol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def test_structure_of_the_files():
    """The loop ends early and needs little from below. Functions and lines are short."""
    body = ast.parse((HERE / "vbon.py").read_text("utf-8")).body
    places = {node.name: node for node in body if hasattr(node, "name")}
    places |= {target.id: node for node in body if isinstance(node, ast.Assign)
               for target in node.targets if isinstance(target, ast.Name)}
    end = places["train"].end_lineno
    used = {name.id for node in body if node.lineno < end and node is not places["train"]
            for name in ast.walk(node) if isinstance(name, ast.Name)}
    below = {name for name, node in places.items() if node.lineno > end} & used
    assert end < 640 and len(below) <= 8, (end, below)
    for file in ("vbon.py", "bon_baselines.py", "evaluate.py"):
        source = (HERE / file).read_text("utf-8")
        assert not [line for line in source.splitlines() if len(line) > 100], file
        functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
        assert not [f.name for f in functions if f.end_lineno - f.lineno >= 60], file


def test_pure_functions_work_alone():
    """On their default path, when their source is pasted, with two imports and what they call."""
    b = bon_baselines
    shared = [vbon.masked_mean, vbon.log_bon_pmf, b.sft_loss, b.bonbon_beta]
    r, ref, mask = normals(3), normals(3, 9, seed=1), torch.ones(3, 4)
    x, y, z = (normals(3, 4, seed=i) for i in range(3))
    for function, *args in (
            (vbon.log_bon_pmf, -ref.abs(), -1.0, 4), (vbon.vbon_reward, -ref.abs(), -50.0, 4),
            (vbon.estimate_log_F, r, ref), (vbon.fit_log_F, ref), (vbon.mid_ranks, r, ref),
            (vbon.bon_kl, 4), (vbon.bon_win_rate, 4), (vbon.kl_to_bon, 0.5, -0.2, 4),
            (vbon.effective_N, -0.2), (vbon.excess_kl, 2.0, -0.2), (vbon.masked_mean, x, mask),
            (vbon.whiten, x, mask), (vbon.gae, x, y, mask), (vbon.policy_loss, x, y, z, mask),
            (vbon.value_loss, x, y, z, mask), (vbon.prefix_values, x, y, mask, 2),
            (b.best_of_n, ref), (b.expected_best_of_n, ref, 4), (b.sft_loss, r),
            (b.dpo_loss, *ref.T[:4], 0.1), (b.bonbon_beta, 4), (b.bonbon_loss, *ref.T[:4], 4),
            (b.bond_reward, r, ref[:, :2]), (b.bond_loss, *ref.T[:3], -r.abs())):
        pasted = {}
        for part in (function, *shared):
            exec("import math, torch\n" + inspect.getsource(part), pasted)
        close(pasted[function.__name__](*args), function(*args), atol=0, rtol=0)


# ========== Mathematics ==========================================================================

def random_distribution(S, seed):
    """p (S,) sorted by ascending reward, F (S,) its strict CDF."""
    p = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(S)))
    return p, (p.cumsum(0) - p).clamp(min=0)


def exact_log_pmf(log_F, log_p, N):
    F, p = mpmath.exp(log_F), mpmath.exp(log_p)
    if F == 0:
        return N * mpmath.mpf(log_p)
    return N * mpmath.log(F + p) + mpmath.log(-mpmath.expm1(N * mpmath.log1p(-p / (F + p))))


@mpmath.workdps(60)
def test_pmf_and_its_gradient_agree_with_50_digit_arithmetic():
    rng, cases = np.random.default_rng(0), [*itertools.product(
        (-INF, -1e4, -750.0, -7.0, -0.6931, -1e-3, -1e-12, 0.0),
        (0.0, -1e-9, -0.5, -30.0, -599.0, -601.0, -800.0, -1e4), (1, 1.5, 2, 16, 1000, 1e6))]
    for i in range(1500):  # F + p near 1, where N log(F+p) is a large number times a small one
        F = rng.uniform(0.001, 0.999)
        p = (1 - F) * (1 - rng.random() * 10.0 ** rng.uniform(-9, 0))
        cases.append((math.log(F), math.log(p), float(10 ** rng.uniform(0, 6))))
    for i, (log_F, log_p, N) in enumerate(cases):
        x, expected = doubles([log_F, log_p]).requires_grad_(), exact_log_pmf(log_F, log_p, N)
        value = vbon.log_bon_pmf(*x, N)
        assert abs(value.item() - expected) <= 1e-10 * max(1, abs(expected)), (log_F, log_p, N)
        if i < 384:
            value.backward()
            assert value.isfinite() and x.grad.isfinite().all(), (log_F, log_p, N, x.grad)
    inputs = [x.requires_grad_() for x in doubles([-1.2, -0.3, -5.0], [-0.9, -2.0, -3.0])]
    assert torch.autograd.gradcheck(lambda a, b: vbon.log_bon_pmf(a, b, 7.5), inputs)


def test_pmf_is_the_frequency_over_all_N_tuples():
    p, F = random_distribution(5, 0)
    for N in (1, 2, 3, 5):
        expected = torch.zeros(5, dtype=torch.double)
        for group in itertools.product(range(5), repeat=N):
            expected[max(group)] += math.prod(p[i].item() for i in group)
        close(vbon.log_bon_pmf(F.log(), p.log(), N).exp(), expected)
    # It has no NaN, broadcasts, and is float64.
    log_F, log_p = torch.tensor([[-INF, -INF, -1.0, 0.0], [-INF, 0.0, -INF, -INF]])
    assert vbon.log_bon_pmf(log_F, log_p, 16).tolist() == [-INF, 0.0, -INF, -INF]
    assert vbon.log_bon_pmf(torch.zeros(2, 1), torch.zeros(3), torch.arange(1, 4)).shape == (2, 3)
    for dtype in (torch.half, torch.float, torch.double):
        assert vbon.log_bon_pmf(log_F.to(dtype), log_p.to(dtype), 2).dtype == torch.double


def test_closed_forms_effective_N_and_mid_ranks():
    S, N = 100_000, 16
    p, F = torch.full((S,), 1 / S, dtype=torch.double), torch.arange(S).double() / S
    log_bon = vbon.log_bon_pmf(F.log(), p.log(), N)
    kl, win_rate = ((log_bon.exp() * x).sum().item() for x in (log_bon - p.log(), F + p / 2))
    assert kl == pytest.approx(vbon.bon_kl(N), abs=1e-3)
    assert win_rate == pytest.approx(vbon.bon_win_rate(N), abs=1e-4)
    for N in (1, 2.5, 16, 512):
        assert vbon.effective_N(-1 / N) == pytest.approx(N)
        assert vbon.excess_kl(vbon.bon_kl(N), -1 / N) == pytest.approx(0, abs=1e-12)
    closest = min(vbon.kl_to_bon(3, -0.25, N / 100) for N in range(100, 2000))
    assert vbon.excess_kl(3, -0.25) == pytest.approx(closest)  # no other Best-of-N is closer
    assert vbon.kl_to_bon(3, -0.25, 5) == pytest.approx(3 - math.log(5) + 4 * 0.25)
    k = vbon.mid_ranks(doubles([2.0, 0.0, 9.0]), doubles([[3.0, 2.0, 2.0, 1.0]]))
    assert k.tolist() == [2.0, 0.0, 4.0]  # a tie counts half


def test_objectives_are_ordered_and_their_rewards_are_the_objectives():
    """J ≥ L ≥ L1 (Thm. 2–4), each from its definition and as N·E[reward] − KL."""
    for seed in range(20):
        p, F = random_distribution(30, seed)
        F = F.clamp(min=1e-9)  # log F = −inf makes every bound −inf
        pi, _ = random_distribution(30, 100 + seed)
        kl, entropy = (pi * (pi / p).log()).sum(), -(pi * pi.log()).sum()
        for N in (2, 16, doubles(100)):
            alpha, beta, gamma = (N + 2) * (N - 1) / 2, N * (N + 1) / 2, N * (N - 1) / 2
            J = (pi * vbon.log_bon_pmf(F.log(), p.log(), N)).sum() + entropy
            L = (N - 1) * (pi * F.log()).sum() - kl
            L1 = gamma * (pi * F.log()).sum() - alpha * entropy - beta * kl
            assert J >= L - 1e-9 and L >= L1 - 1e-9
            for objective, value in (("vbon", J), ("bound", L), ("bound1", L1)):
                reward = vbon.vbon_reward(F.log(), p.log(), N, objective)
                close(N * (pi * reward).sum() - kl, value, atol=1e-9, rtol=1e-9)


def test_rewards_of_unlikely_responses_and_at_N_1():
    """Unlikely responses need no log p: "vbon" is "bound" plus log(N)/N."""
    log_F, log_p = doubles([-2.0, -0.7, -1e-3, 0.0], [[-30.1], [-40.0], [-200.0], [-1000.0]])
    for N in (1, 2, 16, 512):
        difference = vbon.vbon_reward(log_F, log_p, N) - vbon.vbon_reward(log_F, 0, N, "bound")
        close(difference, torch.full((4, 4), math.log(N) / N, dtype=torch.double), rtol=0)
    log_F, log_p = doubles([-INF, -1.0], [-3.0, -2.0])
    for objective in ("vbon", "bound", "bound1"):
        close(vbon.vbon_reward(log_F, log_p, 1, objective), torch.zeros(2).double())
        with pytest.raises(ValueError, match="at least 1"):
            vbon.vbon_reward(log_F, log_p, torch.tensor([2.0, 0.99]), objective)
    with pytest.raises(ValueError, match="bound1"):
        vbon.vbon_reward(log_F, log_p, 2, "rlhf")
    # The clip leaves the rewards of long responses distinct.
    scores, ref = doubles([0.2, 0.5, 0.9], [[0.1, 0.3, 0.6, 0.8]] * 3)
    for objective, estimator in itertools.product(vbon.OBJECTIVES, vbon.ESTIMATORS):
        args = types.SimpleNamespace(objective=objective, estimator=estimator, N=16)
        rewards = vbon.terminal_reward(scores, ref, doubles([-180.0] * 3), args)
        assert rewards[0] < rewards[1] < rewards[2]


def test_estimators_by_hand_and_only_ranks_matter():
    ref, rewards = [[1.0, 2.0, 2.0, 5.0]] * 4, [0.0, 2.0, 3.0, 9.0]  # k = 0, 1, 3, 4
    for rows in (ref, np.array(ref), torch.tensor(ref), ref[0]):  # (M,) are the samples of all
        close(vbon.estimate_log_F(rewards, rows, "log_mean").exp(), doubles([0, 0.25, 0.75, 1]))
        close(vbon.estimate_log_F(rewards, rows).exp(), doubles([1, 2, 4, 5]) / 5)
    for r, rows, estimator in (([NAN], [1.0], "add_one"), ([1.0], [NAN], "add_one"),
                               ([1.0], [], "add_one"), ([1.0], [1.0], "median")):
        with pytest.raises(ValueError):
            vbon.estimate_log_F(r, rows, estimator)
    rewards, ref = normals(50), normals(50, 40, seed=1)
    ref[:, 0] = rewards
    for f, estimator in itertools.product((torch.exp, torch.atan), ("add_one", "log_mean")):
        before = vbon.estimate_log_F(rewards, ref, estimator)
        assert torch.equal(vbon.estimate_log_F(f(rewards), f(ref), estimator), before)


def test_the_smooth_estimator_is_a_least_squares_fit():
    levels = torch.log(torch.arange(1, 301).double() / 301)
    exact = -torch.log(-levels / 0.7) / 1.3  # rewards that lie on −0.7 exp(−1.3 r) exactly
    ref = torch.stack([normals(300) + 2, 0.1 * normals(300, seed=1), exact]).sort(1).values
    a, b = vbon.fit_log_F(ref)
    assert [a[2].item(), b[2].item()] == pytest.approx([0.7, 1.3], rel=0.03)

    def loss(b):  # with the best a for this b, in closed form
        e = torch.exp(-b.unsqueeze(1) * (ref - ref[:, :1]))
        fit = (e @ levels / e.square().sum(1)).unsqueeze(1) * e
        return (fit - levels).square().sum(1), fit
    for factor in (0.1, 0.9, 1.1, 10):
        assert (loss(b)[0] < loss(factor * b)[0]).all()
    close(-a.unsqueeze(1) * torch.exp(-b.unsqueeze(1) * ref), loss(b)[1], atol=1e-6)
    for bad, words in (([1.0, 2.0], "at least 3 finite"), ([1.0, 2.0, INF], "at least 3 finite"),
                       (ref + 1e4, "overflows")):
        with pytest.raises(ValueError, match=words):
            vbon.fit_log_F(bad)
    # The estimate does not depend on where zero is.
    scores, found = normals(3), vbon.estimate_log_F(normals(3), ref, "smooth")
    close(found, -a * torch.exp(-b * scores), atol=1e-9)
    close(found, vbon.estimate_log_F(scores + 1e4, ref + 1e4, "smooth"), atol=1e-6)
    assert all(x.isfinite() for x in vbon.fit_log_F(torch.ones(5)))


# ========== PPO, prefix critic, token bias =======================================================

@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.long, torch.half, torch.double])
def test_ppo_functions_and_their_gradients_equal_naive_loops(dtype):
    """Over response tokens. NaN outside the mask, which may have any type, changes nothing."""
    lengths, clip = [4, 2, 1], 0.2
    places = [(b, t) for b, n in enumerate(lengths) for t in range(n)]
    bools = torch.arange(4) < torch.tensor(lengths).unsqueeze(1)
    mask, (x, y, z) = bools.to(dtype), torch.where(bools, normals(3, 3, 4), NAN)

    def mean(f):
        return sum(f(*i) for i in places) / len(places)

    def table(f):
        rows = [[f(b, t) if t < n else 0.0 for t in range(4)] for b, n in enumerate(lengths)]
        return doubles(rows)

    def delta(b, t):  # of GAE with γ = 0.9, λ = 0.5
        return x[b, t] + (0.9 * y[b, t + 1] if t + 1 < lengths[b] else 0) - y[b, t]

    def policy_loss(*i):
        ratio = torch.exp(x[i] - y[i])
        return -min(ratio * z[i], min(max(ratio, 1 - clip), 1 + clip) * z[i])

    def value_loss(*i):
        clipped = y[i] + min(max(x[i] - y[i], -clip), clip)
        return max((x[i] - z[i]) ** 2, (clipped - z[i]) ** 2) / 2
    average = mean(lambda *i: x[i])
    std = torch.sqrt(mean(lambda *i: (x[i] - average) ** 2) + 1e-8)
    close(vbon.masked_mean(x, mask), average)
    close(vbon.whiten(x, mask), table(lambda *i: (x[i] - average) / std))
    advantages, returns = vbon.gae(x, y, mask, 0.9, 0.5)
    close(advantages, table(lambda b, t: sum(0.45 ** (s - t) * delta(b, s)
                                             for s in range(t, lengths[b]))))
    close(returns, advantages + torch.where(bools, y, 0.0))
    x.requires_grad_()
    for function, naive in ((vbon.policy_loss, policy_loss), (vbon.value_loss, value_loss)):
        found, expected = function(x, y, z, mask, clip), mean(naive)
        close(found, expected)
        close(*(torch.autograd.grad(loss, x)[0] for loss in (found, expected)))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_prefix_values_are_a_ridge_regression_per_block(every):
    """Also in a block that few responses reach, and for sums over two processes."""
    B, T = 40, 5
    u, rewards = normals(B, T), normals(B, T, seed=1)
    lengths = torch.randint(1, T, (B, 1), generator=seeded(2))
    lengths[:2] = T
    mask, expected = torch.arange(T) < lengths, torch.zeros(B, T, dtype=torch.double)
    for start in range(0, T, every):
        rows = [i for i in range(B) if mask[i, start]]
        X = np.array([[u[i, start].item() ** j for j in range(4)] for i in rows])
        y = np.array([rewards[i, start:][mask[i, start:]].sum().item() for i in rows])
        fit = np.linalg.solve(X.T @ X + np.diag([0.01, 1, 4, 16]), X.T @ y)
        expected[rows, start:start + every] = torch.from_numpy(X @ fit).unsqueeze(1)
    expected, sums = torch.where(mask, expected, 0.0), []
    rewards = torch.where(mask, rewards, NAN)
    close(vbon.prefix_values(u, rewards, mask, every), expected, atol=1e-9)
    vbon.prefix_values(u[:15], rewards[:15], mask[:15], every, lambda x: sums.append(x) or x)
    second = vbon.prefix_values(u[15:], rewards[15:], mask[15:], every, lambda x: x + sums[0])
    close(second, expected[15:], atol=1e-9)


def test_score_prefixes_gives_normal_quantiles_of_partial_responses(toy):
    words = [["very", "superb", "."], ["slow"]]
    ids = [toy.tokenizer.convert_tokens_to_ids(row) for row in words]
    rollout = vbon.Rollout(None, None, *vbon.pad(ids, 0, "right"))
    prompts, ref = ["the plot was", "the music was"], doubles([[-1.0, 0.0, 0.5, 3.0], [9.0] * 4])
    u, every_second = (vbon.score_prefixes(toy, prompts, rollout, ref, every) for every in (1, 2))
    k = doubles([1.5, 4])  # "very" alone has warmth 0, a tie, and "very superb" is above all
    expected = doubles([0, *torch.special.ndtri((k + 0.5) / 5)], [0, 0, 0])
    close(u, torch.stack(expected), atol=1e-6, rtol=0)
    close(every_second, torch.where(torch.arange(3) == 2, u, 0))


@pytest.mark.parametrize("kl_coef", [10.0, 0.1])
def test_step_token_bias_moves_the_logit_of_each_token(kl_coef):
    """By the same number at every place, because of the LayerNorm, and never too far."""
    norm, V, step, limit = torch.nn.LayerNorm(8), 11, 0.25, 0.005
    norm.weight.data.uniform_(0.5, 2, generator=seeded())
    norm.bias.data.normal_(generator=seeded(1))
    weight = torch.randn(V, 8, generator=seeded(7))
    hidden = norm(torch.randn(400, 8, generator=seeded(2))).detach()
    counts, mean_counts = torch.zeros(V, dtype=torch.double), torch.zeros(V)
    for iteration in range(3):
        tokens = torch.randint(V - 1, (6, 5), generator=seeded(3 + iteration))  # token V−1 never
        mask = torch.rand(6, 5, generator=seeded(4 + iteration)) < 0.8
        advantages, values = torch.randn(2, 6, 5, generator=seeded(5 + iteration))
        rollout = vbon.Rollout(None, None, tokens, mask, values=values, returns=values + advantages)
        of_token = [advantages[(tokens == a) & mask] for a in range(V)]
        number = torch.tensor([len(x) for x in of_token])
        mean_counts = number if iteration == 0 else (1 - step) * mean_counts + step * number
        bias = torch.stack([x.sum() for x in of_token]) / kl_coef / (mean_counts / step + 20)
        nats = (mean_counts * bias ** 2).sum() / mean_counts.sum() / 2
        assert (nats > limit) == (kl_coef < 1)
        bias *= min(1, math.sqrt(limit / nats))
        before = hidden @ weight.T
        vbon.step_token_bias(weight, hidden, rollout, counts, step, kl_coef)
        close(counts, mean_counts.double(), rtol=1e-6)
        assert bias[-1] == 0 and (bias != 0).sum() > 5
        close(hidden @ weight.T - before, bias.expand(400, V), atol=1e-3 if kl_coef < 1 else 1e-5)


# ========== Models: decoding, frozen layers ======================================================

SIZES = dict(vocab_size=40, initializer_range=0.2, hidden_size=32, num_hidden_layers=3,
             num_attention_heads=2, intermediate_size=64, max_position_embeddings=64)
ROPE = dict(num_key_value_heads=1, pad_token_id=0)
ROPE16 = ROPE | dict(head_dim=16)
WINDOW = ROPE16 | dict(sliding_window=4)  # shorter than the longest prompt
MIXED = WINDOW | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"])
KINDS = {
    "GPT2": dict(n_embd=32, n_layer=3, n_head=2, n_positions=64), "GPTNeoX": {},
    "Bloom": dict(n_layer=3, n_head=2), "Falcon": {},
    "OPT": dict(ffn_dim=64, word_embed_proj_dim=32, init_std=0.2),
    "Llama": ROPE, "Gemma": ROPE16, "Mistral": WINDOW,
    **{kind: ROPE16 | dict(use_sliding_window=True, sliding_window=8, max_window_layers=n)
       for n, kind in enumerate(("Qwen2", "Qwen3"), 1)},
    "Phi3": WINDOW, "Gemma2": MIXED, "Gemma3Text": MIXED, "Olmo3": MIXED,
    "GptOss": MIXED | dict(num_local_experts=4)}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6, 7, 8]]


def small_lm(kind="GPT2", seed=0, **changes):
    torch.manual_seed(seed)
    used = list(SIZES)[:{"GPT2": 2, "Bloom": 3}.get(kind, 7)]  # the others have their own names
    settings = {k: SIZES[k] for k in used} | KINDS.get(kind, {}) | changes
    config = getattr(transformers, kind + "Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def lm_args(**changes):
    return types.SimpleNamespace(**dict(ref="mine", device="cpu", temperature=0.8, dtype="float32",
                                        minibatch=32, unfrozen_layers=2) | changes)


@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6, 7], [8, 9, 11]]], ids=["padded", "unpadded"])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_the_models_own_forward_pass(kind, prompts):
    """Tokens, log-probs and values of padded, cached, shrinking batches equal those of one forward
    pass without padding per response."""
    lm, eos, temperature, copies = small_lm(kind), 10, 0.8, 48 // len(prompts)
    head = torch.nn.Linear(32, 1)
    uniforms = torch.rand(len(prompts) * copies, 10, generator=seeded(1))
    rollout = vbon.generate(lm, prompts, uniforms, [eos], temperature, head)
    lengths = rollout.mask.sum(1)
    assert 0 < (lengths < 10).sum() < len(lengths), "some should end at EOS and some at the limit"
    for i, response in enumerate(vbon.token_lists(rollout)):
        assert eos not in response[:-1] and (len(response) == 10 or response[-1] == eos)
        prompt, row = prompts[i // copies], rollout[i]
        with torch.no_grad():
            out = lm(torch.tensor([prompt + response]), output_hidden_states=True)
        logits, hidden = (x[0, len(prompt) - 1:-1] for x in (out.logits, out.hidden_states[-1]))
        log_pi, values = (logits / temperature).log_softmax(-1), head(hidden).squeeze(-1).detach()
        close(row.log_probs[row.mask], log_pi[range(len(response)), response], 5e-5, 1e-4)
        close(row.values[row.mask], values, atol=5e-5, rtol=1e-4)
        cdf = log_pi.exp().cumsum(-1)
        for t, token in enumerate(response):
            below = cdf[t, token] - log_pi[t, token].exp()
            assert below - 1e-5 <= uniforms[i, t] <= cdf[t, token] + 1e-5
    assert not rollout.log_probs[~rollout.mask].any() and not rollout.values[~rollout.mask].any()
    with mock.patch.object(vbon, "generate", wraps=vbon.generate) as tried:
        for dtype, longest in (("float32", 0), ("bfloat16", 70)):  # also longer than a window
            vbon.check_sampler(lm, [eos], lm_args(dtype=dtype), longest)
    window = getattr(lm.config, "sliding_window", None) or 0
    assert max(map(len, tried.call_args.args[1])) > window


@pytest.mark.parametrize("kind, settings", [
    ("Rwkv", dict(num_hidden_layers=2)), ("Mamba", dict(state_size=4)),
    ("RecurrentGemma", ROPE16 | dict(lru_width=32, attention_window_size=16)),
    ("Roberta", dict(is_decoder=True)),
    ("Bart", dict(d_model=32, encoder_layers=1, decoder_layers=1))])
def test_models_that_cannot_be_sampled_from_are_refused(kind, settings):
    with pytest.raises(vbon.UserError, match=f"--ref mine: cannot sample from a {kind}"):
        vbon.check_sampler(small_lm(kind, **settings), [10], lm_args(unfrozen_layers=-1), 0)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_layers_run_once(kind, K):
    """On the reference model's output of the last frozen layer, the top K layers give the logits
    and gradients of a full pass, for left-padded prompts and responses of different lengths."""
    ref, args = small_lm(kind), lm_args(unfrozen_layers=K)
    policy = vbon.make_policy(ref, K)
    trained = [p for p in policy.parameters() if p.requires_grad]
    layers = vbon.transformer_layers(policy)[0]
    pointers = {p.data_ptr() for p in ref.parameters()}  # frozen parameters are shared, not copied
    assert all((p.data_ptr() in pointers) != p.requires_grad for p in policy.parameters())
    for i, layer in enumerate(layers):
        assert all(p.requires_grad == (i >= len(layers) - K) for p in layer.parameters())

    # Before the first step the policy is the reference model.
    uniforms = torch.rand(96, 10, generator=seeded(1))
    rollout = vbon.generate(policy, PROMPTS * 24, uniforms, [10], 0.8)
    by_ref = vbon.reference_log_probs(ref, rollout, args)
    close(by_ref, rollout.log_probs, atol=5e-5, rtol=1e-4)

    # After a step they differ, and with or without frozen_hidden the policy is the same.
    for p in trained:
        p.data += 0.05 * torch.randn(p.shape, generator=seeded(2))
    batch, found = rollout[torch.arange(32, 64)], []  # the rows of a minibatch
    for x in (vbon.Rollout(**vars(batch) | dict(frozen_hidden=None)), batch):
        log_probs, hidden = vbon.response_log_probs(policy, x, 0.8, K)
        loss = torch.where(x.mask, log_probs, 0.0).square().mean()
        found.append([log_probs, hidden, *torch.autograd.grad(loss, trained)])
    for by_full, by_top in zip(*found):
        close(by_top, by_full, atol=1e-6, rtol=0)
    assert not torch.allclose(found[0][0][batch.mask], by_ref[32:64][batch.mask], atol=1e-2)

    # Nothing is computed below the top K layers, and afterwards the layers are restored.
    calls = []
    for layer in layers:
        part = next(m for m in layer.modules() if not [*m.children()])
        part.register_forward_pre_hook(lambda *_: calls.append(0))
    vbon.response_log_probs(policy, batch, 0.8, K)
    assert len(calls) == K
    for layer in [*layers, *vbon.transformer_layers(ref)[0]]:
        assert "forward" not in vars(layer) and not layer._forward_hooks


def test_sampled_tokens_follow_the_distribution():
    logits, n = torch.tensor([2.0, -INF, 0.0, 1.0, -1.0]), 200_000
    uniforms, p = torch.rand(n, generator=seeded()), logits.softmax(-1)
    tokens, log_probs = vbon.sample_tokens(logits.expand(n, -1), uniforms)
    frequency = tokens.bincount(minlength=5) / n
    assert (frequency - p).abs().max() < 4 * math.sqrt(0.25 / n) and frequency[1] == 0
    torch.testing.assert_close(log_probs, p.log()[tokens])
    # None of probability 0 at the ends of [0, 1), although most of 50,000 underflow.
    logits = 4 * torch.randn(64, 50_000, generator=seeded()) / 0.1
    for u in (0.0, 0.5, 1 - 2 ** -24):
        tokens, log_probs = vbon.sample_tokens(logits, torch.full((64,), u))
        assert (logits.softmax(-1).gather(1, tokens.unsqueeze(1)) > 0).all()
        exact = logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        smallest = math.log(torch.finfo(torch.float32).tiny)
        close(log_probs, exact.clamp(min=smallest), atol=1e-4, rtol=1e-5)


# ========== Running the scripts ==================================================================

@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def flags(**settings):
    pairs = [("--" + name.replace("_", "-"), str(x)) for name, x in settings.items()]
    return [*itertools.chain(*pairs)]


def call(*argv, script=vbon, code=0, **settings):
    """Call a script's main in this process. Returns stdout, or stderr if the exit code is not 0."""
    out, err = io.StringIO(), io.StringIO()
    name = mock.patch.object(sys, "argv", [script.__file__])  # of which argparse takes the name
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), name:
        try:
            found = script.main([*map(str, argv), *flags(**settings)])
        except SystemExit as stop:  # of argparse
            found = stop.code
    assert found == code, err.getvalue()
    return err.getvalue() if code else out.getvalue()


def refused(word, *argv, script=vbon, **settings):
    """Exit code 2 and one line on stderr, after any progress bar, that has this word."""
    error = call(*argv, script=script, code=2, **settings)
    line = error.strip().splitlines()[-1]
    assert line.startswith(Path(script.__file__).name + ": ") and str(word) in line, error
    assert "Traceback" not in error and "usage:" not in error


def parsed(*argv, script=vbon, **settings):
    with mock.patch.object(script, "train") as train:
        call(*argv, script=script, **settings)
    return train.call_args.args[0]


def start(patch, *argv, script=vbon, launcher=(), **environment):
    """Start a script in a new process, after these lines of Python."""
    Path("patched.py").write_text(f"import os, sys\nsys.path.insert(0, {str(HERE)!r})\n"
                                  f"import {script.__name__} as script\n{patch}\n"
                                  "if __name__ == '__main__':\n    sys.exit(script.main())")
    return subprocess.Popen([sys.executable, *launcher, "patched.py", *map(str, argv)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def kill_while_writing(number, word):
    """A patch: kill -9 when file `number` with this word in its path is about to be renamed."""
    return f"""
replace, seen = os.replace, []
def kill(source, target):
    seen.extend([target] if {word!r} in str(target) else [])
    if len(seen) == {number}:
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = kill"""


def read_json(path):
    return json.loads(Path(path).read_text("utf-8"))


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def read_csv(path):
    return [*csv.DictReader(Path(path).read_text("utf-8").splitlines())]


def write_lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit(path, **changes):
    Path(path).write_text(json.dumps(read_json(path) | changes))


def files(folder):
    """{name: content} of a folder, at any depth."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*.*")}


def sample_rows(folder="samples"):
    """The lines of the cached reference samples in a folder."""
    return [row for path in sorted(Path(folder).rglob("*.jsonl")) for row in read_lines(path)]


def outcome(run):
    """metrics.jsonl without its times, and the bytes of the saved weights."""
    metrics = [{k: x for k, x in row.items() if not k.startswith("time/")}
               for row in read_lines(Path(run, "metrics.jsonl"))]
    return metrics, Path(run, "policy/model.safetensors").read_bytes()


# ========== Toy task =============================================================================

TOY = dict(episodes=256, rollouts=128, minibatch=64, M=30, max_new_tokens=3, device="cpu")


def toy_args(*method, script=vbon, **changes):
    return parsed(*method, script=script, **TOY | dict(backend="hand", out="unused") | changes)


@pytest.fixture(scope="module")
def toy():
    return vbon.setup(toy_args())


@pytest.fixture(scope="module")
def toy_runs(tmp_path_factory):
    """A folder with runs of vbon.py, "one" and "two" with seeds 1 and 2, and of each baseline."""
    folder = tmp_path_factory.mktemp("toy")
    settings = TOY | dict(samples=folder / "samples", save_every=0)
    for seed, name in enumerate(("one", "two"), 1):
        call(**settings, out=folder / name, seed=seed)
    for method in bon_baselines.METHODS:
        call(method, script=bon_baselines, **settings | dict(
            N=4, episodes=4096, out=folder / method))
    return folder


def test_toy_is_enumerated_exactly(toy):
    args = toy_args()
    ref_rewards = vbon.reference_samples(toy, args)
    exact = vbon.ExactToy(toy, args, ref_rewards)
    r, log_ref = exact.rewards, exact.log_ref
    assert len(exact.responses) == len(set(exact.responses)) == 1 + 18 + 18 ** 2 + 18 ** 3
    assert r.tolist() == [vbon.warmth(y) for y in exact.responses]
    for response in ("superb .", "very dull .", "slow but moving"):  # the last one is cut off
        ids = torch.tensor([toy.encode("the plot was " + response)])
        log_p = toy.ref(ids).logits[0].log_softmax(-1)[range(2, ids.shape[1] - 1), ids[0, 3:]]
        found = log_ref[2, exact.responses.index(response.removesuffix(" ."))].item()
        assert found == pytest.approx(log_p.sum().item(), abs=1e-4)
    for i in (0, 99, 3000):  # F as a sum over all that is worse
        worse = (r < r[i]) | (r == r[i]) & (torch.arange(len(r)) < i)
        close(exact.log_F[:, i].exp(), (log_ref.exp() * worse).sum(1), atol=1e-9)
    for log_pi in (log_ref, exact.log_bon):
        close(log_pi.exp().sum(1), torch.ones(4).double(), atol=1e-4)
    of_ref, of_bon = exact.metrics(log_ref), exact.metrics(exact.log_bon)
    kl = (log_ref.exp() * (log_ref - exact.log_bon)).sum(1).mean().item()
    assert of_ref["exact/kl_to_ref"] == 0 and of_ref["exact/kl_to_bon"] == pytest.approx(kl)
    assert of_ref["exact/win_rate"] == pytest.approx(0.5, abs=1e-4)
    assert of_bon["exact/kl_to_bon"] == pytest.approx(0, abs=1e-9)
    # The optimum of E[reward] − KL / N, for the F̂ of training.
    log_F = torch.stack([vbon.estimate_log_F(r, row) for row in ref_rewards])
    optimum = log_ref + 16 * vbon.vbon_reward(log_F, log_ref, 16)
    optimum = exact.metrics(optimum.log_softmax(1))["exact/kl_to_bon"]
    assert exact.optimum["exact/kl_to_bon_of_optimum"] == pytest.approx(optimum, abs=1e-6)


def changed_policy(task, K=-1, amount=0.05, seed=0):
    policy = vbon.make_policy(task.ref, K)
    for p in policy.parameters():
        if p.requires_grad:
            p.data += amount * torch.randn(p.shape, generator=seeded(seed))
    return policy


@pytest.mark.parametrize("objective", ["vbon", "rlhf"])
def test_collect(toy, objective):
    """Metrics agree with the exact ones, returns are the terminal reward less the KL penalty."""
    args, B = toy_args(objective=objective, M=300), torch.arange(4000)
    policy, exact, prompts = changed_policy(toy), vbon.ExactToy(toy, args), toy.prompts * 1000
    ref_rewards = vbon.reference_samples(toy, args).repeat(1000, 1)
    rollout, found = vbon.collect(policy, None, toy, prompts, ref_rewards, args, seeded())
    expected = exact.metrics(exact.log_probs(policy))
    for name, error in dict(reward=0.1, kl_to_ref=0.1, win_rate=0.05, kl_to_bon=1.4).items():
        assert found["objective/" + name] == pytest.approx(expected["exact/" + name], abs=error)

    # With values of 0 and λ = 1 a return is the sum of the rewards to come.
    mask, log_ref = rollout.mask, vbon.reference_log_probs(toy.ref, rollout, args).double()
    scores = doubles(toy.score(prompts, vbon.decode(toy, prompts, vbon.token_lists(rollout))))
    assert found["objective/reward"] == pytest.approx(scores.mean().item())
    rewards = args.kl_coef * (log_ref - rollout.log_probs)
    rewards[B, mask.sum(1) - 1] += vbon.terminal_reward(scores, ref_rewards, log_ref.sum(1), args)
    to_come = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    close(rollout.returns.double(), torch.where(mask, to_come, 0.0), atol=1e-4)
    close(rollout.advantages, vbon.whiten(rollout.returns, mask), atol=1e-5)


def test_files_of_a_run_and_its_saved_policy(toy, toy_runs):
    one, metrics = toy_runs / "one", read_lines(toy_runs / "one/metrics.jsonl")
    result, exact = read_json(one / "result.json"), vbon.ExactToy(toy, toy_args())
    assert [m["episode"] for m in metrics] == [128, 256]
    for name in ["exact/" + x for x in evaluate.METRICS] + ["objective/reward", "ppo/value_loss"]:
        assert result[name] == metrics[-1][name]
    for row in sample_rows(toy_runs / "samples"):
        assert row.keys() == {"prompt", "start", "rewards", "responses", "tokens"}
        assert row["rewards"] == toy.score(None, row["responses"])
    kl = exact.metrics(exact.log_probs(load_lm(one / "policy")))["exact/kl_to_bon"]
    assert kl == pytest.approx(result["exact/kl_to_bon"], abs=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(one / "policy")
    assert tokenizer.encode("the plot was") == exact.prompt_ids[2]


@pytest.mark.parametrize("extras", [{}, dict(prefix_critic=1, token_bias_lr=0.1, lam=0.8)])
def test_toy_policy_approaches_best_of_4(extras):
    changes = dict(N=4, episodes=20_480, rollouts=1024, minibatch=256, M=200, out="run")
    result = vbon.train(toy_args(**changes, **extras))
    assert result["exact/kl_to_bon"] < 0.1  # from 1.6
    assert result["exact/win_rate"] == pytest.approx(0.8, abs=0.05)


# ========== Runs that are killed, stopped, resumed, overwritten ==================================

SCRIPTS = [(vbon, ["--prefix-critic", "0", "--token-bias-lr", "0"]),
           (vbon, ["--prefix-critic", "1", "--token-bias-lr", "0.1"]),
           (bon_baselines, ["bonbon", "--N", "4"]), (bon_baselines, ["bond"])]


@pytest.mark.parametrize("script, method, word", [
    *((*script, "checkpoint.pt") for script in SCRIPTS),
    *((*script, "-000006-") for script in SCRIPTS[1:3])])  # of a batch of reference samples
def test_a_killed_run_resumes_to_the_same_bytes(models, script, method, word):
    """kill -9 while a file is written. The resumed run ends as one that was not killed."""
    argv = [*method, *flags(**own(models, episodes=32, save_every=1, sample_batch=12))]
    killed = start(kill_while_writing(2, word), *argv, "--out", "killed", script=script)
    call(*argv, script=script, out="whole", samples="whole-samples")
    training = word == "checkpoint.pt"
    assert killed.wait() == -9 and os.path.exists("killed/checkpoint.pt") == training
    assert training or len(sample_rows()) == 2 and len(sample_rows("whole-samples")) == 6
    resume = [*method[:script is bon_baselines], "--task", "imdb", "--out", "killed", "--resume"]
    printed = call(*resume, script=script)  # with the run's settings
    assert ("resumed" if training else "no checkpoint") in printed
    assert outcome("killed") == outcome("whole")
    assert files("samples").items() >= files("whole-samples").items()
    assert [row["episode"] for row in outcome("whole")[0]] == [8, 16, 24, 32]
    refused("killed holds a run", *resume, script=script)  # it is finished


def test_a_stopped_run_is_resumed_with_its_settings_and_models_only(toy_runs):
    """After Ctrl-C at the end of the last iteration."""
    argv = flags(**TOY, seed=1, save_every=1, out="run")
    with mock.patch.object(vbon, "save_run", side_effect=KeyboardInterrupt):
        assert "--resume continues run" in call(*argv, code=130).splitlines()[-1]
    before, other = files("run"), io.BytesIO()
    torch.save(torch.load("run/checkpoint.pt") | {"ref": "another"}, other)
    refused("--overwrite", *argv)
    for name, value in dict(lr=0.01, N=8, estimator="log_mean", objective="rlhf").items():
        refused(f", got {value}", "--resume", out="run", **{name: value})
    for name, damage, word in (
            ("checkpoint.pt", b"", "checkpoint.pt"), ("config.json", b"\xff\xfe{}", "config.json"),
            ("checkpoint.pt", before["checkpoint.pt"][:-1000], "checkpoint.pt"),
            ("checkpoint.pt", other.getvalue(), "other weights behind --ref")):
        Path("run", name).write_bytes(damage)
        refused(word, "--resume", out="run")
        Path("run", name).write_bytes(before[name])
    with open("run/metrics.jsonl", "a") as file:
        file.write("torn")
    assert "after 2 iterations" in call("--resume", out="run", samples="new", save_every=7)
    assert outcome("run") == outcome(toy_runs / "one")


def test_a_run_starts_again(toy_runs):
    """With --resume if it has no checkpoint yet, with --overwrite even if it is finished."""
    with mock.patch.object(vbon, "reference_samples", side_effect=KeyboardInterrupt):
        assert "no checkpoint" in call(**TOY, seed=1, out="run", code=130)
    assert "no checkpoint" in call("--resume", out="run")
    assert outcome("run") == outcome(toy_runs / "one")
    Path("run/eval-0123.json").write_text("{}")
    call("--overwrite", **TOY, seed=2, out="run")
    assert outcome("run") == outcome(toy_runs / "two") and not os.path.exists("run/eval-0123.json")


@pytest.mark.parametrize("script, method", SCRIPTS)
@pytest.mark.parametrize("minibatch", [64, 128])
def test_weights_that_are_not_finite_are_not_saved(script, method, minibatch):
    refused("--lr", *method, script=script, **TOY | dict(
        lr=1e18, save_every=1, ppo_epochs=1, minibatch=minibatch, out="run"))
    assert not {"policy", "result.json", "checkpoint.pt"} & set(os.listdir("run"))


@pytest.mark.parametrize("task", vbon.RECIPES)
@pytest.mark.parametrize("script", [vbon, bon_baselines])
def test_help_shows_the_defaults_of_the_task(script, task):
    text = " ".join(call("--task", task, "--help", script=script).split())
    for name, value in script.RECIPES[task].items():
        flag = text.rpartition(f" --{name.replace('_', '-')} ")[2]
        assert f"(default: {value})" in flag.partition(" --")[0], (name, flag)


# ========== imdb and tldr with small models ======================================================

END = "<|endoftext|>"
FEW = dict(episodes=16, rollouts=8, minibatch=4, M=6, train_prompts=6, max_new_tokens=6,
           unfrozen_layers=1)
TESTED = flags(test_prompts=4, test_M=4, test_responses=2)  # of evaluate.py


def byte_tokenizer(*special, **settings):
    """One token per byte after the special ones. Only the settings name any of these."""
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(BPE(vocab={c: i for i, c in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def name_labels(*names):
    return dict(id2label=dict(enumerate(names)), label2id={x: i for i, x in enumerate(names)})


def save_small_models(folder, labels=("NEGATIVE", "POSITIVE"), eos=True, seed=0):
    """Save a GPT-2 and a DistilBERT classifier over bytes, and prompts."""
    small_lm(seed=seed, vocab_size=257, n_positions=32, n_layer=2, bos_token_id=0, eos_token_id=0,
             initializer_range=0.02).save_pretrained(folder / "ref")
    byte_tokenizer(END, **({"eos_token": END} if eos else {})).save_pretrained(folder / "ref")
    config = transformers.DistilBertConfig(
        vocab_size=257, max_position_embeddings=64, dim=32, hidden_dim=64, n_layers=1, n_heads=2,
        **name_labels(*labels))
    transformers.DistilBertForSequenceClassification(config).save_pretrained(folder / "reward")
    byte_tokenizer(END, pad_token=END, model_max_length=64).save_pretrained(folder / "reward")
    write_lines(folder / "prompts.jsonl", [{"prompt": f"Film number {i} is"} for i in range(20)])


def own(folder, **changes):
    """Settings of imdb with the models and prompts of a folder."""
    return dict(task="imdb", N=2) | FEW | dict(
        ref=folder / "ref", reward=folder / "reward", dataset=folder / "prompts.jsonl") | changes


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_small_models(folder)
    return folder


def load_lm(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("objective, critic, dtype", [
    *((objective, 2, "float32") for objective in vbon.OBJECTIVES), ("rlhf", 0, "float32"),
    ("vbon", 2, "bfloat16")])
def test_own_models_and_prompts(models, objective, critic, dtype):
    settings = dict(objective=objective, prefix_critic=critic, dtype=dtype, lr=1e-3, out="run")
    call(**own(models, **settings))
    result, metrics = read_json("run/result.json"), read_lines("run/metrics.jsonl")
    assert 0 < result["objective/reward"] < 1 and len(metrics) == 2
    assert all(math.isfinite(x) for row in metrics for x in row.values())
    saved = transformers.AutoModelForCausalLM.from_pretrained("run/policy")
    assert saved.dtype == torch.float32  # what is trained is not rounded
    ref = vbon.setup(parsed("--overwrite", **own(models, **settings))).ref
    for p in itertools.chain(*(vbon.make_policy(ref, K).parameters() for K in (1, -1))):
        assert p.dtype == (torch.float32 if p.requires_grad else getattr(torch, dtype))
    assert type(ref.transformer.h[0].mlp.act) is torch.nn.GELU  # fused
    shapes = [[len(row[x]) for x in ("rewards", "tokens")] for row in sample_rows()]
    assert shapes == ([] if objective == "rlhf" and not critic else [[6, 6]] * 6)
    # At first the policy is the reference model, by decoding and by a pass on frozen layers.
    error = 0.05 if dtype == "bfloat16" else 1e-4
    assert metrics[0]["objective/kl_to_ref"] == pytest.approx(0, abs=error)
    # The token bias is saved, in an output layer that the embeddings do not share.
    policy, ref = load_lm("run/policy"), load_lm(models / "ref").to(getattr(torch, dtype))
    for get, equal in (("get_input_embeddings", True), ("get_output_embeddings", False)):
        assert torch.equal(*(getattr(lm, get)().weight.float() for lm in (policy, ref))) == equal


def test_prompts_of_imdb_are_2_to_8_tokens_of_a_text(models):
    os.mkdir("data")
    for split in ("train", "test"):
        write_lines(f"data/{split}.jsonl", [{"text": f"{split} é {i} of it"} for i in range(40)])
    for split in ("train", "test"):
        args = parsed(**own(models, dataset="data"))
        args.test_prompts = 6
        prompts = vbon.setup(args, split).prompts
        assert len(prompts) == 6 and all(split.startswith(p[:5].strip()) for p in prompts)
        assert all(2 <= len(p.encode()) <= 8 and "\ufffd" not in p for p in prompts)


def test_the_folder_is_named_by_all_that_samples_depend_on(models):
    def folder_of(folder, split="train", **changes):
        args = parsed(**own(Path(folder), **changes))
        args.test_prompts = 1
        return str(vbon.samples_folder(vbon.setup(args, split), args)[0])
    shutil.copytree(models, "base")
    shutil.copytree(models, "copy")
    found = [folder_of("base"), folder_of("base", split="test")]
    assert folder_of("copy", seed=1, M=7, out="elsewhere") == found[0]  # contents count, not places
    tokenizer = read_json("base/ref/tokenizer.json")["model"]
    words = tokenizer["vocab"]
    swapped = dict(model=tokenizer | {"vocab": words | {"a": words["e"], "e": words["a"]}})
    for i, (file, change) in enumerate((
            ("reward/config.json", name_labels("POSITIVE", "NEGATIVE")),
            ("reward/tokenizer_config.json", dict(model_max_length=32)),
            ("ref/tokenizer.json", swapped), ("ref/config.json", dict(layer_norm_epsilon=0.1)),
            ("ref/generation_config.json", dict(eos_token_id=[0, 5])))):
        edit(Path(shutil.copytree("base", f"edit{i}"), file), **change)
        found.append(folder_of(f"edit{i}"))
    found += [folder_of("base", **{name: value}) for name, value in dict(
        backend="vllm", temperature=0.5, no_eos_reward=-1.0, dtype="bfloat16", data_seed=1,
        max_new_tokens=5).items()]
    save_small_models(Path("base"), seed=1)  # other weights
    found.append(folder_of("base"))
    assert len(set(found)) == len(found) == 2 + 5 + 6 + 1


@pytest.fixture(scope="module")
def pythias(tmp_path_factory):
    """A folder with GPTNeoX models over bytes, where EOS is token 0: a reference model, and reward
    models with and without a padding token."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pythias")
    shape = SIZES | dict(vocab_size=258, num_hidden_layers=2, bos_token_id=0, eos_token_id=0,
                         initializer_range=0.02, max_position_embeddings=256)
    for name, pad in dict(ref=None, no_pad=None, reward="<|pad|>").items():
        kind = "CausalLM" if name == "ref" else "SequenceClassification"
        model = getattr(transformers, "GPTNeoXFor" + kind)(transformers.GPTNeoXConfig(
            **shape, num_labels=1, pad_token_id=1 if pad else None))
        if name == "ref":  # some responses should end
            model.base_model.final_layer_norm.bias.data[0] = 1
            model.get_output_embeddings().weight.data[0, 0] = 2
        model.save_pretrained(folder / name)
        byte_tokenizer(END, "<|pad|>", eos_token=END, pad_token=pad,
                       model_max_length=256).save_pretrained(folder / name)
    return folder


def test_tldr_from_training_to_evaluation(pythias):
    """Training, and a test on both distributions with the training reward and a second one."""
    subreddits = ("relationships", "relationship_advice", "tifu", "AskReddit")
    rows = [{"subreddit": subreddits[i % 4], "title": f"Title {i}", "summary": "A summary.",
             "post": f"Paragraph of {i}.\n\n" + "More of it. " * (i % 30)} for i in range(120)]
    os.mkdir("data")
    write_lines("data/train.jsonl", rows[:80])
    write_lines("data/test.jsonl", rows[80:])
    call(task="tldr", ref=pythias / "ref", reward=pythias / "reward", dataset="data", out="run",
         **FEW | dict(episodes=8, rollouts=4, max_new_tokens=8))
    cached = sample_rows()
    assert {y.endswith(END) for row in cached for y in row["responses"]} == {True, False}
    assert all(row["prompt"].startswith(vbon.TLDR_SUBREDDITS) for row in cached)

    tested = ["run", *TESTED, "--test-prompts", 8]
    evaluated(*tested)
    (path,) = Path("run").glob("eval-*.json")
    samples, found = (read_json(path)[name] for name in ("samples", "metrics"))
    inside = [s["prompt"].startswith(vbon.TLDR_SUBREDDITS) for s in samples]
    assert inside == [True] * 8 + [False] * 8
    for s in samples:
        assert s["prompt"].endswith("\n\nTL;DR:") and len(s["prompt"].encode()) <= 256 - 8
        assert (s["reward"] == -1.0) == (not s["response"].endswith(END))
    assert found["reward"] == pytest.approx((found["in/reward"] + found["out/reward"]) / 2)
    call(*tested, "--reward", pythias / "no_pad", "--temperatures", 0.25, 1, "--against",
         "temperature", script=curves)
    assert os.path.getsize("figures/tldr-temperatures.png") > 10_000


def test_posts_of_tldr_are_cut_to_fit():
    words = types.SimpleNamespace(encode=str.split)
    row = {"subreddit": "tifu", "title": "T", "post": "one two three\n\nfour five\n\nsix"}
    head, tail = "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: ", "\n\nTL;DR:"
    for longest, rest in ((99, row["post"]), (11, "one two three\n\nfour five"), (8, "one two")):
        assert vbon.make_prompt(row, words, longest, None) == head + rest + tail


# ========== Models and data of the user ==========================================================

PAD, BOS = "<pad>", "<s>"
CLASSIFIERS = {
    "DistilBert": dict(max_position_embeddings=64, dim=32, hidden_dim=64, n_layers=2, n_heads=2),
    "Roberta": SIZES | dict(max_position_embeddings=66, pad_token_id=1), "GPT2": KINDS["GPT2"]}


def save_words(folder, pad=PAD, single="$A", template=None):
    """Save a byte tokenizer. single is what it makes of a text: "<s> $A" adds BOS."""
    tokenizer = byte_tokenizer(END, PAD, BOS, pad_token=pad, bos_token=BOS, eos_token=END,
                               padding_side="left", model_max_length=128, chat_template=template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(END, 0), (BOS, 2)])
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_classifier(folder, kind="DistilBert", names=("NEGATIVE", "POSITIVE"), words={}, **changes):
    """Save a classifier over bytes, with weights so large that every token counts."""
    torch.manual_seed(0)
    settings = CLASSIFIERS[kind] | dict(vocab_size=259, initializer_range=0.3) | changes
    config = getattr(transformers, kind + "Config")(**settings, **name_labels(*names))
    getattr(transformers, kind + "ForSequenceClassification")(config).save_pretrained(folder)
    save_words(folder, **words)
    return folder


def save_lm(eos=0, **words):
    """Save a GPT-2 over bytes with a BOS token and these EOS ids as "lm"."""
    lm = small_lm(vocab_size=259, n_positions=128, bos_token_id=2, initializer_range=0.02)
    lm.generation_config.eos_token_id = eos
    lm.save_pretrained("lm")
    return save_words("lm", **words)


@torch.no_grad()
def plain(folder, *texts, read=lambda x: x if len(x) == 1 else x.softmax(0), index=-1):
    """What the library gives for one text at a time: the last logit or probability."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return [read(x)[index].item() for x in logits]


@pytest.mark.parametrize("end", ["", END])
@pytest.mark.parametrize("names, taken, reads", [
    (["score"], 0, "logit"), (["non-toxic", "nonsense"], 1, "probability"),
    (["pos", "neg"], 0, "probability"), (["Positive", "other"], 0, "sigmoid"),
    (["bad", "good"], 1, "sigmoid")])
@pytest.mark.parametrize("kind, words", [
    ("DistilBert", {}), ("Roberta", {}), ("GPT2", {}), ("GPT2", dict(pad=None)),
    ("GPT2", dict(single="$A " + END)), ("GPT2", dict(single="$A " + END, pad=None))])
def test_a_classifier_gives_one_number_per_text(kind, words, names, taken, reads, end, capsys):
    """The logit, or the probability of the positive label, else of the second one. Padding never
    counts, EOS does. Of long texts the start is cut."""
    save_classifier("a", kind, names, words, problem_type=(
        "multi_label_classification" if reads == "sigmoid" else None))
    score, identity = vbon.load_reward("a", "cpu", end, -1.0)
    shown = reads + f" of the label {names[taken]!r}" * (len(names) > 1)
    assert f"{shown}\n" in capsys.readouterr().out and shown in identity
    assert ("-1.0 without" in identity) == bool(end)
    texts = ["short!", "a text of medium length", "x", "longer than sixty-four tokens " * 9]
    room = 64 - bool(end) - bool("single" in words)
    read = dict(logit=lambda x: x, probability=lambda x: x.softmax(0), sigmoid=torch.sigmoid)[reads]
    cut = [("p: " + y)[-room:] + end for y in texts]
    expected = plain("a", *cut, read=read, index=taken)
    assert max(expected) - min(expected) > 0.01
    for n in (4, 2, 1):  # and one text without EOS
        found = score(["p: "] * (n + 1), [*(y + end for y in texts[:n]), "cut off"])
        assert found[:n] == pytest.approx(expected[:n], abs=1e-3) and (found[n] == -1) == bool(end)


@pytest.mark.parametrize("single", ["$A", BOS + " $A", BOS + " $A " + END])
def test_a_text_has_one_bos_and_a_prompt_no_eos(models, single):
    words, (adds_bos, adds_eos) = dict(single=single), (x in single for x in (BOS, END))
    tokenizer, bare = save_lm(**words), save_classifier("bare", "GPT2")
    reward = save_classifier("reward", "GPT2", words=words)
    task = vbon.setup(parsed(**own(models, ref="lm", reward=reward)))
    film = tokenizer.encode("Film", add_special_tokens=False)
    assert task.encode(BOS + "Film") == [2, *film] and task.encode("Film") == [2] * adds_bos + film
    expected = plain(bare, BOS + "Film is" + END * adds_eos)
    assert task.score([BOS + "Film"], [" is"]) == pytest.approx(expected, abs=1e-5)


def test_wrongly_saved_policies_and_rewards_that_mix_texts_are_refused(models, monkeypatch):
    lm = transformers.GPT2LMHeadModel
    classifier = transformers.DistilBertForSequenceClassification
    save, forward = lm.save_pretrained, classifier.forward

    def mixed(self, input_ids, **inputs):
        out = forward(self, input_ids, **inputs)
        out.logits[:, 1] += input_ids.shape[1] / 10
        return out
    monkeypatch.setattr(lm, "save_pretrained", lambda _, path: save(load_lm(models / "ref"), path))
    refused("saved policy are off by", **own(models, lr=0.01, out="run"))
    assert not os.path.exists("run/result.json")
    monkeypatch.setattr(classifier, "forward", mixed)
    refused("other texts of their batch", **own(models))


@pytest.mark.parametrize("body, word", [
    ("beside.torch.ones(len(y))", ""), ("[1.0]", "shape (1,)"), ("None", "shape"),
    ("[float('nan')] * len(y)", "got nan"), ("y[999]", "IndexError"), ("y", "ValueError")])
def test_a_function_as_reward(models, body, word):
    """Its file may import a file beside it and define dataclasses."""
    Path("beside.py").write_text("import torch\n")
    Path("my.py").write_text("from __future__ import annotations\nimport dataclasses, beside\n"
                             "@dataclasses.dataclass\nclass Row: x: Row\n"
                             f"def brief(x, y): return {body}\n")
    settings, (_, identity) = own(models, reward="my.py:brief"), vbon.load_reward("my.py:brief")
    if word:
        return refused(word, **settings)
    call(**settings, out="run")
    assert read_json("run/result.json")["objective/reward"] == 1
    with open("my.py", "a") as file:
        file.write("# changed\n")
    assert vbon.load_reward("my.py:brief")[1] != identity


def save_adapter(folder, base, kind="CausalLM", targets=("c_attn",), **settings):
    """Save a LoRA adapter of random weights, without a tokenizer. Returns the PEFT model."""
    peft, task = pytest.importorskip("peft"), dict(CausalLM="CAUSAL_LM").get(kind, "SEQ_CLS")
    torch.manual_seed(1)
    model = getattr(transformers, "AutoModelFor" + kind).from_pretrained(base, **settings)
    lora = peft.LoraConfig(task, r=4, target_modules=list(targets), init_lora_weights=False)
    model = peft.get_peft_model(model, lora).eval()
    model.save_pretrained(folder)
    return model


def test_a_peft_adapter_as_reference_model(models, monkeypatch):
    """It trains, and the saved policy is a whole model."""
    adapter, ids = save_adapter("lora", models / "ref"), torch.arange(1, 30).view(1, -1)
    byte_tokenizer(END, eos_token=END).save_pretrained("lora")
    with mock.patch.object(vbon, "save_run", wraps=vbon.save_run) as saved:
        call(**own(models, ref="lora", lr=1e-2, out="run"))
    _, task, policy, _ = saved.call_args.args
    with torch.no_grad():
        before, ref, after, found = (lm(ids).logits.log_softmax(-1) for lm in (
            adapter, task.ref, policy, load_lm("run/policy")))
    for x, y in ((ref, before), (found, after)):
        close(x, y, atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 1e-3  # it was trained
    save_adapter("tied", models / "ref", targets=["wte"])  # merged, it changes the output layer
    refused("when the adapter is merged", **own(models, ref="tied"))
    refused("--reward lora", **own(models, reward="lora"))
    monkeypatch.setitem(sys.modules, "peft", None)
    refused("peft", **own(models, ref="lora"))


@pytest.mark.parametrize("labels, base, taken", [
    (1, "ref", 0), (2, "ref", 1), (1, "classifier", 0), (2, "classifier", 0)])
def test_a_peft_adapter_as_reward(models, labels, base, taken):
    """Of a base model without a head, or of a classifier with named labels, with its tokenizer."""
    save_classifier("classifier", "GPT2", ["positive", "negative"][:labels])
    source = models / "ref" if base == "ref" else os.path.abspath("classifier")
    adapter = save_adapter("a", source, "SequenceClassification", num_labels=labels)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        x = adapter(**tokenizer("p: good", return_tensors="pt")).logits[0]
    found = vbon.load_reward("a")[0](["p: "] * 2, ["good", "longer than that"])
    expected = (x if labels == 1 else x.softmax(0))[taken].item()
    assert found[0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("backend", ["hand", "vllm"])
def test_each_of_several_eos_ends_a_response(models, backend, monkeypatch):
    """END and two letters. They are in the saved policy."""
    ends, used = [0, 101, 105], [101, 105] if backend == "hand" else [105]

    def answer(requests, params, use_tqdm):
        assert all(p.stop_token_ids == ends for p in params)
        return [mock.Mock(outputs=[mock.Mock(token_ids=[40, 41, 105])] * p.n) for p in params]
    monkeypatch.setitem(sys.modules, "vllm", mock.Mock(
        LLM=lambda *_, **__: mock.Mock(generate=answer), SamplingParams=types.SimpleNamespace))
    tokenizer, reward = save_lm(ends), save_classifier("reward")
    with mock.patch.object(vbon, "update", wraps=vbon.update) as update:
        call(**own(models, ref="lm", reward=reward, max_new_tokens=60, backend=backend, out="run"))
    sampled = [ids for row in sample_rows() for ids in row["tokens"]]
    assert {ids[-1] for ids in sampled if ids[-1] in ends} >= {*used}
    for ids in sampled + vbon.token_lists(update.call_args.args[3]):
        assert not set(ids[:-1]) & set(ends) and (len(ids) == 60 or ids[-1] in ends)
    texts = [text for row in sample_rows() for text in row["responses"]]  # without what ended them
    assert texts == [tokenizer.decode(ids[:-1] if ids[-1] in ends else ids,
                                      skip_special_tokens=True) for ids in sampled]
    assert read_json("run/policy/generation_config.json")["eos_token_id"] == ends


EACH = "{%% for m in messages %%}%s{%% endfor %%}"


@pytest.mark.parametrize("template, of_reward, text", [
    (EACH % "<{{ m.role }}>{{ m.content }}" + "{% if add_generation_prompt %}<bot>{% endif %}",
     EACH % "[{{ m.role }}: {{ m.content }}]", "[system: Be brief.][user: 3?][assistant: good]"),
    # Here the prompt ends with EOS, as DialoGPT's, and the reward model has no template.
    (BOS + EACH % "{{ m.content }}{{ eos_token }}", None, "Be brief.\n3?\ngood")])
def test_prompts_that_are_chats(models, template, of_reward, text):
    chats = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{i}?"}]
             for i in range(20)]
    write_lines("chats.jsonl", [{"prompt": chat} for chat in chats])
    tokenizer, reward = save_lm(template=template), "reward"
    save_classifier(reward, words=dict(template=of_reward))
    settings = own(models, ref="lm", reward=reward, dataset="chats.jsonl")
    task = vbon.setup(parsed(**settings))
    assert task.encode(chats[3]) == tokenizer.apply_chat_template(
        chats[3], add_generation_prompt=True, return_dict=False)
    assert task.score([chats[3]], ["good"]) == pytest.approx(plain(reward, text), abs=1e-5)
    call(**settings)
    assert all(row["prompt"] in chats for row in sample_rows())
    refused("no prompt", **settings | dict(task="tldr", out="b"))


ROWS = [{"prompt": f"{i:02} is"} for i in range(20)]


@pytest.mark.parametrize("name, splits", [
    *((name, [""]) for name in ("a.csv", "a.parquet", "a.json", "disk")),
    ("disk", ["train", "validation"]), ("disk", ["train_sft", "test_sft"]), ("disk", ["other"])])
def test_files_of_prompts(name, splits):
    rows, start = [row["prompt"] for row in ROWS], 15 if splits[1:] else 18
    parts = [ROWS[:start], ROWS[start:]] if splits[1:] else [ROWS]
    data = datasets.DatasetDict(zip(splits, map(datasets.Dataset.from_list, parts)))
    data = data[""] if "" in data else data
    getattr(data, "save_to_disk" if name == "disk" else "to_" + name[2:])(name)
    args = types.SimpleNamespace(dataset=name, task="imdb", data_seed=0, train_prompts=99,
                                 test_prompts=99)
    for split, expected in (("train", rows[:start]), ("test", rows[start:])):
        assert sorted(vbon.load_prompts(args, split, byte_tokenizer(), 26)) == expected


@pytest.mark.parametrize("rows, word", [
    ([*ROWS, {"prompt": None}, *ROWS], "None in row 21"), ([{"prompt": 3}] * 4, "3 in row 1"),
    ([*ROWS[:5], {"prompt": 3}, *ROWS], "prompt"), ([{"post": "a"}] * 4, "subreddit"),
    ([{"prompt": [{"content": "no role"}]}] * 4, "role"), ([{"prompt": []}] * 4, "[] in row 1"),
    ([{"prompt": [{"role": "user", "content": None}]}] * 4, "None"), ({"data": ROWS}, "['data']"),
    (ROWS[:1], "samples 1")])
def test_files_without_prompts_are_refused(models, rows, word):
    Path("data.json").write_text(json.dumps(rows))
    refused(word, **own(models, dataset="data.json", train_prompts=1))


def test_a_console_without_greek_letters():
    process = start("", "--help", PYTHONIOENCODING="ascii")
    assert "reward ? ??KL" in process.communicate()[0] and process.returncode == 0


# ========== Cached reference samples; two processes; vLLM ========================================

def test_a_larger_M_extends_the_samples_and_lost_ones_are_generated_again(toy):
    def samples(path, M=30):
        args = toy_args(sample_batch=60, samples=path, M=M)
        rewards, tokens = vbon.reference_samples(toy, args, tokens=True)
        assert rewards.shape == (4, M) and [*map(len, tokens)] == [M] * 4
        return rewards[:, :30].tolist(), [row[:30] for row in tokens]
    whole = samples("whole")
    content = files("whole")
    assert len(content) == 3, "two batches of two prompts each, and the header"
    for name in content:  # any of them may be missing
        Path("whole", name).unlink()
        assert samples("whole") == whole
        assert name.endswith("header.json") or files("whole") == content
    assert samples("whole", 50) == samples("whole") == whole
    fifty = samples("fifty", 50)
    for name, batch in content.items():  # batches of two runs with different M overlap
        Path("fifty", name).write_bytes(batch)
    assert samples("fifty") == whole and samples("fifty", 50) in (whole, fifty)


def test_damaged_samples_and_rewards_are_refused(toy, models):
    settings = dict(M=4, sample_batch=12)
    before = vbon.reference_samples(toy, toy_args(**settings))
    path = min(Path("samples").rglob("*.jsonl"))
    content = path.read_bytes()
    for damage in (content[:100], b"\xff" + content, b"[1]\n", b"{}\n"):
        path.write_bytes(damage)
        refused(f"cannot read {path}", "--overwrite", **TOY | settings, out="run")
    path.unlink()
    assert torch.equal(vbon.reference_samples(toy, toy_args(**settings)), before)
    assert path.read_bytes() == content

    folder = Path(shutil.copytree(models / "reward", "reward"))
    broken = {k: x * NAN for k, x in load_file(folder / "model.safetensors").items()}
    save_file(broken, folder / "model.safetensors", {"format": "pt"})
    refused("must be finite, got nan", **own(models, reward=folder, samples="nan"))
    assert not sample_rows("nan")


# Save the state of every process after each update. KILL: the process that ends in the third.
WATCH = """
import torch
update, updates = script.update, []
def watched(policy, value_head, *rest):
    updates.append(0)
    if os.environ.get("KILL") == os.environ["RANK"] and len(updates) == 3:
        os.kill(os.getpid(), 9)
    metrics = update(policy, value_head, *rest)
    head = {} if value_head is None else value_head.state_dict(prefix="value_head.")
    torch.save(policy.state_dict() | head, "weights" + os.environ["RANK"])
    return metrics
script.update = watched"""


@pytest.mark.parametrize("extras", [{}, dict(prefix_critic=0, token_bias_lr=0, lam=0.95)])
def test_two_processes_train_one_policy(models, extras):
    """With the prefix critic and the token bias. Without them, one process is killed first."""
    argv = flags(**own(models, device="cpu", rollouts=16, episodes=64, lr=1e-3, out="run",
                       save_every=1, sample_batch=10, **extras))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with mock.patch.object(vbon, "WORLD_SIZE", 2):
        refused("--rollouts and --minibatch must divide by 2", *argv, "--minibatch", 3)
    if extras:
        killed = start(WATCH, *argv, launcher=torchrun, KILL="1")
        assert killed.communicate(timeout=600) and killed.returncode
    process = start(WATCH, *argv, *["--resume"] * bool(extras), launcher=torchrun)
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0, printed
    assert printed.count("means over the last") == 1  # only rank 0 prints
    assert ("resumed after" in printed) == bool(extras)
    call(*argv, samples="alone", out="one")
    assert files("alone") == files("samples")
    first, second = map(torch.load, ("weights0", "weights1"))
    saved, before = map(load_file, ("run/policy/model.safetensors",
                                    models / "ref/model.safetensors"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], saved[name]) for name in saved)
    assert max((saved[name] - before[name]).abs().max() for name in before) > 2e-3
    rows = read_lines("run/metrics.jsonl")
    assert [row["episode"] for row in rows] == [16, 32, 48, 64]
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert abs(rows[0]["objective/kl_to_ref"]) < 1e-4 < abs(rows[-1]["objective/kl_to_ref"])


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM; .ci/run tests it")
def test_vllm_samples_the_same_distribution(models):
    """Rewards, lengths and log-probs of the samples of both backends agree in distribution."""
    shared, settings = HERE.parent / "shared", own(models)
    if (shared / "imdb-mini").exists():  # because vLLM on a CPU may refuse tiny heads
        settings = own(shared / "imdb-mini", dataset=shared / "imdb")
    settings |= dict(rollouts=16, minibatch=16, train_prompts=8, M=128, max_new_tokens=12)
    lm, found = load_lm(settings["ref"]), []
    for backend in ("hand", "vllm"):
        settings |= dict(backend=backend, samples=backend, out=backend + "-run")
        process = start("", *flags(**settings), VLLM_CPU_KVCACHE_SPACE="1")
        printed = process.communicate()[0]
        assert process.returncode == 0, printed
        args = parsed("--overwrite", **settings)
        task = vbon.setup(args)
        assert read_json(vbon.samples_folder(task, args)[0] / "header.json")["backend"] == backend
        rewards, tokens = vbon.reference_samples(task, args, tokens=True)
        prompts, tokens = [p for p in task.prompts for _ in range(128)], sum(tokens, [])
        log_p = bon_baselines.response_log_probs(lm, task, prompts, tokens, args)[1]
        found.append([rewards.flatten(), doubles([*map(len, tokens)]), log_p])
    for ours, theirs in zip(*found):
        assert len(ours) == len(theirs) == 8 * 128
        assert samples_needed.kolmogorov_smirnov(ours, theirs)[1] > 0.001


# ========== bon_baselines.py =====================================================================

def test_best_of_n_and_its_expectation_by_brute_force():
    best = bon_baselines.best_of_n(torch.tensor([[1.0, 5.0, 2.0], [3.0, 3.0, 0.0]]))
    assert best.tolist() == [1, 0]
    rewards = doubles([[0.3, -2.0, 0.3, 7.0, 1.0, -0.5, 2.5], [1.0, 1.0, 1.0, 0.0, 0.0, 5.0, -1.0]])
    for N in range(1, 8):
        expected = rewards[:, list(itertools.combinations(range(7), N))].amax(-1).mean(-1)
        close(bon_baselines.expected_best_of_n(rewards, N), expected)
    M = 100_000  # stable: the highest of N of the numbers 1 … M is N(M+1)/(N+1) on average
    for N in (1, 2, 1000, 50_000, 100_000):
        value = bon_baselines.expected_best_of_n(1 + torch.randperm(M, generator=seeded()), N)
        assert value.item() == pytest.approx(N * (M + 1) / (N + 1), rel=1e-9)


def test_losses_of_the_baselines_by_hand():
    best, *others = doubles([-10.0, -12.0], [-9.0, -14.0], [-11.0, -11.0], [-9.5, -12.0])
    h = [(-10 + 11) - (-9 + 9.5), (-12 + 11) - (-14 + 12)]  # 0.5, 1
    assert bon_baselines.sft_loss(best).item() == pytest.approx(11)
    dpo = bon_baselines.dpo_loss(best, *others, 0.3).item()
    assert dpo == pytest.approx(sum(math.log1p(math.exp(-0.3 * x)) for x in h) / 2)
    assert bon_baselines.bonbon_beta(8) == pytest.approx(0.02755, abs=5e-6)
    assert bon_baselines.bonbon_beta(1) == INF
    target = 3 * (1 + 1 / 2 + 1 / 3)  # N = 4
    contrast = sum((x - target) ** 2 for x in h) / 2
    value = bon_baselines.bonbon_loss(best, *others, 4, alpha=0.2).item()
    assert value == pytest.approx(0.2 * 11 + 0.8 * contrast)
    # By default both terms have the same size, and α has no gradient.
    alpha, gradients = contrast / (11 + contrast), []
    for given in (None, alpha):
        loss = bon_baselines.bonbon_loss(best.requires_grad_(), *others, 4, given)
        assert loss.item() == pytest.approx(2 * alpha * 11)
        gradients += torch.autograd.grad(loss, best)
    close(*gradients)


def test_bond_has_the_gradient_of_its_divergences():
    """Ten responses distributed exactly as the policy, and ten as another distribution."""
    n, beta, gamma = 10, 0.3, 0.7
    theta = doubles([0.1, 0.2, 0.3, 0.4]).log().requires_grad_()
    log_pi = theta.log_softmax(0)
    anchor, reward = doubles([0.4, 0.3, 0.2, 0.1], [-2.0, -1.0, 0.0, 0.0])
    own, best = torch.tensor([[0, 1, 1, 2, 2, 2, 3, 3, 3, 3], [0, 1, 2, 2, 2, 3, 3, 3, 3, 3]])
    args = log_pi[best], log_pi[own], anchor.log()[own], reward[own]
    loss = bon_baselines.bond_loss(*args, beta, gamma)
    kl = torch.sum(log_pi.exp() * (log_pi - anchor.log()))
    backward = beta * (kl - torch.sum(log_pi.exp() * reward)) + gamma * kl
    forward = -(1 - beta) * torch.sum(torch.bincount(best).double() / n * log_pi)
    # The mean of the others instead of all multiplies the difference by n/(n−1).
    expected = torch.autograd.grad(forward + n / (n - 1) * backward, theta, retain_graph=True)[0]
    close(torch.autograd.grad(loss, theta)[0], expected)
    # One response has no others. Below both of the anchor's responses is −log 16, a tie is not.
    reward = bon_baselines.bond_reward(doubles([1.0, 1.0]), doubles([[2.0, 1.5], [1.0, 2.0]]))
    close(reward, doubles([-math.log(16), 0.0]))
    loss = bon_baselines.bond_loss(*doubles([-10.0], [-7.0], [-8.0]), reward[:1])
    assert loss.item() == pytest.approx(0.5 * 10 + 7 * 0.5 * (-math.log(16) - 1))


def test_pairs_of_the_baselines(toy):
    args = toy_args("dpo", N=5, script=bon_baselines)
    rewards, tokens = vbon.reference_samples(toy, args, tokens=True)
    reward = {(p, tuple(y)): r for p, row, ys in zip(toy.prompts, rewards.tolist(), tokens)
              for r, y in zip(row, ys)}

    def pairs(number, P=4):
        stream = bon_baselines.training_pairs(toy.prompts[:P], rewards[:P], tokens[:P], args)
        return list(itertools.islice(stream, number))
    assert all(reward[p, tuple(y)] > reward[p, tuple(z)] for p, y, z in pairs(100))
    assert len({tuple(y) for _, *both in pairs(12, 1) for y in both}) <= 6  # 12 pairs of 6
    args.objective = "bonbon"
    gaps = [[reward[p, tuple(y)], reward[p, tuple(z)]] for p, y, z in pairs(2000)]
    for values, sign in zip(zip(*gaps), (1, -1)):  # random groups of N agree with the expectation
        expected = sign * bon_baselines.expected_best_of_n(sign * rewards, 5).mean().item()
        assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / math.sqrt(2000))
    with pytest.raises(vbon.UserError, match="must differ in reward"):
        next(bon_baselines.training_pairs(toy.prompts, torch.ones(4, 30), tokens, args))


def test_on_policy_loss(toy, monkeypatch):
    """`bond_loss` of the sampled responses, with their log-probs. Frozen layers change nothing."""
    policy, anchor = (changed_policy(toy, 1, 0.1, seed) for seed in (0, 1))
    prompts, trained = toy.prompts * 4, [p for p in policy.parameters() if p.requires_grad]
    sampled, found, sample = [], [], bon_baselines.sample
    monkeypatch.setattr(bon_baselines, "sample",
                        lambda *args: sampled.append(sample(*args)) or sampled[-1])
    for K in (1, -1):
        args = toy_args("bond", temperature=0.7, unfrozen_layers=K, gamma=0.5, script=bon_baselines)
        loss, kl = bon_baselines.on_policy_loss(policy, anchor, toy, prompts, args, seeded())
        found.append((loss, kl, *torch.autograd.grad(loss, trained)))
    for x, y in zip(*found):
        close(x, y, atol=1e-4, rtol=1e-4)

    def log_probs(lm, responses):
        return bon_baselines.response_log_probs(lm, toy, prompts, responses, args)[0].detach()
    (own, _, rewards), (pairs, _, of_anchor) = sampled[-2:]
    mine, theirs, of_anchor = vbon.token_lists(own), vbon.token_lists(pairs), of_anchor.view(16, 2)
    better = [theirs[2 * i + (r[1] > r[0])] for i, r in enumerate(of_anchor)]
    expected = bon_baselines.bond_loss(
        log_probs(policy, better), log_probs(policy, mine), log_probs(anchor, mine),
        bon_baselines.bond_reward(rewards, of_anchor), gamma=0.5)
    close(loss.detach().double(), expected.double(), atol=1e-3, rtol=1e-4)
    of_ref = log_probs(toy.ref, mine)
    close(kl, (own.log_probs.sum(1) - of_ref).mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", bon_baselines.METHODS)
def test_baselines_on_the_toy(toy_runs, method):
    result = read_json(toy_runs / method / "result.json")
    assert result["exact/win_rate"] > 0.6 and result["exact/kl_to_ref"] > 0.1
    assert result["exact/reward"] > 0.7  # the reference model is at 0.2
    assert (toy_runs / method / "policy/model.safetensors").exists() == (method != "bon")
    if method == "bon":
        assert abs(result["exact/kl_to_bon"]) < 1e-9 and abs(result["exact/win_rate"] - 0.8) < 0.02
        assert result["exact/effective_N"] == pytest.approx(4, rel=0.01)
    if method == "bond":  # it is past Best-of-2: the anchor moves
        assert result["exact/effective_N"] > 2.5 and result["exact/excess_kl"] < 0.2


# ========== evaluate.py, and TRL on what it exports ==============================================

def evaluated(*argv):
    return call(*argv, script=evaluate)


def test_policy_log_F_of_best_of_n():
    """N within 5 % and the excess below 0.05, also with few samples."""
    def of_simulated_ranks(M, N, *shape):  # repetitions first
        F = torch.rand(shape, dtype=torch.double, generator=seeded()) ** (1 / N)
        k = (torch.rand(M, *shape, generator=seeded(1)) < F).double().sum(0)
        return torch.stack([evaluate.policy_log_F(row, M) for row in k])
    for M, N in itertools.product((32, 200), (1, 4, 16)):
        mean = of_simulated_ranks(M, N, 10, 2000).mean().item()
        assert vbon.effective_N(mean) == pytest.approx(N, rel=0.05)
        assert vbon.excess_kl(vbon.bon_kl(N), mean) == pytest.approx(0, abs=0.05)
    # Standard errors are right. Without the stretch they would be 0.68 of the truth.
    log_F = of_simulated_ranks(32, 16, 200, 500)
    errors = log_F.std(1) / math.sqrt(500)
    assert errors.mean().item() == pytest.approx(log_F.mean(1).std().item(), rel=0.15)
    for k in (0.0, 32.0):  # finite where all ranks are extreme
        assert evaluate.policy_log_F(torch.full((8,), k).double(), 32).isfinite().all()


def test_the_tests_of_a_policy_and_of_best_of_n_agree_with_the_exact_metrics(toy):
    args, task = toy_args(N=4, M=5000), vbon.Task(**vars(toy) | dict(prompts=toy.prompts * 50))
    ref_rewards, exact = vbon.reference_samples(task, args), vbon.ExactToy(toy, args)
    policy, simple = changed_policy(task), ("reward", "win_rate", "kl_to_ref")
    for names, log_pi, (responses, kls) in (
            (evaluate.METRICS, exact.log_probs(policy),
             evaluate.sample_policy(policy, task, args, 10, 0)),
            (simple, exact.log_bon, bon_baselines.sample_best(task, ref_rewards, args, 10, 0))):
        found, rows = evaluate.measure(task, responses, kls, ref_rewards, args.N)
        expected = exact.metrics(log_pi)
        for x in names:
            assert found[x] == pytest.approx(expected["exact/" + x], abs=4 * found[x + "_se"]), x
        assert [row["reward"] for row in rows] == toy.score(None, responses)


def test_pareto_front_and_smoothed_curves():
    points = [(1, 2), (2, 2), (2, 3), (3, 3), (1, 2), (0, 0)]
    assert evaluate.pareto_front(points) == [True, False, True, False, True, True]
    runs = [{"method": m, "result": {"kl_to_ref": x, "win_rate": y}} for m, x, y in (
        ("vBoN", 1, 0.8), ("vBoN", 2, 0.9), ("PPO", 1.5, 0.7), ("PPO", 0.5, 0.6), ("BoN", 0.1, 1))]
    assert evaluate.front_shares(runs, "win_rate") == {"vBoN": 2 / 3, "PPO": 1 / 3}
    metrics = [{"episode": e, "objective/kl_to_bon": float(e)} for e in range(1, 65)]
    smoothed = curves.curve({"metrics": metrics}, "kl_to_bon")
    assert len(smoothed) == 61 and smoothed[4] == 2.5 and smoothed[64] == 62.5


def test_table_csv_and_figures_of_the_toy(toy_runs):
    runs = [toy_runs / name for name in ("one", "two", *bon_baselines.METHODS)]
    os.mkdir("unfinished")  # is skipped
    table = evaluated("unfinished", *runs, "--csv", "toy.csv", "--figures", "figures")
    results = [read_json(run / "result.json")["exact/kl_to_bon"] for run in runs]
    mean, error = np.mean(results[:2]), np.std(results[:2], ddof=1) / math.sqrt(2)
    for word in ("vBoN, N = 16", "BoN-SFT, N = 4", "DPO, β = 0.1", "BoNBoN, N = 4", "Pareto front",
                 "BOND, steps = 64", "BoN, N = 4, closed forms", f"{mean:.3f} ± {error:.3f}"):
        assert word in table
    rows = {row["run"]: float(row["exact/kl_to_bon"]) for row in read_csv("toy.csv")}
    assert rows == dict(zip(map(str, runs), results))
    for more in ([], ["--against", "seconds_sampling"]):
        call(*runs[:2], *more, script=curves)
    assert {"toy.png", "toy-pareto.png", "toy-excess.png", "toy-M.png"} <= files("figures").keys()


METHODS = ("vbon", *bon_baselines.METHODS)


@pytest.fixture(scope="module")
def imdb_runs(models, tmp_path_factory):
    """A folder with samples/ and a small imdb run of each method."""
    folder = tmp_path_factory.mktemp("imdb")
    for method in METHODS:
        script, first = (vbon, []) if method == "vbon" else (bon_baselines, [method])
        settings = own(models, samples=folder / "samples", out=folder / method)
        call(*first, script=script, **settings)
    return folder


@pytest.fixture
def copied_runs(imdb_runs):
    """The runs are copied to the current folder, without cached samples."""
    for name in METHODS:
        shutil.copytree(imdb_runs / name, name)
        edit(f"{name}/config.json", samples="samples")


def samples_folder(folder, split="train"):
    """The only folder of samples of this split."""
    (path,) = [path.parent for path in Path(folder).rglob("header.json")
               if read_json(path)["split"] == split]
    return path


def test_evaluation_of_all_methods(copied_runs, models):
    argv = [*METHODS, *TESTED, "--responses", 1, "--csv", "all.csv", "--figures", "figures"]
    table = evaluated(*argv)
    assert all(name in table for name in ("vBoN, N = 2", "BoN, N = 2", "BOND", "Film number"))
    rows = {row["objective"]: row for row in read_csv("all.csv")}
    assert len(rows) == 6 and 0 < float(rows["bon"]["bon/expected_reward"]) < 1
    for row in rows.values():
        kl, log_F, kl_to_bon = (float(row[name]) for name in ("kl_to_ref", "log_f", "kl_to_bon"))
        assert kl_to_bon == pytest.approx(vbon.kl_to_bon(kl, log_F, 2))
    assert len(sample_rows(samples_folder("samples", "test"))) == 2  # a tenth of the prompts
    (path,) = Path("vbon").glob("eval-*.json")
    samples, score = read_json(path)["samples"], vbon.load_reward(str(models / "reward"), "cpu")[0]
    scores = score([s["prompt"] for s in samples], [s["response"] for s in samples])
    assert [s["reward"] for s in samples] == pytest.approx(scores, abs=1e-6) and len(samples) == 4

    # The test is cached. Other settings of the test, or another policy, are another test.
    with mock.patch.object(evaluate, "test_policy", side_effect=AssertionError):
        assert evaluated(*argv) == table
    edit(path, metrics=read_json(path)["metrics"] | dict(reward=7.0))
    assert "7.000" in evaluated("vbon", *TESTED)
    for more in (["--seed", 1], ["--test-M", 5]):
        assert "7.000" not in evaluated("vbon", *TESTED, *more)
    shutil.copytree("dpo/policy", "vbon/policy", dirs_exist_ok=True)
    assert "7.000" not in evaluated("vbon", *TESTED)


def test_other_temperatures_and_another_reward(copied_runs, models):
    save_small_models(Path("second"), seed=5)
    evaluated("dpo", "bon", *TESTED, "--csv", "own.csv")
    out = evaluated("dpo", "bon", *TESTED, "--temperatures", 1, 0.5, "--reward", "second/reward",
                    "--csv", "second.csv")
    assert "T = 0.5" in out and "evaluator reward" in out
    one, two = ({(row["run"], row["temperature"]): row for row in read_csv(name)}["dpo", "1.0"]
                for name in ("own.csv", "second.csv"))
    assert one["reward"] != two["reward"]  # of the same responses
    assert float(one["kl_to_ref"]) == pytest.approx(float(two["kl_to_ref"]), rel=1e-4)
    # The second reward model scored cached samples. They are the same if sampled again.
    before = {path.name: sample_rows(path) for path in Path("samples").iterdir()}
    shutil.rmtree("samples")
    call("bon", script=bon_baselines, **own(models, reward="second/reward", out="new"))
    evaluated("new", *TESTED)
    (folder,) = Path("samples").iterdir()
    for a, b in zip(before[folder.name], sample_rows(folder), strict=True):
        close(doubles(a.pop("rewards")), doubles(b.pop("rewards")), atol=1e-6)
        assert a == b


def test_the_readme_trains_with_trl_and_its_advantages_are_ours(imdb_runs, models, monkeypatch):
    """The sums over tokens of vbon.py's rewards, less the mean of the prompt's other three."""
    trl = pytest.importorskip("trl")
    evaluated("--export", samples_folder(imdb_runs), "theirs.jsonl")
    score, _ = vbon.load_reward(str(models / "reward"), "cpu")
    tokenizer, kls = transformers.AutoTokenizer.from_pretrained(models / "ref"), []

    def fill_positions(lm, args, kwargs):  # TRL passes none to a model with learned positions
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return args, kwargs

    @torch.no_grad()
    def our_advantages(policy, ref, rows, theirs):
        tokens, mask = theirs["completion_ids"], theirs["completion_mask"].bool()
        rollout = vbon.Rollout(
            torch.cat([theirs["prompt_ids"], tokens[:, :-1]], 1),
            torch.cat([theirs["prompt_mask"].bool(), mask[:, :-1]], 1), tokens, mask)
        log_pi, log_ref = ((vbon.response_log_probs(lm, rollout, 1.0)[0] * mask).sum(1)
                           for lm in (policy, ref))
        kls.append(log_pi - log_ref)
        texts = tokenizer.batch_decode(vbon.token_lists(rollout), skip_special_tokens=True)
        scores = torch.tensor(score([row["prompt"] for row in rows], texts))
        log_F = vbon.estimate_log_F(scores, torch.tensor([row["ref_rewards"] for row in rows]))
        returns = (vbon.vbon_reward(log_F, log_ref, 16) - kls[-1] / 16).float().view(-1, 4)
        return (returns - (returns.sum(1, keepdim=True) - returns) / 3).flatten()

    class Compared(trl.RLOOTrainer):
        def _generate_and_score_completions(self, rows):
            lms = self.model, self.ref_model
            hooks = [lm.register_forward_pre_hook(fill_positions, with_kwargs=True) for lm in lms]
            theirs = super()._generate_and_score_completions(rows)
            close(theirs["advantages"], our_advantages(*lms, rows, theirs), atol=1e-5, rtol=0)
            for hook in hooks:
                hook.remove()
            return theirs
    monkeypatch.setattr(trl, "RLOOTrainer", Compared)
    blocks = (HERE / "README.md").read_text("utf-8").split("```")
    (code,) = [block.removeprefix("python") for block in blocks if "import RLOO" in block]
    for old, new in {  # the README's names and numbers
            "my-model": str(models / "ref"), "my-classifier": str(models / "reward"),
            '"cuda"': '"cpu"', "size=32": "size=8", "length=40": "length=6", "1e-5": "1e-2",
            "max_steps=100": "max_steps=3, use_cpu=True, bf16=False, report_to=[]"}.items():
        assert old in code, old
        code = code.replace(old, new)
    exec(code, {"__name__": "readme"})
    assert len(kls) == 3 and kls[0].abs().max() < 1e-4 < 0.1 < kls[2].abs().max()


# ========== results/: log F shared between prompts, samples needed, one token ahead ==============

def test_sharing_does_no_harm():
    """With M from 8 to 1000 samples per prompt the floor is at most 1.1 times that of ranks. It is
    far below where the prompts have one shape."""
    P, T = 48, 2000
    place, noise, u = normals(P, 1), normals(P, T, seed=1), torch.rand(P, T, generator=seeded(2))
    gap, share = 4 * normals(P, 1, seed=3), torch.rand(P, 1, generator=seeded(4))
    prompt = torch.arange(P).repeat_interleave(T)
    for case, rewards in {
            "alike": place + noise, "ties": (place + noise).round(),
            "unrelated": place + noise + gap * (u < share),
            "needles": torch.where(u < 0.02, 4 + 2 * place + 0.3 * noise, place + noise),
            "heavy tails": 3 * place + gap.abs() * noise / normals(P, T, seed=5).abs()}.items():
        rewards = rewards.sort(1).values
        truth = sharing.by_ranks(rewards, rewards)
        for M in (8, 32, 200, 1000):
            samples = rewards.gather(1, torch.randint(T, (P, M), generator=seeded(M)))
            by_all = sharing.shared_log_F([*samples])(rewards.flatten(), prompt).view(P, T)
            for N in (4, 16, 64):
                of_ranks, of_all = (sharing.floor(log_F, truth, N).mean().item()
                                    for log_F in (sharing.by_ranks(rewards, samples), by_all))
                most = 0.6 if case == "alike" and M < 1000 else 1.1
                assert of_all <= most * of_ranks, (case, M, N, of_all, of_ranks)


def test_shared_log_F_of_normal_prompts_is_exact():
    """For prompts with 64, 2 and 0 samples, of which a feature gives the mean, F̂ is the CDF of the
    normal distribution."""
    mean, grid = normals(400, 1), torch.linspace(-1.5, 2.5, 9).double()
    samples = [*(mean + normals(400, 64, seed=1))]
    samples[7], samples[8] = samples[7][:0], samples[8][:2]
    log_F = sharing.shared_log_F(samples, mean)
    for prompt in (7, 8, 9):
        found = log_F(mean[prompt] + grid, torch.full((9,), prompt))
        close(found.exp(), torch.special.ndtr(grid), atol=0.05, rtol=0)


def test_shared_log_F_is_finite_monotone_and_depends_on_ranks_only():
    samples = [normals(M, seed=i) + i for i, M in enumerate([0, 1, 2, 5, 40, 0, 7, 3])]
    features = normals(8, 2)
    for ref in (samples, [r.round() for r in samples], samples[:2], [doubles([0.0] * 5)] * 3):
        for x in (None, features[:len(ref)], torch.ones(len(ref), 1)):
            log_F, mapped = (sharing.shared_log_F(r, x) for r in (ref, [r.exp() for r in ref]))
            grid = torch.cat([torch.linspace(-5, 12, 500).double(), *ref]).sort().values
            for prompt in torch.arange(len(ref)).unsqueeze(1).expand(-1, len(grid)):
                found = log_F(grid, prompt)
                assert found.isfinite().all() and (found < 0).all() and (found.diff() >= 0).all()
                assert torch.equal(found, mapped(grid.exp(), prompt))
    one, two = (sharing.shared_log_F(samples, x) for x in (features, features ** 3))
    close(one(grid, prompt), two(grid, prompt))
    for bad, x in (([samples[0]], None), ([doubles([NAN])], None), (samples, features * NAN)):
        with pytest.raises(ValueError, match="sample of at least one prompt"):
            sharing.shared_log_F(bad, x)


def test_conversion_and_export_of_a_samples_folder(imdb_runs, models):
    """vbon.py trains on converted samples, but neither extends them nor has their tokens."""
    source, before = samples_folder(imdb_runs), files(imdb_runs)
    call("convert", source, "shared", "--M", 4, "--reward", models / "reward", script=sharing)
    (target,) = Path("shared").iterdir()
    rows = sample_rows(target)
    assert target.name == source.name and read_json(target / "header.json")["converted"]
    ref_rewards = [doubles(row["rewards"][:4]) for row in sample_rows(source)]
    score, _ = vbon.load_reward(str(models / "reward"), "cpu")
    bare = doubles(score([row["prompt"] for row in rows], [""] * 6)).unsqueeze(1)
    log_F, grid = sharing.shared_log_F(ref_rewards, bare), torch.cat(ref_rewards).sort().values[1:]
    for i, row in enumerate(rows):
        expected = log_F(grid, torch.full(grid.shape, i)).exp()
        close(vbon.estimate_log_F(grid, row["rewards"]).exp(), expected, atol=0.005, rtol=0)
        assert row["rewards"] != sorted(row["rewards"])
    mine = own(models, samples="shared", M=200, out="run")
    assert "to generate" not in call(**mine)
    refused(target, **mine | dict(M=201, out="more"))
    refused("tokens", "dpo", script=bon_baselines, **mine | dict(out="dpo"))
    refused("sampled", "convert", target, "again", script=sharing)
    refused("new or converted", "convert", source, source.parent, script=sharing)

    assert "6 prompts" in evaluated("--export", source, "theirs.jsonl")
    exported = [{k: row[k] for k in ("prompt", "responses", "rewards")}
                for row in sample_rows(source)]
    assert read_lines("theirs.jsonl") == exported and files(imdb_runs) == before


def test_study_of_shared_log_F(models, monkeypatch):
    samples = normals(40, 1000).sort(1).values
    for N in (16, 64):  # the noise of the truth is what M = 1000 samples would cost
        noise = sharing.noise(samples, N, 10).mean()
        assert noise == pytest.approx((N - 1) / 4000, rel=0.1)
    monkeypatch.setattr(sharing, "HERE", Path("results").absolute())
    monkeypatch.setattr(sharing, "REPETITIONS", 1)
    os.mkdir("results")
    argv = flags(**own(models, train_prompts=16), test_M=260, second_reward=models / "reward")
    assert "shared, bare prompt: about" in call("study", *argv, script=sharing)
    rows = read_csv("results/shared.csv")
    assert len(rows) == 3 * (3 * 5 + 1) * 4 and all(math.isfinite(float(row["kl"])) for row in rows)
    assert os.path.exists("figures/shared.png")


def test_samples_needed(toy):
    test, a = samples_needed.kolmogorov_smirnov, torch.arange(100.0)
    assert test(a, a) == (0, 1) and test(a, a + 1000)[0] == 1 and test(a, a + 1000)[1] < 1e-20
    rejected = sum(test(*x.split(100))[1] < 0.05 for x in normals(400, 200))
    assert 6 <= rejected <= 34  # two samples of one distribution differ in about 5 % of cases
    vbon.reference_samples(toy, toy_args(M=600))
    out = call(*Path("samples").iterdir(), "figures", script=samples_needed)
    assert "4 prompts" in out and os.path.exists("figures/log_F.png")
    rows = [line.split() for line in out.splitlines() if line.split()[0].isdigit() and "%" in line]
    assert len(rows) == 6 and float(rows[0][-1]) > float(rows[-1][-1])


def test_the_ceiling_looks_one_token_ahead(models, monkeypatch):
    u = normals(20_000)
    y = torch.exp(0.5 * u - 1) * -torch.log(torch.rand(len(u), generator=seeded()).double())
    close(ceiling.fit_log_Z(u, y), doubles([-1, 0.5, 0, 0]), atol=0.06)  # E[y | u] = exp(u/2 − 1)
    for candidates in (1, 8):  # with one there is no choice: this is π_ref
        monkeypatch.setattr(ceiling, "CANDIDATES", candidates)
        out = call(script=ceiling, **own(models, N=4, M=8), out="run", test_prompts=4, test_M=4)
        kl = float(out.splitlines()[-1].split(" ± ")[2].split()[-1])
        assert (kl > 0) == (candidates > 1) and kl >= 0
    assert not os.path.exists("run")


# ========== Errors of the user: one line, exit code 2, and nothing is written ====================

MODELS = "--task imdb --ref ref --reward reward --dataset prompts.jsonl --max-new-tokens 6"
ERRORS = {
    vbon: {
        "--N 0": "--N", "--N many": "--N", "--lr nan": "--lr", "--lr inf": "--lr",
        f"--seed {2 ** 64}": "--seed", "--lam 1.5": "--lam", "--token-bias-lr 2": "--token-bias-lr",
        "--task chess": "toy", "--nonsense": "--nonsense", "--objective rlhf --beta -1": "--beta",
        "--ref gpt2": "--task imdb", "--minibatch 4096": "--rollouts", "--device cuda:7": "cuda:7",
        "--unfrozen-layers 7": "from 1 to 2", "--max-new-tokens 6": "at most", "--out file": "file",
        "--M 2 --estimator smooth": "--M", "--objective rlhf --N 1": "--beta",
        "--objective bound1 --estimator log_mean": "add_one",
        "--objective rlhf --beta 0 --token-bias-lr 0.1": "--token-bias-lr 0",
        "MODELS --ref cut": "cut", "MODELS --ref bare": "lacks", "MODELS --ref no/such": "--ref",
        "MODELS --ref other/ref": "EOS", "MODELS --reward other/reward": "two labels",
        "MODELS --reward ref": "lacks", "MODELS --ref gpt2": "output layer",
        "MODELS --dataset splits": "got a, b",
        "MODELS --reward my.py:no": "my.py:no", "MODELS --max-new-tokens 40": "40 tokens",
        "MODELS --ref reward": "--ref", "MODELS --dataset missing.jsonl": "--dataset",
        "MODELS --dataset empty.jsonl": "--dataset", "MODELS --dataset cut": "--dataset",
        "MODELS --dataset long.jsonl": "at most 32"},
    bon_baselines: {
        "": "objective", "bonbon --N 2.5": "whole number", "dpo --beta 0": "--beta",
        "bonbon --alpha 2": "--alpha", "bond --gamma nan": "--gamma"},
    evaluate: {
        "": "finished run", "cut": "finished run", "one imdb": "one task", "one --reward x": "toy",
        "one copied": "different seeds", "imdb --reward no/such": "--reward",
        "one --csv cut": "folder", "imdb --responses -1": "--responses", "--export none x": "none"},
    curves: {"imdb --temperatures 1": "--against", "one --against task": "--against"},
    sharing: {"sell": "convert", "convert none again": "none", "study --test-M 100": "--test-M"},
    samples_needed: {"": "samples", "cut": "600 samples"}}


@pytest.fixture(scope="module")
def workplace(models, toy_runs, imdb_runs, tmp_path_factory):
    """A folder with models, data and finished runs, some of them damaged."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(models, folder, dirs_exist_ok=True)
    for source, names in ((models / "ref", ("cut", "bare")), (imdb_runs / "bon", ["imdb"]),
                          (toy_runs / "one", ("one", "copied"))):
        for name in names:
            shutil.copytree(source, folder / name)
    content = (folder / "cut/model.safetensors").read_bytes()
    (folder / "cut/model.safetensors").write_bytes(content[:-1000])  # an incomplete download
    (folder / "bare/tokenizer.json").unlink()
    edit(folder / "bare/tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    save_small_models(folder / "other", labels="ABC", eos=False)
    edit(folder / "other/ref/generation_config.json", eos_token_id=None)
    save_classifier(folder / "gpt2", "GPT2")
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(a=rows, b=rows).save_to_disk(folder / "splits")
    write_lines(folder / "long.jsonl", [{"prompt": "a prompt of more than 26 bytes"}] * 3)
    for name in ("file", "my.py", "empty.jsonl"):
        (folder / name).write_text("")
    return folder


@pytest.mark.parametrize("script, argv, word", [
    (script, argv, word) for script, cases in ERRORS.items() for argv, word in cases.items()])
def test_a_users_error_is_one_line(workplace, script, argv, word, monkeypatch):
    monkeypatch.chdir(workplace)
    before = files(workplace)
    refused(word, *argv.replace("MODELS", MODELS).split(), script=script)
    assert files(workplace) == before
