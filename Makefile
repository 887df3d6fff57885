# `make run` and `make test` do all set-up on a machine that has Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SMOKE = COMPANION_PROFILE=smoke COMPANION_OUT=$(CURDIR)/runs/test

.PHONY: run test test-gpu lab lint setup publish clean

run: setup  ## execute every chapter in the cpu profile and print the results
	$(BIN)/companion run --profile cpu

test: setup lint  ## unit tests, every notebook in smoke, the committed notebooks through nbval
	$(BIN)/python -m pytest -m "not gpu"
	$(SMOKE) $(BIN)/python -m pytest -q --nbval-lax --nbval-current-env --nbval-cell-timeout=300 notebooks

test-gpu: setup  ## the same unit tests and notebooks on CUDA; says so where there is none
	@$(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())" \
	  && COMPANION_TEST_DEVICE=cuda $(BIN)/python -m pytest \
	  || (echo "make test-gpu: PyTorch sees no CUDA GPU here, nothing was run" && ! $(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())")

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check utils tests
	$(BIN)/companion weave --check
	$(BIN)/companion catalogue --check

lab: setup  ## open the notebooks
	$(BIN)/jupyter lab notebooks

publish: setup  ## remake the committed notebooks, results and README tables (an idle machine, please)
	$(BIN)/companion run --profile cpu --out notebooks
	$(BIN)/companion report --out notebooks --readme

setup: $(INSTALLED)

$(INSTALLED): constraints.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info[:2] < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs
