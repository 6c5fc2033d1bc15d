#!/usr/bin/env bash
# A pretrained language model, SmolLM2-135M-Instruct, on imdb's prompts with the small reward model:
# vBoN and PPO for forty iterations, for results/smollm2.*. 2 runs, 45 minutes on one core in all.
#
#   REF=DIR REWARD=DIR IMDB=DIR results/smollm2.sh    # REF: HuggingFaceTB/SmolLM2-135M-Instruct
set -eo pipefail
cd "$(dirname "$0")/.."
: "${REF:?is not set: name the folder of SmolLM2}"
: "${REWARD:?is not set: name the folder of the reward model}"
: "${IMDB:?is not set: name the folder of the reviews}"
out=sweeps/smollm2
{
    echo "python vbon.py --N 16 --resume --out $out/vbon-seed0"
    echo "python vbon.py --objective rlhf --beta 0.03 --resume --out $out/rlhf-beta0.03-seed0"
} | JOBS=1 results/run_jobs.sh --task imdb --ref "$REF" --reward "$REWARD" --dataset "$IMDB" \
    --train-prompts 128 --max-new-tokens 24 --episodes 5120 "$@"

python evaluate.py $out/* --test-prompts 32 --test-M 64 --responses 6 --csv results/smollm2.csv |
    tee results/smollm2.txt
