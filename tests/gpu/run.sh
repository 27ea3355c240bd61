#!/usr/bin/env bash
# run.sh [--tiny] [--device cpu] [stage ...]: measure and check this project on a GPU, in under eight minutes.
# Run it in the root of the repository. It downloads nothing: `make gpu-wheels` collects missing packages in .gpu/wheels.
# The most important stages come first. Each is a process with its own time limit. If one fails, the others still run.
# Results are in $OUT (default: runs/gpu): table.md for docs/performance.md, results.json, log.txt. Exits with 1 if a stage failed.
set -u
out=${OUT:-runs/gpu} python=${PYTHON:-python3} limit=${SECONDS_IN_ALL:-470}
mkdir -p "$out"
rm -f "$out"/{rows.jsonl,log.txt}
options=() wanted=()
while [ $# -gt 0 ]; do
  case $1 in
    --device) options+=("$1" "$2"); shift ;;
    --*) options+=("$1") ;;
    *) wanted+=("$1") ;;
  esac
  shift
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
[ -d .gpu/wheels ] && PYTHONPATH=$("$python" tests/gpu/wheels.py install .gpu):$PYTHONPATH
failed=0
while read -r name seconds; do
  [ ${#wanted[@]} = 0 ] || [[ " ${wanted[*]} " == *" $name "* ]] || continue
  left=$((limit - SECONDS))
  if [ $left -lt 10 ]; then
    echo "== $name: no time is left"
    continue
  fi
  timeout -k 5 $((seconds < left ? seconds : left)) \
    "$python" -m tests.gpu.stages "${options[@]}" --out "$out" "$name" 2>&1 | tee -a "$out/log.txt" | grep -E "^($name: |== )"
  code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || { failed=1; echo "== $name: exit status $code (124: out of time); see $out/log.txt"; }
done < <("$python" -m tests.gpu.stages --list)
"$python" -m tests.gpu.stages --out "$out" --table
rm -f "$out/rows.jsonl"
exit $failed
