#!/usr/bin/env bash
# Five strengths a method on imdb with small models, for results/imdb-sweep.* and
# figures/imdb-{pareto,bound}.png.
# 64 runs, 5.7 hours of one core with models of 5 and 2.5 million parameters. Arguments are added to every
# run and win over the flags below: your own models, and --episodes and --lr that suit them.
#
#   results/sweep-small.sh --ref DIR --reward DIR --dataset DIR
set -eo pipefail
cd "$(dirname "$0")/.."
out=sweeps/imdb-small
short="--train-prompts 256 --test-prompts 256 --episodes 3840 --ppo-epochs 1"
short="$short --M 200 --estimator add_one --critic-every 0 --token-step 0 --lam 0.95 --test-M 64 --test-responses 1"
short="$short --lr 2.5e-4 --lr-schedule linear"

{
    for s in 0 1; do
        for N in 2 4 16 64 256; do
            echo "python vbon.py --N $N --seed $s --resume --out $out/vbon-N$N-seed$s"
            echo "python vbon.py --objective bound --N $N --seed $s --resume --out $out/bound-N$N-seed$s"
        done
        for N in 2 4 16 64 200; do
            echo "python bon_baselines.py bonbon --N $N --seed $s --resume --out $out/bonbon-N$N-seed$s"
            echo "python bon_baselines.py bon-sft --N $N --seed $s --resume --out $out/bon-sft-N$N-seed$s"
        done
        for b in 0.01 0.02 0.05 0.1 0.3; do
            echo "python vbon.py --objective rlhf --beta $b --seed $s --resume --out $out/rlhf-beta$b-seed$s"
        done
        for b in 0.05 0.1 0.3 1 3; do
            echo "python bon_baselines.py dpo --beta $b --seed $s --resume --out $out/dpo-beta$b-seed$s"
        done
    done
    for N in 2 4 16 64; do
        echo "python bon_baselines.py bon --N $N --out $out/bon-N$N-seed0"
    done
} | results/run_jobs.sh --task imdb $short "$@"

python evaluate.py $out/* --figures figures --csv results/imdb-sweep.csv | tee results/imdb-sweep.txt
