# make demo | test | lint | bench | bench-full | gpu-build | one-wheel | sanitize: each sets up its own virtual environment
# and asks nothing. TORCH chooses the torch to install; the default is the release whose CPU build CI has at hand. Users of
# the library choose their own: pyproject.toml only bounds it from below.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
WHEEL = $$(ls -t $(VENV)/wheel/cover_vcl-*.whl | head -n 1)
GPU_TORCH ?= torch==2.14.1
GPU_VENV ?= .venv-gpu
GPU_BIN := $(abspath $(GPU_VENV))/bin
OTHER_TORCH ?= torch==2.14.1
OTHER_VENV ?= .venv-other
OTHER_BIN := $(abspath $(OTHER_VENV))/bin
SANITIZE_VENV ?= .venv-sanitize
SANITIZE_BIN := $(abspath $(SANITIZE_VENV))/bin
EXAMPLES ?= 1000

.PHONY: demo test lint format bench bench-full gpu-build one-wheel sanitize clean

# The compiled wheel, built without isolation against the torch of the environment, is what demo, tests and
# benchmarks run. They start in other folders, since Python would import the tree from this one.
$(VENV)/built: pyproject.toml setup.py $(wildcard csrc/* csrc/*/*) $(wildcard cover_kernels/*.py cover_kernels/*/*.py cover/*.py cover/*/*.py)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) and what builds the kernels into $(VENV)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77" wheel ninja numpy
	@echo "compiling the kernels: a few minutes"
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(VENV)/wheel .
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall "$(WHEEL)"
	touch $@

# with an extra of pyproject.toml
$(VENV)/with-%: $(VENV)/built
	@echo "installing what cover-vcl[$*] needs"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(WHEEL)[$*]"
	touch $@

demo: $(VENV)/with-plot
	cd $(VENV) && $(BIN)/python -m cover.demo --out $(CURDIR)/runs/demo

test: $(VENV)/with-test
	cd tests && $(BIN)/pytest

# the table at the end says what was skipped and why
BENCH := $(BIN)/pytest -q -rfE --disable-warnings --benchmark-quiet

bench: $(VENV)/with-test
	cd benchmarks && $(BENCH) bench_operators.py bench_model.py bench_data.py

# Every size, peer and axis, for an hour or more: OUT/results.json, OUT/report.md and its plots. compare.py shows two.
bench-full: $(VENV)/with-test
	test -n "$(OUT)" || { echo "make bench-full OUT=folder"; exit 1; }
	mkdir -p "$(OUT)"
	cd benchmarks && $(BENCH) --form full --benchmark-json="$(abspath $(OUT))/results.json" .
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

# The wheel that was built against TORCH, with another torch beside it in an environment of its own: the stable ABI's
# promise, tested on the operators.
one-wheel: $(VENV)/built
	test -x $(OTHER_BIN)/python || $(PYTHON) -m venv $(OTHER_VENV)
	@echo "installing $(OTHER_TORCH) into $(OTHER_VENV)"
	$(OTHER_BIN)/python -m pip install --quiet --disable-pip-version-check "$(OTHER_TORCH)" "$(WHEEL)" pytest hypothesis
	$(OTHER_BIN)/python -m pip install --quiet --no-deps --force-reinstall "$(WHEEL)"
	cd $(OTHER_VENV) && $(OTHER_BIN)/python -m cover_kernels
	cd tests && $(OTHER_BIN)/pytest test_operators.py test_veu.py test_warp.py test_compose.py

# The operators fuzzed on every instruction set of this processor, EXAMPLES of each test, with CPU kernels under
# AddressSanitizer and UndefinedBehaviorSanitizer, in an environment of its own.
sanitize:
	test -x $(SANITIZE_BIN)/python || $(PYTHON) -m venv $(SANITIZE_VENV)
	$(SANITIZE_BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77" wheel ninja numpy pytest hypothesis
	@echo "compiling the kernels with sanitizers: a few minutes"
	COVER_DEBUG=1 COVER_SANITIZE=address,undefined FORCE_CPU=1 $(SANITIZE_BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(SANITIZE_VENV)/wheel .
	$(SANITIZE_BIN)/python -m pip install --quiet --no-deps --force-reinstall "$$(ls -t $(SANITIZE_VENV)/wheel/cover_vcl-*.whl | head -n 1)"
	cd tests && $(SANITIZE_BIN)/python sanitized.py --examples $(EXAMPLES)

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
	rm -rf $(VENV) $(GPU_VENV) $(OTHER_VENV) $(SANITIZE_VENV) build dist *.egg-info
