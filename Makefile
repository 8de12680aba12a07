# Two commands do everything on a fresh machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test check bench break-once clean

demo: $(VENV)/.installed
	$(BIN)/luthier demo --out demo

test: $(VENV)/.tests check
	# One process a core and one thread a process: two OpenMP threads on a busy core are slower than one.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

check: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.tests
	for file in tests/benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

# Breaks the code for each test and keeps what the test said; stop and start it as you like.
break-once: $(VENV)/.tests
	OMP_NUM_THREADS=1 $(BIN)/python tests/break_once/break_once.py

# torch first and by its exact version: where a CPU build is offered this takes it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.tests: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[tests]"
	touch $@

clean:
	rm -rf $(VENV) demo dist artifacts
