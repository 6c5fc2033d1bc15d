#!/usr/bin/env bash
# imdb with small models: does vBoN train as well on few samples to a prompt, where prompts learn log F from
# each other? Ranks of 200 and of 32 samples; shared with 32, with 8, and with none but to 256 other prompts;
# N = 16 and 64. For results/imdb-shared-N*.* and figures/imdb-M.png.
# 30 runs of about 13 minutes of one core. Arguments are added to every run.
#
#   REF=DIR REWARD=DIR IMDB=DIR results/imdb-shared.sh
set -eo pipefail
cd "$(dirname "$0")/.."
: "${REF:?is not set: name the folder of the reference model}"
: "${REWARD:?is not set: name the folder of the reward model}"
: "${IMDB:?is not set: name the folder of the reviews}"
out=sweeps/imdb-shared
short="--episodes 10240 --resume"

for s in 0 1 2; do
    for N in 16 64; do
        for M in 200 32; do
            echo "python vbon.py --N $N --M $M --estimator add_one $short --seed $s" \
                 "--out $out/N$N-ranks-M$M-seed$s"
        done
        for M in 32 8 0; do
            echo "python vbon.py --N $N --M $M --estimator shared $short --seed $s" \
                 "--out $out/N$N-shared-M$M-seed$s"
        done
    done
done | results/run_jobs.sh --task imdb --ref "$REF" --reward "$REWARD" --dataset "$IMDB" \
    --train-prompts 256 "$@"

for N in 16 64; do
    python evaluate.py $out/N$N-* --csv results/imdb-shared-N$N.csv | tee results/imdb-shared-N$N.txt
done
python evaluate.py $out/N16-* --figures figures --against M
