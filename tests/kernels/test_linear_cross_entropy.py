"""linear_cross_entropy: the laws that its one-hot target adds to those of linear_kl, with which it shares the machinery."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf_kernels import linear_cross_entropy, linear_kl
from leaf_kernels.ops.linear_kl import op
from leaf_kernels.testing import assert_close_to_fp64, record_allocations, refuse_host_sync

IMPLS = ["auto", "reference"]
N, V, D = 13, 17, 6


def inputs(n: int = N, v: int = V, d: int = D, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((n, d), (v, d)))
    labels = torch.randint(v, (n,), generator=g)
    labels[:2] = torch.tensor([0, v - 1])  # first and last target
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def weights(n: int = N) -> torch.Tensor:
    w = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    w[[3, 7]] = 0
    return w


@pytest.mark.parametrize("impl", IMPLS)
def test_is_torchs_cross_entropy(impl):
    hidden, weight, labels = inputs()
    labels[4] = -100
    bias = torch.linspace(-1, 1, V, dtype=torch.float64, requires_grad=True)
    w = weights()
    expected = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="none")
    out = linear_cross_entropy(hidden, weight, labels, token_weight=w, bias=bias, impl=impl)
    torch.testing.assert_close(out.loss, (w * expected).sum())
    torch.testing.assert_close(out.per_token, expected.detach() * (w != 0))
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, (hidden, weight, bias)),
        torch.autograd.grad((w * expected).sum(), (hidden, weight, bias)),
    )


@settings(max_examples=25, deadline=None)
@given(
    softcap=st.sampled_from([None, 2.0]),
    scale=st.sampled_from([1.0, 0.5]),
    vocab_size=st.sampled_from([None, 17]),
    weighted=st.booleans(),
    rows=st.sampled_from([None, torch.tensor([5, 0, 3, 4]), torch.tensor([2, 2]), torch.tensor([], dtype=torch.int64)]),
)
def test_chunked_is_the_specification(softcap, scale, vocab_size, weighted, rows):
    hidden, weight, labels = inputs(v=20)
    labels = labels.clamp(max=16)
    labels[4] = -100
    options = {"softcap": softcap, "logit_scale": scale, "vocab_size": vocab_size, "rows": rows}
    options["token_weight"] = weights() if weighted else None
    out, expected = (linear_cross_entropy(hidden, weight, labels, **options, impl=impl) for impl in IMPLS)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, (hidden, weight)), torch.autograd.grad(expected.loss, (hidden, weight))
    )


def test_chunks_add_up():
    hidden, weight, labels = inputs()
    losses = [
        linear_cross_entropy(hidden, weight, labels, token_weight=weights(), chunk_rows=c).loss for c in (1, 4, 100)
    ]
    grads = [torch.autograd.grad(loss, (hidden, weight)) for loss in losses]
    for loss, grad in zip(losses, grads):
        torch.testing.assert_close(loss, losses[-1])
        torch.testing.assert_close(grad, grads[-1])


def test_is_the_kl_from_a_one_hot_teacher():
    hidden, weight, labels = inputs()
    teacher = 2e4 * F.one_hot(labels, V).double()
    kl = linear_kl(hidden, weight, teacher, torch.eye(V, dtype=torch.float64))
    ce = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(kl, ce, check_dtype=True)
    torch.testing.assert_close(
        torch.autograd.grad(kl.loss, (hidden, weight)), torch.autograd.grad(ce.loss, (hidden, weight))
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_specification_passes_gradcheck_and_rows_of_weight_0_do_not_matter(impl):
    hidden, weight, labels = inputs(5, 7, 3)
    w = torch.tensor([1.0, 0, 2, 0.5, 1], dtype=torch.float64)
    labels[3] = -100
    for rows in (None, torch.arange(5)):

        def loss(hidden, weight, rows=rows):
            return linear_cross_entropy(hidden, weight, labels, token_weight=w, rows=rows, softcap=2.0, impl=impl)

        assert torch.autograd.gradcheck(lambda *a: loss(*a).loss, (hidden, weight))
        clean = loss(hidden, weight)
        clean_gradients = torch.autograd.grad(clean.loss, (hidden, weight))
        poisoned = hidden.detach().clone()
        poisoned[1], poisoned[3] = math.nan, math.inf
        poisoned.requires_grad_()
        labels[1] = 10**6  # not looked at
        dirty = loss(poisoned, weight)
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
        torch.testing.assert_close(torch.autograd.grad(dirty.loss, (poisoned, weight)), clean_gradients, rtol=0, atol=0)
        assert dirty.per_token[[1, 3]].tolist() == [0, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_all_ignored(impl):
    hidden, weight, labels = inputs()
    out = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), impl=impl)
    assert out.loss == 0
    assert not any(g.any() for g in torch.autograd.grad(out.loss, (hidden, weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_budget(dtype):
    hidden, weight, labels = inputs(96, 50, 32, dtype)
    with torch.no_grad():
        weight /= 4
    plain = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    oracle = linear_cross_entropy(*exact, labels, impl="reference")
    out = linear_cross_entropy(hidden, weight, labels)
    assert_close_to_fp64(out.per_token, plain, oracle.per_token, max_lse=10)
    for triple in zip(
        torch.autograd.grad(out.loss, (hidden, weight)),
        torch.autograd.grad(plain.sum(), (hidden, weight)),
        torch.autograd.grad(oracle.loss, exact),
    ):
        assert_close_to_fp64(*triple, max_lse=10)


def test_a_small_divisor_keeps_its_digits_in_fp16():
    """1 / 32k in the weights, undone by loss scaling as fp16 training does it: no digit of dX is lost."""
    hidden, weight, labels = inputs(64, 50, 32, torch.float16)
    w = torch.full((64,), 1 / 32768)
    (scaled,) = torch.autograd.grad(32768 * linear_cross_entropy(hidden, weight, labels, token_weight=w).loss, hidden)
    (plain,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).loss, hidden)
    assert torch.equal(scaled, plain)


def test_frozen_head_costs_no_weight_gradient(monkeypatch):
    monkeypatch.setattr(op, "_topk", op.topk)  # recorders do not see inside an operator
    hidden, weight, labels = inputs(8, 500, 64, torch.float32)
    with record_allocations() as sizes:
        linear_cross_entropy(hidden, weight.detach(), labels).loss.backward()
    assert 8 * 500 in sizes, "the recorder sees the logits"
    assert max(sizes) < weight.numel()
    assert hidden.grad is not None


def test_no_host_sync_with_rows(monkeypatch):
    monkeypatch.setattr(op, "_topk", op.topk)
    hidden, weight, labels = inputs()
    with refuse_host_sync():
        linear_cross_entropy(hidden, weight, labels, token_weight=weights(), rows=torch.arange(5)).loss.backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(N)}, TypeError, "labels must be torch.int64"),
        ({"labels": torch.zeros(N - 1, dtype=torch.int64)}, ValueError, "labels must have shape"),
        ({"labels": torch.full((N,), V)}, (IndexError, RuntimeError), "out of bounds"),
        ({"labels": torch.full((N,), -1)}, (IndexError, RuntimeError), "out of bounds"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1"),
        ({"token_weight": torch.ones(N - 1)}, ValueError, "token_weight must have shape"),
        ({"vocab_size": V + 1}, ValueError, "vocab_size must be between 1 and the 17 rows"),
        ({"weight": torch.zeros(V, D)}, TypeError, "share one dtype"),
        ({"bias": torch.zeros(V, 1)}, ValueError, "bias must have 1 dimension"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**dict(zip(("hidden", "weight", "labels"), inputs())), **change})
