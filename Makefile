PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test torture lint clean

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/sfm quickstart

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=10

torture: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m torture -s

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

$(VENV)/.installed-quickstart: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[quickstart]"
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[quickstart,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info sfm-quickstart
