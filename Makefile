# Every target sets itself up: a Python 3.11 or 3.12 with its headers, a C compiler and make are all a fresh machine needs.
#   PYTHON=/path/to/python  which Python makes the environment      VENV=.venv-312  where it lies
#   ARGS="-k stft"          more words for pytest, or for the benchmark      WORKERS=0  all tests in one process
#   TPU_CACHE=DIR           where `make tpu` keeps what it compiled: a rerun does what is missing
#   GRID=DIR OUT=DIR EPOCHS=N for `make demo`      DATA=DIR RUNS=DIR JUDGE=RUN for `make table`

.DEFAULT_GOAL := help
.PHONY: help venv lint test test-slow test-beam test-gcs demo docs bench table tpu clean

VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints/tests.txt
WANTED := '.[prepare,synth,app,docs,test]'
PINS := pyproject.toml setup.py constraints/tests.txt $(CONSTRAINTS)
export TF_CPP_MIN_LOG_LEVEL ?= 3

# The first Python 3.11 or 3.12 that can make an environment and compile against its headers.
USABLE := import ensurepip, os, sys, sysconfig, venv; \
  sys.exit(not ((3, 11) <= sys.version_info < (3, 13) and os.path.exists(sysconfig.get_path("include") + "/Python.h")))
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3 $$HOME/.pyenv/versions/3.11*/bin/python \
  $$HOME/.pyenv/versions/3.12*/bin/python; do "$$p" -c '$(USABLE)' 2>/dev/null && { command -v "$$p"; break; }; done)
endif

# What the environment was made from: the Python and the place first (another one: start anew), then what is installed.
PLACE := import os, sys; print(sys.version.split()[0], sys.base_prefix, os.getcwd())
HASH := import hashlib, sys; print(hashlib.sha256(b"".join(open(p, "rb").read() for p in sys.argv[1:])).hexdigest())

help:
	@echo "make test           lint and all tests but the slow ones"
	@echo "make test-slow      the slow tests"
	@echo "make test-beam      the build by Apache Beam, in an environment of its own (.venv-beam: Beam takes an older protobuf)"
	@echo "make test-gcs       gs:// workdirs and data on a bucket of this machine's own, in an environment of its own (.venv-gcs)"
	@echo "make bench          the training step beside PyTorch, flax and Keras, in an environment of its own (.venv-bench)"
	@echo "make table DATA=DIR RUNS=DIR [JUDGE=RUN]   trains and evaluates what docs/results/ lacks -> docs/results.md; hours a system"
	@echo "make tpu            every system compiled by the TPU's own compiler, an hour of CPU or more -> docs/tpu.md"
	@echo "make demo           the whole way on synthetic clips that it makes: build, train, evaluate, repair a clip"
	@echo "make demo GRID=DIR  the same on a folder of Grid clips"
	@echo "make docs           the documentation as a site, in build/site; a warning is an error"
	@echo "make lint           ruff"
	@echo "make venv           only the environment, in $(VENV)"
	@echo "make clean          remove the environment and build litter"

venv:
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or 3.12 with venv and Python.h; install one" \
	  "(Debian: apt-get install python3-venv python3-dev) or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is" \
	  "`"$(PYTHON)" -V 2>&1`, expected 3.11 or newer; name another one: make PYTHON=/path/to/python" >&2; exit 2; }
	@set -e; place=`"$(PYTHON)" -c '$(PLACE)'`; pins="`"$(PYTHON)" -c '$(HASH)' $(PINS)` `echo $(WANTED)`"; \
	if [ "`cat "$(VENV)/made-by" 2>/dev/null`" != "$$place" ]; then \
	  echo "$(VENV): making it with $$place"; \
	  "$(PYTHON)" -m venv --clear "$(VENV)"; echo "$$place" > "$(VENV)/made-by"; \
	fi; \
	if [ "`cat "$(VENV)/made-from" 2>/dev/null`" != "$$pins" ]; then \
	  echo "$(VENV): installing (about 3 GB; some minutes the first time)"; \
	  "$(BIN)/python" -m pip install -qq --upgrade pip; \
	  "$(BIN)/python" -m pip install -qq -e $(WANTED) -c $(CONSTRAINTS); \
	  "$(BIN)/python" -m pip check; \
	  echo "$$pins" > "$(VENV)/made-from"; \
	fi; \
	echo "$(VENV): ready, `"$(BIN)/python" -V`"

lint: venv
	"$(BIN)/ruff" check .

# Two workers: half of a test's time is one thread's. A file's tests stay together, and so do what they share.
WORKERS ?= 2
PYTEST = "$(BIN)/python" -m pytest -n $(WORKERS) --dist loadfile --durations=20

test: lint
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: venv
	$(PYTEST) -m slow $(ARGS)

test-beam:
	@$(MAKE) venv VENV=.venv-beam CONSTRAINTS=constraints/beam.txt WANTED="'.[prepare,beam,synth,test]'"
	.venv-beam/bin/python -m pytest tests/tfds_grid/test_beam.py --durations=5 $(ARGS)

test-gcs:
	@$(MAKE) venv VENV=.venv-gcs WANTED="'.[gcs,test,test-gcs]'"
	.venv-gcs/bin/python -m pytest tests/runtime/test_storage.py tests/training/test_tensorboard.py --durations=5 $(ARGS)

demo: venv
	@PATH="`cd "$(BIN)" && pwd`:$$PATH" GRID="$(GRID)" OUT="$(OUT)" EPOCHS="$(EPOCHS)" bash launch/demo.sh

docs: venv
	NO_MKDOCS_2_WARNING=1 "$(BIN)/mkdocs" build --strict --site-dir build/site

# EXTRA=cuda: on a machine with an NVIDIA GPU. TORCH_INDEX: a package index beside pip's own that has PyTorch for CPUs alone,
# e.g. https://download.pytorch.org/whl/cpu
bench:
	@$(MAKE) venv VENV=.venv-bench CONSTRAINTS=constraints/bench.txt WANTED="'.[$(EXTRA)]' torch keras $(TORCH_INDEX:%=--extra-index-url %)"
	.venv-bench/bin/python -m benchmarks.speed.train_step --json $(ARGS)

table: venv
	"$(BIN)/python" -m benchmarks.results.results run --data_dir="$(DATA)" --runs="$(RUNS)" $(JUDGE:%=--judge="%") $(ARGS)

TPU_CACHE ?= $(HOME)/.cache/avsi_jax/tpu
tpu:
	@$(MAKE) venv VENV=.venv-tpu CONSTRAINTS=constraints/tpu.txt WANTED="'.[tpu,prepare,test]'"
	.venv-tpu/bin/python -m pytest -m "slow or not slow" tests/benchmarks/test_tpu_compile.py tests/benchmarks/test_pallas_lstm.py
	.venv-tpu/bin/python -m benchmarks.tpu.tpu_compile --cache="$(TPU_CACHE)" $(ARGS)

clean:
	rm -rf "$(VENV)" .venv-beam .venv-bench .venv-gcs .venv-tpu build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
