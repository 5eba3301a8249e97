"""Arguments that the kernels of `pruned_attention` and `attention_mass` share."""

from __future__ import annotations

from typing import Any

import torch

from .configs import Tile

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = 1.4426950408889634


def obstacle(q: torch.Tensor) -> str | None:
    """Why the kernels cannot serve heads like those of `q`, if so."""
    if q.dtype not in DTYPES:
        return f"the kernel computes in float16, bfloat16 or float32, not {q.dtype}"
    if q.shape[2] > MAX_HEAD_DIM:
        return f"the kernel serves head sizes up to {MAX_HEAD_DIM}, not {q.shape[2]}"
    return None


def large_offsets(tile: Tile, *tensors: torch.Tensor) -> bool:
    """Whether the rows of a tile lie 2^31 elements or more apart in one of `tensors` [N, H, D]."""
    rows = max(tile.block_m, tile.block_n)
    return any(rows * abs(t.stride(0)) + t.shape[1] * abs(t.stride(1)) >= 2**31 for t in tensors)


def rows_dense(x: torch.Tensor) -> torch.Tensor:
    """`x` with elements of a row next to each other; only then are loads vectorised."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def window_size(window: int | None, num_tokens: int) -> int:
    """A window as kernels take it: no sequence is longer than the pack, and sums with this fit in int32."""
    return 0 if window is None else min(window, num_tokens)


def logit_scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """What `kernels.capped` takes as `scale` and `softcap`."""
    return (scale * LOG2E, 0.0) if softcap is None else (scale / softcap, softcap)


def constants(q: torch.Tensor, k: torch.Tensor, tile: Tile, **flags: Any) -> dict[str, Any]:
    """Compile-time arguments of a kernel; none of them is a length."""
    return {
        "KEY_HEADS": k.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "HEAD_DIM": q.shape[2],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d(q.shape[2]),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **flags,
    }


def block_d(head_dim: int) -> int:
    """Columns of a tile: the next power of two; a dot needs 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def row_strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:2]]


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A bool tensor as kernels read it."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
