#!/usr/bin/env bash
# All that wants a GPU, in slices: checks, tests, measurements, then whole tables.
#
#     benchmarks/gpu_run.sh WORK [MINUTES] [ARCHIVE]
#
# Call it again until it says that everything is done.  What is finished is not done again, what failed is, and tables go on from their
# last snapshots, which lie in WORK/workspace-PRECISION.  What is worth keeping is in WORK/results, and at the end of every slice in
# the one file ARCHIVE (WORK/results.tar.gz): logs, measurements as JSON, the tables' records and the trained weights.  A step that takes
# longer than its limit is stopped, and the next one begins; tables stop a minute before the slice is over.
#
# PYTHON   an interpreter with torch, pytest and hypothesis, and with what hintkd needs or WHEELS has (python3)
# WHEELS   a folder of wheels that are installed first, into WORK/site, without a network
# SOURCES  a folder with the publishers' files, unpacked; without it they are downloaded
# STEPS    what to do, in this order; a table is table:precision
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ $# -ge 1 ] || { sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
work=$(cd "$1" && pwd)
deadline=$((SECONDS + 60 * ${2:-10}))
archive=${3:-$work/results.tar.gz}
python=${PYTHON:-python3}
steps=${STEPS:-start recorded tests golden changes profile together step table1:tf32}
export PYTHONPATH="$work/site:$root/python:$root/benchmarks:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=passive
results=$work/results
mkdir -p "$results" "$work/data" "$work/done"
declare -A limits=([start]=90 [recorded]=90 [tests]=150 [golden]=150 [changes]=150 [profile]=45 [together]=60 [step]=150 [scaling]=300 [memory]=150 [remembered]=150)

# Run a command for as long as the step may take, when it is interrupted as by Ctrl-C; its status, 124 then.
within() { timeout --signal=INT --kill-after=20 "$seconds" "$@"; }

do_step() {      # in $seconds
  cd "$root"
  case $1 in
    start) start ;;
    recorded | changes | profile | together) within "$python" benchmarks/gpu.py "$1" --output "$results/$1.json" ;;
    tests) within "$python" -m pytest -q -p no:cacheprovider tests/torchcaffe/test_gpu.py -k "not golden" ;;
    golden) within "$python" -m pytest -q -p no:cacheprovider tests/torchcaffe/test_gpu.py -k golden ;;
    step) within "$python" benchmarks/step.py --device gpu --nets resnet8 resnet14-kd --output "$results/step-gpu.json" ;;
    scaling | memory | remembered) within "$python" "benchmarks/$1.py" --device gpu --output "$results/$1-gpu.json" ;;
    table*:*) table "${1%:*}" "${1#*:}" ;;
    *) echo "gpu_run.sh: there is no step '$1'; see STEPS" >&2; return 2 ;;
  esac
}

start() {        # what the other steps need, and what machine this is
  if [ -n "${WHEELS:-}" ]; then
    within "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$work/site" "$WHEELS"/*.whl || return
  fi
  within "$python" -c 'import torch, hintkd.cli, torchcaffe; print(torch.__version__, torch.cuda.get_device_name())'
}

table() {        # one of results/paper in one precision, in a workspace of that precision
  local workspace=$work/workspace-$2 dataset
  dataset=$(sed -n 's/^dataset: *\([a-z0-9]*\).*/\1/p' "$root/results/paper/$1.yaml" | head -n 1)
  mkdir -p "$workspace/results" && ln -sfn "$work/data" "$workspace/data" && cp -r "$root/results/paper" "$workspace/results/" && cd "$workspace" || return
  [ -e "data/$dataset/dataset.json" ] || within "$python" -m hintkd.cli prepare "$dataset" ${SOURCES:+--from "$SOURCES"} || return
  within "$python" -m hintkd.cli reproduce "$1" --precision "$2" --device gpu
}

collect() {
  local workspace part
  for workspace in "$work"/workspace-*; do
    for part in results/measured results/weights results/report.md results/report.html runs/weights; do
      [ -e "$workspace/$part" ] || continue
      mkdir -p "$results/${workspace##*-}"
      cp -r "$workspace/$part" "$results/${workspace##*-}/"
    done
  done
  mkdir -p "$(dirname "$archive")"
  tar -czf "$archive.part" -C "$work" results && mv "$archive.part" "$archive"
}
trap collect EXIT

for step in $steps; do
  [ -e "$work/done/$step" ] && continue
  seconds=$((deadline - SECONDS)) cut=slice log="its log is $results/${step/:/-}.log"
  case $step in table*) seconds=$((seconds - 60)) ;; esac
  [ $seconds -gt 0 ] || { echo "The slice is over; $step is next."; exit 0; }
  if [ "${limits[$step]:-$seconds}" -lt "$seconds" ]; then seconds=${limits[$step]} cut=step; fi
  echo "== $step"
  status=0 before=$SECONDS
  (do_step "$step") >> "$results/${step/:/-}.log" 2>&1 || status=$?
  if [ $status -eq 0 ]; then touch "$work/done/$step"; echo "   $((SECONDS - before)) s"
  elif [ $cut = slice ] && { [ $status -eq 124 ] || [ $SECONDS -ge $deadline ]; }; then echo "The slice is over during $step."; exit 0
  elif [ $status -eq 124 ]; then echo "$step took longer than $seconds s; $log"
  else echo "$step ended with status $status; $log"; fi
  [ "$step" != start ] || [ $status -eq 0 ] || exit 1                   # without it nothing else runs
done
echo "Everything is done, or has failed: see $results."
