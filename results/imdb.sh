#!/usr/bin/env bash
# imdb with small models and short runs, for results/imdb.* and, by a second reward model,
# results/imdb-judge.*: vBoN, PPO on the reward, the baselines and Best-of-16 itself.
# 11 runs, about five minutes of one core each. Arguments are added to every run.
#
#   REF=DIR REWARD=DIR IMDB=DIR OTHER_REWARD=DIR results/imdb.sh
set -eo pipefail
cd "$(dirname "$0")/.."
: "${REF:?is not set: name the folder of the reference model}"
: "${REWARD:?is not set: name the folder of the reward model}"
: "${IMDB:?is not set: name the folder of the reviews}"
: "${OTHER_REWARD:?is not set: name the folder of the reward model that judges}"
out=sweeps/imdb
short="--train-prompts 256 --test-prompts 256 --episodes 5120 --ppo-epochs 1"
short="$short --M 200 --estimator add_one --critic-every 0 --token-step 0 --lam 0.95 --test-M 64 --test-responses 1"
short="$short --lr 2.5e-4 --lr-schedule linear"

{
    for s in 0 1 2; do
        echo "python vbon.py --N 16 --seed $s --resume --out $out/vbon-N16-seed$s"
    done
    for s in 0 1; do
        echo "python vbon.py --objective rlhf --beta 0.04 --seed $s --resume --out $out/rlhf-beta0.04-seed$s"
    done
    for b in 0.0667 0.02; do
        echo "python vbon.py --objective rlhf --beta $b --resume --out $out/rlhf-beta$b-seed0"
    done
    echo "python bon_baselines.py bon --N 16 --out $out/bon-N16-seed0"
    echo "python bon_baselines.py bon-sft --N 16 --resume --out $out/bon-sft-N16-seed0"
    echo "python bon_baselines.py dpo --beta 0.1 --resume --out $out/dpo-beta0.1-seed0"
    echo "python bon_baselines.py bonbon --N 16 --resume --out $out/bonbon-N16-seed0"
} | results/run_jobs.sh --task imdb --ref "$REF" --reward "$REWARD" --dataset "$IMDB" $short "$@"

python evaluate.py $out/* --csv results/imdb.csv | tee results/imdb.txt
python evaluate.py $out/* --reward "$OTHER_REWARD" --csv results/imdb-judge.csv | tee results/imdb-judge.txt
