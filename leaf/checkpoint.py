"""Checkpoints that a killed run can trust, and what to say when the disk is full.

A checkpoint is whole if it has the list of its files, which is written when every rank has written its own, each file is as
long as the list says, and `trainer_state.json`, which the Trainer writes after that, can be read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

from .tables import write_text

FILES = "leaf_files.json"
STATE = "trainer_state.json"
# What torch.save says of a write that failed, without the system's reason
_TORCH_SAVE = ("inline_container", "PytorchStreamWriter")


def vouch(checkpoint: pathlib.Path) -> None:
    """Writes the list of the files that are there."""
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name not in (FILES, STATE))
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_text(checkpoint / FILES, json.dumps(sizes, indent=1))


def damage(checkpoint: pathlib.Path) -> str | None:
    """Why a checkpoint is not whole."""
    contents = {}
    for name in (FILES, STATE):
        try:
            contents[name] = json.loads((checkpoint / name).read_text())
        except FileNotFoundError:
            return f"it is unfinished: there is no {name}"
        except ValueError:
            return f"{name} is cut off"
    for name, size in contents[FILES].items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found} of {size} bytes"
    return None


def last_whole(folder: pathlib.Path, say: Callable[[str], None]) -> pathlib.Path | None:
    """The newest whole checkpoint under `folder`; `say` is told why newer ones are passed over."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        why = damage(checkpoint)
        if why is None:
            return checkpoint
        say(f"distill: {checkpoint.name} is passed over: {why}")
    return None


def _step(checkpoint: pathlib.Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


@contextlib.contextmanager
def full_disk(folder: pathlib.Path, remedy: str) -> Iterator[None]:
    """Turns what any library says of a full disk into an OSError that names `folder` and `remedy`."""
    try:
        yield
    except BaseException as error:  # torch.distributed.checkpoint has one that is no Exception
        reasons = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), *_TORCH_SAVE)
        if not any(reason in str(error) for reason in reasons):
            raise
        free = shutil.disk_usage(folder).free / 2**20
        raise OSError(f"{folder} cannot be written to, {free:,.1f} MiB are free: {remedy} ({error})") from error
