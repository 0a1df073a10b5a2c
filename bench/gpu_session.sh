#!/usr/bin/env bash
# One command for a GPU machine: build in place, gpu tests, compute-sanitizer, benches.
#
#   bench/gpu_session.sh OUT_DIR            run it all, inside nine minutes, results in OUT_DIR
#   bench/gpu_session.sh --dry-run OUT_DIR  print the plan and check what can be checked anywhere
#
# No network is used. What the machine lacks (a pytest plugin, compute-sanitizer) is said in the
# summary and worked around, never passed over. Every part has a time box; one that overruns is
# stopped and reported, and the next one starts. PYTHON names the interpreter (default: python3).
#
# OUT_DIR receives at most eight files: session.log, environment.json, tests.xml, sanitizer.log,
# projection_gpu.csv, refresh_gpu.csv, bench.log, summary.txt. Exit status: 0 where every part
# passed, 1 where one failed or overran, 2 for bad arguments or a machine without a CUDA device.
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
export PYTHONPATH="$root:$root/python_api${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1

# Seconds for each part; together under the nine minutes of a session, start to summary.
limit=530
box_build=45
box_tests=180
box_sanitizer=85
box_shapes=85
box_model=65
box_refresh=70

summary="$out/summary.txt"
started=$SECONDS
failed=0

note() { printf '%s\n' "$*" | tee -a "$summary"; }

has() { "$python" -c "import $1" >/dev/null 2>&1; }

# part NAME BOX LOG COMMAND...: run in the time left, at most BOX seconds; append to LOG. What
# overruns is interrupted: pytest then writes what it has found, on a TERM it would not.
part() {
  local name=$1 box=$2 log=$3 begin=$SECONDS left status word
  shift 3
  left=$((limit - (SECONDS - started)))
  [ "$box" -lt "$left" ] && left=$box
  if [ "$left" -lt 5 ]; then
    note "$(printf '%-22s not run: no time left' "$name")"
    failed=1
    return 1
  fi
  printf '\n== %s (at most %d s): %s\n' "$name" "$left" "$*" >>"$log"
  timeout -s INT -k 15 "$left" "$@" >>"$log" 2>&1
  status=$?
  case $status in
    0) word=passed ;;
    124 | 137) word="stopped after ${left} s" ;;
    *) word="failed (status $status)" ;;
  esac
  [ $status -eq 0 ] || failed=1
  note "$(printf '%-22s %-22s %4d s' "$name" "$word" $((SECONDS - begin)))"
  return $status
}

# The bench commands, one a line: LABEL BOX ARGUMENTS...
# Batches of cases are ordered so that those with a figure to reach come first.
bench_commands() {
  cat <<'COMMANDS'
shapes-bf16 SHAPES --model 4096x4096 --rank 128,64,0.8,0.5 --dtype bf16 --backend auto,triton,cuda --rounds 30
shapes-fp32 SHAPES --model 4096x4096 --rank 64,128,0.5,0.8 --dtype fp32 --backend auto,triton,cuda --rounds 15
shapes-wide SHAPES --model 11008x4096,4096x11008 --rank 128 --dtype bf16 --backend auto,triton,cuda --rounds 20
llama-bf16 MODEL --model llama-2-7b --rank 128 --dtype bf16 --backend auto,triton,cuda --rounds 7
t5-fp32 MODEL --model t5-large --rank 0.5 --dtype fp32 --rounds 5
COMMANDS
}

plan() {
  local total=$((box_build + box_tests + box_sanitizer + box_shapes + box_model + box_refresh))
  echo "out:        $out"
  echo "python:     $("$python" --version 2>&1) ($python)"
  echo "build       at most $box_build s"
  echo "tests       at most $box_tests s"
  echo "sanitizer   at most $box_sanitizer s (memcheck)"
  echo "bench       at most $box_shapes s for single shapes, $box_model s for whole models"
  echo "refresh     at most $box_refresh s"
  echo "together    $total s of $limit s"
  [ "$total" -le "$limit" ] || {
    echo "gpu_session: the boxes add up to more than the session" >&2
    return 1
  }
}

