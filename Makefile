# `make run` and `make test` do all set-up on a machine that has Python 3.11 or 3.12, and make.
SUPPORTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
VERSION := import sys; print(sys.version_info[:2])
PYTHON ?= $(shell for name in python3.11 python3.12 python3; do $$name -c "$(SUPPORTED)" 2>/dev/null && echo $$name && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: run test test-gpu test-models fuzz lab style lint fix setup publish verdicts full clean

run: setup  ## execute every chapter in the cpu profile and print the results
	$(BIN)/companion run --profile cpu

test: style  ## units, the lessons and their notebooks in step, every notebook in smoke, every core track once more through nbval
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not gpu"  # most of a test is Python on one core

test-gpu: setup  ## the same unit tests and notebooks on CUDA; says so where there is none
	@$(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())" \
	  && COMPANION_TEST_DEVICE=cuda $(BIN)/python -m pytest \
	  || (echo "make test-gpu: PyTorch sees no CUDA GPU here, nothing was run" && ! $(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())")

test-models: setup  ## eight BERTs of odd sizes through every chapter, in smoke
	$(BIN)/python tests/spine/test_any_bert.py

fuzz: setup  ## 10,000 damaged and crafted artifacts: each is refused in one line, or is the model that it says
	$(BIN)/python tests/spine/test_artifact_fuzz.py 10000

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check utils tests

lint: style  ## with what is a test, too: notebooks in step, methods complete, lessons readable
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

verdicts: setup  ## the claims over seeds alone, in full: their verdicts of record, half an hour to an hour and a half a chapter
	$(BIN)/companion run --profile full --track claims --out notebooks --resume
	$(BIN)/companion report --out notebooks --readme

full: setup  ## all rows and verdicts of record: some hours a chapter, survives a closed terminal, goes on where it was stopped
	$(BIN)/companion run --profile full --out runs/full --resume

setup:  ## an environment of a Python that will not do, that is gone, or that is not the one named, is made anew
	@if [ -f $(VENV)/pyvenv.cfg ] && ! $(BIN)/python -c "$(SUPPORTED)" 2>/dev/null; \
	  then echo "$(VENV) is not of Python 3.11 or 3.12: it is made anew"; rm -rf $(VENV); fi
ifeq ($(origin PYTHON),command line)
	@if [ -f $(VENV)/pyvenv.cfg ] && $(PYTHON) -c "$(SUPPORTED)" && [ "$$($(BIN)/python -c '$(VERSION)')" != "$$($(PYTHON) -c '$(VERSION)')" ]; \
	  then echo "$(VENV) is not of $(PYTHON): it is made anew"; rm -rf $(VENV); fi
endif
	@$(MAKE) --silent --no-print-directory $(INSTALLED)

# The kernel finds our package first, whatever else is called `utils` beside a notebook.
$(INSTALLED): constraints.txt pyproject.toml
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c "$(SUPPORTED)" \
	  || { echo "Python 3.11 or 3.12 is needed: install it, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/python -m ipykernel install --sys-prefix --env PYTHONPATH "$$(pwd)" >/dev/null
	touch $@

clean:
	rm -rf $(VENV) runs
