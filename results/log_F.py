#!/usr/bin/env python3
"""How many samples F needs, from a folder of π_ref's samples (Table 1), and what log F̂ looks like (Figure 3).

    python results/log_F.py samples/imdb-…                    # a folder with 600 samples to a prompt
    python results/log_F.py samples/imdb-… figures            # … and figures/log_F.png
"""
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import vbon


def kolmogorov_smirnov(a, b):
    """The two-sample statistic sup |F_a − F_b|, and its p-value by the limit law (Numerical Recipes 14.3)."""
    both = torch.cat([a, b])
    F_a, F_b = (torch.searchsorted(x.sort().values, both, right=True) / len(x) for x in (a, b))
    D, n = (F_a - F_b).abs().max().item(), len(a) * len(b) / (len(a) + len(b))
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * D
    p = 1.0 if x < 0.2 else 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return D, min(1.0, max(0.0, p))


def samples_needed(path, folder, Ms=(5, 20, 32, 100, 200, 250), most=600):
    """Table 1: F̂ of a prompt's first M samples against F̂ of its first 600. And Figure 3, into the folder.

    The M are among the 600, as in the paper: were they others, a test at 5 % would reject 5 % at every M.
    """
    samples = vbon.read_samples(path)
    drawn = [(prompt, torch.tensor(known["rewards"][:most], dtype=torch.double))
             for (_, prompt), known in samples.items() if len(known["rewards"]) >= most]
    vbon.need(drawn, f"{path} has no prompt with {most} samples: draw them with vbon.py --M {most}")
    rows = [["M", "rejected at 5 %", "mean statistic", "mean p", "mean statistic of all"]]
    for M in Ms:
        tests = torch.tensor([kolmogorov_smirnov(r[:M], r) for _, r in drawn])
        rejected = tests[tests[:, 1] < 0.05]
        means = [f"{x:.2f}" for x in rejected.mean(0)] if len(rejected) else ["", ""]
        share = f"{100 * len(rejected) / len(tests):.2f} %"
        rows.append([str(M), share, *means, f"{tests[:, 0].mean():.3f}"])
    print(f"{len(drawn)} prompts, F̂_M against F̂_{most} (Table 1)\n" + evaluate.aligned(rows))
    if folder:
        plot_log_F(f"{folder}/log_F.png", drawn, (10, 50, 100, 200, most))


def plot_log_F(path, drawn, Ms):
    """Figure 3: log F̂ from M samples, of the prompts with the lowest, middle and highest mean reward."""
    drawn = sorted(drawn, key=lambda pair: pair[1].mean().item())
    kinds = {"negative": drawn[0], "neutral": drawn[len(drawn) // 2], "positive": drawn[-1]}
    with evaluate.picture(path, "log F̂ from M samples of π_ref (Figure 3)", 3) as axes:
        for a, (kind, (prompt, r)) in zip(axes, kinds.items()):
            grid = torch.linspace(r.min(), r.max(), 400, dtype=torch.double)
            for M in Ms:
                log_F = vbon.estimate_log_F(grid, r[:M])
                a.step(grid, log_F, where="post", lw=2 if M == Ms[-1] else 1, label=f"M = {M}")
            a.set(xlabel="reward", ylabel="log F̂, nats", title=f"{kind}: {prompt!r}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv

    def run():
        vbon.need(len(argv) in (1, 2), "name a folder of samples, and one if you want the figure")
        samples_needed(argv[0], argv[1] if argv[1:] else None)
    return vbon.run_script("log_F.py", run)


if __name__ == "__main__":
    sys.exit(main())
