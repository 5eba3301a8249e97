"""Runs a function on two gloo ranks. A start costs seconds: one group serves all cases of a test."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


def _worker(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple, out: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    try:
        result: tuple[str, Any] = ("ok", function(*args))
    except Exception:
        result = ("error", traceback.format_exc())
    Path(out, f"{rank}.pickle").write_bytes(pickle.dumps(result))


def on_ranks(function: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    """`function(*args)` on every rank of a new process group; its results in order of rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        mp.start_processes(
            _worker, args=(world_size, port, function, args, out), nprocs=world_size, start_method="spawn"
        )
        results = [pickle.loads(Path(out, f"{rank}.pickle").read_bytes()) for rank in range(world_size)]
    errors = [value for status, value in results if status == "error"]
    if errors:
        raise RuntimeError(errors[0])
    return [value for _, value in results]
