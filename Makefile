PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: most of those installed never are.
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --editable

.PHONY: install quickstart test pytest torture lint docs clean

install: $(VENV)/.installed-dev

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/sfm quickstart

# Linters and documentation end while the first tests run: they leave half of two cores idle.
test: install
	$(MAKE) --jobs=3 lint docs pytest

# Tests start many processes, which share compiled modules. Many tests wait, so four workers fill two cores.
pytest: export PYTHONDONTWRITEBYTECODE =
pytest: export OMP_NUM_THREADS = 1
pytest: export OMP_WAIT_POLICY = PASSIVE
pytest: install
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --durations=10

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
	$(PIP_INSTALL) ".[quickstart]"
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) ".[quickstart,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info sfm-quickstart
