# Everything runs in one virtual environment, made when it is first needed. `make demo` and `make test` are enough.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test slow llama check bench format clean

demo: $(BIN)/tunesmith  ## the whole story on the embedded example
	$(BIN)/tunesmith demo

test: $(BIN)/pytest  ## the tests, without the real model; a process on each core, whose threads wait asleep
	OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses auto

slow: $(BIN)/pytest  ## the tests that need the real SmolLM2-135M-Instruct
	OMP_WAIT_POLICY=passive $(BIN)/pytest -m slow --numprocesses auto

llama: $(BIN)/pytest  ## exports in llama.cpp itself, compiled the first time; `make slow` has them too from then on
	TUNESMITH_BUILD_LLAMA=1 $(BIN)/pytest -m slow tests/unit/export/test_llama_cpp.py

check: $(BIN)/pytest  ## style, types, layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python || $(BIN)/pyright --pythonpath $(BIN)/python  # once in a while it finds numpy's recursive types unknown
	$(BIN)/lint-imports

bench: $(BIN)/pytest  ## tunesmith beside TRL + PEFT on the same work
	$(BIN)/python -m benchmarks.vs_trl.run

format: $(BIN)/pytest
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(BIN)/tunesmith: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --editable .
	touch $@

$(BIN)/pytest: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --editable '.[dev]'
	touch $@
