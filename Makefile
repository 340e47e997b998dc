PYTHON ?= python3
BIN := .venv/bin
LOWEST := attribution autodiff callbacks metrics store subspace test_private.py
PYTEST := -m pytest -n auto --dist worksteal

.PHONY: quickstart test test-all test-lowest lint docs notebooks dist bench gpu gpu-wheels clean

quickstart: .venv/run  ## install what the main job needs, then run it
	$(BIN)/python examples/quickstart.py

test: .venv/dev  ## theorems of every room and the doctests: about ten minutes on two cores
	$(BIN)/python $(PYTEST) -m "not slow" --jaxtyping-packages=lightning_sketch,beartype.beartype

test-all: test  ## and what is slow: examples, several processes, crashes, whole trainings, all kinds times all shapes
	$(BIN)/python $(PYTEST) -m slow

# The rooms that use Lightning, torchmetrics, safetensors and NumPy; warnings are not errors there, since old packages
# warn of each other.
test-lowest: .venv-lowest/dev  ## `make test` with the lowest versions that pyproject.toml promises
	.venv-lowest/bin/python $(PYTEST) -m "not slow" -W default $(addprefix tests/,$(LOWEST))

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/dev  ## the documentation, in site/; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: .venv/dev  ## examples/notebooks, made from the gallery and run, and the gallery's README; two minutes
	$(BIN)/python examples/notebooks/make.py
	$(BIN)/python docs/hooks.py

dist: .venv/dev  ## dist/: wheel and sdist, checked, and the README's first block run with the wheel alone
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python .ci/try_wheel.py dist/*.whl

bench: .venv/dev  ## the benchmarks that need no peer; minutes
	$(BIN)/python benchmarks/sketch_speed.py

gpu: .venv/dev  ## tests and benchmarks on a CUDA device; eight minutes at most
	$(BIN)/python benchmarks/gpu.py

gpu-wheels: .venv/dev  ## .whl/: what `make gpu` needs beside PyTorch for CUDA and pytorch-lightning, to be carried along
	$(BIN)/pip wheel --no-deps -w .whl beartype traker

%/bin/python:
	$(PYTHON) -m venv $* || { rm -rf $*; echo "Python's venv module is missing: apt install python3-venv"; exit 1; }

.venv/run: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install -c constraints.txt -e '.[wandb,plots]' scikit-learn
	touch $@

.venv/dev: requirements-dev.txt pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install -r requirements-dev.txt
	touch $@

.venv-lowest/dev: requirements-dev.txt pyproject.toml constraints-lowest.txt | .venv-lowest/bin/python
	.venv-lowest/bin/pip install -r requirements-dev.txt -c constraints-lowest.txt
	touch $@

clean:
	rm -rf .venv .venv-lowest .whl dist runs site
