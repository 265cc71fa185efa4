# make book     set up .venv, execute every notebook on PROFILE, build the book
# make test     set up .venv, run the whole test suite;   make test-all  the slow tests too
# make execute  execute the notebooks only;   make lab  open them live;   make clean  forget all builds
PYTHON  ?= python3.11
PROFILE ?= mini

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
NBVAL  := --nbval --nbval-current-env --nbval-sanitize-with tests/sanitize.cfg

# A half-written target (an interrupted install) must not look finished.
.DELETE_ON_ERROR:
.PHONY: book html execute test test-all lab clean

book: execute html

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	touch $@

execute: $(STAMP)
	$(PY) -m tools.execute --profile $(PROFILE)

html: $(STAMP)
	$(PY) -m tools.build_book

test: $(STAMP)
	$(PY) -m pytest $(NBVAL) -m "not slow" tests notebooks/*.ipynb

test-all: $(STAMP)
	$(PY) -m pytest $(NBVAL) tests notebooks/*.ipynb

lab: $(STAMP)
	$(PY) -m jupyter lab notebooks

clean:
	rm -rf _build $(VENV) .venv-book build .pytest_cache .ruff_cache .hypothesis *.egg-info
