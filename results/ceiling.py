#!/usr/bin/env python3
"""How near to Best-of-N comes a policy that knows how the reward model likes the text so far, and no more?

    python results/ceiling.py --task imdb --N 16 --M 200 --estimator add_one --train-prompts 256 … | tee FILE

Best-of-N takes token a after the text s with probability π_ref(a|s)·Z(sa)/Z(s), Z(s) = E[F^(N−1) | s] over
π_ref's ways to go on. Here Z is fitted to π_ref's stored samples as a function of one number, the rank of the
reward of the unfinished text. The policy draws 32 tokens from π_ref and takes one of them in proportion to
Z. What it lacks is what the unfinished text's reward does not foresee; what a trained policy is worse by is
due to its network and its training. The flags are vbon.py's.
"""
import contextlib
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import vbon

FITTED, CANDIDATES = 4000, 32  # stored responses to fit Z to; tokens that are drawn at each place


def quantiles(task, prompts, tokens, ref_rewards):
    """u (B,): rank of the reward of the text so far among the prompt's M, as a normal quantile."""
    rewards = torch.tensor(task.score(prompts, vbon.decode(task, prompts, tokens)), dtype=torch.double)
    k = vbon.ranks(rewards.unsqueeze(1), ref_rewards).squeeze(1)
    return torch.special.ndtri((k + 0.5) / (ref_rewards.shape[1] + 1))


def powers(u):
    return torch.stack([torch.ones_like(u), u, u ** 2, u ** 3], -1)


def fit_log_Z(u, y, ridge=1.0):
    """Coefficients (4,) of log E[y | u] as a cubic, by Newton's method on exp(g) − y·g. u, y: (n,)."""
    X, b = powers(u), torch.zeros(4, dtype=torch.double)
    b[0] = y.mean().log()
    penalty = ridge * torch.diag(torch.tensor([0.0, 1, 4, 16], dtype=torch.double))
    for _ in range(50):
        mean = (X @ b).clamp(max=5).exp()
        step = torch.linalg.solve(X.T @ (mean.unsqueeze(1) * X) + penalty, X.T @ (mean - y) + penalty @ b)
        b -= step * (1 / step.norm()).clamp(max=1.0)
    return b


def fit_all(task, stored, args):
    """(T + 1, 4): log Z of a text of 0, 1, … T tokens. Samples of all training prompts, in turn."""
    prompts, per_prompt = task.train_prompts, min(args.M, -(-FITTED // len(task.train_prompts)))
    rows = [(p, i) for i in range(per_prompt) for p in prompts][:FITTED]
    ref = torch.stack([stored["train", p][0] for p, _ in rows])
    own = torch.stack([stored["train", p][0][i] for p, i in rows])
    others = ref.shape[1] - 1
    # The rank of a sample among the others: of itself it is half above.
    y = ((vbon.ranks(own.unsqueeze(1), ref).squeeze(1) - 0.5) / others) ** (args.N - 1)
    found = [torch.tensor([y.mean().log(), 0, 0, 0], dtype=torch.double)]
    for t in tqdm(range(1, args.max_new_tokens + 1), desc="fit"):
        texts = [stored["train", p][1][i][:t] for p, i in rows]
        u = quantiles(task, [p for p, _ in rows], texts, ref)
        found.append(fit_log_Z(u, y))
    return torch.stack(found)


@torch.no_grad()
def sample(task, ref_rewards, log_Z, args):
    """A response to each test prompt as text, and a bound on KL(π ‖ π_ref) along it in nats: that of the
    choice among the tokens drawn, which is nearly exact, as one token changes little."""
    eos, generator = task.tokenizer.eos_token_id, torch.Generator().manual_seed(args.seed)
    prompts = task.test_prompts
    ref = torch.stack([ref_rewards["test", p] for p in prompts])
    tokens, kls = [[] for _ in prompts], torch.zeros(len(prompts), dtype=torch.double)
    for t in tqdm(range(args.max_new_tokens), desc="look ahead"):
        alive = [i for i, ids in enumerate(tokens) if ids[-1:] != [eos]]
        ids, mask = vbon.pad([task.encode(prompts[i]) + tokens[i] for i in alive], eos, "left", args.device)
        logits, _, _ = vbon.forward(task.ref, ids, mask, 1)
        pi_ref = vbon.at_temperature(logits[:, 0], args.temperature).softmax(-1).cpu()
        drawn = torch.multinomial(pi_ref, CANDIDATES, replacement=True, generator=generator)
        repeated = [i for i in alive for _ in range(CANDIDATES)]
        texts = [tokens[i] + [a] for i, a in zip(repeated, drawn.flatten().tolist())]
        u = quantiles(task, [prompts[i] for i in repeated], texts, ref[repeated])
        q = (powers(u) @ log_Z[t + 1]).view(len(alive), -1).softmax(-1)
        kls[alive] += (q * (q * CANDIDATES).log()).sum(1)
        chosen = drawn.gather(1, torch.multinomial(q, 1, generator=generator)).squeeze(1)
        for i, a in zip(alive, chosen.tolist()):
            tokens[i].append(a)
    return vbon.decode(task, prompts, tokens), kls.tolist()


def main(argv=None):
    def run():
        flags = sys.argv[1:] if argv is None else argv
        args = vbon.parse_args([*flags, "--overwrite"])  # no run is touched
        with contextlib.redirect_stdout(sys.stderr):
            task = vbon.setup(args)
            stored = vbon.reference_samples(task, args, keep_tokens=True)
            log_Z = fit_all(task, stored, args)
            ref_rewards = {key: rewards.sort().values for key, (rewards, _) in stored.items()}
            metrics, _ = vbon.test_metrics(task, *sample(task, ref_rewards, log_Z, args), ref_rewards, args)
        names = evaluate.METRICS
        cells = [f"{metrics[key]:.3f} ± {metrics[key + '_se']:.3f}" for key in names]
        print(evaluate.aligned([["", *names.values()], [f"one token ahead, N = {args.N}", *cells]]))
    return vbon.run_script("ceiling.py", run)


if __name__ == "__main__":
    sys.exit(main())
