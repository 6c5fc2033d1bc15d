#!/usr/bin/env bash
# imdb with small models, four times as long as results/imdb.sh in smaller steps, for results/imdb-long.* and,
# by a second reward model, results/imdb-long-judge.*.
# 7 runs of about 11 minutes of one core. Arguments are added to every run.
#
#   REF=DIR REWARD=DIR IMDB=DIR OTHER_REWARD=DIR results/imdb-long.sh
set -eo pipefail
cd "$(dirname "$0")/.."
: "${REF:?is not set: name the folder of the reference model}"
: "${REWARD:?is not set: name the folder of the reward model}"
: "${IMDB:?is not set: name the folder of the reviews}"
: "${OTHER_REWARD:?is not set: name the folder of the reward model that judges}"
out=sweeps/imdb-long
long="--train-prompts 256 --test-prompts 256 --episodes 20480 --ppo-epochs 1"
long="$long --M 200 --estimator add_one --critic-every 0 --token-step 0 --lam 0.95 --test-M 64 --test-responses 1"
long="$long --lr 1.25e-4 --lr-schedule linear"

{
    for s in 0 1 2; do
        echo "python vbon.py --N 16 --seed $s --resume --out $out/vbon-N16-seed$s"
        echo "python vbon.py --objective rlhf --beta 0.04 --seed $s --resume --out $out/rlhf-beta0.04-seed$s"
    done
    echo "python bon_baselines.py bon-sft --N 16 --resume --out $out/bon-sft-N16-seed0"
} | results/run_jobs.sh --task imdb --ref "$REF" --reward "$REWARD" --dataset "$IMDB" $long "$@"

python evaluate.py $out/* --csv results/imdb-long.csv | tee results/imdb-long.txt
python evaluate.py $out/* --reward "$OTHER_REWARD" --csv results/imdb-long-judge.csv |
    tee results/imdb-long-judge.txt
