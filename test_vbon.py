"""Tests of vbon.py, bon_baselines.py and evaluate.py:  python -m pytest test_vbon.py

The mathematics is held against brute force, 50-digit arithmetic and simulation; the training code against the library's
forward passes and hand-worked cases; the command line as a user would call it, offline, on small models made here.
"""
import contextlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported: a test must not wait for a hub

import mpmath
import numpy as np
import pytest
import torch

import bon_baselines
import evaluate
import vbon

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"
DEVICE = torch.device("cpu")


def random_world(S, seed, concentration=1.0):
    """p (S,) sorted by ascending reward, F (S,) its strict CDF."""
    p = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(S, concentration)))
    return p, (p.cumsum(0) - p).clamp(min=0)


# --- the PMF ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 2, 3, 5])
def test_pmf_is_the_frequency_of_all_N_tuples(N):
    p, F = random_world(5, N)
    expected = torch.zeros(5, dtype=torch.double)
    for draws in itertools.product(range(5), repeat=N):
        expected[max(draws)] += math.prod(p[i].item() for i in draws)
    torch.testing.assert_close(vbon.log_bon_pmf(F.log(), p.log(), N).exp(), expected, rtol=1e-12, atol=1e-14)


def exact_log_pmf(log_F, log_p, N):
    with mpmath.workdps(60):
        F, p, N = mpmath.exp(mpmath.mpf(log_F)) if log_F > -math.inf else mpmath.mpf(0), mpmath.exp(mpmath.mpf(log_p)), mpmath.mpf(N)
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
        yield math.log(F), math.log((1 - F) * (1 - rng.random() * 10.0 ** rng.uniform(-9, 0))), float(10 ** rng.uniform(0, 6))


def test_pmf_agrees_with_50_digit_arithmetic():
    for log_F, log_p, N in pmf_cases():
        value = vbon.log_bon_pmf(torch.tensor(log_F, dtype=torch.double), torch.tensor(log_p, dtype=torch.double), N).item()
        expected = exact_log_pmf(log_F, log_p, N)
        assert abs(value - expected) <= 1e-10 * max(1, abs(expected)), (log_F, log_p, N, value, float(expected))


def test_pmf_gradients_are_right_and_finite_where_the_value_is():
    for log_F, log_p, N in itertools.islice(pmf_cases(), 0, 384):
        x = torch.tensor([log_F, log_p], dtype=torch.double, requires_grad=True)
        value = vbon.log_bon_pmf(x[0], x[1], N)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all(), (log_F, log_p, N, x.grad)
    inputs = [torch.tensor([-1.2, -0.3, -5.0], dtype=torch.double, requires_grad=True),
              torch.tensor([-0.9, -2.0, -3.0], dtype=torch.double, requires_grad=True)]
    assert torch.autograd.gradcheck(lambda a, b: vbon.log_bon_pmf(a, b, 7.5), inputs)


def test_pmf_has_no_nan_and_keeps_its_dtype():
    inf = math.inf
    values = vbon.log_bon_pmf(torch.tensor([-inf, -inf, -1.0, 0.0]), torch.tensor([-inf, 0.0, -inf, -inf]), 16)
    assert values.tolist() == [-inf, 0.0, -inf, -inf]
    assert values.dtype == torch.float32
    assert vbon.log_bon_pmf(torch.zeros(2, 1).double(), torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])).shape == (2, 3)


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
        torch.testing.assert_close(log_pmf, p.log(), rtol=1e-12, atol=1e-12)


def test_pmf_is_what_best_of_N_does():
    p, F = random_world(12, 3)
    N, draws = 8, 100_000
    best = np.random.default_rng(0).choice(12, size=(draws, N), p=p.numpy()).max(1)
    frequency = np.bincount(best, minlength=12) / draws
    expected = vbon.log_bon_pmf(F.log(), p.log(), N).exp().numpy()
    assert np.all(np.abs(frequency - expected) < 4.5 * np.sqrt(expected * (1 - expected) / draws) + 1e-6)


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


def test_objectives_are_ordered_and_their_rewards_are_the_objectives():
    """J ≥ L ≥ L1 (Thm. 2–4), each both from its definition and as E[reward] − KL/N times N."""
    for seed in range(20):
        p, F = random_world(30, seed)
        F = F.clamp(min=1e-9)  # log F = −inf makes every bound −inf
        pi, _ = random_world(30, 100 + seed)
        kl, entropy = (pi * (pi / p).log()).sum(), -(pi * pi.log()).sum()
        for N in (2, 16, 100):
            alpha, beta, gamma = (N + 2) * (N - 1) / 2, N * (N + 1) / 2, N * (N - 1) / 2
            J = (pi * vbon.log_bon_pmf(F.log(), p.log(), N)).sum() + entropy
            L = (N - 1) * (pi * F.log()).sum() - kl
            L1 = gamma * (pi * F.log()).sum() - alpha * entropy - beta * kl
            assert J >= L - 1e-9 and L >= L1 - 1e-9
            for objective, value in (("vbon", J), ("bound", L), ("bound1", L1)):
                reward = vbon.vbon_reward(F.log(), p.log(), N, objective)
                torch.testing.assert_close(N * (pi * reward).sum() - kl, value, rtol=1e-9, atol=1e-9)


