# `make demo` runs the example of the README, `make test` runs lint and all tests.
PYTHON ?= python3

.PHONY: install lint test demo clean

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

test: lint
	.venv/bin/python -m pytest --numprocesses auto --dist loadfile \
	  --no-loadscope-reorder

demo: install
	.venv/bin/python launch/demo.py

clean:
	rm -rf .venv runs
