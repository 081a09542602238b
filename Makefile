# All without a GPU and without reaching a model hub.
# Settings: PYTHON=python3.12  TORCH="torch==2.13.0"  PROFILE=tiny  RUN=runs/tiny  TESTERS=2  REPO=owner/name (default: git's origin)

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(if $(shell command -v $(p)),$(p))))
TORCH ?= torch==2.13.0
PROFILE ?= tiny
RUN ?= runs/$(PROFILE)
TESTERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
REQUIREMENTS := requirements.txt requirements/pins.txt
NO_DEPS := requirements/trl.txt requirements/gptq.txt requirements/gguf.txt

.PHONY: setup environment run test lint format badges clean docs lab help colab-check test-colab-versions test-deepspeed
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-20s %s\n", $$1, $$2}' Makefile
	@sed -n '1,2s/^# //p' Makefile

setup: $(VENV)/ready  ## build .venv where something is missing: a few minutes, once

# An environment that has already what the files list stays as it is
$(VENV)/ready: $(REQUIREMENTS) $(NO_DEPS)
	@$(BIN)/python -m helpers.setup $^ 2>/dev/null || $(MAKE) --no-print-directory environment
	@touch $@

environment:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"This needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is {v[0]}.{v[1]}: make setup PYTHON=/path/to/python3.11")'
	@$(PYTHON) -c 'import shutil, sys; free = shutil.disk_usage(".").free / 2**30; sys.exit(0 if free >= 5 else f"The environment needs 5 GiB of disk and {free:.1f} GiB is free here: free some, or clone elsewhere")'
	@echo "== building $(VENV) with $(PYTHON): a few minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip setuptools wheel
	@echo "   $(TORCH)"
	@$(PIP) install "$(TORCH)"
	@echo "   $(REQUIREMENTS)"
	@$(PIP) install $(REQUIREMENTS:%=-r %)
	@echo "   $(NO_DEPS) (GPTQModel compiles two small extensions)"
	@$(PIP) install --no-deps $(NO_DEPS:%=-r %)

# What tests hold ours to: Mistral's own tokenizers; and a Triton that only the kernels' test sees
$(VENV)/reference: tests/models/reference.txt tests/finetune/triton.txt $(VENV)/ready
	@$(PIP) install --no-deps -r tests/models/reference.txt
	@$(PIP) install --no-deps --upgrade --target $(VENV)/triton -r tests/finetune/triton.txt
	@touch $@

run: setup  ## the notebooks in order on the tiny Mistral; everything lands in runs/tiny
	@$(BIN)/python notebooks/run_all.py --profile $(PROFILE) --workspace $(RUN)

docs: setup  ## pages of the executed notebooks, in runs/tiny/html: outputs to look at without a kernel or a network
	@test -d $(RUN)/notebooks || $(MAKE) --no-print-directory run
	@$(BIN)/python notebooks/pages.py --workspace $(RUN)

lab: setup  ## JupyterLab on notebook 1, in your browser
	@$(BIN)/jupyter lab notebooks/01_environment_setup.ipynb

test: setup $(VENV)/reference  ## lint, and all tests
	@echo "== lint"
	@$(MAKE) --no-print-directory lint
	@echo "== tests (the eight notebooks among them)"
	@$(BIN)/python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder

lint: setup  ## style, and whether badges are current
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python notebooks/badges.py --check

format: setup  ## mend what lint finds, as far as that can be done by itself
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/python notebooks/badges.py

badges: setup  ## write the notebooks' Colab badges: REPO=owner/name
	@$(BIN)/python notebooks/badges.py --repo $(or $(REPO),origin)

# Would pip leave Colab's image as it is? PACKAGES=LIST for another image than tests/notebooks/colab_packages.txt
colab-check: setup  ## would pip leave Colab's image as it is? PACKAGES=LIST for another image
	@$(BIN)/python tests/notebooks/colab_check.py $(if $(PACKAGES),--packages $(PACKAGES))

# The notebooks' tests, and those of what rests on transformers' inner parts, with the versions of Colab's image
test-colab-versions: setup  ## the tests that those versions can break, with Colab's image's, in .venv-colab
	@$(BIN)/python tests/notebooks/colab_versions.py --torch "$(TORCH)"

# Beside the environment and not in it, for DeepSpeed is no dependency; one of its operators is compiled, once
test-deepspeed: setup  ## the tests of DeepSpeed's ZeRO, with DeepSpeed in .venv/deepspeed
	@DS_BUILD_OPS=0 $(PIP) install --no-deps --no-build-isolation --upgrade --target $(VENV)/deepspeed deepspeed==0.19.8 hjson py-cpuinfo msgpack einops ninja
	@PYTHONPATH=$(abspath $(VENV)/deepspeed) $(BIN)/python -m pytest tests/finetune/test_zero.py

clean:  ## delete .venv, .venv-colab and caches; what you made, in runs/, stays
	rm -rf $(VENV) .venv-colab .pytest_cache .ruff_cache .hypothesis
