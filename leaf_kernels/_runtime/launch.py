"""Launching Triton kernels: one place for the device guard and for what an architecture can hold."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .precompiled import serve_precompiled

TUNED = Path(__file__).parent / "tuned"


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU. Triton reads this variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


class StandIn(NamedTuple):
    """What is there instead of a GPU."""

    architecture: str
    launch: Callable[..., object]  # (kernel, number of programs, arguments of the kernel)


_stand_in: StandIn | None = None


@contextlib.contextmanager
def instead_of_gpu(architecture: str, launch: Callable[..., object]) -> Iterator[None]:
    """Inside, ops take every tensor for one on a GPU of that configuration table, and hand their launches to `launch`."""
    global _stand_in
    before, _stand_in = _stand_in, StandIn(architecture, launch)
    try:
        yield
    finally:
        _stand_in = before


def gpu_shapes() -> contextlib.AbstractContextManager[None]:
    """Inside, ops on CPU tensors make the tensors that they would make on an H100, and launch nothing.

    Meant for fake tensors (`torch._subclasses.FakeTensorMode`), on machines without a GPU: results hold no values.
    """
    return instead_of_gpu("sm_90", lambda *_, **__: None)


def on_gpu(device: torch.device) -> bool:
    """Whether kernels serve `device`, as they do on a GPU; without a stand-in, whether it is one."""
    return device.type == "cuda" or _stand_in is not None


@functools.cache  # asked for several times in every call of an op
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result  # what a traced program runs on does not change
def architecture(device: torch.device) -> str:
    """The part of a configuration table that serves `device`.

    "sm_80" (A100: 163 KB of shared memory), "sm_90" (Hopper: 227 KB, wgmma), "sm_100" (data-centre Blackwell: 227 KB, tensor
    memory), "small" (99 KB: A10, L4, RTX 30 to 50, and every card that is not known, with a warning), "interpreter" on a
    CPU.
    """
    if _stand_in is not None:
        return _stand_in.architecture
    return _table(*_capability(device)) if device.type == "cuda" else "interpreter"


@functools.cache  # warns once
def _table(major: int, minor: int) -> str:
    if (major, minor) in ((8, 0), (9, 0), (10, 0), (10, 3)):
        return f"sm_{major}0"
    if (major, minor) not in ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1)):
        warnings.warn(
            f"leaf_kernels: no kernel configurations for GPUs of compute capability {major}.{minor}; taking the smallest, "
            "which are safe and slow. `python -m benchmarks.tune` finds better ones",
            stacklevel=2,
        )
    return "small"


@functools.cache  # asked for in every call of an op
def tuned(device: torch.device) -> dict[str, Any]:
    """The content of `tuned/<name of the GPU>.json`, which `benchmarks/tune.py` writes; empty where there is none."""
    if device.type != "cuda":
        return {}
    path = TUNED / f"{slug(torch.cuda.get_device_name(device))}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def slug(gpu: str) -> str:
    """A GPU's name as part of a path: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Runs `kernel` on a one-dimensional grid (a grid's other axes end at 65 535) on the device of its first tensor."""
    if not programs:
        return
    # Triton's default for fused multiply-adds depends on its version and on an environment variable.
    constants["enable_fp_fusion"] = True
    if _stand_in is not None:
        _stand_in.launch(kernel, programs, *args, **constants)
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type != "cuda":
        kernel[(programs,)](*args, **constants)
        return
    serve_precompiled()
    # Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(device):
        kernel[(programs,)](*args, **constants)
