"""What the functions of `api.py` check and prepare alike."""

from __future__ import annotations

import math

import torch

from ..._runtime.checks import check_device, check_dtype, check_floating, check_shape, check_tensor
from ..._runtime.dispatch import resolve_impl
from ...types import Impl
from .head import Head, accumulator_dtype


def head(
    op: str,
    prefix: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> Head:
    check_tensor(op, f"{prefix}hidden", hidden, 2)
    check_tensor(op, f"{prefix}weight", weight, 2)
    if bias is not None:
        check_tensor(op, f"{prefix}bias", bias, 1)
    tensors = {f"{prefix}hidden": hidden, f"{prefix}weight": weight, f"{prefix}bias": bias}
    check_floating(op, **tensors)
    check_device(op, hidden.device, **tensors)
    if weight.numel() == 0:
        raise ValueError(
            f"{op}: {prefix}weight is empty, got shape {tuple(weight.shape)}; gather it if it is sharded (FSDP, ZeRO-3)"
        )
    check_shape(op, f"{prefix}weight", weight, (len(weight), hidden.shape[1]), f"to match {prefix}hidden [N, D]")
    if bias is not None:
        check_shape(op, f"{prefix}bias", bias, (len(weight),), f"to match {prefix}weight [V, D]")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: {prefix}softcap must be positive, got {softcap}; None means no cap")
    return Head(hidden, weight, bias, softcap, logit_scale)


def first_tokens(op: str, head: Head, vocab_size: int | None) -> Head:
    """The head of the first `vocab_size` tokens."""
    if vocab_size is None:
        return head
    V = len(head.weight)
    if not 0 < vocab_size <= V:
        raise ValueError(f"{op}: vocab_size must be between 1 and the {V} rows of the smaller weight, got {vocab_size}")
    return head._replace(weight=head.weight[:vocab_size], bias=None if head.bias is None else head.bias[:vocab_size])


def named(prefix: str, head: Head) -> dict[str, torch.Tensor | None]:
    return {f"{prefix}hidden": head.hidden, f"{prefix}weight": head.weight, f"{prefix}bias": head.bias}


def check_token_weight(op: str, N: int, token_weight: torch.Tensor) -> None:
    check_shape(
        op, "token_weight", check_tensor(op, "token_weight", token_weight, 1), (N,), "to match the hidden states"
    )
    check_floating(op, token_weight=token_weight)
    if token_weight.requires_grad:
        raise ValueError(f"{op}: token_weight requires grad, but it is a constant; pass it .detach()-ed")


def useful_rows(
    op: str,
    N: int,
    token_weight: torch.Tensor | None,
    rows: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The rows to project, None = all of them, and their weights [M]."""
    if rows is not None:
        check_dtype(op, "rows", check_tensor(op, "rows", rows, 1), torch.int64)
    wide = accumulator_dtype(dtype)
    if token_weight is None:
        return rows, torch.ones(N if rows is None else len(rows), dtype=wide, device=device)
    check_token_weight(op, N, token_weight)
    if rows is None:
        rows = token_weight.nonzero().squeeze(1)  # the one host sync of the contract
    return rows, token_weight[rows].to(wide)


def scatter(N: int, rows: torch.Tensor | None, row_weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[N] per-token values, 0 on rows that were not used."""
    values = torch.where(row_weight != 0, values, 0)
    return values if rows is None else values.new_zeros(N).index_copy_(0, rows, values)


def check_numbers(op: str, temperature: float, chunk_rows: int | None) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be positive, got {temperature}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows must be at least 1, got {chunk_rows}")


def implementation(op: str, impl: str | Impl, device: torch.device, dtype: torch.dtype) -> str:
    """ "specification", "triton", or "chunks" of plain torch, which is what "auto" takes where there is no kernel."""
    obstacle = "the kernels compute in float32, not in float64" if dtype is torch.float64 else None
    if resolve_impl(op, impl, device, obstacle) is Impl.TRITON:
        return "triton"
    return "specification" if Impl(impl) is Impl.REFERENCE else "chunks"
