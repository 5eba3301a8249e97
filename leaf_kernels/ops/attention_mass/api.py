"""`attention_mass`: what a user reads."""

from __future__ import annotations

import math

import torch

from ..._runtime.checks import check_device, check_dtype, check_floating, check_shape, check_tensor
from ..._runtime.dispatch import resolve_impl
from ...layout import SharedPrefixLayout
from ...types import Impl
from .reference import attention_mass_reference

_OP = "attention_mass"


def attention_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    layout: SharedPrefixLayout,
    *,
    queries: torch.Tensor,
    keep: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    impl: str | Impl = "auto",
) -> torch.Tensor:
    """How much attention each token receives: column sums of the softmax of `pruned_attention` over chosen queries.

    Args:
        q: [N, Hq, D]. k: [N, Hk, D]. layout, keep, scale, window, softcap, sinks: as in `pruned_attention`.
        queries: [N] bool, the rows whose attention is summed. Queries of several segments add up on shared columns.

    Returns:
        [Hq, N], fp32 (fp64 for fp64 inputs); not differentiable. The sum over N is the number of chosen queries that have a
        key (less what the sinks take). Memory is O(N): the probabilities are never held for more than a few queries.
    """
    check_tensor(_OP, "q", q, 3)
    check_tensor(_OP, "k", k, 3)
    check_floating(_OP, q=q, k=k, sinks=sinks)
    if not isinstance(layout, SharedPrefixLayout):
        raise TypeError(f"{_OP}: layout must be a SharedPrefixLayout, got {type(layout).__name__}")
    N, Hq, D = q.shape
    check_shape(_OP, "k", k, (N, k.shape[1], D), "to match q [N, Hq, D]")
    if layout.num_tokens != N:
        raise ValueError(f"{_OP}: q has {N} tokens but the layout describes {layout.num_tokens}")
    if k.shape[1] == 0 or Hq % k.shape[1]:
        raise ValueError(f"{_OP}: query heads must be a multiple of key heads, got {Hq} and {k.shape[1]}")
    for name, mask in (("queries", queries), ("keep", keep)):
        if mask is not None or name == "queries":
            check_dtype(_OP, name, check_tensor(_OP, name, mask, 1), torch.bool)
            check_shape(_OP, name, mask, (N,), "to match q")  # type: ignore[arg-type]  # checked above
    if sinks is not None:
        check_shape(_OP, "sinks", check_tensor(_OP, "sinks", sinks, 1), (Hq,), "to match q's heads")
    if window is not None and window < 1:
        raise ValueError(f"{_OP}: window must be at least 1, got {window}; None means unlimited")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{_OP}: softcap must be positive, got {softcap}; None means no cap")
    check_device(_OP, q.device, k=k, queries=queries, keep=keep, sinks=sinks, segment_starts=layout.segment_starts)
    scale = 1 / math.sqrt(max(D, 1)) if scale is None else scale

    resolve_impl(_OP, impl, q.device)  # refuses what cannot be served; the Triton kernel is still to come
    return attention_mass_reference(q, k, layout, queries, keep, scale, window, softcap, sinks)
