"""Which implementation of an op serves a call."""

from __future__ import annotations

import warnings

import torch

from ..types import Impl
from .launch import interpreted, on_gpu

# Kernels of other libraries, served on request only and never by `auto`.
VENDOR_IMPLS = {"pruned_attention": (Impl.TORCH_VARLEN, Impl.FLASH_ATTN)}

_warned: set[tuple[str, str]] = set()


def resolve_impl(op: str, impl: str | Impl, device: torch.device, obstacle: str | None = None) -> Impl:
    """The implementation for `op` on `device`: never AUTO.

    An explicit request is honoured or refused; only "auto" may choose: the Triton kernels on NVIDIA GPUs of compute
    capability 8.0 and newer. `obstacle` says why they cannot serve this call, if so.
    """
    valid = (Impl.AUTO, Impl.TRITON, Impl.REFERENCE, *VENDOR_IMPLS.get(op, ()))
    if impl not in valid:  # Impl is a str
        raise ValueError(f"{op}: impl must be one of {', '.join(repr(i.value) for i in valid)}, got {impl!r}")
    choice = Impl(impl)
    if choice is Impl.TRITON:
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            raise ValueError(
                f"{op}: impl='triton' needs CUDA tensors, got {device.type!r}; use impl='reference', or set "
                "TRITON_INTERPRET=1 before triton is imported to run the kernels in its interpreter"
            )
        if obstacle is not None:
            raise ValueError(f"{op}: impl='triton': {obstacle}; use impl='reference'")
    if choice is not Impl.AUTO:
        return choice
    if device.type == "cpu":
        return Impl.TRITON if on_gpu(device) and obstacle is None else Impl.REFERENCE
    if device.type == "cuda" and torch.version.cuda is not None:
        if obstacle is None and torch.cuda.get_device_capability(device) < (8, 0):
            obstacle = "the kernel needs compute capability 8.0"
        if obstacle is None:
            return Impl.TRITON
        if (op, obstacle) not in _warned:
            _warned.add((op, obstacle))
            warnings.warn(f"{op}: {obstacle}; running in plain torch", stacklevel=3)
        return Impl.REFERENCE
    raise ValueError(f"{op}: impl='auto' knows CPU and NVIDIA GPUs, got {device.type!r}; pass impl='reference'")
