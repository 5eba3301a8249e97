"""`attention_mass`: what a user reads."""

from __future__ import annotations

import math

import torch

from ..._runtime.checks import check_device, compute_dtype
from ..._runtime.dispatch import resolve_impl
from ...layout import SharedPrefixLayout
from ...types import Impl
from ..pruned_attention.arguments import obstacle
from ..pruned_attention.checks import check_attention, check_token_mask
from .op import attention_mass_triton
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
        queries: [N] bool, the rows whose attention is summed. Queries of several segments add up on shared columns; a row of
            a shared prefix counts once, not once per member.
        impl: "auto" (the Triton kernels on NVIDIA GPUs of compute capability 8.0 and newer, else plain torch), "triton",
            "reference".

    Returns:
        [Hq, N], fp32 (fp64 for fp64 inputs); not differentiable. The sum over N is the number of chosen queries that have a
        key (less what the sinks take). Memory is O(N): the probabilities are never held for more than a few queries.
        Work follows the range from the first to the last chosen query of each segment. The plain torch implementation reads
        `queries` on the host; the kernel does not.
    """
    check_attention(_OP, q, k, layout, keep, window, softcap, sinks)
    check_token_mask(_OP, "queries", queries, q.shape[0])
    check_device(_OP, q.device, queries=queries)
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    dtype = compute_dtype(_OP, q.device, q=q, k=k)
    q, k = q.to(dtype), k.to(dtype)

    if resolve_impl(_OP, impl, q.device, obstacle(q)) is Impl.TRITON:
        return attention_mass_triton(q, k, layout, queries, keep, scale, window, softcap, sinks)
    return attention_mass_reference(q, k, layout, queries, keep, scale, window, softcap, sinks)