if [ $dry_run -eq 1 ]; then
  status=0
  plan || status=1
  for needed in setup.py osf_kernels csrc tests bench/__main__.py; do
    [ -e "$needed" ] || {
      echo "gpu_session: $needed is missing" >&2
      status=1
    }
  done
  while read -r label box arguments; do
    echo "$label ($box):"
    # shellcheck disable=SC2086 # the arguments are words
    "$python" -m bench projection --device cuda --list $arguments || status=1
  done < <(bench_commands)
  exit $status
fi

rm -f "$out"/session.log "$out"/environment.json "$out"/tests.xml "$out"/sanitizer.log \
  "$out"/projection_gpu.csv "$out"/refresh_gpu.csv "$out"/bench.log "$summary"

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
for module in pytest hypothesis pytest_timeout pytest_benchmark xdist numpy ninja pybind11 triton rich; do
  has "$module" || note "missing: $module"
done

part build "$box_build" "$out/session.log" \
  env OSF_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability" "$python" setup.py build_ext --inplace
"$python" -m osf_kernels info --json >"$out/environment.json" 2>>"$out/session.log" ||
  note "python -m osf_kernels info failed: see session.log"

if has pytest; then
  # Only files with such tests: others import packages that this machine may lack or that warn.
  mapfile -t files < <(grep -rlF --include='test_*.py' pytest.mark.gpu tests | sort)
  options=(-m gpu -q --junitxml "$out/tests.xml" --continue-on-collection-errors)
  # Most of the time is Triton compiling, on one core a process.
  if has xdist; then options+=(-n 8); else note "pytest runs in one process: xdist is missing"; fi
  has pytest_timeout && options+=(--timeout=60)
  if ! has pytest_timeout || ! has pytest_benchmark; then
    # pyproject.toml is strict about plugins; without them this stands in for its settings.
    note "pytest runs without the settings of pyproject.toml: a plugin that they name is missing"
    printf '[pytest]\npythonpath = %s %s/python_api\nmarkers =\n  gpu: needs a CUDA device\n  slow: takes long\n  timing: measures time\n' \
      "$root" "$root" >"$out/pytest.ini"
    options+=(-c "$out/pytest.ini" --rootdir "$root" --import-mode=importlib)
  fi
  part tests "$box_tests" "$out/session.log" "$python" -m pytest "${options[@]}" "${files[@]}"
  note "$(grep -E '^[=]* ?[0-9]+ (passed|failed|skipped|deselected|error)' "$out/session.log" | tail -n 1)"
  rm -f "$out/pytest.ini"
else
  note "tests                  not run: pytest is missing"
  failed=1
fi

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  # Where it can't attach to this driver, it fails on a program that allocates a byte there.
  if timeout -k 5 15 "$sanitizer" --tool memcheck --error-exitcode 9 "$python" - \
    >>"$out/sanitizer.log" 2>&1 <<'PY'; then
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
    part "sanitizer memcheck" "$box_sanitizer" "$out/sanitizer.log" \
      env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --error-exitcode 9 \
      "$python" -m bench projection --device cuda --model 136x72 --rank 20 --dtype bf16,fp32 \
      --backend cuda --no-peers --rounds 0
  else
    note "sanitizer              does not work here: see sanitizer.log"
  fi
else
  note "sanitizer              not run: no compute-sanitizer on this machine"
fi

bench_started=$SECONDS
while read -r label box arguments <&3; do
  case $box in
    SHAPES) allowed=$((box_shapes - (SECONDS - bench_started))) ;;
    *) allowed=$((box_shapes + box_model - (SECONDS - bench_started))) ;;
  esac
  if [ "$allowed" -lt 5 ]; then
    note "$(printf '%-22s not run: no time left' "bench $label")"
    failed=1
    continue
  fi
  # shellcheck disable=SC2086 # the arguments are words
  part "bench $label" "$allowed" "$out/bench.log" "$python" -m bench projection --device cuda \
    --csv "$out/projection_gpu.csv" $arguments
done 3< <(bench_commands)

part "bench refresh" "$box_refresh" "$out/bench.log" "$python" -m bench refresh --device cuda \
  --suite figures --rounds 1 --csv "$out/refresh_gpu.csv"

if [ -s "$out/projection_gpu.csv" ]; then
  "$python" -m bench show "$out/projection_gpu.csv" | tee -a "$summary"
fi
note "$((SECONDS - started)) s in all; results in $out"
exit $failed
