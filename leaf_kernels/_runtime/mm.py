"""Matrix products of 16-bit operands into fp32."""

from __future__ import annotations

import torch

from .launch import on_gpu


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What an operand of compute dtype `dtype` is held in for `mm_into` and `addmm_into`.

    CUDA multiplies 16-bit operands into an fp32 result. torch's CPU products round the result to the operands' dtype, so
    there 16-bit operands are widened.
    """
    return torch.float32 if not on_gpu(device) and dtype.itemsize == 2 else dtype


def mm_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """out = a @ b in the dtype of `out`."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def addmm_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """out += a @ b in the dtype of `out`."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
