# make demo | test | lint | bench | bench-full | gpu-build: each sets up its own virtual environment and asks nothing.
# TORCH chooses the torch to install; the default is the release whose CPU build CI has at hand. Users of the library
# choose their own: pyproject.toml only bounds it from below.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
GPU_TORCH ?= torch==2.14.1
GPU_VENV ?= .venv-gpu
GPU_BIN := $(abspath $(GPU_VENV))/bin

.PHONY: demo test lint format bench bench-full gpu-build clean

# The compiled wheel, built without isolation against the torch of the environment, is what demo, tests and
# benchmarks run. They start in other folders, since Python would import the tree from this one.
$(VENV)/installed: pyproject.toml setup.py $(wildcard csrc/* csrc/*/*) $(wildcard cover_kernels/*.py cover_kernels/*/*.py cover/*.py cover/*/*.py)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77" wheel ninja numpy
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(VENV)/wheel .
	$(BIN)/python -m pip install --quiet "$$(ls -t $(VENV)/wheel/cover_vcl-*.whl | head -n 1)[test]"
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall "$$(ls -t $(VENV)/wheel/cover_vcl-*.whl | head -n 1)"
	touch $@

demo: $(VENV)/installed
	cd $(VENV) && $(BIN)/python -m cover.demo --out $(CURDIR)/runs/demo

test: $(VENV)/installed
	cd tests && $(BIN)/pytest

bench: $(VENV)/installed
	cd benchmarks && $(BIN)/pytest -q --benchmark-quiet bench_operators.py bench_model.py bench_data.py

# Every size, peer and axis, for an hour or more: OUT/results.json, OUT/report.md and its plots. compare.py shows two.
bench-full: $(VENV)/installed
	test -n "$(OUT)" || { echo "make bench-full OUT=folder"; exit 1; }
	mkdir -p "$(OUT)"
	cd benchmarks && $(BIN)/pytest -q --benchmark-quiet --form full --benchmark-json="$(abspath $(OUT))/results.json" .
	cd benchmarks && $(BIN)/python results.py "$(abspath $(OUT))/results.json"

# The whole extension against a CUDA build of torch (2.14.1 brings CUDA 13.0), in an environment of its own: compiled,
# loaded and asked what it was compiled for. Needs nvcc, but no GPU.
gpu-build:
	test -x $(GPU_BIN)/python || $(PYTHON) -m venv $(GPU_VENV)
	$(GPU_BIN)/python -m pip install --quiet --disable-pip-version-check "$(GPU_TORCH)" "setuptools>=77" wheel ninja numpy pytest hypothesis
	FORCE_CUDA=1 $(GPU_BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir $(GPU_VENV)/wheel .
	$(GPU_BIN)/python -m pip install --quiet --no-deps --force-reinstall "$$(ls -t $(GPU_VENV)/wheel/cover_vcl-*.whl | head -n 1)"
	cd $(GPU_VENV) && $(GPU_BIN)/python -m cover_kernels
	cd tests && $(GPU_BIN)/pytest test_backends.py

$(VENV)/lint: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ruff==0.17.6 clang-format==18.1.8
	touch $@

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')

clean:
	rm -rf $(VENV) $(GPU_VENV) build dist *.egg-info
