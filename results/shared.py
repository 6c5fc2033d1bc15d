#!/usr/bin/env python3
"""How near to Best-of-N perfect training comes with M samples to a prompt: by ranks, and by `shared_log_F`.

    python results/shared.py --task imdb --data-seed 1 --train-prompts 256 --test-prompts 48 --test-M 1200
    JUDGE=DIR python results/shared.py …       # … and with a second judge's rewards of the same responses

The flags are vbon.py's; samples that are missing are drawn. The first 200 samples to each test prompt
stand for what training would know of it, M at a time, together with M to each training prompt. The others are
the truth: F̂ is compared with their F, less what comparing F itself would give. Prints the table; writes
results/shared.csv and figures/shared.png.
"""
import contextlib
import csv
import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import vbon

HERE = Path(__file__).resolve().parent
Ms, Ns, KNOWN, DRAWS = (8, 16, 32, 64, 200), (4, 16, 64, 512), 200, 3
WAYS = ("ranks", "shared", "shared, bare prompt")


def by_ranks(rewards, samples):
    """log F̂ by add_one of rewards (P, T), among the samples (P, M) of each prompt."""
    k = torch.searchsorted(samples.sort(1).values, rewards).double()
    return torch.log((k + 1) / (samples.shape[1] + 1))


def floor(log_F, truth, N):
    """KL(π̂ ‖ π_bon), nats, π̂ ∝ π_ref·F̂^(N−1), log F the `truth`, on T draws of π_ref: (P, T) -> (P,)."""
    q, p = (((N - 1) * x).log_softmax(-1) for x in (log_F, truth))
    return (q.exp() * (q - p)).sum(-1)


def noise(draws, N, repetitions=50):
    """The floor that is found for F itself, because the truth is counted from T draws: as if these draws
    (P, T), ascending, were all there is, and T of them were drawn anew. (P,)."""
    found, generator = 0, torch.Generator().manual_seed(0)
    for _ in range(repetitions):
        rows = torch.randint(draws.shape[1], draws.shape, generator=generator)
        again = draws.gather(1, rows).sort(1).values
        found = found + floor(by_ranks(again, draws), by_ranks(again, again), N) / repetitions
    return found


def measure(pool, known, draws, bare):
    """{(way, M, N): (mean floor, its standard error)} over P prompts. M of the samples `known` (P, 200) are
    used, `draws` (P, T) are the truth. pool (P', 200): samples to others. bare: rewards of all prompts."""
    draws = draws.sort(1).values
    P, T = draws.shape
    prompt, truth = torch.arange(P).repeat_interleave(T), by_ranks(draws, draws)
    own, results = {N: noise(draws, N) for N in Ns}, {}

    def by_all(samples, others, bare):
        features = None if bare is None else bare.unsqueeze(1)
        return vbon.shared_log_F([*samples, *others], features)(draws.flatten(), prompt).view(P, T)
    for M in Ms:
        found = {}
        for samples, others in list(zip(known.split(M, 1), pool.split(M, 1)))[:DRAWS]:
            if samples.shape[1] < M:
                continue
            ways = {("ranks", M): by_ranks(draws, samples), ("shared", M): by_all(samples, others, None),
                    ("shared, bare prompt", M): by_all(samples, others, bare)}
            if M == 32:  # with M = 0, others have 32
                ways["shared, bare prompt", 0] = by_all(samples[:, :0], others, bare)
            for way, log_F in ways.items():
                for N in Ns:
                    found.setdefault((*way, N), []).append(floor(log_F, truth, N) - own[N])
        for key, floors in found.items():
            of_prompts = torch.stack(floors).mean(0)
            results[key] = of_prompts.mean().item(), of_prompts.std().item() / math.sqrt(P)
    return results


def show(name, results):
    """The table of one reward."""
    rows = [[name, *(f"N = {N}" for N in Ns)]]
    for way in WAYS:
        for M in sorted({M for name, M, _ in results if name == way}):
            cells = ("{:.4f} ± {:.4f}".format(*results[way, M, N]) for N in Ns)
            rows.append([f"  {way}, M = {M}", *cells])
    print(evaluate.aligned(rows) + "\n")


