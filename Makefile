# make demo   installs into .venv, fine-tunes the embedded model on real handwritten digits, prints base and tuned, and
#             writes a page of both
# make test   installs into .venv, then make check, then every test that is not slow
# make check  lint, formatting, who imports whom, types, and the quick tests: for while you work
# make test-slow  kills by the dozen, ablations, launches of several processes
# Needs Python 3.11 or newer and make; about 6 GB of disk for torch.

PYTHON ?= python3
BIN := .venv/bin
DIGITS := data/digits
JOBS ?= 2
# A file's tests stay in one process, which trains the runs that they share once.
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)
PREDICT := $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/predict.py --data $(DIGITS)/test.csv \
	--batch_size 64 --use_cpu
BEFORE_AND_AFTER := base=runs/demo_base/submission.parquet tuned=runs/demo/submission.parquet

.PHONY: demo test check test-slow lint clean

demo: .venv/demo
	$(BIN)/python -m vqa_sft.tiny digits $(DIGITS)
	$(PREDICT) --run none --model vqa_sft/tiny/base --output runs/demo_base/submission.csv
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sft.py --config recipes/demo.yaml --overwrite
	$(PREDICT) --run runs/demo --output runs/demo/submission.csv
	@echo
	@echo "The 497 test digits, before and after:"
	@$(BIN)/vqa-sft score $(BEFORE_AND_AFTER) --answers $(DIGITS)/test_answers.csv
	@$(BIN)/vqa-sft report $(BEFORE_AND_AFTER) --answers $(DIGITS)/test_answers.csv --data $(DIGITS)/test.csv \
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
