# Athena from a fresh clone. Every target makes the virtual environment that it needs.
#   make quickstart                 PYTHON=python3.12 make test
#   make test VENV=/path/to/a/venv  (an environment that is there already is completed)
# Packages get the versions of constraints.txt, which are those that were tested.

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
RUN_NAME ?= quickstart
SECONDS_EACH ?= 500
# Keys of pretrain.py on top of a recipe: make quickstart OVERRIDES="max_seconds=60 compile=false"
OVERRIDES ?=

PY := $(VENV)/bin/python
INSTALL := python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
PIP := $(VENV)/bin/$(INSTALL) -c constraints.txt
# A stamp is named after what requirements and constraints say, so a changed file installs again,
# and a fresh checkout of the same files does not.
key = $(shell cat $(1) | cksum | cut -d' ' -f1)
BASE := $(VENV)/.athena-$(call key,requirements-common.txt requirements.txt requirements-demo.txt \
	constraints.txt)
DEV := $(VENV)/.athena-dev-$(call key,requirements-*.txt requirements.txt constraints.txt)
NEWEST := $(VENV)-newest
# PyTorch/XLA needs another torch, and 6 GB: one environment for all checkouts, kept between runs.
XLA := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/athena/xla-$(call key,\
	requirements-xla.txt requirements-xla-deps.txt requirements-common.txt constraints-xla.txt)
# Triton, which comes with a torch for CUDA: beside the environment, so that nothing else finds it.
TRITON_VERSION := 3.9.0
TRITON := $(VENV)/triton-$(TRITON_VERSION)

DEMO := data/demo
CORPUS := data/quickstart
RUNS := checkpoints/athena

.DEFAULT_GOAL := help
.PHONY: help venv quickstart compare sudoku smoke test test-all test-nightly test-newest test-xla xla-venv test-triton triton notebook lint types clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' \
		| awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

venv: $(DEV)  ## create the environment that the other targets use

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"error: Athena needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(BASE): | $(PY)
	@echo "installing PyTorch and what else is needed into $(VENV), about a minute"
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -r requirements-demo.txt
	@touch $@

# adam-atan2 without its CUDA kernel, for tests of what is around it; beside the environment, so that
# nothing else finds it, and not from pip's cache, where an installation for a GPU would find it.
$(DEV): $(BASE)
	$(PIP) -r requirements-dev.txt
	rm -rf $(VENV)/adam-atan2
	$(PIP) --no-deps --no-cache-dir --target $(VENV)/adam-atan2 \
		$$(sed -n 's/^adam-atan2==/&/p' requirements-cuda.txt)
	@touch $@

# --- a small text model ----------------------------------------------------------------------

$(DEMO)/.complete: | $(BASE)
	$(PY) scripts/demo_corpus.py --output-dir $(DEMO)
	@touch $@

$(DEMO)/tokenizer.json: $(DEMO)/.complete
	$(PY) -m dataset.train_tokenizer --input-files $(DEMO)/train --documents file \
		--vocab-size 2048 --output $@

# The report is written last and with the corpus as a whole: where it is, the corpus is finished.
$(CORPUS)/build_report.json: $(DEMO)/tokenizer.json
	$(PY) -m dataset.build_corpus_dataset --tokenizer-json $(DEMO)/tokenizer.json \
		--input-files $(DEMO)/train --test-files '$(DEMO)/test/*.txt' --documents file \
		--domain-labels plays --identifiers none --seq-len 256 \
		--min-iterations 2 --max-iterations 2 --output-dir $(CORPUS) --overwrite

# resume=auto, the default: a run that was interrupted is resumed, a finished one is only shown
# again, and nothing is lost. To start afresh: another RUN_NAME, or remove the run's folder.
quickstart: $(BASE) $(CORPUS)/build_report.json  ## train a small model on plays, sample from it, plot it
	$(PY) pretrain.py experiment=quickstart run_name=$(RUN_NAME) $(OVERRIDES)
	$(PY) scripts/generate.py checkpoint=$(RUNS)/$(RUN_NAME) prompt="HAMLET." \
		max_new_tokens=200 temperature=0.8 top_k=50
	$(PY) scripts/plot_run.py $(RUNS)/$(RUN_NAME)
	@echo "data: $(DEMO) (texts, tokenizer), $(CORPUS) (corpus)"
	@echo "run:  $(RUNS)/$(RUN_NAME) (checkpoints, metrics.jsonl, curves.png)"

