# The two commands a newcomer needs: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := pyproject.toml CMakeLists.txt $(wildcard native/* native/*/*)
INSTALL = @$(BIN)/python -m scripts.setup_venv

.PHONY: demo test check bench clean

demo: $(VENV)/.installed
	$(BIN)/headrace generate "What is the largest ocean?"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadscope

check: $(VENV)/.installed-check
	scripts/check

bench: $(VENV)/.installed
	$(BIN)/headrace bench

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Headrace needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make demo PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "Python's venv module is missing. On Debian and Ubuntu: apt install python3-venv"; exit 2; }

$(VENV)/.installed: $(BUILD) | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-test: $(BUILD) | $(BIN)/python
	$(INSTALL) '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-check: $(BUILD) | $(BIN)/python
	$(INSTALL) '.[test,check]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