def law(way, results):
    """The power law that fits the floors of a way best, by least squares of their logarithms."""
    keys = [(M, N) for M in Ms for N in Ns]
    X = torch.tensor([[1, math.log(N - 1), -math.log(M)] for M, N in keys]).double()
    y = torch.tensor([results[way, M, N][0] for M, N in keys]).double().clamp(min=1e-4).log()
    a, b, c = torch.linalg.lstsq(X, y.unsqueeze(1)).solution.flatten().tolist()
    return f"{way}: about {math.exp(a):.3f}·(N−1)^{b:.2f}/M^{c:.2f}"


def plot(path, name, results):
    with evaluate.picture(path, f"{name}: the KL to Best-of-N that M samples to a prompt leave", 3) as axes:
        for a, N in zip(axes, (16, 64, 512)):
            for way, color in zip(WAYS, ("C1", "C0", "C2")):
                mean, error = zip(*(results[way, M, N] for M in Ms))
                a.errorbar(Ms, mean, error, fmt="o-", capsize=3, color=color, label=way)
            a.plot(Ms, [(N - 1) / (4 * M) for M in Ms], "k:", label="(N−1)/(4M)")
            a.axhline(results[way, 0, N][0], color=color, ls="--", lw=1, label=f"{way}, M = 0")
            a.set(xscale="log", yscale="log", xlabel="M, samples of π_ref to each prompt", title=f"N = {N}",
                  ylabel="KL(π̂ ‖ π_bon), nats")
            a.set_xticks(Ms, [str(M) for M in Ms])
            a.minorticks_off()


def main(argv=None):
    def run():
        flags = sys.argv[1:] if argv is None else argv
        args = vbon.parse_args(["--M", str(KNOWN), *flags, "--overwrite"])  # no run is touched
        vbon.need(args.M >= KNOWN < args.test_M, f"pass --M {KNOWN} and a --test-M above it")
        with contextlib.redirect_stdout(sys.stderr):
            task = vbon.setup(args)
            stored = vbon.reference_samples(task, args, keep_tokens=True)
        keys = [key for split in ("test", "train") for key in stored if key[0] == split]
        prompts, ends = [prompt for _, prompt in keys], [task.end] * len(keys)

        own = [stored[key][0] for key in keys], torch.tensor(task.score(prompts, ends), dtype=torch.double)
        rewards = {"the task's own reward": own,
                   "the same, rounded to five steps": ([(4 * r).round() / 4 for r in own[0]], own[1])}
        if "JUDGE" in os.environ:
            with contextlib.redirect_stdout(sys.stderr):
                score, _ = vbon.load_reward(os.environ["JUDGE"], args.device, task.end, args.no_eos_reward)
            scores = []
            for key in tqdm(keys, desc="the second judge"):
                copies = [key[1]] * len(stored[key][1])
                texts = vbon.decode(task, copies, stored[key][1])
                scores.append(torch.tensor(score(copies, texts), dtype=torch.double))
            rewards["a second judge's"] = scores, torch.tensor(score(prompts, ends), dtype=torch.double)

        lines, P = [], sum(split == "test" for split, _ in keys)
        print(f"{P} prompts, F of {args.test_M - KNOWN} draws to each; samples to {len(keys) - P} others; "
              "± over prompts\n")
        for name, (of_responses, of_prompts) in rewards.items():
            test, pool = torch.stack(of_responses[:P]), torch.stack(of_responses[P:])
            results = measure(pool[:, :KNOWN], test[:, :KNOWN], test[:, KNOWN:], of_prompts)
            show(name, results)
            lines += [[name, way, M, N, *result] for (way, M, N), result in results.items()]
            if name == "the task's own reward":
                print(*(law(way, results) for way in WAYS), "", sep="\n")
                with contextlib.redirect_stdout(sys.stderr):
                    plot(str(HERE.parent / "figures" / "shared.png"), args.task, results)
        with open(HERE / "shared.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["reward", "way", "M", "N", "kl", "se"], *lines])
    return vbon.run_script("shared.py", run)


if __name__ == "__main__":
    sys.exit(main())