compare: $(BASE) $(CORPUS)/build_report.json  ## recursion against a plain decoder of as many parameters and seconds
	$(PY) scripts/compare.py seconds=$(SECONDS_EACH) $(OVERRIDES)

# --- a puzzle --------------------------------------------------------------------------------

data/sudoku6/identifiers.json: | $(BASE)
	$(PY) -m dataset.build_sudoku_dataset --size 6 --num-train 20000 --num-test 1000 \
		--blanks 20 --output-dir data/sudoku6

sudoku: $(BASE) data/sudoku6/identifiers.json  ## train on 6 x 6 sudokus
	$(PY) pretrain.py experiment=sudoku6 run_name=sudoku6 $(OVERRIDES)
	$(PY) scripts/plot_run.py $(RUNS)/sudoku6

# --- the project itself ----------------------------------------------------------------------

smoke: $(BASE)  ## build, train and evaluate a tiny model, in seconds
	$(PY) scripts/smoke_test.py --run-training

test: $(DEV)  ## run the tests that need no more than some minutes
	$(PY) -m pytest -n 2 -m "not slow and not nightly"

# One at a time: slow tests start several processes themselves, and some look at the clock.
test-all: test  ## run all tests but the nightly ones
	$(PY) -m pytest -m "slow and not nightly"

# Another seed every time; a failure prints the line that repeats it.
test-nightly: $(DEV)  ## run everything, with a new seed
	ATHENA_TEST_SEED=$${ATHENA_TEST_SEED:-$$(date +%s)} $(PY) -m pytest
	$(MAKE) test-newest

# What somebody gets who installs today without constraints.txt; the requirements pin torch alone.
# Exports are for whatever transformers their users have: the lowest lies in a folder of its own.
test-newest:  ## run the quick tests with the newest packages, exports with the lowest transformers too
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/$(INSTALL) --upgrade --upgrade-strategy eager -r requirements-dev.txt
	$(NEWEST)/bin/$(INSTALL) --no-deps -r requirements-demo.txt
	rm -rf $(NEWEST)/lowest
	$(NEWEST)/bin/$(INSTALL) --target $(NEWEST)/lowest \
		"$$(sed -n 's/^transformers>=/transformers==/p' requirements-export.txt)"
	$(NEWEST)/bin/python -m pytest -n 2 -m "not slow and not nightly"
	ATHENA_TRANSFORMERS=$(NEWEST)/lowest $(NEWEST)/bin/python -m pytest \
		tests/scripts/test_export_hf.py tests/scripts/test_export_check.py

# Under another name until it is whole; it is only ever called as `python -m`, which needs no paths.
$(XLA):
	@echo "installing PyTorch/XLA into $(XLA), once: some minutes, 4 GB to fetch, 6 GB to keep"
	rm -rf $@.unfinished
	mkdir -p $(@D)
	$(PYTHON) -m venv $@.unfinished
	$@.unfinished/bin/$(INSTALL) -c constraints-xla.txt --no-deps -r requirements-xla.txt
	$@.unfinished/bin/$(INSTALL) -c constraints-xla.txt -r requirements-xla-deps.txt
	mv $@.unfinished $@

xla-venv: | $(XLA)

test-xla: | $(XLA)  ## run the tests of the XLA backend on the CPU, and forward passes on fake CUDA tensors
	$(XLA)/bin/python -m pytest tests/xla tests/fake_cuda

$(TRITON): | $(DEV)
	@echo "installing Triton into $(TRITON), once: 200 MB to fetch, 1 GB to keep"
	rm -rf $@.unfinished
	$(VENV)/bin/$(INSTALL) --no-deps --target $@.unfinished triton==$(TRITON_VERSION)
	mv $@.unfinished $@

triton: | $(TRITON)

test-triton: | $(TRITON)  ## run the tests of the Triton kernels, interpreted and compiled without a card
	PYTHONPATH=$(abspath $(TRITON)) TRITON_INTERPRET=1 $(PY) -m pytest tests/models/test_triton_rows.py

notebook: $(BASE)  ## rebuild the notebook from the repository
	$(PY) scripts/build_notebook.py

lint: $(DEV)  ## check format and style
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

types: $(DEV)  ## check types
	$(PY) -m mypy

clean:  ## remove caches; environments, data and checkpoints stay
	find . -name .git -prune -o -path './$(VENV)*' -prune -o \
		-type d -name __pycache__ -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache .mypy_cache
