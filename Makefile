PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint bench clean

quickstart: .venv/run  ## install what the main job needs, then run it
	$(BIN)/python examples/quickstart.py

test: .venv/dev  ## tests, doctests and examples
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/dev  ## the benchmarks that need no peer; minutes
	$(BIN)/python benchmarks/sketch_speed.py

.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "Python's venv module is missing: apt install python3-venv"; exit 1; }

.venv/run: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install -c constraints.txt -e '.[wandb,plots]' scikit-learn
	touch $@

.venv/dev: requirements-dev.txt pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs
