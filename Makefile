# Every target sets itself up: a new machine only needs Python 3.11, 3.12 or 3.13 with its headers, a C compiler and make.
#   PYTHON=/path/to/python  Python of the environment      VENV=.venv-312  folder of the environment
#   ARGS="-k stft"          further arguments for pytest, or for the benchmark      WORKERS=0  all tests in one process
#   TPU_CACHE=DIR           cache of `make tpu`: a rerun only compiles what is missing
#   GRID=DIR OUT=DIR EPOCHS=N for `make demo`      DATA=DIR RUNS=DIR JUDGE=RUN for `make table`

.DEFAULT_GOAL := help
.PHONY: help venv lint test test-newest test-oldest main-job test-slow test-beam test-gcs demo docs bench table tpu clean

VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints/tests.txt
WANTED := '.[prepare,synth,eval,app,docs,test]'
PINS := pyproject.toml setup.py constraints/tests.txt $(CONSTRAINTS)
EDITABLE := -e
export TF_CPP_MIN_LOG_LEVEL ?= 3

# The first Python of these versions, in this order, that can make an environment and has headers to compile against.
USABLE := import ensurepip, os, sys, sysconfig, venv; \
  sys.exit(not (sys.version_info >= (3, 11) and os.path.exists(sysconfig.get_path("include") + "/Python.h")))
first_python = $(shell for v in $(1); do for p in python$$v $$HOME/.pyenv/versions/$$v*/bin/python; do \
  "$$p" -c '$(USABLE)' 2>/dev/null && { command -v "$$p"; exit; }; done; done)
ifndef PYTHON
PYTHON := $(call first_python,3.11 3.12 3.13)
endif

# What the environment was made from: Python and folder (if they change, it is made again), and the installed packages.
PLACE := import os, sys; print(sys.version.split()[0], sys.base_prefix, os.getcwd())
HASH := import hashlib, sys; print(hashlib.sha256(b"".join(open(p, "rb").read() for p in sys.argv[1:])).hexdigest())

help:
	@echo "make test           lint and all tests except the slow ones"
	@echo "make test-newest    the main job with the newest releases of all dependencies, on the newest Python installed (.venv-newest)"
	@echo "make test-oldest    the main job with the oldest releases that pyproject.toml allows, on Python 3.11 (.venv-oldest)"
	@echo "make test-slow      the slow tests; without ARGS also test-oldest"
	@echo "make test-beam      the build with Apache Beam, in an environment of its own (.venv-beam: Beam needs an older protobuf)"
	@echo "make test-gcs       gs:// workdirs and data with a local fake of the bucket server, in an environment of its own (.venv-gcs)"
	@echo "make bench          compares the training step with PyTorch, flax and Keras, in an environment of its own (.venv-bench)"
	@echo "make table DATA=DIR RUNS=DIR [JUDGE=RUN]   trains and evaluates the runs missing in docs/results/ -> docs/results.md; hours per system"
	@echo "make tpu            compiles every system with the TPU's own compiler, an hour of CPU or more -> docs/tpu.md"
	@echo "make demo           the complete pipeline on synthetic clips: build, train, evaluate, restore a clip"
	@echo "make demo GRID=DIR  the same on a folder of Grid clips"
	@echo "make docs           the documentation site in build/site; warnings are errors"
	@echo "make lint           ruff"
	@echo "make venv           only the environment $(VENV)"
	@echo "make clean          remove environments and build files"

venv:
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11, 3.12 or 3.13 with venv and Python.h; install one" \
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
	  "$(BIN)/python" -m pip install -qq $(EDITABLE) $(WANTED) $(CONSTRAINTS:%=-c %); \
	  "$(BIN)/python" -m pip check; \
	  echo "$$pins" > "$(VENV)/made-from"; \
	fi; \
	echo "$(VENV): ready, `"$(BIN)/python" -V`"

lint: venv
	"$(BIN)/ruff" check .

# Two workers: half of a test's time uses one thread. Tests of a file run in the same worker, since they share fixtures.
WORKERS ?= 2
PYTEST = "$(BIN)/python" -m pytest -n $(WORKERS) --dist loadfile --durations=20

test: lint
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: venv
	$(PYTEST) -m slow $(ARGS)
	$(if $(ARGS),,$(MAKE) test-oldest)

# The package is installed as a user installs it, without -e, and its commands run in another folder.
MAIN_JOB := '.[prepare,synth,app]' pytest 'setuptools>=77'
NEWEST_PYTHON ?= $(call first_python,3.14 3.13 3.12 3.11)
OLDEST_PYTHON ?= $(call first_python,3.11)

test-newest:
	@$(MAKE) main-job VENV=.venv-newest PYTHON="$(NEWEST_PYTHON)" CONSTRAINTS=

test-oldest:
	@mkdir -p build
	@"$(or $(OLDEST_PYTHON),python3.11)" constraints/lower_bounds.py prepare synth app > build/lower_bounds.txt
	@$(MAKE) main-job VENV=.venv-oldest PYTHON="$(OLDEST_PYTHON)" CONSTRAINTS=build/lower_bounds.txt

# The environment is kept; the package itself is built again, without files of an earlier build.
main-job:
	@$(MAKE) venv WANTED="$(MAIN_JOB)" EDITABLE=
	rm -rf build/lib build/bdist.*
	"$(BIN)/python" -m pip install -qq --no-deps --force-reinstall --no-build-isolation .
	@"$(BIN)/python" -m pip freeze | tr '\n' ' '; echo
	cd "$${TMPDIR:-/tmp}" && "$(abspath $(BIN))/python" -m pytest -c /dev/null --rootdir="$(CURDIR)/tests" --noconftest \
	  -p no:cacheprovider --durations=0 "$(CURDIR)/tests/main_job.py" $(ARGS)

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

# EXTRA=cuda: on a machine with an NVIDIA GPU. TORCH_INDEX: an additional package index with PyTorch for CPUs only,
# e.g. https://download.pytorch.org/whl/cpu
bench:
	@$(MAKE) venv VENV=.venv-bench CONSTRAINTS=constraints/bench.txt WANTED="'.$(EXTRA:%=[%])' torch keras $(TORCH_INDEX:%=--extra-index-url %)"
	.venv-bench/bin/python -m benchmarks.speed.train_step --json $(ARGS)

table: venv
	"$(BIN)/python" -m benchmarks.results.results run --data_dir="$(DATA)" --runs="$(RUNS)" $(JUDGE:%=--judge="%") $(ARGS)

TPU_CACHE ?= $(HOME)/.cache/avsi_jax/tpu
tpu:
	@$(MAKE) venv VENV=.venv-tpu CONSTRAINTS=constraints/tpu.txt WANTED="'.[tpu,prepare,test]'"
	.venv-tpu/bin/python -m pytest -m "slow or not slow" tests/benchmarks/test_tpu_compile.py tests/benchmarks/test_pallas_lstm.py
	.venv-tpu/bin/python -m benchmarks.tpu.tpu_compile --cache="$(TPU_CACHE)" $(ARGS)

clean:
	rm -rf "$(VENV)" .venv-beam .venv-bench .venv-gcs .venv-newest .venv-oldest .venv-tpu build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
