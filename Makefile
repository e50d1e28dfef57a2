# Every chore has one name here; `make help` lists them. Python 3.11+ and a Rust toolchain are all that must be there.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

SOURCES := $(shell find rust python -type f \( -name '*.rs' -o -name '*.toml' -o -name '*.py' -o -name '*.pyi' -o -name py.typed \) -not -path '*/fuzz/*') \
           Cargo.toml Cargo.lock pyproject.toml

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-rust test-python lint lint-rust lint-python peers bench instructions develop lock clean

help: ## list the chores
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## build, install into .venv, and run `virtnet demo`
	$(BIN)/virtnet demo

test: test-rust test-python ## cargo's tests and pytest, without other implementations

test-rust:
	cargo test --locked

test-python: $(VENV)/installed
	$(BIN)/pytest -m 'not peer'

lint: lint-rust lint-python ## formats, clippy, ruff, mypy, stubtest, documentation; warnings are errors

lint-rust: | $(VENV)/tools
	cargo fmt --all --check
	PYO3_PYTHON=$(abspath $(BIN)/python) cargo clippy --locked --workspace --all-targets -- -D warnings
	PYO3_PYTHON=$(abspath $(BIN)/python) RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps --document-private-items

lint-python: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest virtnet._virtnet

peers: $(VENV)/installed ## install QEMU and DPDK where they are missing, and test against them
	tests/peers/install.sh
	$(BIN)/pytest -m peer

bench: $(VENV)/installed $(VENV)/bench-tools ## measure side by side with DPDK (see benchmarks/)
	$(BIN)/python -m benchmarks

instructions: $(VENV)/tools ## count the instructions a packet costs in rings and functions, under valgrind
	$(BIN)/python -m benchmarks.instructions

develop: $(VENV)/tools ## an editable install with the quick profile, for working on virtnet itself
	$(BIN)/maturin develop --locked
	rm -f $(VENV)/installed

lock: $(VENV)/tools ## choose the newest versions of the Python tools anew
	for group in dev bench; do \
	  { echo "# Exact versions of what \`make\` puts into .venv beside the package (group $$group). Written by \`make lock\`."; \
	    $(BIN)/uv pip compile pyproject.toml --group $$group --universal --python-version 3.11 --generate-hashes --no-header --quiet --upgrade; \
	  } > requirements-$$group.lock.new && mv requirements-$$group.lock.new requirements-$$group.lock; \
	done

clean: ## remove what was built and installed
	rm -rf $(VENV) target

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "virtnet needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1): name another with make PYTHON=..." >&2; exit 1; }
	@command -v cargo >/dev/null || { echo "virtnet needs a Rust toolchain (1.88 or newer) and found no cargo: see rustup.rs" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/tools: requirements-dev.lock | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

$(VENV)/bench-tools: requirements-bench.lock | $(VENV)/tools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bench.lock
	@touch $@

$(VENV)/installed: $(SOURCES) $(VENV)/tools
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation --force-reinstall .
	@touch $@
