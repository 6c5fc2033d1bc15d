#!/usr/bin/env bash
# Toy task: every method, for results/toy.* and figures/toy.png. vBoN at two M and two N with five
# seeds, the other methods with three: PPO at three β, and the baselines at the settings that were
# closest to Best-of-16 in results/sweep-paper.sh. 36 runs of two to four minutes on one core.
# Arguments are added to every run.
set -eo pipefail
cd "$(dirname "$0")/.."
out=sweeps/toy

{
    for s in 0 1 2 3 4; do
        seeds="--seed $s --data-seed $s --resume"
        echo "python vbon.py --N 16 $seeds --out $out/vbon-N16-M200-seed$s"
        echo "python vbon.py --N 16 --M 2000 $seeds --out $out/vbon-N16-M2000-seed$s"
        echo "python vbon.py --N 64 $seeds --out $out/vbon-N64-M200-seed$s"
    done
    for s in 0 1 2; do
        seeds="--seed $s --data-seed $s --resume"
        for b in 0.5 0.7 1; do
            echo "python vbon.py --objective rlhf --beta $b $seeds --out $out/rlhf-beta$b-seed$s"
        done
        echo "python bon_baselines.py dpo --beta 0.1 $seeds --out $out/dpo-beta0.1-seed$s"
        echo "python bon_baselines.py bon-sft --N 16 $seeds --out $out/bon-sft-N16-seed$s"
        echo "python bon_baselines.py bonbon --N 16 $seeds --out $out/bonbon-N16-seed$s"
        echo "python bon_baselines.py bond --episodes 40960 $seeds --out $out/bond-seed$s"
    done
} | results/run_jobs.sh --task toy "$@"

python evaluate.py $out/* --csv results/toy.csv | tee results/toy.txt
python results/curves.py $out/vbon-N16-M200-* $out/rlhf-* --figures figures
