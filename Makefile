# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test deep faults lowest lint spec mutants clean help

help:
	@echo "make demo      install into $(VENV) and run LoSA on the embedded model (about 3 minutes on 2 cores)"
	@echo "make test      install into $(VENV) and run the oracle tests (about 9 minutes on 2 cores)"
	@echo "make deep      run the oracle tests on ten times as many new random examples (about an hour on 2 cores); SEED=n repeats those of n"
	@echo "make faults    break fifty runs in every way a long run can break, resume them and compare the bits (5 minutes on 2 cores)"
	@echo "make spec      render the spec as one page, build/spec.html, with typeset equations beside the code"
	@echo "make lowest    test the lowest versions that pyproject.toml declares; INSTEAD=torch==2.13.0 replaces one of them"
	@echo "make lint      ruff, codespell and mypy"
	@echo "make mutants   make small random mistakes in production and count those that a test notices: PART=core|engine|experiment|commands"
	@echo "               SAMPLE=150 SEED=0 (a part takes about an hour on 2 cores)"
	@echo "make clean     remove $(VENV), build/ and caches"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[report,serve,eval,test,lint,spec]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m torch_impl.run

test: $(STAMP)
	$(BIN)/python -m pytest oracle_tests reference torch_impl

# A new seed every time, printed before and after the tests; SEED=n repeats the examples of seed n.
deep: SEED := $(if $(filter command environment,$(firstword $(origin SEED))),$(SEED),$(shell date +%s))
deep: $(STAMP)
	@echo "make deep SEED=$(SEED)"
	@$(BIN)/python -m pytest oracle_tests --profile deep --hypothesis-seed $(SEED) || (echo "make deep SEED=$(SEED)"; false)

faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m oracle_tests.programs.faults --faults 50 --seed 0

lowest:
	$(PYTHON) -m oracle_tests.programs.lowest_versions $(if $(INSTEAD),--instead $(INSTEAD))

spec: $(STAMP)
	$(BIN)/python docs/spec.py

PART   ?= all
SAMPLE ?= 150
SEED   ?= 0

mutants: $(STAMP)
	$(BIN)/python -m oracle_tests.programs.mutants --part $(PART) --sample $(SAMPLE) --seed $(SEED)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build mutants .pytest_cache .hypothesis .mypy_cache .ruff_cache
