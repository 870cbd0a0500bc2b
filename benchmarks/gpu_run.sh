#!/usr/bin/env bash
# All that wants a GPU, in slices: the tests, the benchmarks, then whole tables.
#
#     benchmarks/gpu_run.sh OUT [MINUTES]
#
# Call it again until it says that everything is done.  What is finished is not done again, and tables go on from their last
# snapshots, which lie in OUT/workspace-PRECISION.  What is worth keeping is copied to OUT/results: logs, the benchmarks' JSON,
# the tables' records and the trained weights.
#
# PYTHON   an interpreter with torch and what hintkd needs (python3)
# SOURCES  a folder with the publishers' files, unpacked; without it they are downloaded
# STEPS    what to do, in this order; a table is table:precision
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ $# -ge 1 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
deadline=$((SECONDS + 60 * ${2:-10}))
python=${PYTHON:-python3}
steps=${STEPS:-tests step scaling memory remembered table3:fp32 table3:tf32 table1:tf32 table1:fp32 table2:tf32 table4:tf32}
export PYTHONPATH="$root/python:$root/benchmarks:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=passive
results=$out/results
mkdir -p "$results" "$out/data" "$out/done"

# Run a command until the slice is over, when it is interrupted as by Ctrl-C; its status, 124 then.
slice() { timeout --signal=INT --kill-after=60 $((deadline > SECONDS ? deadline - SECONDS : 1)) "$@"; }

do_step() {
  case $1 in
    tests) cd "$root" && slice "$python" -m pytest -q -m gpu -p no:cacheprovider tests ;;
    step | scaling | memory | remembered) cd "$root" && slice "$python" "benchmarks/$1.py" --device gpu --output "$results/$1-gpu.json" ;;
    table*:*) table "${1%:*}" "${1#*:}" ;;
    *) echo "gpu_run.sh: there is no step '$1'; see STEPS" >&2; return 2 ;;
  esac
}

table() {        # one of results/paper in one precision, in a workspace of that precision
  local workspace=$out/workspace-$2 dataset
  dataset=$(sed -n 's/^dataset: *\([a-z0-9]*\).*/\1/p' "$root/results/paper/$1.yaml" | head -n 1)
  mkdir -p "$workspace/results" && ln -sfn "$out/data" "$workspace/data" && cp -r "$root/results/paper" "$workspace/results/" && cd "$workspace" || return
  [ -e "data/$dataset/dataset.json" ] || slice "$python" -m hintkd.cli prepare "$dataset" ${SOURCES:+--from "$SOURCES"} || return
  slice "$python" -m hintkd.cli reproduce "$1" --precision "$2" --device gpu
}

collect() {
  local workspace part
  for workspace in "$out"/workspace-*; do
    for part in results/measured results/weights results/report.md results/report.html runs/weights; do
      [ -e "$workspace/$part" ] || continue
      mkdir -p "$results/${workspace##*-}"
      cp -r "$workspace/$part" "$results/${workspace##*-}/"
    done
  done
}
trap collect EXIT

for step in $steps; do
  [ -e "$out/done/$step" ] && continue
  [ $SECONDS -lt $deadline ] || { echo "The slice is over; $step is next."; exit 0; }
  echo "== $step"
  status=0
  (do_step "$step") >> "$results/${step/:/-}.log" 2>&1 || status=$?
  if [ $status -eq 124 ] || [ $SECONDS -ge $deadline ]; then echo "The slice is over during $step."; exit 0; fi
  [ $status -eq 0 ] && touch "$out/done/$step" || echo "$step ended with status $status; its log is $results/${step/:/-}.log"
done
echo "Everything is done, or has failed: see $results."
