"""Runs a function on two gloo ranks. A start costs seconds: one group serves all cases of a test.

`engine` lets several engines follow each other in one group: accelerate and transformers remember the first in the
environment and in global states.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp
from accelerate import DistributedType
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


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


@contextlib.contextmanager
def engine() -> Iterator[None]:
    """An accelerate of its own, which shards on CPUs too: it has the code, and leaves FSDP out where it sees no GPU."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            if isinstance(fsdp_plugin.cpu_offload, CPUOffloadPolicy):
                fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # pinning is the GPU's
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        AcceleratorState.__init__ = original  # type: ignore[method-assign]
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state()
        if PartialState._shared_state.get("distributed_type") == DistributedType.FSDP:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
        for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
            del os.environ[name]


def launched_with(config: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` puts into the environment of its processes, but for ranks and addresses."""
    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(config), "x.py"])
    )
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    return {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_"))}
