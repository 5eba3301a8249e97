.PHONY: test slow lint format compile-gate docs

test:
	python -m pytest

slow:
	python -m pytest -m slow

# Kernels compiled for GPUs that are not there
compile-gate:
	python -m pytest -m compile_gate tests/kernels/test_compile_gate.py tests/test_tune.py

lint:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

# The pages of docs/ and the docstrings of the API, into site/; a warning is an error
docs:
	mkdocs build --strict --quiet
