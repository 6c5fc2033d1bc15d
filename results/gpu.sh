#!/usr/bin/env bash
# imdb on a GPU with the small models: float32 beside bfloat16, and the task's whole default run beside PPO's, for
# results/gpu.* and results/gpu-curves.csv. 5 runs, JOBS (2) at a time; 10 minutes of one H200 with JOBS=6.
#
#   REF=DIR REWARD=DIR IMDB=DIR results/gpu.sh
set -eo pipefail
cd "$(dirname "$0")/.."
: "${REF:?is not set: name the folder of the reference model}"
: "${REWARD:?is not set: name the folder of the reward model}"
: "${IMDB:?is not set: name the folder of the reviews}"
out=sweeps/gpu
short="python vbon.py --N 16 --train-prompts 256 --episodes 10240 --resume"
{
    echo "python vbon.py --N 16 --resume --out $out/full-vbon-seed0"
    echo "python vbon.py --N 16 --seed 1 --resume --out $out/full-vbon-seed1"
    echo "python vbon.py --objective rlhf --beta 0.05 --resume --out $out/full-rlhf-beta0.05-seed0"
    echo "$short --out $out/short-float32-seed0"
    echo "$short --dtype bfloat16 --out $out/short-bfloat16-seed0"
} | results/run_jobs.sh --task imdb --ref "$REF" --reward "$REWARD" --dataset "$IMDB" --sample-batch 4096 "$@"

python evaluate.py $out/* --csv results/gpu.csv | tee results/gpu.txt
# Running means over the last 32 phases.
python - $out/full-* >results/gpu-curves.csv <<'END'
import json, os, statistics, sys
keys = ["kl_to_ref", "log_f", "kl_to_bon", "reward"]
print(*["run", "episode", *keys], sep=",")
for folder in sys.argv[1:]:
    metrics = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
    for end in [*range(32, len(metrics), 32), len(metrics)]:
        means = [statistics.fmean(m["objective/" + key] for m in metrics[end - 32:end]) for key in keys]
        print(os.path.basename(folder), metrics[end - 1]["episode"], *[f"{x:.4f}" for x in means], sep=",")
END
