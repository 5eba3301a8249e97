"""linear_kl_topk: closed forms, laws, and the chunked implementation against the specification."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf_kernels import linear_cross_entropy, linear_kl, linear_kl_topk

IMPLS = ["auto", "reference"]
TAILS = ["bucket", "renormalise"]
N, V, D, K = 11, 17, 6, 4


def inputs(k: int = K, temperature: float = 1.0) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """Student hidden and weight, the teacher's logits, its top k ids and log-probabilities; fp64."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((N, D), (V, D), (N, V)))
    log_probs, ids = F.log_softmax(teacher / temperature, -1).topk(k)
    return [hidden.requires_grad_(), weight.requires_grad_()], teacher, [ids, log_probs]


def weights() -> torch.Tensor:
    w = torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    w[[3, 7]] = 0
    return w


def gradients(out, student: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(out.loss, student))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("t", [1.0, 2.0])
def test_is_the_kl_of_k_plus_1_outcomes(impl, t):
    student, teacher, target = inputs(temperature=t)
    out = linear_kl_topk(*student, *target, temperature=t, impl=impl)
    p, q = (F.softmax(z / t, -1) for z in (teacher, student[0] @ student[1].T))
    kept = F.one_hot(target[0], V).sum(1).bool()

    def outcomes(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.gather(1, target[0]), (x * ~kept).sum(1, keepdim=True)], 1)

    expected = t**2 * F.kl_div(outcomes(q).log(), outcomes(p), reduction="none").sum(1)
    torch.testing.assert_close(out.per_token, expected.detach())
    torch.testing.assert_close(out.covered_mass, (p * kept).sum(1))
    torch.testing.assert_close(gradients(out, student), list(torch.autograd.grad(expected.sum(), student)))
    full = linear_kl(*student, teacher, torch.eye(V, dtype=torch.float64), temperature=t)
    assert (out.per_token <= full.per_token + 1e-12).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_renormalised_is_the_kl_given_the_k(impl):
    student, teacher, target = inputs()
    out = linear_kl_topk(*student, *target, tail="renormalise", impl=impl)
    p, q = (F.log_softmax(z.gather(1, target[0]), -1) for z in (teacher, student[0] @ student[1].T))
    expected = F.kl_div(q, p, reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(out.per_token, expected.detach())
    torch.testing.assert_close(gradients(out, student), list(torch.autograd.grad(expected.sum(), student)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tail", TAILS)
def test_all_tokens_are_the_full_kl(impl, tail):
    student, teacher, target = inputs(V)
    out = linear_kl_topk(*student, *target, tail=tail, impl=impl, token_weight=weights())
    full = linear_kl(*student, teacher, torch.eye(V, dtype=torch.float64), token_weight=weights())
    torch.testing.assert_close(out[:2], full[:2])
    torch.testing.assert_close(gradients(out, student), gradients(full, student))


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_mass_that_rounding_takes_from_all_tokens_is_nobodys(impl):
    """With no other token, what is missing in the probabilities cannot be a tail, on which the student would have 0."""
    student, _, (ids, log_probs) = inputs(V)
    short = log_probs - 0.01
    exact = linear_kl_topk(*student, ids, short, impl="reference")
    no_tail = (short.exp() * (short - F.log_softmax(student[0] @ student[1].T, -1).gather(1, ids))).sum(1)
    torch.testing.assert_close(exact.per_token, no_tail.detach())
    wanted = gradients(exact, student)

    narrow = [x.detach().float().requires_grad_() for x in student]
    out = linear_kl_topk(*narrow, ids, short.float(), impl=impl)
    torch.testing.assert_close(out.per_token.double(), exact.per_token, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([g.double() for g in gradients(out, narrow)], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tail", TAILS)
def test_nothing_known_is_nothing_to_learn(impl, tail):
    """K = 0, and rows of padding alone."""
    student, _, (ids, log_probs) = inputs()
    for target in ((ids[:, :0], log_probs[:, :0]), (torch.full_like(ids, -1), torch.full_like(log_probs, math.nan))):
        out = linear_kl_topk(*student, *target, tail=tail, impl=impl)
        torch.testing.assert_close(out.per_token, torch.zeros_like(out.per_token), rtol=0, atol=1e-15)
        assert not out.covered_mass.any()
        for g in gradients(out, student):
            torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-14)


def test_cross_entropy_is_its_k_of_1():
    student, _, (ids, log_probs) = inputs(1)
    out = linear_kl_topk(*student, ids, torch.zeros_like(log_probs), impl="reference")
    expected = linear_cross_entropy(*student, ids[:, 0], impl="reference")
    torch.testing.assert_close(out[:2], expected[:2])


@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck_of_the_specification(tail):
    student, _, (ids, log_probs) = inputs()
    ids[2, 1:] = ids[4] = -1
    bias = torch.linspace(-1, 1, V, dtype=torch.float64, requires_grad=True)

    def loss(hidden, weight, bias):
        return linear_kl_topk(
            hidden, weight, ids, log_probs, token_weight=weights(), temperature=1.7, tail=tail, student_bias=bias,
            student_softcap=2.0, student_logit_scale=0.6, impl="reference",
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (*student, bias))


@settings(max_examples=40, deadline=None)
@given(
    tail=st.sampled_from(TAILS),
    k=st.sampled_from([1, 4, V]),
    temperature=st.sampled_from([1.0, 0.3, 3.0]),
    softcap=st.sampled_from([None, 2.0]),
    scale=st.sampled_from([1.0, -1.5]),
    bias=st.booleans(),
    padding=st.booleans(),
    vocab_size=st.booleans(),
    selection=st.sampled_from(["all", "weights", "rows", "repeated rows", "none"]),
    chunk_rows=st.sampled_from([None, 1, 4]),
)
def test_chunked_is_the_specification(
    tail, k, temperature, softcap, scale, bias, padding, vocab_size, selection, chunk_rows
):
    student, _, (ids, log_probs) = inputs(k, temperature)
    if padding:
        hide = torch.arange(N * k).view(N, k) % 3 == 0
        ids, log_probs = ids.masked_fill(hide, -1), log_probs.masked_fill(hide, math.nan)
    if vocab_size:
        student[1] = torch.cat([student[1].detach(), torch.full((3, D), 9.0, dtype=torch.float64)]).requires_grad_()
    options = {
        "tail": tail, "temperature": temperature, "student_softcap": softcap, "student_logit_scale": scale,
        "vocab_size": V if vocab_size else None,
    }  # fmt: skip
    leaves = list(student)
    if bias:
        options["student_bias"] = torch.linspace(-2, 2, len(student[1]), dtype=torch.float64).requires_grad_()
        leaves.append(options["student_bias"])
    options |= {
        "all": {},
        "weights": {"token_weight": weights()},
        "rows": {"rows": torch.tensor([7, 2, 10, 3]), "token_weight": weights()},
        "repeated rows": {"rows": torch.tensor([2, 5, 2])},
        "none": {"rows": torch.tensor([], dtype=torch.int64)},
    }[selection]
    out = linear_kl_topk(*student, ids, log_probs, **options, chunk_rows=chunk_rows)
    expected = linear_kl_topk(*student, ids, log_probs, **options, impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(out, leaves), gradients(expected, leaves), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_a_student_that_is_sure_of_the_k(impl):
    """Its other tokens hold e^-60, which 1 − S rounds away; the divergence and its gradient are what they are in fp64."""
    logits = torch.tensor([[60.0, 59.0, 0.0, 1.0, -1.0]])
    target = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.4]]).log()

    def run(dtype, impl):
        hidden = logits.to(dtype).requires_grad_()
        out = linear_kl_topk(hidden, torch.eye(5, dtype=dtype), *target, impl=impl)
        return out.loss.detach().double(), *torch.autograd.grad(out.loss, hidden)

    loss, gradient = run(torch.float32, impl)
    exact_loss, exact_gradient = run(torch.float64, "reference")
    assert exact_loss > 5
    torch.testing.assert_close(loss, exact_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_probabilities_of_more_than_1(impl, dtype):
    """A cache in 16 bits may add up to more than 1: there is no mass left for the others then, not a negative one."""
    student, _, (ids, log_probs) = inputs(V)
    student = [x.detach().float().requires_grad_() for x in student]
    rounded = (log_probs + 0.2).to(dtype)
    out = linear_kl_topk(*student, ids[:, :-1], rounded[:, :-1], impl=impl)
    assert out.covered_mass.max() > 1.1
    wide = [x.detach().double().requires_grad_() for x in student]
    exact = linear_kl_topk(*wide, ids[:, :-1], rounded[:, :-1].double(), impl="reference")
    torch.testing.assert_close(out.per_token.double(), exact.per_token, rtol=1e-5, atol=1e-6)
    got = [g.double() for g in gradients(out, student)]
    torch.testing.assert_close(got, gradients(exact, wide), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("bias", [None, torch.zeros(V)], ids=["", "bias"])
@pytest.mark.parametrize("where", [0, 1], ids=["hidden", "weight"])
@pytest.mark.parametrize("loss", ["bucket", "renormalise", "cross entropy"])
def test_nan_that_counts_is_seen(loss, where, bias, impl):
    student, _, (ids, log_probs) = inputs()
    student = [x.detach().float() for x in student]
    # a row of the head that is not one of the K matters to a tail only
    student[where][2 if where == 0 or loss != "renormalise" else ids[2, 0]] = math.nan
    student = [x.requires_grad_() for x in student]
    if loss == "cross entropy":
        out = linear_cross_entropy(*student, ids[:, 0], bias=bias, impl=impl)
    else:
        out = linear_kl_topk(*student, ids, log_probs.float(), tail=loss, student_bias=bias, impl=impl)
    assert out.loss.isnan()
    assert out.per_token[2].isnan()
    nan = [bool(g.isnan().any()) for g in gradients(out, student)]
    assert all(nan) or (impl == "reference" and nan[1])  # torch's clamp, on which biases rest, has no gradient at NaN


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_weight_0_do_not_matter(impl):
    student, _, (ids, log_probs) = inputs()
    options = {"token_weight": weights(), "rows": torch.arange(N), "impl": impl}
    clean = linear_kl_topk(*student, ids, log_probs, **options)
    clean_gradients = gradients(clean, student)
    with torch.no_grad():
        student[0][3] = math.nan
    log_probs[7], ids[3] = math.inf, 10**6
    dirty = linear_kl_topk(*student, ids, log_probs, **options)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    torch.testing.assert_close(gradients(dirty, student), clean_gradients, rtol=0, atol=0)
    assert (dirty.covered_mass == 0).nonzero().flatten().tolist() == [3, 7]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk_ids": torch.zeros(N, K)}, TypeError, "topk_ids must be torch.int64"),
        ({"topk_ids": torch.zeros(N - 1, K, dtype=torch.int64)}, ValueError, "topk_ids must have shape"),
        ({"topk_ids": torch.zeros(N, dtype=torch.int64)}, ValueError, r"topk_ids must have 2 dimension"),
        ({"topk_ids": torch.full((N, K), V)}, (IndexError, RuntimeError), "out of bounds"),
        ({"topk_ids": torch.full((N, K), -2)}, (IndexError, RuntimeError), "out of bounds"),
        ({"topk_logprobs": torch.zeros(N, K + 1)}, ValueError, "topk_logprobs must have shape"),
        ({"topk_logprobs": torch.zeros(N, K, dtype=torch.int64)}, TypeError, "topk_logprobs must be a floating-point"),
        ({"topk_logprobs": torch.zeros(N, K, requires_grad=True)}, ValueError, "topk_logprobs requires grad.*detach"),
        ({"tail": "drop"}, ValueError, "tail must be one of 'bucket', 'renormalise', got 'drop'"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"vocab_size": V + 1}, ValueError, "vocab_size must be between 1 and the 17 rows"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1"),
        ({"impl": "triton"}, ValueError, "not in float64"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    student, _, target = inputs()
    arguments = dict(zip(("student_hidden", "student_weight", "topk_ids", "topk_logprobs"), (*student, *target)))
    with pytest.raises(error, match=message):
        linear_kl_topk(**{**arguments, **change})
