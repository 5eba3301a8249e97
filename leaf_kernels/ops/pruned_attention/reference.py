"""The specification of `pruned_attention`: one segment at a time, explicit softmax, ordinary autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...layout import SharedPrefixLayout


def without_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` (whose first argument is a tensor) as written: autocast would take its fp32 products back to 16 bits."""

    @functools.wraps(fn)
    def run(first: torch.Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return fn(first, *args)

    return run


def segment_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    keep: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Masked logits [Hq, Lq, Lk] of the queries q [Lq, Hq, D] on the keys k [Lk, Hk, D] of one sequence; -inf = masked.

    Positions are those of the unpacked sequence. fp32, or fp64 for fp64 inputs.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("qhd,khd->hqk", q.to(dtype), k.to(dtype)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distance = query_positions[:, None] - key_positions[None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if keep is not None:
        visible &= keep
    return logits.masked_fill(~visible, float("-inf"))


def softmax_with_sink(logits: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [H, Lq, Lk] and lse [H, Lq] over keys; a row without keys has probabilities 0 and lse -inf."""
    has_key = (logits > float("-inf")).any(-1)
    # A row of -inf has no softmax; a row of zeros has one, and `where` gives it a gradient of exactly 0 afterwards.
    logits = torch.where(has_key[..., None], logits, 0)
    lse = torch.logsumexp(logits, -1)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    probabilities = torch.exp(logits - total[..., None])
    return torch.where(has_key[..., None], probabilities, 0), torch.where(has_key, lse, float("-inf"))


@without_autocast
def pruned_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SharedPrefixLayout,
    keep: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `pruned_attention`. Returns out [N, Hq, D] and lse [Hq, N]."""
    N, Hq, _ = q.shape
    group = Hq // k.shape[1]
    positions = layout.position_ids
    dtype = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    end = 0
    for start, end, prefix_start, prefix_len in layout.spans():
        own, prefix = slice(start, end), slice(prefix_start, prefix_start + prefix_len)

        def keys(x: torch.Tensor, prefix: slice = prefix, own: slice = own) -> torch.Tensor:
            return torch.cat([x[prefix], x[own]])

        logits = segment_logits(
            q[own],
            keys(k),
            positions[own],
            keys(positions),
            None if keep is None else keys(keep),
            scale,
            window,
            softcap,
        )
        probabilities, lse = softmax_with_sink(logits, sinks)
        values = keys(v).repeat_interleave(group, dim=1).to(dtype)
        outs.append(torch.einsum("hqk,khd->qhd", probabilities, values).to(q.dtype))
        lses.append(lse)
    outs.append(q.new_zeros(N - end, *q.shape[1:]))  # positions that belong to no segment
    lses.append(torch.full((Hq, N - end), float("-inf"), dtype=dtype, device=q.device))
    return torch.cat(outs), torch.cat(lses, dim=1)
