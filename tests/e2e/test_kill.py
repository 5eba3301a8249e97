"""kill -9 of a rank, or of all, while two of them train or cache: the next start ends where an uninterrupted run ends."""

from __future__ import annotations

import json
import pathlib
import random
import shutil
import time
from typing import Any

import pytest
import torch
from launched import leaf
from safetensors.torch import load_file
from small import word_problems, write_rows

from leaf.config import RunConfig
from leaf.run import run_stages
from leaf.tables import open_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS = 7  # of two an epoch: the last one ends in the midst of an epoch
TRAINING = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-2,
    "save_steps": 2,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, pair: dict[str, str]) -> pathlib.Path:
    """Options and tables of everything before the training."""
    folder = tmp_path_factory.mktemp("prepared")
    options: dict[str, Any] = {**pair, "data": write_rows(folder / "rows.jsonl", word_problems(4)), "device": "cpu"}
    options |= {"select": "all", "verify": "none", "training": TRAINING}
    (folder / "run.yaml").write_text(json.dumps(options))  # JSON is YAML
    run_stages(
        RunConfig.from_mapping({**options, "output": str(folder / "run")}), ("select", "score", "prune", "verify")
    )
    return folder


@pytest.fixture(scope="module")
def whole(prepared: pathlib.Path) -> pathlib.Path:
    """An uninterrupted run."""
    folder = shutil.copytree(prepared / "run", prepared / "whole")
    done = leaf("distill", "--config", prepared / "run.yaml", "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


def entries(folder: pathlib.Path) -> list[tuple[int, float]]:
    logged = (json.loads(row["entry"]) for row in open_table(folder / "distill"))
    return [(entry["step"], entry["loss"]) for entry in logged if "loss" in entry]


def assert_same_training(folder: pathlib.Path, whole: pathlib.Path) -> None:
    assert entries(folder) == entries(whole)
    assert [step for step, _ in entries(folder)] == list(range(1, STEPS + 1))
    ours, expected = (load_file(each / "model" / "model.safetensors") for each in (folder, whole))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert not [path.name for path in folder.glob("model.*")], "nothing of a killed run is left"


# Who dies where, what is resumed from then, and what is passed over. One run goes through all of them.
DEATHS = [
    (
        "1:checkpoint-2/rng_state_1.pth",
        None,
        "checkpoint-2 is passed over: it is unfinished: there is no leaf_files.json",
    ),
    ("0:checkpoint-2/model.safetensors", None, "checkpoint-2 is passed over: it is unfinished"),
    ("all:step-4", 2, ""),
    ("0:checkpoint-4/optimizer.pt", 2, "checkpoint-4 is passed over: it is unfinished"),
    ("0:checkpoint-4/leaf_files.json", 2, "checkpoint-4 is passed over: it is unfinished: there is no leaf_files.json"),
    ("0:checkpoint-4/trainer_state.json", 2, "checkpoint-4 is passed over: trainer_state.json is cut off"),
    ("1:step-6", 4, ""),
    ("0:model.tmp/model.safetensors", 7, ""),
    ("0:part-00000", 7, ""),
]


def test_a_run_that_is_killed_again_and_again(
    prepared: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = shutil.copytree(prepared / "run", tmp_path / "run")
    (folder / "model").mkdir()
    (folder / "model" / "earlier").touch()
    command = ("distill", "--config", prepared / "run.yaml", "--output", folder)
    for n, (die, _, _) in enumerate([*DEATHS, ("", None, "")]):
        begun = time.monotonic()
        done = leaf(*command, die=die)
        print(die, f"{time.monotonic() - begun:.1f} s", done.stderr)
        resumed, passed = DEATHS[n - 1][1:] if n else (None, "")
        if resumed is None:
            assert "resumed from" not in done.stderr, die
        else:
            assert f"distill: resumed from checkpoint-{resumed}\n" in done.stderr, die
        assert passed in done.stderr, die
        assert ("passed over" in done.stderr) == bool(passed), die
        assert (done.returncode != 0) == bool(die), die
        if die.endswith("model.tmp/model.safetensors"):
            assert [path.name for path in (folder / "model").iterdir()] == ["earlier"], (
                "it stays until the new one is whole"
            )
    assert_same_training(folder, whole)
