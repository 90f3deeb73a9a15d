# Every target sets up what it needs: .venv with locked packages, bubblewrap, dist/ash.pyz. Nothing outside .venv, dist and
# the caches is touched, except that bubblewrap and python3-venv are installed when they are missing and you are root.

PYTHON ?=
VENV := .venv
PY := $(VENV)/bin/python
PYZ := dist/ash.pyz
SOURCES := $(shell find ash ash_ai bootstrap -name '*.py' -o -name '*.sql' -o -name '*.html' -o -name '*.css' -o -name '*.js') \
	build_pyz.py requirements.lock

.PHONY: demo test test-vm pyz lint fmt bench lock clean

demo: $(VENV)/ready pyz  ## build the file, deploy an example, watch an agent use a tool in its sandbox (no API key needed)
	@sh tools/setup.sh bubblewrap
	@PYTHON=$(PY) sh examples/demo.sh $(PYZ)

test: $(VENV)/ready lint pyz  ## everything CI runs
	@sh tools/setup.sh bubblewrap
	@sh tools/setup.sh curl
	$(PY) -m pytest

test-vm: $(VENV)/ready pyz  ## the same file as a service on a real machine: Debian in an emulator, built once (root; up to an hour)
	$(PY) -m tools.vm.run --file $(PYZ)

pyz: $(PYZ)  ## dist/ash.pyz

lint: $(VENV)/ready  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

fmt: $(VENV)/ready  ## format the code and sort the imports
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/ready pyz  ## measure this machine and write the table of docs/performance.md
	@sh tools/setup.sh bubblewrap
	$(PY) benchmarks/bench.py --pyz $(PYZ) --write docs/performance.md

lock: $(VENV)/ready  ## resolve the dependencies of pyproject.toml again, for every supported Python, with hashes
	@sh tools/lock.sh $(VENV)

clean:
	rm -rf dist .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

$(PYZ): $(SOURCES) | $(VENV)/ready
	$(PY) build_pyz.py --output $@

$(VENV)/ready: requirements-dev.lock tools/setup.sh
	@PYTHON=$(PYTHON) sh tools/setup.sh venv $(VENV)
	@touch $@
