"""Tests of vbon.py, bon_baselines.py and evaluate.py:  python -m pytest test_vbon.py

The mathematics is held against brute force, 50-digit arithmetic and simulation; the training code against the
library's forward passes and hand-worked cases; the command line as a user would call it, offline, on small
models made here.
"""
import contextlib
import csv
import importlib.util
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
import time
import types
import unittest.mock
from dataclasses import fields, replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported: a test must not wait for a hub

import mpmath
import numpy as np
import pytest
import torch

import bon_baselines
import evaluate
import vbon
from results import ceiling
from results import log_F as table_1
from results import shared as floors

HERE = Path(__file__).resolve().parent


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def doubles(*rows):
    """Tensors of float64."""
    tensors = [torch.tensor(row, dtype=torch.double) for row in rows]
    return tensors if len(tensors) > 1 else tensors[0]


def close(a, b, atol=1e-12, rtol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def random_world(S, seed, concentration=1.0):
    """p (S,) sorted by ascending reward, F (S,) its strict CDF."""
    p = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(S, concentration)))
    return p, (p.cumsum(0) - p).clamp(min=0)


# --- the PMF ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 2, 3, 5])
def test_pmf_is_the_frequency_of_all_N_tuples(N):
    p, F = random_world(5, N)
    expected = torch.zeros(5, dtype=torch.double)
    for draws in itertools.product(range(5), repeat=N):
        expected[max(draws)] += math.prod(p[i].item() for i in draws)
    close(vbon.log_bon_pmf(F.log(), p.log(), N).exp(), expected)


def exact_log_pmf(log_F, log_p, N):
    with mpmath.workdps(60):
        F = mpmath.exp(mpmath.mpf(log_F)) if log_F > -math.inf else mpmath.mpf(0)
        p, N = mpmath.exp(mpmath.mpf(log_p)), mpmath.mpf(N)
        if F == 0:
            return N * mpmath.mpf(log_p)
        return N * mpmath.log(F + p) + mpmath.log(-mpmath.expm1(N * mpmath.log1p(-p / (F + p))))


def pmf_cases():
    rng = np.random.default_rng(0)
    for N in (1, 1.5, 2, 16, 1000, 1e6):
        for log_p in (0.0, -1e-9, -0.5, -30.0, -599.0, -601.0, -800.0, -1e4):
            for log_F in (-math.inf, -1e4, -750.0, -7.0, -0.6931, -1e-3, -1e-12, 0.0):
                yield log_F, log_p, N
    for _ in range(1500):  # F + p near 1, where N log(F+p) is a large number times a small one
        F = rng.uniform(0.001, 0.999)
        p = (1 - F) * (1 - rng.random() * 10.0 ** rng.uniform(-9, 0))
        yield math.log(F), math.log(p), float(10 ** rng.uniform(0, 6))


def test_pmf_agrees_with_50_digit_arithmetic():
    for case in pmf_cases():
        value, expected = vbon.log_bon_pmf(*doubles(*case)).item(), exact_log_pmf(*case)
        assert abs(value - expected) <= 1e-10 * max(1, abs(expected)), (case, value, float(expected))


def test_pmf_gradients_are_right_and_finite_where_the_value_is():
    for log_F, log_p, N in itertools.islice(pmf_cases(), 0, 384):
        x = doubles([log_F, log_p]).requires_grad_()
        value = vbon.log_bon_pmf(x[0], x[1], N)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all(), (log_F, log_p, N, x.grad)
    inputs = [x.requires_grad_() for x in doubles([-1.2, -0.3, -5.0], [-0.9, -2.0, -3.0])]
    assert torch.autograd.gradcheck(lambda a, b: vbon.log_bon_pmf(a, b, 7.5), inputs)


def test_pmf_has_no_nan_broadcasts_and_keeps_its_dtype():
    inf = math.inf
    log_F, log_p = torch.tensor([[-inf, -inf, -1.0, 0.0], [-inf, 0.0, -inf, -inf]])
    values = vbon.log_bon_pmf(log_F, log_p, 16)
    assert values.tolist() == [-inf, 0.0, -inf, -inf] and values.dtype == torch.float32
    N = torch.tensor([1.0, 2.0, 3.0])
    assert vbon.log_bon_pmf(torch.zeros(2, 1).double(), torch.zeros(3), N).shape == (2, 3)
    whole, real = vbon.log_bon_pmf(-1, -2, 3).item(), vbon.log_bon_pmf(-1.0, -2.0, 3.0).item()
    assert whole == real == pytest.approx(float(exact_log_pmf(-1, -2, 3)))
    for dtype, digits in ((torch.half, 2e-3), (torch.bfloat16, 2e-2)):  # no overflow, no log p lost
        log_F, log_p = (x.to(dtype) for x in doubles([-1e-3, -0.5, -7.0], [-180.0, -60.0, -11.0]))
        values = vbon.log_bon_pmf(log_F, log_p, 16)
        close(values.double(), vbon.log_bon_pmf(log_F.double(), log_p.double(), 16), rtol=digits)
        assert values.dtype == dtype


@pytest.mark.parametrize("N", [1, 2, 16, 512.5])
@pytest.mark.parametrize("tied", [False, True])
def test_pmf_sums_to_one_with_and_without_ties(N, tied):
    p, _ = random_world(200, 1, 0.3)
    rewards = torch.randint(0, 8, (200,)).double() if tied else torch.randn(200).double()
    order = sorted(range(200), key=lambda i: (rewards[i].item(), i))
    F = torch.empty(200, dtype=torch.double)
    F[order] = p[order].cumsum(0) - p[order]
    log_pmf = vbon.log_bon_pmf(F.clamp(min=0).log(), p.log(), N)
    assert abs(log_pmf.exp().sum().item() - 1) < 1e-12
    if N == 1:
        close(log_pmf, p.log())


def test_closed_forms_of_kl_and_win_rate():
    S, N = 100_000, 16
    p = torch.full((S,), 1 / S, dtype=torch.double)
    F = torch.arange(S).double() / S
    log_bon = vbon.log_bon_pmf(F.log(), p.log(), N)
    assert (log_bon.exp() * (log_bon - p.log())).sum().item() == pytest.approx(vbon.bon_kl(N), abs=1e-3)
    assert (log_bon.exp() * (F + p / 2)).sum().item() == pytest.approx(vbon.bon_win_rate(N), abs=1e-4)
    p, F = random_world(20, 5)  # with responses that have mass the KL is an upper bound
    log_bon = vbon.log_bon_pmf(F.log(), p.log(), N)
    assert (log_bon.exp() * (log_bon - p.log())).sum().item() < vbon.bon_kl(N)


def test_effective_N_and_excess():
    for N in (1, 2.5, 16, 512):
        assert vbon.effective_N(-1 / N) == pytest.approx(N)
        assert vbon.excess_kl(vbon.bon_kl(N), -1 / N) == pytest.approx(0, abs=1e-12)
    # No other Best-of-N is nearer than the effective one.
    def distance(N):
        return 3 - math.log(N) + (N - 1) * 0.25
    assert vbon.excess_kl(3, -0.25) == pytest.approx(min(distance(N / 100) for N in range(100, 2000)))


def test_ranks_count_ties_half():
    k = vbon.ranks(doubles([[2.0, 0.0, 9.0]]), doubles([[3.0, 2.0, 2.0, 1.0]]))
    assert k.tolist() == [[2.0, 0.0, 4.0]]


def test_policy_log_F_reads_best_of_n_from_few_samples():
    """N within 5 % and excess below 0.05, at M = 32 and 200."""
    for M, N in itertools.product((32, 200), (1, 4, 16)):
        F = torch.rand(50, 2000, dtype=torch.double, generator=seeded()) ** (1 / N)
        k = (torch.rand(M, 50, 2000, generator=seeded(1)) < F).double().sum(0)
        every = torch.stack([vbon.policy_log_F(row, M) for row in k])
        mean = every.mean().item()
        assert vbon.effective_N(mean) == pytest.approx(N, rel=0.05)
        assert vbon.excess_kl(vbon.bon_kl(N), mean) == pytest.approx(0, abs=0.05)


def test_standard_errors_of_policy_log_F_are_true():
    """400 estimates from 500 responses each, M = 32: without the stretch they would be 0.68 of the truth."""
    F = torch.rand(400, 500, dtype=torch.double, generator=seeded()) ** (1 / 16)
    k = (torch.rand(32, 400, 500, generator=seeded(1)) < F).double().sum(0)
    every = torch.stack([vbon.policy_log_F(row, 32) for row in k])
    errors = every.std(1) / math.sqrt(500)
    assert errors.mean().item() == pytest.approx(every.mean(1).std().item(), rel=0.15)


def test_policy_log_F_is_finite_where_the_samples_tell_nothing():
    for k in (0.0, 32.0):
        log_F = vbon.policy_log_F(torch.full((8,), k, dtype=torch.double), 32).mean().item()
        assert 0.05 < vbon.effective_N(log_F) < 400


def test_distance_to_bon_has_the_metrics_as_its_means():
    k, kls = 30 * torch.rand(500, 2, dtype=torch.double, generator=seeded()), torch.full((500, 2), 0.7)
    of = vbon.distance_to_bon(kls, k, 32, 16)
    log_f = of["log_f"].mean().item()
    assert of["effective_N"].mean().item() == pytest.approx(vbon.effective_N(log_f))
    assert of["excess_kl"].mean().item() == pytest.approx(vbon.excess_kl(0.7, log_f))
    assert of["kl_to_bon"].mean().item() == pytest.approx(vbon.kl_to_bon(0.7, log_f, 16))


def test_objectives_are_ordered_and_their_rewards_are_the_objectives():
    """J ≥ L ≥ L1 (Thm. 2–4), each both from its definition and as E[reward] − KL/N times N."""
    for seed in range(20):
        p, F = random_world(30, seed)
        F = F.clamp(min=1e-9)  # log F = −inf makes every bound −inf
        pi, _ = random_world(30, 100 + seed)
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


@pytest.mark.parametrize("N", [1, 2, 16, 512])
def test_unlikely_responses_need_no_log_p(N):
    """There vbon is bound and the constant log(N)/N."""
    log_F, log_p = doubles([-2.0, -0.7, -1e-3, 0.0]), doubles([[-30.1], [-40.0], [-200.0], [-1000.0]])
    difference = vbon.vbon_reward(log_F, log_p, N) - vbon.vbon_reward(log_F, 0, N, "bound")
    close(difference, torch.full((4, 4), math.log(N) / N, dtype=torch.double), rtol=0)


def test_rewards_vanish_at_N_1_and_there_is_none_below():
    log_F, log_p = doubles([-math.inf, -1.0], [-3.0, -2.0])
    for objective in ("vbon", "bound", "bound1"):
        close(vbon.vbon_reward(log_F, log_p, 1, objective), torch.zeros(2).double())
        for N in (0.5, -3, torch.tensor([2.0, 0.99])):
            with pytest.raises(ValueError, match="at least 1"):
                vbon.vbon_reward(log_F, log_p, N, objective)
    with pytest.raises(ValueError, match="bound1"):
        vbon.vbon_reward(log_F, log_p, 2, "rlhf")


@pytest.mark.parametrize("objective", vbon.OBJECTIVES)
def test_terminal_rewards_tell_responses_apart(objective):
    """Also after the clip, for log-probabilities as long responses have them."""
    scores, log_F, log_p = doubles([0.2, 0.5, 0.9], [-2.0, -1.0, -0.1], [-180.0] * 3)
    rewards = vbon.terminal_reward(scores, log_F, log_p, vbon.Args(objective=objective, out="unused"))
    assert rewards[0] < rewards[1] < rewards[2]


# --- log F --------------------------------------------------------------------------------------------------


def test_estimators_on_counts_done_by_hand():
    ref = torch.tensor([[1.0, 2.0, 2.0, 5.0]] * 4)
    rewards = torch.tensor([0.0, 2.0, 3.0, 9.0])  # k = 0, 1, 3, 4
    close(vbon.estimate_log_F(rewards, ref, "log_mean").exp(), doubles([0, 0.25, 0.75, 1]))
    close(vbon.estimate_log_F(rewards, ref).exp(), doubles([1, 2, 4, 5]) / 5)
    H = list(itertools.accumulate([0, 1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]))  # ψ(k+1) − ψ(M+2) = H_k − H_{M+1}
    expected = doubles([H[k] - H[5] for k in (0, 1, 3, 4)])
    close(vbon.estimate_log_F(rewards, ref, "posterior"), expected)
    close(vbon.estimate_log_F(rewards, ref[0], "posterior"), expected)  # one prompt for all


def test_a_tie_is_no_win_whatever_the_types():
    ref = doubles([0.1, 0.1, 0.3, 0.9])
    for rewards in ([0.1, 0.7], np.array([0.1, 0.7]), doubles([0.1, 0.7])):
        for rows in (ref, ref.tolist(), ref.expand(2, 4)):
            close(vbon.estimate_log_F(rewards, rows, "log_mean").exp(), doubles([0, 0.75]))


def test_ties_are_broken_by_ranks_of_reward_and_order():
    """A total order (App. C): the ranks of (reward, order) stand for the rewards of a prompt's responses."""
    rng = random.Random(0)
    ref = [(rng.randrange(4), rng.randrange(50)) for _ in range(30)]
    ours = [(rng.randrange(4), rng.randrange(50)) for _ in range(20)]
    rank = {pair: i for i, pair in enumerate(sorted(set(ref + ours)))}
    log_F = vbon.estimate_log_F([rank[pair] for pair in ours], [rank[pair] for pair in ref], "log_mean")
    close(log_F.exp(), doubles([sum(other < pair for other in ref) / 30 for pair in ours]))
    assert not torch.equal(log_F, vbon.estimate_log_F([r for r, _ in ours], [r for r, _ in ref], "log_mean"))


@pytest.mark.parametrize("estimator", vbon.ESTIMATORS)
def test_only_ranks_matter(estimator):
    rewards, ref = torch.randn(50, dtype=torch.double), torch.randn(50, 40, dtype=torch.double)
    ref[:, 0] = rewards
    before = vbon.estimate_log_F(rewards, ref, estimator)
    for increasing in (torch.exp, lambda r: 3 * r - 7, lambda r: r ** 3, torch.atan):
        assert torch.equal(vbon.estimate_log_F(increasing(rewards), increasing(ref), estimator), before)


def test_estimators_refuse_what_has_no_rank():
    for rewards, ref, estimator in (([math.nan], [1.0], "add_one"), ([1.0], [math.nan], "add_one"),
                                    ([1.0], [], "add_one"), ([1.0], [1.0], "median")):
        with pytest.raises(ValueError):
            vbon.estimate_log_F(rewards, ref, estimator)


def test_estimators_bias():
    """y ~ π_ref, so that F is uniform; and at a fixed F, where Jensen pushes the log of the mean down."""
    generator = seeded()
    M, n = 20, 200_000
    F, ref = torch.rand(n, generator=generator).double(), torch.rand(n, M, generator=generator).double()
    error = vbon.estimate_log_F(F, ref, "posterior") - F.log()
    tolerance = 4 * error.std().item() / math.sqrt(n)
    assert abs(error.mean().item()) < tolerance
    bias = (vbon.estimate_log_F(F, ref, "add_one") - F.log()).mean().item()
    exact = sum(math.log((k + 1) / (M + 1)) for k in range(M + 1)) / (M + 1) + 1  # k is uniform on 0 … M
    assert bias == pytest.approx(exact, abs=tolerance) and bias > 0.02
    half = vbon.estimate_log_F(torch.full((n,), 0.5), ref, "log_mean").mean().item()
    assert half - math.log(0.5) == pytest.approx(-1 / (2 * M), abs=0.005)  # delta method: −(1−F)/(2FM)


