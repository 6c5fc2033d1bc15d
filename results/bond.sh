#!/usr/bin/env bash
# BOND beside vBoN on the toy at equal episodes, for results/bond.*, results/bond-curves.csv and
# figures/bond.png: does it climb Best-of-2, of-4, of-8 …? 13 runs of up to two minutes of one core.
# Given the folders of small models it trains BOND on imdb too, as results/imdb-near.sh trains the others, for
# results/bond-imdb.*: 3 runs of about 15 minutes. Arguments are added to each of these.
#
#   results/bond.sh
#   REF=DIR REWARD=DIR IMDB=DIR results/bond.sh
set -eo pipefail
cd "$(dirname "$0")/.."
out=sweeps/bond

{
    for s in 0 1 2; do
        for e in 163840 40960; do  # the second ends BOND where its effective N is about 16
            same="--episodes $e --seed $s --data-seed $s --resume"
            echo "python bon_baselines.py bond $same --out $out/bond-$e-seed$s"
            echo "python vbon.py --N 16 $same --out $out/vbon-N16-$e-seed$s"
        done
    done
    # The pull towards the anchor that the paper adds in its Figure 6.
    echo "python bon_baselines.py bond --gamma 1 --episodes 163840 --resume --out $out/bond-gamma1-seed0"
} | results/run_jobs.sh --task toy

python evaluate.py $out/* --curves --figures $out --csv results/bond.csv | tee results/bond.txt
mv $out/toy.png figures/bond.png
# With the runs of results/toy.sh: what each method pays above the least price of its effective N.
python evaluate.py sweeps/toy/* $out/bond-* --figures $out
mv $out/toy-excess.png figures/toy-excess.png
python - $out/* >results/bond-curves.csv <<'END'
import json, os, sys
keys = ["kl_to_ref", "kl_to_bon", "effective_N", "excess_kl"]
print(*["run", "episode", *keys], sep=",")
for folder in sys.argv[1:]:
    for m in map(json.loads, open(f"{folder}/metrics.jsonl")):
        if "exact/kl_to_bon" in m:
            print(os.path.basename(folder), m["episode"], *[f"{m['exact/' + c]:.4f}" for c in keys], sep=",")
END

[ -n "$REF$REWARD$IMDB" ] || exit 0
: "${REF:?is not set: name the folder of the reference model}"
: "${REWARD:?is not set: name the folder of the reward model}"
: "${IMDB:?is not set: name the folder of the reviews}"
for s in 0 1 2; do
    echo "python bon_baselines.py bond --episodes 10240 --resume --seed $s --out $out-imdb/bond-seed$s"
done | results/run_jobs.sh --task imdb --ref "$REF" --reward "$REWARD" --dataset "$IMDB" \
    --train-prompts 256 "$@"
python evaluate.py $out-imdb/* --csv results/bond-imdb.csv | tee results/bond-imdb.txt
