#!/usr/bin/env bash
# One command for a GPU machine: what brings the most evidence first, inside ten minutes.
#
#   bench/gpu_session.sh OUT_DIR            run it all, results in OUT_DIR
#   bench/gpu_session.sh --dry-run OUT_DIR  print the plan and check what can be checked anywhere
#
# No network is used. What the machine lacks (a pytest plugin, ncu, compute-sanitizer) is said in the
# summary and worked around, never passed over. Every part has a time box of its own; one that fails
# or overruns is reported, and the next one starts. The parts that measure append a row as soon as
# they have it. PYTHON names the interpreter (default: python3).
#
# OUT_DIR receives at most eight files: summary.txt, session.log, environment.json, measurements.csv,
# projection_gpu.csv, refresh_gpu.csv, tests.xml, tools.log; and build.log while the build is running.
# Exit status: 0 where every part passed, 1 where one failed or overran, 2 for bad arguments or a
# machine without a CUDA device.
set -u -o pipefail

usage() {
  echo "usage: bench/gpu_session.sh [--dry-run] OUT_DIR" >&2
  exit 2
}

dry_run=0
if [ "${1:-}" = "--dry-run" ]; then
  dry_run=1
  shift
fi
[ $# -eq 1 ] || usage
case "$1" in -* | "") usage ;; esac

root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$root" || exit 2
python=${PYTHON:-python3}
export PYTHON=$python
export PYTHONPATH="$root:$root/python_api${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT

# The parts in order, with the seconds that each has; the build runs beside the first three.
limit=550
box_build=120
names=(environment first_kernel launches configs whole_model restoring ncu tests captures refresh
  compile sanitizer)
declare -A box=([environment]=15 [first_kernel]=30 [launches]=60 [configs]=60 [whole_model]=60
  [restoring]=25 [ncu]=30 [tests]=140 [captures]=20 [refresh]=40 [compile]=35 [sanitizer]=35)
# Of these bench/gpu/ holds a module each.
measured=(first_kernel launches configs whole_model restoring captures)

compile_case=(--model 4096x4096 --rank 64 --dtype bf16 --backend triton,torch,cuda
  --rounds 15)

summary="$out/summary.txt"
log="$out/session.log"
started=$SECONDS
failed=0

note() { printf '%s\n' "$*" | tee -a "$summary"; }

has() { "$python" -c "import $1" >/dev/null 2>&1; }

# The first of some commands that there is.
tool() {
  local candidate
  for candidate in "$@"; do command -v "$candidate" && return; done
  return 1
}

# boxed NAME SECONDS LOG COMMAND...: run in the time left, at most SECONDS; append to LOG. What
# overruns is interrupted, upon which pytest writes what it has found, and soon killed.
boxed() {
  local name=$1 allowed=$2 file=$3 begin=$SECONDS left status word
  shift 3
  left=$((limit - (SECONDS - started)))
  [ "$allowed" -lt "$left" ] && left=$allowed
  if [ "$left" -lt 5 ]; then
    note "$(printf '%-14s not run: no time left' "$name")"
    return 1
  fi
  printf '\n== %s (at most %d s): %s\n' "$name" "$left" "$*" >>"$file"
  timeout -s INT -k 5 "$left" "$@" >>"$file" 2>&1
  status=$?
  case $status in
    0) word=passed ;;
    124 | 137) word="stopped after ${left} s" ;;
    *) word="failed (status $status)" ;;
  esac
  note "$(printf '%-14s %-22s %4d s' "$name" "$word" $((SECONDS - begin)))"
  return $status
}

# part NAME LOG COMMAND...: in the box of that name.
part() {
  local name=$1 file=$2
  shift 2
  boxed "$name" "${box[$name]}" "$file" "$@" || failed=1
}

measure() { part "$1" "$log" "$python" -m "bench.gpu.$1" --out "$out/measurements.csv"; }

not_run() {
  note "$(printf '%-14s not run: %s' "$1" "$2")"
  failed=1
}

# pyproject.toml is strict about warnings and about plugins that a machine may lack; a GPU machine's
# versions aren't those that the suite is held to. This stands in for its settings.
pytest_options() {
  printf '[pytest]\npythonpath = %s %s/python_api\nxfail_strict = true\nmarkers =\n  gpu: needs a CUDA device\n  slow: takes long\n  timing: measures time\n  timeout: of pytest-timeout\n' \
    "$root" "$root" >"$scratch/pytest.ini"
  options=(-c "$scratch/pytest.ini" --rootdir "$root" --import-mode=importlib -p no:cacheprovider
    -W default -m gpu -q --continue-on-collection-errors)
  # Only files with such tests: others import packages that this machine may lack.
  mapfile -t files < <(grep -rlF --include='test_*.py' pytest.mark.gpu tests | sort)
}

plan() {
  local name total=0
  echo "out:           $out"
  echo "python:        $("$python" --version 2>&1) ($python)"
  printf '%-14s at most %3d s, in the background\n' build "$box_build"
  for name in "${names[@]}"; do
    printf '%-14s at most %3d s\n' "$name" "${box[$name]}"
    total=$((total + box[$name]))
  done
  echo "together       $total s of $limit s"
  [ "$total" -le "$limit" ] || {
    echo "gpu_session: the boxes add up to more than the session" >&2
    return 1
  }
}