def test_rewards_vanish_at_N_1():
    log_F, log_p = torch.tensor([-math.inf, -1.0]).double(), torch.tensor([-3.0, -2.0]).double()
    for objective in ("vbon", "bound", "bound1"):
        torch.testing.assert_close(vbon.vbon_reward(log_F, log_p, 1, objective), torch.zeros(2).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("objective", vbon.OBJECTIVES)
def test_terminal_rewards_tell_responses_apart(objective):
    """Also after the clip, for log-probabilities as long responses have them."""
    args = vbon.Args(objective=objective, out="unused")
    rewards, _ = vbon.terminal_reward(torch.tensor([0.2, 0.5, 0.9]).double(), torch.tensor([-2.0, -1.0, -0.1]).double(),
                                      torch.tensor([-180.0, -180.0, -180.0]).double(), args)
    assert rewards[0] < rewards[1] < rewards[2]


# --- log F ------------------------------------------------------------------------------------------------------------


def test_estimators_on_counts_done_by_hand():
    ref, rewards = torch.tensor([[1.0, 2.0, 2.0, 5.0]] * 4), torch.tensor([0.0, 2.0, 3.0, 9.0])  # k = 0, 1, 3, 4
    log_mean = vbon.estimate_log_F(rewards, ref, "log_mean")
    torch.testing.assert_close(log_mean.exp(), torch.tensor([0, 0.25, 0.75, 1]).double())
    torch.testing.assert_close(vbon.estimate_log_F(rewards, ref).exp(), torch.tensor([1, 2, 4, 5]).double() / 5)
    harmonic = [0, 1, 1.5, 1.5 + 1 / 3, 1.5 + 1 / 3 + 1 / 4, 1.5 + 1 / 3 + 1 / 4 + 1 / 5]  # ψ(k+1) − ψ(M+2) = H_k − H_{M+1}
    expected = torch.tensor([harmonic[k] - harmonic[5] for k in (0, 1, 3, 4)]).double()
    torch.testing.assert_close(vbon.estimate_log_F(rewards, ref, "posterior"), expected)
    torch.testing.assert_close(vbon.estimate_log_F(rewards, ref[0], "posterior"), expected)  # one prompt for all


def test_ties_are_broken_by_the_total_order():
    ref, ref_order = torch.tensor([1.0, 2.0, 2.0, 2.0]), torch.tensor([9, 3, 5, 7])
    log_F = vbon.estimate_log_F(torch.tensor([2.0, 2.0, 1.0]), ref, "log_mean", torch.tensor([6, 3, 0]), ref_order)
    torch.testing.assert_close(log_F.exp(), torch.tensor([0.75, 0.25, 0.0]).double())


@pytest.mark.parametrize("estimator", vbon.ESTIMATORS)
def test_only_ranks_matter(estimator):
    rewards, ref = torch.randn(50, dtype=torch.double), torch.randn(50, 40, dtype=torch.double)
    ref[:, 0] = rewards
    before = vbon.estimate_log_F(rewards, ref, estimator)
    for increasing in (torch.exp, lambda r: 3 * r - 7, lambda r: r ** 3, torch.atan):
        assert torch.equal(vbon.estimate_log_F(increasing(rewards), increasing(ref), estimator), before)


def test_estimators_bias():
    """y ~ π_ref, so F is uniform and E[log F] = −1; and at a fixed F, where Jensen pushes the log of the mean down."""
    generator = torch.Generator().manual_seed(0)
    M, n = 20, 200_000
    F, ref = torch.rand(n, generator=generator).double(), torch.rand(n, M, generator=generator).double()
    error = vbon.estimate_log_F(F, ref, "posterior") - F.log()
    assert abs(error.mean().item()) < 4 * error.std().item() / math.sqrt(n)
    bias = (vbon.estimate_log_F(F, ref, "add_one") - F.log()).mean().item()
    exact = sum(math.log((k + 1) / (M + 1)) for k in range(M + 1)) / (M + 1) + 1  # k is uniform on 0 … M
    assert bias == pytest.approx(exact, abs=4 * error.std().item() / math.sqrt(n)) and bias > 0.02
    half = vbon.estimate_log_F(torch.full((n,), 0.5), ref, "log_mean")
    assert half.mean().item() - math.log(0.5) == pytest.approx(-1 / (2 * M), abs=0.005)  # delta method: −(1−F)/(2FM)


@pytest.mark.parametrize("N, M", [(16, 200), (64, 600)])
def test_floor_of_kl_with_M_samples(N, M):
    """The exact optimum of the estimated objective lies (N−1)/(4M) nats from BoN (continuous reward, u = F uniform).

    Between two order statistics F̂ is constant, so π̂ ∝ F̂^(N−1) and KL(π̂ ‖ π_bon) are sums of closed-form integrals.
    """
    generator = torch.Generator().manual_seed(0)
    kls = []
    for _ in range(200):
        u = torch.cat([torch.zeros(1), torch.rand(M, generator=generator).sort().values, torch.ones(1)]).double()
        middle = (u[1:] + u[:-1]) / 2
        log_w = (N - 1) * vbon.estimate_log_F(middle, u[1:-1])
        log_w = log_w - torch.log((log_w.exp() * u.diff()).sum())
        integral = torch.xlogy(u, u) - u  # of log u
        kl = (log_w.exp() * (log_w * u.diff() - math.log(N) * u.diff() - (N - 1) * integral.diff())).sum()
        kls.append(kl.item())
    assert np.mean(kls) == pytest.approx((N - 1) / (4 * M), rel=0.25)


def test_exponential_fit_recovers_a_curve_and_is_least_squares():
    ref = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([[1.0], [0.1], [5], [1]]) + 2
    a, b = vbon.fit_log_F(ref)
    assert a.shape == b.shape == (4,) and (a > 0).all() and (b > 0).all()
    ascending = ref.sort(-1).values
    target = torch.log(torch.arange(1, 301) / 301).double()

    def error(a, b):
        return (vbon.smooth_log_F(ascending, a.unsqueeze(1), b.unsqueeze(1)) - target).square().sum(1)
    for da, db in itertools.product((-1e-3, 0, 1e-3), repeat=2):
        assert (error(a, b) <= error(a * (1 + da), b * (1 + db)) + 1e-9).all()
    levels = torch.log(torch.arange(1, 301) / 301).double()
    exact = -torch.log(-levels / 0.7) / 1.3  # rewards that lie on −0.7 exp(−1.3 r) exactly
    a, b = vbon.fit_log_F(exact)
    assert a.item() == pytest.approx(0.7, rel=1e-5) and b.item() == pytest.approx(1.3, rel=1e-5)


# --- PPO --------------------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    """γ = 0.9, λ = 0.5. δ = (1 + .9·2 − 1, 0 + .9·3 − 2, 4 − 3) = (1.8, .7, 1); A_2 = 1, A_1 = .7 + .45, A_0 = 1.8 + .45·1.15."""
    rewards, values = torch.tensor([[1.0, 0.0, 4.0, 99.0]]), torch.tensor([[1.0, 2.0, 3.0, 77.0]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = vbon.gae(rewards, values, mask, 0.9, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[2.3175, 1.15, 1.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[3.3175, 3.15, 4.0, 0.0]]))


def test_losses_are_clipped_and_masked():
    mask = torch.tensor([[True, True, False]])
    old, new = torch.zeros(1, 3), torch.log(torch.tensor([[1.5, 0.5, 50.0]]))
    assert vbon.policy_loss(new, old, torch.tensor([[1.0, 1.0, 9.0]]), mask).item() == pytest.approx(-(1.2 + 0.5) / 2)
    assert vbon.policy_loss(new, old, torch.tensor([[-1.0, -1.0, 9.0]]), mask).item() == pytest.approx((1.5 + 0.8) / 2)
    loss = vbon.value_loss(torch.tensor([[1.0, 0.1, 9.0]]), torch.zeros(1, 3), torch.tensor([[1.0, 1.0, 0.0]]), mask)
    assert loss.item() == pytest.approx((0.5 * 0.8 ** 2 + 0.5 * 0.9 ** 2) / 2)


def test_gradients_of_the_losses_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    new, old, weights = (torch.randn(3, 4, generator=generator).double() * 0.5 for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    new.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: vbon.policy_loss(x, old, weights, mask), (new,))
    assert torch.autograd.gradcheck(lambda x: vbon.value_loss(x, old, weights, mask), (new,))
    vbon.policy_loss(new, old, weights, mask).backward()
    assert (new.grad[~mask] == 0).all()


def test_log_probs_of_the_taken_tokens_and_their_gradient():
    generator = torch.Generator().manual_seed(0)
    logits, tokens = (3 * torch.randn(2, 3, 5, generator=generator)).double().requires_grad_(), torch.randint(5, (2, 3), generator=generator)
    found = vbon.token_log_probs(logits, tokens, 0.7)
    expected = (logits / 0.7).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    weights = torch.randn(2, 3, generator=generator).double()
    (by_hand,), (by_autograd,) = (torch.autograd.grad((weights * x).sum(), logits, retain_graph=True) for x in (found, expected))
    torch.testing.assert_close(by_hand, by_autograd, rtol=0, atol=1e-14)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # never a wrong gradient
        torch.autograd.grad(found.sum(), logits)


# --- models: decoding, the shared trunk -------------------------------------------------------------------------------


def small_lm(kind="gpt2", seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=40, max_position_embeddings=64)
    lm = {"gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=40, n_positions=64, initializer_range=0.2)),
          "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, initializer_range=0.2)),
          "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, initializer_range=0.2))}[kind]()
    return lm.eval()


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6, 7, 8]]


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama"])
def test_decoding_equals_the_models_own_forward_pass(kind):
    """Tokens, log-probs and values of padded, cached, shrinking batches against one unpadded pass per response."""
    lm, eos, temperature, copies = small_lm(kind), 10, 0.8, 6
    head = torch.nn.Linear(32, 1)
    uniforms = torch.rand(len(PROMPTS) * copies, 10, generator=torch.Generator().manual_seed(1))
    tokens, mask, log_probs, values = vbon.generate(lm, PROMPTS, uniforms, eos, temperature, head)
    assert 0 < (mask.sum(1) < 10).sum() < len(mask), "some responses should end at EOS and some at the limit"
    for i in range(len(uniforms)):
        response = tokens[i][mask[i]].tolist()
        assert eos not in response[:-1] and (len(response) == 10 or response[-1] == eos)
        prompt = PROMPTS[i // copies]
        with torch.no_grad():
            out = lm(torch.tensor([prompt + response]), output_hidden_states=True)
        logits = out.logits[0, len(prompt) - 1:-1] / temperature
        torch.testing.assert_close(log_probs[i][mask[i]], logits.log_softmax(-1)[range(len(response)), response], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(values[i][mask[i]], head(out.hidden_states[-1][0, len(prompt) - 1:-1]).squeeze(-1).detach(), atol=2e-5, rtol=1e-4)
        cdf = logits.softmax(-1).double().cumsum(-1)
        for t, token in enumerate(response):
            assert cdf[t, token] - logits.softmax(-1)[t, token] - 1e-5 <= uniforms[i, t] <= cdf[t, token] + 1e-5
    assert (log_probs[~mask] == 0).all() and (values[~mask] == 0).all()


def test_a_response_does_not_depend_on_the_others():
    lm, uniforms = small_lm(), torch.rand(6 * len(PROMPTS), 10, generator=torch.Generator().manual_seed(2))
    tokens, mask, _, _ = vbon.generate(lm, PROMPTS, uniforms, 10, 1.0)
    assert len(mask.sum(1).unique()) > 2, "responses should end at different times"
    for i in range(len(uniforms)):
        assert torch.equal(vbon.generate(lm, [PROMPTS[i // 6]], uniforms[i:i + 1], 10, 1.0)[0][0], tokens[i])


def test_sampled_tokens_follow_the_distribution():
    logits = torch.tensor([2.0, -math.inf, 0.0, 1.0, -1.0])
    n = 200_000
    tokens, log_probs = vbon.sample_tokens(logits.expand(n, -1), torch.rand(n, generator=torch.Generator().manual_seed(0)))
    p = logits.softmax(-1)
    frequency = tokens.bincount(minlength=5) / n
    assert (frequency - p).abs().max() < 4 * math.sqrt(0.25 / n) and frequency[1] == 0
    torch.testing.assert_close(log_probs, p.log()[tokens])


def test_no_token_of_probability_zero_is_drawn():
    """A vocabulary of 50 000 at a low temperature, where most probabilities underflow, and the ends of [0, 1)."""
    logits = 4 * torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0)) / 0.1
    for u in (0.0, 0.5, 1 - 2 ** -24):
        tokens, log_probs = vbon.sample_tokens(logits, torch.full((64,), u))
        assert (logits.softmax(-1).gather(1, tokens.unsqueeze(1)) > 0).all()
        exact = logits.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(log_probs, exact.clamp(min=math.log(torch.finfo(torch.float32).tiny)), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama"])
def test_shared_trunk(kind):
    """Top layers on stored activations give what a whole pass gives, gradients too; the trunk is shared, not copied."""
    ref = small_lm(kind)
    policy, _ = vbon.make_policy(ref, 2)
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert trained and not any(".0." in n for n in trained), trained
    pointers = {p.data_ptr() for p in ref.parameters()}
    for p in policy.parameters():
        assert (p.data_ptr() in pointers) != p.requires_grad
    ids, mask = vbon.pad([p + [3, 4, 2] for p in PROMPTS], 0, "left")
    with torch.no_grad(), vbon.trunk_output(ref, 2) as stored:
        ref_logits, _ = vbon.forward(ref, ids, mask, 4)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    whole, _ = vbon.forward(policy, ids, mask, 4)
    with vbon.top_layers(policy, 2, stored[0]):
        short, _ = vbon.forward(policy, ids, mask, 4)
    torch.testing.assert_close(short, whole)
    assert not torch.allclose(whole, ref_logits, atol=1e-2)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    for g, h in zip(torch.autograd.grad(whole.square().mean(), parameters), torch.autograd.grad(short.square().mean(), parameters)):
        torch.testing.assert_close(g, h)
    torch.testing.assert_close(vbon.forward(ref, ids, mask, 4)[0], ref_logits)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama"])
def test_the_trunk_that_decoding_knew_is_that_of_a_whole_pass(kind):
    """Responses of different lengths, T = 10 and T = 1: the top layers on decoding's trunk give the logits of a whole pass."""
    lm, prompts, eos = small_lm(kind), PROMPTS * 4, 10
    for T in (10, 1):
        uniforms = torch.rand(len(prompts), T, generator=torch.Generator().manual_seed(1))
        with vbon.trunk_output(lm, 2) as stored:
            tokens, mask, _, _ = vbon.generate(lm, prompts, uniforms, eos, 1.0)
        assert T == 1 or len(mask.sum(1).unique()) > 3, "responses should end at different times"
        left, left_mask = vbon.pad(prompts, eos, "left")
        ids, ids_mask = torch.cat([left, tokens[:, :-1]], 1), torch.cat([left_mask, mask[:, :-1]], 1)
        trunk = vbon.whole_trunk(stored, mask)
        with torch.no_grad():
            whole, _ = vbon.forward(lm, ids, ids_mask, T)
            with vbon.top_layers(lm, 2, trunk):
                short, _ = vbon.forward(lm, ids, ids_mask, T)
        torch.testing.assert_close(short[mask], whole[mask], atol=2e-5, rtol=1e-4)


# --- the toy ----------------------------------------------------------------------------------------------------------

TOY = dict(episodes=256, rollouts=128, minibatch=64, M=30, test_M=20, test_prompts=16, max_new_tokens=3, eval_every=1, lr=1e-3)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    os.chdir(tmp_path_factory.mktemp("toy"))
    args = vbon.Args(**TOY, out="one")
    result = vbon.train(args)
    vbon.train(vbon.Args(**TOY, out="two"))
    vbon.train(vbon.Args(**TOY, out="three", seed=1))
    return args, result, vbon.toy_task(args, DEVICE), Path.cwd()


def test_toy_is_enumerated_exactly(toy):
    args, _, task, _ = toy
    world = vbon.exact_world(task, args)
    assert len(world["responses"]) == len(set(world["responses"])) == 1 + 18 + 18 ** 2 + 18 ** 3
    torch.testing.assert_close(world["log_ref"].exp().sum(1), torch.ones(4).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(world["log_bon"].exp().sum(1), torch.ones(4).double(), atol=1e-4, rtol=0)
    prompt = task.tokenizer.encode("the plot was")
    for response in ("superb", "very dull", "slow but moving"):  # the last is cut off by the limit of 3 tokens
        ids = torch.tensor([prompt + task.tokenizer.encode(response + (" ." if response.count(" ") < 2 else ""))])
        with torch.no_grad():
            log_probs = task.ref(ids).logits[0].log_softmax(-1)
        expected = sum(log_probs[t - 1, ids[0, t]].item() for t in range(3, ids.shape[1]))
        assert world["log_ref"][2, world["responses"].index(response)].item() == pytest.approx(expected, abs=1e-4)
    start = vbon.exact_metrics(world["log_ref"], world)
    assert start["exact/kl_to_ref"] == 0 and start["exact/win_rate"] == pytest.approx(0.5, abs=1e-4)
    assert start["exact/kl_to_bon"] > 10
    assert vbon.exact_metrics(world["log_bon"], world)["exact/kl_to_bon"] == pytest.approx(0, abs=1e-9)


def test_warmth():
    assert vbon.warmth("superb") > vbon.warmth("moving") > 0 > vbon.warmth("dull") > vbon.warmth("awful")
    assert vbon.warmth("very superb") > vbon.warmth("superb") > 0 > vbon.warmth("not superb")
    assert vbon.warmth("slow but superb") > vbon.warmth("superb but slow")


def test_toy_run_files(toy):
    args, result, task, folder = toy
    metrics = [json.loads(line) for line in open(folder / "one/metrics.jsonl")]
    assert [m["episode"] for m in metrics] == [128, 256]
    assert {k.split("/")[0] for k in metrics[0]} == {"episode", "objective", "ppo", "time", "exact"}
    saved = json.load(open(folder / "one/result.json"))
    assert saved == result and {"reward", "reward_se", "win_rate", "win_rate_se", "kl_to_ref", "kl_to_ref_se",
                                "exact/kl_to_bon", "exact/kl_to_ref", "exact/reward", "exact/win_rate"} <= set(saved)
    assert saved["exact/kl_to_bon"] == metrics[-1]["exact/kl_to_bon"]
    samples = [json.loads(line) for line in open(folder / "one/samples.jsonl")]
    assert len(samples) == 16 and np.mean([s["reward"] for s in samples]) == pytest.approx(saved["reward"])
    assert all(s["reward"] == vbon.warmth(s["response"]) for s in samples)
    assert json.load(open(folder / "one/config.json"))["N"] == 16


def test_same_seed_same_run_and_saved_policy(toy):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    _, _, task, folder = toy

    def without_times(run):
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in open(folder / run / "metrics.jsonl")]
    assert without_times("one") == without_times("two") != without_times("three")
    one, two = (AutoModelForCausalLM.from_pretrained(folder / run / "policy") for run in ("one", "two"))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(one.parameters(), task.ref.parameters()))
    prompt = AutoTokenizer.from_pretrained(folder / "one/policy").encode("the plot was")
    args = vbon.Args(**TOY, out="new")
    world = vbon.exact_world(task, args)
    log_pi = torch.stack([vbon.enumerate_log_p(one, p, args) for p in world["prompts"]])
    assert prompt == world["prompts"][2]
    saved = json.load(open(folder / "one/result.json"))["exact/kl_to_bon"]
    assert vbon.exact_metrics(log_pi, world)["exact/kl_to_bon"] == pytest.approx(saved, abs=1e-5)


def test_toy_learns_to_be_its_own_best_of_4(toy):
    os.chdir(toy[3])
    result = vbon.train(vbon.Args(N=4, episodes=20480, rollouts=1024, test_prompts=64, test_M=100, out="learns"))
    assert result["exact/kl_to_bon"] < 0.1  # from 1.6
    assert result["exact/win_rate"] == pytest.approx(0.8, abs=0.05)


def test_killed_sampling_resumes_and_larger_M_extends(toy, tmp_path, monkeypatch):
    args, _, task, _ = toy
    monkeypatch.chdir(tmp_path)
    whole = vbon.reference_samples(task, vbon.Args(**TOY | {"samples": "whole.jsonl"}), DEVICE, keep_tokens=True)
    content = Path("whole.jsonl").read_bytes()
    for cut in (0, 10, len(content) // 2, len(content) - 1):  # killed here: the torn line is drawn again
        Path("cut.jsonl").write_bytes(content[:cut])
        vbon.reference_samples(task, vbon.Args(**TOY | {"samples": "cut.jsonl"}), DEVICE)
        assert Path("cut.jsonl").read_bytes() == content
    more = vbon.reference_samples(task, vbon.Args(**TOY | {"samples": "cut.jsonl", "M": 50}), DEVICE, keep_tokens=True)
    for (split, prompt), (rewards, tokens) in whole.items():
        assert torch.equal(more[split, prompt][0][:len(rewards)], rewards) and more[split, prompt][1][:len(tokens)] == tokens
        assert len(more[split, prompt][0]) == len(more[split, prompt][1]) == (50 if split == "train" else 20)
    again = vbon.reference_samples(task, vbon.Args(**TOY | {"samples": "cut.jsonl", "M": 50}), DEVICE)
    assert all(torch.equal(again[key], rewards.sort().values) for key, (rewards, _) in more.items())


def test_samples_of_other_settings_or_damaged_are_refused(toy, tmp_path, monkeypatch):
    args, _, task, _ = toy
    monkeypatch.chdir(tmp_path)
    vbon.reference_samples(task, vbon.Args(**TOY | {"samples": "s.jsonl"}), DEVICE)
    with pytest.raises(vbon.UserError, match="temperature = 1.0, this run has 0.5"):
        vbon.reference_samples(task, vbon.Args(**TOY | {"samples": "s.jsonl", "temperature": 0.5}), DEVICE)
    lines = Path("s.jsonl").read_text().splitlines()
    foreign = "a note of mine\nthat is no file of samples"  # refused, and left as it is
    Path("note.jsonl").write_text(foreign)
    with pytest.raises(vbon.UserError, match="line 1 is damaged"):
        vbon.reference_samples(task, vbon.Args(**TOY | {"samples": "note.jsonl"}), DEVICE)
    assert Path("note.jsonl").read_text() == foreign
    Path("note.jsonl").write_text("one line")
    with pytest.raises(vbon.UserError, match="not a file of samples"):
        vbon.reference_samples(task, vbon.Args(**TOY | {"samples": "note.jsonl"}), DEVICE)
    assert Path("note.jsonl").read_text() == "one line"
    for bad in ("not json", '{"split": "train"}', lines[1], lines[1].replace('"rewards": [', '"rewards": [NaN, ')):
        Path("s.jsonl").write_text("\n".join(lines[:2] + [bad]) + "\n")
        with pytest.raises(vbon.UserError, match="line 3 is damaged"):
            vbon.reference_samples(task, vbon.Args(**TOY | {"samples": "s.jsonl"}), DEVICE)


def test_a_reward_that_is_not_finite_names_the_response(toy, tmp_path, monkeypatch):
    args, _, task, _ = toy
    monkeypatch.chdir(tmp_path)
    broken = vbon.Task(task.ref, task.tokenizer, lambda prompts, responses: [math.nan] * len(responses), task.encode,
                       task.train_prompts, task.test_prompts, "nan")
    with pytest.raises(vbon.UserError, match="nan for the prompt 'the acting was' with the response '"):
        vbon.reference_samples(broken, args, DEVICE)
    assert not list(tmp_path.rglob("*.jsonl"))


def weights(run, file="policy/model.safetensors"):
    from safetensors.torch import load_file
    return load_file(f"{run}/{file}")


@pytest.mark.parametrize("script, argv, episodes", [(vbon, [], 1024), (bon_baselines, ["bonbon", "--N", "4"], 4096)])
def test_a_killed_run_resumes_to_the_same_weights(script, argv, episodes, tmp_path, monkeypatch, capsys):
    """kill -9 while a checkpoint is written; the resumed run ends with the bits of one that was never killed."""
    monkeypatch.chdir(tmp_path)
    flags = [*argv, *(str(x) for k, v in (TOY | {"episodes": episodes, "save_every": 2, "eval_every": 4}).items() for x in ("--" + k.replace("_", "-"), v))]
    (tmp_path / "killed.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import vbon
replace, count = os.replace, [0]
def killed(source, target):
    count[0] += target.endswith("checkpoint.pt")
    if count[0] == 2:
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = killed
import {script.__name__}
sys.exit({script.__name__}.main(sys.argv[1:]))
""")
    process = subprocess.Popen([sys.executable, "killed.py", *flags, "--out", "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert script.main([*flags, "--out", "whole", "--samples", "whole.jsonl"]) == 0
    assert process.wait() == -9 and Path("killed/checkpoint.pt").exists() and not Path("killed/result.json").exists()
    assert script.main([*flags, "--out", "killed", "--resume", "--lr", "0.01"]) == 2
    assert "lr = 0.001, not 0.01" in capsys.readouterr().err
    assert script.main([*flags, "--out", "killed", "--resume", "--samples", "other.jsonl"]) == 2
    assert "samples = None, not 'other.jsonl'" in capsys.readouterr().err and not Path("other.jsonl").exists()
    if script is vbon:  # by a process that knows nothing of the first one
        resumed = command(*flags, "--out", "killed", "--resume", cwd=tmp_path)
        assert resumed.returncode == 0 and "resumed from" in resumed.stdout, resumed.stderr
    else:
        assert script.main([*flags, "--out", "killed", "--resume"]) == 0 and "resumed from" in capsys.readouterr().out

    def without_times(run):
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in open(f"{run}/metrics.jsonl")]
    one, two = weights("whole"), weights("killed")
    assert all(torch.equal(one[name], two[name]) for name in one) and without_times("whole")[-1]["episode"] == episodes
    assert without_times("whole") == without_times("killed")
    assert not Path("killed/checkpoint.pt").exists()


# --- the command line -------------------------------------------------------------------------------------------------


def command(*argv, cwd, script="vbon.py", **environment):
    return subprocess.run([sys.executable, str(HERE / script), *map(str, argv)], cwd=cwd, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"} | environment, timeout=600)


def refused(result, *words):
    """Exit code 2 and one line on stderr, after any progress bar, that has these words; no trace."""
    assert result.returncode == 2, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr and line.startswith("vbon.py: ") and all(w in line for w in words), result.stderr


@pytest.mark.parametrize("argv, word", [
    (["--N", "0"], "--N"), (["--N", "many"], "--N"), (["--N", "nan"], "--N"), (["--N", "inf"], "--N"), (["--M", "0"], "--M"),
    (["--task", "chess"], "toy"), (["--objective", "sft"], "bound1"), (["--estimator", "mean"], "log_mean"), (["--temperature", "0"], "--temperature"),
    (["--objective", "rlhf", "--N", "1"], "--beta"), (["--ref", "gpt2"], "--task imdb"), (["--minibatch", "4096"], "--rollouts"),
    (["--unfrozen-layers", "7"], "2 layers"), (["--device", "cuda:7"], "cuda:7"), (["--nonsense"], "--nonsense")])
def test_bad_flags(argv, word, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        error = io.StringIO()
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            assert vbon.main(argv) == 2
    line = error.getvalue().strip().splitlines()[-1]
    assert line.startswith("vbon.py: ") and word in line and not os.listdir(tmp_path)


def test_help_names_every_flag_and_importing_is_light(tmp_path):
    result = command("--help", cwd=tmp_path)
    assert result.returncode == 0
    for field in vbon.fields(vbon.Args):
        assert "--" + field.name.replace("_", "-") in result.stdout
        assert field.metadata["help"][:30].split(",")[0].replace("%%", "%")[:20] in " ".join(result.stdout.split())
    heavy = subprocess.run([sys.executable, "-c", "import sys, vbon; print([m for m in ('datasets', 'matplotlib', 'vllm') if m in sys.modules])"],
                           cwd=HERE, capture_output=True, text=True)
    assert heavy.stdout.strip() == "[]"


def test_a_finished_run_is_not_overwritten(toy):
    result = command("--out", "one", cwd=toy[3])
    refused(result, "--overwrite")


# --- imdb with small models in an offline hub -------------------------------------------------------------------------


def save_small_models(folder, labels=2, eos=True, seed=0):
    """A GPT-2 and a DistilBERT classifier over words, as local folders."""
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders
    from transformers import (DistilBertConfig, DistilBertForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<|endoftext|>"] + alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(seed)
    GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)).save_pretrained(folder / "ref")
    PreTrainedTokenizerFast(tokenizer_object=backend, **({"eos_token": "<|endoftext|>"} if eos else {})).save_pretrained(folder / "ref")
    names = {1: {0: "LABEL_0"}, 2: {0: "NEGATIVE", 1: "POSITIVE"}, 3: {0: "A", 1: "B", 2: "C"}}[labels]
    DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=257, max_position_embeddings=64, dim=32, hidden_dim=64, n_layers=1, n_heads=2, num_labels=labels, id2label=names,
        label2id={v: k for k, v in names.items()})).save_pretrained(folder / "reward")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", model_max_length=64).save_pretrained(folder / "reward")


IMDB = ["--task", "imdb", "--episodes", 16, "--rollouts", 8, "--minibatch", 4, "--M", 5, "--test-M", 4, "--train-prompts", 6,
        "--test-prompts", 4, "--max-new-tokens", 6, "--unfrozen-layers", 1, "--N", 2]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    save_small_models(folder)
    write_lines(folder / "prompts.jsonl", [{"prompt": f"Film number {i} is"} for i in range(20)])
    return folder


def own(pieces, ref=None, reward=None, dataset=None):
    return ["--ref", ref or pieces / "ref", "--reward", reward or pieces / "reward", "--dataset", dataset or pieces / "prompts.jsonl"]


def test_the_fused_gelu_is_gpt2s_own(pieces):
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(pieces / "ref")
    ours = vbon.load("ref", AutoModelForCausalLM, str(pieces / "ref"), dtype=torch.float32)
    names = [[type(m).__name__ for m in lm.modules()] for lm in (theirs, ours)]
    assert names[0].count("NewGELUActivation") == names[1].count("GELU") == 2 and "NewGELUActivation" not in names[1]
    ids = torch.randint(257, (4, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    x, y = (torch.linspace(-6, 6, 1001, requires_grad=True) for _ in range(2))
    one, two = theirs.transformer.h[0].mlp.act(x), ours.transformer.h[0].mlp.act(y)
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(one.sum(), x), torch.autograd.grad(two.sum(), y), atol=5e-6, rtol=1e-5)
    assert ours.config.activation_function == "gelu_new"  # what is saved stays as it was


@pytest.mark.parametrize("objective", vbon.OBJECTIVES)
def test_own_models_and_prompts(pieces, tmp_path, monkeypatch, objective):
    monkeypatch.chdir(tmp_path)
    assert vbon.main([str(a) for a in [*IMDB, *own(pieces), "--objective", objective, "--out", "run"]]) == 0
    result = json.load(open("run/result.json"))
    samples = [json.loads(line) for line in open("run/samples.jsonl")]
    assert 0 < result["reward"] < 1 and result["kl_to_ref"] >= 0 and len(samples) == 2  # a tenth of 20 prompts is held out
    stored = [json.loads(line) for line in open(next(Path("samples").iterdir()))][1:]
    assert len(stored) == (2 if objective == "rlhf" else 8) and all(s["prompt"].startswith("Film number") for s in stored)
    first = json.loads(open("run/metrics.jsonl").readline())
    assert first["objective/kl_to_ref"] == pytest.approx(0, abs=1e-4)  # π_θ is π_ref at first, by decoding and by a pass over the shared trunk


def test_bfloat16(pieces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert vbon.main([str(a) for a in [*IMDB, *own(pieces), "--dtype", "bfloat16", "--lr", 1e-3, "--out", "run"]]) == 0
    rows = [json.loads(line) for line in open("run/metrics.jsonl")]
    assert rows[0]["objective/kl_to_ref"] == pytest.approx(0, abs=0.05) and all(math.isfinite(x) for row in rows for x in row.values() if x is not None)
    assert all(p.dtype == torch.float32 for p in weights("run").values())
    assert json.loads(open(next(Path("samples").iterdir())).readline())["dtype"] == "bfloat16"


def test_the_exact_kl_agrees_with_the_sampled_one(pieces, tmp_path, monkeypatch):
    """Three estimates of one mean: the sum over the vocabulary has the least variance, k3 the most."""
    monkeypatch.chdir(tmp_path)
    args = vbon.Args(task="toy", max_new_tokens=3, test_prompts=2000, test_M=5, M=5)
    task = vbon.toy_task(args, DEVICE)
    policy = vbon.make_policy(task.ref, -1)[0]
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    result, _ = vbon.judge(task, *vbon.sample_policy(policy, task, args, DEVICE), vbon.reference_samples(task, args, DEVICE), {})
    world = vbon.exact_world(task, args)
    log_pi = torch.stack([vbon.enumerate_log_p(policy, p, args) for p in world["prompts"]])
    exact = vbon.exact_metrics(log_pi, world)
    for name in ("kl_to_ref", "kl_to_ref_plain", "kl_to_ref_k3"):
        assert result[name] == pytest.approx(exact["exact/kl_to_ref"], abs=4 * result[name + "_se"])
    assert result["kl_to_ref_se"] < 0.8 * min(result["kl_to_ref_plain_se"], result["kl_to_ref_k3_se"])
    assert result["reward"] == pytest.approx(exact["exact/reward"], abs=4 * result["reward_se"])


def test_bad_pieces(pieces, tmp_path):
    save_small_models(tmp_path / "three", labels=3)
    save_small_models(tmp_path / "no_eos", eos=False)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "fine"}\n{"prompt": 3}\n')
    write_lines(tmp_path / "long.jsonl", [{"prompt": "short"}, {"prompt": "a prompt of more than 32 − 6 bytes"}])
    write_lines(tmp_path / "other.jsonl", [{"prompt": "x"}, {"question": "y"}])
    before = sorted(os.listdir(tmp_path))
    cases = [(dict(reward=pieces / "ref"), ["lacks the weights"]), (dict(ref="no/such-model"), ["no/such-model", "--ref"]), (dict(reward="no/such-reward"), ["--reward"]),
             (dict(reward=tmp_path / "three/reward"), ["3 labels"]), (dict(ref=tmp_path / "no_eos/ref"), ["EOS"]),
             (dict(dataset=tmp_path / "missing.jsonl"), ["missing.jsonl", "no such file"]), (dict(dataset=tmp_path / "empty.jsonl"), ["0 training rows"]),
             (dict(dataset=tmp_path / "broken.jsonl"), ["line 2"]), (dict(dataset=tmp_path / "long.jsonl"), ["context of 32"]),
             (dict(dataset=tmp_path / "other.jsonl"), ["line 2"]), (dict(dataset="no/such-data"), ["no/such-data", "--dataset"])]
    for pieces_of_case, words in cases:
        error = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            patch.chdir(tmp_path)
            assert vbon.main([str(a) for a in [*IMDB, *own(pieces, **pieces_of_case)]]) == 2, error.getvalue()
        line = error.getvalue().strip().splitlines()[-1]
        assert line.startswith("vbon.py: ") and all(w in line for w in words), error.getvalue()
    assert sorted(os.listdir(tmp_path)) == before


def test_imdb_verbatim_without_a_hub(tmp_path):
    result = command("--task", "imdb", "--N", "16", cwd=tmp_path, HF_HOME=str(tmp_path / "empty"))
    refused(result, "lvwerra/gpt2-imdb", "--ref")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "samples").exists()


def lay_out_hub(home, models, dataset, config, splits):
    """An offline cache of the hub: a snapshot for each model, and the data set where `datasets` looks for it offline."""
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
    info = json.loads((target / "dataset_info.json").read_text())
    (target / "dataset_info.json").write_text(json.dumps(info | {"config_name": config, "dataset_name": short, "builder_name": "parquet"}))


def test_imdb_verbatim_from_an_offline_hub(pieces, tmp_path):
    """--task imdb with the hub's names and only its sizes cut down, from a cache that holds small models."""
    reviews = [{"text": f"Review {i} of a film that I liked — café, {i % 7} stars.", "label": i % 2} for i in range(40)]
    lay_out_hub(tmp_path / "home", {"lvwerra/gpt2-imdb": pieces / "ref", "lvwerra/distilbert-imdb": pieces / "reward"},
                "stanfordnlp/imdb", "plain_text",
                {"train": reviews, "test": [{"text": "Another " + r["text"], "label": r["label"]} for r in reviews]})
    sizes = IMDB[2:-2]
    result = command("--task", "imdb", "--N", "16", *sizes, cwd=tmp_path, HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name == "imdb-vbon-N16-M5-seed0" and json.load(open(run / "result.json"))["episodes"] == 16
    prompts = {s["prompt"] for s in map(json.loads, open(run / "samples.jsonl"))}
    assert all("Another ".startswith(p[:8]) and 2 <= len(p) <= 8 for p in prompts), prompts
    again = command("--task", "imdb", "--N", "16", *sizes, "--overwrite", cwd=tmp_path, HF_HOME=str(tmp_path / "home"))
    assert again.returncode == 0 and "read from samples/imdb-" in again.stdout


@pytest.mark.skipif(not (SHARED / "imdb-mini").exists(), reason="needs the real small models")
def test_imdb_on_real_models_and_reviews(tmp_path):
    mini = SHARED / "imdb-mini"
    result = command(*IMDB, "--ref", mini / "ref", "--reward", mini / "reward", "--dataset", SHARED / "imdb", "--out", "run", cwd=tmp_path,
                     HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert 0.2 < json.load(open(tmp_path / "run/result.json"))["ref/reward"] < 0.8


# --- tldr -------------------------------------------------------------------------------------------------------------


def save_small_pythias(folder):
    """GPTNeoX models as the hub's: a policy, and two with a scalar head, over bytes; EOS is token 0, as in pythia."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<|endoftext|>", "<|padding|>"] + alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    shape = dict(vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, bos_token_id=0, eos_token_id=0,
                 max_position_embeddings=256)
    for name, model in (("ref", GPTNeoXForCausalLM(GPTNeoXConfig(**shape))),
                        *((n, GPTNeoXForSequenceClassification(GPTNeoXConfig(**shape, num_labels=1, pad_token_id=1))) for n in ("reward", "judge"))):
        model.save_pretrained(folder / name)
        pad = {} if name == "ref" else {"pad_token": "<|padding|>"}
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", model_max_length=256, **pad).save_pretrained(folder / name)


def post(i, subreddit):
    return {"id": str(i), "subreddit": subreddit, "title": f"Title {i}", "post": f"First paragraph of {i}.\n\n" + "More of it. " * (i % 30),
            "summary": "A summary."}


def test_tldr_verbatim_from_an_offline_hub(tmp_path):
    """The commands of the README with the hub's names: training, both test distributions, the larger judge, Figure 5."""
    save_small_pythias(tmp_path)
    rows = [post(i, ("relationships", "relationship_advice", "tifu", "AskReddit")[i % 4]) for i in range(120)]
    hub = "cleanrl/EleutherAI_pythia-{}-deduped__{}__tldr"
    lay_out_hub(tmp_path / "home", {hub.format("2.8b", "sft"): tmp_path / "ref", hub.format("2.8b", "reward"): tmp_path / "reward",
                                    hub.format("6.9b", "reward"): tmp_path / "judge"},
                "vwxyzjn/summarize_from_feedback_tldr_3_filtered", "default", {"train": rows[:80], "test": rows[80:]})
    sizes = ["--episodes", 8, "--rollouts", 4, "--minibatch", 4, "--M", 5, "--test-M", 4, "--train-prompts", 6, "--test-prompts", 8,
             "--max-new-tokens", 8, "--unfrozen-layers", 1]
    result = command("--task", "tldr", *sizes, cwd=tmp_path, HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs/tldr-vbon-N100-M5-seed0"
    config, found = json.load(open(run / "config.json")), json.load(open(run / "result.json"))
    assert (config["estimator"], config["temperature"], config["lr"], config["adam_eps"], config["value_coef"]) == ("smooth", 0.7, 3e-6, 1e-5, 0.2)
    samples = [json.loads(line) for line in open(run / "samples.jsonl")]
    assert [vbon.in_distribution(s["prompt"]) for s in samples] == [True] * 4 + [False] * 4
    for s in samples:
        assert s["prompt"].endswith("\n\nTL;DR:") and len(s["prompt"].encode()) <= 256 - 8
        assert (s["reward"] == -1.0) == (not s["response"].endswith("<|endoftext|>"))
    assert found["reward"] == pytest.approx((found["in/reward"] + found["out/reward"]) / 2)
    (stored,) = [[json.loads(line) for line in open(path)][1:] for path in (tmp_path / "samples").iterdir()]
    ended = {y.endswith("<|endoftext|>") for line in stored for y in line["responses"]}
    assert False in ended and all(vbon.in_distribution(line["prompt"]) for line in stored if line["split"] == "train")
    figure = command(str(run), "--reward", hub.format("6.9b", "reward"), "--temperatures", 0.25, 1, "--figures", "figures", cwd=tmp_path,
                     script="evaluate.py", HF_HOME=str(tmp_path / "home"))
    assert figure.returncode == 0 and "T = 0.25, judge EleutherAI_pythia-6.9b" in figure.stdout, figure.stderr
    assert (tmp_path / "figures/tldr-temperatures.png").stat().st_size > 10_000


def test_scalar_rewards_are_read_off_the_last_token(tmp_path):
    """Padding never counts, EOS does: the reward of a text does not depend on the others in its batch."""
    save_small_pythias(tmp_path)
    score, name = vbon.load_reward(str(tmp_path / "reward"), DEVICE, "<|endoftext|>", -1.0)
    texts = ["short<|endoftext|>", "a good deal longer than the other<|endoftext|>", "cut off"]
    together = score(["p: "] * 3, texts)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    model, tokenizer = (kind.from_pretrained(tmp_path / "reward") for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    ids = tokenizer("p: " + texts[0], return_tensors="pt").input_ids
    assert ids[0, -1] == 0
    by_hand = model.score(model.base_model(ids).last_hidden_state[:, -1]).item()
    assert together[0] == pytest.approx(by_hand, abs=1e-5) == pytest.approx(score(["p: "], texts[:1])[0], abs=1e-5)
    assert together[2] == -1.0 and "-1.0 without" in name


def test_posts_are_cut_to_fit():
    count = types.SimpleNamespace(encode=str.split)
    row = {"subreddit": "tifu", "title": "T", "post": "one two three\n\nfour five\n\nsix"}
    assert vbon.tldr_prompt(row, count, 99) == "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: one two three\n\nfour five\n\nsix\n\nTL;DR:"
    assert vbon.tldr_prompt(row, count, 11) == "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: one two three\n\nfour five\n\nTL;DR:"
    assert vbon.tldr_prompt(row, count, 8) == "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: one two\n\nTL;DR:"


# --- the file of samples: killed, shared, damaged, exchanged; several processes; vLLM ---------------------------------


def test_sampling_killed_twice_ends_with_the_same_file(pieces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [str(a) for a in [*IMDB, *own(pieces), "--M", 60, "--test-M", 30, "--train-prompts", 16, "--sample-batch", 240]]
    assert vbon.main([*flags, "--samples", "whole.jsonl", "--out", "a"]) == 0
    content = (tmp_path / "whole.jsonl").read_bytes()
    for killed_after in (1, 3):
        process = subprocess.Popen([sys.executable, "-c", f"""
import os, sys; sys.path.insert(0, {str(HERE)!r}); import vbon
append, count = vbon.append_lines, [0]
def appended(path, header, lines):
    append(path, header, lines); count[0] += 1
    if count[0] == {killed_after}:
        open(path, "ab").write(b'{{"split": "train", "pro')  # torn, as a write that was killed leaves it
        os.kill(os.getpid(), 9)
vbon.append_lines = appended
vbon.main(sys.argv[1:])""", *flags, "--samples", "killed.jsonl", "--out", "b"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert process.wait() == -9
        assert len((tmp_path / "killed.jsonl").read_bytes()) < len(content)
    assert vbon.main([*flags, "--samples", "killed.jsonl", "--out", "b"]) == 0
    assert (tmp_path / "killed.jsonl").read_bytes() == content


def test_two_runs_on_one_file_take_turns(pieces, tmp_path):
    flags = [str(a) for a in [*IMDB, *own(pieces), "--M", 300, "--train-prompts", 16, "--samples", "s.jsonl"]]
    runs = [subprocess.Popen([sys.executable, str(HERE / "vbon.py"), *flags, "--out", f"r{i}"], cwd=tmp_path, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(3)]
    outputs = [run.communicate() for run in runs]
    assert all(run.returncode == 0 for run in runs), outputs
    lines = [json.loads(line) for line in open(tmp_path / "s.jsonl")][1:]
    assert len(lines) == len({(line["split"], line["prompt"]) for line in lines}) == 18
    assert sum("drawn by" in out for out, _ in outputs) == 1 or any("waiting for it" in out for out, _ in outputs)


def test_a_damaged_file_never_gives_a_wrong_F(toy, tmp_path, monkeypatch):
    """Bits flipped, lines cut, doubled, swapped or of other types, in 300 ways: refused, or read as if nothing had happened."""
    args, _, task, _ = toy
    monkeypatch.chdir(tmp_path)
    args = vbon.Args(**TOY | {"samples": "s.jsonl", "M": 6, "test_M": 6})
    right = vbon.reference_samples(task, args, DEVICE)
    content, rng, refused = Path("s.jsonl").read_bytes(), random.Random(0), 0
    lines = content.splitlines(keepends=True)
    for i in range(300):
        damaged = bytearray(content)
        if i < 200:
            place = rng.randrange(len(damaged))
            damaged[place] ^= 1 << rng.randrange(8)
        elif i < 240:
            cut = sorted(rng.sample(range(len(content)), 2))
            damaged = content[:cut[0]] + content[cut[1]:]
        elif i < 260:
            damaged = b"".join([*lines, rng.choice(lines)])
        elif i < 280:
            damaged = b"".join([lines[0], *rng.sample(lines[1:], len(lines) - 1), b"\xff\xfe\n"])
        else:
            wrong = json.loads(lines[1]) | {rng.choice(["rewards", "tokens", "start", "split", "prompt", "responses"]): rng.choice([None, 3, "x", [math.nan]])}
            damaged = b"".join([lines[0], json.dumps(wrong).encode() + b"\n", *lines[2:]])
        Path("s.jsonl").write_bytes(damaged)
        try:
            got = vbon.reference_samples(task, args, DEVICE)
            assert all(torch.equal(got[key], right[key]) for key in right), i
        except vbon.UserError as error:
            refused += 1
            assert "line " in str(error) or "was made with" in str(error) or "not a file of samples" in str(error), (i, str(error))
    assert refused > 250


def test_samples_in_the_authors_formats(pieces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [str(a) for a in [*IMDB, *own(pieces)]]
    assert vbon.main([*flags, "--samples", "s.jsonl", "--out", "a"]) == 0
    policy = Path("a/policy/model.safetensors").read_bytes()
    for flat in ([], ["--flat"]):
        assert evaluate.main(["--export", "s.jsonl", "theirs.jsonl", *flat]) == 0
        row = json.loads(Path("theirs.jsonl").read_text().splitlines()[0])
        assert set(row) == ({"prompt", "text", "reward"} if flat else {"prompt", "responses", "rewards"})
        Path("own.jsonl").unlink(missing_ok=True)
        assert vbon.main([*flags, "--samples", "own.jsonl", "--import-samples", "theirs.jsonl", "--out", "b", "--overwrite"]) == 0
        assert "samples of 6 of the 6 training prompts taken over" in capsys.readouterr().out
        assert Path("b/policy/model.safetensors").read_bytes() == policy  # the same F, and so the same run
    Path("bad.jsonl").write_text('{"prompt": "x", "text": "y", "reward": 1}\n{"prompt": "x", "text": "y", "reward": NaN}\n')
    code = vbon.main([*flags, "--samples", "new.jsonl", "--import-samples", "bad.jsonl", "--out", "c"])
    refused(types.SimpleNamespace(returncode=code, stderr=capsys.readouterr().err), "bad.jsonl, line 2")
    assert not Path("new.jsonl").exists()


def torchrun(*argv, cwd, script=HERE / "vbon.py", **environment):
    command_line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *map(str, argv)]
    return subprocess.run(command_line, cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


@pytest.fixture(scope="module")
def two_processes(pieces, tmp_path_factory):
    """A run of two processes: its flags, its folder, what it printed."""
    folder = tmp_path_factory.mktemp("two")
    flags = [str(a) for a in [*IMDB, *own(pieces), "--rollouts", 16, "--episodes", 64, "--lr", 1e-3, "--save-every", 1]]
    run = torchrun(*flags, "--samples", "two.jsonl", "--out", "two", cwd=folder)
    assert run.returncode == 0, run.stderr
    return flags, folder, run.stdout


def test_two_processes_are_as_one(pieces, two_processes, tmp_path):
    """The same samples, byte by byte, and the same weights up to rounding; a shared trunk, and minibatches that fall unevenly."""
    flags, folder, printed = two_processes
    one = command(*flags, "--samples", "one.jsonl", "--out", "one", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert one.returncode == 0, one.stderr
    assert (tmp_path / "one.jsonl").read_bytes() == (folder / "two.jsonl").read_bytes()
    a, b = weights(tmp_path / "one"), weights(folder / "two")
    before = weights(pieces / "ref", "model.safetensors")
    assert max((a[k] - b[k]).abs().max() for k in a) < 2e-4 and 2e-3 < max((a[k] - before[k]).abs().max() for k in a if k in before)
    rows = [[json.loads(line) for line in open(run / "metrics.jsonl")] for run in (tmp_path / "one", folder / "two")]
    assert len(rows[0]) == len(rows[1]) == 4
    for m, n in zip(*rows):
        assert all(m[k] == pytest.approx(n[k], abs=1e-4) for k in m if not k.startswith("time/"))
    assert printed.count("win rate") == 1  # one process speaks
    uneven = torchrun(*flags, "--rollouts", 15, "--minibatch", 3, "--out", "three", cwd=tmp_path)
    assert uneven.returncode != 0 and "vbon.py: --rollouts 15 cannot be shared out evenly to 2 processes" in uneven.stderr
    assert not (tmp_path / "samples").exists()


def test_a_killed_process_ends_the_run_which_resumes(two_processes, tmp_path):
    flags, folder, _ = two_processes
    launcher = tmp_path / "killed.py"
    launcher.write_text(f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import vbon
phase, count = vbon.ppo_phase, [0]
def killed(*args):
    count[0] += 1
    if count[0] == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    return phase(*args)
vbon.ppo_phase = killed
sys.exit(vbon.main())
""")
    stopped = torchrun(*flags, "--out", "killed", cwd=tmp_path, script=launcher)
    assert stopped.returncode != 0 and (tmp_path / "killed/checkpoint.pt").exists() and not (tmp_path / "killed/result.json").exists()
    assert "another process of this run ended" in stopped.stderr, stopped.stderr
    resumed = torchrun(*flags, "--out", "killed", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0 and "resumed from" in resumed.stdout, resumed.stderr
    one, two = weights(folder / "two"), weights(tmp_path / "killed")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM; .ci/run has an environment with it")
def test_vllm_samples_the_same_distribution(tmp_path):
    """The same task through both backends: rewards agree in distribution, log-probs of the same tokens to 1e-3."""
    if (SHARED / "imdb-mini").exists():
        models, data = SHARED / "imdb-mini", SHARED / "imdb"
    else:
        save_small_models(tmp_path)
        write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"Film number {i} is"} for i in range(20)])
        models, data = tmp_path, tmp_path / "prompts.jsonl"
    base = ["--task", "imdb", "--ref", models / "ref", "--reward", models / "reward", "--dataset", data, "--episodes", 16, "--rollouts", 16,
            "--minibatch", 16, "--train-prompts", 8, "--test-prompts", 2, "--test-M", 8, "--M", 128, "--max-new-tokens", 12, "--N", 2, "--unfrozen-layers", 1]
    files = {}
    for backend, name in (("hand", "this script"), ("vllm", "vLLM")):
        result = command(*base, "--backend", backend, "--samples", backend + ".jsonl", "--out", backend, cwd=tmp_path, HF_HUB_OFFLINE="1",
                         VLLM_CPU_KVCACHE_SPACE="1")
        assert result.returncode == 0 and f"drawn by {name}" in result.stdout, result.stderr[-3000:]
        files[backend] = [json.loads(line) for line in open(tmp_path / f"{backend}.jsonl")][1:]
    for split in ("train", "test"):
        rewards = {backend: torch.tensor([r for line in lines if line["split"] == split for r in line["rewards"]], dtype=torch.double)
                   for backend, lines in files.items()}
        assert len(rewards["hand"]) == len(rewards["vllm"])
        assert evaluate.kolmogorov_smirnov(rewards["hand"], rewards["vllm"])[1] > 0.001
    ours = torch.tensor([len(t) for line in files["hand"] for t in line["tokens"]], dtype=torch.double)
    theirs = torch.tensor([len(t) for line in files["vllm"] for t in line["tokens"]], dtype=torch.double)
    assert evaluate.kolmogorov_smirnov(ours, theirs)[1] > 0.001  # EOS ends both alike
    script = tmp_path / "log_probs.py"
    script.write_text(f"""
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(model={str(models / "ref")!r}, dtype="float32", seed=0)
    lines = [json.loads(line) for line in open("hand.jsonl")][1:4]
    tok = llm.get_tokenizer()
    out = []
    for line in lines:
        prompt, tokens = tok.encode(line["prompt"]), line["tokens"][0]
        got = llm.generate([{{"prompt_token_ids": prompt + tokens}}], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)[0]
        out.append([prompt, tokens, [got.prompt_logprobs[len(prompt) + i][t].logprob for i, t in enumerate(tokens)]])
    json.dump(out, open("log_probs.json", "w"))
""")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    from transformers import AutoModelForCausalLM
    lm = AutoModelForCausalLM.from_pretrained(models / "ref", dtype=torch.float32)
    for prompt, tokens, theirs in json.load(open(tmp_path / "log_probs.json")):
        with torch.no_grad():
            logits = lm(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1]
        ours = vbon.token_log_probs(logits, torch.tensor(tokens))
        assert (ours - torch.tensor(theirs)).abs().max() < 1e-3


# --- bon_baselines.py -------------------------------------------------------------------------------------------------


def test_best_of_n_and_its_expectation_by_brute_force():
    assert bon_baselines.best_of_n(torch.tensor([[1.0, 5.0, 2.0], [3.0, 3.0, 0.0]])).tolist() == [1, 0]
    rewards = torch.tensor([[0.3, -2.0, 0.3, 7.0, 1.0, -0.5, 2.5], [1.0, 1.0, 1.0, 0.0, 0.0, 5.0, -1.0]]).double()
    for N in range(1, 8):
        expected = rewards[:, list(itertools.combinations(range(7), N))].amax(-1).mean(-1)
        torch.testing.assert_close(bon_baselines.expected_best_of_n(rewards, N), expected, rtol=1e-12, atol=1e-12)
    for N in (0, 8, 2.5):
        with pytest.raises(ValueError, match="from 1 to M"):
            bon_baselines.expected_best_of_n(rewards, N)


@pytest.mark.parametrize("N", [1, 2, 1000, 50_000, 100_000])
def test_expected_best_of_n_is_stable_for_many_rewards(N):
    """Of the numbers 1 … M the highest of N without replacement is N(M+1)/(N+1) on average."""
    M = 100_000
    value = bon_baselines.expected_best_of_n(torch.arange(1, M + 1)[torch.randperm(M, generator=torch.Generator().manual_seed(0))], N)
    assert value.item() == pytest.approx(N * (M + 1) / (N + 1), rel=1e-9)


def test_losses_of_the_baselines_by_hand():
    best, worst, ref_best, ref_worst = (torch.tensor(x).double() for x in ([-10.0, -12.0], [-9.0, -14.0], [-11.0, -11.0], [-9.5, -12.0]))
    h = [(-10 + 11) - (-9 + 9.5), (-12 + 11) - (-14 + 12)]  # 0.5, 1
    assert bon_baselines.sft_loss(best).item() == pytest.approx(11)
    dpo = bon_baselines.dpo_loss(best, worst, ref_best, ref_worst, 0.3).item()
    assert dpo == pytest.approx(sum(math.log1p(math.exp(-0.3 * x)) for x in h) / 2)
    for bad in (0, 2.5):
        with pytest.raises(ValueError, match="whole number"):
            bon_baselines.bonbon_beta(bad)
    assert bon_baselines.bonbon_beta(8) == pytest.approx(0.02755, abs=5e-6) and bon_baselines.bonbon_beta(1) == math.inf
    target = 3 * (1 + 1 / 2 + 1 / 3)  # N = 4
    contrast = sum((x - target) ** 2 for x in h) / 2
    value = bon_baselines.bonbon_loss(best, worst, ref_best, ref_worst, 4, alpha=0.2).item()
    assert value == pytest.approx(0.2 * 11 + 0.8 * contrast)


def test_bonbon_balances_its_terms():
    best = torch.tensor([-10.0, -12.0], dtype=torch.double, requires_grad=True)
    others = [torch.tensor(x).double() for x in ([-9.0, -14.0], [-11.0, -11.0], [-9.5, -12.0])]
    loss = bon_baselines.bonbon_loss(best, *others, 4)
    loss.backward()
    likelihood, contrast = 11.0, bon_baselines.bonbon_loss(best.detach(), *others, 4, alpha=0).item()
    alpha = contrast / (likelihood + contrast)
    assert alpha * likelihood == pytest.approx((1 - alpha) * contrast) and loss.item() == pytest.approx(2 * alpha * likelihood)
    fixed = best.detach().clone().requires_grad_(True)
    bon_baselines.bonbon_loss(fixed, *others, 4, alpha=alpha).backward()
    torch.testing.assert_close(best.grad, fixed.grad)  # nothing flows through α


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_losses_agree_with_trl(kind):
    """TRL's DPOTrainer on the same log-probabilities; its IPO is per token, so responses of one token are compared."""
    pytest.importorskip("trl")
    from collections import defaultdict
    from types import SimpleNamespace
    from unittest.mock import MagicMock
    from trl import DPOTrainer
    generator = torch.Generator().manual_seed(0)
    tokens, beta, N = 1 if kind == "ipo" else 5, 0.3, 8
    ids, ref = torch.randint(20, (6, 3 + tokens), generator=generator), -5 * torch.rand(6, generator=generator)
    logits = torch.randn(6, 3 + tokens, 20, generator=generator)
    mask = (torch.arange(3 + tokens) >= 3).long().expand(6, -1)
    trainer = MagicMock(aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind],
                        loss_weights=[1.0], beta=beta if kind == "sigmoid" else bon_baselines.bonbon_beta(N), use_weighting=False,
                        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0)
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda x: x
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask,
              "ref_chosen_logps": ref[:3], "ref_rejected_logps": ref[3:]}
    expected = DPOTrainer._compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs, False)
    chosen, rejected = vbon.token_log_probs(logits[:, 2:-1], ids[:, 3:]).sum(1).chunk(2)
    ours = (bon_baselines.dpo_loss(chosen, rejected, ref[:3], ref[3:], beta) if kind == "sigmoid" else
            bon_baselines.bonbon_loss(chosen, rejected, ref[:3], ref[3:], N, alpha=0.0))
    torch.testing.assert_close(ours, expected)


def test_bonbons_identity_on_the_toy(toy):
    """E[log-ratio of the best] − E[log-ratio of the worst] = (N−1)·H_{N−1} under exact Best-of-N. Exact for a continuous reward;
    the toy's responses have mass, which the difference of F at their two ends bounds."""
    args, _, task, _ = toy
    N = 4
    world = vbon.exact_world(task, vbon.Args(**TOY | {"out": "x", "N": N}))
    F, p = world["log_F"].exp(), world["log_ref"].exp()
    worst = (1 - F).clamp(min=0) ** N - (1 - F - p).clamp(min=0) ** N
    best = world["log_bon"].exp()
    log_ratio = world["log_bon"] - world["log_ref"]
    expected = (N - 1) * sum(1 / k for k in range(1, N))
    value = ((best - worst) * log_ratio).sum(1)
    torch.testing.assert_close(worst.sum(1), torch.ones(4).double(), atol=1e-4, rtol=0)
    assert (1 / (2 * bon_baselines.bonbon_beta(N))) == pytest.approx(expected)
    assert ((value / expected - 1).abs() < 0.05).all(), value / expected


def test_pairs_are_ordered_and_log_probs_are_those_of_sampling(toy, tmp_path, monkeypatch):
    args, _, task, _ = toy
    monkeypatch.chdir(tmp_path)
    import random
    baseline = bon_baselines.Args(objective="dpo", task="toy", **{k: v for k, v in TOY.items() if k != "rollouts"}, N=5, unfrozen_layers=1)
    samples = vbon.reference_samples(task, baseline, DEVICE, keep_tokens=True)
    reward = {(prompt, tuple(t)): r for (split, prompt), (rewards, tokens) in samples.items() if split == "train" for r, t in zip(rewards.tolist(), tokens)}
    pairs = list(itertools.islice(bon_baselines.training_pairs(samples, task.train_prompts, baseline, random.Random(0)), 100))
    assert all(reward[p, tuple(y)] > reward[p, tuple(z)] for p, y, z in pairs) and len({p for p, _, _ in pairs}) == 4
    baseline.objective = "bonbon"
    gaps = [(reward[p, tuple(y)], reward[p, tuple(z)]) for p, y, z in
            itertools.islice(bon_baselines.training_pairs(samples, task.train_prompts, baseline, random.Random(0)), 2000)]
    for end, sign in ((0, 1), (1, -1)):  # the mean over random groups of N is the unbiased estimate
        expected = np.mean([sign * bon_baselines.expected_best_of_n(sign * samples["train", p][0], 5).item() for p in task.train_prompts])
        values = [g[end] for g in gaps]
        assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / math.sqrt(len(values)))
    baseline.objective = "dpo"
    one_pass = list(itertools.islice(bon_baselines.training_pairs(samples, task.train_prompts[:1], baseline, random.Random(0)), 12))
    assert len({tuple(y) for pair in one_pass for y in pair[1:]}) <= 6  # twelve pairs of six responses
    policy, _ = vbon.make_policy(task.ref, 1)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    baseline.temperature = 0.7
    prompts = [["the plot was", "plot was", "the the acting was"][i % 3] for i in range(12)]  # padded on the left, then
    prompt_ids, uniforms = [task.encode(p) for p in prompts], torch.rand(12, 3, generator=torch.Generator().manual_seed(1))
    tokens, mask, of_policy, _ = vbon.generate(policy, prompt_ids, uniforms, task.tokenizer.eos_token_id, 0.7)
    responses = [t[m].tolist() for t, m in zip(tokens, mask)]
    for K in (1, -1):
        baseline.unfrozen_layers = K
        log_pi, log_ref = bon_baselines.response_log_probs(policy, task.ref, task, prompts, responses, baseline, DEVICE)
        torch.testing.assert_close(log_pi.detach(), of_policy.sum(1), atol=1e-4, rtol=1e-4)
        for i in range(12):
            with torch.no_grad():
                log_probs = (task.ref(torch.tensor([prompt_ids[i] + responses[i]])).logits[0] / 0.7).log_softmax(-1)
            places = range(len(prompt_ids[i]) - 1, len(prompt_ids[i]) + len(responses[i]) - 1)
            assert log_ref[i].item() == pytest.approx(sum(log_probs[t, y].item() for t, y in zip(places, responses[i])), abs=1e-4)
        assert log_pi.requires_grad and not log_ref.requires_grad and not torch.allclose(log_pi.detach(), log_ref, atol=0.1)


BASELINE_TOY = [str(x) for k, v in (TOY | {"episodes": 4096, "minibatch": 64}).items() for x in ("--" + k.replace("_", "-"), v)]


@pytest.fixture(scope="module")
def baselines(toy):
    os.chdir(toy[3])
    for method in bon_baselines.METHODS:
        assert bon_baselines.main([method, "--N", "4", *BASELINE_TOY, "--out", method]) == 0
    return toy[3]


@pytest.mark.parametrize("method", bon_baselines.METHODS)
def test_baselines_on_the_toy(baselines, method):
    result = json.load(open(baselines / method / "result.json"))
    reference = json.load(open(baselines / "one/result.json"))
    assert set(reference) - {"seconds_sampling", "exact/kl_to_bon_of_optimum", "episodes", "kl_to_ref_plain", "kl_to_ref_plain_se",
                             "kl_to_ref_k3", "kl_to_ref_k3_se"} <= set(result)
    assert result["exact/win_rate"] > 0.6 and result["exact/kl_to_ref"] > 0.1 and result["exact/reward"] > result["ref/reward"] + 0.5
    if method == "bon":  # what was drawn agrees with what is known
        for name in ("reward", "win_rate", "kl_to_ref"):
            assert result[name] == pytest.approx(result["exact/" + name], abs=4 * result[name + "_se"])
        assert result["bon/expected_reward"] == pytest.approx(result["exact/reward"], abs=0.5)
        assert abs(result["exact/kl_to_bon"]) < 1e-9 and result["exact/win_rate"] == pytest.approx(0.8, abs=0.02)
    else:
        assert result["exact/kl_to_bon"] > 0 and (baselines / method / "policy/model.safetensors").exists()


def test_baselines_on_own_models(pieces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in bon_baselines.METHODS:
        assert bon_baselines.main([str(a) for a in [method, *IMDB, *own(pieces), "--out", method]]) == 0
        result = json.load(open(f"{method}/result.json"))
        assert 0 < result["reward"] < 1 and 0 <= result["win_rate"] <= 1
    assert len(list(Path("samples").iterdir())) == 1  # all of them learn from one file


@pytest.mark.parametrize("argv, word", [
    ([], "bon-sft"), (["ppo"], "bonbon"), (["bonbon", "--N", "2.5"], "whole number"), (["dpo", "--beta", "0"], "--beta"),
    (["bonbon", "--alpha", "2"], "--alpha"), (["dpo", "--minibatch", "64", "--episodes", "32"], "--episodes"), (["dpo", "--ref", "gpt2"], "--task imdb"),
    (["bon", "--max-new-tokens", "6"], "at most 4")])
def test_bad_flags_of_the_baselines(argv, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bon_baselines.main(argv) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("bon_baselines.py: ") and word in line and not os.listdir(tmp_path)


# --- evaluate.py ------------------------------------------------------------------------------------------------------


def test_pareto_front_by_brute_force():
    points = torch.randint(0, 6, (60, 2), generator=torch.Generator().manual_seed(0)).tolist()
    expected = [not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points) for x, y in points]
    assert evaluate.pareto_front(points).tolist() == expected and 0 < sum(expected) < 60
    assert evaluate.pareto_front([(1.0, 2.0)]).tolist() == [True]
    runs = [{"method": m, "result": {"kl_to_ref": x, "win_rate": y}} for m, x, y in
            (("vBoN", 1, 0.8), ("vBoN", 2, 0.9), ("PPO", 1.5, 0.7), ("PPO", 0.5, 0.6), ("BoN", 0.1, 0.99))]
    assert evaluate.front_shares(runs, "win_rate") == {"vBoN": 2 / 3, "PPO": 1 / 3}


def test_kolmogorov_smirnov():
    a = torch.arange(100.0)
    assert evaluate.kolmogorov_smirnov(a, a) == (0, 1)
    D, p = evaluate.kolmogorov_smirnov(a, a + 1000)
    assert D == 1 and p < 1e-20
    generator, rejected = torch.Generator().manual_seed(0), 0
    for _ in range(400):  # two samples of one law are told apart in about 5 % of cases
        rejected += evaluate.kolmogorov_smirnov(torch.rand(100, generator=generator), torch.rand(200, generator=generator))[1] < 0.05
    assert 6 <= rejected <= 34
    assert evaluate.kolmogorov_smirnov(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([1.5, 2.5]))[0] == pytest.approx(0.5)


def test_evaluate_table_csv_and_figures(toy, baselines, tmp_path, capsys):
    runs = [str(toy[3] / name) for name in ("one", "three")]
    assert evaluate.main([*runs, "--csv", str(tmp_path / "toy.csv"), "--figures", str(tmp_path), "--curves"]) == 0
    table = capsys.readouterr().out
    results = [json.load(open(f"{run}/result.json"))["exact/kl_to_bon"] for run in runs]
    assert f"{np.mean(results):.3f} ± {np.std(results, ddof=1) / math.sqrt(2):.3f}" in table and "N = 16, closed forms" in table
    assert len((tmp_path / "toy.csv").read_text().splitlines()) == 3
    assert evaluate.main([*runs, *(str(baselines / m) for m in bon_baselines.METHODS), "--figures", str(tmp_path), "--responses", "1"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ("vBoN, N = 16", "BoN-SFT, N = 4", "DPO, β = 0.1", "share of the Pareto front", "the acting was"))
    for name in ("toy.png", "toy-pareto.png", "toy-distance.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_the_nearest_bon_of_bon_is_itself(baselines, monkeypatch):
    monkeypatch.chdir(baselines)
    run = evaluate.add_nearest_bon(evaluate.read_run("bon"))
    assert run["result"]["exact/nearest_N"] == pytest.approx(4, rel=0.05) and run["result"]["exact/kl_to_nearest_bon"] < 1e-3


def test_other_temperatures_and_another_judge(pieces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_small_models(tmp_path / "second", seed=5)
    for method in ("bon", "dpo"):
        assert bon_baselines.main([str(a) for a in [method, *IMDB, *own(pieces), "--out", method]]) == 0
    assert evaluate.main(["bon", "dpo", "--temperatures", "0.5", "1", "--reward", str(tmp_path / "second/reward"), "--figures", "figures"]) == 0
    out = capsys.readouterr().out
    assert "T = 0.5" in out and "judge reward" in out and Path("figures/imdb-temperatures.png").exists()
    (path,) = Path("dpo").glob("eval-T1-*.json")
    anew, own_result = json.load(open(path))["result"], json.load(open("dpo/result.json"))
    assert anew["reward"] != own_result["reward"] and anew["kl_to_ref"] == pytest.approx(own_result["kl_to_ref"], rel=1e-4)  # same responses


def test_a_sweep_trains_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two jobs at a time
    argv = ["--sweep", "small", "--jobs", "2", "--figures", "figures", "--", *(str(x) for k, v in TOY.items() for x in ("--" + k.replace("_", "-"), v))]
    monkeypatch.setitem(evaluate.SWEEPS, "small", {"vbon": ("N", [2], 1), "bound": ("beta", [1 / 3], 1)})
    assert evaluate.main(argv) == 0
    stamps = {path: path.stat().st_mtime for path in Path("sweeps").rglob("result.json")}
    assert len(stamps) == 2
    capsys.readouterr()
    removed = next(iter(stamps))
    removed.unlink()
    monkeypatch.setitem(evaluate.SWEEPS, "small", {"vbon": ("N", [2, 4], 1), "bound": ("beta", [1 / 3], 1), "bon-sft": ("N", [40], 1)})
    assert evaluate.main(argv) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("vBoN, N = 2", "vBoN, N = 4", "L bound, N = 4", "BoN-SFT, N = 40, M = 400", "figures/toy-bound.png"))
    assert all((path.stat().st_mtime == stamp) == (path != removed) for path, stamp in stamps.items()) and len(list(Path("sweeps").rglob("result.json"))) == 4
    capsys.readouterr()
    assert evaluate.main([*argv, "--clip", "0.5"]) == 2  # what is there was made otherwise
    assert "trained with other clip" in capsys.readouterr().err


def test_samples_needed(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = vbon.Args(**TOY | {"samples": "s.jsonl", "M": 600, "out": "x"})
    vbon.reference_samples(toy[2], args, DEVICE)
    assert evaluate.main(["--log-F", "s.jsonl", "--figures", "."]) == 0
    out = capsys.readouterr().out
    assert "4 prompts" in out and Path("log_F.png").exists()
    statistics = [float(line.split()[-1]) for line in out.splitlines() if line.strip().split()[0].isdigit() and "prompts" not in line]
    assert len(statistics) == 6 and statistics[0] > statistics[-1]


def test_evaluate_refuses(toy, baselines, pieces, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    assert bon_baselines.main([str(a) for a in ["bon", *IMDB, *own(pieces), "--out", "imdb"]]) == 0
    copy = shutil.copytree(toy[3] / "one", tmp_path / "copy")
    (tmp_path / "few.jsonl").write_text('{"vbon_samples": 3}\n')
    for argv, word in ((["run"], "not a finished run"), ([str(toy[3] / "one"), "imdb"], "different tasks"), ([], "nothing to evaluate"),
                       (["imdb", "--reward", "no/such-judge"], "--reward"), ([str(toy[3] / "one"), "--reward", "x"], "--task imdb"),
                       (["--log-F", "few.jsonl"], "600 samples"), (["--log-F", "none.jsonl"], "no such file"), (["--nonsense"], "--nonsense"),
                       (["--sweep", "small", "--", "--N", "3"], "sets --N"), (["--sweep", "small", "--", "--lr", "-3"], "--lr must be"),
                       (["--sweep", "small", "--jobs", "0"], "--jobs"), ([str(toy[3] / "one"), str(copy)], "a seed comes twice"), (["--temperatures", "hot"], "--temperatures")):
        capsys.readouterr()
        assert evaluate.main(argv) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("evaluate.py: ") and word in line, line
