# Every target makes its own environment: a machine with python3 and make is enough.
# `make test PYTHON=python3.12` uses another interpreter, in an environment of its own.
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
RUN := $(VENV)/bin/python
export MPLBACKEND ?= Agg

.PHONY: demo test test-slow coverage lint format bench clean

demo: $(VENV)/.installed
	$(RUN) -m experiments.digits --out runs/digits

test: $(VENV)/.installed
	$(RUN) -m pytest -n 2

test-slow: $(VENV)/.installed
	$(RUN) -m pytest -m slow -rP

coverage: $(VENV)/.installed
	$(RUN) -m pytest -n 2 --cov --cov-report term-missing:skip-covered --cov-fail-under 95

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed
	$(RUN) -m benchmarks.bench_overhead
	$(RUN) -m benchmarks.bench_losses
	$(RUN) -m benchmarks.bench_likelihood

clean:
	rm -rf .venv .venv-* runs .pytest_cache .ruff_cache

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[experiments,dev]'
	touch $@
