"""A disk that is full in the midst of a training: what is said, what is left, and that the run goes on."""

from __future__ import annotations

import errno
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from launched import ROOT
from safetensors.torch import load_file
from small import Said, write_config
from transformers import TrainerState

from leaf import checkpoint, cli, tables
from leaf.config import RunConfig
from leaf.run import run_stages
from leaf.trainer import LeafTrainer

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


TRAINING = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "save_steps": 1,
    "save_total_limit": 3,
}


# What safetensors, torch and the system say; see `test_a_disk_that_is_full` for the real ones
@pytest.mark.parametrize(
    ("error", "full"),
    [
        (NO_SPACE, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(errno.EACCES, "Permission denied"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_of_a_full_disk(error: BaseException, full: bool, tmp_path: pathlib.Path) -> None:
    with pytest.raises(BaseException) as caught, checkpoint.full_disk(tmp_path, "make room"):
        raise error
    if not full:
        assert caught.value is error
        return
    assert type(caught.value) is OSError
    assert str(caught.value).startswith(f"{tmp_path} cannot be written to, ")
    assert "MiB are free: make room (" in str(caught.value)


@pytest.mark.parametrize(
    "place", ["optimizer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("state", "model", "table"))]
)
def test_training_goes_on_when_there_is_room(
    tmp_path: pathlib.Path,
    prepared: dict[str, Any],
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    earlier = tmp_path / "run" / "model"
    earlier.mkdir()
    (earlier / "earlier").touch()
    command = ["distill", "--config", write_config(tmp_path / "run.yaml", prepared | {"training": TRAINING})]
    save, model = torch.save, LeafTrainer._save

    def optimizer(content: Any, path: Any, *args: Any) -> None:
        if "checkpoint-2/optimizer" in str(path):
            pathlib.Path(path).write_bytes(b"PK")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        save(content, path, *args)

    def state(_: Any, path: str) -> None:
        pathlib.Path(path).write_text('{"glob')
        raise NO_SPACE

    def final(self: Any, folder: str, *args: Any, **kwargs: Any) -> None:
        model(self, folder, *args, **kwargs)
        if folder.endswith("model.tmp"):
            raise NO_SPACE

    def table(*_: Any) -> None:
        raise NO_SPACE

    full = {
        "optimizer": (torch, "save", optimizer),
        "state": (TrainerState, "save_to_json", state),
        "model": (LeafTrainer, "_save", final),
        "table": (tables, "_parquet", table),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*full[place])
        assert cli.main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"leaf distill: {tmp_path}/run cannot be written to, ")
    assert "make room" in error
    assert "training goes on from the last whole checkpoint" in error
    assert (earlier / "earlier").exists() == (place != "table"), "it stays until the new one is whole"

    assert cli.main(command) == 0
    said = capsys.readouterr().err
    found = {"optimizer": 1, "state": None, "model": 3, "table": 3}[place]
    assert (f"resumed from checkpoint-{found}" in said) if found else ("resumed" not in said)
    assert ("is passed over: " in said) == (place in ("optimizer", "state"))
    assert not (earlier / "earlier").exists()
    assert not list((tmp_path / "run").glob("model.*"))


def in_pages(folder: pathlib.Path) -> int:
    """What a folder takes of a tmpfs."""
    return sum(-(-file.stat().st_size // 4096) for file in folder.rglob("*") if file.is_file()) * 4096


# tmpfs in a mount namespace of its own: gone with the process, whatever becomes of it
FULL = """
set -e
mount -t tmpfs -o size={size} tmpfs {disk}
cp -r {run} {disk}/run
set +e
cd {root} && {python} -m leaf distill --config {config} --output {disk}/run
echo "exit code $?"
cp -r {disk}/run {left}
"""


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "--map-root-user", "true"], check=False).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="the kernel lets this user mount nothing",
)
@pytest.mark.parametrize("checkpoints", [0.5, 1.5, 3.1])
def test_a_disk_that_is_full(tmp_path: pathlib.Path, prepared: dict[str, Any], checkpoints: float) -> None:
    """Room for so many checkpoints; three are written, and the model."""
    options = prepared | {"training": TRAINING}
    run, config = tmp_path / "run", write_config(tmp_path / "run.yaml", options)
    whole = shutil.copytree(run, tmp_path / "whole")
    run_stages(RunConfig.from_mapping({**options, "output": str(whole)}), ("distill",))
    (size,) = map(in_pages, whole.glob("checkpoints/*/checkpoint-3"))
    (run / "model").mkdir()
    (run / "model" / "earlier").touch()
    (tmp_path / "disk").mkdir()
    script = FULL.format(
        size=in_pages(run) + int(checkpoints * size),
        disk=tmp_path / "disk",
        run=run,
        left=tmp_path / "left",
        config=config,
        python=sys.executable,
        root=ROOT,
    )
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert "exit code 2" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("leaf distill: ")]
    assert f"{tmp_path}/disk/run cannot be written to, 0." in error
    assert "MiB are free: make room (" in error
    left = tmp_path / "left"
    assert (left / "model" / "earlier").exists()

    said = Said()
    run_stages(RunConfig.from_mapping({**options, "output": str(left)}), ("distill",), said)
    resumed = [line for line in said if "resumed from" in line]
    assert resumed == ([f"distill: resumed from checkpoint-{int(checkpoints)}"] if checkpoints > 1 else [])
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, left))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not list(left.glob("model.*"))
