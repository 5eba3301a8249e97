"""Which implementation of an op serves a call."""

from __future__ import annotations

import warnings

import torch

from ..types import Impl
from .launch import interpreted

# Ops that have a Triton implementation. `auto` picks it on NVIDIA GPUs of compute capability 8.0 and newer.
TRITON_OPS = frozenset({"pruned_attention", "attention_mass"})

_warned: set[str] = set()


def resolve_impl(op: str, impl: str | Impl, device: torch.device) -> Impl:
    """The implementation for `op` on `device`: never AUTO.

    An explicit request is honoured or refused; only "auto" may choose.
    """
    try:
        choice = Impl(impl)
    except ValueError:
        valid = ", ".join(repr(i.value) for i in Impl)
        raise ValueError(f"{op}: impl must be one of {valid}, got {impl!r}") from None
    if choice is Impl.REFERENCE:
        return choice
    has_kernel = op in TRITON_OPS
    if choice is Impl.TRITON:
        if not has_kernel:
            raise NotImplementedError(f"{op}: this version has no Triton kernel; use impl='auto' or impl='reference'")
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            raise ValueError(
                f"{op}: impl='triton' needs CUDA tensors, got {device.type!r}; use impl='reference', or set TRITON_INTERPRET=1 "
                "before the first import of triton to run the kernels in Triton's interpreter"
            )
        return choice
    if device.type == "cpu":
        return Impl.REFERENCE
    if device.type == "cuda" and torch.version.cuda is not None:
        if has_kernel and torch.cuda.get_device_capability(device) >= (8, 0):
            return Impl.TRITON
        if op not in _warned:
            _warned.add(op)
            why = "needs compute capability 8.0" if has_kernel else "has no Triton kernel in this version"
            warnings.warn(f"{op}: {why}; running in plain torch", stacklevel=3)
        return Impl.REFERENCE
    raise ValueError(f"{op}: impl='auto' knows CPU and NVIDIA GPUs, got {device.type!r}; pass impl='reference'")
