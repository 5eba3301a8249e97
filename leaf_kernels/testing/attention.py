"""What `pruned_attention` is held against where [tokens, tokens] does not fit: textbook code over chunks of queries."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..layout import SharedPrefixLayout


class AttentionResult(NamedTuple):
    """Outputs and gradients, in the shapes of `pruned_attention`."""

    out: torch.Tensor  # [N, Hq, D]
    lse: torch.Tensor  # [Hq, N]
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dsinks: torch.Tensor | None


def attention_in_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SharedPrefixLayout,
    upstream: torch.Tensor,
    *,
    upstream_lse: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    max_logits: int = 1 << 26,
) -> AttentionResult:
    """Attention and its gradients as model code computes them: the oracle in fp64, "plain torch" in 16 bits.

    Products are in the dtype of the inputs, the softmax in fp32 (fp64 for fp64 inputs) and rounded to that dtype. At most
    `max_logits` logits exist at a time, so any length fits; heads are independent, so a long sequence is checked on the
    queries of one key head (slice q, k, v, upstream and the op's results alike). Gradients are summed over chunks in fp32.

    Args:
        upstream, upstream_lse: [N, Hq, D] and [Hq, N], the gradients of `out` and `lse`. The latter must be 0 where the lse
            is -inf.

    Everything else is as in `pruned_attention`.
    """
    N, Hq, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(D) if scale is None else scale
    positions = layout.position_ids
    out, lse = torch.zeros_like(q), torch.full((Hq, N), float("-inf"), dtype=wide, device=q.device)
    sums = [torch.zeros_like(x, dtype=wide) for x in (q, k, v)]
    dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=wide)
    for start, end, prefix_start, prefix_len in layout.spans():
        step = max(1, max_logits // (Hq * max(1, prefix_len + end - start)))
        for first in range(start, end, step):
            last = min(first + step, end)
            rows = torch.arange(first, last, device=q.device)
            prefix = torch.arange(prefix_start, prefix_start + prefix_len, device=q.device)
            keys = torch.cat([prefix, torch.arange(start, last, device=q.device)])
            distance = positions[rows][:, None] - positions[keys]
            visible = (distance >= 0) & (distance < (window or math.inf))
            if keep is not None:
                visible &= keep[keys]
            leaves = [x.detach().requires_grad_() for x in (q[rows], k[keys], v[keys])]
            if sinks is not None:
                leaves.append(sinks.detach().requires_grad_())
            o, chunk_lse = _attend(leaves, visible, scale, softcap)
            out[rows], lse[:, rows] = o.detach(), chunk_lse.detach()
            results, gradients = [o], [upstream[rows].to(q.dtype)]
            if upstream_lse is not None:
                results, gradients = [o, chunk_lse], [*gradients, upstream_lse[:, rows].to(wide)]
            dq, dk, dv, *ds = torch.autograd.grad(results, leaves, gradients)
            for total, index, part in zip(sums, (rows, keys, keys), (dq, dk, dv)):
                total.index_add_(0, index, part.to(wide))
            if dsinks is not None:
                dsinks += ds[0]
    dq, dk, dv = (x.to(q.dtype) for x in sums)
    return AttentionResult(out, lse, dq, dk, dv, None if dsinks is None or sinks is None else dsinks.to(sinks.dtype))


def _attend(
    leaves: list[torch.Tensor], visible: torch.Tensor, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [Lq, Hq, D] and lse [Hq, Lq] of one chunk of q [Lq, Hq, D] on k, v [Lk, Hk, D], with or without sinks [Hq]."""
    q, k, v, *sinks = leaves
    # Expanded, as model code does it: gradients of one key head are rounded per query head before they are summed
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(torch.promote_types(q.dtype, torch.float32))
    has_key = visible.any(-1)
    # A row without keys would be 0/0: it sees everything, and `where` zeroes its result and its gradient.
    logits = logits.masked_fill(~(visible | ~has_key[:, None]), float("-inf"))
    lse = torch.logsumexp(logits, -1)
    total = torch.logaddexp(lse, sinks[0].to(lse.dtype)[:, None]) if sinks else lse
    probabilities = torch.exp(logits - total[..., None]).to(q.dtype)
    out = torch.einsum("hqk,khd->qhd", probabilities, v)
    return torch.where(has_key[:, None, None], out, 0), torch.where(has_key, lse, float("-inf"))
