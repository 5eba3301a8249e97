"""Tiny models on disk, shared by the end-to-end tests."""

from __future__ import annotations

import pathlib
import shutil
import sys
from typing import Any

import pytest
from small import word_problems, write_rows

from leaf.config import RunConfig
from leaf.run import run_stages

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


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory, pair: dict[str, str]) -> tuple[dict[str, Any], pathlib.Path]:
    """Options of a run of four rows, and its folder with the tables of all that comes before the training."""
    folder = tmp_path_factory.mktemp("tables")
    options = {**pair, "data": write_rows(folder / "rows.jsonl", word_problems(4)), "device": "cpu"}
    options |= {"select": "all", "verify": "none", "max_new_tokens": 2}
    config = RunConfig.from_mapping({**options, "output": str(folder / "run")})
    run_stages(config, ("select", "score", "prune", "verify"))
    return options, folder / "run"


@pytest.fixture
def prepared(tmp_path: pathlib.Path, tables: tuple[dict[str, Any], pathlib.Path]) -> dict[str, Any]:
    """The options of a copy of those tables in tmp_path/run."""
    options, run = tables
    return {**options, "output": str(shutil.copytree(run, tmp_path / "run"))}
