# Everything that a fresh clone needs. PYTHON and VENV may be set: make test VENV=/tmp/env
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= data/synthbirds
RUN ?= demo

.PHONY: demo test test-slow lint bench docs clean

# -- environment: remade when pyproject.toml changes ---------------------------------------------------------------
$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# -- what a user sees first: draws the birds, trains the flagship, tests it, explains one prediction -------------------
demo: $(VENV)/.base
	rm -rf runs/$(RUN)
	$(BIN)/fgvczoo data make synthbirds $(DATA) --size small
	$(BIN)/fgvczoo fit --config st-protopnet-synthbirds --run $(RUN) --data.root $(DATA)
	$(BIN)/fgvczoo test --config st-protopnet-synthbirds --run $(RUN) --data.root $(DATA) --ckpt_path last
	$(BIN)/fgvczoo explain runs/$(RUN) --data_root $(DATA) -o runs/$(RUN)/why.html \
		$$(ls $(DATA)/CUB_200_2011/images/001.*/*.jpg | tail -1)
	@echo "The page: runs/$(RUN)/why.html"

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict # not --quiet: it would hide warnings from --strict

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/ops.py
	$(BIN)/python benchmarks/synthbirds_guards.py
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/tree.py
	$(BIN)/python benchmarks/reproduce.py st-protopnet-synthbirds --seeds 3
	$(BIN)/python benchmarks/reproduce.py protopnet-synthbirds --seeds 3
	$(BIN)/python benchmarks/reproduce.py prototree-synthbirds --seeds 3
	$(BIN)/python benchmarks/interpretability.py st-protopnet-synthbirds protopnet-synthbirds
	$(BIN)/python benchmarks/kills.py

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
