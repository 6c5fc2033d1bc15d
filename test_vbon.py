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
import random
import shutil
import statistics
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import, no test may wait for a hub

import mpmath
import numpy as np
import pytest
import torch

import bon_baselines
import evaluate
import vbon
from results import ceiling, curves
from results import log_F as samples_needed
from results import shared_log_F as sharing

HERE, INF, NAN = Path(__file__).resolve().parent, math.inf, math.nan


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def doubles(*rows):
    """Tensors of float64."""
    tensors = [torch.tensor(row, dtype=torch.double) for row in rows]
    return tensors if len(tensors) > 1 else tensors[0]


def normals(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.double)


def close(a, b, atol=1e-12, rtol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def random_distribution(S, seed, concentration=1.0):
    """p (S,) sorted by ascending reward, F (S,) its strict CDF."""
    p = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(S, concentration)))
    return p, (p.cumsum(0) - p).clamp(min=0)


# ========== Structure of the files ===============================================================


def test_structure_of_the_files():
    """The loop needs little from below. Functions and lines are short."""
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
    """Each one runs on its default path when its source is pasted with two imports."""
    r, ref, mask = normals(3), normals(3, 9, seed=1), torch.ones(3, 4)
    x, y, z = (normals(3, 4, seed=i) for i in range(3))
    b, mean = bon_baselines, [vbon.masked_mean]
    for function, args, callees in (
            (vbon.log_bon_pmf, (-ref.abs(), -1.0, 4), []), (vbon.estimate_log_F, (r, ref), []),
            (vbon.vbon_reward, (-ref.abs(), -50.0, 4), [vbon.log_bon_pmf]),
            (vbon.fit_log_F, (ref,), []), (vbon.bon_kl, (4,), []), (vbon.bon_win_rate, (4,), []),
            (vbon.mid_ranks, (r, ref), []), (vbon.kl_to_bon, (0.5, -0.2, 4), []),
            (vbon.effective_N, (-0.2,), []), (vbon.excess_kl, (2.0, -0.2), []),
            (vbon.masked_mean, (x, mask), []), (vbon.whiten, (x, mask), mean),
            (vbon.gae, (x, y, mask), []), (vbon.policy_loss, (x, y, z, mask), mean),
            (vbon.value_loss, (x, y, z, mask), mean), (vbon.prefix_values, (x, y, mask, 2), []),
            (b.best_of_n, (ref,), []), (b.expected_best_of_n, (ref, 4), []),
            (b.sft_loss, (r,), []), (b.dpo_loss, (*ref.T[:4], 0.1), []), (b.bonbon_beta, (4,), []),
            (b.bonbon_loss, (*ref.T[:4], 4), [b.sft_loss, b.bonbon_beta]),
            (b.bond_reward, (r, ref[:, :2]), []), (b.bond_loss, (*ref.T[:3], -r.abs()), [])):
        pasted = {}
        for part in (function, *callees):
            exec("import math, torch\n" + inspect.getsource(part), pasted)
        close(pasted[function.__name__](*args), function(*args), atol=0, rtol=0)


# ========== Mathematics: the PMF and the objectives ==============================================


def exact_log_pmf(log_F, log_p, N):
    with mpmath.workdps(60):
        F = mpmath.exp(mpmath.mpf(log_F)) if log_F > -INF else mpmath.mpf(0)
        p, N = mpmath.exp(mpmath.mpf(log_p)), mpmath.mpf(N)
        if F == 0:
            return N * mpmath.mpf(log_p)
        return N * mpmath.log(F + p) + mpmath.log(-mpmath.expm1(N * mpmath.log1p(-p / (F + p))))


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
    values = vbon.log_bon_pmf(log_F, log_p, 16)
    assert values.tolist() == [-INF, 0.0, -INF, -INF] and values.dtype == torch.double
    N = torch.tensor([1.0, 2.0, 3.0])
    assert vbon.log_bon_pmf(torch.zeros(2, 1).double(), torch.zeros(3), N).shape == (2, 3)
    whole, real = vbon.log_bon_pmf(-1, -2, 3).item(), vbon.log_bon_pmf(-1.0, -2.0, 3.0).item()
    assert whole == real == pytest.approx(float(exact_log_pmf(-1, -2, 3)))
    for dtype, digits in ((torch.half, 2e-3), (torch.bfloat16, 2e-2)):
        log_F, log_p = (x.to(dtype) for x in doubles([-1e-3, -0.5, -7.0], [-180.0, -60.0, -11.0]))
        values = vbon.log_bon_pmf(log_F, log_p, 16)
        close(values.double(), vbon.log_bon_pmf(log_F.double(), log_p.double(), 16), rtol=digits)


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

    k = vbon.mid_ranks(doubles([[2.0, 0.0, 9.0]]), doubles([3.0, 2.0, 2.0, 1.0]))
    assert k.tolist() == [[2.0, 0.0, 4.0]]  # a tie counts half
    k = vbon.mid_ranks(doubles([2.0, 0.0]), doubles([[3.0, 2.0], [0.0, -1.0]]))
    assert k.tolist() == [0.5, 1.5]


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
    log_F = doubles([-2.0, -0.7, -1e-3, 0.0])
    log_p = doubles([[-30.1], [-40.0], [-200.0], [-1000.0]])
    for N in (1, 2, 16, 512):
        difference = vbon.vbon_reward(log_F, log_p, N) - vbon.vbon_reward(log_F, 0, N, "bound")
        close(difference, torch.full((4, 4), math.log(N) / N, dtype=torch.double), rtol=0)
    log_F, log_p = doubles([-INF, -1.0], [-3.0, -2.0])
    for objective in ("vbon", "bound", "bound1"):
        close(vbon.vbon_reward(log_F, log_p, 1, objective), torch.zeros(2).double())
        for N in (0.5, -3, torch.tensor([2.0, 0.99])):
            with pytest.raises(ValueError, match="at least 1"):
                vbon.vbon_reward(log_F, log_p, N, objective)
    with pytest.raises(ValueError, match="bound1"):
        vbon.vbon_reward(log_F, log_p, 2, "rlhf")
    # The clip leaves the rewards of long responses distinct.
    scores, ref = doubles([0.2, 0.5, 0.9], [[0.1, 0.3, 0.6, 0.8]] * 3)
    for objective, estimator in itertools.product(vbon.OBJECTIVES, vbon.ESTIMATORS):
        args = types.SimpleNamespace(objective=objective, estimator=estimator, N=16)
        rewards = vbon.terminal_reward(scores, ref, doubles([-180.0] * 3), args)
        assert rewards[0] < rewards[1] < rewards[2]


# ========== Mathematics: log F ===================================================================


def test_estimators_by_hand():
    ref, rewards = [[1.0, 2.0, 2.0, 5.0]] * 4, [0.0, 2.0, 3.0, 9.0]  # k = 0, 1, 3, 4
    for rows in (ref, np.array(ref), torch.tensor(ref), ref[0]):  # (M,) are the samples of all
        for r in (rewards, np.array(rewards), torch.tensor(rewards)):  # a tie is no win in any type
            close(vbon.estimate_log_F(r, rows, "log_mean").exp(), doubles([0, 0.25, 0.75, 1]))
            close(vbon.estimate_log_F(r, rows).exp(), doubles([1, 2, 4, 5]) / 5)
    for r, rows, estimator in (([NAN], [1.0], "add_one"), ([1.0], [NAN], "add_one"),
                               ([1.0], [], "add_one"), ([1.0], [1.0], "median")):
        with pytest.raises(ValueError):
            vbon.estimate_log_F(r, rows, estimator)
    # A total order (App. C): ranks of (reward, order) replace the rewards of a prompt.
    rng = random.Random(0)
    ref, ours = ([(rng.randrange(4), rng.randrange(50)) for _ in range(n)] for n in (30, 20))
    rank = {pair: i for i, pair in enumerate(sorted(set(ref + ours)))}
    log_F = vbon.estimate_log_F([rank[x] for x in ours], [rank[x] for x in ref], "log_mean")
    close(log_F.exp(), doubles([sum(other < pair for other in ref) / 30 for pair in ours]))


@pytest.mark.parametrize("estimator", ["add_one", "log_mean"])
def test_only_ranks_matter(estimator):
    rewards, ref = normals(50), normals(50, 40, seed=1)
    ref[:, 0] = rewards
    before = vbon.estimate_log_F(rewards, ref, estimator)
    for increasing in (torch.exp, lambda r: 3 * r - 7, lambda r: r ** 3, torch.atan):
        after = vbon.estimate_log_F(increasing(rewards), increasing(ref), estimator)
        assert torch.equal(after, before)


def test_the_smooth_estimator_is_a_least_squares_fit():
    levels = torch.log(torch.arange(1, 301).double() / 301)
    exact = -torch.log(-levels / 0.7) / 1.3  # rewards that lie on −0.7 exp(−1.3 r) exactly
    ref = torch.randn(4, 300, generator=seeded()).double() * doubles([[1.0], [0.1], [5], [1]]) + 2
    a, b = vbon.fit_log_F(torch.cat([ref, exact.unsqueeze(0)]))
    assert a.shape == b.shape == (5,) and (a > 0).all()
    for i, row in enumerate([*ref.sort(-1).values, exact]):
        grid = torch.logspace(-2, 2, 8001, 10).double() / row.std()
        e = torch.exp(-grid.unsqueeze(1) * (row - row[0]))
        fits = -(e @ levels / e.square().sum(1)).unsqueeze(1) * e  # a in closed form
        best = (fits + levels).square().sum(1).argmin()
        assert b[i].item() == pytest.approx(grid[best].item(), rel=0.03)
        assert (fits[best] - a[i] * torch.exp(-b[i] * row)).square().mean().sqrt() < 0.03
    assert [b[4].item(), a[4].item()] == pytest.approx([1.3, 0.7], rel=0.03)
    assert all(x.isfinite() for x in vbon.fit_log_F(torch.ones(5)))
    for bad, words in (([1.0, 2.0], "at least 3 finite"), ([1.0, 2.0, INF], "at least 3 finite"),
                       (ref + 1e4, "overflows")):
        with pytest.raises(ValueError, match=words):
            vbon.fit_log_F(bad)
    # The estimate does not depend on where zero is.
    scores, ref = normals(7), normals(7, 50)
    (a, b), found = vbon.fit_log_F(ref), vbon.estimate_log_F(scores, ref, "smooth")
    close(found, -a * torch.exp(-b * scores), atol=1e-9)
    close(found, vbon.estimate_log_F(scores + 1e4, ref + 1e4, "smooth"), atol=1e-6)


# ========== PPO ==================================================================================


