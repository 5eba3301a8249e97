"""What the tests on an NVIDIA GPU share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
GPU_ONLY = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU of compute capability 8.0 or newer"),
]
DEVICE, IMPL = "cuda", "triton"


@contextmanager
def no_sync() -> Iterator[None]:
    """Inside, torch raises where the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the kernels that Triton specialises inside; a kernel that comes from the cache on disk counts as well."""
    import triton

    runtime = getattr(getattr(triton, "knobs", None), "runtime", None)
    if not hasattr(runtime, "jit_cache_hook"):
        pytest.skip(f"triton {triton.__version__} has no knobs.runtime.jit_cache_hook to count compilations with")
    names: list[str] = []

    def hook(*args: Any, **details: Any) -> None:  # a true result would cancel the compilation
        names.append(getattr(details.get("fn"), "name", "kernel"))

    before, runtime.jit_cache_hook = runtime.jit_cache_hook, hook
    try:
        yield names
    finally:
        runtime.jit_cache_hook = before
