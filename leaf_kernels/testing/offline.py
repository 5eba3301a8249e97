"""Compiling kernels for GPUs that are not there: through the launch code that runs on them, up to machine code."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from .._runtime.launch import instead_of_gpu

CAPABILITY = {"sm_80": 80, "sm_86": 86, "sm_89": 89, "sm_90": 90, "sm_100": 100, "sm_120": 120}
# Shared memory that one block may have, bytes
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
TENSOR_MEMORY_COLUMNS = 512  # what a block may have on sm_100; a kernel that asks for more compiles to a trap


class Compiled(NamedTuple):
    """One kernel, compiled for one architecture."""

    kernel: str
    registers: int  # per thread
    stack: int  # bytes per thread: spilled registers live there
    shared: int  # bytes per block
    tensor_memory: int  # columns
    instructions: frozenset[str]  # mnemonics of the machine code, with their modifiers


@contextmanager
def compile_offline(arch: str) -> Iterator[list[Compiled]]:
    """Inside, kernels are compiled for `arch` instead of run; on exit, the list holds what became of them.

    Ops take every tensor for one on that GPU: call operators' launchers on tensors of device "meta", or public functions on
    fake CPU tensors. Needs no GPU and no CUDA toolkit: Triton brings its assembler and disassembler. Triton must not run in
    its interpreter.
    """
    compiled: list[Compiled] = []
    with compile_instead(arch) as kernels:
        yield compiled
        compiled.extend(map(_inspect, kernels))


@contextmanager
def compile_instead(arch: str) -> Iterator[list[Any]]:
    """As `compile_offline`; the list gets what Triton returns, a kernel once, None where a hook kept it from compiling."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    if arch not in CAPABILITY:
        raise ValueError(f"compile_offline: arch must be one of {', '.join(CAPABILITY)}, got {arch!r}")
    if knobs.runtime.interpret:
        raise RuntimeError(
            "compile_offline: Triton runs in its interpreter here; start the process without TRITON_INTERPRET=1"
        )
    kernels: list[Any] = []
    seen: set[int] = set()

    def compile_kernel(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        pointers = [_Pointer(a) if isinstance(a, torch.Tensor) else a for a in args]
        result = kernel.warmup(*pointers, grid=(programs,), **constants)
        if id(result) not in seen:
            seen.add(id(result))
            kernels.append(result)

    # Triton keeps compiled kernels by device: every call is one of its own.
    stand_in = mock.Mock()
    stand_in.get_current_device.return_value = f"{arch} offline {id(kernels)}"
    stand_in.get_current_stream.return_value = 0
    stand_in.get_current_target.return_value = GPUTarget("cuda", CAPABILITY[arch], 32)
    table = arch if arch in ("sm_80", "sm_90", "sm_100") else "small"
    previous = driver._active  # None where there is no GPU
    driver._active = stand_in
    try:
        with instead_of_gpu(table, compile_kernel):
            yield kernels
    finally:
        driver._active = previous


class _Pointer:
    """What a launch specialises on of a tensor: a torch allocator aligns storages, and views may begin anywhere."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self.address = int(tensor.storage_offset()) * tensor.itemsize

    def data_ptr(self) -> int:
        return self.address


def _inspect(kernel: Any) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", path)
        sass = _cuobjdump("--dump-sass", path)
    numbers = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", usage))
    return Compiled(
        kernel.metadata.name,
        int(numbers["REG"]),
        int(numbers["STACK"]),
        kernel.metadata.shared,
        int(getattr(kernel.metadata, "tmem_size", 0) or 0),
        frozenset(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)),
    )


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}  # it calls nvdisasm
    command = [str(tools / "cuobjdump"), option, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
