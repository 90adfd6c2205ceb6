# make help lists the targets. Each does all the set-up it needs, once.
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RUN := HF_HUB_DISABLE_TELEMETRY=1 $(PY)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow acceptance-real acceptance-study acceptance-evaluation acceptance-slurm acceptance-training acceptance-faults lint audit wheel clean

help:  ## show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /|/' | awk -F'|' '{printf "  make %-22s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## make the virtual environment with the tested versions

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (2 GB, a few minutes) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: setup  ## train and evaluate 4 small runs on this machine and show the table (about 8 minutes at first)
	@$(RUN) scripts/fetch_smollm2.py
	@$(RUN) -m peft_align.sweep +grid=quickstart

test: setup lint  ## the quick tests (5 minutes)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow and not acceptance" -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-slow: setup  ## the slow tests: a real model, real data
	@$(RUN) scripts/fetch_smollm2.py
	@$(RUN) -m pytest -m slow

acceptance-real: setup  ## 16 runs on real data with a real model (20 minutes; needs ../shared or PEFT_ALIGN_SHARED)
	@$(RUN) scripts/fetch_smollm2.py
	@$(RUN) -m pytest -m acceptance tests/end_to_end/test_real_study.py

acceptance-study: setup  ## the whole study in miniature, 130 runs (50 minutes; needs ../shared or PEFT_ALIGN_SHARED)
	@$(RUN) scripts/fetch_smollm2.py
	@$(RUN) -m pytest -m acceptance tests/end_to_end/test_study.py

acceptance-evaluation: setup  ## the study's five benchmarks against lm_eval and over a sweep (60 minutes; needs ../shared)
	@$(RUN) scripts/fetch_smollm2.py
	@$(RUN) -m pytest -m acceptance tests/evaluation tests/end_to_end/test_paper_suite.py

acceptance-slurm: setup  ## a disturbed Slurm, 150 runs, accounting (30 minutes; needs ../shared and Slurm with slurmdbd)
	@$(RUN) -m pytest -m acceptance tests/end_to_end/test_slurm_disturbed.py

acceptance-training: setup  ## both engines over 20 steps of a real model on real rows (40 minutes; needs ../shared)
	@$(RUN) scripts/fetch_smollm2.py
	@$(RUN) -m pytest -m acceptance tests/training

acceptance-faults: setup  ## a small sweep is killed, its disk filled, its files damaged, its clock set; prints a table (60 minutes)
	@$(RUN) -m pytest -m acceptance tests/faults

lint: setup  ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

audit: setup  ## known weaknesses of the tested versions (pip-audit, in an environment of its own; needs a network)
	@test -x $(VENV)-audit/bin/pip-audit || ($(PYTHON) -m venv $(VENV)-audit && $(VENV)-audit/bin/python -m pip install --quiet pip-audit)
	@$(PY) -m pip freeze --exclude-editable --disable-pip-version-check > $(VENV)-audit/installed.txt
	@$(VENV)-audit/bin/pip-audit --no-deps --disable-pip --requirement $(VENV)-audit/installed.txt

wheel: setup  ## build the wheel into dist/
	@$(PY) -m build --wheel --outdir dist .

clean:  ## remove the environment and build products (not outputs/)
	rm -rf $(VENV) $(VENV)-audit dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
