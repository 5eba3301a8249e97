"""`attention_mass` on a GPU: one operator over two kernels."""

from __future__ import annotations

import torch

from ..._runtime.launch import launch
from ..._runtime.library import define
from ...layout import SharedPrefixLayout
from ..pruned_attention.arguments import (
    as_bytes,
    constants,
    contiguous,
    large_offsets,
    logit_scales,
    row_strides,
    rows_dense,
    window_size,
)
from ..pruned_attention.configs import Tile, tile_for
from ..pruned_attention.schedule import key_tiles, query_tiles


def mass(
    q: torch.Tensor,
    k: torch.Tensor,
    queries: torch.Tensor,
    chosen: torch.Tensor,
    keep: torch.Tensor | None,
    sinks: torch.Tensor | None,
    segment_starts: torch.Tensor,
    prefix_starts: torch.Tensor,
    prefix_lens: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    dependants: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    tile: list[int],
) -> torch.Tensor:
    from . import kernels

    q, k = map(rows_dense, (q, k))
    N, heads, _ = q.shape
    out = torch.empty(heads, N, dtype=torch.float32, device=q.device)
    denominator = torch.full((heads * N,), float("inf"), dtype=torch.float32, device=q.device)
    cfg = Tile(*tile)
    layout = (segment_starts, prefix_starts, prefix_lens)
    scalars = (N, len(prefix_lens), *row_strides(q, k), *logit_scales(scale, softcap), window_size(window, N))
    flags = constants(
        q, k, cfg, HAS_KEEP=keep is not None, HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
        LARGE=large_offsets(cfg, q, k),
    )  # fmt: skip
    launch(
        kernels.denominators, len(rows) * k.shape[1],
        q, k, as_bytes(keep), contiguous(sinks), as_bytes(queries), *layout, rows, denominator, *scalars,
        **flags, HAS_SINKS=sinks is not None,
    )  # fmt: skip
    launch(
        kernels.column_sums, len(keys) * heads,
        q, k, as_bytes(keep), denominator, chosen, *layout, keys, dependants, out, *scalars, **flags,
    )  # fmt: skip
    return out


_mass = define(
    "attention_mass(Tensor q, Tensor k, Tensor queries, Tensor chosen, Tensor? keep, Tensor? sinks, Tensor segment_starts, "
    "Tensor prefix_starts, Tensor prefix_lens, Tensor rows, Tensor keys, Tensor dependants, "
    "float scale, int? window, float? softcap, int[] tile) -> Tensor",
    mass,
    lambda q, *_: q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32),
)


def chosen_ranges(layout: SharedPrefixLayout, queries: torch.Tensor) -> torch.Tensor:
    """[2, S + 1] int32: per segment the first and one past the last position of a chosen query; empty where none is."""
    N = queries.shape[0]
    position = torch.arange(N, device=queries.device, dtype=torch.int32)
    first = position.new_full((layout.prefix_lens.shape[0] + 1,), N)
    first.scatter_reduce_(0, layout.segment_ids, torch.where(queries, position, N), "amin")
    end = torch.zeros_like(first).scatter_reduce_(0, layout.segment_ids, torch.where(queries, position + 1, 0), "amax")
    return torch.stack([first, end])


@torch.no_grad()
def attention_mass_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    layout: SharedPrefixLayout,
    queries: torch.Tensor,
    keep: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """See `attention_mass`."""
    extras = keep is not None or softcap is not None
    tile = tile_for("mass", q.shape[2], q.dtype, q.device, extras=extras)
    rows = query_tiles(layout, q.shape[1] // k.shape[1], tile.block_m)
    keys, dependants = key_tiles(layout, tile.block_n)
    starts = (layout.segment_starts, layout.prefix_starts, layout.prefix_lens)
    return _mass(
        q,
        k,
        queries,
        chosen_ranges(layout, queries),
        keep,
        sinks,
        *starts,
        rows,
        keys,
        dependants,
        scale,
        window,
        softcap,
        tile,
    )
