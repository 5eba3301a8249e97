"""linear_kl, linear_kl_topk and linear_cross_entropy on an NVIDIA GPU, at the shapes of real models:

    pytest -m gpu tests/kernels/test_linear_kl_gpu.py

Errors are held against fp64: at most twice those of plain torch code in the same dtype. Data is random normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from gpu import DEVICE, GPU_ONLY, IMPL, compilations, no_sync

from leaf_kernels import linear_cross_entropy, linear_kl, linear_kl_topk
from leaf_kernels.testing import assert_close_to_fp64

pytestmark = GPU_ONLY
DIVERGENCES = [("forward_kl", None), ("reverse_kl", None), ("jsd", 0.5)]


class Shape(NamedTuple):
    """Hidden sizes of student and teacher, vocabulary."""

    Ds: int
    Dt: int
    V: int


LLAMA = Shape(2048, 4096, 128256)
SHAPES = {"Llama 1B from 8B": LLAMA, "Qwen 1.5B from 7B": Shape(1536, 3584, 151936), "GPT-2": Shape(768, 1280, 50257)}


def problem(N: int, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Student hidden and weight, which want gradients, teacher hidden and weight; logits of a standard deviation of 2."""
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=g, device=DEVICE) * scale).to(dtype)

    student = [normal(N, shape.Ds, 1), normal(shape.V, shape.Ds, 2 * shape.Ds**-0.5)]
    return [
        *(x.requires_grad_() for x in student),
        normal(N, shape.Dt, 1),
        normal(shape.V, shape.Dt, 2 * shape.Dt**-0.5),
    ]


