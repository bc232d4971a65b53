# `make install` creates .venv with locked versions; all other targets run it first, except
# `docs` and `clean`. `make demo` runs the example of the README. `make test` runs lint and
# the tests.
PYTHON ?= python3

.PHONY: install lint quick test test-extras demo docs clean

# One worker more than cores, because workers wait for the processes that tests start.
WORKERS = $$(.venv/bin/python -c 'import os; print(os.cpu_count() + 1)')

PYTEST = .venv/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile \
  --no-loadscope-reorder

PLAIN = not torch and not extras and not browser and not accelerator

install: .venv/installed

.venv/installed: requirements.lock setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2> /dev/null || \
	  { echo "Python has no venv module; run apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Fast tests, for use between two edits. They take about one minute on 2 cores, and
# `make test` takes about 8 minutes.
quick: install
	$(PYTEST) -m "not slow and not processes and $(PLAIN)"

test: lint
	$(PYTEST) -m "$(PLAIN)"

# Long tests, and tests that need PyTorch, libtpu, ONNX or Chromium. They run in a separate
# environment, because the tests of `make test` check that these packages are optional.
test-extras: .venv-extras/installed
	.venv-extras/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal \
	  -m "torch or extras or browser"

# Installs only the extras. A .pth file makes the packages of .venv available too.
.venv-extras/installed: requirements-extras.lock .venv/installed
	$(PYTHON) -m venv .venv-extras
	.venv-extras/bin/pip install --quiet --disable-pip-version-check --no-deps \
	  -r requirements-extras.lock
	for packages in .venv-extras/lib/python*/site-packages; do \
	  echo "import site; site.addsitedir('$$(realpath .venv/lib/python*/site-packages)')" \
	    > $$packages/venv.pth; done
	touch $@

demo: install
	.venv/bin/python launch/demo.py

# Build the site in build/docs.
docs: .venv-docs/installed
	.venv-docs/bin/mkdocs build --quiet --strict

.venv-docs/installed:
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check mkdocs-material \
	  'mkdocstrings[python]' ruff
	touch $@

clean:
	rm -rf .venv .venv-docs .venv-extras .pytest_cache build runs