def test_gae_whitening_and_losses_by_hand():
    """γ = .9, λ = .5: δ = 1 + .9·2 − 1, 0 + .9·3 − 2, 4 − 3, A = 1.8 + .45·1.15, .7 + .45, 1."""
    mask = torch.tensor([[True, True, True, False]])
    for outside in (99.0, NAN):
        rewards = torch.tensor([[1.0, 0.0, 4.0, outside]])
        values = torch.tensor([[1.0, 2.0, 3.0, outside]])
        advantages, returns = vbon.gae(rewards, values, mask, 0.9, 0.5)
        torch.testing.assert_close(advantages, torch.tensor([[2.3175, 1.15, 1.0, 0.0]]))
        torch.testing.assert_close(returns, torch.tensor([[3.3175, 3.15, 4.0, 0.0]]))
        white = vbon.whiten(torch.tensor([[1.0, 4.0, 1.0, outside]]), mask)
        torch.testing.assert_close(white, torch.tensor([[-1.0, 2.0, -1.0, 0.0]]) / math.sqrt(2))
    # Losses are clipped and masked.
    mask = torch.tensor([[True, True, False]])
    old, new = torch.zeros(1, 3), torch.log(torch.tensor([[1.5, 0.5, 50.0]]))
    for sign, expected in ((1.0, -(1.2 + 0.5) / 2), (-1.0, (1.5 + 0.8) / 2)):
        loss = vbon.policy_loss(new, old, torch.tensor([[sign, sign, 9.0]]), mask)
        assert loss.item() == pytest.approx(expected)
    values, returns = torch.tensor([[1.0, 0.1, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    loss = vbon.value_loss(values, torch.zeros(1, 3), returns, mask)
    assert loss.item() == pytest.approx((0.5 * 0.8 ** 2 + 0.5 * 0.9 ** 2) / 2)


@pytest.mark.parametrize("function, inputs", [
    (vbon.masked_mean, 1), (vbon.whiten, 1), (vbon.gae, 2), (vbon.policy_loss, 3),
    (vbon.value_loss, 3), (lambda u, r, mask: vbon.prefix_values(u, r, mask, 2), 2)])
def test_masks_may_have_any_type_and_hide_nan(function, inputs):
    """What is outside the mask changes neither the value nor the gradient."""
    tensors = [normals(3, 4, seed=i) for i in range(inputs)]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    expected = function(*tensors, mask.bool())
    for dtype in (torch.uint8, torch.int, torch.long, torch.half, torch.float, torch.double):
        torch.testing.assert_close(function(*tensors, mask.to(dtype)), expected, rtol=0, atol=0)
    if function in (vbon.policy_loss, vbon.value_loss):
        x, gradients = tensors[0].requires_grad_(), []
        assert torch.autograd.gradcheck(lambda x: function(x, *tensors[1:], mask), (x,))
        for outside in (0.0, NAN):
            hidden = [torch.where(mask.bool(), t, outside) for t in tensors]
            assert torch.equal(function(*hidden, mask), expected)
            gradients += torch.autograd.grad(function(*hidden, mask), x)
        assert torch.equal(*gradients) and not gradients[1][~mask.bool()].any()


# ========== Beyond the paper: prefix critic and token bias =======================================


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
    expected = torch.where(mask, expected, 0.0)
    for outside in (0.0, NAN):
        found = vbon.prefix_values(u, torch.where(mask, rewards, outside), mask, every)
        close(found, expected, atol=1e-9)
    sums = []
    vbon.prefix_values(u[:15], rewards[:15], mask[:15], every, lambda x: sums.append(x) or x)
    second = vbon.prefix_values(u[15:], rewards[15:], mask[15:], every, lambda x: x + sums[0])
    close(second, expected[15:], atol=1e-9)


def test_score_prefixes_gives_normal_quantiles_of_partial_responses(toy):
    task, prompts = toy[0], ["the plot was", "the music was"]
    words = [["very", "superb", "."], ["slow"]]
    ids = [task.tokenizer.convert_tokens_to_ids(row) for row in words]
    rollout = vbon.Rollout(None, None, *vbon.pad(ids, 0, "right"))
    ref = doubles([[-1.0, 0.0, 0.5, 3.0], [9.0] * 4])
    u, every_second = (vbon.score_prefixes(task, prompts, rollout, ref, every) for every in (1, 2))
    k = [1.5, 4]  # "very" alone has warmth 0, a tie, and "very superb" is above all
    quantiles = [statistics.NormalDist().inv_cdf((i + 0.5) / 5) for i in k]
    close(u, doubles([[0, *quantiles], [0, 0, 0]]), atol=1e-6, rtol=0)
    close(every_second, torch.where(torch.arange(3) == 2, u, 0))


def token_bias_rollout(seed, V):
    tokens = torch.randint(V - 1, (6, 5), generator=seeded(3 + seed))  # token V−1 never
    mask = torch.rand(6, 5, generator=seeded(4 + seed)) < 0.8
    values, returns = (torch.randn(6, 5, generator=seeded(5 + seed + i)) for i in (0, 90))
    return vbon.Rollout(None, None, tokens, mask, values=values, returns=returns)


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
        rollout = token_bias_rollout(iteration, V)
        advantages = rollout.returns - rollout.values
        of_token = [advantages[(rollout.tokens == a) & rollout.mask] for a in range(V)]
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
    "Llama": ROPE, "Qwen2": ROPE, "Qwen3": ROPE16, "Gemma": ROPE16, "Mistral": WINDOW,
    "Phi3": WINDOW, "Gemma2": MIXED, "Gemma3Text": MIXED, "Olmo3": MIXED,
    "GptOss": MIXED | dict(num_local_experts=4)}


def small_lm(kind="GPT2", seed=0, **changes):
    import transformers
    torch.manual_seed(seed)
    used = list(SIZES)[:{"GPT2": 2, "Bloom": 3}.get(kind, 7)]  # the others have their own names
    settings = {k: SIZES[k] for k in used} | KINDS.get(kind, {}) | changes
    config = getattr(transformers, kind + "Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def lm_args(**changes):
    return types.SimpleNamespace(**dict(
        ref="mine", device="cpu", temperature=0.8, dtype="float32", rollouts=96, minibatch=32, lr=0,
        unfrozen_layers=2, ppo_epochs=1, value_coef=1, token_bias_lr=0, adam_eps=1e-8) | changes)


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6, 7, 8]]


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
        together = rollout.input_ids[i][rollout.attention_mask[i].bool()].tolist()
        assert together == prompt + response[:len(together) - len(prompt)]
    assert not rollout.log_probs[~rollout.mask].any() and not rollout.values[~rollout.mask].any()
    for dtype in ("float32", "bfloat16"):
        vbon.check_sampler(lm, [eos], lm_args(dtype=dtype), 0)


@pytest.mark.parametrize("kind, settings", [
    ("Rwkv", dict(num_hidden_layers=2)), ("Mamba", dict(state_size=4)),
    ("RecurrentGemma", ROPE16 | dict(lru_width=32, attention_window_size=16)),
    ("Roberta", dict(is_decoder=True)),
    ("Bart", dict(d_model=32, encoder_layers=1, decoder_layers=1))])
def test_models_that_cannot_be_sampled_from_are_refused(kind, settings):
    with pytest.raises(vbon.UserError, match=f"--ref mine: .* cannot sample from a {kind}"):
        vbon.check_sampler(small_lm(kind, **settings), [10], lm_args(unfrozen_layers=-1), 0)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_layers_run_once(kind, K):
    """On the reference model's output of the last frozen layer, the top K layers give the logits
    and gradients of a full pass, for left-padded prompts and responses of different lengths."""
    ref, args = small_lm(kind), lm_args(unfrozen_layers=K)
    policy = vbon.make_policy(ref, K)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    layers = vbon.transformer_layers(policy)[0]
    pointers = {p.data_ptr() for p in ref.parameters()}  # frozen parameters are shared, not copied
    assert all((p.data_ptr() in pointers) != p.requires_grad for p in policy.parameters())
    for i, layer in enumerate(layers):
        assert all(p.requires_grad == (i >= len(layers) - K) for p in layer.parameters())

    # Before the first step, and at learning rate 0, the policy is the reference model.
    uniforms = torch.rand(96, 10, generator=seeded(1))
    rollout = vbon.generate(policy, PROMPTS * 24, uniforms, [10], 0.8)
    assert len(rollout.mask.sum(1).unique()) >= 3
    by_ref = vbon.reference_log_probs(ref, rollout, args)
    close(by_ref, rollout.log_probs, atol=5e-5, rtol=1e-4)
    batch = rollout[torch.arange(32, 64)]  # the rows of a minibatch
    assert torch.equal(batch.frozen_hidden, rollout.frozen_hidden[32:64])
    rollout.advantages, rollout.returns = normals(96, 10).float(), rollout.values
    optimizer = vbon.make_optimizer([policy], args)
    metrics = vbon.update(policy, None, optimizer, rollout, None, args, seeded())
    assert metrics["ppo/approx_kl"] < 1e-8 and metrics["ppo/clip_fraction"] == 0
    with torch.no_grad():
        log_probs = vbon.response_log_probs(policy, batch, 0.8, K)[0]
    close(torch.where(batch.mask, log_probs, 0.0), by_ref[32:64], atol=1e-6, rtol=0)

    # After a step they differ, and with or without frozen_hidden the policy is the same.
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.05 * torch.randn(p.shape, generator=seeded(2)))
    full, found = vbon.Rollout(**vars(batch) | dict(frozen_hidden=None)), []
    for x in (full, batch):
        log_probs, hidden = vbon.response_log_probs(policy, x, 0.8, K)
        loss = torch.where(x.mask, log_probs, 0.0).square().mean()
        found.append([log_probs, hidden, *torch.autograd.grad(loss, trained.values())])
    for by_full, by_top in zip(*found):
        close(by_top, by_full, atol=1e-6, rtol=0)
    assert not torch.allclose(found[0][0][batch.mask], by_ref[32:64][batch.mask], atol=1e-2)

    # Nothing is computed below the top K layers, and afterwards the layers are restored.
    calls, parts = [], [next(m for m in layer.modules() if not [*m.children()]) for layer in layers]
    hooks = [part.register_forward_pre_hook(lambda *_: calls.append(0)) for part in parts]
    vbon.response_log_probs(policy, batch, 0.8, K)
    assert len(calls) == K
    with pytest.raises(KeyboardInterrupt), vbon.frozen_layers(policy, K, batch.frozen_hidden):
        raise KeyboardInterrupt
    for hook in hooks:
        hook.remove()
    for layer in [*layers, *vbon.transformer_layers(ref)[0]]:
        assert "forward" not in vars(layer) and not layer._forward_hooks
    with torch.no_grad():
        close(vbon.response_log_probs(policy, full, 0.8, K)[0], found[0][0], atol=1e-6, rtol=0)


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


def flags(settings=(), *more, **changes):
    """A command line of these settings, flags and changes."""
    pairs = [("--" + k.replace("_", "-"), x) for k, x in (dict(settings) | changes).items()]
    return [str(x) for x in (*itertools.chain(*pairs), *more)]


def call(*argv, script=vbon):
    """Call the script's main in this process. Returns exit code, output and name."""
    out, err, name = io.StringIO(), io.StringIO(), os.path.basename(script.__file__)
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          mock.patch.object(sys, "argv", [name])):
        try:
            code = script.main([str(a) for a in argv])
        except SystemExit as stop:  # --help
            code = stop.code
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue(),
                                 script=name)


def command(*argv, cwd, **environment):
    """Run Python in a new process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, capture_output=True,
                          text=True, timeout=600, env=environment)


def succeeded(result):
    assert result.returncode == 0, result.stderr
    return result


def refused(result, *words):
    """Exit code 2 and one line on stderr, after any progress bar, that has these words."""
    assert result.returncode == 2, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith(getattr(result, "script", "vbon.py") + ": "), result.stderr
    assert all(str(w) in line for w in words), result.stderr
    assert "Traceback" not in result.stderr and "usage:" not in result.stderr


def parsed(*argv, script=vbon):
    """The settings of a command line."""
    with mock.patch.object(script, "train") as train:
        succeeded(call(*argv, script=script))
    return train.call_args.args[0]


def start_and_kill(number, word, *argv, cwd, script="vbon"):
    """Start a script that kill -9 ends when the file number `number` whose path has this word is
    about to be renamed from its temporary name."""
    path = cwd / "killed.py"
    path.write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import {script}
replace, seen = os.replace, []
def kill(source, target):
    seen.extend([target] if {word!r} in str(target) else [])
    if len(seen) == {number}:
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = kill
sys.exit({script}.main())""")
    return subprocess.Popen([sys.executable, path, *argv], cwd=cwd, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def read_json(path):
    return json.loads(Path(path).read_text("utf-8"))


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit(path, **changes):
    """Change a JSON file in place."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def files(folder):
    """{name: content} of a folder, at any depth."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*.*")}


def sample_rows(folder):
    """The lines of the cached reference samples in a folder."""
    return [row for path in sorted(Path(folder).rglob("*.jsonl")) for row in read_lines(path)]


def metrics_of(run):
    """metrics.jsonl without its times."""
    return [{k: x for k, x in row.items() if not k.startswith("time/")}
            for row in read_lines(run / "metrics.jsonl")]


def weights(run, file="policy/model.safetensors"):
    from safetensors.torch import load_file
    return load_file(run / file)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ========== Toy task =============================================================================

TOY = dict(episodes=256, rollouts=128, minibatch=64, M=30, max_new_tokens=3)


