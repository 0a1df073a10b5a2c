#!/usr/bin/env bash
# Builds the CUDA extension in place, into osf_kernels/: by setup.py, and where that fails by nvcc.
#
#   bench/gpu/build.sh [--plain] CAPABILITY     such as 9.0; --plain starts with nvcc
#
# setup.py reads pyproject.toml, which a setuptools below 77 refuses; the plain way needs nvcc, a C++
# compiler, Python's headers and pybind11's (the copy that torch ships will do), and no setuptools.
# PYTHON names the interpreter (default: python3), NVCC the compiler, MAX_JOBS how many run at once.
set -u -o pipefail

plain=0
if [ "${1:-}" = "--plain" ]; then
  plain=1
  shift
fi
if [ $# -ne 1 ] || ! [[ $1 =~ ^[0-9]+\.[0-9]$ ]]; then
  echo "usage: bench/gpu/build.sh [--plain] CAPABILITY" >&2
  exit 2
fi
capability=$1
cd "$(dirname "$0")/../.." || exit 2
python=${PYTHON:-python3}
jobs=${MAX_JOBS:-$(nproc)}

if [ $plain -eq 0 ]; then
  OSF_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability" MAX_JOBS="$jobs" \
    "$python" setup.py build_ext --inplace && exit 0
  echo "setup.py failed (status $?): nvcc alone builds the extension"
fi

nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
"$nvcc" --version >/dev/null || {
  echo "build.sh: no nvcc on PATH, none in /usr/local/cuda/bin" >&2
  exit 1
}
# Python's headers, pybind11's, and the suffix of an extension module; torch is not imported.
mapfile -t found < <("$python" - <<'PY'
import importlib.util, pathlib, sysconfig
print(sysconfig.get_paths()["include"])
for package in ("pybind11", "torch"):
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (pathlib.Path(folder) / "include/pybind11/pybind11.h").is_file():
            print(pathlib.Path(folder) / "include")
            print(sysconfig.get_config_var("EXT_SUFFIX"))
            raise SystemExit
PY
)
if [ ${#found[@]} -ne 3 ]; then
  echo "build.sh: $python finds no pybind11 headers, neither of pybind11 nor of torch" >&2
  exit 1
fi
number=${capability/./}
objects=build/plain-sm_$number
rm -rf "$objects"
mkdir -p "$objects"
export nvcc objects
export flags="-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -cudart static
  -gencode=arch=compute_$number,code=sm_$number -I csrc"
export python_include=${found[0]} pybind11_include=${found[1]}
# shellcheck disable=SC2016,SC2086 # the inner shell expands; the flags are words
printf '%s\n' csrc/*.cu csrc/inst/*.cu csrc/*.cpp | xargs -P "$jobs" -I{} bash -c '
  "$nvcc" $flags -isystem "$python_include" -isystem "$pybind11_include" \
    -c "$1" -o "$objects/$(basename "$1").o" && echo "nvcc $1"' _ {} || exit 1
# Linked elsewhere and moved: nobody imports half of it.
"$nvcc" -shared -cudart static "$objects"/*.o -o "$objects/_cuda.so" &&
  mv "$objects/_cuda.so" "osf_kernels/_cuda${found[2]}" &&
  echo "osf_kernels/_cuda${found[2]}"
