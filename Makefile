# Every target sets up what it needs in .venv: a fresh machine wants python3, make and a
# package index.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test unit search search-recipe bench bench-train format check-format check-type setup clean

demo: setup
	$(BIN)/mxd-lens demo

test: setup
	$(BIN)/pytest

unit: setup
	$(BIN)/pytest tests/unit

search: setup
	$(BIN)/python tests/benchmarks/search_lr.py

search-recipe: setup
	$(BIN)/python tests/benchmarks/search_recipe.py

bench: setup
	DEVICE=$(or $(DEVICE),cpu) $(BIN)/python tests/benchmarks/bench_model.py
	DEVICE=$(or $(DEVICE),cpu) $(BIN)/python tests/benchmarks/bench_step.py

bench-train: setup
	DEVICE=$(or $(DEVICE),cpu) $(BIN)/python tests/benchmarks/bench_train.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check-format: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

check-type: setup
	$(BIN)/basedpyright

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mxd-lens needs python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