def toy_args(*first, script=vbon, **changes):
    settings = TOY | dict(device="cpu", backend="hand", out="unused") | changes
    return parsed(*first, *flags(settings), script=script)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy's task, the folder of three runs ("one" and "two" are alike), and what the first
    returned."""
    folder = tmp_path_factory.mktemp("toy")
    results = [vbon.train(toy_args(out=folder / name, seed=seed, samples=folder / "samples"))
               for name, seed in (("one", 0), ("two", 0), ("three", 1))]
    return vbon.setup(toy_args()), folder, results[0]


def test_toy_is_enumerated_exactly(toy):
    task, exact = toy[0], vbon.ExactToy(toy[0], toy_args())
    assert len(exact.responses) == len(set(exact.responses)) == 1 + 18 + 18 ** 2 + 18 ** 3
    close(exact.log_ref.exp().sum(1), torch.ones(4).double(), atol=1e-5)
    close(exact.log_bon.exp().sum(1), torch.ones(4).double(), atol=1e-4)
    prompt = task.encode("the plot was")
    for response in ("superb", "very dull", "slow but moving"):  # the last one is cut off
        end = " ." if response.count(" ") < 2 else ""
        ids = torch.tensor([prompt + task.encode(response + end)])
        with torch.no_grad():
            log_probs = task.ref(ids).logits[0].log_softmax(-1)
        expected = sum(log_probs[t - 1, ids[0, t]].item() for t in range(3, ids.shape[1]))
        found = exact.log_ref[2, exact.responses.index(response)].item()
        assert found == pytest.approx(expected, abs=1e-4)
    for i in (0, 99, 3000):  # F as a sum over all that is worse
        r = exact.rewards
        worse = (r < r[i]) | (r == r[i]) & (torch.arange(len(r)) < i)
        close(exact.log_F[:, i].exp(), (exact.log_ref.exp() * worse).sum(1), atol=1e-9)
    of_ref, of_bon = exact.metrics(exact.log_ref), exact.metrics(exact.log_bon)
    assert of_ref["exact/kl_to_ref"] == 0 and of_ref["exact/kl_to_bon"] > 10
    assert of_ref["exact/win_rate"] == pytest.approx(0.5, abs=1e-4)
    assert of_bon["exact/kl_to_bon"] == pytest.approx(0, abs=1e-9)
    # The optimum of E[reward] − KL / N, for the F̂ of training.
    ref_rewards = vbon.reference_samples(task, toy_args(samples=toy[1] / "samples"))
    log_F = torch.stack([vbon.estimate_log_F(exact.rewards, row) for row in ref_rewards])
    reward = 16 * vbon.vbon_reward(log_F, exact.log_ref, 16)
    optimum = exact.metrics((exact.log_ref + reward).log_softmax(1))["exact/kl_to_bon"]
    assert toy[2]["exact/kl_to_bon_of_optimum"] == pytest.approx(optimum, abs=1e-6)
    warmth = vbon.warmth
    assert warmth("superb") > warmth("moving") > 0 > warmth("dull") > warmth("awful")
    assert warmth("very superb") > warmth("superb") > 0 > warmth("not superb")
    assert warmth("slow but superb") > warmth("superb but slow")


def changed_policy(task, K=-1, amount=0.05, seed=0):
    policy = vbon.make_policy(task.ref, K)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(amount * torch.randn(p.shape, generator=seeded(seed)))
    return policy


@pytest.mark.parametrize("objective", ["vbon", "rlhf"])
def test_collect(toy, objective):
    """Metrics agree with the exact ones, returns are the terminal reward less the KL penalty."""
    task, args = toy[0], toy_args(objective=objective, M=300, samples=toy[1] / "samples")
    policy, exact, B = changed_policy(task), vbon.ExactToy(task, args), torch.arange(4000)
    prompts = [task.prompts[i] for i in B % 4]
    ref_rewards = vbon.reference_samples(task, args)[B % 4]
    rollout, metrics = vbon.collect(policy, None, task, prompts, ref_rewards, args, seeded())
    mask, expected = rollout.mask, exact.metrics(exact.log_probs(policy))
    log_ref = vbon.reference_log_probs(task.ref, rollout, args)
    log_ratio = rollout.log_probs - log_ref
    texts = vbon.decode(task, prompts, vbon.token_lists(rollout))
    scores = doubles([vbon.warmth(y) for y in texts])
    for name, x in (("reward", scores), ("kl_to_ref", log_ratio.sum(1))):
        assert metrics["objective/" + name] == pytest.approx(x.mean().item(), abs=1e-6)
        error = 4 * x.std().item() / math.sqrt(4000)
        assert metrics["objective/" + name] == pytest.approx(expected["exact/" + name], abs=error)
    assert metrics["objective/win_rate"] == pytest.approx(expected["exact/win_rate"], abs=0.05)
    assert metrics["objective/kl_to_bon"] == pytest.approx(expected["exact/kl_to_bon"], rel=0.1)
    assert metrics["objective/length"] == pytest.approx(mask.sum().item() / 4000)
    entropy = -rollout.log_probs.sum(1).mean().item()
    assert metrics["objective/entropy"] == pytest.approx(entropy, abs=1e-5)

    # With values of 0 and λ = 1 a return is the sum of the rewards to come.
    rewards = -args.kl_coef * log_ratio.double()
    terminal = vbon.terminal_reward(scores, ref_rewards, log_ref.double().sum(1), args)
    rewards[B, mask.sum(1) - 1] += terminal
    to_come = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    close(rollout.returns.double(), torch.where(mask, to_come, 0.0), atol=1e-4)
    close(rollout.advantages, vbon.whiten(rollout.returns, mask), atol=1e-5)
    assert rollout.advantages[mask].var().item() == pytest.approx(1, abs=1e-2)


def test_files_of_a_run_and_its_saved_policy(toy):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    task, folder, result = toy
    one, metrics = folder / "one", read_lines(folder / "one/metrics.jsonl")
    assert [m["episode"] for m in metrics] == [128, 256]
    assert {k.split("/")[0] for k in metrics[0]} == {"episode", "objective", "ppo", "time", "exact"}
    exact = "kl_to_bon kl_to_ref reward win_rate effective_N excess_kl kl_to_bon_of_optimum"
    training = "reward kl_to_ref kl_to_bon win_rate length entropy"
    names = "task objective N M beta seed episodes seconds seconds_sampling".split()
    names += ["exact/" + x for x in exact.split()] + ["objective/" + x for x in training.split()]
    assert read_json(one / "result.json") == result and set(names) <= set(result)
    assert result["episodes"] == 256
    for name in ("exact/kl_to_bon", "objective/reward"):
        assert result[name] == metrics[-1][name]
    assert read_json(one / "config.json")["N"] == 16 and not (one / "checkpoint.pt").exists()
    for row in sample_rows(folder / "samples"):
        assert row.keys() == {"prompt", "start", "rewards", "responses", "tokens"}
        assert row["rewards"] == [vbon.warmth(y) for y in row["responses"]]

    assert metrics_of(one) == metrics_of(folder / "two") != metrics_of(folder / "three")
    assert same(weights(one), weights(folder / "two"))
    policy = AutoModelForCausalLM.from_pretrained(one / "policy")
    assert not same(policy.state_dict(), task.ref.state_dict())
    exact = vbon.ExactToy(task, toy_args())
    kl = exact.metrics(exact.log_probs(policy))["exact/kl_to_bon"]
    assert kl == pytest.approx(result["exact/kl_to_bon"], abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(one / "policy")
    assert tokenizer.encode("the plot was") == exact.prompt_ids[2]


@pytest.mark.parametrize("extras", [{}, dict(prefix_critic=1, token_bias_lr=0.1, lam=0.8)])
def test_toy_policy_approaches_best_of_4(tmp_path, extras):
    changes = dict(N=4, episodes=20_480, rollouts=1024, minibatch=256, M=200, out=tmp_path / "run")
    result = vbon.train(toy_args(**changes, **extras, samples=tmp_path / "samples"))
    assert result["exact/kl_to_bon"] < 0.1  # from 1.6
    assert result["exact/win_rate"] == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("N", [1, 16])
def test_one_response_of_one_token_gives_finite_numbers(N, tmp_path):
    ones = dict.fromkeys("episodes rollouts minibatch ppo_epochs M max_new_tokens".split(), 1)
    succeeded(call(*flags(ones, N=N, out=tmp_path / "run", samples=tmp_path / "s")))
    rows = [read_json(tmp_path / "run/result.json"), *read_lines(tmp_path / "run/metrics.jsonl")]
    assert all(math.isfinite(x) for row in rows for x in row.values() if isinstance(x, float))
    assert [len(row["tokens"]) for row in sample_rows(tmp_path / "s")] == [1] * 4


# ========== Runs that are killed, stopped, resumed, overwritten ==================================

SCRIPTS = [(vbon, ["--prefix-critic", "0", "--token-bias-lr", "0"]),
           (vbon, ["--prefix-critic", "1", "--token-bias-lr", "0.1"]),
           (bon_baselines, ["bonbon", "--N", "4"]), (bon_baselines, ["bond"])]


@pytest.mark.parametrize("script, method", SCRIPTS)
def test_a_killed_run_resumes_to_the_same_weights(models, script, method, tmp_path, monkeypatch):
    """kill -9 while a checkpoint is written. The resumed run ends as one that was not killed."""
    monkeypatch.chdir(tmp_path)
    argv = [*method, *flags(own(models), episodes=32, save_every=1)]
    process = start_and_kill(2, "checkpoint.pt", *argv, "--out", "killed", cwd=tmp_path,
                             script=script.__name__)
    succeeded(call(*argv, "--out", "whole", "--samples", "whole-samples", script=script))
    assert process.wait() == -9 and Path("killed/checkpoint.pt").exists()
    assert not Path("killed/result.json").exists()
    resume = [*method[:script is bon_baselines], "--task", "imdb", "--out", "killed", "--resume"]
    assert "resumed" in succeeded(call(*resume, script=script)).stdout  # with the run's settings
    assert same(weights(Path("whole")), weights(Path("killed")))
    assert metrics_of(Path("whole")) == metrics_of(Path("killed"))
    assert [row["episode"] for row in metrics_of(Path("whole"))] == [8, 16, 24, 32]
    assert not Path("killed/checkpoint.pt").exists()
    refused(call(*resume, script=script), "killed holds a run")  # it is finished


def stop_before_saving(*argv):
    """Ctrl-C after the last iteration."""
    with mock.patch.object(vbon, "save_run", side_effect=KeyboardInterrupt):
        result = call(*argv)
    assert result.returncode == 130 and "--resume" in result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A toy run that Ctrl-C stopped after both iterations."""
    folder = tmp_path_factory.mktemp("stopped")
    stop_before_saving(*flags(TOY, save_every=1, samples=folder / "samples", out=folder / "run"))
    return folder / "run"


