# Everything runs in one virtual environment, made when it is first needed. `make demo` and `make test` are enough.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test slow promises multi dist effects evidence evidence-quick tasks llama mutation check bench bench-statistics docs size format clean

demo: $(BIN)/tunesmith  ## the whole story on the embedded example
	$(BIN)/tunesmith demo

# One process per core, whose threads sleep while they wait.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses auto --dist worksteal

# Tiny models gain nothing from more threads and wait for them: with two in each of two processes, on
# a busy machine, a file of a minute was not done after sixteen. What depends on their number sets it.
test: $(BIN)/pytest  ## the tests, without the real model; of model families, one of each kind of layer
	OMP_NUM_THREADS=1 $(PYTEST)

# Long tests on tiny models, then those of the real one.
promises: $(BIN)/pytest  ## long tests of what README promises, which CI runs
	OMP_NUM_THREADS=1 $(PYTEST) -m 'promise and not slow'
	OMP_NUM_THREADS=1 $(PYTEST) -m 'slow and promise and not more_seeds'

slow: $(BIN)/pytest  ## all other long tests, for the night: one seed of each effect, further families
	OMP_NUM_THREADS=1 $(PYTEST) -m 'slow and not promise and not more_seeds'

multi: $(BIN)/pytest  ## runs on two and three processes over gloo
	OMP_NUM_THREADS=1 $(BIN)/pytest -m multi tests/multi

dist: $(BIN)/pytest  ## dist/: a source archive, and the wheel that is built from it
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

effects: $(BIN)/pytest  ## does each strategy do what it promises? three seeds, into docs/results/effects.md
	$(PYTEST) -m slow --junitxml=build/effects.xml tests/effects; status=$$?; \
	$(BIN)/python -m benchmarks.effects build/effects.xml docs/results/effects.md && exit $$status

# EVIDENCE takes further arguments, such as EVIDENCE='--minutes 60'.
evidence: $(BIN)/pytest  ## which claims of guides hold? runs what has no result; ONLY=NAME; docs/results/evidence.md
	nice -n 15 $(BIN)/python -m experiments.run $(if $(ONLY),--only $(ONLY)) $(EVIDENCE)

evidence-quick: $(BIN)/pytest  ## two steps of each experiment with a two-layer model
	$(BIN)/python -m experiments.run --quick $(if $(ONLY),--only $(ONLY))

tasks: $(BIN)/pytest  ## does following the advice help on ten foreign tasks? runs what has no result; ONLY=NAME
	$(BIN)/python -m benchmarks.tasks.build
	nice -n 15 $(BIN)/python -m benchmarks.tasks.run $(if $(ONLY),--only $(ONLY)) $(TASKS)

llama: $(BIN)/pytest  ## exports in llama.cpp, compiled the first time; `make slow` has them too from then on
	TUNESMITH_BUILD_LLAMA=1 $(BIN)/pytest -m slow tests/unit/export/test_llama_cpp.py tests/unit/export/test_llama_server.py

mutation: $(BIN)/cosmic-ray  ## would a test notice if the exactness and evidence code were wrong? docs/results/mutation.md
	nice -n 15 $(BIN)/python -m benchmarks.mutation.run

check: $(BIN)/pytest  ## style, types, layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python || $(BIN)/pyright --pythonpath $(BIN)/python  # numpy's recursive types are unknown to it once in a while
	$(BIN)/lint-imports

bench: $(BIN)/pytest  ## tunesmith and TRL + PEFT on the same work
	$(BIN)/python -m benchmarks.vs_trl.run

bench-statistics: $(BIN)/pytest  ## coverage and false verdicts by items, groups and seeds, into docs/results/coverage.md
	OMP_NUM_THREADS=1 nice -n 15 $(BIN)/python -m benchmarks.evaluate.coverage --write docs/results/coverage.md

docs: $(BIN)/pytest  ## the generated blocks of README.md and docs/
	$(BIN)/python docs/build.py

size: $(BIN)/python  ## lines, statements and functions of each feature
	$(BIN)/python -m benchmarks.size

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

$(BIN)/cosmic-ray: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --editable '.[dev,mutation]'
	touch $@
