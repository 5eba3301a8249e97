"""`pruned_attention` through scaled_dot_product_attention: buckets of similar segments, padded to one shape each.

What `impl="auto"` runs where there is no kernel. A small model's step on a CPU holds a hundred short segments: one SDPA call
per bucket instead of one per segment keeps it fast, and the padding bounds below keep it lean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils import _pytree

from ...layout import SharedPrefixLayout

_PADDING = 1.25  # a bucket's padded area may exceed its real area by this factor
_AREA = 1 << 22  # and queries x keys of a bucket stay under this, so that its mask stays small


class _Bucket(NamedTuple):
    query_rows: torch.Tensor  # [B, Lq] packed rows; padding repeats the segment's last
    key_rows: torch.Tensor  # [B, Lk]
    real: torch.Tensor  # [B, Lq] bool: not padding
    query_positions: torch.Tensor | None  # [B, Lq] in the unpacked sequence; None: no prefix, plain causal


def pruned_attention_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SharedPrefixLayout,
    keep: torch.Tensor | None,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """See `pruned_attention`. No softcap, no sinks, no lse."""
    buckets, source = layout.cached("sdpa_buckets", lambda: _plan(layout))
    group = q.shape[1] // k.shape[1]
    outs = []
    for n, bucket in enumerate(buckets):
        if keep is None:  # the same in all layers of a model that share a window
            mask, has_key = layout.cached(("sdpa_mask", n, window), lambda b=bucket: _mask(b, None, window))  # type: ignore
        else:
            mask, has_key = _mask(bucket, keep, window)
        out = F.scaled_dot_product_attention(
            _heads_first(q, bucket.query_rows),
            _heads_first(k, bucket.key_rows, group),
            _heads_first(v, bucket.key_rows, group),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        ).transpose(1, 2)  # [B, Lq, Hq, D]
        if has_key is not None:
            out = torch.where(has_key[..., None, None], out, 0)
        outs.append(out.flatten(0, 1))
    outs.append(q.new_zeros(1, *q.shape[1:]))  # what positions outside every segment read
    return torch.cat(outs).index_select(0, source)


def _heads_first(x: torch.Tensor, rows: torch.Tensor, repeat: int = 1) -> torch.Tensor:
    """x [N, H, D] gathered to [B, H * repeat, L, D]."""
    gathered = x.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)
    return gathered.repeat_interleave(repeat, dim=1) if repeat > 1 else gathered


def _mask(
    bucket: _Bucket, keep: torch.Tensor | None, window: int | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Bool mask [B, 1, Lq, Lk] (None: plain causal) and the rows [B, Lq] that have a key (None: all).

    Keys stand in order of position from 0 and are padded at the end, so causality also hides the padding.
    """
    if bucket.query_positions is None and keep is None and window is None:
        return None, None
    Lq, Lk = bucket.query_rows.shape[1], bucket.key_rows.shape[1]
    device = bucket.key_rows.device
    positions = bucket.query_positions
    if positions is None:
        positions = torch.arange(Lq, device=device).expand(bucket.query_rows.shape)
    distance = positions[..., None] - torch.arange(Lk, device=device)
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if keep is None:
        return visible[:, None], None
    visible &= keep[bucket.key_rows][:, None, :]
    has_key = visible.any(-1)
    # A row without keys would be 0/0: let it see everything, the caller zeroes it and with it its gradient.
    return (visible | ~has_key[..., None])[:, None], has_key


def _plan(layout: SharedPrefixLayout) -> tuple[list[_Bucket], torch.Tensor]:
    """Buckets, and for every packed row its place in the concatenation of the buckets' padded rows (the last: none)."""
    spans = [span for span in layout.spans() if span[1] > span[0]]
    spans.sort(key=lambda span: (span[3] > 0, span[1] - span[0] + span[3], span[1] - span[0]))
    source = torch.empty(layout.num_tokens, dtype=torch.int64)
    buckets: list[_Bucket] = []
    placed, first = 0, 0
    while first < len(spans):
        last = _bucket_end(spans, first)
        bucket = _make_bucket(spans[first:last])
        real = bucket.real.flatten().nonzero().squeeze(1)
        source[bucket.query_rows.flatten()[real]] = real + placed
        placed += bucket.query_rows.numel()
        buckets.append(_pytree.tree_map_only(torch.Tensor, lambda t: t.to(layout.device), bucket))
        first = last
    end = layout.spans()[-1][1] if layout.num_segments else 0
    source[end:] = placed
    return buckets, source.to(layout.device)


def _bucket_end(spans: list[tuple[int, int, int, int]], first: int) -> int:
    """How far the bucket that begins at `first` reaches; prefixed and plain segments never mix."""
    Lq = Lk = area = 0
    for i in range(first, len(spans)):
        start, end, _, prefix_len = spans[i]
        own = end - start
        Lq, Lk, area = max(Lq, own), max(Lk, own + prefix_len), area + own * (own + prefix_len)
        padded = (i - first + 1) * Lq * Lk
        mixed = (prefix_len > 0) != (spans[first][3] > 0)
        if i > first and (mixed or padded > _PADDING * area or padded > _AREA):
            return i
    return len(spans)


def _make_bucket(spans: list[tuple[int, int, int, int]]) -> _Bucket:
    start, end, prefix_start, prefix_len = torch.tensor(spans).T[..., None]  # each [B, 1]
    own = end - start
    i = torch.arange(int(own.max()))
    j = torch.arange(int((own + prefix_len).max()))
    real = i < own
    # Padding repeats the segment's own last row: a NaN elsewhere in the pack must not reach it through 0 · NaN.
    query_rows = torch.minimum(start + i, end - 1)
    key_rows = torch.where(j < prefix_len, prefix_start + j, torch.minimum(start + j - prefix_len, end - 1))
    return _Bucket(query_rows, key_rows, real, prefix_len + i if bool(prefix_len.any()) else None)
