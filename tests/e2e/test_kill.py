"""kill -9 of a rank, or of all, while two of them train or cache: the next start ends where an uninterrupted run ends."""

from __future__ import annotations

import json
import pathlib
import random
import shutil
from typing import Any

import pytest
import torch
from launched import leaf
from safetensors.torch import load_file
from small import write_config

from leaf.checkpoint import damage
from leaf.tables import open_table
from leaf.teacher import TeacherCache

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
def config(tmp_path_factory: pytest.TempPathFactory, tables: tuple[dict[str, Any], pathlib.Path]) -> str:
    return write_config(tmp_path_factory.mktemp("kill") / "run.yaml", tables[0] | {"training": TRAINING})


@pytest.fixture(scope="module")
def whole(config: str, tables: tuple[dict[str, Any], pathlib.Path]) -> pathlib.Path:
    """An uninterrupted run."""
    folder = shutil.copytree(tables[1], pathlib.Path(config).with_name("whole"))
    done = leaf("distill", "--config", config, "--output", folder)
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
    ("0:model.old", 7, ""),
    ("0:part-00000", 7, ""),
]


def test_a_run_that_is_killed_again_and_again(config: str, whole: pathlib.Path, prepared: dict[str, Any]) -> None:
    folder = pathlib.Path(prepared["output"])
    (folder / "model").mkdir()
    (folder / "model" / "earlier").touch()
    command = ("distill", "--config", config, "--output", folder)
    for n, (die, _, _) in enumerate([*DEATHS, ("", None, "")]):
        done = leaf(*command, die=die)
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


def test_kills_at_any_time(tmp_path: pathlib.Path, whole: pathlib.Path, prepared: dict[str, Any]) -> None:
    """A checkpoint after every step, and one kept; whoever dies wherever the ranks are."""
    folder = pathlib.Path(prepared["output"])
    training = TRAINING | {"save_steps": 1, "save_total_limit": 1}
    command = ("distill", "--config", write_config(tmp_path / "run.yaml", prepared | {"training": training}))
    draw, killed = random.Random(0), 0
    for who in ("0", "1", "all", "0"):
        before = checkpoints(folder)
        killed += leaf(*command, die=f"{who}:after-{draw.uniform(0, 0.4):.2f}").returncode != 0
        after = checkpoints(folder)
        assert not before or (after and max(after) >= max(before)), "the only whole checkpoint was removed"
    assert killed, "they were through before"
    done = leaf(*command)
    assert done.returncode == 0, done.stderr
    assert_same_training(folder, whole)


def checkpoints(folder: pathlib.Path) -> list[int]:
    """Steps of those that are whole."""
    found = folder.glob("checkpoints/*/checkpoint-*")
    return [int(path.name.rpartition("-")[2]) for path in found if damage(path) is None]


def test_caching(tmp_path: pathlib.Path, config: str, prepared: dict[str, Any]) -> None:
    """Whose file it is dies in the midst of it; what was written is not computed again."""
    shutil.copytree(prepared["output"], tmp_path / "whole")
    options = ("--config", config, "--teacher-mode", "cached_hidden")
    options += ("--max-tokens", 40)  # a row a pack: four files, two of each rank
    command = ("cache", *options, "--output", tmp_path / "run")
    done = leaf("cache", *options, "--output", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    for die in ("all:part-00003", "all:.safetensors"):
        assert leaf(*command, die=die).returncode != 0
        with pytest.raises(ValueError, match="cache is unfinished"):
            TeacherCache(tmp_path / "run" / "cache")
        refused = leaf("distill", *options, "--output", tmp_path / "run", ranks=1)
        assert (refused.returncode, "run `leaf cache` again, it goes on" in refused.stderr) == (2, True), refused.stderr
    done = leaf(*command)
    assert done.returncode == 0, done.stderr
    assert "cache: resumed after" in done.stderr
    tables = [open_table(tmp_path / name / "cache") for name in ("whole", "run")]
    assert tables[0].rows() == tables[1].rows(), "places and checksums of all that the teacher said"
    contents = [{path.name: path.read_bytes() for path in table.path.glob("*.safetensors*")} for table in tables]
    assert contents[0] == contents[1]
    assert not list((tmp_path / "run" / "cache").glob("*.tmp"))
