# Two commands do everything on a fresh machine (Python 3.10+, a C++ compiler, make):
#   make demo    set up, then run the main job on the embedded data set
#   make test    set up, then run the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Extra arguments for the main job and the tests: make test ARGS="-k nc -x"
ARGS ?=
# CUDA architectures to compile where nvcc is found: the GPU's own, or one alone when there is none to run on.
CUDA_ARCHS ?= $(shell nvidia-smi >/dev/null 2>&1 && echo native || echo 90)
# Processes that run the tests side by side.
JOBS ?= 2
# ON turns compiler warnings into errors (.ci/run does).
WERROR ?= OFF
NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc cmake -type f 2>/dev/null)

.PHONY: demo test slow sanitize lint format docs clean

demo: $(VENV)/.built
	$(BIN)/bbfast demo $(ARGS)

# The tests' tensors are tiny: a second thread costs more than it gains, on a busy machine many times more.
test: $(VENV)/.built $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) $(ARGS)

slow: $(VENV)/.built $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow $(ARGS)

# The operations' tests against a build with address and undefined-behaviour sanitizers, in an environment of its own
# that borrows the packages of the first.
SANITIZED := build/sanitize
sanitize: $(VENV)/.built $(VENV)/.dev
	rm -rf $(SANITIZED)
	$(PYTHON) -m venv --without-pip $(SANITIZED)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  $$($(SANITIZED)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth
	PATH="$(abspath $(BIN)):$$PATH" $(SANITIZED)/bin/python -m pip install -q --no-build-isolation --no-deps -e . \
	  -C build-dir=$(SANITIZED)/native -C cmake.define.BBFAST_CUDA=OFF -C cmake.define.BBFAST_SANITIZE=ON
	LD_LIBRARY_PATH="$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')/lib" \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  OMP_NUM_THREADS=2 $(SANITIZED)/bin/python -m pytest -p no:xdist -s python_tests/ops $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

docs: $(VENV)/.built $(VENV)/.dev
	$(BIN)/mkdocs build --strict

$(VENV)/.base: requirements/base.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "bbfast needs Python 3.10 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>&1); set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements/base.txt
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.base
	$(BIN)/pip install -q -r requirements/dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.base $(NATIVE)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e . \
	  -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$(CUDA_ARCHS)" -C cmake.define.BBFAST_WERROR=$(WERROR)
	@touch $@

clean:
	rm -rf $(VENV) build dist site runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
