# Every target makes .venv and installs what it needs, from nothing.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

# The data sets of the benchmarks, and their options: make bench DATA=FOLDER BENCH="A1 C"
DATA ?= ../shared/data
BENCH ?=

.PHONY: install demo test lint bench bench-growth bench-defaults bench-choices bench-quality docs clean

install: .venv/.installed

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[compare]'
	touch $@

.venv/.installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[test,lint]'
	touch $@ .venv/.installed

demo: install
	$(BIN)/softprompt demo

# Two processes of one thread each take half as long as one of two threads: small models gain nothing from a second one.
test: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed-dev
	$(BIN)/python benchmarks/speed.py --data $(DATA) $(BENCH)

bench-growth: .venv/.installed-dev
	$(BIN)/python benchmarks/growth.py $(BENCH)

bench-defaults: .venv/.installed-dev
	$(BIN)/python benchmarks/defaults.py --data $(DATA) $(BENCH)

bench-choices: .venv/.installed-dev
	$(BIN)/python benchmarks/choices.py --data $(DATA) $(BENCH)

bench-quality: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quality_steps.py --data $(DATA)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quality.py --data $(DATA) $(BENCH)
	$(BIN)/python benchmarks/results_page.py

docs: .venv/.installed-dev
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv build dist
