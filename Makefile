# Every target sets up what it needs first; `make demo` and `make test` are all a new machine needs.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit test-kernel lint type format clean

BIN := .venv/bin
CHECKED := fabricpilot hostagent central simulator testbed tests

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install Debian packages (as root) and the pinned Python environment in .venv
	@packaging/setup-debian

demo: setup ## The main job on the real kernel (root): FIFO against fabricpilot; results in out/demo
	$(BIN)/fabricpilot testbed demo --out out/demo

test: test-unit test-kernel ## Unit tests and, as root, kernel tests

test-unit: setup ## Tests that need no root
	$(BIN)/pytest -m "not kernel and not slow and not scale" -n auto

test-kernel: setup ## Tests on the real kernel (root)
	$(BIN)/pytest -m "kernel and not slow and not scale"

lint: setup ## ruff, formatting, shellcheck
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	shellcheck -x tc_scripts/* packaging/setup-debian .ci/run

type: setup ## mypy, strict
	$(BIN)/mypy

format: setup ## Reformat the Python code
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

clean: ## Remove what was built and what runs produced
	rm -rf .venv out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
