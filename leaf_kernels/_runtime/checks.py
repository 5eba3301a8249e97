"""Validation shared by the ops. Every message names op, argument, what was wanted, what came, and the remedy."""

from __future__ import annotations

import torch


def check_tensor(op: str, name: str, value: object, ndim: int) -> torch.Tensor:
    """`value` as a dense tensor with `ndim` dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(f"{op}: {name} is a DTensor; gather it first with {name}.full_tensor()")
    if value.ndim != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} dimension(s), got shape {tuple(value.shape)}")
    return value


def check_shape(op: str, name: str, value: torch.Tensor, shape: tuple[int, ...], why: str) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape} {why}, got {tuple(value.shape)}")


def check_device(op: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and value.device != device:
            raise ValueError(f"{op}: {name} is on {value.device}, expected {device}; move it with .to({str(device)!r})")


def check_dtype(op: str, name: str, value: torch.Tensor, *allowed: torch.dtype) -> None:
    if value.dtype not in allowed:
        wanted = " or ".join(str(d) for d in allowed)
        raise TypeError(f"{op}: {name} must be {wanted}, got {value.dtype}")


def check_floating(op: str, **tensors: torch.Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and not value.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {value.dtype}")


def compute_dtype(op: str, device: torch.device, **tensors: torch.Tensor | None) -> torch.dtype:
    """The dtype that the op computes in: autocast's when it is active, else the common dtype of the tensors."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    if len(set(dtypes.values())) > 1:
        got = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"{op}: tensors must share one dtype outside autocast, got {got}; cast them or use autocast")
    return next(iter(dtypes.values()))
