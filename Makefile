# Each target does its own set-up. Without make: python3 .ci/do.py lab
PYTHON ?= python3
ARGS ?=

.PHONY: lab test check bench setup readme export
lab test check bench setup readme export:
	@$(PYTHON) .ci/do.py $@ $(ARGS)
