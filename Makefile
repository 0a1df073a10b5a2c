# Every target sets up what it needs: a virtual environment with pinned versions, and the build.
# Needed beforehand: make and Python 3.10 or newer with its venv module.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= gpu-session
WORKERS ?= 2

# The stamp carries a hash of the pins, so that a changed pin makes the environment anew.
PINS := .ci/venv.sh .ci/constraints.txt .ci/requirements.txt .ci/requirements-nodeps.txt
READY := $(VENV)/.ready-$(shell cat $(PINS) | cksum | cut -d' ' -f1)
PEER_PINS := .ci/requirements-peers.txt
PEERS := $(VENV)/.peers-$(shell cat $(PEER_PINS) .ci/constraints.txt | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
CUDA_FILES := $(shell find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' 2>/dev/null)
CXX_FILES = $(shell find csrc tests -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' -o -name '*.hpp' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help venv build demo test quick lint format bench continual streams static gpu-session clean

help:  ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

venv: $(READY)  ## Make .venv with pinned dependencies
$(READY):
	@sh .ci/venv.sh $(PYTHON) $(VENV)
	@touch $@

$(PEERS): $(READY) $(PEER_PINS)
	@sh .ci/venv.sh peers $(VENV)
	@touch $@

# What runs on the CPU needs no extension, so it doesn't wait for nvcc.
$(INSTALLED): $(READY) setup.py pyproject.toml osf_kernels/env.py
	@echo "== install: osf-kernels in place"
	@OSF_CUDA=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

build: $(BUILT)  ## Install the package in place, with the CUDA extension where nvcc is found
$(BUILT): $(INSTALLED) $(CUDA_FILES)
	@echo "== build: the CUDA extension where nvcc is found, $(words $(filter %.cu %.cpp,$(CUDA_FILES))) files: some minutes on two cores (OSF_CUDA=0: none)"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: $(INSTALLED)  ## Protect and train a real sentence encoder and a real decoder: leaks, times, what is forgotten
	@echo "== demo: two to five minutes on two cores"
	@$(BIN)/python -m bench.demo
	@$(BIN)/python -m bench.demo_decoder

# Two workers of one thread each: two-thread torch in both takes ten times as long. A file's tests
# share processes and builds, so that they stay together.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(BUILT) $(PEERS)  ## Run the whole test suite
	@echo "== test: the whole suite, 10 to 25 minutes on two cores"
	$(PYTEST)

quick: $(BUILT)  ## Run the tests that take seconds each
	@echo "== quick: the tests that take seconds each, 3 to 8 minutes on two cores"
	$(PYTEST) -m "not slow"

lint: $(READY)  ## Check style, types and formatting, Python and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

format: $(READY)  ## Format Python and C++ in place
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

bench: $(INSTALLED)  ## Measure on the CPU against peers, write the committed CSVs and pictures
	@# One that misses a figure fails, and those after it run all the same.
	@failed=; \
	run() { echo "$(BIN)/python -m $$*"; $(BIN)/python -m "$$@" || failed="$$failed $$1 $$2;"; }; \
	run bench cpu-suite; \
	run bench overhead --csv bench/results/overhead_cpu.csv; \
	run bench host --csv bench/results/host_cpu.csv; \
	run bench protect --csv bench/results/protect_cpu.csv; \
	run bench protect --sweep --csv bench/results/confine_cpu.csv; \
	for peer in peft mini_trainer galore stiefel; do \
	    run bench.integrations_$$peer --csv bench/results/integrations_$${peer}_cpu.csv; done; \
	run bench refresh --suite all --csv bench/results/refresh_cpu.csv --picture bench/results/refresh_cpu.png; \
	run bench refresh --suite figures --no-curve --csv bench/results/refresh_figures_cpu.csv; \
	if [ -n "$$failed" ]; then echo "failed:$$failed see above" >&2; exit 1; fi

continual: $(INSTALLED)  ## Five tasks in a row, what each method forgets; ANEW=1 trains what has rows too
	@$(BIN)/python -m bench continual $(if $(ANEW),--anew)

STREAMS = $(BIN)/python -m bench streams --data "$(DATA)"
streams: $(INSTALLED)  ## Long streams of tasks from DATA=folder, with an encoder and a decoder: what is forgotten; hours
	@test -n "$(DATA)" || { echo "error: make streams DATA=folder, with one JSON-lines file a task: see bench/README.md" >&2; exit 2; }
	@$(STREAMS) --stream 4,4x3 --tune
	@$(STREAMS) --stream 4,5,4x3 $(if $(ANEW),--anew)
	@$(STREAMS) --model smollm2 --stream 4 --tune
	@$(STREAMS) --model smollm2 --stream 4 --seeds 1 $(if $(ANEW),--anew)

static: $(BUILT)  ## Inspect every kernel's machine code and model what its launches move, no GPU, 10 min
	@$(BIN)/python -m bench static --csv bench/results/static.csv
	@$(BIN)/python -m bench traffic --csv bench/results/traffic.csv

gpu-session:  ## On a GPU machine, with its own Python: kernels, a whole model, tests, sanitizer into OUT
	bash bench/gpu_session.sh $(OUT)

clean:  ## Remove the environment, builds and caches
	rm -rf $(VENV) build dist *.egg-info osf_kernels/_cuda*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
