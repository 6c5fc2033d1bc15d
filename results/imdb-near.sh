#!/usr/bin/env bash
# imdb with small models: KL to Best-of-N of every method, for results/imdb-near.* and
# figures/imdb-near/, and with a second reward model for results/imdb-near-judge.*:
#   - vBoN for N = 4, 16 and 64, its bound L, and PPO at two β;
#   - vBoN and PPO without the token bias, and vBoN with a value head as in the paper;
#   - the baselines at the best of three settings each (results/README.md has the others);
#   - Best-of-16 itself, and three longer runs of vBoN.
# 40 runs, 8 hours on one core. Arguments are added to every run.
#
#   REF=DIR REWARD=DIR IMDB=DIR OTHER_REWARD=DIR results/imdb-near.sh
set -eo pipefail
cd "$(dirname "$0")/.."
: "${REF:?is not set: name the folder of the reference model}"
: "${REWARD:?is not set: name the folder of the reward model}"
: "${IMDB:?is not set: name the folder of the reviews}"
: "${OTHER_REWARD:?is not set: name the folder of the second reward model}"
out=sweeps/imdb-near

{
    long="python vbon.py --N 16 --resume --out $out/vbon"
    echo "$long-nobias-long-seed0 --episodes 61440 --token-bias-lr 0"
    echo "$long-long-seed0 --episodes 30720"
    echo "$long-lam95-long-seed0 --episodes 30720 --lam 0.95"
    for s in 0 1 2; do
        short="--episodes 10240 --resume --seed $s --out $out"
        echo "python vbon.py --N 16 $short/vbon-seed$s"
        echo "python vbon.py --N 16 $short/vbon-nobias-seed$s --token-bias-lr 0"
        echo "python vbon.py --N 16 $short/vbon-head-seed$s --token-bias-lr 0 --prefix-critic 0" \
             "--lam 0.95"
        echo "python vbon.py --N 4 $short/vbon-N4-seed$s"
        echo "python vbon.py --N 64 $short/vbon-N64-seed$s"
        echo "python vbon.py --objective bound --N 16 $short/bound-seed$s"
        echo "python vbon.py --objective rlhf --beta 0.03 $short/rlhf-beta0.03-seed$s"
        echo "python vbon.py --objective rlhf --beta 0.05 $short/rlhf-beta0.05-seed$s"
        echo "python vbon.py --objective rlhf --beta 0.03 $short/rlhf-nobias-beta0.03-seed$s" \
             "--token-bias-lr 0"
        echo "python bon_baselines.py bon-sft --N 16 --lr 3e-4 $short/bon-sft-seed$s"
        echo "python bon_baselines.py dpo --beta 0.1 $short/dpo-seed$s"
        echo "python bon_baselines.py bonbon --N 16 --lr 3e-5 $short/bonbon-seed$s"
    done
    echo "python bon_baselines.py bon --N 16 --resume --out $out/bon-seed0"
} | results/run_jobs.sh --task imdb --ref "$REF" --reward "$REWARD" --dataset "$IMDB" \
    --train-prompts 256 --M 200 "$@"

# With the runs of results/bond.sh, if they exist.
shopt -s nullglob
python evaluate.py $out/* sweeps/bond-imdb/* --figures figures/imdb-near \
    --csv results/imdb-near.csv | tee results/imdb-near.txt
python results/curves.py $out/vbon-* $out/rlhf-* --figures figures/imdb-near
python evaluate.py $out/vbon-seed* $out/vbon-N* $out/rlhf-beta* $out/{bound,dpo,bon-sft,bonbon}-* \
    --reward "$OTHER_REWARD" --csv results/imdb-near-judge.csv | tee results/imdb-near-judge.txt
