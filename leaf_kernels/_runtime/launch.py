"""Launching Triton kernels: one place for the device guard and for what an architecture can hold."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).parent / "tuned"


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU. Triton reads this variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


_shapes_only = False


@contextlib.contextmanager
def gpu_shapes() -> Iterator[None]:
    """Inside, ops on CPU tensors make the tensors that they would make on an H100, and launch nothing.

    Meant for fake tensors (`torch._subclasses.FakeTensorMode`), on machines without a GPU: results hold no values.
    """
    global _shapes_only
    _shapes_only = True
    try:
        yield
    finally:
        _shapes_only = False


def on_gpu(device: torch.device) -> bool:
    """Whether kernels serve `device`, as they do on a GPU; without `gpu_shapes`, whether it is one."""
    return device.type == "cuda" or _shapes_only


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
    if _shapes_only:
        return "sm_90"
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


@functools.cache
def tuned(device: torch.device) -> dict[str, Any]:
    """The content of `tuned/<name of the GPU>.json`, which `benchmarks/tune.py` writes; empty where there is none."""
    if device.type != "cuda" or _shapes_only:
        return {}
    path = TUNED / f"{slug(torch.cuda.get_device_name(device))}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def slug(gpu: str) -> str:
    """ "NVIDIA H200" → "nvidia-h200": a GPU's name as part of a path."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Runs `kernel` on a one-dimensional grid (a grid's other axes end at 65 535) on the device of its first tensor."""
    if _shapes_only:
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    # Triton launches on the current device, whatever device the tensors are on.
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    if programs:
        with guard:
            # Triton's default for fused multiply-adds depends on its version and on an environment variable.
            kernel[(programs,)](*args, **constants, enable_fp_fusion=True)