def plain_kl(hidden, weight, teacher_hidden, teacher_weight, divergence: str, beta: float | None) -> torch.Tensor:
    """[N] in textbook code."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    student = F.log_softmax(F.linear(hidden, weight).to(wide), -1)
    teacher = F.log_softmax(F.linear(teacher_hidden, teacher_weight).to(wide), -1)

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)

    if divergence == "jsd":
        mean = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
        return beta * kl(teacher, mean) + (1 - beta) * kl(student, mean)
    return kl(teacher, student) if divergence == "forward_kl" else kl(student, teacher)


def gradients(loss: torch.Tensor, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, tensors[:2])


def within_budget(
    ours: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    plain: Callable[..., torch.Tensor],
    tensors: list[torch.Tensor],
) -> None:
    """`ours` returns (loss, per_token), `plain` per_token; the oracle is `plain` in fp64."""
    loss, per_token = ours(*tensors)
    actual = [per_token, *gradients(loss, tensors)]
    values = plain(*tensors)
    budget = [values.detach(), *gradients(values.sum(), tensors)]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    values = plain(*exact)
    oracle = [values.detach(), *gradients(values.sum(), exact)]
    for name, *triple in zip(("per_token", "hidden", "weight"), actual, budget, oracle):
        try:
            assert_close_to_fp64(*triple, max_lse=20)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_error_budget(name, dtype, divergence, beta):
    def ours(*tensors):
        return linear_kl(*tensors, divergence=divergence, beta=beta, impl=IMPL)

    def plain(*tensors):
        return plain_kl(*tensors, divergence, beta)

    within_budget(ours, plain, problem(256, SHAPES[name], dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_error_budget(dtype):
    labels = torch.arange(256, device=DEVICE) * 7 % LLAMA.V

    def ours(hidden, weight, *_):
        return linear_cross_entropy(hidden, weight, labels, impl=IMPL)

    def plain(hidden, weight, *_):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return F.cross_entropy(F.linear(hidden, weight).to(wide), labels, reduction="none")

    within_budget(ours, plain, problem(256, LLAMA, dtype))


@pytest.mark.parametrize("K", [1, 64])
def test_topk_error_budget(K):
    tensors = problem(256, LLAMA)
    log_probs, ids = F.log_softmax(F.linear(*tensors[2:]).float(), -1).topk(K)

    def ours(hidden, weight, *_):
        return linear_kl_topk(hidden, weight, ids, log_probs, impl=IMPL)[:2]

    def plain(hidden, weight, *_):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        p, log_q = log_probs.to(wide), F.log_softmax(F.linear(hidden, weight).to(wide), -1)
        tail = 1 - p.exp().sum(-1)
        log_tail = log_q.scatter(1, ids, -math.inf).logsumexp(-1)
        return (p.exp() * (p - log_q.gather(1, ids))).sum(-1) + tail * (tail.log() - log_tail)

    within_budget(ours, plain, tensors)


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_chunks_of_any_size_and_every_option(impl):
    """Softcap, bias, scale, padded vocabularies, weights: against the specification in fp32."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = problem(300, Shape(64, 128, 4099), torch.float32)
    bias = torch.linspace(-1, 1, 4099, device=DEVICE).requires_grad_()
    weight = torch.rand(300, device=DEVICE) * (torch.arange(300, device=DEVICE) % 3 > 0)
    with torch.no_grad():
        student_hidden[0], teacher_hidden[3] = math.nan, math.inf  # weight 0
    options = {
        "token_weight": weight, "temperature": 2.0, "vocab_size": 4001, "student_bias": bias, "student_softcap": 5.0,
        "teacher_softcap": 30.0, "student_logit_scale": 0.5,
    }  # fmt: skip
    leaves = [student_hidden, student_weight, bias]
    results = []
    for how, chunk_rows in (("reference", None), (impl, None), (impl, 37)):
        out = linear_kl(*leaves[:2], teacher_hidden, teacher_weight, **options, chunk_rows=chunk_rows, impl=how)
        results.append([out.loss.detach(), out.per_token, *torch.autograd.grad(out.loss, leaves)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=2e-3, atol=2e-3)


def test_repeats_bitwise():
    tensors = problem(4096, LLAMA)
    results = []
    for _ in range(3):
        out = linear_kl(*tensors, impl=IMPL)
        results.append([out.loss, out.per_token, *gradients(out.loss, tensors)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_no_host_sync_with_rows():
    tensors, rows = problem(512, SHAPES["GPT-2"]), torch.arange(0, 512, 3, device=DEVICE)
    weight = torch.rand(512, device=DEVICE)
    linear_kl(*tensors, token_weight=weight, rows=rows, impl=IMPL)  # compiles
    with no_sync():
        linear_kl(*tensors, token_weight=weight, rows=rows, impl=IMPL).loss.backward()
        labels = torch.zeros(512, dtype=torch.int64, device=DEVICE)
        linear_cross_entropy(*tensors[:2], labels, rows=rows, impl=IMPL).loss.backward()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("N", [8192, 65536])
def test_peak_memory(N, frozen):
    """Beside the inputs, dX and dW (which exists in fp32 until the backward): at most 2 GiB at any N."""
    tensors = problem(N, LLAMA)
    tensors[1].requires_grad_(not frozen)
    wanted = [x for x in tensors if x.requires_grad]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_kl(*tensors, impl=IMPL).loss
    forward = torch.cuda.max_memory_allocated() - before
    torch.autograd.grad(loss, wanted)
    both = torch.cuda.max_memory_allocated() - before
    d_hidden, d_weight = N * LLAMA.Ds * 2, 0 if frozen else LLAMA.V * LLAMA.Ds
    assert forward <= 2**31 + d_hidden + 4 * d_weight + 64 * N
    # what is stored and what is returned
    assert both <= max(forward, 2 * d_hidden + (4 + 2) * d_weight + 2**26)


def test_twenty_lengths_compile_once():
    shape = Shape(64, 64, 1003)  # of no other test
    with compilations() as names:
        for n in range(1, 21):
            tensors = problem(n * 37, shape)
            linear_kl(*tensors, impl=IMPL, chunk_rows=64).loss.backward()
    assert len(names) <= 1


def test_compiles_as_one_graph_forward_and_backward():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, backend=counter)
    def loss(hidden, weight, teacher_hidden, teacher_weight, rows):
        return linear_kl(hidden.sin(), weight, teacher_hidden, teacher_weight, rows=rows, impl=IMPL).loss * 2

    for n in range(64, 84):
        tensors, rows = problem(n, SHAPES["GPT-2"]), torch.arange(0, n, 2, device=DEVICE)
        got = gradients(loss(*tensors, rows), tensors)
        out = linear_kl(tensors[0].sin(), *tensors[1:], rows=rows, impl=IMPL)
        torch.testing.assert_close(got, gradients(out.loss * 2, tensors), rtol=0.02, atol=1e-4)
    assert counter.frame_count <= 2


def test_fp64_runs_in_plain_torch_and_says_so():
    tensors = problem(32, Shape(16, 16, 100), torch.float64)
    with pytest.warns(UserWarning, match="float64.*plain torch"):
        out = linear_kl(*tensors)
    torch.testing.assert_close(out, linear_kl(*tensors, impl="reference"))
    with pytest.raises(ValueError, match="impl='reference'"):
        linear_kl(*tensors, impl="triton")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_second_gpu():
    tensors = [x.detach().to("cuda:1").requires_grad_(x.requires_grad) for x in problem(64, SHAPES["GPT-2"])]
    out = linear_kl(*tensors, impl=IMPL)
    torch.testing.assert_close(out.loss, linear_kl(*tensors, impl="reference").loss, rtol=1e-3, atol=0)
