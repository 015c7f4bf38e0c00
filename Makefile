# The commands people type. tools/setup.sh gets what a build needs, CMakePresets.json says what each build is.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
JOBS ?= $(shell nproc)
PYTHON := .venv/bin/python
SOURCES = git ls-files '*.h' '*.cpp' '*.cu'

.PHONY: help setup build python demo test test-cpp test-asan test-tsan test-python test-long cuda gpu-check neon bench format lint lint-fast install-test clean

help:  ## list the commands
	@grep -hE '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z -]+):.*## /\1\t/' | \
	  awk -F'\t' '{printf "  make %-21s %s\n", $$1, $$2}'

setup:  ## Debian packages, .venv with torch, the model; quick when all is there
	@tools/setup.sh

build:  ## the program, at build/release/moba; installs nothing, says what is missing
	@tools/setup.sh --check packages python
	@cmake --preset release --log-level=ERROR >/dev/null
	cmake --build build/release -j$(JOBS) --target moba_program

python: setup  ## the PyTorch package, installed into .venv
	@echo "installing the Python package moba into .venv"
	$(PYTHON) -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps .

demo: setup  ## a real model finds a fact in a long text, with full attention and with MoBA
	@$(MAKE) --no-print-directory build
	@$(PYTHON) tools/demo.py

test: test-cpp test-asan test-tsan test-python  ## every test: C++, sanitizers, Python against the ecosystem
	@echo "all tests passed: C++, AddressSanitizer, ThreadSanitizer, Python"

test-cpp: setup  ## the C++ tests, optimised
	@cmake --preset release --log-level=ERROR >/dev/null
	cmake --build build/release -j$(JOBS)
	ctest --test-dir build/release --output-on-failure --progress -j$(JOBS)

# Agreement's thousands of cases run on one thread each: nothing for ThreadSanitizer to see.
test-tsan: CTEST_SELECTION = -E Agreement
test-asan test-tsan: test-%: setup  ## the library's tests under AddressSanitizer with UBSan, and ThreadSanitizer
	@cmake --preset $* --log-level=ERROR >/dev/null
	cmake --build build/$* -j$(JOBS)
	ctest --test-dir build/$* --output-on-failure --progress -j$(JOBS) $(CTEST_SELECTION)

test-python: test-cpp python  ## the Python tests, on the optimised build
	@tools/setup.sh browser
	$(PYTHON) -m pytest -q -n $(JOBS) --maxprocesses 8 tests

test-long: test-cpp python  ## tens of thousands of generated cases more
	MOBA_TEST_CASES=2000 ctest --test-dir build/release --output-on-failure --progress -j$(JOBS) -R Agreement
	MOBA_TEST_CASES=2000 $(PYTHON) -m pytest -q tests/python/test_operator.py -k "float64 or reference"
	MOBA_TEST_KILLS=50 $(PYTHON) -m pytest -q tests/llm/test_train.py -k killed

cuda: setup  ## the CUDA backend with nvcc, no GPU needed; says what registers its kernels take
	@cmake --preset cuda --log-level=ERROR >/dev/null
	cmake --build build/cuda -j$(JOBS)

gpu-check:  ## on a machine with an NVIDIA GPU: builds, tests and measures the CUDA backend; needs no network
	@$(firstword $(wildcard $(PYTHON)) python3) tools/gpu_check.py

neon: setup  ## the kernels compile for Arm (needs Debian's g++-aarch64-linux-gnu)
	tools/check_neon.sh

bench: setup  ## every benchmark, into benchmarks/results
	@cmake --preset release --log-level=ERROR >/dev/null
	cmake --build build/release -j$(JOBS)
	for script in benchmarks/ttft.py benchmarks/run.py benchmarks/pytorch_operator.py benchmarks/train_step.py; do echo "== $$script"; $(PYTHON) $$script; done

install-test: setup  ## install the library into a folder and build the example against it
	@cmake --preset lib --log-level=ERROR >/dev/null
	cmake --build build/lib -j$(JOBS)
	ctest --test-dir build/lib --output-on-failure -R install

format: setup  ## clang-format on every C++ file, ruff on every Python file
	@tools/setup.sh developer
	$(SOURCES) | xargs clang-format -i
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

lint: lint-fast  ## clang-format, ruff and clang-tidy on C++, CUDA as C++, tests and Python; changes nothing
	tools/tidy.py build/lint -j$(JOBS)

lint-fast: setup  ## the part of lint that takes a minute: clang-tidy only on the library's top files
	@tools/setup.sh developer
	$(SOURCES) | xargs clang-format --dry-run --Werror
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	@cmake --preset lint --log-level=ERROR >/dev/null
	tools/tidy.py build/lint -j$(JOBS) src/*.cpp

clean:  ## remove the builds; .venv and the model stay
	rm -rf $(filter-out build/models,$(wildcard build/*))