@pytest.mark.parametrize("N, M", [(16, 200), (64, 600)])
def test_floor_of_kl_with_M_samples(N, M):
    """The exact optimum of the estimated objective lies (N−1)/(4M) nats from BoN (u = F uniform).

    Between order statistics F̂ is constant, so π̂ ∝ F̂^(N−1), and KL(π̂ ‖ π_bon) sums closed integrals.
    """
    generator = seeded()
    kls = []
    for _ in range(200):
        inner = torch.rand(M, generator=generator).sort().values
        u = torch.cat([torch.zeros(1), inner, torch.ones(1)]).double()
        middle = (u[1:] + u[:-1]) / 2
        log_w = (N - 1) * vbon.estimate_log_F(middle, u[1:-1])
        log_w = log_w - torch.log((log_w.exp() * u.diff()).sum())
        integral = torch.xlogy(u, u) - u  # of log u
        kl = (log_w.exp() * ((log_w - math.log(N)) * u.diff() - (N - 1) * integral.diff())).sum()
        kls.append(kl.item())
    assert np.mean(kls) == pytest.approx((N - 1) / (4 * M), rel=0.25)


def test_exponential_fit_is_least_squares_up_to_the_steps_of_its_grid():
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
    assert b[4].item() == pytest.approx(1.3, rel=0.03) and a[4].item() == pytest.approx(0.7, rel=0.03)
    assert all(x.isfinite() for x in vbon.fit_log_F(torch.ones(5)))
    for bad in ([1.0, 2.0], [1.0, 2.0, math.inf]):
        with pytest.raises(ValueError, match="at least 3 finite"):
            vbon.fit_log_F(bad)


def test_the_smoothed_estimate_does_not_depend_on_where_zero_is():
    scores, ref = (torch.randn(shape, generator=seeded()).double() for shape in (7, (7, 50)))
    args = vbon.Args(estimator="smooth", out="unused")
    found = vbon.log_F_of(scores, ref, args)
    a, b = vbon.fit_log_F(ref)
    close(found, -a * torch.exp(-b * scores), atol=1e-9)
    close(found, vbon.log_F_of(scores + 1e4, ref + 1e4, args), atol=1e-6)  # where exp(b·r) would overflow


# --- log F shared between prompts ---------------------------------------------------------------------------


def normals(P, T, seed):
    """(P, T) draws of a prompt each."""
    return torch.randn(P, T, generator=seeded(seed), dtype=torch.double)


def mixtures(weights, means, spreads, seed, T=2000):
    """T draws of each of P mixtures of normals, (P, T): weights, means, spreads (P, C)."""
    part = torch.multinomial(weights, T, replacement=True, generator=seeded(seed))
    return means.gather(1, part) + spreads.gather(1, part) * normals(len(weights), T, seed + 1)


def worlds(P=48):
    """{name: (P, T) rewards}: what each prompt's samples are drawn from, where sharing could do harm."""
    one, place = torch.ones(P, 1, dtype=torch.double), normals(P, 4, 0)
    odd = torch.arange(P).unsqueeze(1) % 2
    unrelated = mixtures(normals(P, 4, 1).exp(), 3 * place, 0.5 * (0.7 * normals(P, 4, 2)).exp(), 3)
    bimodal = mixtures(one.expand(P, 2), torch.cat([place[:, :1] - 2 * odd, place[:, :1] + 2 * odd], 1),
                       (1 - 0.6 * odd).expand(P, 2), 4)
    rare, far = doubles([[0.98, 0.02]]).expand(P, 2), torch.cat([place[:, :1], 4 + 2 * place[:, 1:2]], 1)
    needles = mixtures(rare, far, doubles([[1, 0.3]]).expand(P, 2), 5)
    alike = mixtures(one, place[:, :1], one, 6)
    heavy = 3 * place[:, :1] + place[:, 1:2].exp() * normals(P, 2000, 7) / normals(P, 2000, 8).abs()
    return {"unrelated": unrelated, "half are bimodal": bimodal, "needles": needles, "alike": alike,
            "ties": alike.round(), "heavy tails": heavy}


def floor(log_F, truth, N):
    """KL(π̂ ‖ π_bon) of what is optimal for log F̂ (P, T), where log F is `truth`: a mean over prompts."""
    q, p = (((N - 1) * x).log_softmax(-1) for x in (log_F, truth))
    return (q.exp() * (q - p)).sum(-1).mean().item()


def add_one(rewards, samples):
    return torch.stack([vbon.estimate_log_F(r, s) for r, s in zip(rewards, samples)])


def shared(rewards, samples, features=None):
    prompt = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
    return vbon.shared_log_F(list(samples), features)(rewards.flatten(), prompt).view_as(rewards)


@pytest.mark.parametrize("world", worlds(2))
def test_sharing_never_harms(world):
    """With M from 8 to 1000 samples to a prompt the floor is at most 1.1 times that of ranks, and far below
    it where prompts share a shape."""
    rewards = worlds()[world].sort(1).values
    P, T = rewards.shape
    truth = add_one(rewards, rewards)
    for M in (8, 32, 200, 1000):
        samples = rewards.gather(1, torch.randint(T, (P, M), generator=seeded(M)))
        by_ranks, by_all = add_one(rewards, samples), shared(rewards, samples)
        for N in (4, 16, 64):
            of_ranks, of_all = floor(by_ranks, truth, N), floor(by_all, truth, N)
            assert of_all <= 1.1 * of_ranks, (M, N, of_all, of_ranks)
            if world == "alike" and M < 1000:
                assert of_all < 0.6 * of_ranks, (M, N, of_all, of_ranks)


def test_shared_log_F_of_normal_prompts_is_exact():
    """The F of prompts with 64, 2 and 0 samples, of which a feature tells the mean, is that of the normal
    distribution that they were drawn from; location_scale shrinks as the normal model says."""
    P, M = 400, 64
    mean, noise = normals(P, 1, 0), normals(P, M, 1)
    samples = [*(mean + noise)]
    samples[7], samples[8] = samples[7][:0], samples[8][:2]
    grid = torch.linspace(-1.5, 2.5, 9, dtype=torch.double)
    log_F = vbon.shared_log_F(samples, mean)
    for prompt in (7, 8, 9):
        found = log_F(mean[prompt] + grid, torch.full((9,), prompt))
        close(found.exp(), torch.special.ndtr(grid), atol=0.05, rtol=0)
    z, prompt = (0.5 * mean + noise).flatten(), torch.arange(P).repeat_interleave(M)
    found_M, mu, sigma, e = vbon.location_scale(z, prompt, torch.ones(P, 1).double())
    average, weight = z.view(P, M).mean(1), 0.25 / (0.25 + 1 / M)
    assert (found_M == M).all() and len(e) == P * M and e.square().mean() == pytest.approx(1)
    close(mu, average.mean() + weight * (average - average.mean()), atol=0.03, rtol=0)
    assert sigma.mean() == pytest.approx(math.sqrt(1 + weight / M), abs=0.02) and sigma.std() < 0.08


def test_shared_log_F_is_finite_monotone_and_knows_ranks_alone():
    generator = seeded()
    lengths = [0, 1, 2, 5, 40, 0, 7, 3]
    samples = [torch.randn(M, generator=generator, dtype=torch.double) + i for i, M in enumerate(lengths)]
    ties = [r.round() for r in samples]
    features = torch.randn(8, 2, generator=generator)
    for ref in (samples, ties, samples[:2], [r[:1] for r in samples], [torch.zeros(5).double()] * 3):
        for x in (None, features[:len(ref)], torch.ones(len(ref), 1)):
            log_F, mapped = vbon.shared_log_F(ref, x), vbon.shared_log_F([r.exp() for r in ref], x)
            for i in range(len(ref)):
                grid = torch.cat([torch.linspace(-5, 12, 500).double(), *ref]).sort().values
                found = log_F(grid, torch.full(grid.shape, i))
                assert found.dtype == torch.double and found.isfinite().all() and (found < 0).all()
                assert (found.diff() >= 0).all()
                assert torch.equal(found, mapped(grid.exp(), torch.full(grid.shape, i)))
    one = vbon.shared_log_F(samples, features)
    two = vbon.shared_log_F(samples, features.double() ** 3)  # of features too the ranks count
    close(one(grid, torch.zeros(len(grid)).long()), two(grid, torch.zeros(len(grid)).long()))
    nan = doubles([math.nan])
    for bad, x in (([torch.empty(0)] * 2, None), ([nan], None), (samples, features * math.nan)):
        with pytest.raises(ValueError, match="sample of at least one prompt"):
            vbon.shared_log_F(bad, x)


def test_a_feature_stands_for_samples():
    """Prompts without samples, of which a feature tells the mean, are nearer to Best-of-16 than with 8
    samples by ranks, and far nearer than without the feature."""
    rewards = worlds()["alike"].sort(1).values
    feature = rewards.mean(1, keepdim=True) ** 3
    truth = add_one(rewards, rewards)
    samples = [r[torch.randint(2000, (32,), generator=seeded(i))] if i % 2 else r[:0]
               for i, r in enumerate(rewards)]
    floors = [floor(shared(rewards, samples, x)[::2], truth[::2], 16) for x in (feature, None)]
    few = rewards.gather(1, torch.randint(2000, (48, 8), generator=seeded()))
    assert floors[0] < floor(add_one(rewards, few)[::2], truth[::2], 16) / 2 and floors[0] < floors[1] / 3


def test_shared_samples_are_quantiles_of_the_shared_F():
    place = normals(30, 1, 0)
    samples = [place[i] + normals(1, 40, i + 1)[0] if i % 3 else torch.empty(0).double() for i in range(30)]
    drawn = {("train", i): r for i, r in enumerate(samples)} | {("empty", i): place[i] for i in range(30)}
    found = vbon.share_samples(drawn | {("test", 0): samples[1]})
    log_F, grid = vbon.shared_log_F(samples, place), torch.linspace(-2, 4, 100).double()
    assert found["test", 0] is samples[1]
    for i in (0, 1, 29):  # of which 0 has no sample
        quantiles = found["train", i]
        assert len(quantiles) == 1000 and (quantiles.diff() >= 0).all()
        ranked = vbon.log_F_of(grid, quantiles, vbon.Args(task="imdb", estimator="shared", out="unused"))
        close(ranked.exp(), log_F(grid, torch.full(grid.shape, i)).exp(), atol=0.004, rtol=0)


# --- PPO ----------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    """γ = .9, λ = .5: δ = (1 + .9·2 − 1, 0 + .9·3 − 2, 4 − 3); A = (1.8 + .45·1.15, .7 + .45, 1)."""
    mask = torch.tensor([[True, True, True, False]])
    for beyond in (99.0, math.nan):
        rewards, values = torch.tensor([[1.0, 0.0, 4.0, beyond]]), torch.tensor([[1.0, 2.0, 3.0, beyond]])
        advantages, returns = vbon.gae(rewards, values, mask, 0.9, 0.5)
        torch.testing.assert_close(advantages, torch.tensor([[2.3175, 1.15, 1.0, 0.0]]))
        torch.testing.assert_close(returns, torch.tensor([[3.3175, 3.15, 4.0, 0.0]]))
        white = vbon.whiten(torch.tensor([[1.0, 4.0, 1.0, beyond]]), mask)
        torch.testing.assert_close(white, torch.tensor([[-1.0, 2.0, -1.0, 0.0]]) / math.sqrt(2))


def test_block_earnings_by_hand():
    rewards, values = doubles([[1.0, 2, 4, 8, 16]] * 2, [[0.0, 0, 10, 10, 30]] * 2)
    mask = torch.arange(5) < torch.tensor([[5], [4]])
    earned = vbon.block_earnings(rewards, values, mask, 2)
    # The values rise from 0 to 10, to 30, and fall to 0 behind the last token; or end after 10.
    close(torch.where(mask, earned, 0.0), doubles([[13.0, 13, 32, 32, -14], [13, 13, 2, 2, 0]]))


@pytest.mark.parametrize("kl_coef", [10.0, 0.1])
def test_step_token_bias_moves_each_logit_by_what_its_token_earned(kl_coef):
    """Everywhere alike behind a LayerNorm; a token that was never drawn stays; no step is too long."""
    norm, V, share, limit = torch.nn.LayerNorm(8), 11, 0.25, 0.005
    norm.weight.data.uniform_(0.5, 2, generator=seeded())
    norm.bias.data.normal_(generator=seeded(1))
    output = torch.nn.Linear(8, V, bias=False)
    hidden = norm(torch.randn(400, 8, generator=seeded(2))).detach()
    counts, mean_counts = torch.zeros(V, dtype=torch.double), torch.zeros(V)
    for phase in range(3):
        rollout = vbon.Rollout(
            None, None, tokens=torch.randint(V - 1, (6, 5), generator=seeded(3 + phase)),
            mask=torch.rand(6, 5, generator=seeded(4 + phase)) < 0.8,
            earned=torch.randn(6, 5, generator=seeded(5 + phase)))
        earned = [rollout.earned[(rollout.tokens == a) & rollout.mask] for a in range(V)]
        number = torch.tensor([len(x) for x in earned])
        mean_counts = number if phase == 0 else (1 - share) * mean_counts + share * number
        step = torch.stack([x.sum() for x in earned]) / kl_coef / (mean_counts / share + 20)
        nats = (mean_counts * step ** 2).sum() / mean_counts.sum() / 2
        assert (nats > limit) == (kl_coef < 1)
        step *= min(1, math.sqrt(limit / nats))
        before = output(hidden).detach()
        vbon.step_token_bias(output, hidden, rollout, counts, share, kl_coef)
        assert step[-1] == 0 and (step != 0).sum() > 5
        close(output(hidden) - before, step.expand(400, V), atol=1e-3 if kl_coef < 1 else 1e-5)


def test_fit_values_learns_a_cubic_from_earlier_phases():
    """Blocks of 2 in 5 tokens: returns are a cubic of u, another one in each block, plus noise."""
    weights = torch.randn(3, 4, dtype=torch.double, generator=seeded())
    moments = torch.zeros(3, 4, 5, dtype=torch.double)
    mask = torch.arange(5) < torch.randint(1, 6, (500, 1), generator=seeded(1))

    def phase(seed, noise=0.1):
        u = torch.randn(500, 5, dtype=torch.double, generator=seeded(seed))
        powers = torch.stack([u ** i for i in range(4)], -1)[:, ::2]
        truth = (powers * weights).sum(-1).repeat_interleave(2, 1)[:, :5] * mask
        return u, truth, truth + noise * torch.randn(500, 5, dtype=torch.double, generator=seeded(seed + 1))
    for seed in (10, 20, 30):
        u, truth, returns = phase(seed)
        before = moments.clone()
        values = vbon.fit_values(u, returns, mask, 2, moments)
        close(values, truth, atol=0.2, rtol=0.02)
        assert (values[~mask] == 0).all() and not same({"": before}, {"": moments})
        if seed > 10:  # a baseline must not know its own returns
            close(values, vbon.fit_values(u, 0 * returns, mask, 2, before))


def test_fit_values_in_a_block_that_few_responses_reach():
    sums = torch.zeros(2, 4, 5, dtype=torch.double)
    u = torch.randn(64, 2, generator=seeded(), dtype=torch.double)
    returns = 3 + 0.3 * torch.randn(64, 2, generator=seeded(1), dtype=torch.double)
    mask = torch.tensor([[True, False]]).repeat(64, 1)
    vbon.fit_values(u, returns, mask, 1, sums)
    mask[:4] = True  # the second block is new in the second phase, and four responses have it
    assert (vbon.fit_values(u, returns, mask, 1, sums)[mask] - 3).abs().max() < 2
    u[:4, 1] = 2.8
    assert (vbon.fit_values(u, returns, mask, 1, sums)[mask] - 3).abs().max() < 4


