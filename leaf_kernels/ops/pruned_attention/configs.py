"""Tile sizes of the kernels: shipped tables, no search at run time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..._runtime.launch import architecture, tuned


class Tile(NamedTuple):
    """A launch configuration: BLOCK_M rows of queries, BLOCK_N keys."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# architecture → kernel → head sizes up to → (configuration, the same with `keep` or a softcap, which take registers).
# Largest tiles that compile without spills with Triton 3.6 and 3.9: see benchmarks/compile_gate.py.
TILES: dict[str, dict[str, dict[int, tuple[Tile, Tile]]]] = {
    "sm_80": {
        "forward": {
            64: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
            128: (Tile(128, 32, 8, 3), Tile(128, 32, 8, 3)),
            256: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        },
        "backward_q": {
            64: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
            128: (Tile(64, 64, 8, 2), Tile(128, 32, 8, 2)),
            256: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        },
        "backward_kv": {
            64: (Tile(64, 32, 8, 2), Tile(32, 64, 4, 2)),
            128: (Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
            256: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        },
        "mass": {
            64: (Tile(64, 64, 4, 2), Tile(64, 32, 8, 2)),
            128: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
            256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
        },
    },
    "sm_90": {
        "forward": {
            64: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
            128: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
            256: (Tile(64, 32, 8, 3), Tile(64, 32, 8, 3)),
        },
        "backward_q": {
            64: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
            128: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
            256: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        },
        "backward_kv": {
            64: (Tile(64, 128, 8, 2), Tile(64, 128, 8, 2)),
            128: (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),
            256: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        },
        "backward_fused": {
            64: (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),
            128: (Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
        },
        "mass": {
            64: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
            128: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
            256: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        },
    },
    "sm_100": {
        "forward": {
            64: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
            128: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
            256: (Tile(64, 32, 8, 3), Tile(64, 32, 8, 3)),
        },
        "backward_q": {
            64: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
            128: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
            256: (Tile(32, 32, 8, 1), Tile(64, 32, 8, 2)),
        },
        "backward_kv": {
            64: (Tile(64, 64, 8, 2), Tile(32, 128, 8, 2)),
            128: (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
            256: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        },
        "backward_fused": {
            64: (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2)),
            128: (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
        },
        "mass": {
            64: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
            128: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
            256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
        },
    },
    "small": {
        "forward": {
            64: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
            128: (Tile(128, 32, 8, 3), Tile(64, 64, 8, 2)),
            256: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 1)),
        },
        "backward_q": {
            64: (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
            128: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
            256: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        },
        "backward_kv": {
            64: (Tile(64, 32, 8, 2), Tile(16, 64, 8, 2)),
            96: (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),  # masked columns take registers
            128: (Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
            256: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        },
        "mass": {
            64: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
            128: (Tile(64, 64, 4, 2), Tile(32, 32, 8, 1)),
            256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
        },
    },
}


def _by_head_size(kernel: str, device: torch.device) -> dict[int, tuple[Tile, Tile]]:
    """What was tuned on this GPU, over what suits its architecture: the same nesting."""
    found = tuned(device).get("tiles", {}).get(kernel, {})
    own = {int(size): (Tile(*plain), Tile(*extras)) for size, (plain, extras) in found.items()}
    return {**TILES[architecture(device)].get(kernel, {}), **own}


@torch.compiler.assume_constant_result  # a traced program reads no files
def _listed(kernel: str, head_dim: int, device: torch.device, extras: bool) -> tuple[int, ...]:
    by_size = _by_head_size(kernel, device)
    return tuple(next(pair[extras] for largest, pair in by_size.items() if head_dim <= largest))


def tile_for(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device, *, extras: bool) -> Tile:
    """The configuration of "forward", "backward_q", "backward_kv" or "mass". `extras`: with `keep` or a softcap."""
    arch = architecture(device)
    if arch == "interpreter":
        return Tile(16, 16, 1, 1)
    if dtype is torch.float32:  # exact products do not run on tensor cores: for correctness, not for speed
        return Tile(16, 16, 4, 1) if head_dim > 128 else Tile(32, 32, 4, 1)
    return Tile(*_listed(kernel, head_dim, device, extras))


def fused_tile(head_dim: int, dtype: torch.dtype, device: torch.device, *, extras: bool) -> Tile | None:
    """The configuration of the fused backward, or None where it is not offered."""
    offered = "backward_fused" in TILES.get(architecture(device), {}) and head_dim <= 128
    if architecture(device) == "interpreter" or (offered and dtype is not torch.float32):
        return tile_for("backward_fused", head_dim, dtype, device, extras=extras)
    return None
