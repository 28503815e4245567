# Two commands do everything: `make serve` and `make test`. See README.md.

# Of several builds of python3's version on this machine the fastest; or what is named: make PYTHON=python3.12
ifeq ($(origin PYTHON), undefined)
PYTHON := python3
INTERPRETER = "$$($(PYTHON) proxy/interpreter.py)"
else
INTERPRETER = $(PYTHON)
endif
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup bench-start bench-overhead bench-endurance bench-balance bench-cache bench-cache-safety bench-routing chaos serve test search lint types schema lock clean

help: ## Show what there is
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.proxy ## Make the proxy's own environment in .venv, and nothing else

$(VENV)/bin/uv: proxy/requirements-uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Polyvox needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	@$(INTERPRETER) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r proxy/requirements-uv.txt
	@touch $@

$(VENV)/.proxy: $(VENV)/bin/uv proxy/requirements.txt pyproject.toml
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r proxy/requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@
	@echo "ready: $(BIN)/polyvox"

$(VENV)/.test: $(VENV)/.proxy tests/requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r tests/requirements.txt
	@touch $@

bench-start: setup ## Time a fresh clone to its first answer, and a second start
	$(BIN)/python -m benchmarks.start

bench-overhead: setup ## Measure CPU, latency and memory beside other proxies (ARGS="--quick --peers nginx,polyvox --cases plain")
	$(BIN)/python -m benchmarks.overhead $(ARGS)

bench-endurance: setup ## Measure memory over a million requests, with slow clients, and the start (ARGS="--only slow")
	$(BIN)/python -m benchmarks.endurance $(ARGS)

bench-cache: setup ## Measure what the cache of answers costs and gives (ARGS="--quick")
	$(BIN)/python -m benchmarks.cache $(ARGS)

bench-cache-safety: $(VENV)/.test ## Prove that the cache gives nobody what is not his, in 200,000 requests (ARGS="--requests 20000")
	$(BIN)/python -m benchmarks.cache_safety $(ARGS)

bench-routing: setup ## Measure the model of complexity on labelled prompts (ARGS="--data ../shared/data")
	$(BIN)/python -m benchmarks.routing $(ARGS)

bench-balance: setup ## Compare balancing policies on traces (ARGS="--traces FOLDER --quick")
	$(BIN)/python -m benchmarks.balancing $(ARGS)

chaos: setup ## Ask two real engines for five minutes while they are killed, stopped, cut off (ARGS="--seconds 60 --seed 3")
	$(BIN)/python -m benchmarks.chaos $(ARGS)

serve: setup ## Run a small model and the proxy on 127.0.0.1:8000 (more options: make serve ARGS="--port 9000")
	@exec $(BIN)/polyvox serve $(ARGS)

test: $(VENV)/.test lint types ## Run every check and test, real vLLM engines included
	$(BIN)/pytest $(ARGS)

search: $(VENV)/.test ## Look for failures among thousands of new examples of each property (ARGS="tests/test_config.py")
	$(BIN)/pytest -m hypothesis --hypothesis-profile=search --timeout=1800 $(ARGS)

lint: $(VENV)/.test ## Check style (ruff) and the import floors (import-linter)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.test ## Check types (mypy --strict)
	$(BIN)/mypy

schema: setup ## Write config/polyvox.schema.json anew from the code
	$(BIN)/polyvox schema > config/polyvox.schema.json

COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --upgrade

lock: setup ## Choose the newest versions of the proxy's and the tests' dependencies anew
	echo uv | $(COMPILE) - -o proxy/requirements-uv.txt
	$(COMPILE) pyproject.toml -o proxy/requirements.txt
	$(COMPILE) pyproject.toml --extra test -c proxy/requirements.txt -o tests/requirements.txt

clean: ## Remove .venv and caches; engines' environments and weights stay where they are
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
