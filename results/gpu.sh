#!/usr/bin/env bash
# imdb on a GPU with small models: float32 and bfloat16, and full default runs of vBoN and PPO, for
# results/gpu.* and results/gpu-curves.csv. 5 runs, JOBS (2) at a time. With JOBS=6 they take 10
# minutes on one H200.
#
#   REF=DIR REWARD=DIR IMDB=DIR results/gpu.sh
set -eo pipefail
cd "$(dirname "$0")/.."
: "${REF:?is not set: name the folder of the reference model}"
: "${REWARD:?is not set: name the folder of the reward model}"
: "${IMDB:?is not set: name the folder of the reviews}"
out=sweeps/gpu
full="python vbon.py --resume --out $out/full"
short="python vbon.py --N 16 --train-prompts 256 --episodes 10240 --resume --out $out/short"
{
    echo "$full-vbon-seed0 --N 16"
    echo "$full-vbon-seed1 --N 16 --seed 1"
    echo "$full-rlhf-beta0.05-seed0 --objective rlhf --beta 0.05"
    echo "$short-float32-seed0"
    echo "$short-bfloat16-seed0 --dtype bfloat16"
} | results/run_jobs.sh --task imdb --ref "$REF" --reward "$REWARD" --dataset "$IMDB" \
    --sample-batch 4096 "$@"

python evaluate.py $out/* --csv results/gpu.csv | tee results/gpu.txt
# Running means over 32 iterations.
python - $out/full-* >results/gpu-curves.csv <<'PYTHON'
import json, os, statistics, sys
keys = ["kl_to_ref", "kl_to_bon", "win_rate", "reward"]
print(*["run", "episode", *keys], sep=",")
for folder in sys.argv[1:]:
    metrics = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
    for end in [*range(32, len(metrics), 32), len(metrics)]:
        last = metrics[max(0, end - 32):end]
        means = [f"{statistics.fmean(m['objective/' + key] for m in last):.4f}" for key in keys]
        print(os.path.basename(folder), last[-1]["episode"], *means, sep=",")
PYTHON
