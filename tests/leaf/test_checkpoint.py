"""Which checkpoint a training goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from training import arguments, groups, model

from leaf.checkpoint import damage, last_whole
from leaf.trainer import LeafTrainer


def trainer(output: Path, **options: object) -> LeafTrainer:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "learning_rate": 1e-2, **options}
    return LeafTrainer(model(0), model(1, hidden=32), arguments(output, **options), groups())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer(folder).train()
    return folder


@pytest.mark.parametrize(
    ("file", "left", "why"),
    [
        ("optimizer.pt", 100, "optimizer.pt has 100 of "),
        ("optimizer.pt", None, "optimizer.pt is missing"),
        ("rng_state.pth", 0, "rng_state.pth has 0 of "),
        ("rng_state.pth", None, "rng_state.pth is missing"),
        ("scheduler.pt", None, "scheduler.pt is missing"),
        ("model.safetensors", 1000, "model.safetensors has 1000 of "),
        ("trainer_state.json", 30, "trainer_state.json is cut off"),
        ("trainer_state.json", None, "it is unfinished: there is no trainer_state.json"),
        ("leaf_files.json", 10, "leaf_files.json is cut off"),
        ("leaf_files.json", None, "it is unfinished: there is no leaf_files.json"),
    ],
)
def test_what_is_not_whole_is_passed_over(trained: Path, tmp_path: Path, file: str, left: int | None, why: str) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    said: list[str] = []
    assert last_whole(folder, said.append) == folder / "checkpoint-3"
    assert not said
    damaged = folder / "checkpoint-3" / file
    content = damaged.read_bytes()
    damaged.unlink()
    if left is not None:
        damaged.write_bytes(content[:left])
    assert last_whole(folder, said.append) == folder / "checkpoint-2"
    (line,) = said
    assert line.startswith(f"distill: checkpoint-3 is passed over: {why}")


def test_none_is_whole(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    for checkpoint in folder.iterdir():
        (checkpoint / "optimizer.pt").unlink()
    said: list[str] = []
    assert last_whole(folder, said.append) is None
    assert [line.split()[1] for line in said] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]
    assert last_whole(tmp_path / "nothing", said.append) is None


def test_a_checkpoint_that_is_written_anew_is_not_whole_before_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path).train()
    checkpoint, found = tmp_path / "checkpoint-2", []
    save = LeafTrainer._save_optimizer_and_scheduler

    def look(self: LeafTrainer, folder: str) -> None:
        save(self, folder)
        if folder == str(checkpoint):
            found.append(damage(checkpoint))

    monkeypatch.setattr(LeafTrainer, "_save_optimizer_and_scheduler", look)
    trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert found == ["it is unfinished: there is no leaf_files.json"]
    assert damage(checkpoint) is None


def test_resumed_from_its_last_step_nothing_is_left_to_do(trained: Path, tmp_path: Path) -> None:
    """Three steps of two an epoch: the Trainer alone would take a fourth one."""
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(trained / "checkpoint-3"))
    assert resumed.state.global_step == 3