if [ $dry_run -eq 1 ]; then
  status=0
  plan || status=1
  "$python" -m bench projection --device cuda --list "${compile_case[@]}" || status=1
  # The parts on tiny matrices, Triton's kernels by its interpreter.
  for name in "${measured[@]}"; do
    echo "== $name"
    OMP_NUM_THREADS=1 TRITON_INTERPRET=1 OSF_BACKEND=triton "$python" -m "bench.gpu.$name" --dry-run \
      --out "$scratch/measurements.csv" || status=1
  done
  pytest_options
  echo "== tests"
  "$python" -m pytest "${options[@]}" --collect-only "${files[@]}" || status=1
  exit $status
fi

rm -f "$summary" "$log" "$out"/{environment.json,tests.xml,build.log,tools.log} \
  "$out"/{measurements,projection_gpu,refresh_gpu}.csv

capability=$("$python" - <<'PY'
import torch
assert torch.cuda.is_available(), f"torch {torch.__version__} sees no CUDA device"
print("%d.%d" % torch.cuda.get_device_capability())
PY
) || {
  note "no session: torch sees no CUDA device here"
  exit 2
}
note "osf-kernels GPU session, $(date -u +%Y-%m-%dT%H:%MZ)"
note "$(nvidia-smi -L 2>/dev/null | head -n 1 || echo "nvidia-smi is missing")"

# Some processors are left to the parts beside it.
jobs=$(($(nproc) - 4))
[ $jobs -ge 1 ] || jobs=1
boxed build "$box_build" "$out/build.log" \
  env MAX_JOBS="$jobs" nice -n 10 bash bench/gpu/build.sh "$capability" &
build=$!

measure first_kernel
measure launches
measure configs

# From here on nothing runs beside a part: the host's time is measured, and the tests need the build.
wait "$build" || failed=1
cat "$out/build.log" >>"$log" && rm "$out/build.log"

measure whole_model
measure restoring

if ncu=$(tool ncu /usr/local/cuda/bin/ncu /opt/nvidia/nsight-compute/*/ncu); then
  part ncu "$out/tools.log" "$ncu" --clock-control none --launch-count 2 \
    --kernel-name 'regex:projection_kernel' --section SpeedOfLight \
    --section MemoryWorkloadAnalysis --section Occupancy --section LaunchStats \
    --section WarpStateStats "$python" -m bench.gpu.first_kernel --rounds 0 --out /dev/null
else
  not_run ncu "there is none on this machine"
fi

# shellcheck disable=SC2016 # the inner shell expands
part environment "$log" bash -c '"$PYTHON" -m osf_kernels info --json >"$1"' _ "$out/environment.json"
for module in pytest hypothesis pytest_timeout pytest_benchmark xdist numpy ninja pybind11 triton rich; do
  has "$module" || note "missing: $module"
done

if has pytest; then
  pytest_options
  # Most of the time is Triton compiling, on one core a process.
  if has xdist; then options+=(-n 8); else note "pytest runs in one process: xdist is missing"; fi
  has pytest_timeout && options+=(--timeout=60)
  part tests "$log" "$python" -m pytest "${options[@]}" --junitxml "$out/tests.xml" "${files[@]}"
  note "$(grep -E '^[=]* ?[0-9]+ (passed|failed|skipped|deselected|error)' "$log" | tail -n 1)"
else
  not_run tests "pytest is missing"
fi

measure captures

part refresh "$log" "$python" -m bench refresh --device cuda --suite figures --rounds 1 \
  --csv "$out/refresh_gpu.csv"

# One case, the only one that has torch.compile to wait for.
part compile "$log" "$python" -m bench projection --device cuda --csv "$out/projection_gpu.csv" \
  "${compile_case[@]}"

if sanitizer=$(tool compute-sanitizer /usr/local/cuda/bin/compute-sanitizer); then
  # Where it can't attach to this driver, it fails on a program that allocates a byte there.
  if timeout -k 5 15 "$sanitizer" --tool memcheck --error-exitcode 9 "$python" - \
    >>"$out/tools.log" 2>&1 <<'PY'; then
import ctypes, sys
cuda, out = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
sys.exit(
    cuda.cuInit(0)
    or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(out), 0)
    or cuda.cuCtxSetCurrent(out)
    or cuda.cuMemAlloc_v2(ctypes.byref(out), ctypes.c_size_t(1))
)
PY
    # An allocation each: torch's own pool would hide an access behind a tensor. One tool alone:
    # each would start torch under it first; races are the emulator's to find (tests/emulator).
    part sanitizer "$out/tools.log" \
      env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --error-exitcode 9 \
      "$python" -m bench projection --device cuda --model 136x72 --rank 20 --dtype bf16,fp32 \
      --backend cuda --no-peers --rounds 0
  else
    note "sanitizer      does not work here: see tools.log"
  fi
else
  not_run sanitizer "there is no compute-sanitizer on this machine"
fi

for csv in "$out"/measurements.csv "$out"/projection_gpu.csv; do
  [ -s "$csv" ] && "$python" -m bench show "$csv" | tee -a "$summary"
done
note "$((SECONDS - started)) s in all; results in $out"
exit $failed