def test_read_unfinished_ranks_the_text_so_far(toy):
    task, prompts = toy[0], ["the plot was", "the music was"]
    words = [["very", "superb", "."], ["slow"]]
    tokens, mask = vbon.pad([task.tokenizer.convert_tokens_to_ids(row) for row in words], 0, "right")
    rollout = vbon.Rollout(None, None, tokens, mask)
    ref = doubles([[-1.0, 0.0, 0.5, 3.0], [9.0] * 4])
    u = vbon.read_unfinished(task, prompts, rollout, ref, 1)
    every_other = vbon.read_unfinished(task, prompts, rollout, ref, 2)
    close(every_other, torch.where(torch.arange(3) == 2, u, 0))
    k = [vbon.ranks(doubles([vbon.warmth(text)]), ref[0]).item() for text in ("very", "very superb")]
    normal = statistics.NormalDist()
    assert k == [1.5, 4]  # "very" alone has warmth 0, a tie
    expected = doubles([[0, *(normal.inv_cdf((i + 0.5) / 5) for i in k)], [0, 0, 0]])
    close(u, expected, atol=1e-6, rtol=0)


def test_losses_are_clipped_and_masked():
    mask = torch.tensor([[True, True, False]])
    old, new = torch.zeros(1, 3), torch.log(torch.tensor([[1.5, 0.5, 50.0]]))
    for sign, expected in ((1.0, -(1.2 + 0.5) / 2), (-1.0, (1.5 + 0.8) / 2)):
        loss = vbon.policy_loss(new, old, torch.tensor([[sign, sign, 9.0]]), mask)
        assert loss.item() == pytest.approx(expected)
    values, returns = torch.tensor([[1.0, 0.1, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    loss = vbon.value_loss(values, torch.zeros(1, 3), returns, mask)
    assert loss.item() == pytest.approx((0.5 * 0.8 ** 2 + 0.5 * 0.9 ** 2) / 2)


@pytest.mark.parametrize("loss", [vbon.policy_loss, vbon.value_loss])
def test_gradients_of_the_losses(loss):
    """Against finite differences; and NaN beyond the mask changes neither value nor gradient."""
    new, old, third = (torch.randn(3, 4, generator=seeded(i)).double() * 0.5 for i in range(3))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    assert torch.autograd.gradcheck(lambda x: loss(x, old, third, mask), (new.clone().requires_grad_(),))
    found = []
    for beyond in (0.0, math.nan):
        x, y, z = (torch.where(mask, t, beyond) for t in (new, old, third))
        value = loss(x.requires_grad_(), y, z, mask)
        value.backward()
        found.append((value, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found)) and (found[1][1][~mask] == 0).all()


def test_log_probs_of_the_taken_tokens_and_their_gradient():
    logits, tokens = torch.randn(2, 3, 5, generator=seeded()).double() * 3, torch.randint(5, (2, 3))
    logits.requires_grad_()
    found = vbon.token_log_probs(logits, tokens, 0.7)
    expected = (logits / 0.7).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    close(found, expected, rtol=0, atol=1e-14)
    weights = torch.randn(2, 3, generator=seeded(1)).double()
    by_hand, by_autograd = (torch.autograd.grad((weights * x).sum(), logits, retain_graph=True)[0]
                            for x in (found, expected))
    close(by_hand, by_autograd, rtol=0, atol=1e-14)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # never a wrong gradient
        torch.autograd.grad(found.sum(), logits)


# --- models: decoding, the shared trunk ---------------------------------------------------------------------

SIZES = dict(vocab_size=40, initializer_range=0.2, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
             intermediate_size=64, max_position_embeddings=64)
KINDS = {
    "GPT2": dict(n_embd=32, n_layer=3, n_head=2, n_positions=64), "GPTNeoX": {}, "Falcon": {},
    "Llama": dict(num_key_value_heads=1), "Qwen2": dict(num_key_value_heads=1),
    "Mistral": dict(num_key_value_heads=1, sliding_window=4), "Bloom": dict(n_layer=3, n_head=2),
    "OPT": dict(ffn_dim=64, word_embed_proj_dim=32, init_std=0.2),
    "Gemma": dict(num_key_value_heads=1, head_dim=16)}


def small_lm(kind="GPT2", seed=0, **changes):
    import transformers
    torch.manual_seed(seed)
    used = list(SIZES)[:{"GPT2": 2, "Bloom": 3}.get(kind, 7)]  # the others have names of their own
    settings = {k: SIZES[k] for k in used} | KINDS.get(kind, {}) | changes
    config = getattr(transformers, kind + "Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6, 7, 8]]


@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6, 7], [8, 9, 11]]], ids=["padded", "unpadded"])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_the_models_own_forward_pass(kind, prompts):
    """Tokens, log-probs and values of padded, cached, shrinking batches; one unpadded pass per response."""
    lm, eos, temperature, copies = small_lm(kind), 10, 0.8, 24
    head = torch.nn.Linear(32, 1)
    uniforms = torch.rand(len(prompts) * copies, 10, generator=seeded(1))
    rollout = vbon.generate(lm, prompts, uniforms, eos, temperature, head)
    lengths = rollout.mask.sum(1)
    assert 0 < (lengths < 10).sum() < len(lengths), "some responses should end at EOS and some at the limit"
    for i, response in enumerate(vbon.token_lists(rollout)):
        assert eos not in response[:-1] and (len(response) == 10 or response[-1] == eos)
        prompt, row = prompts[i // copies], rollout[i]
        with torch.no_grad():
            out = lm(torch.tensor([prompt + response]), output_hidden_states=True)
        logits, hidden = (x[0, len(prompt) - 1:-1] for x in (out.logits, out.hidden_states[-1]))
        log_pi, values = (logits / temperature).log_softmax(-1), head(hidden).squeeze(-1).detach()
        close(row.log_probs[row.mask], log_pi[range(len(response)), response], atol=5e-5, rtol=1e-4)
        close(row.values[row.mask], values, atol=5e-5, rtol=1e-4)
        cdf = log_pi.exp().cumsum(-1)
        for t, token in enumerate(response):
            below = cdf[t, token] - log_pi[t, token].exp()
            assert below - 1e-5 <= uniforms[i, t] <= cdf[t, token] + 1e-5
        together = rollout.input_ids[i][rollout.attention_mask[i].bool()].tolist()
        assert together == prompt + response[:len(together) - len(prompt)]
    assert (rollout.log_probs[~rollout.mask] == 0).all() and (rollout.values[~rollout.mask] == 0).all()
    vbon.check_sampler(lm, eos, types.SimpleNamespace(ref=kind, device="cpu", unfrozen_layers=2))
    if kind != "Mistral":  # whose cache of a window stays what the library makes it
        assert type(vbon.roomy_cache(lm).layers[0]).__name__ == "RoomyLayer"


@pytest.mark.parametrize("kind, settings", [
    ("Rwkv", dict(num_hidden_layers=2)), ("Mamba", dict(state_size=4)),
    ("RecurrentGemma", dict(num_key_value_heads=1, head_dim=16, lru_width=32, attention_window_size=16)),
    ("Roberta", dict(is_decoder=True)), ("Bart", dict(d_model=32, encoder_layers=1, decoder_layers=1))])
def test_models_that_cannot_be_sampled_from_are_refused(kind, settings):
    with pytest.raises(vbon.UserError, match=f"--ref mine: this script cannot sample from a {kind}"):
        vbon.check_sampler(small_lm(kind, **settings), 10, types.SimpleNamespace(
            ref="mine", device="cpu", unfrozen_layers=-1))


def test_sampled_tokens_follow_the_distribution():
    logits, n = torch.tensor([2.0, -math.inf, 0.0, 1.0, -1.0]), 200_000
    tokens, log_probs = vbon.sample_tokens(logits.expand(n, -1), torch.rand(n, generator=seeded()))
    p = logits.softmax(-1)
    frequency = tokens.bincount(minlength=5) / n
    assert (frequency - p).abs().max() < 4 * math.sqrt(0.25 / n) and frequency[1] == 0
    torch.testing.assert_close(log_probs, p.log()[tokens])


def test_no_token_of_probability_zero_is_drawn():
    """A vocabulary of 50 000, at so low a temperature that most underflow, and the ends of [0, 1)."""
    logits = 4 * torch.randn(64, 50_000, generator=seeded()) / 0.1
    for u in (0.0, 0.5, 1 - 2 ** -24):
        tokens, log_probs = vbon.sample_tokens(logits, torch.full((64,), u))
        assert (logits.softmax(-1).gather(1, tokens.unsqueeze(1)) > 0).all()
        exact = logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        close(log_probs, exact.clamp(min=math.log(torch.finfo(torch.float32).tiny)), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_trunk(kind):
    """The trunk is shared, not copied. On the activations that decoding kept, the top layers give what
    a whole pass gives, also gradients, for responses of different lengths."""
    ref, prompts = small_lm(kind), PROMPTS * 24
    if kind == "OPT":  # rounding flips its ReLUs
        ref.double()
    policy = vbon.make_policy(ref, 2)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained and not any(".0." in name for name in trained), trained
    pointers = {p.data_ptr() for p in ref.parameters()}
    assert all((p.data_ptr() in pointers) != p.requires_grad for p in policy.parameters())
    for T in (10, 1):
        uniforms = torch.rand(len(prompts), T, generator=seeded(1))
        rollout = vbon.generate(ref, prompts, uniforms, 10, 0.8, None, 2)
        trunkless = replace(rollout, trunk=None)
        assert T == 1 or len(rollout.mask.sum(1).unique()) > 3, "responses should end at different times"
        assert torch.equal(rollout[torch.tensor([3, 1])].trunk, rollout.trunk[[3, 1]])
        with torch.no_grad():
            by_ref = vbon.response_log_probs(ref, rollout, 0.8, 2)[0]
        close(by_ref[rollout.mask], rollout.log_probs[rollout.mask], atol=5e-5, rtol=1e-4)
        with torch.no_grad():
            for p in trained.values():
                p.add_(0.05 * torch.randn(p.shape, generator=seeded(2)))
        whole, short = (vbon.response_log_probs(policy, r, 0.8, 2)[0] for r in (trunkless, rollout))
        close(short[rollout.mask], whole[rollout.mask], atol=5e-5, rtol=1e-4)
        assert not torch.allclose(whole[rollout.mask], by_ref[rollout.mask], atol=1e-2)
        gradients = (torch.autograd.grad(torch.where(rollout.mask, x, 0).square().mean(), trained.values())
                     for x in (whole, short))
        for g, h in zip(*gradients):
            close(g, h, atol=1e-6, rtol=1e-5)
        with torch.no_grad():  # the layers are all back in their place
            whole = vbon.response_log_probs(ref, trunkless, 0.8)
            close(whole[0][rollout.mask], by_ref[rollout.mask], atol=5e-5, rtol=1e-4)
            assert whole[2] is None


# --- running the scripts ------------------------------------------------------------------------------------


def flags(settings=(), *more, **changes):
    """A command line of these settings, flags and changes."""
    pairs = [("--" + name.replace("_", "-"), value) for name, value in (dict(settings) | changes).items()]
    return [str(x) for x in (*itertools.chain(*pairs), *more)]


def call(*argv, script=vbon):
    """The script's main in this process: its file, its exit code and what it printed."""
    out, err, name = io.StringIO(), io.StringIO(), os.path.basename(script.__file__)
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          unittest.mock.patch.object(sys, "argv", [name])):  # argparse names the script by it
        try:
            code = script.main([str(a) for a in argv])
        except SystemExit as stop:  # argparse's own errors
            code = stop.code
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue(), script=name)


def command(*argv, cwd, script="vbon.py", **environment):
    """The same in a process of its own."""
    environment = os.environ | {"PYTHONUTF8": "1"} | environment
    return subprocess.run([sys.executable, str(HERE / script), *map(str, argv)], cwd=cwd, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, env=environment, timeout=600)


def succeeded(result):
    assert result.returncode == 0, result.stderr
    return result


def refused(result, *words):
    """Exit code 2 and one line on stderr, after any progress bar, that has these words."""
    assert result.returncode == 2, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith(getattr(result, "script", "vbon.py") + ": "), result.stderr
    assert all(str(w) in line for w in words), result.stderr
    assert "Traceback" not in result.stderr


def launcher(path, patch, script="vbon"):
    """A file that runs a script after some lines of Python."""
    path.write_text(f"import os, sys, time\nsys.path.insert(0, {str(HERE)!r})\nimport vbon, {script}\n"
                    f"{patch}\nif __name__ == '__main__':\n    sys.exit({script}.main())\n")
    return path


