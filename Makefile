# `make run` and `make test` set everything up by themselves; nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help run test test-slow lint bench compare results results-quick card world clean

# torch comes first: with it installed, no other package asks for a build with GPU libraries.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

run: $(READY)
	$(BIN)/python train.py fit --config mose.yaml $(ARGS)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lit_edit callbacks datamodules train.py

bench: $(READY)
	$(BIN)/python benchmarks/edit_speed.py $(ARGS)

compare: $(READY)
	$(BIN)/python train.py compare $(ARGS)

# The table and figures of docs/RESULTS.md: every method,
# on a seed that no setting was chosen on.
RESULTS := --n_edits 200 --at 25 50 100 200 --seeds 1 --jobs 2 --downstream.n_items=50 --out runs/results

# The main methods in some twenty minutes on two cores: two seeds that no setting was chosen on.
results-quick: $(READY)
	$(BIN)/python train.py compare --n_edits 100 --at 25 50 100 --seeds 2 3 --jobs 2 --downstream.n_items=50 \
		--out runs/results-quick --figure docs/some-methods.png \
		--configs rome alphaedit eac-rome memit memit-plus mose mose-key mose-plus $(ARGS)

results: $(READY)
	$(BIN)/python train.py compare $(RESULTS) --figure docs/some-methods.png \
		--configs rome alphaedit memit eac-rome mose mose-key $(ARGS)
	$(BIN)/python train.py compare $(RESULTS) --figure docs/all-methods.png $(ARGS)

card: $(READY)
	$(BIN)/python -m lit_edit.world.recipe.card $(ARGS)

world: $(READY)
	$(BIN)/python -m lit_edit.world.recipe.train $(ARGS)

help:
	@echo 'make run            set up, and edit the embedded model 100 times'
	@echo 'make test           set up, and run the tests; make test-slow runs the slow ones'
	@echo 'make lint           ruff and mypy'
	@echo 'make bench          what an edit costs'
	@echo 'make results-quick  the table and figure of docs/RESULTS.md; make results has every method'
	@echo 'make card, world    the embedded model: its card, and making it anew'
	@echo 'make clean          remove .venv and runs'

clean:
	rm -rf $(VENV) runs
