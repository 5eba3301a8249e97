"""The recorder sees what an operator does inside, and shapes of a GPU come without one."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from leaf_kernels import linear_kl
from leaf_kernels.testing import gpu_shapes, record_allocations, record_peak_bytes


def inputs(rows: int, vocab: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.zeros(n, 16, dtype=dtype) for n in (rows, vocab, rows, vocab)]


def test_the_inside_of_an_operator_is_recorded():
    tensors = inputs(8, 50, torch.float32)
    tensors[0].requires_grad_()
    with record_allocations() as sizes:
        linear_kl(*tensors, chunk_rows=4)
    assert sizes.count(4 * 50) >= 2, "logits of a chunk, of both models"
    assert max(sizes) < 8 * 50


def test_shapes_of_a_gpu():
    """Kernels' buffers: fp32 logits of both models and a gradient of 16 bits, rows padded to 16 elements."""
    with FakeTensorMode(), gpu_shapes():
        tensors = inputs(8192, 4001, torch.bfloat16)
        tensors[0].requires_grad_()
        with record_peak_bytes() as peak:
            loss, _ = linear_kl(*tensors, chunk_rows=4096)
    rows = 4096 * 4016 * (4 + 4 + 2)
    assert rows < peak[0] < rows + 8192 * 16 * 2 + 2**20
    assert loss.shape == ()
    x = torch.randn(4, 16)
    assert torch.isfinite(linear_kl(x, x, x, x)[0]), "outside, values again"
