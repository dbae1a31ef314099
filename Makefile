# Every target makes what it needs of .venv on first use and again when pyproject.toml changes.
# pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are honoured.  Works with GNU make 3.81 (macOS).

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
NOTEBOOK := notebooks/00_start_here.ipynb
# tests at a time in `make test`, one thread each
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help lab test lint notebooks zoo tables bench clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

# --- .venv: .made is an empty environment, .lab can run the notebooks, .dev can also test and lint ---

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "bclip_lab needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 || true)"; \
	  echo "Name another interpreter:  make PYTHON=python3.12 <target>"; \
	  exit 1; } >&2
	@$(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); \
	  echo "Could not create $(VENV). On Debian and Ubuntu:  apt install python3-venv" >&2; \
	  exit 1; }
	@touch $@

$(VENV)/.lab: pyproject.toml | $(VENV)/.made
	@echo "Installing bclip_lab into $(VENV) (a few minutes the first time) ..."
	@$(PY) -m pip install --quiet --editable .
	@# The lab works without a network: JupyterLab shall not ask for news, nor look for updates.
	@$(PY) -m jupyter labextension disable @jupyterlab/apputils-extension:announcements >/dev/null 2>&1 || true
	@touch $@

$(VENV)/.dev: $(VENV)/.lab
	@echo "Adding the tools for tests and lint ..."
	@$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@

# --- use ---------------------------------------------------------------------------------------------

# default_url, not a file argument: it is also in the URL that is printed where there is no display.
# Containers run as root, which Jupyter refuses unless told.
lab: $(VENV)/.lab  ## open JupyterLab on the first notebook
	@set --; \
	if [ "$$(uname)" = Linux ] && [ -z "$$DISPLAY$$WAYLAND_DISPLAY" ]; then set -- "$$@" --no-browser; fi; \
	if [ "$$(id -u)" = 0 ]; then set -- "$$@" --allow-root; fi; \
	exec $(PY) -m jupyter lab --ip=127.0.0.1 --LabApp.default_url=/lab/tree/$(NOTEBOOK) "$$@"

zoo: $(VENV)/.lab  ## train the shipped checkpoints and learn their bounds again (data/zoo/)
	$(PY) -m bclip_lab zoo build
	$(PY) -m bclip_lab zoo clip

tables: $(VENV)/.lab  ## write the tables of the README from the recorded results
	$(PY) -m bclip_lab tables

# --- checks ------------------------------------------------------------------------------------------

test: lint  ## all that CI runs: lint, unit tests, doctests, browser tests, notebooks on a small budget
	@# The browser tests have the machine to themselves; the others share it. Both run, whichever fails.
	export BCLIP_LAB_BUDGET=$${BCLIP_LAB_BUDGET:-small}; \
	$(PY) -m pytest tests/browser; browser=$$?; \
	$(PY) -m pytest -n $(WORKERS) --ignore=tests/browser && exit $$browser

lint: $(VENV)/.dev  ## ruff, mypy --strict, import-linter
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy --strict bclip_lab
	$(VENV)/bin/lint-imports

notebooks: $(VENV)/.dev  ## run every notebook on its full budget, with the seconds of each
	$(PY) -m pytest tests/test_notebooks.py

bench: $(VENV)/.dev  ## run the benchmarks (BCLIP_LAB_BUDGET=small: minutes, not hours); results in tests/benchmarks/results/
	$(PY) -m pytest tests/benchmarks --benchmark-quiet --benchmark-autosave --benchmark-storage=file://tests/benchmarks/results

clean:  ## remove caches and build products; .venv and data/cache/ stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis .benchmarks
	rm -rf tests/benchmarks/results
	find . -path ./$(VENV) -prune -o \
	  \( -name __pycache__ -o -name .ipynb_checkpoints -o -name '*.egg-info' \) -prune -exec rm -rf {} +

distclean: clean  ## the same, and remove .venv
	rm -rf $(VENV)
