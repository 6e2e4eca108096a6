# make demo   install, then run the loop on the embedded world (13 minutes of processor time: on 2 cores, under 8)
# make test   install with the development tools, then run the tests
# make check  what CI runs: lint, format, types, tests
# make torture  kills at random moments and 100,000 mutated files (an hour)
# make lab    the experiments behind the claims (hours)
# make docs   the site of the documentation, into site/
# make pictures  the pictures of the README and of docs/, from runs/demo

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A process of one thread per core, at most four; threads that wait for one another would take the cores from the rest.
TESTS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test check torture lab docs pictures clean

demo: $(VENV)/.installed
	$(BIN)/srum run --config configs/demo.yaml --out runs/demo

test: $(VENV)/.installed-dev
	$(TESTS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TESTS)

torture: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -s -m slow tests/robustness

lab: $(VENV)/.installed
	$(BIN)/python benchmarks/lab.py

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

pictures: $(VENV)/.installed
	$(BIN)/python docs/make_pictures.py runs/demo

clean:
	rm -rf $(VENV)

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("srum needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps -e .
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install -e '.[docs]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
