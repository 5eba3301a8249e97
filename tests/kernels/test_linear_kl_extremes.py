"""linear_kl where probabilities are 0, logits far apart, tokens banned or a model broken."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from losses import DIVERGENCES, IMPLS, V, as_on_a_gpu, gradients, logits_as_hidden, tensors

from leaf_kernels import linear_kl


@pytest.mark.parametrize("impl", [*IMPLS, "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [0.05, 0.1, 1, 10])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_extreme_logits(impl, dtype, t, divergence, beta):
    g = torch.Generator().manual_seed(0)
    student = torch.randn(6, 9, generator=g)
    teacher = torch.randn(6, 9, generator=g)
    student[0, 2] += 200
    teacher[1, 4] += 200
    student[2, 1], teacher[2, 5] = 2e4, 2e4
    student[3], teacher[3] = 0, F.one_hot(torch.tensor(3), 9) * 2e4
    teacher[4] = student[4]
    student[5], teacher[5] = F.one_hot(torch.tensor(0), 9) * 2e4, F.one_hot(torch.tensor(0), 9) * 2e4
    args = logits_as_hidden(student.to(dtype), teacher.to(dtype))
    options = {"temperature": t, "divergence": divergence, "beta": beta, "impl": impl}
    out = linear_kl(*args, **options)
    exact = linear_kl(*(a.detach().double() for a in args), **{**options, "impl": "reference"})
    torch.testing.assert_close(out.per_token.double(), exact.per_token, rtol=1e-4, atol=2e-6 * max(t * t, 1))
    assert out.per_token[4].abs() <= 1e-6 * max(t * t, 1)
    for x in torch.autograd.grad(0.01 * out.loss, args[:2]):  # the true gradient of the weight is beyond fp16's range
        assert x.isfinite().all()


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_extreme_gradients_of_16_bits(dtype, divergence, beta, impl, monkeypatch):
    """The reverse KL's gradient with respect to a logit may be beyond fp16: it is clamped, in the direction that it has."""
    as_on_a_gpu(monkeypatch)
    student, teacher = torch.zeros(2, 3), torch.tensor([[2e4, 0, 0], [3, 2, 0]])
    args = logits_as_hidden(student.to(dtype), teacher.to(dtype))
    weight = torch.full((2,), 1e-3)
    options = {"temperature": 0.05, "divergence": divergence, "beta": beta, "token_weight": weight}
    exact = [a.detach().double().requires_grad_(a.requires_grad) for a in args]
    (wanted,) = torch.autograd.grad(linear_kl(*exact, impl="reference", **options).loss, exact[0])
    out = linear_kl(*args, impl=impl, **options)
    hidden, head = torch.autograd.grad(out.loss, args[:2])
    assert head.isfinite().all()
    if divergence == "reverse_kl" and dtype is torch.float16:
        assert wanted[0].abs().max() > 2
        bound = 65504 * 2**-14  # the power of two above w · t
        torch.testing.assert_close(hidden[0].double(), wanted[0].clamp(-bound, bound), rtol=4e-3, atol=0)
    torch.testing.assert_close(hidden[1].double(), wanted[1], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("bias", [None, torch.zeros(V)], ids=["", "bias"])
@pytest.mark.parametrize("where", ["student_hidden", "student_weight", "teacher_hidden", "teacher_weight"])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_nan_that_counts_is_seen(divergence, beta, where, bias, impl):
    """Were it lost, no check of the loss would ever see a broken model."""
    args = [a.detach() for a in tensors(3, dtype=torch.float32)]
    names = ["student_hidden", "student_weight", "teacher_hidden", "teacher_weight"]
    args[names.index(where)][2] = math.nan
    args = [a.requires_grad_(i < 2) for i, a in enumerate(args)]
    options = {"student_bias": bias, "teacher_bias": bias, "divergence": divergence, "beta": beta}
    out = linear_kl(*args, impl=impl, **options)
    assert out.loss.isnan()
    assert out.per_token.isnan().tolist() == [where.endswith("weight")] * 2 + [True]
    nan = [bool(g.isnan().any()) for g in torch.autograd.grad(out.loss, args[:2])]
    assert all(nan) or (impl == "reference" and nan[1])  # torch's clamp, on which biases rest, has no gradient at NaN


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_banned_tokens(impl, divergence, beta):
    """A bias of -inf in both models is the vocabulary without those tokens; in one of them, the gradient stays finite."""
    args = tensors()
    ban = torch.zeros(V, dtype=torch.float64)
    ban[[2, 16]] = -math.inf
    keep = ban == 0
    options = {"divergence": divergence, "beta": beta, "impl": impl}
    banned = {"student_bias": ban, "teacher_bias": ban}
    less = [args[0], args[1][keep], args[2], args[3][keep]]
    torch.testing.assert_close(linear_kl(*args, **banned, **options), linear_kl(*less, **options))
    hidden, weight = gradients(args, **banned, **options)
    expected = torch.autograd.grad(linear_kl(*less, **options).loss, args[:2])
    torch.testing.assert_close([hidden, weight], list(expected))
    assert not weight[~keep].any()


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("one", ["student", "teacher"])
@pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
def test_a_token_that_one_model_bans(divergence, beta, one, softcap, impl):
    """Everything is finite, and the banned product has no gradient, although the other model has mass there."""
    args = tensors(dtype=torch.float32)
    ban = torch.zeros(V)
    ban[[2, 16]] = -math.inf
    options = {"divergence": divergence, "beta": beta, f"{one}_bias": ban, f"{one}_softcap": softcap}
    out, expected = linear_kl(*args, impl=impl, **options), linear_kl(*args, impl="reference", **options)
    got, wanted = (torch.autograd.grad(x.loss, args[:2]) for x in (out, expected))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted[1].abs().max()))
    assert all(g.isfinite().all() for g in got)
    assert got[1][[2, 16]].any() == (one == "teacher")
