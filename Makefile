# Two commands do everything on a machine with Python 3.11 and no GPU: `make demo` and `make test`.
PYTHON ?= python3.11
BIN := .venv/bin
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-unit test-vectors test-packages test-fuzz test-compose test-hosts chaos sweep mutants soak kill-demo check audit docs dist proto lock

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/ready  ## make .venv with everything the project needs (3.5 minutes, 3.8 GB on disk)

.venv/ready: requirements/cpu.txt pyproject.toml
	@echo "setting up .venv: downloads PyTorch, vLLM (CPU builds) and what they need; 3.8 GB on disk, about 3.5 minutes"
	$(PYTHON) -m venv .venv
	$(PIP) --extra-index-url $(TORCH_INDEX) torch==2.13.0+cpu
	$(PIP) --requirement requirements/cpu.txt
	$(PIP) --no-build-isolation --editable . && touch $@

demo: setup  ## train the tiny model on chemistry questions (2 to 4 minutes, 5.5 to 7.5 with the set-up)
	$(BIN)/retort run configs/tiny-cpu.toml

test: setup check  ## every check and every test, real services included; two files at a time
	$(BIN)/pytest -n 2 --dist loadfile

test-unit: setup  ## the tests that need seconds
	$(BIN)/pytest tests/unit

test-vectors: setup  ## the numeric cases of $$RETORT_VECTORS, or of the project's own file
	$(BIN)/pytest tests/unit/trainer/test_vectors.py tests/unit/reward/test_vectors.py

test-packages: setup  ## the reward service in an empty environment; TRL, verl, verifiers calling it; the trackers (not in `make test`)
	$(BIN)/pytest -m packages tests/packages

test-fuzz: setup  ## 100,000 hostile cases for the reward service (ten minutes; not in `make test`)
	$(BIN)/pytest -m fuzz tests/integration/test_reward_fuzz.py

chaos: setup  ## kill, freeze and forget for half an hour; RETORT_CHAOS_SEED=N repeats a plan
	$(BIN)/pytest -m "not soak" --ignore=tests/chaos/test_sweep.py --ignore=tests/chaos/test_mutants.py tests/chaos tests/e2e

sweep: setup  ## kill trainer, replica and launcher before and after each of their operations; 20,000 call sequences against Redis
	$(BIN)/pytest -m chaos tests/chaos/test_sweep.py tests/integration/test_queue_model.py

mutants: setup  ## planted bugs, each of which has to be found 20 times of 20
	$(BIN)/pytest -m chaos tests/chaos/test_mutants.py

soak: setup  ## 2,000 steps; the memory of every process and of Redis has to stay flat (not in `make test`)
	$(BIN)/pytest -s -m soak tests/chaos/test_soak.py

kill-demo: setup  ## watch: one run is left alone, one is killed 20 times; both end with the same SHA-256 (two minutes)
	$(BIN)/pytest -m chaos tests/chaos/test_kill_demo.py

test-compose: setup  ## build docker-compose.yml with podman, run it, kill parts of it (long; not in `make test`)
	$(BIN)/pytest -m compose tests/compose

test-hosts: setup  ## replicas on another host (a network namespace; needs root), cut off and back (not in `make test`)
	$(BIN)/pytest -m hosts tests/hosts

check: setup docs  ## ruff, mypy --strict, architecture, documentation, wheel
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/unit/test_architecture.py tests/unit/test_docs.py tests/unit/test_distribution.py

audit: setup  ## look the locks up in a database of vulnerabilities (pip-audit; needs the network, so not in `make check`)
	@for lock in cpu reward rollout-cpu rollout-cuda trainer-cpu trainer-cuda; do echo "$$lock" && \
		$(BIN)/python -m uv tool run pip-audit --no-deps --disable-pip --requirement requirements/$$lock.txt || exit 1; done

docs: setup  ## the documentation site, in build/site; refuses a broken link
	$(BIN)/mkdocs build --quiet --strict

dist: setup  ## wheel and sdist, in dist/
	$(BIN)/python -m uv build --quiet --no-build-isolation

proto: setup  ## compile proto/ into retort/proto/
	$(BIN)/python -m grpc_tools.protoc -Iretort/proto=proto --python_out=. --pyi_out=. --grpc_python_out=. \
		proto/reward/v1/reward.proto

lock: setup  ## resolve every file of requirements/ anew: requirements/lock.sh
	@sh requirements/lock.sh
