# make demo   installs into .venv, fine-tunes the embedded model on real handwritten numbers, prints what the base, the
#             tuned model and its mean over permutations know of test rows, and writes a page of them
# make test   installs into .venv, then make check, then every test that is not slow
# make check  lint, formatting, who imports whom, types, and the quick tests: for while you work
# make test-slow  kills by the dozen, ablations, launches of several processes
# Needs Python 3.11 or newer and make; about 6 GB of disk for torch.

PYTHON ?= python3
BIN := .venv/bin
NUMBERS := data/numbers
JOBS ?= 2
# A file's tests stay in one process, which trains the runs that they share once.
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)
# No launcher, which takes seconds to start: one process uses all cores as well.
PREDICT := $(BIN)/vqa-sft predict --data $(NUMBERS)/test.csv --batch_size 64 --use_cpu
PREDICTIONS := base=runs/demo_base/submission.parquet tuned=runs/demo/submission.parquet \
	permutations=runs/demo/permutations.parquet

.PHONY: demo test check test-slow lint clean

# Where other processes need the cores, threads that wait by spinning make training fifty times slower.
demo: export OMP_WAIT_POLICY := PASSIVE
demo: .venv/demo
	$(BIN)/python -m vqa_sft.tiny numbers $(NUMBERS)
	$(PREDICT) --run none --model vqa_sft/tiny/base --output runs/demo_base/submission.csv
	$(BIN)/vqa-sft train --config recipes/demo.yaml --overwrite
	$(PREDICT) --run runs/demo --output runs/demo/submission.csv
	$(PREDICT) --run runs/demo --orders rotations --output runs/demo/permutations.csv
	@echo
	@echo "The 500 test numbers: before, after, and the mean over four permutations of the choices"
	@$(BIN)/vqa-sft score $(PREDICTIONS) --answers $(NUMBERS)/test_answers.csv
	@$(BIN)/vqa-sft report $(PREDICTIONS) --answers $(NUMBERS)/test_answers.csv --data $(NUMBERS)/test.csv \
		--output runs/demo/report.html

test: check
	$(PYTEST) -m "medium and not slow and not gpu"

check: lint
	$(PYTEST) -m "not medium and not slow and not gpu"

test-slow: .venv/test
	$(PYTEST) -m "slow and not gpu"

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

.venv/demo: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		(echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" && exit 2)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv runs data build *.egg-info
