#!/usr/bin/env bash
# imdb with small models: vBoN with few reference samples per prompt, for results/imdb-shared-N*.*
# and figures/imdb-M.png. log F comes from ranks among 200, 32 or 8 samples of the prompt, or from
# results/shared_log_F.py with 32 or 8 samples per prompt. N is 16 and 64.
# 30 runs of about 13 minutes on one core. Arguments are added to every run.
#
#   REF=DIR REWARD=DIR IMDB=DIR results/imdb-shared.sh
set -eo pipefail
cd "$(dirname "$0")/.."
: "${REF:?is not set: name the folder of the reference model}"
: "${REWARD:?is not set: name the folder of the reward model}"
: "${IMDB:?is not set: name the folder of the reviews}"
out=sweeps/imdb-shared
samples=sweeps/imdb-shared-samples

train() {  # name of the estimate, M, folder of samples, flags for all runs
    for s in 0 1 2; do
        for N in 16 64; do
            echo "python vbon.py --N $N --M $2 --samples $3 --episodes 10240 --seed $s --resume" \
                 "--out $out/N$N-$1-seed$s"
        done
    done | results/run_jobs.sh --task imdb --ref "$REF" --reward "$REWARD" --dataset "$IMDB" \
        --train-prompts 256 "${@:4}"
}

folder() {  # the samples folder of a split
    dirname "$(grep -l "\"split\": \"$1\"" $samples/*/header.json)"
}

# The first runs sample the 200, of which the others use some.
for M in 200 32 8; do
    train ranks-M$M $M $samples "$@"
done
for M in 32 8; do
    python results/shared_log_F.py convert "$(folder train)" $samples-M$M --M $M --reward "$REWARD"
    train shared-M$M 200 $samples-M$M "$@"
done

# The shared runs have the settings of M = 200, so each estimate has a table of its own. All are
# tested with the same samples: the folder of the first test is linked into the converted ones.
for N in 16 64; do
    for name in ranks shared-M32 shared-M8; do
        echo "$name"
        python evaluate.py $out/N$N-$name-* --csv $out/N$N-$name.csv
        for M in 32 8; do
            ln -sfn "$PWD/$(folder test)" $samples-M$M/
        done
    done | tee results/imdb-shared-N$N.txt
    awk 'NR == 1 || FNR > 1' $out/N$N-{ranks,shared-M32,shared-M8}.csv >results/imdb-shared-N$N.csv
done
python results/curves.py $out/N16-ranks-* --against M --figures figures
