"""linear_kl on a CPU against the released recipe's loss and the same loss in log space: time and memory of a step.

    pytest benchmarks/test_linear_kl.py
    pytest benchmarks/test_linear_kl.py --benchmark-json=benchmarks/results/linear_kl_cpu.json
    python benchmarks/tables.py                              # puts the figures into docs/linear_kl.md

The student trains (gradients of hidden states and weight), the teacher is frozen, every row counts. The released recipe
makes fp32 softmaxes of both models at every position; where a probability is 0 its product with a logarithm is NaN, which it
replaces. Rounds are interleaved: before each round of ours, which pytest-benchmark times, the others run one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from leaf_kernels import linear_kl
from leaf_kernels.ops.linear_kl import op
from leaf_kernels.testing import record_peak_bytes

N, V, D = 4096, 32000, 256
ROUNDS = 5

Loss = Callable[..., torch.Tensor]


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, D, generator=generator) * scale

    student = [normal(N, 1).requires_grad_(), normal(V, D**-0.5).requires_grad_()]
    return [*student, normal(N, 1), normal(V, D**-0.5)]


def released(hidden: torch.Tensor, weight: torch.Tensor, teacher_hidden: torch.Tensor, teacher_weight: torch.Tensor):
    student = F.softmax(F.linear(hidden, weight).float(), -1)
    teacher = F.softmax(F.linear(teacher_hidden, teacher_weight).float(), -1)
    return torch.nan_to_num((teacher * (teacher.log() - student.log())).sum(-1)).sum()


def log_space(hidden: torch.Tensor, weight: torch.Tensor, teacher_hidden: torch.Tensor, teacher_weight: torch.Tensor):
    student = F.log_softmax(F.linear(hidden, weight), -1)
    teacher = F.log_softmax(F.linear(teacher_hidden, teacher_weight), -1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def ours(*tensors: torch.Tensor):
    return linear_kl(*tensors).loss


def step(loss: Loss, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    value = loss(*tensors)
    return [value.detach(), *torch.autograd.grad(value, tensors[:2])]


def peak_mib(loss: Loss, tensors: list[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    """Peak of a step beyond its inputs, the gradients included, and what the step returned."""
    with record_peak_bytes() as peak:
        result = step(loss, tensors)
    return peak[0] / 2**20, result


@pytest.mark.benchmark(group=f"linear_kl forward + backward, N={N} V={V} D={D} fp32")
def test_against_the_released_recipe(benchmark, monkeypatch):
    """At most a fifth of its memory, and not slower."""
    tensors = inputs()
    seconds: dict[str, list[float]] = {"released": [], "log_space": []}

    def others() -> None:
        for loss in (released, log_space):
            start = time.perf_counter()
            step(loss, tensors)
            seconds[loss.__name__].append(time.perf_counter() - start)

    benchmark.pedantic(step, (ours, tensors), setup=others, rounds=ROUNDS, warmup_rounds=1)
    medians = {name: statistics.median(times[-ROUNDS:]) for name, times in seconds.items()}

    monkeypatch.setattr(op, "_kl", op.kl)  # the recorder does not see inside an operator
    mib, results = zip(*(peak_mib(loss, tensors) for loss in (released, log_space, ours)))
    peaks = dict(zip(("released", "log_space", "ours"), mib))
    benchmark.extra_info.update(
        threads=torch.get_num_threads(), torch=torch.__version__, N=N, V=V, D=D, seconds=seconds, peak_mib=peaks
    )
    for theirs in results[:2]:
        for a, b in zip(results[2], theirs):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert peaks["ours"] <= peaks["released"] / 5
    assert benchmark.stats.stats.median <= medians["released"]
