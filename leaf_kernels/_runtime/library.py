"""The `leaf_kernels::` operators: opaque to torch.compile, visible to checkpointing policies and profilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("leaf_kernels", "DEF")
LAUNCHERS: dict[Any, Callable[..., Any]] = {}  # what an operator runs


def define(schema: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines `leaf_kernels::<schema>` and returns it.

    `launcher` serves CUDA, and the CPU where Triton is interpreted; `fake` gives the outputs' shapes. The operator has no
    autograd formula of its own: an autograd.Function calls it.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, launcher, key)
    torch.library.register_fake(f"leaf_kernels::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.leaf_kernels, name).default
    LAUNCHERS[operator] = launcher
    return operator
