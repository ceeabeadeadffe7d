# make quickstart, make evidence, make real, make vllm, make attacks, make test, make test-kernels, make accidents, make docs. Each creates .venv where it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS := runs/quickstart
WORKERS ?= 2
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: accidents quickstart evidence debugging real vllm environment attacks test test-fast test-kernels check docs clean-quickstart
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   train a teacher, warm-start a student, distil it on its own attempts, write a report"
	@echo "make evidence     the claims of the papers, a grid of runs for each (hours; goes on where it stopped)"
	@echo "make real         real weights: a pruned model recovers, a prompt goes into weights (an hour; goes on where it stopped)"
	@echo "make vllm         vLLM for CPUs in an environment of its own, for the tests that need a real engine (two minutes)"
	@echo "make test         all tests"
	@echo "make test-fast    laws, properties and what is quick of the rest (a minute)"
	@echo "make test-kernels laws, properties and trained methods under four kinds of CPU kernel (TESTS=tests: all)"
	@echo "make attacks      hostile recipes, messages and texts, and a canary secret, hundreds of each (five minutes)"
	@echo "make accidents    200 run directories with damaged files, 50 runs that are killed (ten minutes)"
	@echo "make check        linters, types, import directions, docs"
	@echo "make docs         the site of the documentation, with the report of a short run in it (a minute)"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/understudy schema recipe.schema.json
	touch $(STAMP)

quickstart: $(STAMP) clean-quickstart
	@$(BIN)/python scripts/quickstart.py

clean-quickstart:
	rm -rf $(RUNS)

evidence: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/evidence.py

debugging: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/debugging.py

# data sets come from the Hugging Face hub; DATA=DIR: files
real: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[real]'
	@OMP_NUM_THREADS=2 $(BIN)/python scripts/real.py $(if $(DATA),--data $(DATA))

vllm:
	@$(PYTHON) scripts/install_vllm.py

environment: $(STAMP)

# in the order of the files: the end-to-end tests are the longest and come first, so that all processes end together
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow" tests/laws tests/properties tests/integration

test-kernels: $(STAMP)
	$(BIN)/python scripts/test_kernels.py $(TESTS)

# KINDS='recipes teacher': some kinds alone
attacks: $(STAMP)
	$(BIN)/python scripts/attacks.py $(KINDS)

accidents: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/accidents.py files
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/accidents.py kills

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_docs.py

docs: $(STAMP)
	$(BIN)/python scripts/docs.py
