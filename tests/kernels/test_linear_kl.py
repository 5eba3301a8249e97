"""linear_kl: closed forms, laws, and the chunked implementation against the specification."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from gpu import GPU_ONLY
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import DIVERGENCES, DS, DT, IMPLS, N, V, as_on_a_gpu, gradients, logits_as_hidden, tensors, weights
from torch.utils._python_dispatch import TorchDispatchMode

from leaf_kernels import linear_kl
from leaf_kernels.ops.linear_kl import chunked, op
from leaf_kernels.testing import assert_close_to_fp64, record_allocations, refuse_host_sync

# Closed forms


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
@pytest.mark.parametrize("t", [1.0, 2.0, 0.3])
def test_two_classes(impl, divergence, beta, t):
    a, b = 0.7, -1.9
    p, q = 1 / (1 + math.exp(-b / t)), 1 / (1 + math.exp(-a / t))  # of the teacher, of the student

    def kl(x: float, y: float) -> float:
        return x * math.log(x / y) + (1 - x) * math.log((1 - x) / (1 - y))

    if divergence == "forward_kl":
        expected = kl(p, q)
    elif divergence == "reverse_kl":
        expected = kl(q, p)
    else:
        m = beta * p + (1 - beta) * q
        expected = beta * kl(p, m) + (1 - beta) * kl(q, m)
    args = logits_as_hidden(torch.tensor([[0, a]]).double(), torch.tensor([[0, b]]).double())
    w = torch.tensor([0.4], dtype=torch.float64)
    out = linear_kl(*args, token_weight=w, temperature=t, divergence=divergence, beta=beta, impl=impl)
    assert out.loss.item() == pytest.approx(0.4 * t**2 * expected, rel=1e-6)
    assert out.per_token.item() == pytest.approx(t**2 * expected, rel=1e-6)
    if divergence == "forward_kl":
        (g,) = torch.autograd.grad(out.loss, args[0])
        assert g[0, 1].item() == pytest.approx(0.4 * t * (q - p), rel=1e-6)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_temperature_keeps_the_gradient(divergence, beta):
    args = tensors()
    small = [0.1 * x.detach() for x in args]
    small[0].requires_grad_()
    norms = [
        torch.autograd.grad(linear_kl(*small, temperature=t, divergence=divergence, beta=beta).loss, small[0])[0].norm()
        for t in (1, 10)
    ]
    assert 0.8 < norms[0] / norms[1] < 1.25


# The specification, and the chunked implementation against it


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_gradcheck_of_the_specification(divergence, beta):
    args, bias = tensors(4, 7, 3, 2), torch.randn(7, dtype=torch.float64, requires_grad=True)
    options = {"temperature": 1.7, "student_softcap": 2.0, "student_logit_scale": 0.6, "teacher_softcap": 3.0}

    def loss(hidden, weight, bias):
        return linear_kl(
            hidden, weight, *args[2:], token_weight=weights(4, zero=(1,)), student_bias=bias, vocab_size=6,
            divergence=divergence, beta=beta, impl="reference", **options,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (*args[:2], bias))


@settings(max_examples=50, deadline=None)
@given(
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    softcaps=st.sampled_from([(None, None), (2.0, None), (None, 1.5), (3.0, 2.0)]),
    scales=st.sampled_from([(1.0, 1.0), (0.5, 2.0), (-1.5, 1.0)]),
    biases=st.sampled_from([(False, False), (True, False), (False, True), (True, True)]),
    vocab_size=st.sampled_from([None, V, 11]),
    selection=st.sampled_from(
        ["all", "weights", "rows", "rows and weights", "repeated rows", "negative weight", "none"]
    ),
    chunk_rows=st.sampled_from([None, 1, 4, 100]),
    seed=st.integers(0, 3),
)
def test_chunked_is_the_specification(
    divergence, temperature, softcaps, scales, biases, vocab_size, selection, chunk_rows, seed
):
    args = tensors(seed=seed)
    bias = torch.linspace(-2, 2, V, dtype=torch.float64)
    student_bias = bias.clone().requires_grad_() if biases[0] else None
    options = {
        "divergence": divergence[0], "beta": divergence[1], "temperature": temperature, "vocab_size": vocab_size,
        "student_softcap": softcaps[0], "teacher_softcap": softcaps[1],
        "student_logit_scale": scales[0], "teacher_logit_scale": scales[1],
        "student_bias": student_bias, "teacher_bias": bias.flip(0) if biases[1] else None,
    }  # fmt: skip
    some = torch.tensor([7, 2, 12, 3])
    options |= {
        "all": {},
        "weights": {"token_weight": weights()},
        "rows": {"rows": some},
        "rows and weights": {"rows": some, "token_weight": weights()},
        "repeated rows": {"rows": torch.tensor([2, 5, 2]), "token_weight": weights()},
        "negative weight": {"token_weight": weights() - 0.5},
        "none": {"rows": some[:0]},
    }[selection]
    extra = [student_bias] if biases[0] else []
    expected = linear_kl(*args, **options, impl="reference")
    out = linear_kl(*args, **options, chunk_rows=chunk_rows)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradients(args, upstream=-1.3, extra=extra, **options, chunk_rows=chunk_rows),
        gradients(args, "reference", upstream=-1.3, extra=extra, **options),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("device", ["cpu", "cpu as a gpu", pytest.param("cuda", marks=GPU_ONLY)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_error_budget(device, dtype, divergence, beta, monkeypatch):
    """At most twice the error of plain torch code in the same dtype, values and gradients."""
    if device == "cpu as a gpu":
        as_on_a_gpu(monkeypatch)
    args = [a.detach().to(device.split()[0]) for a in tensors(96, 50, 32, 24, dtype)]
    args[1] /= 4
    args[3] /= 4
    for a in args[:2]:
        a.requires_grad_()
    exact = [a.detach().double().requires_grad_(a.requires_grad) for a in args]
    w = weights(96).to(args[0])
    options = {"divergence": divergence, "beta": beta}

    student, teacher = (F.log_softmax(F.linear(*pair).float(), -1) for pair in (args[:2], args[2:]))
    if divergence == "jsd":
        mean = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
        plain = beta * (teacher.exp() * (teacher - mean)).sum(-1) + (1 - beta) * (student.exp() * (student - mean)).sum(
            -1
        )
    else:
        p, q = (teacher, student) if divergence == "forward_kl" else (student, teacher)
        plain = (p.exp() * (p - q)).sum(-1)
    plain_gradients = torch.autograd.grad((w * plain).sum(), args[:2])
    oracle = linear_kl(*exact, token_weight=w.double(), impl="reference", **options)
    oracle_gradients = torch.autograd.grad(oracle.loss, exact[:2])

    out = linear_kl(*args, token_weight=w, chunk_rows=20, **options)
    used = w != 0
    assert_close_to_fp64(out.per_token[used], plain[used], oracle.per_token[used], max_lse=10)
    for got, plain_gradient, exact_gradient in zip(
        torch.autograd.grad(out.loss, args[:2]), plain_gradients, oracle_gradients
    ):
        assert_close_to_fp64(got, plain_gradient, exact_gradient, max_lse=10)


# Weights, upstream gradients, saved tensors


def test_per_token_is_detached_and_zero_where_unused():
    out = linear_kl(*tensors(), token_weight=weights())
    assert (out.per_token == 0).nonzero().flatten().tolist() == [3, 7]
    torch.testing.assert_close((out.per_token * weights()).sum(), out.loss.detach())
    with pytest.raises(RuntimeError, match="does not require grad"):
        out.per_token.sum().backward()


def test_backward_twice_and_any_upstream_gradient():
    args = tensors()
    once = gradients(args, token_weight=weights())
    loss = linear_kl(*args, token_weight=weights()).loss
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close([a.grad for a in args[:2]], [2 * g for g in once], rtol=1e-14, atol=0)
    loss = linear_kl(*args, token_weight=weights()).loss
    expanded = torch.autograd.grad(loss.expand(2, 3).t(), args[:2], torch.full((1,), 0.5).double().expand(3, 2))
    torch.testing.assert_close(list(expanded), [3 * g for g in once], rtol=1e-14, atol=1e-16)
    first = torch.autograd.grad(linear_kl(*args).loss ** 2, args[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_not_modified(impl):
    args, w = [*tensors(), torch.ones(V, dtype=torch.float64)], weights()
    before = [(x.detach().clone(), x._version) for x in (*args, w)]
    linear_kl(*args[:4], student_bias=args[4], teacher_softcap=2.0, token_weight=w, impl=impl).loss.backward()
    for x, (old, version) in zip((*args, w), before):
        assert torch.equal(x, old)
        assert x._version == version


@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.integers(1, N - 1)))
def test_the_divisor_is_in_the_weights(cuts):
    """However a batch is cut into micro-batches, the gradients add up to the same."""
    args, w = tensors(), weights() / weights().sum()
    whole = gradients(args, token_weight=w)
    edges = [0, *sorted(cuts), N]
    for start, stop in itertools.pairwise(edges):
        here = slice(start, stop)
        linear_kl(args[0][here], args[1], args[2][here], args[3], token_weight=w[here]).loss.backward()
    torch.testing.assert_close([a.grad for a in args[:2]], whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [None, torch.tensor([1, 2])])
def test_nothing_to_learn_from(impl, rows):
    args = tensors()
    out = linear_kl(*args, token_weight=torch.zeros(N), rows=rows, impl=impl)
    assert out.loss == 0
    assert not out.per_token.any()
    for g in torch.autograd.grad(out.loss, args[:2]):
        assert torch.equal(g, torch.zeros_like(g))
    empty = [a.detach()[:0] if i % 2 == 0 else a for i, a in enumerate(args)]
    out = linear_kl(*empty, impl=impl)
    assert out.loss == 0
    assert out.per_token.shape == (0,)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [None, torch.arange(N)])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rows_of_weight_0_do_not_matter(impl, rows, poison):
    args, w = tensors(dtype=torch.float32), weights().float()
    options = {"token_weight": w, "rows": rows, "impl": impl, "student_bias": torch.ones(V)}
    clean, clean_gradients = linear_kl(*args, **options), gradients(args, **options)
    with torch.no_grad():
        args[0][3], args[2][7] = poison, -poison
    torch.testing.assert_close(linear_kl(*args, **options), clean, rtol=0, atol=0)
    torch.testing.assert_close(gradients(args, **options), clean_gradients, rtol=0, atol=0)


# dtypes


def test_weight_gradient_keeps_small_updates():
    """dW is accumulated in fp32: its error does not grow with the number of chunks."""
    args = tensors(512, 24, 8, 8, torch.bfloat16)
    exact = [a.detach().double().requires_grad_(a.requires_grad) for a in args]
    (oracle,) = torch.autograd.grad(linear_kl(*exact, impl="reference").loss, exact[1])

    def error(chunk_rows: int) -> float:
        return (gradients(args, chunk_rows=chunk_rows)[1].double() - oracle).norm().item()

    assert error(1) <= 1.1 * error(512)


B, S = torch.bfloat16, torch.float32


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("hidden", "weight", "autocast", "stated"),
    [
        (S, S, None, S), (B, B, None, S), (torch.float16, torch.float16, None, S),
        (torch.float64, torch.float64, None, torch.float64),
        (S, S, B, S), (B, S, B, S), (S, B, B, S), (B, B, B, S), (torch.float64, torch.float64, B, S),
        (S, B, None, "share one dtype"), (B, S, None, "share one dtype"), (torch.float64, S, None, "share one dtype"),
    ],
)  # fmt: skip
def test_dtypes(impl, hidden, weight, autocast, stated):
    args = [a.detach().to(d).requires_grad_(i < 2) for i, (a, d) in enumerate(zip(tensors(), [hidden, weight] * 2))]
    with torch.autocast("cpu", autocast or B, enabled=autocast is not None):
        if isinstance(stated, str):
            with pytest.raises(TypeError, match=stated):
                linear_kl(*args, impl=impl)
            return
        out = linear_kl(*args, impl=impl)
    assert out.loss.dtype == out.per_token.dtype == stated
    grads = torch.autograd.grad(out.loss, args[:2])
    assert [g.dtype for g in grads] == [hidden, weight]
    if autocast:  # operands are rounded to autocast's dtype, and nothing after them
        rounded = [a.detach().to(autocast).float().requires_grad_(i < 2) for i, a in enumerate(args)]
        torch.testing.assert_close(out, linear_kl(*rounded, impl="reference"))
        if impl == "auto":  # not rounded on the way to an fp32 parameter
            torch.testing.assert_close([g.float() for g in grads], [g.to(d).float() for g, d in zip(
                torch.autograd.grad(linear_kl(*rounded).loss, rounded[:2]), (hidden, weight))])  # fmt: skip


# Shapes, strides, vocabularies, sharing


@pytest.mark.parametrize(("impl", "dtype"), [("auto", torch.float64), ("triton", torch.float32)])
def test_strides(impl, dtype):
    args = tensors(dtype=dtype)
    strided = [
        args[0].detach().repeat_interleave(2, 1)[:, ::2].requires_grad_(),
        args[1].detach().T.contiguous().T.requires_grad_(),
        args[2].T.contiguous().T,
        torch.cat([args[3], args[3]], 1)[:, :DT],
    ]
    assert not any(a.is_contiguous() for a in strided)
    torch.testing.assert_close(gradients(strided, impl), gradients(args, impl))
    strided[0] = args[0].detach()[:1].expand(N, DS).requires_grad_()
    expected = gradients([strided[0].detach().contiguous().requires_grad_(), *args[1:]], impl)
    torch.testing.assert_close(gradients(strided, impl), expected)
    sparse = args[1].detach().repeat_interleave(2, 1).T.repeat_interleave(2, 1).T[::2, ::2].requires_grad_()
    assert 1 not in sparse.stride()
    torch.testing.assert_close(gradients([args[0], sparse, *args[2:]], impl), gradients(args, impl))


@pytest.mark.parametrize(("impl", "dtype"), [("auto", torch.float64), ("triton", torch.float32)])
def test_strided_biases(impl, dtype):
    args = tensors(dtype=dtype)
    student, teacher = torch.randn(V, 2, dtype=dtype), torch.tensor(1.0, dtype=dtype).expand(V)
    strided = {"student_bias": student[:, 1], "teacher_bias": teacher}
    dense = {name: bias.contiguous() for name, bias in strided.items()}
    torch.testing.assert_close(
        linear_kl(*args, impl=impl, **strided), linear_kl(*args, impl="reference", **dense), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padding", [(0, 4), (4, 0), (2, 2), (1, 3)])
def test_padded_vocabularies(impl, padding):
    args = tensors()
    garbage = [torch.full((p, a.shape[1]), 9.0, dtype=torch.float64) for p, a in zip(padding, (args[1], args[3]))]
    weight = torch.cat([args[1].detach(), garbage[0]]).requires_grad_()
    padded = [args[0], weight, args[2], torch.cat([args[3], garbage[1]])]
    if padding[0] != padding[1]:
        with pytest.raises(ValueError, match=r"student_weight has .* teacher_weight has .* vocab_size="):
            linear_kl(*padded, impl=impl)
    torch.testing.assert_close(linear_kl(*padded, vocab_size=V, impl=impl), linear_kl(*args, impl=impl))
    hidden_gradient, gradient = gradients(padded, impl, vocab_size=V)
    torch.testing.assert_close([hidden_gradient, gradient[:V]], gradients(args, impl))
    assert torch.equal(gradient[V:], torch.zeros_like(gradient[V:]))


def test_tied_embeddings():
    """One parameter, reached through the embedding and through the head."""
    args, ids = tensors(), torch.arange(N) % V

    def tied(impl: str) -> torch.Tensor:
        weight = args[1].detach().clone().requires_grad_()
        linear_kl(torch.tanh(weight[ids]), weight, *args[2:], impl=impl).loss.backward()
        return weight.grad

    torch.testing.assert_close(tied("auto"), tied("reference"))


# Cost


@pytest.fixture
def seen_inside(monkeypatch):
    """Recorders do not see inside an operator: its launcher instead."""
    monkeypatch.setattr(op, "_kl", op.kl)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)))
def test_gradients_only_where_asked_for(mode, flags, seen_inside):
    n, v, d = 40, 50, 32
    args, bias = tensors(n, v, d, d, torch.float32), torch.ones(v, requires_grad=True)
    full = gradients(args, student_bias=bias, extra=[bias])
    some = [x.detach().requires_grad_(flag) for x, flag in zip((args[0], args[1], bias), flags)]
    with mode(), record_allocations() as sizes:
        out = linear_kl(some[0], some[1], *args[2:], student_bias=some[2], chunk_rows=3)
    asked = [flag and mode is torch.enable_grad for flag in flags]
    assert out.loss.requires_grad == any(asked)
    assert (v * d in sizes) == asked[1], "dW"
    assert (n * d in sizes) == asked[0], "dX"
    if any(asked):
        out.loss.backward()
    for x, flag, gradient in zip(some, asked, full):
        assert (x.grad is not None) == flag
        if flag:
            torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_never_tokens_times_vocabulary(divergence, beta, seen_inside):
    n, v = 512, 600
    args = tensors(n, v, 8, 8, torch.float32)
    with record_allocations() as sizes:
        gradients(args, divergence=divergence, beta=beta, chunk_rows=16, student_softcap=3.0)
    assert 16 * v in sizes, "the recorder sees the logits"
    assert max(sizes) <= max(16 * v, v * 8, n * 8)


class count_ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_products_per_chunk(seen_inside):
    """Both heads projected once, dX and dW once; useless rows cost nothing."""
    args, w = tensors(40), weights(40, zero=tuple(range(20)))
    with count_ops() as counted:
        gradients(args, token_weight=w, chunk_rows=5)
    assert counted.calls["mm"] == 3 * 4
    assert counted.calls["addmm_"] == 4


def test_no_host_sync_with_rows(seen_inside):
    args, rows = tensors(), torch.tensor([1, 3, 4])
    with refuse_host_sync():
        gradients(args, token_weight=weights(), rows=rows, student_softcap=2.0)
        gradients(args)
    with refuse_host_sync(), pytest.raises(AssertionError, match="nonzero"):
        linear_kl(*args, token_weight=weights())


def test_chunk_rows_are_a_fixed_function():
    for v, d, dtype in itertools.product((2, 100, 32000, 128256, 262144), (1, 256, 8192), (B, S, torch.float64)):
        for triton in (False, True):
            rows = chunked.default_chunk_rows(v, d, dtype, triton)
            wide = 8 if dtype is torch.float64 else 4
            assert rows >= 1
            assert rows * v * (2 * wide + dtype.itemsize if triton else 4 * wide) <= chunked.SCRATCH
    assert chunked.default_chunk_rows(128256, 2048, B, True) == 1536


def test_compiles_into_one_graph():
    args, w, rows = tensors(dtype=torch.float32), weights().float(), torch.tensor([0, 3, 5])

    def loss(*args):
        return linear_kl(*args, token_weight=w, rows=rows, chunk_rows=2).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*args), args[:2])
    torch.testing.assert_close(got, torch.autograd.grad(loss(*args), args[:2]))


# Errors


class DTensor(torch.Tensor):
    """Stands in for torch.distributed's, which needs a process group."""


