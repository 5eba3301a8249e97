"""Tile sizes of the kernels: one shipped table, no search. `make compile-gate` shows that every entry compiles without spills."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..._runtime.launch import architecture


class Tile(NamedTuple):
    """A launch configuration: BLOCK_M rows of queries, BLOCK_N keys."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def tile_for(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The configuration of `kernel` ("forward", "backward_q", "backward_kv", "backward_fused", "mass") for a head size."""
    arch = architecture(device)
    if arch == "interpreter":
        return Tile(16, 16, 1, 1)
    return Tile(64, 64, 4, 2)
