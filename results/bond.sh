#!/usr/bin/env bash
# BOND and vBoN on the toy with equal episodes, for results/bond.*, results/bond-curves.csv and
# figures/bond.png. BOND should pass through Best-of-2, of-4, of-8, … 13 runs of up to two minutes
# on one core.
#
#   results/bond.sh
set -eo pipefail
cd "$(dirname "$0")/.."
out=sweeps/bond

{
    for s in 0 1 2; do
        for e in 163840 40960; do  # the second one ends near an effective N of 16 for BOND
            same="--episodes $e --seed $s --data-seed $s --resume"
            echo "python bon_baselines.py bond $same --out $out/bond-$e-seed$s"
            echo "python vbon.py --N 16 $same --out $out/vbon-N16-$e-seed$s"
        done
    done
    # With the pull to the anchor of the paper's Figure 6.
    echo "python bon_baselines.py bond --gamma 1 --episodes 163840 --resume" \
         "--out $out/bond-gamma1-seed0"
} | results/run_jobs.sh --task toy

runs=$(echo $out/bond-* $out/vbon-*)
python evaluate.py $runs --csv results/bond.csv | tee results/bond.txt
python results/curves.py $runs --figures $out
mv $out/toy.png figures/bond.png
python - $runs >results/bond-curves.csv <<'PYTHON'
import json, os, sys
keys = ["kl_to_ref", "kl_to_bon", "effective_N", "excess_kl"]
print(*["run", "episode", *keys], sep=",")
for folder in sys.argv[1:]:
    for m in map(json.loads, open(f"{folder}/metrics.jsonl")):
        if "exact/kl_to_bon" in m:
            values = [f"{m['exact/' + key]:.4f}" for key in keys]
            print(os.path.basename(folder), m["episode"], *values, sep=",")
PYTHON