def start(path, *argv, cwd):
    return subprocess.Popen([sys.executable, str(path), *map(str, argv)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def not_a_number(name):
    raise AssertionError(f"{name} is no JSON")


def read_json(path):
    return json.loads(Path(path).read_text(), parse_constant=not_a_number)


def read_lines(path):
    return [json.loads(line, parse_constant=not_a_number) for line in Path(path).read_text().splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def files(folder):
    """{name: content} of a folder, at any depth."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*.*")}


def batches(folder):
    """The stored batches of π_ref's samples in a folder, in order."""
    return [json.loads(path.read_text("utf-8"), parse_constant=not_a_number)
            for path in sorted(Path(folder).rglob("*-*.json"))]


def metrics_of(run):
    """metrics.jsonl without its times."""
    rows = read_lines(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def weights(run, file="policy/model.safetensors"):
    from safetensors.torch import load_file
    return load_file(run / file)


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- the toy ------------------------------------------------------------------------------------------------

TOY = dict(episodes=256, rollouts=128, minibatch=64, M=30, test_M=20, test_prompts=16, test_responses=2,
           max_new_tokens=3)


def toy_args(**changes):
    return vbon.Args(**TOY | {"out": "unused", "device": "cpu"} | changes)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy's task, the folder of three runs ("one" and "two" are alike), and what the first returned."""
    folder = tmp_path_factory.mktemp("toy")
    samples = str(folder / "samples")
    results = [vbon.train(toy_args(out=str(folder / name), seed=seed, samples=samples))
               for name, seed in (("one", 0), ("two", 0), ("three", 1))]
    return vbon.setup(toy_args()), folder, results[0]


def test_toy_is_enumerated_exactly(toy):
    task, world = toy[0], vbon.ExactWorld(toy[0], toy_args())
    assert len(world.responses) == len(set(world.responses)) == 1 + 18 + 18 ** 2 + 18 ** 3
    close(world.log_ref.exp().sum(1), torch.ones(4).double(), atol=1e-5)
    close(world.log_bon.exp().sum(1), torch.ones(4).double(), atol=1e-4)
    prompt = task.encode("the plot was")
    for response in ("superb", "very dull", "slow but moving"):  # the last one is cut off
        ids = torch.tensor([prompt + task.encode(response + (" ." if response.count(" ") < 2 else ""))])
        with torch.no_grad():
            log_probs = task.ref(ids).logits[0].log_softmax(-1)
        expected = sum(log_probs[t - 1, ids[0, t]].item() for t in range(3, ids.shape[1]))
        found = world.log_ref[2, world.responses.index(response)].item()
        assert found == pytest.approx(expected, abs=1e-4)
    for i in (0, 99, 3000):  # F as a sum over all that is worse
        r = world.rewards
        worse = (r < r[i]) | (r == r[i]) & (torch.arange(len(r)) < i)
        close(world.log_F[:, i].exp(), (world.log_ref.exp() * worse).sum(1), atol=1e-9)
    before = world.metrics(world.log_ref)
    assert before["exact/kl_to_ref"] == 0 and before["exact/win_rate"] == pytest.approx(0.5, abs=1e-4)
    assert before["exact/kl_to_bon"] > 10
    assert world.metrics(world.log_bon)["exact/kl_to_bon"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("objective", vbon.OBJECTIVES)
def test_what_training_aims_at_is_the_optimum(toy, objective):
    """E[reward] − c·KL(π ‖ π_ref) is highest there; its distance from π_bon is the price of the estimate."""
    args = toy_args(objective=objective, N=4)
    world, generator = vbon.ExactWorld(toy[0], args), np.random.default_rng(0)
    M = 20_000
    ref_rewards = {("train", p): world.rewards[torch.from_numpy(generator.choice(
        len(row), M, p=row.softmax(0).numpy()))] for p, row in zip(world.prompts, world.log_ref)}
    log_F = torch.stack([vbon.log_F_of(world.rewards, ref_rewards["train", p], args) for p in world.prompts])
    reward, c = vbon.terminal_reward(world.rewards, log_F, world.log_ref, args), args.kl_coef

    def value(log_pi):
        return (log_pi.exp() * (reward - c * (log_pi - world.log_ref))).sum(1)
    best = world.optimum(ref_rewards)
    for i in range(5):
        other = (best + 0.3 * torch.randn(best.shape, generator=seeded(i)).double()).log_softmax(1)
        assert (value(other) < value(best)).all()
    if objective == "vbon":  # as F̂ is nearly exact, all that is left are ties
        assert world.metrics(best)["exact/kl_to_bon"] < 0.05


def test_warmth():
    warmth = vbon.warmth
    assert warmth("superb") > warmth("moving") > 0 > warmth("dull") > warmth("awful")
    assert warmth("very superb") > warmth("superb") > 0 > warmth("not superb")
    assert warmth("slow but superb") > warmth("superb but slow")


def test_toy_run_files(toy):
    _, folder, result = toy
    metrics, saved = read_lines(folder / "one/metrics.jsonl"), read_json(folder / "one/result.json")
    assert [m["episode"] for m in metrics] == [128, 256]
    assert {k.split("/")[0] for k in metrics[0]} == {"episode", "objective", "ppo", "time", "exact"}
    names = {"reward", "win_rate", "kl_to_ref"}
    names |= {n + "_se" for n in names} | {"exact/" + n for n in names} | {"exact/kl_to_bon"}
    assert saved == result and names <= set(saved)
    assert saved["exact/kl_to_bon"] == metrics[-1]["exact/kl_to_bon"]
    samples = read_lines(folder / "one/samples.jsonl")
    assert len(samples) == 16 * 2
    assert np.mean([s["reward"] for s in samples]) == pytest.approx(saved["reward"])
    assert all(s["reward"] == vbon.warmth(s["response"]) for s in samples)
    assert read_json(folder / "one/config.json")["N"] == 16 and not (folder / "one/checkpoint.pt").exists()
    refused(call(*flags(TOY, out=folder / "one")), "--overwrite")


def test_same_seed_same_run_and_saved_policy(toy):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    task, folder, result = toy
    assert metrics_of(folder / "one") == metrics_of(folder / "two") != metrics_of(folder / "three")
    assert same(weights(folder / "one"), weights(folder / "two"))
    policy = AutoModelForCausalLM.from_pretrained(folder / "one/policy")
    assert not same(policy.state_dict(), task.ref.state_dict())
    world = vbon.ExactWorld(task, toy_args())
    exact = world.metrics(world.log_probs(policy))
    assert exact["exact/kl_to_bon"] == pytest.approx(result["exact/kl_to_bon"], abs=1e-5)
    assert AutoTokenizer.from_pretrained(folder / "one/policy").encode("the plot was") == world.prompt_ids[2]


def test_toy_learns_to_be_its_own_best_of_4(toy, tmp_path):
    changes = dict(N=4, episodes=20480, rollouts=1024, minibatch=256, test_prompts=64, test_M=100, M=200)
    result = vbon.train(toy_args(**changes, out=str(tmp_path), samples=str(tmp_path / "samples")))
    assert result["exact/kl_to_bon"] < 0.1  # from 1.6
    assert result["exact/win_rate"] == pytest.approx(0.8, abs=0.05)


def test_estimates_on_the_test_prompts_agree_with_the_exact_values(toy, tmp_path):
    args = toy_args(test_prompts=1000, test_M=20_000, samples=str(tmp_path / "samples"))
    task = vbon.setup(args)
    policy = vbon.make_policy(task.ref, -1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=seeded()))
    drawn = vbon.sample_policy(policy, task, args)
    result, samples = vbon.test_metrics(task, *drawn, vbon.reference_samples(task, args), args)
    world = vbon.ExactWorld(task, args)
    exact = world.metrics(world.log_probs(policy))
    for name in ("reward", "win_rate", "kl_to_ref", "effective_N", "excess_kl", "kl_to_bon"):
        assert result[name] == pytest.approx(exact["exact/" + name], abs=4 * result[name + "_se"])
    log_ratio = {(p, y): r for p, row in zip(world.prompts, world.log_probs(policy) - world.log_ref)
                 for y, r in zip(world.responses, row.tolist())}
    plain = np.array([log_ratio[s["prompt"], s["response"].strip()] for s in samples])
    assert exact["exact/kl_to_ref"] == pytest.approx(plain.mean(), abs=4 * plain.std() / math.sqrt(2000))
    assert result["kl_to_ref_se"] < 0.8 * plain.std() / math.sqrt(2000)  # summing over the vocabulary pays


def test_one_response_of_one_token_gives_finite_numbers(tmp_path):
    names = "episodes rollouts minibatch ppo_epochs M test_M test_prompts max_new_tokens"
    for N in (1, 16):
        run = tmp_path / str(N)
        succeeded(call(*flags(dict.fromkeys(names.split(), 1), N=N, out=run, samples=run / "s")))
        rows = [read_json(run / "result.json"), *read_lines(run / "metrics.jsonl"), *batches(run / "s")]
        assert all(math.isfinite(x) for row in rows for x in row.values() if isinstance(x, float))


# --- killed, stopped, damaged -------------------------------------------------------------------------------


SCRIPTS = [(vbon, []), (vbon, ["--critic-every", "1"]), (bon_baselines, ["bonbon", "--N", "4"]),
           (bon_baselines, ["bond"])]


@pytest.mark.parametrize("script, method", SCRIPTS)
def test_a_killed_run_resumes_to_the_same_weights(script, method, tmp_path, monkeypatch):
    """kill -9 while a checkpoint is written; the resumed run ends with the bits of one that never was."""
    monkeypatch.chdir(tmp_path)
    argv = [*method, *flags(TOY, episodes=1024, save_every=2)]
    patch = """
replace, seen = os.replace, []
def killed(source, target):
    seen.extend([target] if target.endswith("checkpoint.pt") else [])
    if len(seen) == 2:
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = killed"""
    path = launcher(tmp_path / "killed.py", patch, script.__name__)
    process = start(path, *argv, "--out", "killed", cwd=tmp_path)
    succeeded(call(*argv, "--out", "whole", "--samples", "whole-samples", script=script))
    process.communicate()
    assert process.returncode == -9 and Path("killed/checkpoint.pt").exists()
    assert not Path("killed/result.json").exists()
    resume = [*argv, "--out", "killed", "--resume"]
    refused(call(*resume, "--lr", "0.01", script=script), "lr = 0.001, not 0.01")
    assert "resumed from" in succeeded(call(*resume, script=script)).stdout
    assert same(weights(Path("whole")), weights(Path("killed")))
    assert metrics_of(Path("whole")) == metrics_of(Path("killed"))
    assert metrics_of(Path("whole"))[-1]["episode"] == 1024
    assert not Path("killed/checkpoint.pt").exists()


def stop_before_the_test(*argv):
    """A run that Ctrl-C stops when its phases are done."""
    with unittest.mock.patch.object(vbon, "sample_policy", side_effect=KeyboardInterrupt):
        result = call(*argv)
    assert result.returncode == 130 and "--resume" in result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A toy run that Ctrl-C stopped when both of its phases were done, and the flags that go on with it."""
    folder = tmp_path_factory.mktemp("stopped")
    argv = flags(TOY, save_every=1, samples=folder / "samples")
    stop_before_the_test(*argv, "--out", folder / "run")
    return folder / "run", argv


@pytest.mark.parametrize("file, damage", [
    ("checkpoint.pt", lambda content: b""), ("checkpoint.pt", lambda content: content[:len(content) // 2]),
    ("checkpoint.pt", lambda content: b"\x80\x02}q\x00."), ("config.json", lambda content: content[:40]),
    ("config.json", lambda content: b"[]"), ("config.json", lambda content: b"\xff\xfe{}")])
def test_resume_refuses_damaged_files(stopped, tmp_path, file, damage):
    run = shutil.copytree(stopped[0], tmp_path / "run")
    (run / file).write_bytes(damage((run / file).read_bytes()))
    refused(call(*stopped[1], "--out", run, "--resume"), "--resume", "run")
    assert not (run / "result.json").exists()


def test_a_stopped_run_goes_on_or_begins_anew(stopped, toy, tmp_path):
    run = shutil.copytree(stopped[0], tmp_path / "run")
    (run / "checkpoint.pt").unlink()
    assert "no checkpoint" in succeeded(call(*stopped[1], "--out", run, "--resume")).stdout
    assert metrics_of(run) == metrics_of(toy[1] / "one")
    shutil.rmtree(run)
    shutil.copytree(stopped[0], run)
    (run / "metrics.jsonl").write_bytes(b"torn")  # a checkpoint has the metrics before it
    assert "resumed from" in succeeded(call(*stopped[1], "--out", run, "--resume")).stdout
    assert metrics_of(run) == metrics_of(toy[1] / "one") and same(weights(run), weights(toy[1] / "one"))


@pytest.mark.parametrize("script, method", SCRIPTS)
@pytest.mark.parametrize("lr, episodes, minibatch", [(1e18, 256, 64), (1e18, 256, 128), (1e10, 128, 128)])
def test_weights_that_are_no_numbers_are_not_kept(script, method, lr, episodes, minibatch, tmp_path):
    run = tmp_path / "run"
    argv = flags(TOY, lr=lr, episodes=episodes, save_every=1, ppo_epochs=1, minibatch=minibatch, out=run)
    refused(call(*method, *argv, "--samples", tmp_path / "samples", script=script), "--lr")
    assert not (run / "policy").exists() and not (run / "result.json").exists()
    if (run / "checkpoint.pt").exists():
        state = torch.load(run / "checkpoint.pt", weights_only=True)
        assert all(w.isfinite().all() for w in state["weights"])


def test_two_runs_into_one_folder(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    patch = """
sample_policy = vbon.sample_policy
def wait(*args):
    open("waiting", "w")
    for _ in range(600):
        if not os.path.exists("go on"):
            time.sleep(0.1)
    return sample_policy(*args)
vbon.sample_policy = wait"""
    first = start(launcher(tmp_path / "first.py", patch), *flags(TOY, out="run"), cwd=tmp_path)
    deadline = time.time() + 120
    while first.poll() is None and time.time() < deadline and not Path("waiting").exists():
        time.sleep(0.1)
    files = {path: path.read_bytes() for path in Path("run").iterdir()}
    for more in ([], ["--overwrite"], ["--resume"]):
        refused(call(*flags(TOY, seed=1, out="run"), *more), "run is being written by another run")
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == files
    Path("go on").touch()
    first.communicate()
    assert first.returncode == 0 and read_json("run/result.json")["seed"] == 0
    assert metrics_of(Path("run")) == metrics_of(toy[1] / "one")
    assert "read from samples/toy-" in succeeded(call(*flags(TOY, out="another"))).stdout


# --- the command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, word", [
    ("--N 0", "--N"), ("--N many", "--N"), ("--N nan", "--N"), ("--N inf", "--N"), ("--M 0", "--M"),
    ("--task chess", "toy"), ("--objective sft", "bound1"), ("--estimator mean", "log_mean"),
    ("--temperature 0", "--temperature"), ("--temperature 1e-9", "--temperature"),
    ("--adam-eps 0", "--adam-eps"),
    (f"--seed {2 ** 64}", "--seed"), (f"--data-seed {2 ** 70}", "--data-seed"), ("--lr nan", "--lr"),
    ("--objective rlhf --N 1", "--beta"), ("--ref gpt2", "--task imdb"), ("--minibatch 4096", "--rollouts"),
    ("--unfrozen-layers 7", "2 layers"), ("--device cuda:7", "cuda:7"), ("--nonsense", "--nonsense"),
    ("--max-new-tokens 6", "at most 4"), ("--M 2 --estimator smooth", "--M"),
    ("--task imdb --M 0 --estimator add_one", "--M"),
    ("--estimator shared", "four prompts")])
def test_bad_flags(argv, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(call(*argv.split()), word)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_refused_before_sampling(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    refused(call(*flags(TOY, out=out)), "file")
    assert os.listdir(tmp_path) == ["file"] and Path("file").read_text() == "mine"


def test_help_names_every_flag_and_importing_is_light(tmp_path):
    result = succeeded(command("--help", cwd=tmp_path))
    text = " ".join(result.stdout.split())
    for field in fields(vbon.Args):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"].replace("%%", "%")[:20] in text
    code = "import sys, vbon; print({'datasets', 'matplotlib', 'transformers', 'vllm'} & set(sys.modules))"
    light = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert light.stdout == "set()\n"


# --- imdb with small models, and an offline hub -------------------------------------------------------------


def byte_tokenizer(*special, **settings):
    """A token for each byte, after the special ones; of these only the settings name any."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


END = "<|endoftext|>"


def save_small_models(folder, labels=2, eos=True, seed=0):
    """A GPT-2 and a DistilBERT classifier over bytes, as local folders."""
    import transformers
    small_lm(seed=seed, vocab_size=257, n_positions=32, n_layer=2, bos_token_id=0, eos_token_id=0,
             initializer_range=0.02).save_pretrained(folder / "ref")
    byte_tokenizer(END, **({"eos_token": END} if eos else {})).save_pretrained(folder / "ref")
    names = {1: ["LABEL_0"], 2: ["NEGATIVE", "POSITIVE"], 3: ["A", "B", "C"]}[labels]
    config = transformers.DistilBertConfig(
        vocab_size=257, max_position_embeddings=64, dim=32, hidden_dim=64, n_layers=1, n_heads=2,
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    transformers.DistilBertForSequenceClassification(config).save_pretrained(folder / "reward")
    byte_tokenizer(END, pad_token=END, model_max_length=64).save_pretrained(folder / "reward")


FEW = dict(episodes=16, rollouts=8, minibatch=4, M=5, test_M=4, train_prompts=6, test_prompts=4,
           test_responses=2, max_new_tokens=6, unfrozen_layers=1)
IMDB = dict(task="imdb", N=2, estimator="add_one") | FEW


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    save_small_models(folder)
    write_lines(folder / "prompts.jsonl", [{"prompt": f"Film number {i} is"} for i in range(20)])
    return folder


def own(folder, **changes):
    """IMDB's settings with the models and prompts of a folder."""
    paths = dict(ref=folder / "ref", reward=folder / "reward", dataset=folder / "prompts.jsonl")
    return IMDB | {name: str(path) for name, path in paths.items()} | changes


def edit(path, change):
    """Changes a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_fused_gelu_is_gpt2s_own(pieces):
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(pieces / "ref")
    ours, _ = vbon.load("ref", AutoModelForCausalLM, str(pieces / "ref"), "cpu")
    names = [[type(m).__name__ for m in lm.modules()] for lm in (theirs, ours)]
    assert names[0].count("NewGELUActivation") == names[1].count("GELU") == 2
    assert "NewGELUActivation" not in names[1]
    ids = torch.randint(257, (4, 20), generator=seeded())
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    x, y = (torch.linspace(-6, 6, 1001, requires_grad=True) for _ in range(2))
    one, two = theirs.transformer.h[0].mlp.act(x), ours.transformer.h[0].mlp.act(y)
    close(one, two, atol=1e-6, rtol=1e-6)
    close(torch.autograd.grad(one.sum(), x)[0], torch.autograd.grad(two.sum(), y)[0], atol=5e-6, rtol=1e-5)
    assert ours.config.activation_function == "gelu_new"  # what is saved stays as it was


@pytest.mark.parametrize("objective, critic", [*((o, 2) for o in vbon.OBJECTIVES), ("rlhf", 0)])
def test_own_models_and_prompts(pieces, tmp_path, objective, critic):
    run, file = tmp_path / "run", tmp_path / "samples"
    succeeded(call(*flags(own(pieces), objective=objective, critic_every=critic, out=run, samples=file)))
    result, samples, metrics = (read_json(run / "result.json"), read_lines(run / "samples.jsonl"),
                                read_lines(run / "metrics.jsonl"))
    assert 0 < result["reward"] < 1 and result["kl_to_ref"] >= 0
    assert len(samples) == 2 * 2 and len(metrics) == 2  # a tenth of 20 prompts is held out
    stored = {(line["split"], prompt): (rewards, texts, tokens) for line in batches(file) for
              prompt, rewards, texts, tokens in
              zip(line["prompts"], line["rewards"], line["responses"], line["tokens"], strict=True)}
    assert len(stored) == (2 if objective == "rlhf" and not critic else 8)
    for (split, prompt), columns in stored.items():
        assert [len(x) for x in columns] == [5 if split == "train" else 4] * 3
        assert prompt.startswith("Film number") and all(0 < len(tokens) <= 6 for tokens in columns[2])
    # π_θ is π_ref at first, by decoding and by a pass over the shared trunk.
    assert metrics[0]["objective/kl_to_ref"] == pytest.approx(0, abs=1e-4)
    # The bias of tokens is saved, in an output layer that the embeddings no longer share.
    from transformers import AutoModelForCausalLM
    policy = AutoModelForCausalLM.from_pretrained(run / "policy")
    ref = AutoModelForCausalLM.from_pretrained(pieces / "ref")
    assert torch.equal(policy.get_input_embeddings().weight, ref.get_input_embeddings().weight)
    assert (policy.get_output_embeddings().weight != ref.get_output_embeddings().weight).any()


@pytest.mark.parametrize("M, critic", [(3, 2), (3, 0), (0, 2)])
def test_log_F_shared_between_prompts(pieces, tmp_path, M, critic):
    """On samples without rewards of bare prompts, which are added to them once."""
    argv, file = flags(own(pieces, samples=tmp_path / "samples", critic_every=critic)), tmp_path / "samples"
    succeeded(call(*argv, "--out", tmp_path / "ranks"))
    before = files(file)
    for name in ("one", "two"):
        out = succeeded(call(*argv, "--estimator", "shared", "--M", M, "--out", tmp_path / name)).stdout
        assert ("read from" in out) == (name == "two")
    after = files(file)
    assert before.items() <= after.items() and metrics_of(tmp_path / "one") == metrics_of(tmp_path / "two")
    added = [json.loads(after[name]) for name in sorted(after.keys() - before.keys())]
    empty = [line for line in added if line["split"] == "empty"]
    sampled = [p for line in added if line["split"] == "train" for p in line["prompts"]]
    assert len(sampled) == (0 if M else 18)  # without samples of its own it learns from others, here all 18
    assert sum(len(line["prompts"]) for line in empty) == (6 if M else 18)
    score = vbon.load_reward(str(pieces / "reward"), "cpu")[0]
    for line in empty:
        assert line["responses"] == [[""]] * len(line["prompts"]) and line["tokens"][0] == [[0]]
        scores = score(line["prompts"], [""] * len(line["prompts"]))
        close(doubles([r for r, in line["rewards"]]), doubles(scores), atol=1e-6)
    row = read_lines(tmp_path / "one" / "metrics.jsonl")[-1]
    assert all(math.isfinite(x) for x in row.values()) and row["objective/kl_to_bon"] > -0.5
    assert metrics_of(tmp_path / "one") != metrics_of(tmp_path / "ranks")


def test_bfloat16(pieces, tmp_path):
    changes = dict(dtype="bfloat16", lr=1e-3, out=tmp_path, samples=tmp_path / "samples")
    succeeded(call(*flags(own(pieces), **changes)))
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert rows[0]["objective/kl_to_ref"] == pytest.approx(0, abs=0.05)
    assert all(math.isfinite(x) for row in rows for x in row.values() if x is not None)
    assert all(p.dtype == torch.float32 for p in weights(tmp_path).values())
    (header,) = (tmp_path / "samples").rglob("header.json")
    assert read_json(header)["dtype"] == "bfloat16"


def test_bad_pieces(pieces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_small_models(tmp_path / "three", labels=3)
    save_small_models(tmp_path / "no_eos", eos=False)
    for name in ("cut", "shape", "bare", "wordy"):
        shutil.copytree(pieces, tmp_path / name)
        for what in ("ref", "reward"):
            folder = tmp_path / name / what
            if name == "cut":  # a download that broke off
                content = (folder / "model.safetensors").read_bytes()
                (folder / "model.safetensors").write_bytes(content[:-1000])
            elif name == "shape":
                edit(folder / "config.json", lambda config: config.update(vocab_size=300))
            elif name == "bare":
                (folder / "tokenizer.json").unlink()
                kind = {"ref": "GPT2Tokenizer", "reward": "BertTokenizer"}[what]
                edit(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class=kind))
            else:  # more tokens than the model has
                byte_tokenizer(END, "<a>", "<b>", eos_token=END, pad_token=END).save_pretrained(folder)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "fine"}\n{"prompt": 3}\n')
    (tmp_path / "utf16.jsonl").write_bytes('{"prompt": "fine"}\n'.encode("utf-16"))
    write_lines(tmp_path / "long.jsonl", [{"prompt": "short"}, {"prompt": "a prompt of more than 26 bytes"}])
    write_lines(tmp_path / "other.jsonl", [{"prompt": "x"}, {"question": "y"}])
    write_lines(tmp_path / "nothing.jsonl", [{"prompt": ""}, {"prompt": ""}])
    before = sorted(os.listdir(tmp_path))
    for changes, words in (
            (dict(reward=pieces / "ref"), ["lacks the weights"]), (dict(ref="no/such"), ["no/such", "--ref"]),
            (dict(reward="no/such-reward"), ["--reward", "no/such-reward"]),
            (dict(reward="three/reward"), ["3 labels"]), (dict(ref="no_eos/ref"), ["EOS"]),
            *(({what: f"{name}/{what}"}, [f"--{what} {name}/{what}"])
              for name in ("cut", "shape", "bare", "wordy") for what in ("ref", "reward")),
            (dict(ref=pieces), ["--ref"]), (dict(ref="./none"), ["--ref ./none"]),
            (dict(dataset="no/such-data"), ["no/such-data", "--dataset"]),
            (dict(dataset="missing.jsonl"), ["missing.jsonl"]), (dict(dataset="empty.jsonl"), ["--dataset"]),
            (dict(dataset="broken.jsonl"), ["--dataset"]), (dict(dataset="utf16.jsonl"), ["--dataset"]),
            (dict(dataset="long.jsonl"), ["1 to 26"]), (dict(dataset="other.jsonl"), ["--dataset"]),
            (dict(dataset="nothing.jsonl"), ["a prompt has 0 tokens"])):
        refused(call(*flags(own(pieces, **changes))), *words)
    assert sorted(os.listdir(tmp_path)) == before


def test_the_label_that_is_the_reward_is_named_and_taken(pieces, tmp_path, capsys):
    """Where no label is called positive, the second is taken, and said to be."""
    shutil.copytree(pieces / "reward", tmp_path / "reward")
    rewards = {}
    for names in (["NEGATIVE", "POSITIVE"], ["pos", "neg"], ["bad", "good"]):
        edit(tmp_path / "reward/config.json", lambda config: config.update(
            id2label=dict(enumerate(names)), label2id={label: i for i, label in enumerate(names)}))
        score, _ = vbon.load_reward(str(tmp_path / "reward"), "cpu")
        rewards[names[0]] = score(["a"], ["b"])[0]
        taken = next((name for name in names if name.upper().startswith("POS")), names[1])
        assert f"the probability of the label {taken!r}" in capsys.readouterr().out
    assert rewards["NEGATIVE"] == rewards["bad"] == pytest.approx(1 - rewards["pos"], abs=1e-6)


def test_a_tokenizer_that_appends_eos(pieces, tmp_path):
    """Its prompts do not end before they begin: all is as with a tokenizer that appends nothing."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer
    shutil.copytree(pieces, tmp_path / "eos")
    tokenizer = AutoTokenizer.from_pretrained(pieces / "ref")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save_pretrained(tmp_path / "eos/ref")
    assert AutoTokenizer.from_pretrained(tmp_path / "eos/ref").encode("Film")[-1] == 0
    for name, folder in (("plain", pieces), ("eos", tmp_path / "eos")):
        succeeded(call(*flags(own(folder), out=tmp_path / "run" / name, samples=tmp_path / name / "samples")))
    plain, appended = (tmp_path / name / "samples" for name in ("plain", "eos"))
    assert batches(plain) == batches(appended) and os.listdir(plain) != os.listdir(appended)
    assert same(weights(tmp_path / "run/plain"), weights(tmp_path / "run/eos"))


def test_the_folder_is_named_by_all_that_samples_depend_on(pieces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pieces, "base")
    small_lm("Llama", vocab_size=257).save_pretrained("base/ref")

    def samples_folder(folder, **changes):
        args = vbon.Args(**own(Path(folder), **changes))
        task = vbon.setup(args)
        return vbon.samples_folder(task, args), task

    def swap(a, b):
        def change(tokenizer):
            words = tokenizer["model"]["vocab"]
            words[a], words[b] = words[b], words[a]
        return change
    edits = {
        ("reward", "config.json"): lambda c: c["id2label"].update({"0": "POSITIVE", "1": "NEGATIVE"}),
        ("reward", "tokenizer_config.json"): lambda c: c.update(model_max_length=32),
        ("reward", "tokenizer.json"): swap("a", "e"), ("ref", "tokenizer.json"): swap("a", "e"),
        ("ref", "config.json"): lambda c: c["rope_parameters"].update(rope_theta=100.0)}
    path, task = samples_folder("base")
    assert read_json(f"{path}/header.json")["ref"] == task.ref_id
    shutil.copytree("base", "copy")
    assert samples_folder("copy")[0] == path  # what counts is what folders hold, not where they are
    for i, ((what, file), change) in enumerate(edits.items()):
        folder = Path(shutil.copytree("base", f"edit{i}"))
        edit(folder / what / file, change)
        other_path, other = samples_folder(folder)
        assert other_path != path
        if i == 0:
            p = other.score(["It is "], ["good"])[0]
            assert p == pytest.approx(1 - task.score(["It is "], ["good"])[0], abs=1e-6) != 0.5
    for name, value in dict(backend="vllm", temperature=0.5, no_eos_reward=-1.0, dtype="bfloat16",
                            data_seed=1, max_new_tokens=5).items():
        assert samples_folder("base", **{name: value})[0] != path
    assert samples_folder("base", seed=1, M=7, out="elsewhere")[0] == path


def test_imdb_verbatim_without_a_hub(tmp_path):
    result = command("--task", "imdb", "--N", "16", cwd=tmp_path, HF_HOME=str(tmp_path / "empty"))
    refused(result, "lvwerra/gpt2-imdb", "--ref")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "samples").exists()


def lay_out_hub(home, models, dataset, config, splits):
    """An offline cache of the hub: a snapshot of each model, and the data where `datasets` looks for it."""
    import datasets
    for name, folder in models.items():
        base = home / "hub" / ("models--" + name.replace("/", "--"))
        (base / "refs").mkdir(parents=True)
        (base / "refs/main").write_text("0" * 40)
        (base / "snapshots").mkdir()
        (base / "snapshots" / ("0" * 40)).symlink_to(folder.resolve())
    (home / "plain").mkdir()
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(home / "plain" / f"{split}-00000-of-00001.parquet")
    datasets.load_dataset(str(home / "plain"), cache_dir=str(home / "tmp"))
    made, short = next((home / "tmp").rglob("dataset_info.json")).parent, dataset.split("/")[1]
    target = home / "datasets" / dataset.replace("/", "___") / config / "0.0.0" / ("0" * 40)
    target.parent.mkdir(parents=True)
    made.rename(target)
    for path in target.glob("*.arrow"):
        path.rename(target / (short + "-" + path.name.split("-", 1)[1]))
    edit(target / "dataset_info.json", lambda info: info.update(config_name=config, dataset_name=short,
                                                                builder_name="parquet"))


def test_imdb_verbatim_from_an_offline_hub(pieces, tmp_path):
    """--task imdb with the hub's names and only its sizes cut down, from a cache that holds small models."""
    reviews = [{"text": f"Review {i} of a film that I liked — café, {i % 7} stars.", "label": i % 2}
               for i in range(40)]
    models = {"lvwerra/gpt2-imdb": pieces / "ref", "lvwerra/distilbert-imdb": pieces / "reward"}
    lay_out_hub(tmp_path / "home", models, "stanfordnlp/imdb", "plain_text",
                {"train": reviews, "test": [r | {"text": "Another " + r["text"]} for r in reviews]})
    argv = ["--task", "imdb", "--N", "16", *flags(FEW)]
    succeeded(command(*argv, cwd=tmp_path, HF_HOME=str(tmp_path / "home")))
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name == "imdb-vbon-N16-M5-seed0" and read_json(run / "result.json")["episodes"] == 16
    prompts = {s["prompt"] for s in read_lines(run / "samples.jsonl")}
    assert all("Another ".startswith(p[:8]) and 2 <= len(p) <= 8 for p in prompts), prompts


# --- tldr ---------------------------------------------------------------------------------------------------

def save_small_pythias(folder):
    """GPTNeoX models over bytes, EOS is token 0: a policy, and rewards with and without a pad token."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification
    torch.manual_seed(0)
    shape = SIZES | dict(vocab_size=258, num_hidden_layers=2, bos_token_id=0, eos_token_id=0,
                         initializer_range=0.02, max_position_embeddings=256)
    for name, pad in dict(ref=None, no_pad=None, reward="<|padding|>", judge="<|padding|>").items():
        config = GPTNeoXConfig(**shape, num_labels=1, pad_token_id=1 if pad else None)
        kind = GPTNeoXForCausalLM if name == "ref" else GPTNeoXForSequenceClassification
        model = kind(config)
        if name == "ref":  # let some responses end
            model.base_model.final_layer_norm.bias.data[0] = 1
            model.get_output_embeddings().weight.data[0, 0] = 2
        model.save_pretrained(folder / name)
        tokenizer = byte_tokenizer(END, "<|padding|>", eos_token=END, pad_token=pad, model_max_length=256)
        tokenizer.save_pretrained(folder / name)


def post(i, subreddit):
    return {"id": str(i), "subreddit": subreddit, "title": f"Title {i}", "summary": "A summary.",
            "post": f"First paragraph of {i}.\n\n" + "More of it. " * (i % 30)}


def test_tldr_verbatim_from_an_offline_hub(tmp_path):
    """The commands with the hub's names: training, both test distributions, the larger judge, Figure 5."""
    save_small_pythias(tmp_path)
    rows = [post(i, ("relationships", "relationship_advice", "tifu", "AskReddit")[i % 4]) for i in range(120)]
    hub, home = "cleanrl/EleutherAI_pythia-{}-deduped__{}__tldr", str(tmp_path / "home")
    models = {hub.format("2.8b", "sft"): tmp_path / "ref", hub.format("2.8b", "reward"): tmp_path / "reward",
              hub.format("6.9b", "reward"): tmp_path / "judge"}
    lay_out_hub(tmp_path / "home", models, "vwxyzjn/summarize_from_feedback_tldr_3_filtered", "default",
                {"train": rows[:80], "test": rows[80:]})
    sizes = FEW | dict(episodes=8, rollouts=4, test_prompts=8, max_new_tokens=8)
    succeeded(command("--task", "tldr", *flags(sizes), cwd=tmp_path, HF_HOME=home))
    run = tmp_path / "runs/tldr-vbon-N100-M5-seed0"
    config, found = read_json(run / "config.json"), read_json(run / "result.json")
    recipe = dict(estimator="smooth", temperature=0.7, lr=3e-6, adam_eps=1e-5, value_coef=0.2)
    assert recipe.items() <= config.items()
    samples = read_lines(run / "samples.jsonl")
    assert [vbon.in_distribution(s["prompt"]) for s in samples] == [True] * 8 + [False] * 8
    for s in samples:
        assert s["prompt"].endswith("\n\nTL;DR:") and len(s["prompt"].encode()) <= 256 - 8
        assert (s["reward"] == -1.0) == (not s["response"].endswith(END))
    assert found["reward"] == pytest.approx((found["in/reward"] + found["out/reward"]) / 2)
    stored = batches(tmp_path / "samples")
    assert {y.endswith(END) for line in stored for row in line["responses"] for y in row} == {True, False}
    assert all(line["split"] == "test" or vbon.in_distribution(p) for line in stored for p in line["prompts"])
    judge = ["--reward", hub.format("6.9b", "reward"), "--temperatures", 0.25, 1, "--figures", "figures"]
    figure = succeeded(command(run, *judge, cwd=tmp_path, script="evaluate.py", HF_HOME=home))
    assert "T = 0.25, judge EleutherAI_pythia-6.9b" in figure.stdout
    assert (tmp_path / "figures/tldr-temperatures.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["reward", "no_pad"])
@pytest.mark.parametrize("end", ["", END])
def test_scalar_rewards_are_read_off_the_last_token(name, end, tmp_path):
    """Padding never counts, EOS does: a text's reward depends neither on its batch nor on the one before."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    save_small_pythias(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
    texts = ["short" + end, "too long for the model " * 20 + end, "cut off"]
    by_hand = []
    for text in texts:
        ids = tokenizer("p: " + text, return_tensors="pt").input_ids[:, -256:]
        assert (ids[0, -1] == 0) == (end != "" and text.endswith(end))
        by_hand.append(model.score(model.base_model(ids).last_hidden_state[:, -1]).item())
    for before in ([], texts[2:], texts[:2], texts):
        score, reward_id = vbon.load_reward(str(tmp_path / name), "cpu", end, -1.0)
        score(["p: "] * len(before), before)
        expected = [*by_hand[:2], -1.0] if end else by_hand
        assert score(["p: "] * 3, texts) == pytest.approx(expected, abs=1e-5)
        assert score(["p: "], texts[:1]) == pytest.approx(expected[:1], abs=1e-5)
        assert ("-1.0 without" in reward_id) == (end != "")


def test_posts_are_cut_to_fit():
    count = types.SimpleNamespace(encode=str.split)
    row = {"subreddit": "tifu", "title": "T", "post": "one two three\n\nfour five\n\nsix"}
    head, tail = "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: ", "\n\nTL;DR:"
    for longest, rest in ((99, row["post"]), (11, "one two three\n\nfour five"), (8, "one two")):
        assert vbon.make_prompt(row, count, longest, None) == head + rest + tail


# --- π_ref's samples: killed, shared, damaged; several processes; vLLM -------------------------------------


def test_a_larger_M_extends_the_samples_and_what_is_lost_is_drawn_again(toy, tmp_path):
    def samples(path, **changes):
        args = toy_args(**dict(sample_batch=60, samples=str(tmp_path / path)) | changes)
        return vbon.reference_samples(toy[0], args, keep_tokens=True)
    whole = samples("whole")
    content = files(tmp_path / "whole")
    assert len(content) == 5, "several batches, of several prompts each, and the header"
    for name in content:  # any batch may be missing
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        (tmp_path / "cut" / name).unlink()
        assert samples("cut").keys() == whole.keys() and files(tmp_path / "cut") == content
    for changes in (dict(M=50), dict(M=50, test_M=20), dict(M=30)):
        more = samples("cut", **changes)
        for key, (rewards, tokens) in whole.items():
            assert torch.equal(more[key][0][:len(rewards)], rewards) and more[key][1][:len(tokens)] == tokens
            assert len(more[key][0]) == len(more[key][1]) == (changes["M"] if key[0] == "train" else 20)
    assert content.items() <= files(tmp_path / "cut").items()
    again = vbon.reference_samples(toy[0], toy_args(samples=str(tmp_path / "cut")))
    assert all(torch.equal(again[key], rewards.sort().values) for key, (rewards, _) in whole.items())
    # Two runs at once with different M: their batches overlap.
    samples("both", M=30)
    for name, batch in files(tmp_path / "whole").items():
        (tmp_path / "both" / name).write_bytes(batch)
    both, more = samples("both", M=30), samples("cut", M=30)
    assert all(torch.equal(both[key][0], more[key][0]) and both[key][1] == more[key][1] for key in both)


def test_sampling_killed_while_it_writes_ends_with_the_same_files(pieces, tmp_path):
    argv = flags(own(pieces), M=60, test_M=30, train_prompts=16, sample_batch=240)
    patch = """
replace, seen = os.replace, []
def killed(source, target):
    seen.extend([target] if "/train-" in target else [])
    if len(seen) == 3:
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = killed"""
    path = launcher(tmp_path / "killed.py", patch)
    process = start(path, *argv, "--samples", "killed", "--out", "b", cwd=tmp_path)
    succeeded(call(*argv, "--samples", tmp_path / "whole", "--out", tmp_path / "a"))
    process.communicate()
    assert process.returncode == -9 and len(batches(tmp_path / "killed")) == 2
    succeeded(call(*argv, "--samples", tmp_path / "killed", "--out", tmp_path / "b"))
    assert files(tmp_path / "killed").items() >= files(tmp_path / "whole").items()
    assert batches(tmp_path / "killed") == batches(tmp_path / "whole")
    assert len(batches(tmp_path / "whole")) > 4


def test_runs_that_draw_the_same_samples_at_once(pieces, tmp_path):
    argv = flags(own(pieces), M=100, train_prompts=16, samples="samples")
    # Each one writes a file while the other one has begun to write the same.
    path = launcher(tmp_path / "slow.py", "replace = os.replace\n"
                    "os.replace = lambda *names: time.sleep(0.5) or replace(*names)")
    runs = [start(path, *argv, "--out", f"run{i}", cwd=tmp_path) for i in range(2)]
    outputs = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    stored = batches(tmp_path / "samples")
    keys = [(batch["split"], prompt) for batch in stored for prompt in batch["prompts"]]
    assert len(keys) == len(set(keys)) == 18
    assert metrics_of(tmp_path / "run0") == metrics_of(tmp_path / "run1")
    assert "read from" in succeeded(command(*argv, "--out", "c", cwd=tmp_path)).stdout


def test_damaged_samples_are_refused(toy, tmp_path):
    args = toy_args(samples=str(tmp_path), M=4, test_M=4, sample_batch=12)
    vbon.reference_samples(toy[0], args)
    path = sorted(tmp_path.rglob("train-*.json"))[0]
    content, batch = path.read_bytes(), json.loads(path.read_bytes())
    for damage in (b"", content[:100], b"\xff" + content, b"[1]", b"[" * 100_000, b"{}",
                   *(json.dumps(batch | {name: batch[name][1:]}).encode() for name in ("prompts", "rewards"))):
        path.write_bytes(damage)
        with pytest.raises(vbon.UserError, match="is damaged, remove it") as error:
            vbon.reference_samples(toy[0], args)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.unlink()
    vbon.reference_samples(toy[0], args)
    assert path.read_bytes() == content


def test_a_reward_that_is_not_finite_names_the_response(pieces, tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(pieces / "reward", tmp_path / "reward")
    file = tmp_path / "reward/model.safetensors"
    save_file({name: x * math.nan for name, x in load_file(file).items()}, file, {"format": "pt"})
    argv = flags(own(pieces), reward=tmp_path / "reward", out=tmp_path / "run", samples=tmp_path / "samples")
    refused(call(*argv), "--reward", "nan for 'Film number")
    assert not batches(tmp_path / "samples")


def torchrun(path, *argv, cwd, **environment):
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([*head, *map(str, argv)], cwd=cwd, capture_output=True, text=True, env=environment,
                          timeout=300)


WATCHED = """
import torch
update, phases = vbon.update, []
def watched(policy, critic, *rest):
    phases.append(0)
    if os.environ.get("KILL") == os.environ["RANK"] and len(phases) == 3:
        os.kill(os.getpid(), 9)
    metrics = update(policy, critic, *rest)
    torch.save(policy.state_dict() | {"critic": critic}, "weights" + os.environ["RANK"])
    return metrics
vbon.update = watched"""


@pytest.fixture(scope="module")
def two_processes(pieces, tmp_path_factory):
    """A run of two processes: the script, its flags, its folder, what it printed."""
    folder = tmp_path_factory.mktemp("two")
    argv = flags(own(pieces), device="cpu", rollouts=16, episodes=64, lr=1e-3, save_every=1, sample_batch=10)
    path = launcher(folder / "watched.py", WATCHED)
    run = succeeded(torchrun(path, *argv, "--samples", "samples", "--out", "run", cwd=folder))
    return path, argv, folder, run.stdout


def test_two_processes_draw_the_same_samples_and_train_one_policy(pieces, two_processes, tmp_path):
    path, argv, folder, printed = two_processes
    succeeded(call(*argv, "--samples", tmp_path / "samples", "--out", tmp_path / "one"))
    assert files(tmp_path / "samples") == files(folder / "samples")
    first, second = (torch.load(folder / f"weights{rank}") for rank in (0, 1))
    saved, before = weights(folder / "run"), weights(pieces / "ref", "model.safetensors")
    assert same(first, second) and same({name: first[name] for name in saved}, saved)
    assert max((saved[name] - before[name]).abs().max() for name in before) > 2e-3
    rows = read_lines(folder / "run/metrics.jsonl")
    assert [row["episode"] for row in rows] == [16, 32, 48, 64]
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert abs(rows[0]["objective/kl_to_ref"]) < 1e-4 < abs(rows[-1]["objective/kl_to_ref"])
    assert printed.count("win rate") == 1  # one process speaks


def test_what_cannot_be_shared_out_is_refused(two_processes, tmp_path):
    uneven = torchrun(HERE / "vbon.py", *two_processes[1], "--rollouts", 15, "--minibatch", 3, cwd=tmp_path)
    line = "vbon.py: --rollouts and --minibatch must be divisible by 2, the number of processes"
    assert uneven.returncode != 0 and line in uneven.stderr, uneven.stderr
    assert os.listdir(tmp_path) == []


def test_a_killed_process_ends_the_run_which_resumes(two_processes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, argv, folder, _ = two_processes
    argv = [*argv, "--out", "run", "--samples", "samples"]
    killed = torchrun(path, *argv, cwd=tmp_path, KILL="1")
    assert killed.returncode != 0 and not (tmp_path / "run/result.json").exists()
    refused(call(*argv, "--resume"), "--resume", "2 processes")
    assert "resumed from" in succeeded(torchrun(path, *argv, "--resume", cwd=tmp_path)).stdout
    assert same(weights(folder / "run"), weights(tmp_path / "run"))
    assert metrics_of(folder / "run") == metrics_of(tmp_path / "run")


def test_resume_refuses_other_weights_behind_ref(pieces, tmp_path):
    folder = Path(shutil.copytree(pieces, tmp_path / "pieces"))
    argv = flags(own(folder), save_every=1, samples=tmp_path / "a", out=tmp_path / "run")
    stop_before_the_test(*argv)
    assert (tmp_path / "run/checkpoint.pt").exists()
    save_small_models(folder, seed=1)
    refused(call(*argv, "--resume"), "--resume", "--ref")
    shutil.rmtree(folder)
    shutil.copytree(pieces, folder)
    assert "resumed from" in succeeded(call(*argv, "--resume")).stdout


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM; .ci/run tests it")
def test_vllm_samples_the_same_distribution(tmp_path):
    """The same task by both backends: rewards agree in distribution, log-probs of the same tokens to 1e-3."""
    shared = HERE.parent / "shared"  # real small models, where they are: vLLM on a CPU may refuse tiny heads
    if (shared / "imdb-mini").exists():
        models, data = shared / "imdb-mini", shared / "imdb"
    else:
        save_small_models(tmp_path)
        models, data = tmp_path, tmp_path / "prompts.jsonl"
        write_lines(data, [{"prompt": f"Film number {i} is"} for i in range(20)])
    argv = flags(own(models, dataset=data), rollouts=16, minibatch=16, train_prompts=8, test_prompts=2, M=128,
                 test_M=8, max_new_tokens=12)
    drawn, environment = {}, {"VLLM_CPU_KVCACHE_SPACE": "1"}
    for backend, name in (("hand", "this script"), ("vllm", "vLLM")):
        paths = flags(backend=backend, samples=backend, out=backend + "-run")
        result = succeeded(command(*argv, *paths, cwd=tmp_path, **environment))
        assert f"drawn by {name}" in result.stdout
        lines = batches(tmp_path / backend)
        for split, column in itertools.product(("train", "test"), ("rewards", "tokens")):
            flat = [x for line in lines if line["split"] == split for row in line[column] for x in row]
            numbers = flat if column == "rewards" else [len(ids) for ids in flat]
            drawn.setdefault((split, column), []).append(doubles(numbers))
    for ours, theirs in drawn.values():  # rewards, and the lengths: EOS ends both alike
        assert len(ours) == len(theirs) and table_1.kolmogorov_smirnov(ours, theirs)[1] > 0.001
    (tmp_path / "log_probs.py").write_text(f"""
import json
import os
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm, out = LLM(model={str(models / "ref")!r}, dtype="float32", seed=0), []
    line = json.load(open({str(min((tmp_path / "hand").rglob("train-*.json")))!r}))
    for text, (tokens, *_) in zip(line["prompts"][:3], line["tokens"]):
        prompt = llm.get_tokenizer().encode(text)
        (got,) = llm.generate([{{"prompt_token_ids": prompt + tokens}}],
                              SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        log_probs = got.prompt_logprobs[len(prompt):]
        out.append([prompt, tokens, [entry[t].logprob for entry, t in zip(log_probs, tokens)]])
    with open("log_probs.json", "w") as file:
        json.dump(out, file)
    llm.llm_engine.engine_core.shutdown()
    os._exit(0)  # threads that vLLM leaves behind may abort a plain exit
""")
    subprocess.run([sys.executable, "log_probs.py"], cwd=tmp_path, check=True, env=os.environ | environment)
    from transformers import AutoModelForCausalLM
    lm = AutoModelForCausalLM.from_pretrained(models / "ref", dtype=torch.float32)
    for prompt, tokens, theirs in read_json(tmp_path / "log_probs.json"):
        with torch.no_grad():
            logits = lm(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1]
        close(vbon.token_log_probs(logits, torch.tensor(tokens)), torch.tensor(theirs), atol=1e-3, rtol=0)


def readme_trainer(replacements):
    """The README's code for TRL, with these names and numbers in the place of its own."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in readme.split("```python\n") if "RLOOTrainer(" in block]
    code = code.split("```")[0]
    for old, new in replacements.items():
        assert old in code
        code = code.replace(old, new)
    return code


@pytest.fixture(scope="module")
def exported(pieces, tmp_path_factory):
    """A folder with the samples of a run as TRL's data, and the README's code with its paths."""
    folder = tmp_path_factory.mktemp("exported")
    succeeded(call(*flags(own(pieces), samples=folder / "s", out=folder / "run")))
    evaluated("--export", *(folder / "s").iterdir(), folder / "theirs.jsonl")
    names = {"my-model": str(pieces / "ref"), "my-classifier": str(pieces / "reward"), '"cuda"': '"cpu"',
             "theirs.jsonl": str(folder / "theirs.jsonl"), "runs/rloo": str(folder / "rloo")}
    return folder, names


def test_the_reward_for_trl_is_the_objective(exported, monkeypatch):
    """Called as TRL does, a prompt and a list of its rewards a row; vbon and bound differ by a constant."""
    folder, names = exported
    made = {}
    trl = types.SimpleNamespace(RLOOConfig=lambda *_, **settings: made.update(settings),
                                RLOOTrainer=lambda *_, **given: made.update(given) or unittest.mock.Mock())
    monkeypatch.setitem(sys.modules, "trl", trl)
    exec(readme_trainer(names), {"__name__": "readme"})
    row = made["train_dataset"][0]
    rewards = made["reward_funcs"](
        prompts=[row["prompt"]] * 2, completions=[" good", " bad"], completion_ids=[[1], [2]],
        ref_rewards=[row["ref_rewards"], row["ref_rewards"][:3]], trainer_state=None)  # prompts may differ in M
    score, _ = vbon.load_reward(names["my-classifier"], "cpu")
    scores = doubles(score([row["prompt"]] * 2, [" good", " bad"]))
    log_F = torch.stack([vbon.estimate_log_F(scores[0], row["ref_rewards"]),
                         vbon.estimate_log_F(scores[1], row["ref_rewards"][:3])])
    close(doubles(rewards), 15 / 16 * log_F)
    assert made["beta"] == 1 / 16
    exact = vbon.vbon_reward(log_F, doubles(-40.0), 16)
    close(exact - doubles(rewards), torch.full((2,), math.log(16) / 16, dtype=torch.double))


def fill_positions(lm, args, kwargs):
    """A hook for models with learned positions, which TRL leaves without them where prompts are padded."""
    if kwargs.get("position_ids") is None:
        kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return args, kwargs


def test_the_readme_trains_with_trl_and_its_advantages_are_ours(exported, monkeypatch):
    """RLOO's are the sums over tokens of vbon.py's rewards, less the mean of the prompt's other three."""
    trl = pytest.importorskip("trl")
    from transformers import AutoTokenizer
    names, kls = exported[1], []
    score, _ = vbon.load_reward(names["my-classifier"], "cpu")
    tokenizer = AutoTokenizer.from_pretrained(names["my-model"])

    @torch.no_grad()
    def our_advantages(policy, ref, rows, theirs):
        tokens, mask = theirs["completion_ids"], theirs["completion_mask"].bool()
        rollout = vbon.Rollout(torch.cat([theirs["prompt_ids"], tokens[:, :-1]], 1),
                               torch.cat([theirs["prompt_mask"].bool(), mask[:, :-1]], 1), tokens, mask)
        log_pi, log_ref = (vbon.response_log_probs(lm, rollout, 1.0)[0] * mask for lm in (policy, ref))
        kls.append((log_pi - log_ref).sum(1))
        texts = tokenizer.batch_decode(vbon.token_lists(rollout), skip_special_tokens=True)
        scores = torch.tensor(score([row["prompt"] for row in rows], texts))
        log_F = vbon.estimate_log_F(scores, torch.tensor([row["ref_rewards"] for row in rows]))
        rewards = (log_ref - log_pi) / 16
        rewards[range(len(rows)), mask.sum(1) - 1] += vbon.vbon_reward(log_F, log_ref.sum(1), 16).float()
        returns = vbon.gae(rewards, torch.zeros_like(rewards), mask, lam=1.0)[1][:, 0].view(-1, 4)
        return (returns - (returns.sum(1, keepdim=True) - returns) / 3).flatten()

    class Compared(trl.RLOOTrainer):
        def _generate_and_score_completions(self, rows):
            models = self.model, self.ref_model
            hooks = [lm.register_forward_pre_hook(fill_positions, with_kwargs=True) for lm in models]
            theirs = super()._generate_and_score_completions(rows)
            close(theirs["advantages"], our_advantages(*models, rows, theirs), atol=1e-5, rtol=0)
            for hook in hooks:
                hook.remove()
            return theirs
    monkeypatch.setattr(trl, "RLOOTrainer", Compared)
    steps = {"max_steps=100": "max_steps=3, use_cpu=True, bf16=False, report_to=[]", "size=32": "size=8",
             "length=40": "length=6", "1e-5": "1e-2"}
    exec(readme_trainer(names | steps), {"__name__": "readme"})
    assert len(kls) == 3 and kls[0].abs().max() < 1e-4 < 0.1 < kls[2].abs().max()


# --- bon_baselines.py ---------------------------------------------------------------------------------------


def test_best_of_n_and_its_expectation_by_brute_force():
    assert bon_baselines.best_of_n(torch.tensor([[1.0, 5.0, 2.0], [3.0, 3.0, 0.0]])).tolist() == [1, 0]
    rewards = doubles([[0.3, -2.0, 0.3, 7.0, 1.0, -0.5, 2.5], [1.0, 1.0, 1.0, 0.0, 0.0, 5.0, -1.0]])
    for N in range(1, 8):
        expected = rewards[:, list(itertools.combinations(range(7), N))].amax(-1).mean(-1)
        close(bon_baselines.expected_best_of_n(rewards, N), expected)
    for N in (0, 8, 2.5):
        with pytest.raises(ValueError, match="from 1 to M"):
            bon_baselines.expected_best_of_n(rewards, N)


@pytest.mark.parametrize("N", [1, 2, 1000, 50_000, 100_000])
def test_expected_best_of_n_is_stable_for_many_rewards(N):
    """Of the numbers 1 … M the highest of N without replacement is N(M+1)/(N+1) on average."""
    M = 100_000
    value = bon_baselines.expected_best_of_n(1 + torch.randperm(M, generator=seeded()), N)
    assert value.item() == pytest.approx(N * (M + 1) / (N + 1), rel=1e-9)


def test_losses_of_the_baselines_by_hand():
    best, worst, ref_best, ref_worst = doubles([-10.0, -12.0], [-9.0, -14.0], [-11.0, -11.0], [-9.5, -12.0])
    h = [(-10 + 11) - (-9 + 9.5), (-12 + 11) - (-14 + 12)]  # 0.5, 1
    assert bon_baselines.sft_loss(best).item() == pytest.approx(11)
    dpo = bon_baselines.dpo_loss(best, worst, ref_best, ref_worst, 0.3).item()
    assert dpo == pytest.approx(sum(math.log1p(math.exp(-0.3 * x)) for x in h) / 2)
    for bad in (0, 2.5):
        with pytest.raises(ValueError, match="whole number"):
            bon_baselines.bonbon_beta(bad)
    assert bon_baselines.bonbon_beta(8) == pytest.approx(0.02755, abs=5e-6)
    assert bon_baselines.bonbon_beta(1) == math.inf
    target = 3 * (1 + 1 / 2 + 1 / 3)  # N = 4
    contrast = sum((x - target) ** 2 for x in h) / 2
    value = bon_baselines.bonbon_loss(best, worst, ref_best, ref_worst, 4, alpha=0.2).item()
    assert value == pytest.approx(0.2 * 11 + 0.8 * contrast)


def test_bonbon_balances_its_terms():
    best, *others = doubles([-10.0, -12.0], [-9.0, -14.0], [-11.0, -11.0], [-9.5, -12.0])
    fixed = best.clone().requires_grad_()
    loss = bon_baselines.bonbon_loss(best.requires_grad_(), *others, 4)
    loss.backward()
    likelihood, contrast = 11.0, bon_baselines.bonbon_loss(best.detach(), *others, 4, alpha=0).item()
    alpha = contrast / (likelihood + contrast)
    assert alpha * likelihood == pytest.approx((1 - alpha) * contrast)
    assert loss.item() == pytest.approx(2 * alpha * likelihood)
    bon_baselines.bonbon_loss(fixed, *others, 4, alpha=alpha).backward()
    close(best.grad, fixed.grad)  # nothing flows through α


def test_bond_by_hand():
    rewards, anchor_rewards = doubles([1.0, 1.0, 1.0, 3.0], [[2.0, 1.5], [0.5, 2.0], [1.0, 2.0], [2.0, 0.0]])
    reward = bon_baselines.bond_reward(rewards, anchor_rewards)
    close(reward, doubles([-math.log(16), 0.0, 0.0, 0.0]))  # a tie is not worse
    assert -math.log(16) * 0.5 ** 2 == pytest.approx(math.log(0.5))  # F = ½: half of half is worse than both
    best, own, anchor = (x.requires_grad_() for x in doubles(
        [-10.0, -12.0, -8.0, -9.0], [-7.0, -9.0, -11.0, -6.0], [-8.0, -9.5, -9.0, -6.0]))
    loss = bon_baselines.bond_loss(best, own, anchor, reward, beta=0.25, gamma=0.5)
    factor = [0.25 * (-math.log(16) - 1) - 0.5, 0.25 * -0.5 - 0.5 * 0.5, 0.25 * 2 + 0.5 * 2, 0]
    less = [f - (sum(factor) - f) / 3 for f in factor]
    on_own = less[0] * 7 + less[1] * 9 + less[2] * 11 + less[3] * 6
    assert loss.item() == pytest.approx(0.75 * 39 / 4 + on_own / 4)
    loss.backward()
    close(best.grad, torch.full((4,), -0.75 / 4).double())
    close(own.grad, -doubles(less) / 4)
    assert anchor.grad is None
    one = [x[:1].detach() for x in (best, own, anchor, reward)]  # a single response has no others
    assert bon_baselines.bond_loss(*one).item() == pytest.approx(0.5 * 10 + 7 * (0.5 * (-math.log(16) - 1)))


def test_bond_has_the_gradient_of_its_divergences():
    """Ten responses that are distributed exactly as the policy, and ten as another distribution."""
    n, beta, gamma = 10, 0.3, 0.7
    theta = doubles([0.1, 0.2, 0.3, 0.4]).log().requires_grad_()
    log_pi, (anchor, reward) = theta.log_softmax(0), doubles([0.4, 0.3, 0.2, 0.1], [-2.0, -1.0, 0.0, 0.0])
    own, best = torch.tensor([[0, 1, 1, 2, 2, 2, 3, 3, 3, 3], [0, 1, 2, 2, 2, 3, 3, 3, 3, 3]])
    loss = bon_baselines.bond_loss(log_pi[best], log_pi[own], anchor.log()[own], reward[own], beta, gamma)
    kl = torch.sum(log_pi.exp() * (log_pi - anchor.log()))
    backward = beta * (kl - torch.sum(log_pi.exp() * reward)) + gamma * kl
    forward = -(1 - beta) * torch.sum(torch.bincount(best).double() / n * log_pi)
    # The mean of the others instead of all stretches what it is subtracted from by n/(n−1).
    expected = torch.autograd.grad(forward + n / (n - 1) * backward, theta, retain_graph=True)[0]
    close(torch.autograd.grad(loss, theta)[0], expected)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_losses_agree_with_trl(kind):
    """TRL's DPOTrainer on the same log-probs; its IPO is per token: responses of one token are compared."""
    pytest.importorskip("trl")
    from collections import defaultdict
    from unittest.mock import MagicMock
    from trl import DPOTrainer
    tokens, beta, N = 1 if kind == "ipo" else 5, 0.3, 8
    ids, ref = torch.randint(20, (6, 3 + tokens), generator=seeded()), -5 * torch.rand(6, generator=seeded())
    logits = torch.randn(6, 3 + tokens, 20, generator=seeded())
    mask = (torch.arange(3 + tokens) >= 3).long().expand(6, -1)
    trainer = MagicMock(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=[kind], loss_weights=[1.0], use_weighting=False, _total_train_tokens=0, _tp_size=1,
        beta=beta if kind == "sigmoid" else bon_baselines.bonbon_beta(N),
        _metrics=defaultdict(lambda: defaultdict(list)))
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda x: x
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask,
              "ref_chosen_logps": ref[:3], "ref_rejected_logps": ref[3:]}
    log_probs = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2) * mask[:, 1:]
    outputs = types.SimpleNamespace(logits=logits, log_probs=log_probs, is_top1=log_probs > 0,
                                    entropy=log_probs, mean_logits=log_probs)
    expected = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    pair = vbon.token_log_probs(logits[:, 2:-1], ids[:, 3:]).sum(1).chunk(2)
    ours = (bon_baselines.dpo_loss(*pair, ref[:3], ref[3:], beta) if kind == "sigmoid" else
            bon_baselines.bonbon_loss(*pair, ref[:3], ref[3:], N, alpha=0.0))
    torch.testing.assert_close(ours, expected)


def test_bonbons_identity_on_the_toy(toy):
    """E[log-ratio of the best] − E[log-ratio of the worst] = (N−1)·H_{N−1} under exact Best-of-N, for a
    continuous reward; the toy's responses have mass, which the difference of F at their two ends bounds."""
    N = 4
    world = vbon.ExactWorld(toy[0], toy_args(N=N))
    F, p, best = (x.exp() for x in (world.log_F, world.log_ref, world.log_bon))
    worst = (1 - F).clamp(min=0) ** N - (1 - F - p).clamp(min=0) ** N
    close(worst.sum(1), torch.ones(4).double(), atol=1e-4)
    value = ((best - worst) * (world.log_bon - world.log_ref)).sum(1)
    expected = (N - 1) * sum(1 / k for k in range(1, N))
    assert 1 / (2 * bon_baselines.bonbon_beta(N)) == pytest.approx(expected)
    assert ((value / expected - 1).abs() < 0.05).all(), value / expected


def baseline_args(**changes):
    return bon_baselines.Args(**TOY | dict(objective="dpo", device="cpu", out="unused") | changes)


def test_pairs_of_the_baselines(toy, tmp_path):
    task, args = toy[0], baseline_args(N=5, samples=str(tmp_path / "samples"))
    samples = vbon.reference_samples(task, args, keep_tokens=True)
    reward = {(prompt, tuple(y)): r for prompt in task.train_prompts
              for r, y in zip(samples["train", prompt][0].tolist(), samples["train", prompt][1])}

    def pairs(number, prompts=task.train_prompts):
        stream = bon_baselines.training_pairs(samples, prompts, args, random.Random(0))
        return list(itertools.islice(stream, number))
    some = pairs(100)
    assert all(reward[p, tuple(y)] > reward[p, tuple(z)] for p, y, z in some)
    assert len({p for p, *_ in some}) == 4
    one_pass = pairs(12, task.train_prompts[:1])
    assert len({tuple(y) for _, *both in one_pass for y in both}) <= 6  # twelve pairs of six responses
    args.objective = "bonbon"
    gaps = [[reward[p, tuple(y)], reward[p, tuple(z)]] for p, y, z in pairs(2000)]
    for values, sign in zip(zip(*gaps), (1, -1)):  # the mean over random groups of N is the unbiased estimate
        expected = np.mean([sign * bon_baselines.expected_best_of_n(sign * samples["train", p][0], 5).item()
                            for p in task.train_prompts])
        assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / math.sqrt(2000))


@pytest.mark.parametrize("K", [1, -1])
def test_log_probs_of_the_baselines_are_those_of_sampling(toy, K):
    task, args = toy[0], baseline_args(temperature=0.7, unfrozen_layers=K)
    policy = vbon.make_policy(task.ref, 1)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=seeded()))
    prompts = ["the plot was", "plot was", "the the acting was"] * 4  # padded on the left, then
    ids, uniforms = [task.encode(p) for p in prompts], torch.rand(12, 3, generator=seeded(1))
    rollout = vbon.generate(policy, ids, uniforms, task.tokenizer.eos_token_id, 0.7)
    responses = vbon.token_lists(rollout)
    log_pi, log_ref = bon_baselines.response_log_probs(policy, task, prompts, responses, args)
    assert log_pi.requires_grad and not log_ref.requires_grad
    close(log_pi.detach(), rollout.log_probs.sum(1), atol=1e-4, rtol=1e-4)
    for prompt, response, found in zip(ids, responses, log_ref):
        with torch.no_grad():
            logits = task.ref(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
        expected = (logits / 0.7).log_softmax(-1)[range(len(response)), response].sum()
        close(found, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(log_pi, log_ref, atol=0.1)


def test_on_policy_loss(toy, monkeypatch):
    """The shared trunk changes nothing; and the loss is that of the responses that were drawn."""
    task, prompts = toy[0], ["the plot was", "the the acting was"] * 8
    policy, anchor = (vbon.make_policy(task.ref, 1) for _ in range(2))
    with torch.no_grad():
        for i, lm in enumerate((policy, anchor)):
            for p in lm.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=seeded(i)))
    trained = [p for p in policy.parameters() if p.requires_grad]
    drawn, found = [], []
    sample = bon_baselines.sample
    monkeypatch.setattr(bon_baselines, "sample", lambda *args: drawn.append(sample(*args)) or drawn[-1])
    for K in (1, -1):
        args = baseline_args(temperature=0.7, unfrozen_layers=K, gamma=0.5)
        loss, kl = bon_baselines.on_policy_loss(policy, anchor, task, prompts, args, seeded())
        found.append((loss, kl, *torch.autograd.grad(loss, trained)))
    for x, y in zip(*found):
        close(x, y, atol=1e-4, rtol=1e-4)
    (own, texts, rewards), (pairs, _, anchor_rewards) = drawn[-2:]
    assert own.trunk is None and drawn[0][0].trunk is not None
    assert rewards.tolist() == [vbon.warmth(y) for y in texts] and len(texts) == 16

    def log_probs(lm, responses):
        return bon_baselines.response_log_probs(lm, task, prompts, responses, args)[0].detach()
    mine, theirs = vbon.token_lists(own), vbon.token_lists(pairs)
    better = [theirs[2 * i + (anchor_rewards[2 * i + 1] > anchor_rewards[2 * i])] for i in range(16)]
    reward = bon_baselines.bond_reward(rewards, anchor_rewards.view(16, 2))
    assert 0 < (reward < 0).sum() < 16
    expected = bon_baselines.bond_loss(log_probs(policy, better), log_probs(policy, mine),
                                       log_probs(anchor, mine), reward, gamma=0.5)
    close(found[1][0].detach().double(), expected, atol=1e-3, rtol=1e-4)
    close(found[1][1], (own.log_probs.sum(1) - log_probs(task.ref, mine)).mean(), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def baselines(toy):
    """The folder of the toy's runs, with one of each method beside them."""
    for method in bon_baselines.METHODS:
        argv = flags(TOY, N=4, episodes=4096, out=toy[1] / method, samples=toy[1] / "samples")
        succeeded(call(method, *argv, script=bon_baselines))
    return toy[1]


@pytest.mark.parametrize("method", bon_baselines.METHODS)
def test_baselines_on_the_toy(baselines, method):
    result, reference = (read_json(baselines / run / "result.json") for run in (method, "one"))
    assert set(reference) - {"seconds_sampling", "exact/kl_to_bon_of_optimum", "episodes"} <= set(result)
    assert result["exact/win_rate"] > 0.6 and result["exact/kl_to_ref"] > 0.1
    assert result["exact/reward"] > result["ref/reward"] + 0.5
    if method == "bon":  # what was drawn agrees with what is known
        for name in ("reward", "win_rate", "kl_to_ref"):
            assert result[name] == pytest.approx(result["exact/" + name], abs=4 * result[name + "_se"])
        assert result["bon/expected_reward"] == pytest.approx(result["exact/reward"], abs=0.5)
        assert abs(result["exact/kl_to_bon"]) < 1e-9 and abs(result["exact/win_rate"] - 0.8) < 0.02
        assert result["exact/effective_N"] == pytest.approx(4, rel=0.01)
        assert result["effective_N"] == pytest.approx(4, abs=1) and abs(result["excess_kl"]) < 0.05
        assert abs(result["exact/excess_kl"]) < 1e-3
    else:
        assert result["exact/kl_to_bon"] > 0 and (baselines / method / "policy/model.safetensors").exists()
    if method == "bond":  # it is past Best-of-2: the anchor moves
        assert result["exact/effective_N"] > 2.5 and result["exact/excess_kl"] < 0.2


def test_bon_over_a_trained_run_leaves_no_policy(toy, tmp_path):
    run = Path(shutil.copytree(toy[1] / "one", tmp_path / "run"))
    argv = ["bon", *flags(TOY, N=4, out=run, samples=toy[1] / "samples")]
    refused(call(*argv, script=bon_baselines), "--overwrite")
    assert (run / "policy").exists()
    succeeded(call(*argv, "--overwrite", script=bon_baselines))
    assert not (run / "policy").exists() and read_json(run / "result.json")["objective"] == "bon"


def test_baselines_on_own_models(pieces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in sorted(bon_baselines.METHODS, key=["bon", "bond"].__contains__, reverse=True):
        succeeded(call(method, *flags(own(pieces), out=method), script=bon_baselines))
        result = read_json(Path(method) / "result.json")
        assert 0 < result["reward"] < 1 and 0 <= result["win_rate"] <= 1
        (folder,) = Path("samples").iterdir()  # all of them learn from the same samples, but these two
        splits = {batch["split"] for batch in batches(folder)}
        assert splits == ({"test"} if method in ("bon", "bond") else {"train", "test"})


@pytest.mark.parametrize("argv, word", [
    ("", "objective"), ("ppo", "bonbon"), ("bonbon --N 2.5", "whole number"), ("dpo --beta 0", "--beta"),
    ("bonbon --alpha 2", "--alpha"), ("bond --eta 2", "--eta"), ("bond --gamma nan", "--gamma"),
    ("dpo --minibatch 64 --episodes 32", "--episodes"),
    ("dpo --ref gpt2", "--task imdb"), ("bon --max-new-tokens 6", "at most 4"), ("bon --seed x", "--seed")])
def test_bad_flags_of_the_baselines(argv, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(call(*argv.split(), script=bon_baselines), word)
    assert not os.listdir(tmp_path)


# --- evaluate.py --------------------------------------------------------------------------------------------


def evaluated(*argv):
    return succeeded(call(*argv, script=evaluate)).stdout


def test_pareto_front_by_hand():
    points = [(1, 2), (2, 2), (2, 3), (3, 3), (1, 2), (0, 0)]
    assert evaluate.pareto_front(points) == [True, False, True, False, True, True]
    runs = [{"method": m, "result": {"kl_to_ref": x, "win_rate": y}} for m, x, y in
            (("vBoN", 1, 0.8), ("vBoN", 2, 0.9), ("PPO", 1.5, 0.7), ("PPO", 0.5, 0.6), ("BoN", 0.1, 0.99))]
    assert evaluate.front_shares(runs, "win_rate") == {"vBoN": 2 / 3, "PPO": 1 / 3}


def test_kolmogorov_smirnov():
    a = torch.arange(100.0)
    assert table_1.kolmogorov_smirnov(a, a) == (0, 1)
    D, p = table_1.kolmogorov_smirnov(a, a + 1000)
    assert D == 1 and p < 1e-20
    generator, rejected = seeded(), 0
    for _ in range(400):  # two samples of one law are told apart in about 5 % of cases
        two = (torch.rand(n, generator=generator) for n in (100, 200))
        rejected += table_1.kolmogorov_smirnov(*two)[1] < 0.05
    assert 6 <= rejected <= 34
    two = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([1.5, 2.5])
    assert table_1.kolmogorov_smirnov(*two)[0] == pytest.approx(0.5)


def test_evaluate_table_csv_and_figures(baselines, tmp_path):
    runs = [baselines / name for name in ("one", "three")]
    table = evaluated(*runs, "--csv", tmp_path / "toy.csv", "--figures", tmp_path, "--curves")
    results = [read_json(run / "result.json")["exact/kl_to_bon"] for run in runs]
    assert f"{np.mean(results):.3f} ± {np.std(results, ddof=1) / math.sqrt(2):.3f}" in table
    assert "N = 16, closed forms" in table and len((tmp_path / "toy.csv").read_text().splitlines()) == 3
    methods = [baselines / method for method in bon_baselines.METHODS]
    table = evaluated(*runs, *methods, "--figures", tmp_path, "--responses", 1)
    assert all(name in table for name in ("vBoN, N = 16", "BoN-SFT, N = 4", "DPO, β = 0.1", "BoNBoN, N = 4",
                                          "BOND, steps = 64", "share of the Pareto front", "the acting was"))
    evaluated(*runs, "--figures", tmp_path, "--against", "seconds_sampling")
    for name in ("toy.png", "toy-pareto.png", "toy-excess.png", "toy-M.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_curves_of_rollouts():
    metrics = [{"episode": e, "objective/kl_to_bon": float(e)} for e in range(1, 65)]
    smoothed = evaluate.curve({"metrics": metrics}, "kl_to_bon")
    assert len(smoothed) == 61 and smoothed[4] == 2.5 and smoothed[64] == 62.5
    metrics[9]["exact/kl_to_bon"] = 0.5
    assert evaluate.curve({"metrics": metrics}, "kl_to_bon") == {10: 0.5}
    assert evaluate.curve({"metrics": metrics}, "excess_kl") == {}


def test_other_temperatures_and_another_judge(pieces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge = tmp_path / "second/reward"
    save_small_models(tmp_path / "second", seed=5)
    for method in ("bon", "dpo"):
        succeeded(call(method, *flags(own(pieces), out=method), script=bon_baselines))
    out = evaluated("bon", "dpo", "--temperatures", 0.5, 1, "--reward", judge, "--figures", "figures",
                    "--csv", "anew.csv")
    assert "T = 0.5" in out and "judge reward" in out and Path("figures/imdb-temperatures.png").exists()
    with open("anew.csv", newline="", encoding="utf-8") as file:
        (anew,) = [row for row in csv.DictReader(file) if row["run"] == "dpo" and row["temperature"] == "1.0"]
    before = read_json("dpo/result.json")
    assert float(anew["reward"]) != before["reward"]
    assert float(anew["kl_to_ref"]) == pytest.approx(before["kl_to_ref"], rel=1e-4)  # the same responses
    # The judge has scored what was stored. Drawn anew it is the same.
    scored = {name: json.loads(batch) for name, batch in files("samples").items() if "test-" in name}
    shutil.rmtree("samples")
    succeeded(call("bon", *flags(own(pieces, reward=judge), out="by-judge"), script=bon_baselines))
    for name, drawn in files("samples").items():
        if "test-" in name:
            found = scored[name]
            close(doubles(found.pop("rewards")), doubles((batch := json.loads(drawn)).pop("rewards")), atol=1e-6)
            assert found == batch


def test_samples_needed(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vbon.reference_samples(toy[0], toy_args(samples="samples", M=600))
    out = succeeded(call(*Path("samples").iterdir(), ".", script=table_1)).stdout
    assert "4 prompts" in out and Path("log_F.png").exists()
    rows = [line.split() for line in out.splitlines() if line.split()[0].isdigit() and "prompts" not in line]
    statistics = [float(row[-1]) for row in rows]
    assert len(statistics) == 6 and statistics[0] > statistics[-1]


def test_floors_of_shared_log_F(pieces, tmp_path, monkeypatch):
    draws = normals(40, 1000, 0).sort(1).values
    for N in (16, 64):  # what the truth's own draws add is what M = 1000 samples would cost
        assert floors.noise(draws, N, 10).mean() == pytest.approx((N - 1) / 4000, rel=0.1)
    samples = normals(40, 32, 1)
    found = floors.floor(floors.by_ranks(draws, samples), torch.special.log_ndtr(draws), 16).mean()
    assert found == pytest.approx(floor(add_one(draws, samples), torch.special.log_ndtr(draws), 16))
    assert found == pytest.approx(15 / 128, rel=0.3)
    monkeypatch.setattr(floors, "HERE", tmp_path / "results")
    (tmp_path / "results").mkdir()
    monkeypatch.setenv("JUDGE", str(pieces / "reward"))
    argv = flags(own(pieces, M=200, test_M=260, train_prompts=16, samples=tmp_path / "samples"))
    out = succeeded(call(*argv, script=floors)).stdout
    assert out.count("shared, bare prompt: about") == 1 and (tmp_path / "figures" / "shared.png").exists()
    _, *lines = (tmp_path / "results" / "shared.csv").read_text().splitlines()
    assert len(lines) == 3 * (3 * 5 + 1) * 4
    assert all(math.isfinite(float(line.split(",")[-2])) for line in lines)
    refused(call(*argv, "--test-M", "100", script=floors), "--test-M")


def test_the_ceiling_looks_one_token_ahead(pieces, tmp_path, monkeypatch):
    u = normals(20_000, 1, 0).flatten()
    y = torch.exp(0.5 * u - 1) * -torch.log(torch.rand(len(u), generator=seeded()).double())
    close(ceiling.fit_log_Z(u, y), doubles([-1, 0.5, 0, 0]), atol=0.06)  # E[y | u] = exp(u/2 − 1)
    argv = flags(own(pieces, N=4, M=8, estimator="add_one", samples=tmp_path / "samples", out=tmp_path / "run"))
    monkeypatch.setattr(ceiling, "CANDIDATES", 1)  # no choice: this is π_ref, which costs nothing
    kl = float(succeeded(call(*argv, script=ceiling)).stdout.split()[-12])
    assert kl == 0
    monkeypatch.setattr(ceiling, "CANDIDATES", 8)
    assert float(succeeded(call(*argv, script=ceiling)).stdout.split()[-12]) > 0
    assert not (tmp_path / "run").exists()


def test_export_of_samples(pieces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    succeeded(call(*flags(own(pieces)), "--samples", "s", "--out", "a"))
    (folder,) = Path("s").iterdir()
    assert "of 6 training prompts" in evaluated("--export", folder, "theirs.jsonl")
    stored = [batch for batch in batches("s") if batch["split"] == "train"]
    expected = [dict(zip(("prompt", "responses", "rewards"), row)) for batch in stored
                for row in zip(batch["prompts"], batch["responses"], batch["rewards"])]
    assert read_lines("theirs.jsonl") == expected and len(expected) == 6


def test_evaluate_refuses(baselines, pieces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    succeeded(call("bon", *flags(own(pieces), out="imdb"), script=bon_baselines))
    one, copied = baselines / "one", shutil.copytree(baselines / "one", "copied")
    Path("few").mkdir()
    Path("few/header.json").write_text("{}")
    for argv, word in (
            (["run"], "not a finished run"), ([one, "imdb"], "different tasks"), ([], "nothing to evaluate"),
            (["imdb", "--reward", "no/such-judge"], "--reward"), ([one, "--reward", "x"], "--task imdb"),
            (["imdb", "--figures", "x", "--curves"], "--curves"),
            ([one, copied], "a seed comes twice"), ([one, "--responses", "-1"], "--responses"),
            ([one, "--csv", "run"], "is a folder"),
            ([one, "--temperatures", "hot"], "--temperatures"), (["--nonsense"], "--nonsense"),
            ([one, "--temperatures", "-1"], "--temperatures"),
            ([one, "--temperatures", "1", "--curves"], "not allowed"), (["--export", "none", "x"], "none")):
        refused(call(*argv, script=evaluate), word)
    for argv, word in ((["few"], "600 samples"), (["none"], "600 samples"), ([], "name a folder")):
        refused(call(*argv, script=table_1), word)
