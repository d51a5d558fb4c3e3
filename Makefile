# `make demo` and `make test` need nothing but a Debian machine with Python 3.11 or newer: each
# makes its own virtual environment in .venv and installs what it needs there.

PYTHON ?= python3
VENV := .venv
# One worker per processor; PYTEST_ARGS='-n 0 -k ring' for a look at a few tests.
PYTEST_ARGS ?= -n auto
BIN := $(VENV)/bin
# What `make quick` runs of the tests: these, but for those that are marked slow.
QUICK := tests/unit $(wildcard tests/test_*.py)

# What the tests with real guest kernels are to run with, for example KERNEL=/boot/vmlinuz-6.12.9
# MODULES=/lib/modules/6.12.9, or SUITE=sid for the kernels of another suite of Debian; those of
# this machine's own suite otherwise. GUEST_ARGS goes to pytest.
KERNEL ?=
SUITE ?=
MODULES ?=
# Emulated machines that share the tests out, if they are all to run: two, where there are two
# processors and the memory for it.
MACHINES ?= $(if $(GUEST_ARGS),1,$(shell $(PYTHON) -c 'import os; print(max(1, min(2, os.cpu_count(), \
  os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (8 << 30))))'))
RIG = $(BIN)/python -m tests.guest.rig \
  $(if $(KERNEL),--kernel $(KERNEL)) $(if $(MODULES),--modules $(MODULES)) $(if $(SUITE),--suite $(SUITE))
# An emulated machine may interrupt a guest twice (docs/explanation/nested-rig.md): what fails with
# that, and nothing else, is tried again, and the summary says so.
RERUNS ?= --reruns 2 --only-rerun 'triple fault' --only-rerun 'RIP: 0010:asm_\w+\+0x0/' -r R
GUEST_PYTEST = -m pytest tests/guest -p no:xdist -p no:hypothesispytest -p no:cacheprovider \
  -v --durations=10 $(RERUNS) $(GUEST_ARGS)

.PHONY: help demo test quick quick-tests lint types unit tools guest-test guest-test-full guest-bench bench docs clean

help:
	@echo "make demo    a guest comes up on our bus, finds its disks and uses them"
	@echo "make quick   lint, types and the quick tests: half a minute, for between two edits"
	@echo "make test    lint, types, and every test with branch coverage"
	@echo "make guest-test       tests with an unmodified Linux as guest; needs root"
	@echo "make guest-test-full  the same, with their long campaigns"
	@echo "make guest-bench      the guest's disk and network compared with QEMU's virtio devices"
	@echo "make bench   benchmarks, as a table and as bench-results.json"
	@echo "make docs    regenerate the generated pages in docs/"
	@echo "make clean   remove the virtual environment and caches"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11; try: make PYTHON=python3.12" >&2; exit 1; }
	@# Debian ships venv in a package of its own.
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -qy python3-venv; } || \
	  { echo "python3-venv is missing; run: sudo apt install python3-venv" >&2; exit 1; }
	@echo "Making an environment for Python in $(VENV); this is done once, and takes a minute or two."
	$(PYTHON) -m venv $(VENV)
	@# Installing is most of the wait: pip says what it is at.
	$(BIN)/python -m pip install --upgrade 'pip>=25.1'

$(VENV)/.run: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --editable '.[cli]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "Installing what the checks need."
	$(BIN)/python -m pip install --group dev
	@touch $@

demo: $(VENV)/.run
	$(BIN)/vmbus demo

test: lint types unit guest-test

# mypy looks at what has changed only, as long as its cache is there.
quick: $(VENV)/.dev tools
	@$(MAKE) --no-print-directory --jobs=3 --output-sync lint types quick-tests

quick-tests: $(VENV)/.dev
	$(BIN)/pytest -q -m 'not slow' $(PYTEST_ARGS) $(QUICK)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev
	$(BIN)/mypy

tools:
	@.ci/tools

unit: $(VENV)/.dev tools
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest $(PYTEST_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=95
	$(BIN)/coverage report --fail-under=100 \
	  --include='vmbus/wire/*,vmbus/ring.py,vmbus/gpadl.py,vmbus/engine/*'

guest-test: $(VENV)/.dev
	$(RIG) --machines $(MACHINES) -- $(GUEST_PYTEST)

guest-test-full: $(VENV)/.dev
	VMBUS_LONG=1 $(RIG) --machines $(MACHINES) -- $(GUEST_PYTEST)

guest-bench: $(VENV)/.dev
	$(RIG) --cpus 2 -- -m tests.guest.versus $(BENCH_ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m tests.bench --json bench-results.json $(BENCH_ARGS)

docs: $(VENV)/.dev
	for script in docs/make_*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
