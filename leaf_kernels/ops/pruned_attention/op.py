"""`pruned_attention` on a GPU: operators over the kernels, and their autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..._runtime.launch import launch, on_gpu
from ..._runtime.library import define
from ...layout import SharedPrefixLayout
from .arguments import (
    as_bytes,
    block_d,
    constants,
    contiguous,
    large_offsets,
    logit_scales,
    row_strides,
    rows_dense,
    window_size,
)
from .configs import Tile, fused_tile, tile_for
from .schedule import key_tiles, query_tiles


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor | None,
    sinks: torch.Tensor | None,
    segment_starts: torch.Tensor,
    prefix_starts: torch.Tensor,
    prefix_lens: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    tile: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    from . import kernels

    q, k, v = map(rows_dense, (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    cfg = Tile(*tile)
    launch(
        kernels.forward, len(tiles) * k.shape[1],
        q, k, v, as_bytes(keep), contiguous(sinks), segment_starts, prefix_starts, prefix_lens, tiles, out, lse,
        q.shape[0], len(prefix_lens), *row_strides(q, k, v), *logit_scales(scale, softcap), window_size(window, q.shape[0]),
        **constants(
            q, k, cfg, HAS_KEEP=keep is not None, HAS_SINKS=sinks is not None, HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None, LARGE=large_offsets(cfg, q, k, v),
        ),
    )  # fmt: skip
    return out, lse


def row_terms(
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    key_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(denominator, delta) in flat rows and d sinks [Hq] (empty without sinks); see `kernels.row_terms`."""
    from . import kernels

    N, heads, D = out.shape
    dout = rows_dense(dout)
    group = heads // key_heads
    denominator = torch.empty(key_heads, N * group, dtype=torch.float32, device=out.device)
    delta = torch.empty_like(denominator)
    dsink_rows = torch.empty_like(delta) if sinks is not None else None
    block = 2048 // block_d(D)  # 16 elements of each tensor per thread, few registers for any head size
    launch(
        kernels.row_terms, -(-N * heads // block),
        out, dout, lse, dlse, contiguous(sinks), denominator, delta, dsink_rows,
        N, *row_strides(dout), *(dlse.stride() if dlse is not None else (0, 0)),
        HEADS=heads, GROUP=group, HEAD_DIM=D, HAS_DLSE=dlse is not None, HAS_SINKS=sinks is not None,
        BLOCK_M=block, BLOCK_D=block_d(D), num_warps=4,
    )  # fmt: skip
    if dsink_rows is None:
        return denominator, delta, out.new_empty(0, dtype=torch.float32)
    return denominator, delta, dsink_rows.view(key_heads, N, group).sum(1).flatten()


def backward_q(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor | None,
    dout: torch.Tensor,
    denominator: torch.Tensor,
    delta: torch.Tensor,
    segment_starts: torch.Tensor,
    prefix_starts: torch.Tensor,
    prefix_lens: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    tile: list[int],
) -> torch.Tensor:
    from . import kernels

    q, k, v, dout = map(rows_dense, (q, k, v, dout))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cfg = Tile(*tile)
    launch(
        kernels.backward_q, len(tiles) * k.shape[1],
        q, k, v, as_bytes(keep), dout, denominator, delta, segment_starts, prefix_starts, prefix_lens, tiles, dq,
        q.shape[0], len(prefix_lens), *row_strides(q, k, v, dout), *logit_scales(scale, softcap),
        window_size(window, q.shape[0]), scale,
        **constants(
            q, k, cfg, HAS_KEEP=keep is not None, HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
            LARGE=large_offsets(cfg, q, k, v, dout),
        ),
    )  # fmt: skip
    return dq


def backward_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: torch.Tensor | None,
    dout: torch.Tensor,
    denominator: torch.Tensor,
    delta: torch.Tensor,
    segment_starts: torch.Tensor,
    prefix_starts: torch.Tensor,
    prefix_lens: torch.Tensor,
    tiles: torch.Tensor,
    dependants: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    tile: list[int],
    fused: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dk, dv, dq); dq is empty unless `fused`."""
    from . import kernels

    q, k, v, dout = map(rows_dense, (q, k, v, dout))
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty_like(dk)
    cfg = Tile(*tile)
    (N, heads, D), key_heads = q.shape, k.shape[1]
    sums = q.new_zeros(N * heads if fused else 0, block_d(D), dtype=torch.float32)
    reduce, target = _reduction(sums, cfg)
    launch(
        kernels.backward_kv, len(tiles) * key_heads,
        q, k, v, as_bytes(keep), dout, denominator, delta, segment_starts, prefix_starts, prefix_lens, tiles, dependants,
        dk, dv, target,
        N, len(prefix_lens), *row_strides(q, k, v, dout), *logit_scales(scale, softcap), window_size(window, N),
        scale,
        **constants(
            q, k, cfg, HAS_KEEP=keep is not None, HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
            LARGE=large_offsets(cfg, q, k, v, dout), DQ=reduce,
        ),
    )  # fmt: skip
    if not fused:
        return dk, dv, q.new_empty(0)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grouped = sums.view(key_heads, N, heads // key_heads, block_d(D))[..., :D].transpose(0, 1)
    torch.mul(grouped, scale, out=dq.view(grouped.shape))  # scaled, reordered and rounded in one pass
    return dk, dv, dq


def _reduction(sums: torch.Tensor, tile: Tile) -> tuple[str, Any]:
    """How the kernel adds to `sums`, and what it gets for it: a TMA descriptor, which the interpreter cannot reduce into."""
    if sums.numel() == 0:
        return "none", None
    if not on_gpu(sums.device):
        return "atomic", sums
    from triton.tools.tensor_descriptor import TensorDescriptor

    return "tma", TensorDescriptor.from_tensor(sums, [tile.block_m, sums.shape[1]])


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? keep"
_LAYOUT = "Tensor segment_starts, Tensor prefix_starts, Tensor prefix_lens, Tensor tiles"
_OPTIONS = "float scale, int? window, float? softcap, int[] tile"
_TERMS = "Tensor dout, Tensor denominator, Tensor delta"

_forward = define(
    f"pruned_attention({_INPUTS}, Tensor? sinks, {_LAYOUT}, {_OPTIONS}) -> (Tensor, Tensor)",
    forward,
    lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)),
)
_row_terms = define(
    "pruned_attention_row_terms(Tensor out, Tensor dout, Tensor lse, Tensor? dlse, Tensor? sinks, int key_heads) "
    "-> (Tensor, Tensor, Tensor)",
    row_terms,
    lambda out, dout, lse, dlse, sinks, key_heads: (
        *(lse.new_empty(key_heads, out.shape[0] * (out.shape[1] // key_heads)) for _ in range(2)),
        lse.new_empty(0 if sinks is None else out.shape[1]),
    ),
)
_backward_q = define(
    f"pruned_attention_backward_q({_INPUTS}, {_TERMS}, {_LAYOUT}, {_OPTIONS}) -> Tensor",
    backward_q,
    lambda q, *_: q.new_empty(q.shape),
)
_backward_kv = define(
    f"pruned_attention_backward_kv({_INPUTS}, {_TERMS}, {_LAYOUT}, Tensor dependants, {_OPTIONS}, bool fused) "
    "-> (Tensor, Tensor, Tensor)",
    backward_kv,
    lambda q, k, *rest: (k.new_empty(k.shape), k.new_empty(k.shape), q.new_empty(q.shape if rest[-1] else 0)),
)


class _Attention(torch.autograd.Function):
    """(out, lse) of q, k, v and sinks; everything else is constant. Tiles of the backward are None where it will not run."""

    @staticmethod
    def forward(
        ctx, q, k, v, sinks, keep, starts, prefix_starts, prefix_lens, rows, q_rows, keys, dependants, *constants
    ):
        options, tiles, fused = constants
        layout = (starts, prefix_starts, prefix_lens)
        out, lse = _forward(q, k, v, keep, sinks, *layout, rows, *options, tiles[0])
        ctx.save_for_backward(
            q, k, v, sinks, keep, out, lse, *layout, rows if q_rows is None else q_rows, keys, dependants
        )
        ctx.options, ctx.tiles, ctx.fused = options, tiles, fused
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, sinks, keep, out, lse, *layout, rows, keys, dependants = ctx.saved_tensors
        needs_q, needs_k, needs_v, needs_sinks = ctx.needs_input_grad[:4]
        if dout is None:
            dout = torch.zeros_like(out)
        denominator, delta, dsinks = _row_terms(out, dout, lse, dlse, sinks, k.shape[1])
        saved = (q, k, v, keep, dout, denominator, delta, *layout)
        dq = dk = dv = None
        fused = ctx.fused and needs_q and (needs_k or needs_v)
        if needs_k or needs_v:
            dk, dv, dq = _backward_kv(*saved, keys, dependants, *ctx.options, ctx.tiles[2], fused)
        if needs_q and not fused:
            dq = _backward_q(*saved, rows, *ctx.options, ctx.tiles[1])
        gradients = (dq, dk, dv, dsinks.to(sinks.dtype) if needs_sinks else None)
        return *(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad)), *[None] * 11


def pruned_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SharedPrefixLayout,
    keep: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pruned_attention`. Returns out [N, Hq, D] and lse [Hq, N]."""
    group, extras = q.shape[1] // k.shape[1], keep is not None or softcap is not None

    kernels = ("forward", "backward_q", "backward_kv")
    tiles = [tile_for(kernel, q.shape[2], q.dtype, q.device, extras=extras) for kernel in kernels]
    fused = None
    if not (deterministic or torch.are_deterministic_algorithms_enabled()):
        fused = fused_tile(q.shape[2], q.dtype, q.device, extras=extras)
        tiles[2] = fused or tiles[2]
    rows = query_tiles(layout, group, tiles[0].block_m)
    q_rows = keys = dependants = None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, sinks)):
        keys, dependants = key_tiles(layout, tiles[2].block_n)
        if tiles[1].block_m != tiles[0].block_m:  # else None: torch.compile refuses to pass one tensor twice
            q_rows = query_tiles(layout, group, tiles[1].block_m)
    return _Attention.apply(
        q, k, v, sinks, keep, layout.segment_starts, layout.prefix_starts, layout.prefix_lens,
        rows, q_rows, keys, dependants, (scale, window, softcap), tiles, fused is not None,
    )  # fmt: skip
