"""`pruned_attention`: what a user reads."""

from __future__ import annotations

import math

import torch

from ..._runtime.checks import check_device, check_floating, check_shape, check_tensor, compute_dtype
from ..._runtime.dispatch import VENDOR_IMPLS, resolve_impl
from ...layout import SharedPrefixLayout
from ...types import Impl
from .arguments import obstacle
from .checks import check_attention
from .op import pruned_attention_triton
from .reference import pruned_attention_reference
from .sdpa import pruned_attention_sdpa
from .vendor import pruned_attention_vendor

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
        q: [N, Hq, D]. k, v: [N, Hk, D], Hq a multiple of Hk (grouped-query attention, any ratio). All three in one
            floating-point dtype, or any under autocast. Any strides; the kernels copy a tensor whose heads have gaps inside.
        layout: the pack; `layout.num_tokens == N`.
        keep: [N] bool; False removes a token as a *key* from every query, itself included. It still queries. What k and v
            hold there does not matter, not even NaN.
        scale: factor on q·k; default 1/sqrt(D).
        window: sliding window in positions of the unpacked sequences; None = unlimited.
        softcap: tanh cap on the scaled logits; None = none.
        sinks: [Hq], one raw logit per query head that enters the softmax's denominator only; neither scaled nor capped.
        return_lse: also return the log-sum-exp. (The kernels' gradient through it fades to 0 where a sink lies more than 69
            above it.)
        deterministic: True: the backward sums in a fixed order, without atomics; runs repeat bitwise. False allows a fused
            backward that does five matrix products instead of seven and adds dq in no fixed order, on GPUs of compute
            capability 9.0 and 10.0 and head sizes up to 128. `torch.use_deterministic_algorithms(True)` overrides False.
        impl: "auto": the Triton kernels on NVIDIA GPUs of compute capability 8.0 and newer (float64 and head sizes above 256
            run in plain torch there, with one warning); on a CPU scaled_dot_product_attention over buckets of similar
            segments, or the specification itself where SDPA cannot express the call (softcap, sinks, lse).
            "triton", "reference": that and nothing else. "torch_varlen", "flash_attn": FlashAttention of torch or of the
            flash-attn package, for layouts without prefixes and tail, without keep, sinks and lse.

    Returns:
        out [N, Hq, D] in the compute dtype; with `return_lse` also lse [Hq, N] (fp32, fp64 for fp64 inputs), natural log,
        over keys only: the sink is left out, so that partial results merge by their lse. A row without any key, and
        positions that belong to no segment: output 0, lse -inf, gradients 0.

    Gradients: q, k, v, sinks, through both outputs, once (the kernels refuse a double backward). Inputs are not modified.
    The kernels allocate nothing of size N², no expanded keys or values, and never wait for the device. They multiply in the
    compute dtype into fp32; the softmax is fp32.

    Raises:
        ValueError, TypeError: naming the argument. ImportError: an implementation that was asked for is not installed.
    """
    check_attention(_OP, q, k, layout, keep, window, softcap, sinks)
    check_tensor(_OP, "v", v, 3)
    check_floating(_OP, v=v)
    check_shape(_OP, "v", v, tuple(k.shape), "to match k")
    check_device(_OP, q.device, v=v)
    dtype = compute_dtype(_OP, q.device, q=q, k=k, v=v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale

    choice = resolve_impl(_OP, impl, q.device, obstacle(q))
    if choice in VENDOR_IMPLS[_OP]:
        return pruned_attention_vendor(
            choice, q, k, v, layout, keep, scale, window, softcap, sinks, return_lse, deterministic
        )
    if choice is Impl.TRITON:
        out, lse = pruned_attention_triton(q, k, v, layout, keep, scale, window, softcap, sinks, deterministic)
        return (out, lse) if return_lse else out
    if keep is not None:  # a removed token is gone: whatever it holds, 0 · NaN included, reaches nobody
        k, v = (x.masked_fill(~keep[:, None, None], 0) for x in (k, v))
    if Impl(impl) is Impl.AUTO and softcap is None and sinks is None and not return_lse:
        return pruned_attention_sdpa(q, k, v, layout, keep, scale, window)
    out, lse = pruned_attention_reference(q, k, v, layout, keep, scale, window, softcap, sinks)
    return (out, lse) if return_lse else out
