"""What the tests of linear_kl share: inputs, gradients, and products as a GPU computes them."""

from __future__ import annotations

import torch

from leaf_kernels import linear_kl
from leaf_kernels.ops.linear_kl import chunked

DIVERGENCES = [("forward_kl", None), ("reverse_kl", None), ("jsd", 0.5), ("jsd", 0.1)]
IMPLS = ["auto", "reference"]
N, V, DS, DT = 13, 17, 6, 5


def tensors(
    n: int = N, v: int = V, ds: int = DS, dt: int = DT, dtype=torch.float64, seed: int = 0
) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (n, ds), (v, ds), (n, dt), (v, dt)
    student_hidden, student_weight, *teacher = (
        torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes
    )
    return [student_hidden.requires_grad_(), student_weight.requires_grad_(), *teacher]


def weights(n: int = N, seed: int = 1, zero: tuple[int, ...] = (3, 7)) -> torch.Tensor:
    w = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    w[list(zero)] = 0
    return w


def gradients(args, impl: str = "auto", upstream: float = 1.0, extra=(), **options) -> list[torch.Tensor]:
    out = linear_kl(*args, impl=impl, **options)
    return list(torch.autograd.grad(upstream * out.loss, [*args[:2], *extra]))


def logits_as_hidden(student: torch.Tensor, teacher: torch.Tensor) -> list[torch.Tensor]:
    """Heads that are the identity: the hidden states are the logits."""
    eye = torch.eye(student.shape[1], dtype=student.dtype)
    return [student.clone().requires_grad_(), eye.clone().requires_grad_(), teacher, eye]


def as_on_a_gpu(monkeypatch) -> None:
    """Products of 16-bit operands into fp32, as CUDA has them: the logit gradient is rounded to 16 bits."""

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.dtype == b.dtype
        return a.to(torch.promote_types(a.dtype, torch.float32)) @ b.to(torch.promote_types(b.dtype, torch.float32))

    monkeypatch.setattr(chunked, "operand_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr(chunked, "mm_into", lambda out, a, b: out.copy_(product(a, b)))
    monkeypatch.setattr(chunked, "addmm_into", lambda out, a, b: out.add_(product(a, b)))
