# `make run` and `make test` need Python 3.11 or newer and make; everything else is set up in .venv and .tools.
PYTHON ?= python3
BIN := .venv/bin
ASK ?= Tell me about the sea
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup run test test-full check proto proto-release bench clean tools

help: ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.venv/run-stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=python3.12, say" >&2; exit 1; }
	@echo "setting up .venv …"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --progress-bar on --constraint constraints.txt --editable ".[frontend]"
	@touch $@

.venv/dev-stamp: .venv/run-stamp
	@echo "setting up the tests' packages …"
	$(BIN)/python -m pip install --quiet --progress-bar on --constraint constraints.txt --group dev
	@touch $@

setup: .venv/dev-stamp ## set up the virtual environment

run: .venv/run-stamp ## bring up registry, worker and frontend, and show a streamed answer; until Ctrl-C
	@exec $(BIN)/dynamo-grpc up --ask "$(ASK)"

test: .venv/dev-stamp ## run the tests that need only Python
	$(BIN)/pytest -m "not full"

test-full: .venv/dev-stamp .tools/dev-stamp ## run the tests that need more: other tools, more time
	$(BIN)/pytest -m full

check: .venv/dev-stamp .tools/protoc/stamp ## lint, types, import directions, stubs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	.tools/protoc/bin/python tools/generate_stubs.py --check
	.tools/protoc/bin/python tools/contract_page.py --check

# The oldest grpcio-tools we support, apart from .venv: its protobuf is older than what the runtime may use.
.tools/protoc/stamp: tools/protoc-requirements.txt
	@$(PYTHON) -m venv .tools/protoc
	.tools/protoc/bin/python -m pip install --quiet --requirement tools/protoc-requirements.txt
	@touch $@

proto: .tools/protoc/stamp ## generate from protos/: the stubs, and the page that is their reference
	.tools/protoc/bin/python tools/generate_stubs.py
	.tools/protoc/bin/python tools/contract_page.py

proto-release: .tools/dev-stamp ## accept the protos as they are as the base that `buf breaking` compares with
	.tools/node_modules/.bin/buf build --exclude-source-info -o protos/baseline.binpb

# What test-full uses; a missing toolchain is told and left to the tests (skipped here, failed in CI).
.tools/dev-stamp: tools/install_tools.sh tools/etcd/go.sum tools/etcd/main.go
	@bash tools/install_tools.sh .tools
	@touch $@

bench: .venv/dev-stamp ## measure the data path; PEERS=--peers adds Dynamo and SMG
	$(BIN)/python benchmarks/micro.py
	$(BIN)/python benchmarks/run.py $(PEERS)

clean: ## remove everything that was set up
	rm -rf .venv .tools build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
