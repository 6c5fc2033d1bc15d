#!/usr/bin/env bash
# imdb with small models: how near to Best-of-N each method comes, for results/imdb-near.* and
# figures/imdb-near/, and by a second judge, for results/imdb-near-judge.*. vBoN for N = 4, 16 and 64, its bound L,
# PPO on the reward at two strengths; the two without the bias of tokens, vBoN with the paper's critic; the
# baselines at the best of three settings each (results/README.md has the others); Best-of-16 itself; three long runs.
# 40 runs, 8 hours of one core. Arguments are added to every run.
#
#   REF=DIR REWARD=DIR IMDB=DIR OTHER_REWARD=DIR results/imdb-near.sh
set -eo pipefail
cd "$(dirname "$0")/.."
: "${REF:?is not set: name the folder of the reference model}"
: "${REWARD:?is not set: name the folder of the reward model}"
: "${IMDB:?is not set: name the folder of the reviews}"
: "${OTHER_REWARD:?is not set: name the folder of the second judge}"
out=sweeps/imdb-near
short="--episodes 10240 --resume"

{
    echo "python vbon.py --N 16 --token-step 0 --episodes 61440 --resume --out $out/vbon-nobias-long-seed0"
    echo "python vbon.py --N 16 --episodes 30720 --resume --out $out/vbon-long-seed0"
    echo "python vbon.py --N 16 --episodes 30720 --lam 0.95 --resume --out $out/vbon-lam95-long-seed0"
    for s in 0 1 2; do
        vbon="python vbon.py --N 16 $short --seed $s --out $out"
        echo "$vbon/vbon-seed$s"
        echo "$vbon/vbon-nobias-seed$s --token-step 0"
        echo "$vbon/vbon-head-seed$s --token-step 0 --critic-every 0 --lam 0.95"
        for N in 4 64; do
            echo "python vbon.py --N $N $short --seed $s --out $out/vbon-N$N-seed$s"
        done
        echo "python vbon.py --objective bound --N 16 $short --seed $s --out $out/bound-seed$s"
        echo "python bon_baselines.py bon-sft --N 16 --lr 3e-4 $short --seed $s --out $out/bon-sft-seed$s"
        echo "python bon_baselines.py dpo --beta 0.1 $short --seed $s --out $out/dpo-seed$s"
        echo "python bon_baselines.py bonbon --N 16 --lr 3e-5 $short --seed $s --out $out/bonbon-seed$s"
    done
    for s in 0 1 2; do
        for beta in 0.03 0.05; do
            echo "python vbon.py --objective rlhf --beta $beta $short --seed $s --out $out/rlhf-beta$beta-seed$s"
        done
        ppo="python vbon.py --objective rlhf --beta 0.03 $short --seed $s --out $out"
        echo "$ppo/rlhf-nobias-beta0.03-seed$s --token-step 0"
    done
    echo "python bon_baselines.py bon --N 16 --out $out/bon-seed0"
} | results/run_jobs.sh --task imdb --ref "$REF" --reward "$REWARD" --dataset "$IMDB" --train-prompts 256 \
    --M 200 --estimator add_one "$@"

# With the runs of results/bond.sh, if they are there.
shopt -s nullglob
python evaluate.py $out/* sweeps/bond-imdb/* --figures figures/imdb-near --csv results/imdb-near.csv |
    tee results/imdb-near.txt
python evaluate.py $out/vbon-* $out/rlhf-* --figures figures/imdb-near --curves
python evaluate.py $out/vbon-seed* $out/vbon-N* $out/rlhf-beta* $out/{bound,dpo,bon-sft,bonbon}-* \
    --reward "$OTHER_REWARD" --csv results/imdb-near-judge.csv | tee results/imdb-near-judge.txt
