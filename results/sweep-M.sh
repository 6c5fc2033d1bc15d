#!/usr/bin/env bash
# Figure 4: quality of vBoN with N = 10 against M, for results/toy-M.* and figures/toy-M.png.
# 21 runs, 12 minutes on one core. Arguments are added to every run.
#
# --data-seed differs too, because M sets the noise of the samples. Every run has its own samples
# folder, so that its result.json holds the seconds of sampling. Pass JOBS=1 to time them without
# other runs. If a run is stopped while it samples, its time is too small: remove its samples and
# its folder to measure it again.
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

python evaluate.py $out/* --csv results/toy-M.csv | tee results/toy-M.txt
python results/curves.py $out/* --against seconds_sampling --figures figures
