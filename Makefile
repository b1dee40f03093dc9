# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. PYTHON= picks an interpreter, VENV= another folder, ARGS= goes to the program.

PYTHON ?= python3
VENV ?= .venv
DIST ?= dist
ARGS ?=

MAKEFLAGS += --no-print-directory
STARTED := $(shell date +%s)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# One stamp per Python and extra: a VENV of another version is noticed and never used by accident.
MADE = $(VENV)/.made-$(VERSION)-
BIN = $(VENV)/bin

.PHONY: help demo shell test plain load strict check bench bundle clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 14

demo: $(MADE)run ## an embedded cluster, and the examples run on it (no sshd, no root, no ~/.ssh)
	@$(BIN)/python examples/demo.py --setup-seconds $$(($$(date +%s) - $(STARTED))) $(ARGS)

shell: $(MADE)run ## the same cluster, kept, with a Python prompt
	@$(BIN)/python examples/demo.py --shell --setup-seconds $$(($$(date +%s) - $(STARTED))) $(ARGS)

# worksteal: a file's tests stay together (their sshd starts once) until the other worker has nothing left.
test: $(MADE)test ## the whole suite; a quick run: ARGS="-m 'not slow and not nightly'"
	@sh tools/setup-test.sh
	@echo "ctask: running the tests"
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

plain: ## the quick run as a plain account, in a copy, by Debian's /usr/bin/python3 (as root)
	@sh tools/setup-test.sh
	@sh tools/plain.sh $(ARGS)

load: $(MADE)test ## what depends on threads having their turn, ten times beside two busy loops (90 s at most)
	@sh tools/setup-test.sh
	@sh tools/load.sh $(BIN)/python $(ARGS)

# Asserts carry no behaviour, nothing is left to the collector. Only the helpers' own asserts are not made here.
strict: $(MADE)test ## the suite once more under python -O, -X dev and -W error (row I06; nightly)
	@sh tools/setup-test.sh
	@PYTHONASYNCIODEBUG=1 $(BIN)/python -O -X dev -W error -m pytest \
		-W "ignore:assertions not in test" -n 2 --dist worksteal $(ARGS)

check: $(MADE)check ## ruff and mypy --strict
	@echo "ctask: ruff" && $(BIN)/ruff check .
	@echo "ctask: mypy" && $(BIN)/mypy

bench: $(MADE)bench ## the benchmarks beside the other programs; one of them: ARGS=fanout
	@sh tools/setup-test.sh
	@$(BIN)/python -m benchmarks $(or $(ARGS),all)

bundle: ## one tar of wheels with an install.sh, for machines without a network
	@sh tools/bundle.sh "$(PYTHON)" "$(DIST)"

clean: ## remove the virtual environment, builds and caches
	@echo "ctask: removing $(VENV), $(DIST) and the caches"
	@[ ! -e "$(VENV)/pyvenv.cfg" ] || rm -rf -- "$(VENV)"
	@rm -rf -- build "$(DIST)" .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name '.?*' -prune -o -type d -name __pycache__ -prune -exec rm -rf -- {} +

$(MADE)%: pyproject.toml tools/venv.sh
	@sh tools/venv.sh "$(PYTHON)" "$(VENV)" $*
	@touch $@
