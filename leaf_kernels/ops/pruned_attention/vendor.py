"""`pruned_attention` through other libraries' FlashAttention, on request, for packs without shared prefixes."""

from __future__ import annotations

import importlib
import inspect

import torch

from ...layout import SharedPrefixLayout
from ...types import Impl

_OP = "pruned_attention"


def pruned_attention_vendor(
    impl: Impl,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SharedPrefixLayout,
    keep: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    return_lse: bool,
    deterministic: bool,
) -> torch.Tensor:
    """See `pruned_attention`. Raises ValueError for what the library cannot express, ImportError where it is missing."""
    refused = {
        "a layout whose segments share prefixes": layout.has_prefix,
        "positions that belong to no segment": layout.has_tail,
        "keep": keep is not None,
        "sinks": sinks is not None,
        "return_lse (its lse is not differentiable)": return_lse,
        f"dtype {q.dtype} (float16 and bfloat16 only)": q.dtype not in (torch.float16, torch.bfloat16),
        f"tensors on {q.device.type!r}": q.device.type != "cuda",
        "softcap": softcap is not None and impl is Impl.TORCH_VARLEN,
        "deterministic=True by itself (ask for deterministic=False or torch.use_deterministic_algorithms(True))": (
            impl is Impl.TORCH_VARLEN
            and deterministic
            and _needs_grad(q, k, v)
            and not torch.are_deterministic_algorithms_enabled()
        ),
    }
    for what, asked in refused.items():
        if asked:
            raise ValueError(f"{_OP}: impl={impl.value!r} does not serve {what}; use impl='auto'")
    left = -1 if window is None else window - 1  # keys that a query sees to its left; -1: all
    if impl is Impl.TORCH_VARLEN:
        return _torch_varlen(q, k, v, layout, scale, left)
    return _flash_attn(q, k, v, layout, scale, left, softcap, deterministic)


def _needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _torch_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SharedPrefixLayout, scale: float, left: int
) -> torch.Tensor:
    try:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        parameters = set(inspect.signature(varlen_attn).parameters)
    except (ImportError, AttributeError):
        parameters = set()
    if not {"window_size", "enable_gqa"} <= parameters:
        raise ImportError(
            f"{_OP}: impl='torch_varlen' needs torch.nn.attention.varlen with window_size and enable_gqa, which torch "
            f"{torch.__version__} does not have; update torch or use impl='triton'"
        )
    starts, longest = layout.segment_starts, layout.max_len
    grouped = q.shape[1] != k.shape[1]
    options = {"scale": scale, "window_size": (left, 0), "enable_gqa": grouped}
    return varlen_attn(q, k, v, starts, starts, longest, longest, **options)


def _flash_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SharedPrefixLayout,
    scale: float,
    left: int,
    softcap: float | None,
    deterministic: bool,
) -> torch.Tensor:
    try:
        flash_attn_varlen_func = importlib.import_module("flash_attn").flash_attn_varlen_func
    except ImportError as error:
        raise ImportError(
            f"{_OP}: impl='flash_attn' needs the flash-attn package: pip install 'leaf-kernels[flash-attn]'; "
            "or use impl='triton'"
        ) from error
    starts, longest = layout.segment_starts, layout.max_len
    options = {"softmax_scale": scale, "causal": True, "window_size": (left, 0), "deterministic": deterministic}
    return flash_attn_varlen_func(
        q, k, v, starts, starts, longest, longest, softcap=0.0 if softcap is None else softcap, **options
    )
