# The habits of this project. `make help` lists them. Everything runs in .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ARGS ?=
ROUNDS ?= 10
SEED ?=
.DEFAULT_GOAL := help
.PHONY: help setup serve test test-all test-isa test-random mutants lint types fmt proto lock bench model clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# What the lock files name is installed by its hashes; torch, whose builds differ by index, and what only it brings (CUDA)
# come next. Then the project finds nothing missing, as a rule: an unusual Python may need a package more.
LOCKED := --require-hashes --no-deps
$(VENV)/.base: pyproject.toml requirements/serve.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Tandem needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing Tandem into $(VENV) (a few minutes the first time) ..."
	@$(PIP) $(LOCKED) -r requirements/serve.txt
	@$(PIP) "$(TORCH)"
	@$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base requirements/dev.txt
	@echo "installing what tests and checks need into $(VENV) ..."
	@$(PIP) $(LOCKED) -r requirements/dev.txt
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

setup: $(VENV)/.dev  ## make .venv with everything that development needs

serve: $(VENV)/.base  ## install, then serve the bundled model (ARGS="--port 9000" passes flags)
	@$(BIN)/tandem serve $(ARGS)

# Most tests wait for processes, so there are more of those who test than cores. Each takes whole files, in the order of
# tests/conftest.py. ARGS="-n 0 tests/x" runs them in one process.
PARALLEL := -n 4 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.dev  ## install, then run the tests (slow ones left out)
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow" -q $(ARGS)

# What is computed with the instructions of a processor, with those of older ones: no processor's luck hides a bug.
ISA_TESTS := $(addprefix tests/engine/,$(addprefix model/,test_batch_invariant.py test_model_row_invariance.py \
  test_model_native.py test_native_attention.py test_model_linear.py test_model_loading.py) \
  test_resumed_output.py test_engine_handover.py)
test-isa: $(VENV)/.dev  ## the engine's numerical tests with AVX2, then with oneDNN held to AVX-512
	@ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest $(PARALLEL) -m "not slow" -q $(ISA_TESTS) $(ARGS)
	@ONEDNN_MAX_CPU_ISA=AVX512_CORE $(BIN)/python -m pytest -m "not slow" -q tests/engine/model/test_model_row_invariance.py \
	  -k "tiny or small" $(ARGS)

test-all: $(VENV)/.dev  ## run every test
	@$(BIN)/python -m pytest $(PARALLEL) -q $(ARGS)

# Each round prints its seed; run it again with ROUNDS=1 SEED=... What it finds becomes an @example of the test.
test-random: $(VENV)/.dev  ## property tests with random examples, ROUNDS times
	@for round in $$(seq $(ROUNDS)); do seed=$(or $(SEED),$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')); echo "seed $$seed"; \
	  $(BIN)/python -m pytest -m hypothesis -q --hypothesis-profile random --hypothesis-seed $$seed $(ARGS) || exit 1; done

$(VENV)/.mutants: $(VENV)/.dev
	@$(PIP) --no-build-isolation -e '.[mutants]'
	@touch $@

mutants: $(VENV)/.mutants  ## do tests notice small changes of the policies? (ARGS="common/fairness.py" tries one file)
	@$(BIN)/python tests/mutants/run.py $(ARGS)

lint: $(VENV)/.dev  ## ruff, import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: $(VENV)/.dev  ## mypy, strict
	@$(BIN)/mypy

fmt: $(VENV)/.dev  ## format and sort imports
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

proto: $(VENV)/.dev  ## regenerate the gRPC stubs
	@PATH="$(CURDIR)/$(BIN):$$PATH" proto/generate.sh

lock: $(VENV)/.dev  ## write requirements/*.txt again, at the pinned versions (ARGS="--upgrade NAME")
	@$(BIN)/python requirements/lock.py $(ARGS)

bench: $(VENV)/.dev  ## measure serving (bench/README.md says how to add the peers)
	@$(BIN)/python bench/serve.py $(ARGS)

model: $(VENV)/.dev  ## train the bundled model again (about an hour)
	@$(BIN)/python examples/small_model/train.py --out examples/small_model/model $(ARGS)

clean:  ## remove .venv and caches
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
