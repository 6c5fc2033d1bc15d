#!/usr/bin/env python3
"""Measure a policy that knows one number about a partial response: how the reward model scores it.

    python results/ceiling.py --task imdb --N 16 --M 200 --train-prompts 256 … | tee FILE

Best-of-N samples token a after the text s with probability π_ref(a|s)·Z(sa)/Z(s), where
Z(s) = E[F^(N−1) | s] over responses of π_ref that start with s. Here Z is fitted to cached
reference samples as a function of one number, the rank of the partial response's reward. The policy
samples 32 tokens from π_ref and takes one of them in proportion to Z. It is worse than Best-of-N
because that number does not predict F exactly. A trained policy that does worse still is limited by
its network or its training. The flags are vbon.py's and evaluate.py's --test-prompts and --test-M.
"""
import argparse
import contextlib
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import vbon

FITTED, CANDIDATES = 4000, 32  # responses in the fit of Z; tokens sampled at each place


def quantiles(task, prompts, tokens, ref_rewards):
    """Return u (B,), the rank of each partial response's reward as a normal quantile.

    Args: B prompts, B lists of token ids, ref_rewards (B, M).
    """
    texts = vbon.decode(task, prompts, tokens)
    rewards = torch.tensor(task.score(prompts, texts), dtype=torch.double)
    k = vbon.mid_ranks(rewards, ref_rewards)
    return torch.special.ndtri((k + 0.5) / (ref_rewards.shape[1] + 1))


def powers(u):
    return torch.stack([torch.ones_like(u), u, u ** 2, u ** 3], -1)


def fit_log_Z(u, y, ridge=1.0):
    """Fit log E[y | u] as a cubic, by Newton's method on exp(g) − y·g.

    Args: u and y, (n,). Returns: coefficients (4,).
    """
    X, b = powers(u), torch.zeros(4, dtype=torch.double)
    b[0] = y.mean().log()
    penalty = ridge * torch.diag(torch.tensor([0.0, 1, 4, 16], dtype=torch.double))
    for _ in range(50):
        mean = (X @ b).clamp(max=5).exp()
        hessian = X.T @ (mean.unsqueeze(1) * X) + penalty
        step = torch.linalg.solve(hessian, X.T @ (mean - y) + penalty @ b)
        b -= step * (1 / step.norm()).clamp(max=1.0)
    return b


def fit_all(task, ref_rewards, tokens, args):
    """Fit log Z of partial responses of 0, 1, …, T tokens, (T + 1, 4), on the training prompts.

    Args: ref_rewards (P, M), tokens, P lists of M lists of token ids.
    """
    P, M = ref_rewards.shape
    rows = [(p, i) for i in range(min(M, -(-FITTED // P))) for p in range(P)][:FITTED]
    prompts = [task.prompts[p] for p, _ in rows]
    ref = torch.stack([ref_rewards[p] for p, _ in rows])
    own = torch.stack([ref_rewards[p, i] for p, i in rows])
    # The rank of a sample among the others. Its mid-rank counts itself as one half.
    y = ((vbon.mid_ranks(own, ref) - 0.5) / (M - 1)) ** (args.N - 1)
    found = [torch.tensor([y.mean().log(), 0, 0, 0], dtype=torch.double)]
    for t in tqdm(range(1, args.max_new_tokens + 1), desc="fit"):
        u = quantiles(task, prompts, [tokens[p][i][:t] for p, i in rows], ref)
        found.append(fit_log_Z(u, y))
    return torch.stack(found)


@torch.no_grad()
def sample(task, ref_rewards, log_Z, args):
    """Sample a response to each of P test prompts.

    Args: ref_rewards (P, M), log_Z of `fit_all`.
    Returns: P texts and P upper bounds of KL(π ‖ π_ref) along each in nats. The bound is the KL of
    the choice among the sampled tokens. It is almost exact, because one token changes Z little.
    """
    eos, generator = task.tokenizer.eos_token_id, torch.Generator().manual_seed(args.seed)
    prompts = task.prompts
    tokens, kls = [[] for _ in prompts], torch.zeros(len(prompts), dtype=torch.double)
    for t in tqdm(range(args.max_new_tokens), desc="look ahead"):
        alive = [i for i, ids in enumerate(tokens) if ids[-1:] != [eos]]
        if not alive:
            break
        rows = [task.encode(prompts[i]) + tokens[i] for i in alive]
        ids, mask = vbon.pad(rows, eos, "left", args.device)
        logits, _ = vbon.forward(task.ref, ids, mask, 1, args.temperature)
        pi_ref = logits[:, 0].softmax(-1).cpu()
        candidates = torch.multinomial(pi_ref, CANDIDATES, replacement=True, generator=generator)

        repeated = [i for i in alive for _ in range(CANDIDATES)]
        texts = [tokens[i] + [a] for i, a in zip(repeated, candidates.flatten().tolist())]
        u = quantiles(task, [prompts[i] for i in repeated], texts, ref_rewards[repeated])
        q = (powers(u) @ log_Z[t + 1]).view(len(alive), -1).softmax(-1)
        kls[alive] += (q * (q * CANDIDATES).log()).sum(1)
        chosen = candidates.gather(1, torch.multinomial(q, 1, generator=generator)).squeeze(1)
        for i, a in zip(alive, chosen.tolist()):
            tokens[i].append(a)
    return vbon.decode(task, prompts, tokens), kls.tolist()


def run(args):
    """Fit Z on training prompts, sample on test prompts, print the table."""
    with contextlib.redirect_stdout(sys.stderr):
        task = vbon.setup(args)
        log_Z = fit_all(task, *vbon.reference_samples(task, args, tokens=True), args)
        test = vbon.setup(args, "test")
        args.M = args.test_M
        ref_rewards = vbon.reference_samples(test, args)
        responses, kls = sample(test, ref_rewards, log_Z, args)
        metrics, _ = evaluate.measure(test, responses, kls, ref_rewards, args.N)
    names = evaluate.METRICS
    cells = [f"{metrics[key]:.3f} ± {metrics[key + '_se']:.3f}" for key in names]
    rows = [["", *names.values()], [f"one token ahead, N = {args.N}", *cells]]
    print(evaluate.aligned(rows))


def parse(argv=None):
    parser = vbon.make_parser(vbon.RECIPES, __doc__, argv)
    add = parser.add_argument_group("test").add_argument
    add("--objective", choices=("vbon",), default="vbon", help=argparse.SUPPRESS)
    add("--test-prompts", type=int, default=512, help="number of test prompts")
    add("--test-M", type=int, default=200, help="number of reference samples per test prompt")
    flags = sys.argv[1:] if argv is None else argv
    args = vbon.parse_args([*flags, "--overwrite"], parser)  # touches no run
    if args.task == "toy" or args.M < 2 or min(args.test_prompts, args.test_M) < 2:
        raise vbon.UserError("the ceiling needs --task imdb or tldr, and at least 2 for --M, "
                             f"--test-prompts and --test-M, got {args.task}, {args.M}, "
                             f"{args.test_prompts} and {args.test_M}")
    args.out = None  # there is no run to resume
    return args


def main(argv=None):
    return vbon.run_script("ceiling.py", lambda: parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())
