.PHONY: test slow lint format compile-gate

test:
	python -m pytest

slow:
	python -m pytest -m slow

# Kernels compiled for GPUs that are not there; Triton's interpreter must be off when it is imported
compile-gate:
	TRITON_INTERPRET=0 python -m pytest -m compile_gate tests/kernels/test_compile_gate.py

lint:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .
