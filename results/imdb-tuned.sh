#!/usr/bin/env bash
# imdb with small models: DPO, BoN-SFT and BoNBoN at three settings each, of which results/imdb-near.sh takes the
# nearest to Best-of-16. For results/imdb-tuned.*. 9 runs of five minutes. Arguments are added to every run.
#
#   REF=DIR REWARD=DIR IMDB=DIR results/imdb-tuned.sh
set -eo pipefail
cd "$(dirname "$0")/.."
: "${REF:?is not set: name the folder of the reference model}"
: "${REWARD:?is not set: name the folder of the reward model}"
: "${IMDB:?is not set: name the folder of the reviews}"
out=sweeps/tune
baseline="python bon_baselines.py"
{
    echo "$baseline dpo --beta 0.1 --lr 1e-4 --out $out/dpo-beta0.1-lr1e-4-seed0"
    echo "$baseline dpo --beta 0.05 --lr 1e-4 --out $out/dpo-beta0.05-lr1e-4-seed0"
    echo "$baseline dpo --beta 0.1 --lr 3e-4 --out $out/dpo-beta0.1-lr3e-4-seed0"
    for lr in 1e-4 3e-4 1e-3; do
        echo "$baseline bon-sft --N 16 --lr $lr --out $out/bon-sft-lr$lr-seed0"
    done
    for lr in 1e-5 3e-5 1e-4; do
        echo "$baseline bonbon --N 16 --lr $lr --out $out/bonbon-lr$lr-seed0"
    done
} | results/run_jobs.sh --task imdb --ref "$REF" --reward "$REWARD" --dataset "$IMDB" --train-prompts 256 \
    --M 200 --estimator add_one --episodes 10240 --resume "$@"

python evaluate.py $out/* --csv results/imdb-tuned.csv | tee results/imdb-tuned.txt
