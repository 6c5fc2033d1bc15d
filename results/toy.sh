#!/usr/bin/env bash
# The toy with full training, for results/toy.* and figures/toy.png: vBoN at two M and two N with
# several seeds, and PPO at three β. 16 runs of about a minute on one core. Arguments are added to
# every run.
set -eo pipefail
cd "$(dirname "$0")/.."
out=sweeps/toy

{
    for s in 0 1 2 3 4; do
        seeds="--seed $s --data-seed $s"
        echo "python vbon.py --N 16 --M 200 $seeds --resume --out $out/vbon-N16-M200-seed$s"
        echo "python vbon.py --N 16 --M 2000 $seeds --resume --out $out/vbon-N16-M2000-seed$s"
    done
    for s in 0 1 2; do
        seeds="--seed $s --data-seed $s"
        echo "python vbon.py --N 64 $seeds --resume --out $out/vbon-N64-M200-seed$s"
    done
    for b in 0.5 0.7 1; do
        echo "python vbon.py --objective rlhf --beta $b --resume --out $out/rlhf-beta$b-seed0"
    done
} | results/run_jobs.sh --task toy "$@"

python evaluate.py $out/* --csv results/toy.csv | tee results/toy.txt
python results/curves.py $out/* --figures figures
