PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test pytest torture lint docs clean

install: $(VENV)/.installed-dev

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/sfm quickstart

# Linters and documentation end while the first tests run: they leave half of two cores idle.
test: install
	$(MAKE) --jobs=3 lint docs pytest

# Tests start many processes: these share compiled modules and two cores.
pytest: export PYTHONDONTWRITEBYTECODE =
pytest: export OMP_NUM_THREADS = 1
pytest: export OMP_WAIT_POLICY = PASSIVE
pytest: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

torture: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m torture -s

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

docs: $(VENV)/.installed-dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/site

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
