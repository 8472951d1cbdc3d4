# The two commands of the README, and what CI runs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test slow lint bench-quick install wheel clean

demo: install
	$(BIN)/edgeprune build --target cpu-avx2 --latency 10ms

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check edgeprune tests benchmarks
	$(BIN)/ruff format --check edgeprune tests benchmarks
	$(BIN)/mypy

# Builds the wheel and uses it as a stranger would: in a clean environment, outside the repository.
wheel: install
	sh tests/wheel.sh $(BIN)/python

# The accuracy benchmark on a tiny model, in at most two minutes: it shows that all of it runs.
bench-quick: install
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	rm -f artifacts/bench/quick.jsonl
	$(BIN)/python benchmarks/accuracy.py --quick --tune-steps 8 --results artifacts/bench/quick.jsonl
	$(BIN)/python benchmarks/tables.py --results artifacts/bench/quick.jsonl --out artifacts/bench

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[build,dev]'
	touch $@

clean:
	rm -rf $(VENV) artifacts dist
