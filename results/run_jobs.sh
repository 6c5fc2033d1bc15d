#!/usr/bin/env bash
# Runs the commands on stdin, one a line, each with this script's arguments added to it. JOBS of them (2) run
# at a time, with one thread each:
#
#   echo "python vbon.py --N 4 --out sweeps/try/N4" | JOBS=1 results/run_jobs.sh --M 100
#
# Every line names its --out. A run whose folder holds result.json is finished, whatever flags it had, and is
# skipped. What a run prints goes to log.txt in its folder. A run that fails is named and stops no other one;
# the exit status is then 1.
set -eo pipefail
export OMP_NUM_THREADS=1

run() {  # the arguments for all lines, then the line
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
    echo "run_jobs.sh: not every run is finished; the same command goes on from here" >&2
    exit 1
}
