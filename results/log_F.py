#!/usr/bin/env python3
"""Test how many reference samples F needs (Table 1), and plot log F̂ (Figure 3).

    python results/log_F.py samples/imdb-…                    # folder with 600 samples per prompt
    python results/log_F.py samples/imdb-… figures            # and write figures/log_F.png
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import vbon


def kolmogorov_smirnov(a, b):
    """Return the two-sample statistic sup |F_a − F_b| and its asymptotic p-value.

    Numerical Recipes, 14.3. Args: a (n,), b (m,).
    """
    both = torch.cat([a, b])
    F_a, F_b = (torch.searchsorted(x.sort().values, both, right=True) / len(x) for x in (a, b))
    D, n = (F_a - F_b).abs().max().item(), len(a) * len(b) / (len(a) + len(b))
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * D
    if x < 0.2:
        return D, 1.0
    p = 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return D, min(1.0, max(0.0, p))


def samples_needed(folder, Ms=(5, 20, 32, 100, 200, 250), most=600):
    """Print Table 1: F̂ of the first M samples of a prompt against F̂ of its first 600.

    The M are among the 600, as in the paper. With other samples, a test at 5 % would reject 5 % at
    every M. Returns: [(prompt, its 600 rewards)].
    """
    samples = vbon.read_samples(folder)
    found = [(json.loads(key), torch.tensor(columns["rewards"][:most], dtype=torch.double))
             for key, columns in samples.items() if len(columns["rewards"]) >= most]
    if not found:
        raise vbon.UserError(f"{folder} must have a prompt with {most} samples: generate them with "
                             f"vbon.py --M {most}")
    rows = [["M", "rejected at 5 %", "mean statistic", "mean p", "mean statistic of all"]]
    for M in Ms:
        tests = torch.tensor([kolmogorov_smirnov(r[:M], r) for _, r in found])
        rejected = tests[tests[:, 1] < 0.05]
        means = [f"{x:.2f}" for x in rejected.mean(0)] if len(rejected) else ["", ""]
        share = f"{100 * len(rejected) / len(tests):.2f} %"
        rows.append([str(M), share, *means, f"{tests[:, 0].mean():.3f}"])
    print(f"{len(found)} prompts, F̂_M against F̂_{most} (Table 1)\n" + evaluate.aligned(rows))
    return found


def plot_log_F(path, found, Ms=(10, 50, 100, 200, 600)):
    """Plot Figure 3: log F̂ from M samples, for the prompts with the lowest, the median and the
    highest mean reward."""
    found = sorted(found, key=lambda pair: pair[1].mean().item())
    kinds = {"negative": found[0], "neutral": found[len(found) // 2], "positive": found[-1]}
    with evaluate.picture(path, "log F̂ from M reference samples (Figure 3)", 3) as axes:
        for a, (kind, (prompt, r)) in zip(axes, kinds.items()):
            grid = torch.linspace(r.min(), r.max(), 400, dtype=torch.double)
            for M in Ms:
                log_F = vbon.estimate_log_F(grid, r[:M])
                a.step(grid, log_F, where="post", lw=2 if M == Ms[-1] else 1, label=f"M = {M}")
            a.set(xlabel="reward", ylabel="log F̂, nats", title=f"{kind}: {prompt!r}")


def run(options):
    found = samples_needed(options.samples)
    if options.figures:
        plot_log_F(f"{options.figures}/log_F.png", found)


def main(argv=None):
    def parse():
        parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                         formatter_class=argparse.RawDescriptionHelpFormatter)

        def error(message):
            raise vbon.UserError(message)
        parser.error = error
        parser.add_argument("samples", help="folder of cached samples")
        parser.add_argument("figures", nargs="?", help="folder for the figure")
        return parser.parse_args(argv)
    return vbon.run_script("log_F.py", parse, run)


if __name__ == "__main__":
    sys.exit(main())
