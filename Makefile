# Every target makes the virtual environment that it needs; `PYTHON=python3.12 make test` chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
# The README's line. Compiling all libraries would double the time; Python compiles what is used, when it is used ...
INSTALL := $(BIN)/pip install --no-compile -c constraints.txt
# ... unless it is told not to keep the result.
export PYTHONDONTWRITEBYTECODE :=
REQUIREMENTS := setup.py constraints.txt
# Two: each worker takes a gigabyte, and CI has two cores. `make test WORKERS=8` on a larger machine. With worksteal
# neighbouring tests stay together, which share fixtures.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test lint type bench docs dist soak floor dev
# `make bench SIZE=full` is what the documentation quotes; it takes many hours.
SIZE ?= small

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

demo: .venv/.installed  ## noisy labels on real text: table, plot, saved model
	$(BIN)/python -m hfnoise demo

test: .venv/.installed  ## default suite, then the slow tests
	$(BIN)/python -m pytest $(PARALLEL)
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and not gpu and not soak"

lint: .venv/.installed-dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Checked as installed: the checkout's trainers/ is hfnoise.trainers only for an import hook, which mypy does not run.
# What a build leaves in build/lib would end up in the next one; the rest of build/ is the editable install of `make dev`.
type: .venv/.installed-dev  ## mypy: strict for the core, lenient where it meets untyped libraries
	rm -rf build/lib build/bdist.* build/typed
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/typed .
	rm -rf build/lib build/bdist.*
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p hfnoise

bench: .venv/.installed  ## all benchmarks in a small size (SIZE=full: as published): docs/benchmarks.md
	$(BIN)/python -m hfnoise bench --size $(SIZE) --publish --output_dir docs

docs: .venv/.installed  ## the site of docs/ and README with the API reference, in build/site
	$(BIN)/mkdocs build --strict --quiet -f docs/site/mkdocs.yml

soak: .venv/.installed-dev  ## what CI has no time for: all combinations, kills, fuzzing, memory, browser
	$(BIN)/python -m pytest $(PARALLEL) -m soak

# The libraries at the oldest versions that setup.py allows, in an environment of its own; torch as constraints.txt has it.
floor:  ## default suite on the oldest versions that setup.py allows
	$(PYTHON) -m venv .venv-floor
	$(PYTHON) .ci/floors.py > .venv-floor/floors.txt
	.venv-floor/bin/pip install --quiet --no-compile -c constraints.txt -c .venv-floor/floors.txt -e '.[test]'
	.venv-floor/bin/python -m pytest $(PARALLEL)

# Built in an environment of its own, then installed into an empty one: what users of the wheel get.
dist: .venv/.installed-dev  ## sdist and wheel in dist/, their metadata checked, installed once
	rm -rf dist build/lib build/bdist.* build/clean
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/clean
	build/clean/bin/pip install --quiet --no-compile -c constraints.txt dist/*.whl
	cd build/clean && bin/hfnoise list

dev: .venv/.installed-dev  ## editable install that editors and type checkers see through (run again for new files)
	$(INSTALL) --no-deps --config-settings editable_mode=strict -e .

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/.installed: .venv/bin/python $(REQUIREMENTS)
	$(INSTALL) -e '.[test]'
	touch $@

.venv/.installed-dev: .venv/bin/python $(REQUIREMENTS)
	$(INSTALL) -e '.[dev]'
	touch $@ .venv/.installed
