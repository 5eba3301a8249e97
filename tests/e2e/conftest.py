"""Tiny models on disk, shared by the end-to-end tests."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "leaf"))  # tiny.py, the factories of the recipe's tests


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of two models with one tokenizer, as options of a run."""
    import tiny

    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny.tokenizer()
    for role, seed in (("teacher", 1), ("student", 0)):
        tiny.model(tokenizer, seed=seed, hidden=16, intermediate_size=32).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    return {role: str(folder / role) for role in ("teacher", "student")}
