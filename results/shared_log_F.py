#!/usr/bin/env python3
"""Estimate log F of many prompts jointly, which needs far fewer reference samples per prompt.

    # Convert cached reference samples, then train on the shared estimate:
    python results/shared_log_F.py convert samples/imdb-… samples-shared --M 32 --reward DIR
    python vbon.py --task imdb --ref … --samples samples-shared --M 200

    # Compare the shared estimate with ranks, for results/shared.* and figures/shared.png:
    python results/shared_log_F.py study --task imdb --ref … --train-prompts 256 --data-seed 1

`shared_log_F` is the estimator. The reward distributions of all prompts have one shape, and each
prompt has a location and a scale. The converter writes a samples folder whose rewards are 200
quantiles of the estimate per prompt, in random order, so that the first M are a fair sample.
vbon.py trains on them with its add_one estimator. The study measures the KL to Best-of-N that M
samples per prompt leave after perfect training, with ranks and with the shared estimate.
"""
import argparse
import contextlib
import csv
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import vbon
from vbon import UserError

HERE = Path(__file__).resolve().parent

# ========== 1. The estimator =====================================================================


def shared_log_F(ref_rewards, features=None):
    """Estimate log F of P prompts jointly, from the reference rewards of all of them.

    1. All rewards are ranked together. The ranks become normal quantiles z.
    2. `location_scale` fits z = μ_x + σ_x·e for each prompt x, with one distribution of e for all.
       This gives an estimate G of F, also for a prompt without samples.
    3. With k of the prompt's M rewards below y, F̂ = (k + c·G) / (M + c), where c = 1 + κ/(1−G), so
       that G has the largest weight in the upper tail. κ is chosen on held-out samples: each half
       of the samples predicts the other one. Where prompts have unlike shapes κ is 0, and F̂ is
       close to "add_one".

    The paper leaves sharing between prompts to future work (§5.1). This method is ours.

    Args:
        ref_rewards: P tensors (M_x,) on the CPU. Lengths may differ and be 0. Only ranks count.
        features: (P, K), numbers that predict a prompt's rewards, such as the reward of the bare
            prompt. Only ranks count.
    Returns:
        function (rewards (n,), prompt indices (n,)) -> log F̂ (n,), float64, in nats, finite and
        monotone in the reward.
    Raises:
        ValueError: a reward or feature is NaN, or there is no sample at all.
    """
    r = torch.cat([torch.as_tensor(r, dtype=torch.double) for r in ref_rewards])
    P, n, pool = len(ref_rewards), len(r), r.sort().values
    features = torch.zeros(P, 0) if features is None else torch.as_tensor(features)
    if n == 0 or r.isnan().any() or features.isnan().any():
        raise ValueError("shared_log_F needs a sample of at least one prompt, and no NaN, got "
                         f"{n} samples")
    owner = torch.arange(P).repeat_interleave(torch.tensor([len(r) for r in ref_rewards]))
    below, not_above = (torch.searchsorted(pool, r, right=right) for right in (False, True))

    def quantile(rank, of):
        return torch.special.ndtri((rank.double() + 0.5) / of)

    # Normal quantiles of the rewards, with ties in random order, and of the features (mid-ranks).
    half, u = torch.rand(2, n, generator=torch.Generator().manual_seed(0)).double()
    z = quantile(below + u * (not_above - below - 1), n + 1)
    columns = features.double().T.contiguous()
    ascending = columns.sort(-1).values
    first, last = (torch.searchsorted(ascending, columns, right=right) for right in (False, True))
    s = quantile((first + last) / 2 - 0.5, P).T
    X = torch.cat([torch.ones(P, 1).double(), s, s ** 2 - 1], 1)

    def fit(used):
        """Fit to some of the samples. Returns a function (below, prompt) -> k, M, 1 − G."""
        M, mu, sigma, e = location_scale(z[used], owner[used], X)
        keys = (owner[used] * (n + 1) + below[used]).sort().values  # ascending within a prompt

        def look_up(below, prompt):
            first = prompt * (n + 1)
            k = torch.searchsorted(keys, first + below) - torch.searchsorted(keys, first)
            residual = (quantile(below, n + 1) - mu[prompt]) / sigma[prompt]
            less = torch.searchsorted(e, residual)
            return k, M[prompt], 1 - (less.double() + 0.5) / (len(e) + 1)
        return look_up

    def share_above(k, M, above, kappa):
        """1 − F̂ in a form that is monotone even after rounding."""
        return (M - k + above + kappa) / (M + 1 + kappa / above)

    # Each held-out sample is a threshold. y is the share of the other held-out samples of its
    # prompt that are not below it. The weights make up for the few thresholds in the tail.
    half, losses = half < 0.5, {}
    for held in (half, ~half):
        k, size, _ = fit(held)(below[held], owner[held])
        known = fit(~held)(below[held], owner[held])
        y = (size - k - 1) / (size - 1).clamp(min=1)
        weight = (size > 1) / (1 - (k + 0.5) / size)
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
    """Fit z = μ_x + σ_x·e, with one distribution of e for all P prompts x, to n samples.

    μ_x ~ Normal(X_x·b, τ²), with b and τ² fitted by EM, so that the mean of few samples is shrunk
    towards X_x·b. σ_x² is shrunk towards the common variance, which counts as 16 samples, and
    widened by the error of μ_x.

    Args: z (n,), prompt (n,) indices, X (P, K).
    Returns: M, μ and σ, each (P,), and the residuals e (n,), ascending, with mean square 1.
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
        weight = 1 / (variance / M + tau2)  # 0 for a prompt without samples
        WX = weight.unsqueeze(1) * X
        prior = X @ torch.linalg.solve(X.T @ WX + ridge, WX.T @ mean)
        mu, error = prior + tau2 * weight * (mean - prior), tau2 * (1 - tau2 * weight)
        tau2 = ((M > 0) * ((mu - prior) ** 2 + error)).sum() / (M > 0).sum().clamp(min=1)
        tau2 = tau2.clamp(min=1e-6)
    sigma = (variance + error).sqrt()
    e = ((z - mu[prompt]) / sigma[prompt]).sort().values
    return M, mu, sigma, e / e.square().mean().sqrt().clamp(min=1e-6)


# ========== 2. Conversion of a samples folder ====================================================


def shared_quantiles(ref_rewards, features=None, Q=200):
    """Return Q quantiles of the shared F̂ of each prompt, (P, Q), ascending.

    "add_one" of these quantiles is the shared F̂, up to 1/Q. Args: as in `shared_log_F`.
    """
    log_F, pool = shared_log_F(ref_rewards, features), torch.cat([*ref_rewards]).sort().values
    # F̂ is a step function that rises at rewards of the pool.
    grid = pool[torch.linspace(0, len(pool) - 1, 20 * Q, dtype=torch.double).round().long()]
    levels = torch.log((torch.arange(1, Q + 1).double() + 0.5) / (Q + 1))  # between add_one's
    quantiles = []
    for i in range(len(ref_rewards)):
        estimate = log_F(grid, torch.full(grid.shape, i))
        quantiles.append(grid[(torch.searchsorted(estimate, levels) - 1).clamp(min=0)])
    return torch.stack(quantiles)


def convert(options):
    """Write a samples folder with quantiles of the shared F̂ in place of the rewards."""
    source = Path(options.samples)
    target = Path(options.target, source.name)
    with vbon.loading(f"{source} must be a folder of cached samples with header.json"):
        header = json.loads((source / "header.json").read_text("utf-8"))
    path = target / "header.json"
    if "converted" in header or path.exists() and "converted" not in path.read_text("utf-8"):
        raise UserError("the source must be sampled and the target new or converted, got "
                        f"{source} and {target}: pass another target folder")

    samples = vbon.read_samples(source)
    ref_rewards = [torch.tensor(columns["rewards"][:options.M], dtype=torch.double)
                   for columns in samples.values()]
    if not ref_rewards or not all(map(len, ref_rewards)):
        raise UserError(f"{source} must have a sample of every prompt")
    prompts = [json.loads(key) for key in samples]
    features = None
    if options.reward:
        from transformers.utils import logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        score, _ = vbon.load_reward(options.reward, options.device)
        bare = score(prompts, [""] * len(prompts))
        features = torch.tensor(bare, dtype=torch.double).unsqueeze(1)

    quantiles, generator = shared_quantiles(ref_rewards, features), torch.Generator().manual_seed(0)
    lines = []
    for prompt, row in zip(prompts, quantiles):
        shuffled = row[torch.randperm(len(row), generator=generator)]
        lines.append({"prompt": prompt, "start": 0, "rewards": shuffled.tolist(),
                      "responses": [], "tokens": []})
    # The header comes first: vbon.py refuses a converted folder without samples.
    vbon.atomic_write(path, json.dumps(header | {"converted": True}, indent=2) + "\n")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    vbon.atomic_write(target / "shared.jsonl", text)
    count = sum(map(len, ref_rewards))
    print(f"{target}: {quantiles.shape[1]} quantiles of the shared F̂ for each of {len(lines):,} "
          f"prompts, from {count:,} samples. Train on them: vbon.py --samples {options.target} "
          f"--M {quantiles.shape[1]}")


# ========== 3. Study: KL to Best-of-N after perfect training, by M ===============================

# M and N of the table; samples per test prompt that may be used; repetitions.
Ms, Ns, KNOWN, REPETITIONS = (8, 16, 32, 64, 200), (4, 16, 64, 512), 200, 3
WAYS = ("ranks", "shared", "shared, bare prompt")


def by_ranks(rewards, samples):
    """Return the add_one log F̂ of rewards (P, T) from the samples (P, M) of the same prompts."""
    k = torch.searchsorted(samples.sort(1).values, rewards).double()
    return torch.log((k + 1) / (samples.shape[1] + 1))


def floor(log_F, truth, N):
    """Return KL(π̂ ‖ π_bon) in nats for π̂ ∝ π_ref·F̂^(N−1), evaluated on T samples of π_ref.

    Args: log F̂ and the true log F, (P, T). Returns: (P,).
    """
    q, p = (((N - 1) * x).log_softmax(-1) for x in (log_F, truth))
    return (q.exp() * (q - p)).sum(-1)


def noise(samples, N, repetitions=50):
    """Return the `floor` of the true F itself, (P,), which comes from counting F with T samples.

    It is estimated by bootstrap from the samples (P, T), which are ascending.
    """
    found, generator = 0, torch.Generator().manual_seed(0)
    for _ in range(repetitions):
        rows = torch.randint(samples.shape[1], samples.shape, generator=generator)
        again = samples.gather(1, rows).sort(1).values
        estimate, truth = by_ranks(again, samples), by_ranks(again, again)
        found = found + floor(estimate, truth, N) / repetitions
    return found


def measure(pool, known, samples, bare):
    """Measure the floor of every way, M and N. The noise of the truth is subtracted.

    Args:
        pool: (P', 200), samples of other prompts.
        known: (P, 200), samples of which M are used.
        samples: (P, T), the truth.
        bare: (P + P',), rewards of the bare prompts.
    Returns: {(way, M, N): (mean over prompts, standard error)}.
    """
    samples = samples.sort(1).values
    P, T = samples.shape
    prompt, truth = torch.arange(P).repeat_interleave(T), by_ranks(samples, samples)
    own, results = {N: noise(samples, N) for N in Ns}, {}

    def by_all(used, others, bare):
        features = None if bare is None else bare.unsqueeze(1)
        return shared_log_F([*used, *others], features)(samples.flatten(), prompt).view(P, T)
    for M in Ms:
        found, parts = {}, list(zip(known.split(M, 1), pool.split(M, 1)))
        for used, others in [pair for pair in parts if pair[0].shape[1] == M][:REPETITIONS]:
            ways = {("ranks", M): by_ranks(samples, used),
                    ("shared", M): by_all(used, others, None),
                    ("shared, bare prompt", M): by_all(used, others, bare)}
            if M == 32:  # M = 0: only the other prompts have samples
                ways["shared, bare prompt", 0] = by_all(used[:, :0], others, bare)
            for way, log_F in ways.items():
                for N in Ns:
                    found.setdefault((*way, N), []).append(floor(log_F, truth, N) - own[N])
        for key, floors in found.items():
            of_prompts = torch.stack(floors).mean(0)
            results[key] = of_prompts.mean().item(), of_prompts.std().item() / math.sqrt(P)
    return results


def show(name, results):
    """Print the table of one reward."""
    rows = [[name, *(f"N = {N}" for N in Ns)]]
    for way in WAYS:
        for M in sorted({M for name, M, _ in results if name == way}):
            cells = ("{:.4f} ± {:.4f}".format(*results[way, M, N]) for N in Ns)
            rows.append([f"  {way}, M = {M}", *cells])
    print(evaluate.aligned(rows) + "\n")


def power_law(way, results):
    """Return the power law that fits the floors of a way best, by least squares of the logs."""
    keys = [(M, N) for M in Ms for N in Ns]
    X = torch.tensor([[1, math.log(N - 1), -math.log(M)] for M, N in keys]).double()
    y = torch.tensor([results[way, M, N][0] for M, N in keys]).double().clamp(min=1e-4).log()
    a, b, c = torch.linalg.lstsq(X, y.unsqueeze(1)).solution.flatten().tolist()
    return f"{way}: about {math.exp(a):.3f}·(N−1)^{b:.2f}/M^{c:.2f}"


def plot(path, name, results):
    title = f"{name}: KL to Best-of-N after perfect training, by M"
    with evaluate.picture(path, title, 3) as axes:
        for a, N in zip(axes, (16, 64, 512)):
            for way, color in zip(WAYS, ("C1", "C0", "C2")):
                mean, error = zip(*(results[way, M, N] for M in Ms))
                a.errorbar(Ms, mean, error, fmt="o-", capsize=3, color=color, label=way)
            a.plot(Ms, [(N - 1) / (4 * M) for M in Ms], "k:", label="(N−1)/(4M)")
            a.axhline(results[way, 0, N][0], color=color, ls="--", lw=1, label=f"{way}, M = 0")
            a.set(xscale="log", yscale="log", xlabel="M, reference samples per prompt",
                  title=f"N = {N}", ylabel="KL(π̂ ‖ π_bon), nats")
            a.set_xticks(Ms, [str(M) for M in Ms])
            a.minorticks_off()


def load_samples(args, split, M):
    """Load a split with M reference samples per prompt: task, rewards (P, M) and texts."""
    args = argparse.Namespace(**vars(args) | {"M": M})
    task = vbon.setup(args, split)
    rewards, tokens = vbon.reference_samples(task, args, tokens=True)
    texts = [vbon.decode(task, [prompt] * M, ids) for prompt, ids in zip(task.prompts, tokens)]
    return task, rewards, texts


def study(args):
    """Print the tables. Write results/shared.csv and figures/shared.png."""
    with contextlib.redirect_stdout(sys.stderr):
        task, test, test_texts = load_samples(args, "test", args.test_M)
        others, pool, pool_texts = load_samples(args, "train", KNOWN)
        P, prompts = len(task.prompts), [*task.prompts, *others.prompts]
        ends = [task.end] * len(prompts)
        rewards = {"the task's own reward": (test, pool, task.score(prompts, ends))}
        rounded = ((4 * x).round() / 4 for x in (test, pool))
        rewards["the same, rounded to five steps"] = (*rounded, task.score(prompts, ends))
        if args.second_reward:
            score, _ = vbon.load_reward(args.second_reward, task.ref.device, task.end,
                                        args.no_eos_reward)
            found = [score([prompt] * len(texts), texts) for prompt, texts in
                     tqdm([*zip(prompts, test_texts + pool_texts)], desc="second reward model")]
            found = [torch.tensor(x, dtype=torch.double) for x in (found[:P], found[P:])]
            rewards["a second reward model's"] = (*found, score(prompts, ends))

    lines = []
    print(f"{P} prompts, F from {args.test_M - KNOWN} samples each; samples of {len(prompts) - P} "
          "other prompts; ± over prompts\n")
    for name, (test, pool, bare) in rewards.items():
        bare = torch.tensor(bare, dtype=torch.double)
        results = measure(pool, test[:, :KNOWN], test[:, KNOWN:], bare)
        show(name, results)
        lines += [[name, way, M, N, *result] for (way, M, N), result in results.items()]
        if name == "the task's own reward":
            print(*(power_law(way, results) for way in WAYS), "", sep="\n")
            with contextlib.redirect_stdout(sys.stderr):
                plot(str(HERE.parent / "figures" / "shared.png"), args.task, results)
    with open(HERE / "shared.csv", "w", newline="", encoding="utf-8") as file:
        rows = [["reward", "way", "M", "N", "kl", "se"], *lines]
        csv.writer(file).writerows(rows)


# ========== 4. Command line ======================================================================


def parse_convert(argv):
    parser = argparse.ArgumentParser(prog="shared_log_F.py convert", allow_abbrev=False,
                                     description="Convert cached reference samples.")

    def error(message):
        raise UserError(message)
    parser.error, add = error, parser.add_argument
    add("samples", help="folder of cached samples, samples/<task>-<hash>")
    add("target", help="folder for the converted one, to be passed as vbon.py --samples")
    add("--M", type=int, help="number of samples per prompt that are used; by default all")
    add("--reward", help="reward model that scores the bare prompts, which is the feature")
    add("--device", default="cpu", help="device of the reward model")
    options = parser.parse_args(argv)
    if options.M is not None and options.M < 1:
        raise UserError(f"--M must be at least 1, got {options.M}")
    return options


def parse_study(argv):
    """Parse vbon.py's flags and those of the study. The runs of vbon.py are not touched."""
    parser = vbon.make_parser(vbon.RECIPES, "Compare the shared estimate with ranks.", argv)
    add = parser.add_argument_group("study").add_argument
    add("--objective", choices=("vbon",), default="vbon", help=argparse.SUPPRESS)
    add("--test-prompts", type=int, default=48, help="number of test prompts")
    add("--test-M", type=int, default=1200, help="number of reference samples per test prompt")
    add("--second-reward", metavar="MODEL", help="second reward model for the same responses")
    args = vbon.parse_args([*argv, "--overwrite"], parser)
    if args.task == "toy" or args.test_M <= KNOWN:
        raise UserError(f"the study needs --task imdb or tldr and a --test-M above {KNOWN}, got "
                        f"{args.task} and {args.test_M}")
    args.out = None  # there is no run to resume
    return args


def main(argv=None):
    command, *argv = (sys.argv[1:] if argv is None else argv) or [""]
    jobs = {"convert": (parse_convert, convert), "study": (parse_study, study)}
    if command in ("-h", "--help"):
        print(__doc__)
        return 0

    def parse():
        if command not in jobs:
            raise UserError(f"the first argument must be convert or study, got {command!r}")
        return jobs[command][0](argv)
    return vbon.run_script("shared_log_F.py", parse, lambda options: jobs[command][1](options))


if __name__ == "__main__":
    sys.exit(main())
