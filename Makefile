# `make run` and `make test` do all set-up on a machine that has Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: run test test-gpu lab lint fix setup publish full clean

run: setup  ## execute every chapter in the cpu profile and print the results
	$(BIN)/companion run --profile cpu

test: setup lint  ## units, every notebook in smoke, every core track once more through nbval
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not gpu"  # most of a test is Python on one core

test-gpu: setup  ## the same unit tests and notebooks on CUDA; says so where there is none
	@$(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())" \
	  && COMPANION_TEST_DEVICE=cuda $(BIN)/python -m pytest \
	  || (echo "make test-gpu: PyTorch sees no CUDA GPU here, nothing was run" && ! $(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())")

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check utils tests
	$(BIN)/companion weave --check
	$(BIN)/companion catalogue --check
	$(BIN)/companion lint

fix: setup  ## what a machine can mend; a notebook that is out of step loses its outputs, one that awaits its rerun keeps them
	$(BIN)/ruff check --fix utils tests
	$(BIN)/ruff format utils tests
	$(BIN)/companion weave

lab: setup  ## open the notebooks
	$(BIN)/jupyter lab notebooks

publish: setup  ## remake the committed notebooks, results and README tables (an idle machine, please); goes on where it was stopped
	$(BIN)/companion run --profile cpu --out notebooks --resume
	$(BIN)/companion report --out notebooks --readme

full: setup  ## the results of record: an hour or more a chapter, survives a closed terminal, goes on where it was stopped
	$(BIN)/companion run --profile full --out runs/full --resume

setup: $(INSTALLED)

$(INSTALLED): constraints.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and 'Python 3.11 or 3.12 is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) runs
