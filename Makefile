# make book     set up .venv, execute every notebook on PROFILE, build the book
# make test     set up .venv, run the whole test suite;   make test-all  the slow tests too
# make test-book   read the book in a real browser;   make pdf  print it to _build/book.pdf
# make execute  execute the notebooks only;   make lab  open them live;   make clean  forget all builds
PYTHON  ?= python3.11
PROFILE ?= mini

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
TWO    := -n 2 --dist loadfile --no-loadscope-reorder
NBVAL  := --nbval --nbval-current-env --nbval-sanitize-with tests/sanitize.cfg

# A half-written target (an interrupted install) must not look finished.
.DELETE_ON_ERROR:
.PHONY: book html execute test test-all browser test-book pdf lab clean

book: execute html

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	touch $@

execute: $(STAMP)
	$(PY) -m tools.execute --profile $(PROFILE)

html: $(STAMP)
	$(PY) -m tools.build_book

# Two processes of one thread each; a file stays in one of them. The notebooks, the longest, go first.
test test-all: export OMP_NUM_THREADS := 1
test: $(STAMP)
	$(PY) -m pytest $(NBVAL) $(TWO) -m "not slow" notebooks/*.ipynb tests

test-all: $(STAMP)
	$(PY) -m pytest $(NBVAL) $(TWO) notebooks/*.ipynb tests

browser: $(STAMP)
	$(PY) -m tools.browser

test-book: html browser
	$(PY) -m pytest -m "not slow" tests/browser

pdf: browser
	$(PY) -m tools.pdf

lab: $(STAMP)
	$(PY) -m jupyter lab notebooks

clean:
	rm -rf _build $(VENV) .venv-book build book/api .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
