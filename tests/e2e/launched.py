"""`leaf` on two gloo ranks under torchrun, which is what `accelerate launch` runs; and how a rank is killed there.

Run as a script it is `leaf`, but for the rank and place that DIE names: with "1:checkpoint-4/rng_state_1.pth" rank 1 dies of
SIGKILL when it has written half of that file, with "all:step-3" every rank does in the third step, with "0:model.old" rank
0 when it has given a folder that name; "1:after-0.5" is half a second after its first step began.
"""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]


def leaf(*argv: object, ranks: int = 2, die: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A command. If a rank dies, the launcher must end the other: waiting is an error."""
    command = [sys.executable, __file__, *map(str, argv)]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "DIE": die, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=variables)


def main() -> int:
    from leaf import cli

    rank, _, place = os.environ["DIE"].partition(":")
    if place and rank in ("all", os.environ["RANK"]):
        dies(place)
    return cli.main()


def dies(place: str) -> None:
    import torch
    from transformers import TrainerState

    from leaf.trainer import LeafTrainer

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def cut(path: Any) -> None:
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    def around(owner: Any, name: str, before: Callable[..., Any] | None = None, after: Any = None) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before:
                before(*args)
            result = function(*args, **kwargs)
            if after:
                after(*args)
            return result

        setattr(owner, name, wrapped)

    def here(path: Any) -> bool:
        return place in str(path)

    def step(trainer: Any, *_: Any) -> None:
        if here(f"step-{trainer.state.global_step + 1}"):
            die()
        if place.startswith("after-") and timer.ident is None:
            timer.start()

    timer = threading.Timer(float(place.removeprefix("after-")) if place.startswith("after-") else 0, die)
    timer.daemon = True
    around(LeafTrainer, "training_step", step)
    around(torch, "save", after=lambda _, path, *__: here(path) and cut(path))
    around(TrainerState, "save_to_json", after=lambda _, path: here(path) and cut(path))
    around(
        LeafTrainer,
        "_save",
        after=lambda _, folder: here(f"{folder}/model.safetensors") and cut(f"{folder}/model.safetensors"),
    )
    around(os, "replace", lambda source, target: here(target) and cut(source))  # tables, and the list of a checkpoint
    around(os, "rename", after=lambda _, target: here(target) and die())


if __name__ == "__main__":
    sys.exit(main())
