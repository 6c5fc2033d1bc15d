#!/usr/bin/env bash
# App. F: every method at every strength, for results/toy-sweep.* and
# figures/toy-{pareto,bound,excess}.png. 206 runs, about two hours on one core. Arguments are added
# to every run.
#
#   results/sweep-paper.sh                                    # the toy, with short runs
#   TASK=imdb results/sweep-paper.sh --ref DIR --reward DIR   # another task, with its own defaults
set -eo pipefail
cd "$(dirname "$0")/.."
task=${TASK:-toy}
out=sweeps/$task-paper
[ "$task" != toy ] || set -- --episodes 24576 --rollouts 1024 "$@"

{
    for N in 1 2 3 4 8 16 32 64 128 256 512; do
        for s in 0 1 2; do
            echo "python vbon.py --N $N --seed $s --resume --out $out/vbon-N$N-seed$s"
            echo "python bon_baselines.py bonbon --N $N --seed $s --resume" \
                 "--out $out/bonbon-N$N-seed$s"
        done
        echo "python bon_baselines.py bon --N $N --resume --out $out/bon-N$N-seed0"
    done
    for b in 0.01 0.1 0.2 0.3 0.4 0.5 1 2 3 4 5; do
        for s in 0 1 2; do
            echo "python bon_baselines.py dpo --beta $b --seed $s --resume" \
                 "--out $out/dpo-beta$b-seed$s"
        done
    done
    for s in 0 1; do
        for b in 0.005 0.01 0.02 0.03 0.04 0.05 0.1 0.2 0.3 0.4 0.5 1 2 3 4 5; do
            echo "python vbon.py --objective rlhf --beta $b --seed $s --resume" \
                 "--out $out/rlhf-beta$b-seed$s"
        done
        # N = 1/β + 1 of the β above.
        for N in 201 101 51 34.33333333 26 21 11 6 4.333333333 3.5 3 2 1.5 1.333333333 1.25 1.2; do
            echo "python vbon.py --objective bound --N $N --seed $s --resume" \
                 "--out $out/bound-N$N-seed$s"
        done
        for N in $(seq 10 40 570) 600; do
            echo "python bon_baselines.py bon-sft --N $N --seed $s --resume" \
                 "--out $out/bon-sft-N$N-seed$s"
        done
    done
} | results/run_jobs.sh --task "$task" "$@"

python evaluate.py "$out"/* --figures figures --csv "results/$task-sweep.csv" |
    tee "results/$task-sweep.txt"
