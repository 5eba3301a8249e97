"""linear_kl against the usual recipe (logits of both models, log_softmax, kl_div): time and memory of a step on a CPU.

    pytest benchmarks/test_linear_kl.py            # times and the memory ratio
    pytest benchmarks/test_linear_kl.py --benchmark-json=benchmarks/results/linear_kl.json

The student trains (gradients of hidden states and weight), the teacher is frozen, every row counts.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from leaf_kernels import linear_kl
from leaf_kernels.testing import record_peak_bytes

N, V, D = 4096, 32000, 256


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, D, generator=generator) * scale

    student = [normal(N, 1).requires_grad_(), normal(V, D**-0.5).requires_grad_()]
    return [*student, normal(N, 1), normal(V, D**-0.5)]


def eager(hidden: torch.Tensor, weight: torch.Tensor, teacher_hidden: torch.Tensor, teacher_weight: torch.Tensor):
    student = F.log_softmax(F.linear(hidden, weight), -1)
    teacher = F.log_softmax(F.linear(teacher_hidden, teacher_weight), -1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def chunked(*tensors: torch.Tensor):
    return linear_kl(*tensors).loss


def step(loss: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    value = loss(*tensors)
    return [value.detach(), *torch.autograd.grad(value, tensors[:2])]


@pytest.mark.benchmark(group=f"linear_kl forward + backward, N={N} V={V} D={D} fp32")
@pytest.mark.parametrize("loss", [eager, chunked], ids=lambda f: f.__name__)
def test_time(benchmark, loss):
    tensors = inputs()
    benchmark.extra_info.update(
        provider=loss.__name__, mode="full", threads=torch.get_num_threads(), torch=torch.__version__
    )
    benchmark.pedantic(step, (loss, tensors), rounds=5, warmup_rounds=1)


def test_memory_and_agreement():
    tensors = inputs()
    peaks, results = {}, {}
    for loss in (eager, chunked):
        with record_peak_bytes() as peak:
            results[loss] = step(loss, tensors)
        peaks[loss] = peak[0]
    for ours, theirs in zip(results[chunked], results[eager]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    print(f"\npeak beyond the inputs: eager {peaks[eager] / 2**20:.0f} MiB, chunked {peaks[chunked] / 2**20:.0f} MiB")
    assert peaks[chunked] <= peaks[eager] / 5
