"""`pruned_attention`: what a user reads."""

from __future__ import annotations

import math

import torch

from ..._runtime.checks import check_device, check_dtype, check_floating, check_shape, check_tensor, compute_dtype
from ..._runtime.dispatch import resolve_impl
from ...layout import SharedPrefixLayout
from ...types import Impl
from .reference import pruned_attention_reference
from .sdpa import pruned_attention_sdpa

_OP = "pruned_attention"


def pruned_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SharedPrefixLayout,
    *,
    keep: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    impl: str | Impl = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over a pack whose segments may continue a shared prefix.

    Query i of segment s attends key j iff `keep[j]` and (`segment_starts[s] <= j <= i`, or j in the prefix of s) and, with
    a window W, `position_ids[i] - position_ids[j] < W`. A logit is `softcap * tanh(scale * q·k / softcap)`.

    Args:
        q: [N, Hq, D]. k, v: [N, Hk, D], Hq a multiple of Hk (grouped-query attention, any ratio). Any strides. All three in
            one floating-point dtype, or any under autocast.
        layout: the pack; `layout.num_tokens == N`.
        keep: [N] bool; False removes a token as a *key* from every query, itself included. It still queries. What k and v
            hold there does not matter, not even NaN.
        scale: factor on q·k; default 1/sqrt(D).
        window: sliding window in positions of the unpacked sequences; None = unlimited.
        softcap: tanh cap on the scaled logits; None = none.
        sinks: [Hq], one raw logit per query head that enters the softmax's denominator only; neither scaled nor capped.
        return_lse: also return the log-sum-exp.
        deterministic: accepted for the kernels to come; every implementation of this version is deterministic.
        impl: "auto" | "reference" | "triton". Auto on a CPU: scaled_dot_product_attention over buckets of similar segments,
            the specification itself where SDPA cannot express the call (softcap, sinks, lse).

    Returns:
        out [N, Hq, D] in the compute dtype; with `return_lse` also lse [Hq, N] (fp32, fp64 for fp64 inputs), natural log,
        over keys only: the sink is left out, so that partial results merge by their lse. A row without any key, and
        positions that belong to no segment: output 0, lse -inf, gradients 0.

    Gradients: q, k, v, sinks, through both outputs. Inputs are not modified.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_tensor(_OP, "q", q, 3)
    check_tensor(_OP, "k", k, 3)
    check_tensor(_OP, "v", v, 3)
    check_floating(_OP, q=q, k=k, v=v, sinks=sinks)
    if not isinstance(layout, SharedPrefixLayout):
        raise TypeError(
            f"{_OP}: layout must be a SharedPrefixLayout, got {type(layout).__name__}; "
            "build one with SharedPrefixLayout.from_groups or .from_lengths"
        )
    N, Hq, D = q.shape
    Hk = k.shape[1]
    check_shape(_OP, "k", k, (N, Hk, D), "to match q [N, Hq, D]")
    check_shape(_OP, "v", v, (N, Hk, D), "to match k")
    if layout.num_tokens != N:
        raise ValueError(f"{_OP}: q has {N} tokens but the layout describes {layout.num_tokens}")
    if Hk == 0 or Hq % Hk:
        raise ValueError(f"{_OP}: query heads must be a multiple of key heads, got {Hq} and {Hk}")
    if keep is not None:
        check_dtype(_OP, "keep", check_tensor(_OP, "keep", keep, 1), torch.bool)
        check_shape(_OP, "keep", keep, (N,), "to match q")
    if sinks is not None:
        check_shape(_OP, "sinks", check_tensor(_OP, "sinks", sinks, 1), (Hq,), "to match q's heads")
    if window is not None and window < 1:
        raise ValueError(f"{_OP}: window must be at least 1 (a token sees itself), got {window}; None means unlimited")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{_OP}: softcap must be positive, got {softcap}; None means no cap")
    check_device(_OP, q.device, k=k, v=v, keep=keep, sinks=sinks, segment_starts=layout.segment_starts)
    dtype = compute_dtype(_OP, q.device, q=q, k=k, v=v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = 1 / math.sqrt(max(D, 1)) if scale is None else scale

    if keep is not None:  # a removed token is gone: whatever it holds, 0 · NaN included, reaches nobody
        k, v = (x.masked_fill(~keep[:, None, None], 0) for x in (k, v))
    resolve_impl(_OP, impl, q.device)  # refuses what cannot be served; the Triton kernels are still to come
    if Impl(impl) is Impl.AUTO and softcap is None and sinks is None and not return_lse:
        return pruned_attention_sdpa(q, k, v, layout, keep, scale, window)
    out, lse = pruned_attention_reference(q, k, v, layout, keep, scale, window, softcap, sinks)
    return (out, lse) if return_lse else out
