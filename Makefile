# Every target does its own set-up: all it needs is Python >= 3.10 and make. The environment
# lies in .venv, is pinned by constraints.txt, and is made anew when that or pyproject.toml changes.

# The newest plain "python3" may be too old while a newer one has a name of its own.
PYTHON ?= $(shell for p in python3 python python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$$p" && break; done)
WORKERS ?= 2
PYTEST_ARGS ?=
PROGRAMS ?= 1000

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
# The models of transformers are tested in two versions: the pinned one, and this one beside it.
ALT := .venv-alt
ALT_TRANSFORMERS := 5.24.0
ALT_STAMP := $(ALT)/.stamp-$(ALT_TRANSFORMERS)
# loadgroup: tests that share a costly set-up (a built wheel) stay in one process.
PYTEST := DSV4FUSE_TRANSFORMERS_ALT=$(ALT) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: help setup demo test test-long versions generate sanitize lint docs doctor clean

help:
	@echo "make demo       run examples/quickstart.py and show what was fused"
	@echo "make test       run the tests (two processes; WORKERS=n for more)"
	@echo "make test-long  run all tests, those of minutes too, with the long hypothesis profile"
	@echo "make versions TORCH='2.11.0 2.12.1'  run the pass's tests under these, keep the counts"
	@echo "make generate   draw programs and mutants, PROGRAMS=n of each (see tests/generate)"
	@echo "make sanitize   run every kernel under compute-sanitizer (needs a GPU and the CUDA toolkit)"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the tables and pictures of README.md and docs/, from what is committed"
	@echo "make doctor     what this machine can run, and why not the rest"
	@echo "make clean      remove the environments and all caches"

setup: $(STAMP)

# No prerequisites: the name holds their hash, and a fresh checkout changes their times only.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "No Python >= 3.10 was found. Install one, or give its path: make PYTHON=/path/to/python3 ..."; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON) (this downloads torch once)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { echo "venv failed. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@# setuptools first and from the constraints, so that the build below is pinned as well.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		--no-build-isolation -e ".[examples,test,dev]"
	@touch $@

$(ALT_STAMP): | $(STAMP)
	@rm -rf $(ALT)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(ALT) \
		transformers==$(ALT_TRANSFORMERS)
	@touch $@

demo: $(STAMP)
	@$(BIN)/python examples/quickstart.py

test: $(STAMP) $(ALT_STAMP)
	@$(PYTEST) -m "not long" $(PYTEST_ARGS)

test-long: $(STAMP) $(ALT_STAMP)
	@HYPOTHESIS_PROFILE=long $(PYTEST) $(PYTEST_ARGS)

versions: $(STAMP)
	@$(BIN)/python tests/versions.py $(TORCH)

generate: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.generate --programs $(PROGRAMS) --workers $(WORKERS)

SANITIZER ?= compute-sanitizer
SANITIZER_TOOLS ?= memcheck racecheck initcheck synccheck

# Without torch's pool of memory each tensor is an allocation of its own, with bounds of its own.
# racecheck does not follow the bulk copies of cuBLAS's kernels (nvjet) and takes them for races;
# for initcheck torch reads what nothing has written where it compiles a sequence: the ops alone.
sanitize: $(STAMP)
	@command -v $(SANITIZER) >/dev/null || { echo "There is no $(SANITIZER) here: install the CUDA toolkit, or give its path: make SANITIZER=/path/to/compute-sanitizer sanitize"; exit 1; }
	@for tool in $(SANITIZER_TOOLS); do \
		echo "$$tool" && PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool \
			--error-exitcode 9 $(BIN)/python -m tests.sanitize \
			$$(case $$tool in (racecheck|initcheck) echo ops;; esac) || exit 1; \
	done

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/mypy && echo "lint: no complaints"

# A picture of each fusion that was measured against Inductor.
docs: $(STAMP)
	@for file in $$(grep -l '"inductor"' kernels/*.json); do $(BIN)/python -m dsv4fuse bench --from $$file --model flash \
		--plot docs/pictures/$$(basename $$file .json).svg > /dev/null || exit 1; done
	@$(BIN)/python -m dsv4fuse bench --e2e $(addprefix --from ,$(wildcard examples/results/*_flash_*.json)) \
		--plot docs/pictures/launches.svg > /dev/null
	@$(BIN)/python -m dsv4fuse fusions --write README.md --write docs/speed.md --write docs/ops.md \
		--write docs/versions.md

doctor: $(STAMP)
	@$(BIN)/python -m dsv4fuse doctor

clean:
	rm -rf $(VENV) $(ALT) .versions build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