def _errors():
    h, w, th, tw = (a.detach() for a in tensors())
    grad = torch.zeros(1).requires_grad_()
    yield {"student_hidden": h[None]}, ValueError, "student_hidden must have 2 dimension"
    yield {"student_weight": w.as_subclass(DTensor)}, TypeError, r"student_weight is a DTensor.*full_tensor"
    yield {"student_weight": w[:0]}, ValueError, "student_weight is empty.*gather"
    yield {"student_weight": w[:, :4]}, ValueError, "student_weight must have shape.*to match student_hidden"
    yield {"student_hidden": h.long()}, TypeError, "student_hidden must be a floating-point"
    yield {"teacher_hidden": th[1:]}, ValueError, "student_hidden has 13 rows but teacher_hidden has 12"
    yield {"teacher_hidden": th + grad}, ValueError, "teacher_hidden requires grad.*detach"
    yield {"teacher_weight": tw + grad}, ValueError, "teacher_weight requires grad.*detach"
    yield {"teacher_weight": tw[1:]}, ValueError, "vocab_size="
    yield {"teacher_bias": torch.zeros(V) + grad}, ValueError, "teacher_bias requires grad"
    yield {"student_bias": torch.zeros(V - 1)}, ValueError, "student_bias must have shape"
    yield {"token_weight": torch.ones(N - 1)}, ValueError, "token_weight must have shape"
    yield {"token_weight": torch.ones(N).bool()}, TypeError, "token_weight must be a floating-point"
    yield {"token_weight": torch.ones(N) + grad}, ValueError, "token_weight requires grad"
    yield {"rows": torch.zeros(N).bool()}, TypeError, "rows must be torch.int64"
    yield {"vocab_size": V + 1}, ValueError, "vocab_size must be between 1 and the 17 rows"
    yield {"vocab_size": 0}, ValueError, "vocab_size must be between"
    yield {"divergence": "kl"}, ValueError, "divergence must be one of 'forward_kl', 'reverse_kl', 'jsd', got 'kl'"
    yield {"divergence": "jsd"}, ValueError, "needs 0 < beta < 1, got None"
    yield {"divergence": "jsd", "beta": 1.0}, ValueError, "needs 0 < beta < 1, got 1.0"
    yield {"beta": 0.5}, ValueError, "beta=0.5 has no meaning"
    yield {"temperature": 0.0}, ValueError, "temperature must be positive"
    yield {"student_softcap": -1.0}, ValueError, "student_softcap must be positive"
    yield {"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1"
    yield {"impl": "fast"}, ValueError, "impl must be one of"
    yield {"impl": "triton"}, ValueError, "compute in float32, not in float64.*impl='reference'"


@pytest.mark.parametrize(("change", "error", "message"), list(_errors()))
def test_errors_name_the_argument(change, error, message):
    names = "student_hidden", "student_weight", "teacher_hidden", "teacher_weight"
    with pytest.raises(error, match=rf"linear_kl: .*{message}"):
        linear_kl(**{**dict(zip(names, tensors())), **change})
