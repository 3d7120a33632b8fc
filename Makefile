# The menu: bare `make` prints it. Every target sets the environment up by itself.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CONFIG ?=
GPUS ?=
DEMO_TEACHER := configs/teachers/shapes
DEMO_STUDENT := configs/students/demo.json

.DEFAULT_GOAL := menu
.PHONY: menu setup demo harvest train test test-full lint format bench clean

menu: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## a .venv with what is tested (needs Python 3.11 or newer; PYTHON=... names another one)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make setup: Python 3.11 or newer is needed; found: $$($(PYTHON) --version 2>&1); do: make setup PYTHON=python3.12"; exit 2; }
	@echo "setting up .venv (some minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## harvest (interrupted once, resumed), train, sample: a picture in minutes, on two CPU cores
	@rm -rf out/demo
	@echo "--- 1. harvest; killed with SIGKILL after its second shard"
	@$(BIN)/python -m harvest run configs/harvest/demo.yaml & pid=$$!; \
	  until [ "$$(ls out/demo/set/receipts 2>/dev/null | grep -c json)" -ge 2 ]; do \
	    kill -0 $$pid 2>/dev/null || exit 1; sleep 0.1; done; \
	  kill -9 $$pid; wait $$pid 2>/dev/null; $(BIN)/python -m harvest status out/demo/set
	@echo "--- 2. the same command again: it goes on"
	@$(BIN)/python -m harvest run configs/harvest/demo.yaml
	@$(BIN)/python -m harvest verify out/demo/set
	@echo "--- 3. a student cut from the teacher, trained on the set alone"
	@$(BIN)/python -m train init --teacher $(DEMO_TEACHER) --student $(DEMO_STUDENT) --set out/demo/set --out out/demo/init
	@$(BIN)/python -m train run configs/train/demo.yaml
	@echo "--- 4. its pictures above its teacher's, from the same noise"
	@$(BIN)/python -m train sample out/demo/run --out out/demo/pictures.png

harvest: $(READY) ## make harvest CONFIG=configs/harvest/....yaml: ask the teacher; again to go on
	@$(BIN)/python -m harvest run $(or $(CONFIG),$(error CONFIG is missing; found: nothing; do: make harvest CONFIG=configs/harvest/demo.yaml))

train: $(READY) ## make train CONFIG=configs/train/....yaml [GPUS=n]: train the student; again to go on
	@$(if $(GPUS),$(BIN)/torchrun --nproc-per-node $(GPUS) -m,$(BIN)/python -m) train run \
	  $(or $(CONFIG),$(error CONFIG is missing; found: nothing; do: make train CONFIG=configs/train/demo.yaml))

test: $(READY) ## the suite
	@$(BIN)/python -m pytest

test-full: $(READY) ## the suite and the slow fault sweeps
	@$(BIN)/python -m pytest -m "not gpu"

lint: $(READY) ## ruff and a strict type check
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(READY) ## ruff's formatter over everything
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

bench: $(READY) ## speed against peers and limits, in one run
	@$(BIN)/python -m tests.bench

clean: ## remove what was made here: .venv, caches, out/
	rm -rf .venv out .pytest_cache .ruff_cache .mypy_cache *.egg-info
