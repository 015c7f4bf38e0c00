# Entry points. tools/setup.sh installs the dependencies, CMakePresets.json defines the builds.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
JOBS ?= $(shell nproc)
PYTHON := .venv/bin/python
SOURCES = git ls-files '*.h' '*.cpp' '*.cu'

.PHONY: help setup build docs python demo test test-cpp test-asan test-tsan test-python fuzz test-long cuda gpu-kit gpu-check neon wheel check-wheel dist sdist bench format lint lint-fast install-test clean

help:  ## list the commands
	@grep -hE '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z -]+):.*## /\1\t/' | \
	  awk -F'\t' '{printf "  make %-21s %s\n", $$1, $$2}'

setup:  ## install Debian packages, .venv with torch, and the model; quick when all are present
	@tools/setup.sh

build:  ## build the program, build/release/moba; installs nothing, reports what is missing
	@tools/setup.sh --check packages python
	@cmake --preset release --log-level=ERROR >/dev/null
	cmake --build build/release -j$(JOBS) --target moba_program

docs: build  ## write the tables of flags in docs/command-line.md
	$(PYTHON) tools/flag_tables.py

python: setup  ## install the PyTorch package into .venv
	@echo "installing the Python package moba into .venv"
	$(PYTHON) -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps .

# Highway is linked in; libgomp is torch's own, so that a process has one pool of threads.
HIGHWAY = $(if $(wildcard build/highway),-C cmake.define.CMAKE_DISABLE_FIND_PACKAGE_hwy=ON -C cmake.define.FETCHCONTENT_SOURCE_DIR_HIGHWAY=$(abspath build/highway))
wheel: setup  ## build one wheel for every Python and torch into dist/; MOBA_BUILD_CUDA=ON adds the CUDA backend
	@tools/setup.sh release
	rm -rf build/wheel-linux
	$(PYTHON) -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w build/wheel-linux \
	  -C build-dir=build/wheel-release $(HIGHWAY) .
	PATH="$(abspath .venv/bin):$$PATH" $(PYTHON) -m auditwheel repair --only-plat --exclude libtorch_cpu.so --exclude libgomp.so.1 -w dist build/wheel-linux/*.whl

WHEEL_PYTHONS ?= python3.11=2.13.0
check-wheel: wheel  ## install the wheel in clean environments and use it; WHEEL_PYTHONS='python3.10=2.10.0 python3.13=2.15.0' names Pythons and torches
	$(PYTHON) tools/check_wheel.py dist/*.whl $(WHEEL_PYTHONS)

dist: build  ## pack the program with the libraries that it needs into one archive in dist/
	@tools/setup.sh release
	PATH="$(abspath .venv/bin):$$PATH" $(PYTHON) tools/make_dist.py
	$(PYTHON) tools/make_dist.py --check

sdist: setup  ## write the source distribution of the Python package into dist/
	@tools/setup.sh release
	$(PYTHON) -m build --sdist --no-isolation --skip-dependency-check --outdir dist .

demo: setup  ## show a model that finds a fact in a long text, with full attention and with MoBA
	@$(MAKE) --no-print-directory build
	@$(PYTHON) tools/demo.py

test: test-cpp test-asan test-tsan test-python  ## run all tests: C++, sanitizers, Python
	@echo "all tests passed: C++, AddressSanitizer, ThreadSanitizer, Python"

test-cpp: setup  ## run the C++ tests on the optimised build
	@cmake --preset release --log-level=ERROR >/dev/null
	cmake --build build/release -j$(JOBS)
	ctest --test-dir build/release --output-on-failure --progress -j$(JOBS)

# Agreement's cases run on one thread each, where ThreadSanitizer has nothing to check.
test-tsan: CTEST_SELECTION = -E Agreement
test-asan test-tsan: test-%: setup  ## run the library's tests under AddressSanitizer with UBSan, or ThreadSanitizer
	@cmake --preset $* --log-level=ERROR >/dev/null
	cmake --build build/$* -j$(JOBS)
	ctest --test-dir build/$* --output-on-failure --progress -j$(JOBS) $(CTEST_SELECTION)

test-python: test-cpp python  ## run the Python tests on the optimised build
	@tools/setup.sh browser
	$(PYTHON) -m pytest -q -n $(JOBS) --maxprocesses 8 tests

FUZZ_SECONDS ?= 20
fuzz: setup  ## fuzz the readers of GGUF, safetensors, JSON and texts; FUZZ_SECONDS=600 for longer
	@tools/setup.sh fuzz
	@cmake --preset fuzz --log-level=ERROR >/dev/null
	cmake --build build/fuzz -j$(JOBS) --target fuzzers
	$(PYTHON) tools/fuzz.py --seconds $(FUZZ_SECONDS)

test-long: test-cpp python  ## run tens of thousands more generated cases, and read a million tokens
	MOBA_TEST_CASES=2000 ctest --test-dir build/release --output-on-failure --progress -j$(JOBS) -R Agreement
	MOBA_TEST_CASES=2000 $(PYTHON) -m pytest -q tests/python/test_operator.py -k "float64 or reference"
	MOBA_TEST_KILLS=50 MOBA_TEST_FAULTS=1000 $(PYTHON) -m pytest -q tests/app/test_train.py tests/app/test_faults.py -k 'killed or survives'
	MOBA_TEST_TOKENS=1048576 $(PYTHON) -m pytest -q tests/app/test_long_context.py

cuda: setup  ## build the CUDA backend with nvcc, without a GPU; prints the registers of its kernels
	@cmake --preset cuda --log-level=ERROR >/dev/null
	cmake --build build/cuda -j$(JOBS)

ARCH ?= 90
gpu-kit: setup  ## build one folder that checks an NVIDIA GPU without compiling; ARCH=80 names another chip; needs nvcc, no GPU
	$(PYTHON) tools/gpu_kit.py --arch $(ARCH) --jobs $(JOBS)

gpu-check:  ## build, test and measure the CUDA backend on a machine with an NVIDIA GPU; needs no network
	@$(firstword $(wildcard $(PYTHON)) python3) tools/gpu_check.py

neon: setup  ## compile the kernels for Arm (needs Debian's g++-aarch64-linux-gnu)
	tools/check_neon.sh

bench: setup  ## run all CPU benchmarks, into benchmarks/results
	@cmake --preset release --log-level=ERROR >/dev/null
	cmake --build build/release -j$(JOBS)
	for script in benchmarks/run.py benchmarks/models.py benchmarks/pytorch_operator.py benchmarks/train_step.py; do echo "== $$script"; $(PYTHON) $$script; done

install-test: setup  ## install the library into a folder and build the example against it
	@cmake --preset lib --log-level=ERROR >/dev/null
	cmake --build build/lib -j$(JOBS)
	ctest --test-dir build/lib --output-on-failure -R install

format: setup  ## run clang-format on all C++ files and ruff on all Python files
	@tools/setup.sh developer
	$(SOURCES) | xargs clang-format -i
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

lint: lint-fast  ## check with clang-format, ruff and clang-tidy (C++, CUDA as C++, tests, Python); changes nothing
	tools/tidy.py build/lint -j$(JOBS)

lint-fast: setup  ## run the part of lint that takes a minute: clang-tidy on the library's top files only
	@tools/setup.sh developer
	$(SOURCES) | xargs clang-format --dry-run --Werror
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	@cmake --preset lint --log-level=ERROR >/dev/null
	tools/tidy.py build/lint -j$(JOBS) src/*.cpp

clean:  ## remove the builds; .venv and the model stay
	rm -rf $(filter-out build/models,$(wildcard build/*))
