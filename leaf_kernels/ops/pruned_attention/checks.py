"""Validation of the arguments that `pruned_attention` and `attention_mass` share."""

from __future__ import annotations

import torch

from ..._runtime.checks import check_device, check_dtype, check_floating, check_shape, check_tensor
from ...layout import SharedPrefixLayout


def check_attention(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    layout: SharedPrefixLayout,
    keep: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """Raises ValueError or TypeError, naming op, argument, what was wanted and what came."""
    if isinstance(q, torch.Tensor) and q.ndim == 4:
        raise ValueError(
            f"{op}: q must be [N, Hq, D], got shape {tuple(q.shape)}; for [1, H, N, D], as transformers has it, pass "
            "x[0].transpose(0, 1)"
        )
    check_tensor(op, "q", q, 3)
    check_tensor(op, "k", k, 3)
    check_floating(op, q=q, k=k, sinks=sinks)
    if not isinstance(layout, SharedPrefixLayout):
        raise TypeError(
            f"{op}: layout must be a SharedPrefixLayout, got {type(layout).__name__}; "
            "build one with SharedPrefixLayout.from_groups or .from_lengths"
        )
    N, Hq, D = q.shape
    Hk = k.shape[1]
    if layout.num_tokens != N:
        raise ValueError(
            f"{op}: q has {N} tokens but the layout describes {layout.num_tokens}; q must be [N, Hq, D], got "
            f"{tuple(q.shape)}"
        )
    check_shape(op, "k", k, (N, Hk, D), "to match q [N, Hq, D]")
    if Hk == 0 or Hq % Hk:
        raise ValueError(f"{op}: query heads must be a multiple of key heads, got {Hq} and {Hk}")
    if keep is not None:
        check_token_mask(op, "keep", keep, N)
    if sinks is not None:
        check_shape(op, "sinks", check_tensor(op, "sinks", sinks, 1), (Hq,), "to match q's heads")
    if window is not None and (isinstance(window, bool) or not isinstance(window, (int, torch.SymInt))):
        raise TypeError(f"{op}: window must be a number of tokens (int) or None, got {window!r}")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window must be at least 1 (a token sees itself), got {window}; None means unlimited")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be positive, got {softcap}; None means no cap")
    check_device(op, q.device, k=k, keep=keep, sinks=sinks, segment_starts=layout.segment_starts)


def check_token_mask(op: str, name: str, mask: torch.Tensor, N: int) -> None:
    check_dtype(op, name, check_tensor(op, name, mask, 1), torch.bool)
    check_shape(op, name, mask, (N,), "to match q")
