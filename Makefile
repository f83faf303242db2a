# `make demo` and `make test` are all that a reader needs; `make` alone lists the rest.

PYTHON = python3
FILE =
EXTRAS =
VENV = .venv
REQUIREMENTS = requirements.txt examples/requirements.txt

override FILE := $(FILE:.py=)
TESTS = $(FILE:%=tests/test_%.py)
# Tests run on all cores, in up to 8 processes; on a GPU in one, since each would take its memory.
PYTEST = $(VENV)/bin/python -m pytest $(if $(TEST_GPU),,-n auto --maxprocesses 8 --dist worksteal)
BENCHES = $(or $(FILE:%=bench/bench_%.py),$(sort $(wildcard bench/bench_*.py)))

.DEFAULT_GOAL := help
.PHONY: help .venv demo test test-long test-network lint bench clean

# Prints the interpreter that .venv is made from, or one sentence. Any Python can run it, even Python 2.
# realpath: with .venv activated, python3 is a link inside the very folder that may have to be rebuilt.
define INTERPRETER
import os, sys
name = "%s (Python %d.%d)" % ((sys.executable,) + tuple(sys.version_info[:2]))
if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or newer is needed and this is %s: choose one with make PYTHON=python3.13 ..." % name)
try:
    import ensurepip, venv
except ImportError:
    sys.exit("%s has no venv module: install it (Debian and Ubuntu: apt install python3-venv)." % name)
print(os.path.realpath(sys.executable))
print(sys.version)
endef
export INTERPRETER

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "FILE=vit           one file instead of all (demo, test, test-long, test-network, bench)"
	@echo "PYTHON=python3.13  another interpreter than python3"
	@echo "EXTRAS=cuda13      an extra of jax, here for NVIDIA GPUs"

# .venv is made anew when the interpreter, EXTRAS or the requirements differ from what its stamp records.
# The stamp is written last, so an installation that was interrupted counts as none.
.venv: ## install the requirements into .venv, if that is not done yet
	@$(PYTHON) -c '' 2>/dev/null || { \
	    echo "$(PYTHON) does not run: install Python 3.11 or newer, or choose one with make PYTHON=python3.13 ..." >&2; \
	    exit 1; }
	@interpreter=$$($(PYTHON) -c "$$INTERPRETER") && requirements=$$(cat $(REQUIREMENTS)) || exit 1; \
	python=$$(printf '%s\n' "$$interpreter" | sed -n 1p); \
	stamp=$$(printf '%s\n' "$$interpreter" "extras: $(EXTRAS)" "$$requirements"); \
	if [ "$$stamp" != "$$(cat $(VENV)/stamp 2>/dev/null)" ]; then \
	    echo "installing into $(VENV) with $$python (some minutes the first time)" && \
	    rm -rf $(VENV) && "$$python" -m venv $(VENV) && \
	    $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	        $(REQUIREMENTS:%=-r %) $(if $(EXTRAS),"jax[$(EXTRAS)]") && \
	    printf '%s\n' "$$stamp" > $(VENV)/stamp; \
	fi

demo: .venv ## run the demos, then print what they got beside what was expected
	@$(VENV)/bin/python tests/run_demos.py $(FILE)

test: .venv ## run the tests
	$(PYTEST) $(TESTS)

test-long: .venv ## run the tests marked long
	$(PYTEST) -m long $(TESTS)

test-network: .venv ## run the tests that install a peer or a real model
	$(PYTEST) -m network $(TESTS)

lint: .venv ## check format and style
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m ruff check .

bench: ## install the peers into .venv-bench and time the files beside them
	@$(MAKE) --no-print-directory .venv VENV=$(VENV)-bench REQUIREMENTS="requirements.txt bench/requirements.txt"
	@set -e; for script in $(BENCHES); do $(VENV)-bench/bin/python $$script; done

clean: ## remove what make made, but no figure and no training state
	rm -rf .venv .venv-* .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
