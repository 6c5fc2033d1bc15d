#!/usr/bin/env bash
# Run the commands on stdin, one per line, each with the arguments of this script added. JOBS (2) of
# them run at a time, with one thread each:
#
#   echo "python vbon.py --N 4 --resume --out sweeps/try/N4" | JOBS=1 results/run_jobs.sh --M 100
#
# Every line must have an --out. A run whose folder holds result.json is finished and is skipped,
# whatever its flags are. --resume continues an unfinished one. The output of a run goes to log.txt
# in its folder. If a run fails, its name is printed and the others continue; the exit status is 1.
set -eo pipefail
export OMP_NUM_THREADS=1

run() {  # arguments for all lines, then the line
    local line=${!#} out
    out=${line##*--out }
    out=${out%% *}
    [ ! -e "$out/result.json" ] || return 0
    mkdir -p "$out"
    if $line "${@:1:$#-1}" >"$out/log.txt" 2>&1; then
        echo "done    $out"
    else
        echo "FAILED  $out: $(tail -n 1 "$out/log.txt")" >&2
        return 1
    fi
}
export -f run

tr '\n' '\0' | xargs -0 -n 1 -P "${JOBS:-2}" bash -c 'run "$@"' run "$@" || {
    echo "run_jobs.sh: some runs are not finished, the same command continues them" >&2
    exit 1
}
