# Every target sets up what it needs in .venv: a fresh machine wants python3, make and a
# package index.
PYTHON ?= python3
BIN := .venv/bin

# A release that also comes as a CPU build: where the index has that, pip takes no CUDA packages.
TORCH := torch==2.13.0

.PHONY: demo test unit test-lowest test-newest torture lock search search-recipe bench bench-train bench-plan \
	format check-format check-type docs package setup clean

demo: setup
	$(BIN)/mxd-lens demo

test: setup
	$(BIN)/pytest --cov

unit: setup
	$(BIN)/pytest tests/unit

# The unit tests at an end of pyproject.toml's ranges, in an environment of their own.
test-lowest: ends/lowest.txt
	$(call test_at,lowest)

test-newest: ends/newest.txt
	$(call test_at,newest)

define test_at
$(BIN)/uv venv --quiet --clear --seed --python $(BIN)/python ends/$(1)
$(BIN)/uv pip install --quiet --python ends/$(1) -c ends/$(1).txt -e '.[dev]'
ends/$(1)/bin/python -m pytest tests/unit
endef

ends/lowest.txt: pyproject.toml .venv/uv
	mkdir -p ends
	$(COMPILE) --resolution lowest-direct --python $(BIN)/python -o $@

ends/newest.txt: pyproject.toml .venv/uv
	mkdir -p ends
	$(COMPILE) --upgrade --python $(BIN)/python -o $@

# Kills, full disks and two processes at once, on real commands; mounts a tmpfs, so wants root.
torture: setup
	$(BIN)/pytest tests/torture

# Newer versions of everything, for development and for the targets above.
lock: .venv/uv
	echo '$(TORCH)' | $(COMPILE) --universal --python-version 3.10 --upgrade -c /dev/stdin \
		--custom-compile-command 'make lock' -o requirements.lock

COMPILE = $(BIN)/uv pip compile pyproject.toml --extra dev --no-annotate --quiet

.venv/uv: .venv/installed
	$(BIN)/pip install 'uv>=0.9'
	touch $@

search: setup
	$(BIN)/python tests/benchmarks/search_lr.py $(ARCHITECTURES)

search-recipe: setup
	$(BIN)/python tests/benchmarks/search_recipe.py

bench: setup
	DEVICE=$(or $(DEVICE),cpu) $(BIN)/python tests/benchmarks/bench_model.py
	DEVICE=$(or $(DEVICE),cpu) $(BIN)/python tests/benchmarks/bench_step.py

bench-plan: setup
	$(BIN)/python tests/benchmarks/bench_plan.py

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
	$(BIN)/python tests/package/check_types.py

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Wheel and sdist, each in an empty environment with all that it needs, and in use there. torch is a
# CPU build if pip's --find-links have one, which uv does not ask by itself.
package: export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
package: .venv/uv
	rm -rf dist
	$(BIN)/uv build --quiet
	$(BIN)/uv tool run --quiet twine check --strict dist/*
	set -e; for made in $(CURDIR)/dist/*.whl $(CURDIR)/dist/*.tar.gz; do \
		$(BIN)/uv venv --quiet --clear --python $(BIN)/python ends/package; \
		$(BIN)/uv pip install --quiet --python ends/package -c requirements.lock "$$made[demo]"; \
		(cd ends/package && bin/python $(CURDIR)/tests/package/check.py); \
	done

setup: .venv/installed

.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mxd-lens needs python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c requirements.lock -e '.[dev]'
	touch $@

clean:
	rm -rf .venv dist ends runs site
