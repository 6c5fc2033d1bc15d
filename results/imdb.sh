#!/usr/bin/env bash
# imdb with small models: every method, for results/imdb.*, and with a second reward model for
# results/imdb-second.*:
#   - vBoN for N = 4, 16 and 64, its bound L, and PPO on the reward at two β;
#   - the paper's algorithm, and each of the two additions alone;
#   - the baselines at the best of three settings each, and Best-of-16 itself;
#   - a longer run of vBoN.
# 40 runs of 10,240 episodes with three seeds, 10 hours on one core. Arguments are added to every
# run. SEEDS and METHODS select some of them.
#
#   REF=DIR REWARD=DIR IMDB=DIR OTHER_REWARD=DIR results/imdb.sh
set -eo pipefail
cd "$(dirname "$0")/.."
: "${REF:?is not set: name the folder of the reference model}"
: "${REWARD:?is not set: name the folder of the reward model}"
: "${IMDB:?is not set: name the folder of the reviews}"
: "${OTHER_REWARD:?is not set: name the folder of the second reward model}"
out=sweeps/imdb
paper="--M 200 --lam 0.95 --prefix-critic 0 --token-bias-lr 0"
declare -A flags=(
    [vbon]="vbon.py --N 16"
    [rlhf-beta0.03]="vbon.py --objective rlhf --beta 0.03"
    [rlhf-beta0.05]="vbon.py --objective rlhf --beta 0.05"
    [vbon-N4]="vbon.py --N 4"
    [vbon-N64]="vbon.py --N 64 --M 200"
    [paper]="vbon.py --N 16 $paper"
    [bon]="bon_baselines.py bon --N 16"
    [critic-only]="vbon.py --N 16 --token-bias-lr 0"
    [bias-only]="vbon.py --N 16 --prefix-critic 0 --lam 0.95"
    [dpo]="bon_baselines.py dpo --beta 0.1"
    [bon-sft]="bon_baselines.py bon-sft --N 16 --lr 3e-4"
    [bonbon]="bon_baselines.py bonbon --N 16 --lr 3e-5"
    [bond]="bon_baselines.py bond"
    [bound]="vbon.py --objective bound --N 16"
    [vbon-long]="vbon.py --N 16 --episodes 30720")
METHODS=${METHODS:-vbon rlhf-beta0.03 rlhf-beta0.05 vbon-N4 vbon-N64 paper bon critic-only bias-only \
dpo bon-sft bonbon bond bound vbon-long}

for method in $METHODS; do
    for s in ${SEEDS:-0 1 2}; do
        line=${flags[$method]}
        echo "python ${line/.py/.py --episodes 10240} --seed $s --resume --out $out/$method-seed$s"
    done
done | results/run_jobs.sh --task imdb --ref "$REF" --reward "$REWARD" --dataset "$IMDB" \
    --train-prompts 256 "$@"

python evaluate.py $out/* --csv results/imdb.csv | tee results/imdb.txt
python evaluate.py $out/* --reward "$OTHER_REWARD" --csv results/imdb-second.csv |
    tee results/imdb-second.txt
