#!/usr/bin/env bash
# Figure 4: how the quality of vBoN, N = 10, grows with M, for results/toy-M.* and figures/toy-M.png.
# 21 runs, 12 minutes of one core. Arguments are added to every run.
#
# The seeds are of the samples too: M governs their noise. Every run draws its samples into a folder of its own,
# so that its result.json holds the seconds that sampling took, the test samples included. With JOBS=1 no other
# run disturbs them. A run that was stopped while it drew holds the time of the rest only: remove its samples,
# and its folder, to time it anew.
set -eo pipefail
cd "$(dirname "$0")/.."
out=sweeps/toy-M

{
    for M in 4 8 16 32 100 200 600; do
        for s in 0 1 2; do
            echo "python vbon.py --N 10 --M $M --seed $s --data-seed $s" \
                 "--samples samples/toy-M/M$M-seed$s --resume --out $out/vbon-M$M-seed$s"
        done
    done
} | results/run_jobs.sh --task toy --episodes 24576 --rollouts 1024 "$@"

python evaluate.py $out/* --figures figures --against seconds_sampling --csv results/toy-M.csv |
    tee results/toy-M.txt