def test_a_run_is_resumed_with_its_settings_only(stopped, toy, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    before = files(run)
    refused(call(*flags(TOY, out=run)), "holds a run", "--overwrite", "--resume")
    for name, value in dict(lr=0.01, N=8, seed=1, estimator="log_mean", objective="rlhf").items():
        saved = read_json(run / "config.json")[name]
        refused(call("--out", run, "--resume", "--" + name, value), name, saved, f"got {value}")
    for name, damage in (("checkpoint.pt", b""), ("checkpoint.pt", before["checkpoint.pt"][:-1000]),
                         ("checkpoint.pt", b"\x80\x02}q\x00."), ("config.json", b"\xff\xfe{}"),
                         ("config.json", before["config.json"][:40])):
        (run / name).write_bytes(damage)
        refused(call("--out", run, "--resume"), name)
        (run / name).write_bytes(before[name])
    assert not (run / "result.json").exists() and not (run / "policy").exists()
    with open(run / "metrics.jsonl", "a") as file:
        file.write("torn")
    argv = flags(TOY, "--resume", save_every=7, device="cpu", samples=tmp_path / "s", out=run)
    assert "after 2 iterations" in succeeded(call(*argv)).stdout
    assert metrics_of(run) == metrics_of(toy[1] / "one")
    assert same(weights(run), weights(toy[1] / "one"))
    assert (tmp_path / "s").exists() and read_json(run / "config.json")["save_every"] == 7


def test_a_run_starts_again(stopped, toy, tmp_path):
    """With --resume if it has no checkpoint yet, with --overwrite even if it is finished."""
    run = shutil.copytree(stopped, tmp_path / "run")
    (run / "checkpoint.pt").unlink()
    assert "no checkpoint" in succeeded(call("--out", run, "--resume")).stdout
    assert metrics_of(run) == metrics_of(toy[1] / "one")
    (run / "eval-0123.json").write_text("{}")
    argv = flags(TOY, "--overwrite", samples=toy[1] / "samples", seed=1)
    with mock.patch.object(vbon, "reference_samples", side_effect=KeyboardInterrupt):
        assert call(*argv, "--out", run).returncode == 130
    assert not {"result.json", "policy", "eval-0123.json"} & set(os.listdir(run))
    for out in (run, tmp_path / "missing"):  # nothing to replace is no error
        succeeded(call(*argv, "--out", out))
        assert metrics_of(out) == metrics_of(toy[1] / "three")


@pytest.mark.parametrize("script, method", SCRIPTS)
@pytest.mark.parametrize("minibatch", [64, 128])
def test_weights_that_are_not_finite_are_not_saved(script, method, minibatch, tmp_path):
    run = tmp_path / "run"
    argv = flags(TOY, lr=1e18, save_every=1, ppo_epochs=1, minibatch=minibatch, out=run)
    refused(call(*method, *argv, "--samples", tmp_path / "samples", script=script), "--lr")
    assert not {"policy", "result.json", "checkpoint.pt"} & set(os.listdir(run))


# ========== The command line =====================================================================


@pytest.mark.parametrize("argv, word", [
    ("--N 0", "--N"), ("--N many", "--N"), ("--N nan", "--N"), ("--N inf", "--N"), ("--M 0", "--M"),
    ("--task chess", "toy"), ("--objective sft", "bound1"), ("--estimator posterior", "log_mean"),
    ("--temperature 0", "--temperature"), ("--adam-eps 0", "--adam-eps"), ("--lr nan", "--lr"),
    (f"--seed {2 ** 64}", "--seed"), (f"--data-seed {2 ** 70}", "--data-seed"),
    ("--objective rlhf --N 1", "--beta"), ("--ref gpt2", "--task imdb"), ("--task", "--task"),
    ("--minibatch 4096", "--rollouts"), ("--unfrozen-layers 7", "from 1 to 2"),
    ("--device cuda:7", "cuda:7"), ("--nonsense", "--nonsense"), ("--max-new-tokens 6", "at most"),
    ("--M 2 --estimator smooth", "--M"), ("--objective bound1 --estimator log_mean", "add_one"),
    ("--out file", "file"), ("--out file/run", "file"), ("--unfrozen-layers 0", "from 1 to 2"),
    ("BL", "objective"), ("BL ppo", "bonbon"), ("BL bon --seed x", "--seed"),
    ("BL bonbon --N 2.5", "whole number"), ("BL dpo --beta 0", "--beta"),
    ("BL bonbon --alpha 2", "--alpha"), ("BL bond --eta 2", "--eta"),
    ("BL bond --gamma nan", "--gamma"), ("BL dpo --ref gpt2", "--task imdb"),
    ("BL dpo --minibatch 64 --episodes 32", "episodes"), ("BL bon --max-new-tokens 6", "at most")])
def test_bad_flags(argv, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = bon_baselines if argv[:2] == "BL" else vbon
    Path("file").write_text("mine")  # a run needs a folder
    refused(call(*argv.removeprefix("BL").split(), script=script), word)
    assert os.listdir(tmp_path) == ["file"] and Path("file").read_text() == "mine"


@pytest.mark.parametrize("task", vbon.RECIPES)
@pytest.mark.parametrize("script", [vbon, bon_baselines])
def test_help_shows_the_defaults_of_the_task(script, task):
    text = " ".join(succeeded(call("--task", task, "--help", script=script)).stdout.split())
    for name, value in script.RECIPES[task].items():
        flag = text.rpartition(f" --{name.replace('_', '-')} ")[2]
        assert f"(default: {value})" in flag.partition(" --")[0], (name, flag)


def test_importing_is_light():
    code = "import sys, vbon; print({'datasets', 'matplotlib', 'transformers'} & set(sys.modules))"
    assert succeeded(command("-c", code, cwd=HERE)).stdout == "set()\n"


# ========== imdb with small models, and an offline hub ===========================================

END = "<|endoftext|>"


def byte_tokenizer(*special, **settings):
    """One token per byte after the special ones. Only the settings name any of these."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def name_labels(*names):
    return dict(id2label=dict(enumerate(names)), label2id={x: i for i, x in enumerate(names)})


def save_small_models(folder, labels=("NEGATIVE", "POSITIVE"), eos=True, seed=0):
    """Save a GPT-2 and a DistilBERT classifier over bytes, and prompts."""
    import transformers
    small_lm(seed=seed, vocab_size=257, n_positions=32, n_layer=2, bos_token_id=0, eos_token_id=0,
             initializer_range=0.02).save_pretrained(folder / "ref")
    byte_tokenizer(END, **({"eos_token": END} if eos else {})).save_pretrained(folder / "ref")
    config = transformers.DistilBertConfig(
        vocab_size=257, max_position_embeddings=64, dim=32, hidden_dim=64, n_layers=1, n_heads=2,
        **name_labels(*labels))
    transformers.DistilBertForSequenceClassification(config).save_pretrained(folder / "reward")
    byte_tokenizer(END, pad_token=END, model_max_length=64).save_pretrained(folder / "reward")
    write_lines(folder / "prompts.jsonl", [{"prompt": f"Film number {i} is"} for i in range(20)])


FEW = dict(episodes=16, rollouts=8, minibatch=4, M=6, train_prompts=6, max_new_tokens=6,
           unfrozen_layers=1)


def own(folder, **changes):
    """Settings of imdb with the models and prompts of a folder."""
    return dict(task="imdb", N=2) | FEW | dict(
        ref=folder / "ref", reward=folder / "reward", dataset=folder / "prompts.jsonl") | changes


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of `save_small_models`."""
    folder = tmp_path_factory.mktemp("models")
    save_small_models(folder)
    return folder


def load_lm(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_the_fused_gelu_is_gpt2s_own(models):
    from transformers import AutoModelForCausalLM
    ours, *_ = vbon.load_model("ref", AutoModelForCausalLM, str(models / "ref"), "cpu")
    theirs, found = load_lm(models / "ref"), []
    for lm, name in ((theirs, "NewGELUActivation"), (ours, "GELU")):
        assert [type(m).__name__ for m in lm.modules()].count(name) == 2
        x = torch.linspace(-6, 6, 1001, requires_grad=True)
        y = lm.transformer.h[0].mlp.act(x)
        found.append((lm(torch.arange(20).view(1, 20)).logits, y, *torch.autograd.grad(y.sum(), x)))
    for one, two, atol in zip(*found, (1e-5, 1e-6, 5e-6)):
        close(one, two, atol=atol, rtol=1e-5)
    assert ours.config.activation_function == "gelu_new"  # what is saved stays the same


@pytest.mark.parametrize("objective, critic, dtype", [
    *((objective, 2, "float32") for objective in vbon.OBJECTIVES), ("rlhf", 0, "float32"),
    ("vbon", 2, "bfloat16")])
def test_own_models_and_prompts(models, tmp_path, objective, critic, dtype):
    run, samples = tmp_path / "run", tmp_path / "samples"
    settings = own(models, objective=objective, prefix_critic=critic, dtype=dtype, lr=1e-3)
    succeeded(call(*flags(settings, out=run, samples=samples)))
    result, metrics = read_json(run / "result.json"), read_lines(run / "metrics.jsonl")
    assert 0 < result["objective/reward"] < 1 and len(metrics) == 2
    assert all(math.isfinite(x) for row in metrics for x in row.values())
    rows = sample_rows(samples)
    assert len(rows) == (0 if objective == "rlhf" and not critic else 6)
    for row in rows:
        assert [len(row[x]) for x in ("rewards", "responses", "tokens")] == [6] * 3
        assert row["prompt"].startswith("Film number") and row["start"] == 0
        assert all(0 < len(tokens) <= 6 for tokens in row["tokens"])
    # At first the policy is the reference model, by decoding and by a pass on frozen layers.
    error = 0.05 if dtype == "bfloat16" else 1e-4
    assert metrics[0]["objective/kl_to_ref"] == pytest.approx(0, abs=error)
    assert all(p.dtype == torch.float32 for p in load_lm(run / "policy").parameters())
    assert all(read_json(path)["dtype"] == dtype for path in samples.rglob("header.json"))
    # The token bias is saved, in an output layer that the embeddings do not share.
    policy, ref = load_lm(run / "policy"), load_lm(models / "ref").to(getattr(torch, dtype))
    for get, equal in (("get_input_embeddings", True), ("get_output_embeddings", False)):
        assert torch.equal(*(getattr(lm, get)().weight.float() for lm in (policy, ref))) == equal


def test_bad_models_and_data(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_small_models(tmp_path / "three", labels="ABC")
    save_small_models(tmp_path / "no_eos", eos=False)
    edit(tmp_path / "no_eos/ref/generation_config.json", eos_token_id=None)
    for name, what in itertools.product(("cut", "shape", "bare", "wordy"), ("ref", "reward")):
        folder = Path(shutil.copytree(models / what, tmp_path / name / what))
        if name == "cut":  # an incomplete download
            content = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(content[:-1000])
        elif name == "shape":
            edit(folder / "config.json", vocab_size=300)
        elif name == "bare":
            (folder / "tokenizer.json").unlink()
            kind = {"ref": "GPT2Tokenizer", "reward": "BertTokenizer"}[what]
            edit(folder / "tokenizer_config.json", tokenizer_class=kind)
        else:  # more tokens than the model has
            byte_tokenizer(END, "<a>", "<b>", eos_token=END, pad_token=END).save_pretrained(folder)
    Path("empty.jsonl").write_text("")
    Path("utf16.jsonl").write_bytes('{"prompt": "fine"}\n'.encode("utf-16"))
    for name, row in dict(long={"prompt": "a prompt of more than 26 bytes"}, broken={"prompt": 3},
                          other={"question": "y"}, nothing={"prompt": ""}).items():
        write_lines(Path(name + ".jsonl"), [row] * 2 + [{"prompt": "held out for the test"}])
    before = sorted(os.listdir(tmp_path))
    for what, name, words in (
            *((what, f"{name}/{what}", f"--{what} {name}/{what}") for name, what in
              itertools.product(("cut", "shape", "bare", "wordy"), ("ref", "reward"))),
            *((what, "no/such", f"--{what} no/such") for what in ("ref", "reward", "dataset")),
            *(("dataset", name + ".jsonl", "--dataset") for name in
              ("missing", "empty", "broken", "utf16", "other", "nothing")),
            ("dataset", "long.jsonl", "at most 32"), ("reward", models / "ref", "lacks"),
            ("reward", "three/reward", "two labels, got"), ("ref", "no_eos/ref", "EOS"),
            ("ref", models, "--ref"), ("ref", "./none", "--ref ./none")):
        refused(call(*flags(own(models, **{what: name}))), words)
    assert sorted(os.listdir(tmp_path)) == before


def test_the_positive_label_is_the_reward(models, tmp_path, capsys):
    """Where no label is called positive, it is the second. The name is printed."""
    shutil.copytree(models / "reward", tmp_path / "reward")
    rewards = []
    for names, taken in ((["NEGATIVE", "POSITIVE"], 1), (["pos", "neg"], 0), (["bad", "good"], 1)):
        edit(tmp_path / "reward/config.json", **name_labels(*names))
        rewards += vbon.load_reward(str(tmp_path / "reward"), "cpu")[0](["a"], ["b"])
        assert f"probability of the label {names[taken]!r}" in capsys.readouterr().out
    assert rewards[0] == rewards[2] == pytest.approx(1 - rewards[1], abs=1e-6)


def test_a_tokenizer_that_appends_eos(models, tmp_path):
    """EOS does not end a prompt: all is as with a tokenizer that appends nothing."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer
    shutil.copytree(models, tmp_path / "eos")
    tokenizer = AutoTokenizer.from_pretrained(models / "ref")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save_pretrained(tmp_path / "eos/ref")
    assert AutoTokenizer.from_pretrained(tmp_path / "eos/ref").encode("Film")[-1] == 0
    found = []
    for name, folder in (("plain", models), ("appended", tmp_path / "eos")):
        run, samples = tmp_path / name, tmp_path / name / "samples"
        succeeded(call(*flags(own(folder), out=run, samples=samples)))
        found.append((os.listdir(samples), sample_rows(samples), weights(run)))
    (names, rows, plain), (other_names, other_rows, appended) = found
    assert rows == other_rows and same(plain, appended) and names != other_names


def test_the_folder_is_named_by_all_that_samples_depend_on(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, "base")
    small_lm("Llama", vocab_size=257).save_pretrained("base/ref")

    def folder_of(folder, split="train", **changes):
        args = parsed(*flags(own(Path(folder), **changes)))
        args.test_prompts = 1
        return str(vbon.samples_folder(vbon.setup(args, split), args)[0])
    path = folder_of("base")
    shutil.copytree("base", "copy")
    assert folder_of("copy", seed=1, M=7, out="elsewhere") == path  # contents count, not places
    found = [path, folder_of("base", split="test")]
    tokenizer = read_json("base/ref/tokenizer.json")["model"]
    words = tokenizer["vocab"]
    swapped = dict(model=tokenizer | {"vocab": words | {"a": words["e"], "e": words["a"]}})
    for i, (file, change) in enumerate((
            ("reward/config.json", name_labels("POSITIVE", "NEGATIVE")),
            ("reward/tokenizer_config.json", dict(model_max_length=32)),
            ("reward/tokenizer.json", swapped), ("ref/tokenizer.json", swapped),
            ("ref/config.json", dict(rope_parameters=dict(rope_type="default", rope_theta=99.0))))):
        edit(Path(shutil.copytree("base", f"edit{i}"), file), **change)
        found.append(folder_of(f"edit{i}"))
    for name, value in dict(backend="vllm", temperature=0.5, no_eos_reward=-1.0, dtype="bfloat16",
                            data_seed=1, max_new_tokens=5).items():
        found.append(folder_of("base", **{name: value}))
    assert len(set(found)) == len(found) == 2 + 5 + 6


def lay_out_hub(home, models, dataset, config, splits):
    """An offline cache of the hub: snapshots of models, and the data where `datasets` looks."""
    import datasets
    for name, folder in models.items():
        base = home / "hub" / ("models--" + name.replace("/", "--"))
        (base / "refs").mkdir(parents=True)
        (base / "refs/main").write_text("0" * 40)
        (base / "snapshots").mkdir()
        (base / "snapshots" / ("0" * 40)).symlink_to(folder.resolve())
    (home / "plain").mkdir()
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(home / f"plain/{split}-00000-of-00001.parquet")
    datasets.load_dataset(str(home / "plain"), cache_dir=str(home / "tmp"))
    made, short = next((home / "tmp").rglob("dataset_info.json")).parent, dataset.split("/")[1]
    target = home / "datasets" / dataset.replace("/", "___") / config / "0.0.0" / ("0" * 40)
    target.parent.mkdir(parents=True)
    made.rename(target)
    for path in target.glob("*.arrow"):
        path.rename(target / (short + "-" + path.name.split("-", 1)[1]))
    edit(target / "dataset_info.json", config_name=config, dataset_name=short,
         builder_name="parquet")


TESTED = flags(test_prompts=4, test_M=4, test_responses=2)  # of evaluate.py


def test_imdb_verbatim_from_an_offline_hub(models, tmp_path):
    """--task imdb with the hub's names, from a cache that holds small models."""
    train, test = ([{"text": f"{start} {i} of a film that I liked — café, {i % 7} stars."}
                    for i in range(40)] for start in ("Review", "Another"))
    names = {"lvwerra/gpt2-imdb": models / "ref", "lvwerra/distilbert-imdb": models / "reward"}
    lay_out_hub(tmp_path / "home", names, "stanfordnlp/imdb", "plain_text",
                {"train": train, "test": test})
    home, run = str(tmp_path / "home"), tmp_path / "runs/imdb-vbon-N16-M6-seed0"
    for script, *argv in (["vbon.py", "--task", "imdb", "--N", 16, *flags(FEW)],
                          ["evaluate.py", run, *TESTED]):
        succeeded(command(HERE / script, *argv, cwd=tmp_path, HF_HOME=home))
    (tested,) = run.glob("eval-*.json")
    assert read_json(run / "result.json")["episodes"] == 16
    prompts = {s["prompt"] for s in read_json(tested)["samples"]}
    assert len(prompts) > 1 and all(p[0] == "A" and 2 <= len(p) <= 8 for p in prompts), prompts
    assert {row["prompt"][0] for row in sample_rows(tmp_path / "samples")} == {"R", "A"}


# ========== tldr =================================================================================


def save_small_pythias(folder):
    """Save GPTNeoX models over bytes, where EOS is token 0: a reference model, and reward models
    with and without a padding token."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification
    torch.manual_seed(0)
    shape = SIZES | dict(vocab_size=258, num_hidden_layers=2, bos_token_id=0, eos_token_id=0,
                         initializer_range=0.02, max_position_embeddings=256)
    for name, pad in dict(ref=None, no_pad=None, reward="<|pad|>", second="<|pad|>").items():
        config = GPTNeoXConfig(**shape, num_labels=1, pad_token_id=1 if pad else None)
        model = (GPTNeoXForCausalLM if name == "ref" else GPTNeoXForSequenceClassification)(config)
        if name == "ref":  # some responses should end
            model.base_model.final_layer_norm.bias.data[0] = 1
            model.get_output_embeddings().weight.data[0, 0] = 2
        model.save_pretrained(folder / name)
        byte_tokenizer(END, "<|pad|>", eos_token=END, pad_token=pad,
                       model_max_length=256).save_pretrained(folder / name)


def test_tldr_verbatim_from_an_offline_hub(tmp_path):
    """With the hub's names: training, both test distributions, the larger evaluator."""
    save_small_pythias(tmp_path)
    subreddits = ("relationships", "relationship_advice", "tifu", "AskReddit")
    rows = [{"subreddit": subreddits[i % 4], "title": f"Title {i}", "summary": "A summary.",
             "post": f"Paragraph of {i}.\n\n" + "More of it. " * (i % 30)} for i in range(120)]
    hub, home = "cleanrl/EleutherAI_pythia-{}-deduped__{}__tldr", str(tmp_path / "home")
    names = {hub.format(*x): tmp_path / name for *x, name in (
        ("2.8b", "sft", "ref"), ("2.8b", "reward", "reward"), ("6.9b", "reward", "second"))}
    data = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"
    lay_out_hub(tmp_path / "home", names, data, "default", {"train": rows[:80], "test": rows[80:]})

    def script(name, *argv):
        return succeeded(command(HERE / name, *argv, cwd=tmp_path, HF_HOME=home)).stdout
    script("vbon.py", "--task", "tldr", *flags(FEW, episodes=8, rollouts=4, max_new_tokens=8))
    run = tmp_path / "runs/tldr-vbon-N100-M6-seed0"
    recipe = dict(estimator="smooth", temperature=0.7, lr=3e-6, adam_eps=1e-5, value_coef=0.2)
    assert recipe.items() <= read_json(run / "config.json").items()
    stored = sample_rows(tmp_path / "samples")
    assert {y.endswith(END) for row in stored for y in row["responses"]} == {True, False}
    assert all(row["prompt"].startswith(vbon.TLDR_SUBREDDITS) for row in stored)

    tested = [run, *TESTED, "--test-prompts", 8]
    script("evaluate.py", *tested)
    (path,) = run.glob("eval-*.json")
    samples, found = (read_json(path)[name] for name in ("samples", "metrics"))
    inside = [s["prompt"].startswith(vbon.TLDR_SUBREDDITS) for s in samples]
    assert inside == [True] * 8 + [False] * 8
    for s in samples:
        assert s["prompt"].endswith("\n\nTL;DR:") and len(s["prompt"].encode()) <= 256 - 8
        assert (s["reward"] == -1.0) == (not s["response"].endswith(END))
    assert found["reward"] == pytest.approx((found["in/reward"] + found["out/reward"]) / 2)
    second = ["--reward", hub.format("6.9b", "reward"), "--temperatures", 0.25, 1]
    script("results/curves.py", *tested, *second, "--against", "temperature")
    assert (tmp_path / "figures/tldr-temperatures.png").stat().st_size > 10_000
    keys = [read_json(path)["key"] for path in run.glob("eval-*.json")]
    found = [(key["temperature"], key["reward"] == second[1]) for key in keys]
    assert sorted(found) == [(0.25, True), (0.7, False), (1.0, True)]


@pytest.mark.parametrize("name", ["reward", "no_pad"])
@pytest.mark.parametrize("end", ["", END])
def test_scalar_rewards_are_read_off_the_last_token(name, end, tmp_path):
    """Padding never counts, EOS does. A reward does not depend on the rest of the batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    save_small_pythias(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
    texts, by_hand = ["short" + end, "too long for the model " * 20 + end, "cut off"], []
    for text in texts:
        ids = tokenizer("p: " + text, return_tensors="pt").input_ids[:, -256:]
        assert (ids[0, -1] == 0) == (end != "" and text.endswith(end))
        by_hand.append(model.score(model.base_model(ids).last_hidden_state[:, -1]).item())
    expected = [*by_hand[:2], -1.0] if end else by_hand
    for before in ([], texts[2:], texts[:2], texts):
        score, reward_id = vbon.load_reward(str(tmp_path / name), "cpu", end, -1.0)
        score(["p: "] * len(before), before)
        assert score(["p: "] * 3, texts) == pytest.approx(expected, abs=1e-5)
        assert score(["p: "], texts[:1]) == pytest.approx(expected[:1], abs=1e-5)
        assert ("-1.0 without" in reward_id) == (end != "")
    # Posts are cut to fit.
    words = types.SimpleNamespace(encode=str.split)
    row = {"subreddit": "tifu", "title": "T", "post": "one two three\n\nfour five\n\nsix"}
    head, tail = "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: ", "\n\nTL;DR:"
    for longest, rest in ((99, row["post"]), (11, "one two three\n\nfour five"), (8, "one two")):
        assert vbon.make_prompt(row, "post", words, longest, None) == head + rest + tail


# ========== Reference samples: killed, shared, converted; several processes; vLLM ================


def test_a_larger_M_extends_the_samples_and_lost_ones_are_generated_again(toy, tmp_path):
    def samples(path, M=30):
        args = toy_args(sample_batch=60, samples=tmp_path / path, M=M)
        rewards, tokens = vbon.reference_samples(toy[0], args, tokens=True)
        assert rewards.shape == (4, M) and [*map(len, tokens)] == [M] * 4
        return rewards[:, :30].tolist(), [row[:30] for row in tokens]
    whole = samples("whole")
    content = files(tmp_path / "whole")
    assert len(content) == 3, "two batches of two prompts each, and the header"
    for name in content:  # any of them may be missing
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        (tmp_path / "cut" / name).unlink()
        assert samples("cut") == whole
        assert name.endswith("header.json") or files(tmp_path / "cut") == content
    assert samples("cut", 50) == samples("cut") == whole
    fifty = samples("fifty", 50)
    for name, batch in content.items():  # batches of two runs with different M overlap
        (tmp_path / "fifty" / name).write_bytes(batch)
    assert samples("fifty") == whole and samples("fifty", 50) in (whole, fifty)


def test_sampling_that_is_killed_ends_with_the_same_files(models, tmp_path):
    argv = flags(own(models), M=60, train_prompts=16, sample_batch=240)
    killed = start_and_kill(3, "000000-000060", *argv, "--samples", "killed", "--out", "a",
                            cwd=tmp_path)
    succeeded(call(*argv, "--samples", tmp_path / "whole", "--out", tmp_path / "b"))
    assert killed.wait() == -9 and len(sample_rows(tmp_path / "killed")) == 2 * 4
    again = call(*argv, "--samples", tmp_path / "killed", "--out", tmp_path / "a", "--resume")
    assert "480 to generate" in succeeded(again).stdout and "no checkpoint" in again.stdout
    whole = files(tmp_path / "whole")
    assert files(tmp_path / "killed").items() >= whole.items() and len(whole) == 1 + 4
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_damaged_samples_and_rewards_are_refused_in_one_line(toy, models, tmp_path):
    from safetensors.torch import load_file, save_file
    settings = dict(M=4, sample_batch=12, samples=tmp_path / "samples")
    before = vbon.reference_samples(toy[0], toy_args(**settings))
    path = min(tmp_path.rglob("*.jsonl"))
    content = path.read_bytes()
    for damage in (content[:100], b"\xff" + content, b"[1]\n", b"[" * 100_000, b"{}\n"):
        path.write_bytes(damage)
        refused(call(*flags(TOY | settings, "--overwrite", out=tmp_path)), "cannot read", path)
    path.unlink()
    assert torch.equal(vbon.reference_samples(toy[0], toy_args(**settings)), before)
    assert path.read_bytes() == content

    shutil.copytree(models / "reward", tmp_path / "reward")
    file, folder = tmp_path / "reward/model.safetensors", tmp_path / "nan"
    save_file({name: x * NAN for name, x in load_file(file).items()}, file, {"format": "pt"})
    argv = flags(own(models, reward=tmp_path / "reward"), out=tmp_path / "run", samples=folder)
    refused(call(*argv), "--reward", "changes by nan")
    assert not sample_rows(folder)


def test_converted_samples_are_used_but_not_extended(toy, tmp_path):
    samples, task = Path(shutil.copytree(toy[1] / "samples", tmp_path / "samples")), toy[0]
    folder = vbon.samples_folder(task, toy_args(samples=samples))[0]
    rewards = vbon.reference_samples(task, toy_args(samples=samples, M=20))
    for path in folder.glob("*.jsonl"):
        path.unlink()
    write_lines(folder / "shared.jsonl", [
        {"prompt": p, "start": 0, "rewards": row, "responses": [], "tokens": []}
        for p, row in zip(task.prompts, rewards.tolist())])
    edit(folder / "header.json", converted=True)
    before, argv = files(samples), flags(TOY, "--overwrite", samples=samples, out=tmp_path / "run")
    for M in (20, 7):
        found = vbon.reference_samples(task, toy_args(samples=samples, M=M))
        assert torch.equal(found, rewards[:, :M])
    refused(call(*argv, "--M", 21), folder, "--M")
    refused(call("dpo", *argv, "--M", 20, script=bon_baselines), folder, "tokens")
    assert files(samples) == before


def torchrun(patch, *argv, cwd, **environment):
    """Run vbon.py in two processes, after these lines of Python."""
    (cwd / "two.py").write_text(f"import os, sys\nsys.path.insert(0, {str(HERE)!r})\nimport vbon\n"
                                f"{patch}\nsys.exit(vbon.main())")
    return command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "two.py",
                   *argv, cwd=cwd, **environment)


# Save the state of every process after each update. KILL: the process that ends in the third.
WATCHED = """
import torch
update, updates = vbon.update, []
def watched(policy, value_head, *rest):
    updates.append(0)
    if os.environ.get("KILL") == os.environ["RANK"] and len(updates) == 3:
        os.kill(os.getpid(), 9)
    metrics = update(policy, value_head, *rest)
    head = {} if value_head is None else value_head.state_dict(prefix="value_head.")
    torch.save(policy.state_dict() | head, "weights" + os.environ["RANK"])
    return metrics
vbon.update = watched"""


@pytest.mark.parametrize("extras", [{}, dict(prefix_critic=0, token_bias_lr=0, lam=0.95)])
def test_two_processes_train_one_policy(models, extras, tmp_path):
    """With the prefix critic and the token bias. Without them, one process is killed first."""
    argv = flags(own(models, **extras), device="cpu", rollouts=16, episodes=64, lr=1e-3, out="run",
                 save_every=1, sample_batch=10, samples="samples")
    with mock.patch.object(vbon, "WORLD_SIZE", 2):
        refused(call(*argv, "--minibatch", 3), "--rollouts and --minibatch must be multiples of 2")
    if extras:
        killed = torchrun(WATCHED, *argv, cwd=tmp_path, KILL="1")
        assert killed.returncode and not (tmp_path / "run/result.json").exists()
    printed = succeeded(torchrun(WATCHED, *argv, *["--resume"] * bool(extras), cwd=tmp_path)).stdout
    assert printed.count("means over the last") == 1  # only rank 0 prints
    assert ("resumed after" in printed) == bool(extras)
    succeeded(call(*argv, "--samples", tmp_path / "alone", "--out", tmp_path / "one"))
    assert files(tmp_path / "alone") == files(tmp_path / "samples")
    first, second = (torch.load(tmp_path / f"weights{rank}") for rank in (0, 1))
    saved, before = weights(tmp_path / "run"), weights(models / "ref", "model.safetensors")
    assert same(first, second) and same({name: first[name] for name in saved}, saved)
    assert max((saved[name] - before[name]).abs().max() for name in before) > 2e-3
    rows = read_lines(tmp_path / "run/metrics.jsonl")
    assert [row["episode"] for row in rows] == [16, 32, 48, 64]
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert abs(rows[0]["objective/kl_to_ref"]) < 1e-4 < abs(rows[-1]["objective/kl_to_ref"])


def test_resume_refuses_other_weights_behind_ref(models, tmp_path):
    folder = Path(shutil.copytree(models, tmp_path / "models"))
    argv = flags(own(folder), save_every=1, samples=tmp_path / "samples", out=tmp_path / "run")
    stop_before_saving(*argv)
    save_small_models(folder, seed=1)
    refused(call(*argv, "--resume"), "--resume", "other weights behind --ref")
    shutil.rmtree(folder)
    shutil.copytree(models, folder)
    assert "resumed" in succeeded(call(*argv, "--resume")).stdout


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM; .ci/run tests it")
def test_vllm_samples_the_same_distribution(tmp_path):
    """Rewards, lengths and log-probs of the samples of both backends agree in distribution."""
    shared = HERE.parent / "shared"  # real models, because vLLM on a CPU may refuse tiny heads
    if (shared / "imdb-mini").exists():
        models, data = shared / "imdb-mini", shared / "imdb"
    else:
        save_small_models(tmp_path)
        models, data = tmp_path, tmp_path / "prompts.jsonl"
    argv = flags(own(models, dataset=data), rollouts=16, minibatch=16, train_prompts=8, M=128,
                 max_new_tokens=12)
    lm, found, cache = load_lm(models / "ref"), [], dict(VLLM_CPU_KVCACHE_SPACE="1")
    for backend in ("hand", "vllm"):
        paths = flags(backend=backend, samples=tmp_path / backend, out=backend + "-run")
        succeeded(command(HERE / "vbon.py", *argv, *paths, cwd=tmp_path, **cache))
        args = parsed(*argv, *paths)
        task = vbon.setup(args)
        assert read_json(vbon.samples_folder(task, args)[0] / "header.json")["backend"] == backend
        rewards, tokens = vbon.reference_samples(task, args, tokens=True)
        prompts, tokens = [p for p in task.prompts for _ in range(128)], sum(tokens, [])
        log_p = bon_baselines.response_log_probs(lm, task, prompts, tokens, args)[1]
        found.append([rewards.flatten(), doubles([*map(len, tokens)]), log_p])
    for ours, theirs in zip(*found):
        assert len(ours) == len(theirs) == 8 * 128
        assert samples_needed.kolmogorov_smirnov(ours, theirs)[1] > 0.001


# ========== TRL with the README's code ===========================================================


def readme_trainer(replacements):
    """The README's code for TRL, with these names and numbers in place of its own."""
    parts = (HERE / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    (code,) = [code for code in (part.split("```")[0] for part in parts) if "RLOOTrainer" in code]
    for old, new in replacements.items():
        assert old in code, old
        code = code.replace(old, new)
    return code


@pytest.fixture(scope="module")
def exported(imdb_runs, models):
    """Replacements of the README's names, after an export of samples."""
    evaluated("--export", train_samples(imdb_runs), imdb_runs / "theirs.jsonl")
    return {"my-model": str(models / "ref"), "my-classifier": str(models / "reward"),
            '"cuda"': '"cpu"', "theirs.jsonl": str(imdb_runs / "theirs.jsonl"),
            "runs/rloo": str(imdb_runs / "rloo")}


def test_the_reward_for_trl_is_the_objective(exported, monkeypatch):
    """Called as TRL does, with a prompt and its rewards per row. It is "vbon" up to a constant."""
    made = {}
    monkeypatch.setitem(sys.modules, "trl", types.SimpleNamespace(
        RLOOConfig=lambda *_, **settings: made.update(settings),
        RLOOTrainer=lambda *_, **given: made.update(given) or mock.Mock()))
    exec(readme_trainer(exported), {"__name__": "readme"})
    row = made["train_dataset"][0]
    ref_rewards = [row["ref_rewards"], row["ref_rewards"][:3]]  # prompts may differ in M
    rewards = doubles(made["reward_funcs"](
        prompts=[row["prompt"]] * 2, completions=[" good", " bad"], completion_ids=[[1], [2]],
        ref_rewards=ref_rewards, trainer_state=None))
    score, _ = vbon.load_reward(exported["my-classifier"], "cpu")
    scores = doubles(score([row["prompt"]] * 2, [" good", " bad"]))
    log_F = torch.stack([*map(vbon.estimate_log_F, scores, ref_rewards)])
    close(rewards, 15 / 16 * log_F)
    assert made["beta"] == 1 / 16
    constant = torch.full((2,), math.log(16) / 16, dtype=torch.double)
    close(vbon.vbon_reward(log_F, doubles(-40.0), 16) - rewards, constant)


def fill_positions(lm, args, kwargs):
    """A hook for models with learned positions. TRL passes none to them for padded prompts."""
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return args, kwargs


def test_the_readme_trains_with_trl_and_its_advantages_are_ours(exported, monkeypatch):
    """The sums over tokens of vbon.py's rewards, less the mean of the prompt's other three."""
    trl = pytest.importorskip("trl")
    from transformers import AutoTokenizer
    score, _ = vbon.load_reward(exported["my-classifier"], "cpu")
    tokenizer, kls = AutoTokenizer.from_pretrained(exported["my-model"]), []

    @torch.no_grad()
    def our_advantages(policy, ref, rows, theirs):
        tokens, mask = theirs["completion_ids"], theirs["completion_mask"].bool()
        rollout = vbon.Rollout(
            torch.cat([theirs["prompt_ids"], tokens[:, :-1]], 1),
            torch.cat([theirs["prompt_mask"].bool(), mask[:, :-1]], 1), tokens, mask)
        log_pi, log_ref = (vbon.response_log_probs(lm, rollout, 1.0)[0] * mask
                           for lm in (policy, ref))
        kls.append((log_pi - log_ref).sum(1))
        texts = tokenizer.batch_decode(vbon.token_lists(rollout), skip_special_tokens=True)
        scores = torch.tensor(score([row["prompt"] for row in rows], texts))
        log_F = vbon.estimate_log_F(scores, torch.tensor([row["ref_rewards"] for row in rows]))
        rewards = (log_ref - log_pi) / 16
        terminal = vbon.vbon_reward(log_F, log_ref.sum(1), 16)
        rewards[range(len(rows)), mask.sum(1) - 1] += terminal.float()
        returns = vbon.gae(rewards, torch.zeros_like(rewards), mask, lam=1.0)[1][:, 0].view(-1, 4)
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
    steps = {"max_steps=100": "max_steps=3, use_cpu=True, bf16=False, report_to=[]",
             "size=32": "size=8", "length=40": "length=6", "1e-5": "1e-2"}
    exec(readme_trainer(exported | steps), {"__name__": "readme"})
    assert len(kls) == 3 and kls[0].abs().max() < 1e-4 < 0.1 < kls[2].abs().max()


# ========== bon_baselines.py =====================================================================


def test_best_of_n_and_its_expectation_by_brute_force():
    best = bon_baselines.best_of_n(torch.tensor([[1.0, 5.0, 2.0], [3.0, 3.0, 0.0]]))
    assert best.tolist() == [1, 0]
    rewards = doubles([[0.3, -2.0, 0.3, 7.0, 1.0, -0.5, 2.5], [1.0, 1.0, 1.0, 0.0, 0.0, 5.0, -1.0]])
    for N in range(1, 8):
        expected = rewards[:, list(itertools.combinations(range(7), N))].amax(-1).mean(-1)
        close(bon_baselines.expected_best_of_n(rewards, N), expected)
    for N in (0, 8, 2.5):
        with pytest.raises(ValueError, match="from 1 to M"):
            bon_baselines.expected_best_of_n(rewards, N)
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
    for bad in (0, 2.5):
        with pytest.raises(ValueError, match="whole number"):
            bon_baselines.bonbon_beta(bad)
    assert bon_baselines.bonbon_beta(8) == pytest.approx(0.02755, abs=5e-6)
    assert bon_baselines.bonbon_beta(1) == INF
    target = 3 * (1 + 1 / 2 + 1 / 3)  # N = 4
    contrast = sum((x - target) ** 2 for x in h) / 2
    value = bon_baselines.bonbon_loss(best, *others, 4, alpha=0.2).item()
    assert value == pytest.approx(0.2 * 11 + 0.8 * contrast)
    # By default both terms have the same size, and α has no gradient.
    alpha, gradients = contrast / (11 + contrast), []
    assert alpha * 11 == pytest.approx((1 - alpha) * contrast)
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
    task = toy[0]
    args = toy_args("dpo", N=5, samples=toy[1] / "samples", script=bon_baselines)
    rewards, tokens = vbon.reference_samples(task, args, tokens=True)
    reward = {(p, tuple(y)): r for p, row, ys in zip(task.prompts, rewards.tolist(), tokens)
              for r, y in zip(row, ys)}

    def pairs(number, P=4):
        stream = bon_baselines.training_pairs(task.prompts[:P], rewards[:P], tokens[:P], args)
        return list(itertools.islice(stream, number))
    some = pairs(100)
    assert all(reward[p, tuple(y)] > reward[p, tuple(z)] for p, y, z in some)
    assert len({p for p, *_ in some}) == 4
    assert len({tuple(y) for _, *both in pairs(12, 1) for y in both}) <= 6  # 12 pairs of 6
    args.objective = "bonbon"
    gaps = [[reward[p, tuple(y)], reward[p, tuple(z)]] for p, y, z in pairs(2000)]
    for values, sign in zip(zip(*gaps), (1, -1)):  # random groups of N agree with the expectation
        expected = sign * bon_baselines.expected_best_of_n(sign * rewards, 5).mean().item()
        assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / math.sqrt(2000))
    with pytest.raises(vbon.UserError, match="must differ in reward"):
        next(bon_baselines.training_pairs(task.prompts, torch.ones(4, 30), tokens, args))


def test_on_policy_loss(toy, monkeypatch):
    """`bond_loss` of the sampled responses, with their log-probs. Frozen layers change nothing."""
    task, prompts = toy[0], ["the plot was", "the the acting was"] * 8
    policy, anchor = (changed_policy(task, 1, 0.1, seed) for seed in (0, 1))
    trained = [p for p in policy.parameters() if p.requires_grad]
    sampled, found, sample = [], [], bon_baselines.sample
    monkeypatch.setattr(bon_baselines, "sample",
                        lambda *args: sampled.append(sample(*args)) or sampled[-1])
    for K in (1, -1):
        args = toy_args("bond", temperature=0.7, unfrozen_layers=K, gamma=0.5, script=bon_baselines)
        loss, kl = bon_baselines.on_policy_loss(policy, anchor, task, prompts, args, seeded())
        found.append((loss, kl, *torch.autograd.grad(loss, trained)))
    for x, y in zip(*found):
        close(x, y, atol=1e-4, rtol=1e-4)
    (own, texts, rewards), (pairs, _, anchor_rewards) = sampled[-2:]
    assert own.frozen_hidden is None and sampled[0][0].frozen_hidden is not None
    assert rewards.tolist() == [vbon.warmth(y) for y in texts] and len(texts) == 16

    def log_probs(lm, responses):
        return bon_baselines.response_log_probs(lm, task, prompts, responses, args)[0].detach()
    mine, theirs = vbon.token_lists(own), vbon.token_lists(pairs)
    anchor_rewards = anchor_rewards.view(16, 2)
    better = [theirs[2 * i + (r[1] > r[0])] for i, r in enumerate(anchor_rewards)]
    reward = bon_baselines.bond_reward(rewards, anchor_rewards)
    assert 0 < (reward < 0).sum() < 16
    expected = bon_baselines.bond_loss(log_probs(policy, better), log_probs(policy, mine),
                                       log_probs(anchor, mine), reward, gamma=0.5)
    close(found[1][0].detach().double(), expected.double(), atol=1e-3, rtol=1e-4)
    kl = (own.log_probs.sum(1) - log_probs(task.ref, mine)).mean()
    close(found[1][1], kl, atol=1e-4, rtol=1e-4)
    close(log_probs(policy, mine), own.log_probs.sum(1), atol=1e-4, rtol=1e-4)
    log_ref = bon_baselines.response_log_probs(policy, task, prompts, mine, args)[1]
    close(log_ref, log_probs(task.ref, mine), atol=1e-4, rtol=1e-4)


def test_sampled_best_of_n_agrees_with_the_exact_one(toy):
    task, samples = toy[0], toy[1] / "samples"
    args = toy_args("dpo", N=4, M=2000, samples=samples, script=bon_baselines)
    exact = vbon.ExactToy(task, args)
    expected = exact.metrics(exact.log_bon)
    texts, kls = bon_baselines.sample_best(task, vbon.reference_samples(task, args), args, 500, 0)
    for x, name in ((doubles([*map(vbon.warmth, texts)]), "reward"), (doubles(kls), "kl_to_ref")):
        error = 4 * x.view(4, 500).std(1).mean().item() / math.sqrt(2000)
        assert x.mean().item() == pytest.approx(expected["exact/" + name], abs=error)


@pytest.fixture(scope="module")
def baselines(toy):
    """The folder of the toy's runs, with one run of each method added."""
    for method in bon_baselines.METHODS:
        argv = flags(TOY, N=4, episodes=4096, out=toy[1] / method, samples=toy[1] / "samples")
        succeeded(call(method, *argv, script=bon_baselines))
    return toy[1]


@pytest.mark.parametrize("method", bon_baselines.METHODS)
def test_baselines_on_the_toy(baselines, method):
    result, reference = (read_json(baselines / run / "result.json") for run in (method, "one"))
    names = {k for k in reference if "/" not in k or k.startswith("exact/")}
    assert names - {"exact/kl_to_bon_of_optimum"} <= set(result)
    assert result["exact/win_rate"] > 0.6 and result["exact/kl_to_ref"] > 0.1
    assert result["exact/reward"] > 0.7  # the reference model is at 0.2
    assert (baselines / method / "policy/model.safetensors").exists() == (method != "bon")
    if method == "bon":
        assert abs(result["exact/kl_to_bon"]) < 1e-9 and abs(result["exact/win_rate"] - 0.8) < 0.02
        assert result["exact/effective_N"] == pytest.approx(4, rel=0.01)
        assert abs(result["exact/excess_kl"]) < 1e-3
    else:
        assert result["exact/kl_to_bon"] > 0
    if method == "bond":  # it is past Best-of-2: the anchor moves
        assert result["exact/effective_N"] > 2.5 and result["exact/excess_kl"] < 0.2


# ========== evaluate.py ==========================================================================


def evaluated(*argv):
    return succeeded(call(*argv, script=evaluate)).stdout


def log_F_of_best_of_n(M, N, *shape):
    """policy_log_F of simulated ranks of Best-of-N responses, repetitions first."""
    F = torch.rand(shape, dtype=torch.double, generator=seeded()) ** (1 / N)
    k = (torch.rand(M, *shape, generator=seeded(1)) < F).double().sum(0)
    return torch.stack([evaluate.policy_log_F(row, M) for row in k])


def test_policy_log_F_of_best_of_n():
    """N within 5 % and the excess below 0.05, also with few samples."""
    for M, N in itertools.product((32, 200), (1, 4, 16)):
        mean = log_F_of_best_of_n(M, N, 10, 2000).mean().item()
        assert vbon.effective_N(mean) == pytest.approx(N, rel=0.05)
        assert vbon.excess_kl(vbon.bon_kl(N), mean) == pytest.approx(0, abs=0.05)
    # Standard errors are right. Without the stretch they would be 0.68 of the truth.
    log_F = log_F_of_best_of_n(32, 16, 200, 500)
    errors = log_F.std(1) / math.sqrt(500)
    assert errors.mean().item() == pytest.approx(log_F.mean(1).std().item(), rel=0.15)
    for k in (0.0, 32.0):  # finite where all ranks are extreme
        log_F = evaluate.policy_log_F(torch.full((8,), k, dtype=torch.double), 32).mean().item()
        assert 0.05 < vbon.effective_N(log_F) < 400
    k = 30 * torch.rand(500, 2, dtype=torch.double, generator=seeded())
    means = {k: x.mean().item() for k, x in
             evaluate.bon_metrics(torch.full((500, 2), 0.7), k, 32, 16).items()}
    log_F = means["log_f"]
    assert means["effective_N"] == pytest.approx(vbon.effective_N(log_F))
    assert means["excess_kl"] == pytest.approx(vbon.excess_kl(0.7, log_F))
    assert means["kl_to_bon"] == pytest.approx(vbon.kl_to_bon(0.7, log_F, 16))


def test_the_test_of_a_policy_agrees_with_the_exact_metrics(toy):
    args = toy_args(M=5000, samples=toy[1] / "samples")
    task = vbon.Task(**vars(toy[0]) | dict(prompts=toy[0].prompts * 250))
    policy, exact = changed_policy(task), vbon.ExactToy(toy[0], args)
    responses, kls = evaluate.sample_policy(policy, task, args, 2, 0)
    ref_rewards = vbon.reference_samples(task, args)
    found, rows = evaluate.measure(task, responses, kls, ref_rewards, args.N)
    log_pi = exact.log_probs(policy)
    expected = exact.metrics(log_pi)
    for name in evaluate.METRICS:
        assert found[name] == pytest.approx(expected["exact/" + name], abs=4 * found[name + "_se"])
    assert [row["reward"] for row in rows] == [vbon.warmth(y) for y in responses]
    log_ratio = {(p, y): r for p, row in zip(toy[0].prompts, log_pi - exact.log_ref)
                 for y, r in zip(exact.responses, row.tolist())}
    plain = np.array([log_ratio[row["prompt"], row["response"].strip()] for row in rows])
    error = plain.std() / math.sqrt(2000)
    assert expected["exact/kl_to_ref"] == pytest.approx(plain.mean(), abs=4 * error)
    assert found["kl_to_ref_se"] < 0.8 * error  # the sum over the vocabulary has a lower variance


def test_table_csv_and_figures_of_the_toy(baselines, tmp_path):
    points = [(1, 2), (2, 2), (2, 3), (3, 3), (1, 2), (0, 0)]
    assert evaluate.pareto_front(points) == [True, False, True, False, True, True]
    runs = [{"method": m, "result": {"kl_to_ref": x, "win_rate": y}} for m, x, y in (
        ("vBoN", 1, 0.8), ("vBoN", 2, 0.9), ("PPO", 1.5, 0.7), ("PPO", 0.5, 0.6), ("BoN", 0.1, 1))]
    assert evaluate.front_shares(runs, "win_rate") == {"vBoN": 2 / 3, "PPO": 1 / 3}

    runs = [baselines / name for name in ("one", "three")]
    table = evaluated(*runs, "--csv", tmp_path / "toy.csv")
    results = [read_json(run / "result.json")["exact/kl_to_bon"] for run in runs]
    assert f"{np.mean(results):.3f} ± {np.std(results, ddof=1) / math.sqrt(2):.3f}" in table
    assert "N = 16, closed forms" in table
    rows = read_csv(tmp_path / "toy.csv")
    assert [float(row["exact/kl_to_bon"]) for row in rows] == results
    assert [row["run"] for row in rows] == [str(run) for run in runs] and rows[0]["N"] == "16"
    methods = [baselines / method for method in bon_baselines.METHODS]
    table = evaluated(*runs, *methods, "--figures", tmp_path)
    names = "vBoN, N = 16/BoN-SFT, N = 4/DPO, β = 0.1/BoNBoN, N = 4/BOND, steps = 64/Pareto front"
    assert all(name in table for name in names.split("/"))

    metrics = [{"episode": e, "objective/kl_to_bon": float(e)} for e in range(1, 65)]
    smoothed = curves.curve({"metrics": metrics}, "kl_to_bon")
    assert len(smoothed) == 61 and smoothed[4] == 2.5 and smoothed[64] == 62.5
    metrics[9]["exact/kl_to_bon"] = 0.5
    assert curves.curve({"metrics": metrics}, "kl_to_bon") == {10: 0.5}
    for more in ([], ["--against", "seconds_sampling"]):
        succeeded(call(*runs, *more, "--figures", tmp_path, script=curves))
    for name in ("toy.png", "toy-pareto.png", "toy-excess.png", "toy-M.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


METHODS = ("vbon", *bon_baselines.METHODS)


@pytest.fixture(scope="module")
def imdb_runs(models, tmp_path_factory):
    """A folder with samples/ and a small imdb run of each method."""
    folder = tmp_path_factory.mktemp("imdb")
    for method in METHODS:
        argv = flags(own(models), samples=folder / "samples", out=folder / method)
        baseline = method in bon_baselines.METHODS
        succeeded(call(*[method] * baseline, *argv, script=bon_baselines if baseline else vbon))
    return folder


def train_samples(folder, split="train"):
    """The only folder of samples of this split."""
    (path,) = [path.parent for path in Path(folder).rglob("header.json")
               if read_json(path)["split"] == split]
    return path


def copied_runs(imdb_runs, names, samples):
    for name in names:
        shutil.copytree(imdb_runs / name, name)
        edit(Path(name, "config.json"), samples=samples)


def test_evaluation_of_all_methods(imdb_runs, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copied_runs(imdb_runs, METHODS, "samples")
    argv = [*METHODS, *TESTED, "--responses", 1, "--csv", "all.csv", "--figures", "figures"]
    table = evaluated(*argv)
    assert all(name in table for name in ("vBoN, N = 2", "BoN, N = 2", "BOND", "Film number"))
    rows = {row["objective"]: row for row in read_csv("all.csv")}
    assert len(rows) == 6 and 0 < float(rows["bon"]["bon/expected_reward"]) < 1
    for row in rows.values():
        reward, win_rate, kl, log_F, kl_to_bon = (
            float(row[name]) for name in ("reward", "win_rate", "kl_to_ref", "log_f", "kl_to_bon"))
        assert 0 < reward < 1 and 0 <= win_rate <= 1
        assert kl_to_bon == pytest.approx(vbon.kl_to_bon(kl, log_F, 2))
    assert len(sample_rows(train_samples("samples", "test"))) == 2  # a tenth of the prompts
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


def test_other_temperatures_and_another_reward(imdb_runs, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_small_models(tmp_path / "second", seed=5)
    second = tmp_path / "second/reward"
    copied_runs(imdb_runs, ["bon", "dpo"], "samples")
    evaluated("dpo", "bon", *TESTED, "--csv", "own.csv")
    out = evaluated("dpo", "bon", *TESTED, "--temperatures", 1, 0.5, "--reward", second,
                    "--csv", "second.csv")
    assert "T = 0.5" in out and "evaluator reward" in out
    one, two = ({(row["run"], row["temperature"]): row for row in read_csv(name)}["dpo", "1.0"]
                for name in ("own.csv", "second.csv"))
    assert one["reward"] != two["reward"]  # of the same responses
    assert float(one["kl_to_ref"]) == pytest.approx(float(two["kl_to_ref"]), rel=1e-4)
    # The second reward model scored cached samples. They are the same if sampled again.
    before = {path.name: sample_rows(path) for path in Path("samples").iterdir()}
    shutil.rmtree("samples")
    argv = flags(own(models, reward=second), samples="samples", out="by-second")
    succeeded(call("bon", *argv, script=bon_baselines))
    evaluated("by-second", *TESTED)
    (folder,) = Path("samples").iterdir()
    for a, b in zip(before[folder.name], sample_rows(folder), strict=True):
        close(doubles(a.pop("rewards")), doubles(b.pop("rewards")), atol=1e-6)
        assert a == b


def test_export_and_what_evaluate_refuses(baselines, imdb_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "6 prompts" in evaluated("--export", train_samples(imdb_runs), "theirs.jsonl")
    expected = [{k: row[k] for k in ("prompt", "responses", "rewards")}
                for row in sample_rows(train_samples(imdb_runs))]
    assert read_lines("theirs.jsonl") == expected and len(expected) == 6
    Path("run").mkdir()
    one, imdb = baselines / "one", imdb_runs / "bon"
    copied, before = shutil.copytree(one, "copied"), files(imdb)
    for argv, word in (
            (["run"], "finished run"), ([one, imdb], "one task"), ([], "finished run"),
            ([imdb, "--reward", "no/such"], "--reward"), ([one, "--reward", "x"], "toy"),
            ([one, copied], "different seeds"), ([imdb, "--responses", "-1"], "--responses"),
            ([one, "--csv", "run"], "folder"), ([imdb, "--temperatures", "hot"], "--temperatures"),
            (["--nonsense"], "--nonsense"), ([imdb, "--temperatures", "-1"], "--temperatures"),
            ([imdb, "--test-M", "0"], "--test-M"), (["--export", "none", "x"], "none")):
        refused(call(*argv, script=evaluate), word)
    for argv in ([imdb, "--temperatures", "1"], [one, "--against", "task"]):
        refused(call(*argv, script=curves), "--against")
    assert files(imdb) == before


# ========== results/: log F shared between prompts, samples needed, one token ahead ==============


def mixtures(weights, means, spreads, seed, T=2000):
    """T samples of each of P mixtures of normals, (P, T): weights, means, spreads (P, C)."""
    part = torch.multinomial(weights, T, replacement=True, generator=seeded(seed))
    return means.gather(1, part) + spreads.gather(1, part) * normals(len(part), T, seed=seed + 1)


def reward_distributions(P=48):
    """{name: (P, T) rewards of a prompt each}, where sharing could do harm."""
    one, place = torch.ones(P, 1, dtype=torch.double), normals(P, 4)
    first, alike = place[:, :1], mixtures(one, place[:, :1], one, 6)
    unrelated = mixtures(normals(P, 4, seed=1).exp(), 3 * place,
                         0.5 * (0.7 * normals(P, 4, seed=2)).exp(), 3)
    needles = mixtures(doubles([[0.98, 0.02]]).expand(P, 2), torch.cat([first, 4 + 2 * first], 1),
                       doubles([[1, 0.3]]).expand(P, 2), 5)
    tails = normals(P, 2000, seed=7) / normals(P, 2000, seed=8).abs()
    heavy = 3 * first + place[:, 1:2].exp() * tails
    return {"unrelated": unrelated, "needles": needles, "alike": alike, "ties": alike.round(),
            "heavy tails": heavy}


@pytest.mark.parametrize("case", reward_distributions(2))
def test_sharing_does_no_harm(case):
    """With M from 8 to 1000 samples per prompt the floor is at most 1.1 times that of ranks. It is
    far below where the prompts have one shape."""
    rewards = reward_distributions()[case].sort(1).values
    P, T = rewards.shape
    truth = sharing.by_ranks(rewards, rewards)
    for M in (8, 32, 200, 1000):
        samples = rewards.gather(1, torch.randint(T, (P, M), generator=seeded(M)))
        log_F, prompt = sharing.shared_log_F([*samples]), torch.arange(P).repeat_interleave(T)
        by_ranks, by_all = sharing.by_ranks(rewards, samples), log_F(rewards.flatten(), prompt)
        for N in (4, 16, 64):
            of_ranks, of_all = (sharing.floor(log_F, truth, N).mean().item()
                                for log_F in (by_ranks, by_all.view(P, T)))
            assert of_all <= 1.1 * of_ranks, (M, N, of_all, of_ranks)
            if case == "alike" and M < 1000:
                assert of_all < 0.6 * of_ranks, (M, N, of_all, of_ranks)


def test_shared_log_F_of_normal_prompts_is_exact():
    """For prompts with 64, 2 and 0 samples, of which a feature gives the mean, F̂ is the CDF of the
    normal distribution. location_scale shrinks as the normal model says."""
    P, M = 400, 64
    mean, noise = normals(P, 1), normals(P, M, seed=1)
    samples = [*(mean + noise)]
    samples[7], samples[8] = samples[7][:0], samples[8][:2]
    grid = torch.linspace(-1.5, 2.5, 9, dtype=torch.double)
    log_F = sharing.shared_log_F(samples, mean)
    for prompt in (7, 8, 9):
        found = log_F(mean[prompt] + grid, torch.full((9,), prompt))
        close(found.exp(), torch.special.ndtr(grid), atol=0.05, rtol=0)
    z, prompt = (0.5 * mean + noise).flatten(), torch.arange(P).repeat_interleave(M)
    found_M, mu, sigma, e = sharing.location_scale(z, prompt, torch.ones(P, 1).double())
    average, weight = z.view(P, M).mean(1), 0.25 / (0.25 + 1 / M)
    assert (found_M == M).all() and len(e) == P * M and e.square().mean() == pytest.approx(1)
    close(mu, average.mean() + weight * (average - average.mean()), atol=0.03, rtol=0)
    assert sigma.mean() == pytest.approx(math.sqrt(1 + weight / M), abs=0.02) and sigma.std() < 0.08


def test_shared_log_F_is_finite_monotone_and_depends_on_ranks_only():
    generator = seeded()
    samples = [torch.randn(M, generator=generator, dtype=torch.double) + i
               for i, M in enumerate([0, 1, 2, 5, 40, 0, 7, 3])]
    ties, features = [r.round() for r in samples], torch.randn(8, 2, generator=generator)
    for ref in (samples, ties, samples[:2], [r[:1] for r in samples], [doubles([0.0] * 5)] * 3):
        for x in (None, features[:len(ref)], torch.ones(len(ref), 1)):
            log_F, mapped = (sharing.shared_log_F(r, x) for r in (ref, [r.exp() for r in ref]))
            for i in range(len(ref)):
                grid = torch.cat([torch.linspace(-5, 12, 500).double(), *ref]).sort().values
                found = log_F(grid, torch.full(grid.shape, i))
                assert found.dtype == torch.double and found.isfinite().all() and (found < 0).all()
                assert (found.diff() >= 0).all()
                assert torch.equal(found, mapped(grid.exp(), torch.full(grid.shape, i)))
    first = torch.zeros(len(grid)).long()
    one, two = (sharing.shared_log_F(samples, x) for x in (features, features.double() ** 3))
    close(one(grid, first), two(grid, first))
    nan = doubles([NAN])
    for bad, x in (([torch.empty(0)] * 2, None), ([nan], None), (samples, features * NAN)):
        with pytest.raises(ValueError, match="sample of at least one prompt"):
            sharing.shared_log_F(bad, x)


def test_conversion_of_a_samples_folder(imdb_runs, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = normals(30, 1)
    samples = [place[i] + normals(40, seed=i + 1) if i % 3 else torch.empty(0).double()
               for i in range(30)]
    found = sharing.shared_quantiles(samples, place, 1000)
    log_F, grid = sharing.shared_log_F(samples, place), torch.linspace(-2, 4, 100).double()
    assert found.shape == (30, 1000) and (found.diff(dim=1) >= 0).all()
    for i in (0, 1, 29):  # of which 0 has no sample
        expected = log_F(grid, torch.full(grid.shape, i)).exp()
        close(vbon.estimate_log_F(grid, found[i]).exp(), expected, atol=0.004, rtol=0)

    source, before = train_samples(imdb_runs), files(imdb_runs)
    convert = ["convert", source, "shared", "--M", 4, "--reward", models / "reward"]
    succeeded(call(*convert, script=sharing))
    (target,) = Path("shared").iterdir()
    rows = sample_rows(target)
    assert target.name == source.name and read_json(target / "header.json")["converted"]
    ref_rewards = [doubles(row["rewards"][:4]) for row in sample_rows(source)]
    score, _ = vbon.load_reward(str(models / "reward"), "cpu")
    bare = doubles(score([row["prompt"] for row in rows], [""] * 6)).unsqueeze(1)
    for row, quantiles in zip(rows, sharing.shared_quantiles(ref_rewards, bare), strict=True):
        assert sorted(row["rewards"]) == quantiles.tolist() != row["rewards"]
    train = flags(own(models), M=200, samples="shared")
    assert "to generate" not in succeeded(call(*train, "--out", "run")).stdout
    for argv, word in ((["convert", target, "again"], "sampled"), (["sell"], "convert"),
                       (["convert", source, source.parent], "new or converted"),
                       (["convert", "none", "again"], "none")):
        refused(call(*argv, script=sharing), word)
    succeeded(call(*convert, script=sharing))  # converting again replaces the rewards
    assert sample_rows(target) == rows and files(imdb_runs) == before


def test_study_of_shared_log_F(models, tmp_path, monkeypatch):
    samples, few = normals(40, 1000).sort(1).values, normals(40, 32, seed=1)
    for N in (16, 64):  # the noise of the truth is what M = 1000 samples would cost
        noise = sharing.noise(samples, N, 10).mean()
        assert noise == pytest.approx((N - 1) / 4000, rel=0.1)
    found = sharing.by_ranks(samples, few)
    close(found[3], vbon.estimate_log_F(samples[3], few[3]))
    floor = sharing.floor(found, torch.special.log_ndtr(samples), 16).mean()
    assert floor == pytest.approx(15 / 128, rel=0.3)
    monkeypatch.setattr(sharing, "HERE", tmp_path / "results")
    monkeypatch.setattr(sharing, "REPETITIONS", 1)
    (tmp_path / "results").mkdir()
    argv = ["study", *flags(own(models, train_prompts=16), samples=tmp_path / "samples", test_M=260,
                            second_reward=models / "reward")]
    out = succeeded(call(*argv, script=sharing)).stdout
    assert out.count("shared, bare prompt: about") == 1
    assert (tmp_path / "figures/shared.png").read_bytes()[:4] == b"\x89PNG"
    rows = read_csv(tmp_path / "results/shared.csv")
    assert len(rows) == 3 * (3 * 5 + 1) * 4 and all(math.isfinite(float(row["kl"])) for row in rows)
    refused(call(*argv, "--test-M", "100", script=sharing), "--test-M")


def test_samples_needed(toy, tmp_path):
    test, a = samples_needed.kolmogorov_smirnov, torch.arange(100.0)
    generator, rejected = seeded(), 0
    assert test(a, a) == (0, 1)
    D, p = test(a, a + 1000)
    assert D == 1 and p < 1e-20
    for _ in range(400):  # two samples of one distribution differ in about 5 % of cases
        rejected += test(*(torch.rand(n, generator=generator) for n in (100, 200)))[1] < 0.05
    assert 6 <= rejected <= 34
    assert test(torch.arange(4.0), torch.tensor([1.5, 2.5]))[0] == pytest.approx(0.5)

    vbon.reference_samples(toy[0], toy_args(samples=tmp_path / "samples", M=600))
    argv = [*(tmp_path / "samples").iterdir(), tmp_path]
    out = succeeded(call(*argv, script=samples_needed)).stdout
    assert "4 prompts" in out and (tmp_path / "log_F.png").read_bytes()[:4] == b"\x89PNG"
    rows = [line.split() for line in out.splitlines() if line.split()[0].isdigit() and "%" in line]
    means = [float(row[-1]) for row in rows]
    assert len(means) == 6 and means[0] > means[-1]
    for argv, word in (([tmp_path], "600 samples"), (["none"], "600 samples"), ([], "samples")):
        refused(call(*argv, script=samples_needed), word)


def test_the_ceiling_looks_one_token_ahead(models, tmp_path, monkeypatch):
    u = normals(20_000)
    y = torch.exp(0.5 * u - 1) * -torch.log(torch.rand(len(u), generator=seeded()).double())
    close(ceiling.fit_log_Z(u, y), doubles([-1, 0.5, 0, 0]), atol=0.06)  # E[y | u] = exp(u/2 − 1)
    argv = flags(own(models, N=4, M=8), samples=tmp_path / "samples", out=tmp_path / "run",
                 test_prompts=4, test_M=4)
    for candidates in (1, 8):  # with one there is no choice: this is π_ref
        monkeypatch.setattr(ceiling, "CANDIDATES", candidates)
        *_, last = succeeded(call(*argv, script=ceiling)).stdout.splitlines()
        kl = float(last.split(" ± ")[2].split()[-1])
        assert (kl > 0) == (candidates > 1) and kl >= 0
    assert not (tmp_path / "run").exists()
