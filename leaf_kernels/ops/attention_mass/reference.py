"""The specification of `attention_mass`."""

from __future__ import annotations

import torch

from ...layout import SharedPrefixLayout
from ..pruned_attention.reference import segment_logits, softmax_with_sink, without_autocast

_QUERIES = 128  # probabilities are held for this many queries at a time


@torch.no_grad()
@without_autocast
def attention_mass_reference(
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
    dtype = torch.promote_types(q.dtype, torch.float32)
    mass = torch.zeros(q.shape[1], q.shape[0], dtype=dtype, device=q.device)
    positions = layout.position_ids
    for start, end, prefix_start, prefix_len in layout.spans():
        own = torch.arange(start, end, device=q.device)
        prefix = torch.arange(prefix_start, prefix_start + prefix_len, device=q.device)
        keys = torch.cat([prefix, own])
        for rows in own[queries[start:end]].split(_QUERIES):
            logits = segment_logits(
                q[rows],
                k[keys],
                positions[rows],
                positions[keys],
                None if keep is None else keep[keys],
                scale,
                window,
                softcap,
            )
            mass.index_add_(1, keys, softmax_with_sink(logits, sinks)[0].sum(1))
    return mass
