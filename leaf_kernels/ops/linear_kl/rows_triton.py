"""What is computed on the logits of a chunk of rows, by the Triton kernels."""

from __future__ import annotations

import math

import torch

from ..._runtime.launch import architecture, launch
from . import kernels
from .head import LogitMap
from .rows_torch import Target, TorchRows

LOG2E = 1 / math.log(2)


class TritonRows(TorchRows):
    """The same passes; fp32 only. `take` works on products, before bias and softcap, in which it leaves −inf."""

    def new_products(self) -> torch.Tensor:
        return self._padded(self.like.dtype)

    def _padded(self, dtype: torch.dtype) -> torch.Tensor:
        """[c, V], its rows a multiple of 16 elements apart: loads of 16 bytes and aligned matrix products for any V."""
        c, V = self.shape
        return torch.empty(c, -(-V // 16) * 16, dtype=dtype, device=self.like.device)[:, :V]

    def _buffer(self, name: str, n: int) -> torch.Tensor:
        """The gradient, the only one that there is."""
        if name not in self.buffers:
            self.buffers[name] = self._padded(self.operand_dtype)
        return self.buffers[name][:n]

    def _gradient(self, n: int) -> torch.Tensor | None:
        return self._buffer("gradient", n) if self.want_gradient else None

    def divergence(
        self, student: torch.Tensor, teacher: torch.Tensor, relative: torch.Tensor, target: Target
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        value, gradient = torch.empty_like(relative), self._gradient(len(student))
        ours, theirs, beta = self.student, target.logit_map, target.beta
        log_betas = (math.log2(beta), math.log2(1 - beta)) if target.divergence == "jsd" else (0.0, 0.0)
        launch(
            kernels.divergence_rows, len(student),
            student, teacher, ours.bias, theirs.bias, relative, value, gradient,
            student.shape[1], student.stride(0), *_scales(ours), *_scales(theirs), beta, *log_betas,
            DIVERGENCE=target.divergence, STUDENT_BIAS=ours.bias is not None, TEACHER_BIAS=theirs.bias is not None,
            STUDENT_SOFTCAP=ours.softcap is not None, TEACHER_SOFTCAP=theirs.softcap is not None,
            WANT_GRADIENT=self.want_gradient, **tile_of_rows(student.device),
        )  # fmt: skip
        return value, gradient

    def take(self, products: torch.Tensor, index: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        bias = self.student.bias
        z = self.student.apply_(products.gather(1, index), None if bias is None else bias[index])
        products.scatter_reduce_(1, index, torch.where(present, -torch.inf, torch.inf).to(z), "amin")
        return torch.where(present, z, -torch.inf)

    def tail(
        self, products: torch.Tensor, log_kept: torch.Tensor, tail: torch.Tensor, relative: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        log_tail, gradient = torch.empty_like(relative), self._gradient(len(products))
        launch(
            kernels.tail_rows, len(products),
            products, self.student.bias, log_kept, tail, relative, log_tail, gradient,
            products.shape[1], products.stride(0), *_scales(self.student),
            HAS_BIAS=self.student.bias is not None, HAS_SOFTCAP=self.student.softcap is not None,
            WANT_GRADIENT=self.want_gradient, **tile_of_rows(products.device),
        )  # fmt: skip
        return log_tail, gradient


def _scales(logit_map: LogitMap) -> tuple[float, float]:
    """(scale, softcap) as the kernels take them: z = scale · x, or softcap · log2(e) · tanh(scale · x)."""
    if logit_map.softcap is None:
        return logit_map.scale / logit_map.temperature * LOG2E, 1.0
    return logit_map.scale / logit_map.softcap, logit_map.softcap / logit_map.temperature


def tile_of_rows(device: torch.device) -> dict[str, int]:
    """Eight logits of a model per thread in flight; small in the interpreter, so that a small vocabulary takes several.

    Without a bound on registers, ptxas spills a few of them to reach the next step of occupancy.
    """
    if architecture(device) == "interpreter":
        return {"BLOCK": 64, "num_warps": 4}
    return {"BLOCK": 2048, "num_warps": 8, "maxnreg": 96}
