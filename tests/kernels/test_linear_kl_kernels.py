"""The row kernels of linear_kl and linear_kl_topk, in the interpreter, against the specification in fp64."""

from __future__ import annotations

import functools
import math
import random
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from losses import as_on_a_gpu

from leaf_kernels import linear_cross_entropy, linear_kl, linear_kl_topk
from leaf_kernels.ops.linear_kl import chunked, op, rows_triton
from leaf_kernels.testing import assert_close_to_fp64, guarded_outputs, pairwise, record_peak_bytes, refuse_host_sync

N = 40

DIVERGENCES = {
    "forward": ("forward_kl", None),
    "reverse": ("reverse_kl", None),
    "jsd": ("jsd", 0.5),
    "jsd.1": ("jsd", 0.1),
}
SHARED = {
    "temperature": [1.0, 0.05, 0.5, 4.0],
    "weights": ["none", "zeros", "all zero", "1e-6", "negative"],
    "vocabulary": [
        (75, 75, None),
        (64, 64, None),
        (37, 41, 33),
        (48, 48, 40),
        (3, 3, None),
    ],  # V, V', vocab_size; BLOCK is 64
    "logits": ["random", "gap 200", "gap 2e4", "identical", "one-hot"],
    "dtype": [torch.float32, torch.float16],
    "bias": ["none", "student", "both", "banned"],
    "softcap": [(None, None), (2.0, None), (3.0, 30.0)],
    "scale": [(1.0, 1.0), (-1.5, 0.5)],
    "rows": ["none", "given", "repeated"],
    "wanted": ["hidden weight bias", "hidden", "weight bias"],
    "chunk_rows": [None, 16],
}
KL_CASES = pairwise(divergence=list(DIVERGENCES), **SHARED)
TOPK_CASES = pairwise(tail=["bucket", "renormalise"], K=[5, 1, 33], padding=["none", "some", "all"], **SHARED)


class Problem(NamedTuple):
    student: list[torch.Tensor]  # hidden, weight
    teacher: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    options: dict[str, Any]


def problem(case: dict[str, Any]) -> Problem:
    """The tensors of a case, in its dtype. Heads are the identity: hidden states are logits."""
    g = torch.Generator().manual_seed(0)
    V, V_teacher, vocab_size = case["vocabulary"]
    used = vocab_size or V
    student, teacher = (torch.randn(N, v, generator=g) for v in (V, V_teacher))
    if case["logits"] == "identical":
        teacher[:, :used] = student[:, :used]
    elif case["logits"] == "one-hot":
        teacher = 2e4 * F.one_hot(torch.arange(N) % used, V_teacher).float()
    elif case["logits"] != "random":
        gap = float(case["logits"].removeprefix("gap "))
        student[torch.arange(N), torch.arange(N) % used] += gap * (torch.arange(N) % 3 > 0)
        teacher[torch.arange(N), (torch.arange(N) * 2) % used] += gap * (torch.arange(N) % 2)
    weights = {
        "none": None,
        "zeros": torch.rand(N, generator=g) * (torch.arange(N) % 4 != 1),
        "all zero": torch.zeros(N),
        "1e-6": torch.full((N,), 1e-6),
        "negative": torch.randn(N, generator=g),
    }[case["weights"]]
    if case["weights"] in ("zeros", "all zero"):
        student[weights == 0], teacher[weights == 0] = math.nan, math.inf
    rows = {"none": None, "given": torch.arange(N).flip(0)[3:], "repeated": torch.tensor([*range(20), 2, 5, 2])}[
        case["rows"]
    ]
    biases = [None if case["bias"] == "none" else torch.linspace(-2, 2, V), None]
    if case["bias"] in ("both", "banned"):
        biases[1] = torch.linspace(1, -1, V_teacher)
    if case["bias"] == "banned":
        for bias, scale in zip(biases, case["scale"]):
            bias[1] = -math.inf * math.copysign(1, scale)
    options = {
        "token_weight": weights, "rows": rows, "temperature": case["temperature"], "vocab_size": vocab_size,
        "chunk_rows": case["chunk_rows"],
    }  # fmt: skip
    heads = [[x.to(case["dtype"]), torch.eye(x.shape[1], dtype=case["dtype"])] for x in (student, teacher)]
    return Problem(*heads, [b if b is None else b.to(case["dtype"]) for b in biases], options)


def leaves(case: dict[str, Any], inputs: Problem, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """hidden, weight and bias of the student in `dtype`, requiring what gradients the case wants."""
    return [
        x if x is None else x.detach().to(dtype).requires_grad_(name in case["wanted"])
        for name, x in zip(("hidden", "weight", "bias"), (*inputs.student, inputs.biases[0]))
    ]


def run_kl(impl: str, case: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inputs = problem(case)
    hidden, weight, bias = student = leaves(case, inputs, dtype)
    divergence, beta = DIVERGENCES[case["divergence"]]
    out = linear_kl(
        hidden, weight, *(x.to(dtype) for x in inputs.teacher), **inputs.options, divergence=divergence, beta=beta,
        student_bias=bias, teacher_bias=None if inputs.biases[1] is None else inputs.biases[1].to(dtype),
        student_softcap=case["softcap"][0], teacher_softcap=case["softcap"][1], student_logit_scale=case["scale"][0],
        teacher_logit_scale=case["scale"][1], impl=impl,
    )  # fmt: skip
    return {"per_token": out.per_token, "loss": out.loss.detach(), **gradients_of(out.loss, student)}


def run_topk(impl: str, case: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inputs = problem(case)
    hidden, weight, bias = student = leaves(case, inputs, dtype)
    used = case["vocabulary"][2] or case["vocabulary"][0]
    logits = inputs.teacher[0][:, :used].float().nan_to_num(0) / case["temperature"]
    log_probs, ids = F.log_softmax(logits, -1).topk(min(case["K"], used), sorted=False)
    if case["padding"] != "none":
        pad = (torch.arange(ids.numel()).view_as(ids) % 3 == 1) | (torch.arange(N) % 5 == 0)[:, None]
        pad |= torch.tensor(case["padding"] == "all")
        ids, log_probs = ids.masked_fill(pad, -1), log_probs.masked_fill(pad, math.nan)
    out = linear_kl_topk(
        hidden, weight, ids, log_probs, **inputs.options, tail=case["tail"], student_bias=bias,
        student_softcap=case["softcap"][0], student_logit_scale=case["scale"][0], impl=impl,
    )  # fmt: skip
    return {"per_token": out.per_token, "loss": out.loss.detach(), **gradients_of(out.loss, student)}


def gradients_of(loss: torch.Tensor, leaves: list[torch.Tensor | None]) -> dict[str, torch.Tensor]:
    wanted = {name: x for name, x in zip(("hidden", "weight", "bias"), leaves) if x is not None and x.requires_grad}
    # the gradient of a weight under logits of 2e4 would be beyond the range of fp16
    return dict(zip(wanted, torch.autograd.grad(0.01 * loss, list(wanted.values()))))


def check(run, case: dict[str, Any]) -> None:
    """Finite, within the error budget, every output written and nothing beside it."""
    with guarded_outputs():
        actual = run("triton", case, case["dtype"])
    plain = run("reference", case, case["dtype"])
    oracle = run("reference", case, torch.float64)
    largest = {"gap 2e4": 2e4, "one-hot": 2e4, "gap 200": 200}.get(case["logits"], 5)
    for name, exact in oracle.items():
        assert actual[name].dtype == plain[name].dtype
        if exact.abs().max() > torch.finfo(plain[name].dtype).max:
            continue  # banned by one model, in fp16
        assert actual[name].isfinite().all(), name
        floor = rounding(name, case, largest, float(exact.abs().max()))
        try:
            assert_close_to_fp64(actual[name], plain[name], exact, max_lse=floor)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        if case["dtype"] is torch.float32 and exact.abs().max() > 16 * torch.finfo(torch.float32).eps * floor:
            with pytest.raises(AssertionError):  # the bound is one
                assert_close_to_fp64(torch.zeros_like(exact), plain[name], exact, max_lse=floor)


def unit(name: str, case: dict[str, Any], largest: float) -> float:
    """The size of an output whose probabilities differ by about 1, with logits of size `largest`."""
    weight = {"1e-6": 1e-6, "all zero": 0.0, "negative": 3.0}.get(case["weights"], 1.0)
    t, gradient = case["temperature"], 0.01 * weight * case["temperature"] * abs(case["scale"][0])
    return {
        "per_token": t**2, "loss": weight * N * t**2, "hidden": gradient, "weight": largest * gradient, "bias": gradient,
    }[name]  # fmt: skip


def rounding(name: str, case: dict[str, Any], largest: float, exact: float) -> float:
    """A softmax of logits of size L has a relative error of eps·L, whatever the formula."""
    capped = [cap or largest * abs(scale) for scale, cap in zip(case["scale"], case["softcap"])]
    return max(max(capped) / case["temperature"], 5) * max(unit(name, case, largest), exact)


def case_id(case: dict[str, Any]) -> str:
    return "-".join(str(v).removeprefix("torch.") for v in case.values())


@pytest.mark.parametrize("case", KL_CASES, ids=case_id)
def test_kl_cases(case):
    check(run_kl, case)


@pytest.mark.parametrize("case", TOPK_CASES, ids=case_id)
def test_topk_cases(case):
    check(run_topk, case)


@pytest.mark.parametrize("student_slope", [1, -1])
@pytest.mark.parametrize("teacher_slope", [1, -1])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_pivots_that_move_from_block_to_block(divergence, student_slope, teacher_slope):
    """Every block of a row of four raises the largest logit, or none does."""
    logits = torch.linspace(-6, 6, 200) + torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(0))
    student, teacher = student_slope * logits[0], teacher_slope * logits[1]
    eye = torch.eye(200)
    options = dict(zip(("divergence", "beta"), DIVERGENCES[divergence]))
    student.requires_grad_()
    got, exact = (
        linear_kl(student.to(dtype), eye.to(dtype), teacher.to(dtype), eye.to(dtype), impl=impl, **options)
        for impl, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    torch.testing.assert_close(got.per_token.double(), exact.per_token, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x.loss, student)[0] for x in (got, exact)), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(150))
def test_random_cases(seed):
    """Combinations of three and more."""
    draw = random.Random(seed)
    case = {factor: draw.choice(values) for factor, values in SHARED.items()}
    check(run_kl, {"divergence": draw.choice(list(DIVERGENCES)), **case})
    topk = {"tail": ["bucket", "renormalise"], "K": [5, 1, 33], "padding": ["none", "some", "all"]}
    check(run_topk, {**{factor: draw.choice(values) for factor, values in topk.items()}, **case})


def inputs(n: int = 12, v: int = 70, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Student hidden and weight, teacher hidden and weight."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=g).to(dtype) for shape in ((n, 6), (v, 6), (n, 5), (v, 5))]
    return [tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:]]


def topk_of(tensors: list[torch.Tensor], k: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs, ids = F.log_softmax(tensors[2].float() @ tensors[3].float().T, -1).topk(k)
    return ids, log_probs


def kl(tensors, impl="triton", **options):
    return linear_kl(*tensors, impl=impl, **options)


def jsd(tensors, impl="triton", **options):
    return linear_kl(*tensors, impl=impl, divergence="jsd", beta=0.3, **options)


def topk(tensors, impl="triton", **options):
    return linear_kl_topk(*tensors[:2], *topk_of(tensors), impl=impl, **options)


def cross_entropy(tensors, impl="triton", **options):
    return linear_cross_entropy(*tensors[:2], topk_of(tensors, 1)[0][:, 0], impl=impl, **options)


each_loss = pytest.mark.parametrize("loss", [kl, jsd, topk, cross_entropy])


@pytest.mark.parametrize("rows", [None, torch.arange(12)])
@each_loss
def test_rows_of_weight_0_do_not_matter(loss, rows):
    """Bitwise, whatever they hold."""
    tensors, weight = inputs(), torch.rand(12, generator=torch.Generator().manual_seed(1))
    weight[[3, 7]] = 0
    results = []
    for poison in (0.0, math.nan, math.inf):
        with torch.no_grad():
            tensors[0][3], tensors[2][7] = poison, -poison
        out = loss(tensors, token_weight=weight, rows=rows)
        results.append([out.loss.detach(), out.per_token, *torch.autograd.grad(out.loss, tensors[:2])])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["auto", "triton"])
@each_loss
def test_gradients_of_a_row_do_not_depend_on_the_weights_of_others(loss, impl):
    """Bitwise: the gradient is stored divided by a power of two, which rounds nothing."""
    tensors, weight = inputs(), torch.full((12,), 0.3)
    (once,) = torch.autograd.grad(loss(tensors, impl, token_weight=weight).loss, tensors[:1])
    weight[5] = 7.7
    (again,) = torch.autograd.grad(loss(tensors, impl, token_weight=weight).loss, tensors[:1])
    same = (once == again).all(1)
    assert same.tolist() == [n != 5 for n in range(12)]


@each_loss
def test_upstream_gradients_and_micro_batches(loss):
    tensors, weight = inputs(), torch.rand(12, generator=torch.Generator().manual_seed(1))
    before = [t.detach().clone() for t in tensors]
    value = loss(tensors, token_weight=weight).loss
    once = torch.autograd.grad(value, tensors[:2], retain_graph=True)
    again = torch.autograd.grad(value**2, tensors[:2], retain_graph=True)
    torch.testing.assert_close(again, tuple(2 * value.detach() * g for g in once), rtol=1e-6, atol=0)
    value.backward(retain_graph=True)
    value.backward()
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip(tensors[:2], once))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))
    for t in tensors[:2]:
        t.grad = None
    for part in (slice(0, 1), slice(1, 8), slice(8, 12)):
        cut = [tensors[0][part], tensors[1], tensors[2][part], tensors[3]]
        loss(cut, token_weight=weight[part]).loss.backward()
    torch.testing.assert_close([t.grad for t in tensors[:2]], list(once), rtol=1e-5, atol=1e-6)


def test_cross_entropy_is_torchs():
    tensors = inputs()
    labels = torch.arange(12) * 6
    labels[-1] = 69
    out = linear_cross_entropy(*tensors[:2], labels, impl="triton", logit_scale=0.5)
    expected = F.cross_entropy(0.5 * tensors[0] @ tensors[1].T, labels, reduction="none")
    torch.testing.assert_close(out.per_token, expected.detach())
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, tensors[:2]), torch.autograd.grad(expected.sum(), tensors[:2])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_loss
def test_gradients_of_16_bits(loss, dtype, monkeypatch):
    """The kernels round the logit gradient to 16 bits, once."""
    as_on_a_gpu(monkeypatch)
    name = "bias" if loss is cross_entropy else "student_bias"
    tensors = [*inputs(dtype=dtype), torch.linspace(-1, 1, 70).to(dtype).requires_grad_()]
    weight = torch.full((12,), 1 / 32768)  # keeps its digits
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    trained = [0, 1, 4]
    *narrow, bias = (t.float() for t in wide)
    expected = torch.autograd.grad(loss(narrow, **{name: bias}).loss, [wide[n] for n in trained])
    out = loss(tensors[:4], token_weight=weight, **{name: tensors[4]})
    for got, exact in zip(torch.autograd.grad(32768 * out.loss, [tensors[n] for n in trained]), expected):
        assert got.dtype == dtype
        assert (got.double() - exact).norm() <= torch.finfo(dtype).eps * exact.norm()


# What the launchers allocate and wait for


@pytest.fixture
def launchers(monkeypatch):
    monkeypatch.setattr(op, "_kl", op.kl)
    monkeypatch.setattr(op, "_topk", op.topk)


@pytest.mark.parametrize("frozen", [False, True])
@each_loss
def test_scratch_does_not_depend_on_the_number_of_rows(loss, frozen, launchers, monkeypatch):
    """Beside dX, dW and a few numbers per row, memory is the logits of a chunk and their gradient."""
    monkeypatch.setattr(rows_triton, "launch", lambda *args, **constants: None)  # the interpreter makes copies
    v, c, scratch, find_topk = 200, 4, [], topk_of
    for n in (8, 32):
        tensors = inputs(n, v)
        tensors[1].requires_grad_(not frozen)
        target = find_topk(tensors)
        monkeypatch.setitem(globals(), "topk_of", lambda tensors, k=4, target=target: [x[:, :k] for x in target])
        with record_peak_bytes() as peak:
            out = loss(tensors, chunk_rows=c)
        del out
        scratch.append(peak[0] - 4 * n * 6 - (0 if frozen else 4 * v * 6))
    models = 1 if loss in (topk, cross_entropy) else 2
    width = 208  # rows are padded to a multiple of 16
    assert scratch[1] - scratch[0] <= 24 * 100  # bytes per row: weights, ids, values
    assert scratch[0] <= (models + 1) * 4 * c * width + 3000


@pytest.mark.parametrize(
    ("student", "teacher", "V"), [(2048, 4096, 128256), (2048, 8192, 128256), (1536, 8192, 151936)]
)
def test_scratch_of_real_sizes(student, teacher, V, launchers, monkeypatch):
    """At most 2 GiB beside dX, hidden states and all; no page of it is touched here, because nothing is computed."""
    monkeypatch.setattr(rows_triton, "launch", lambda *args, **constants: None)
    monkeypatch.setattr(chunked, "operand_dtype", lambda dtype, device: dtype)
    for product in ("mm_into", "addmm_into"):
        monkeypatch.setattr(chunked, product, lambda out, a, b: out)
    N = 8192
    sizes = (N, student), (V, student), (N, teacher), (V, teacher)
    tensors = [torch.empty(size, dtype=torch.bfloat16) for size in sizes]
    tensors[0].requires_grad_()
    with record_peak_bytes() as peak:
        kl(tensors, rows=torch.arange(N))
    dx = 2 * N * student
    assert 1.5 * 2**30 < peak[0] - dx <= 2**31


@each_loss
def test_no_host_sync(loss, launchers):
    tensors = inputs()
    with refuse_host_sync():
        loss(tensors, token_weight=torch.ones(12), rows=torch.arange(3)).loss.backward()


# The operators


def operator_calls(triton: bool):
    hidden, weight, teacher_hidden, teacher_weight = (t.detach() for t in inputs())
    shared = (hidden, weight, None, 2.0, 1.0, torch.tensor([1, 5, 2]), torch.rand(3), 1.0, torch.float32, 2)
    kl = (teacher_hidden, teacher_weight, None, None, 1.0, "forward_kl", 0.0)
    ids, log_probs = topk_of(inputs())
    for wants in ([True, True, False], [False, False, False]):
        yield torch.ops.leaf_kernels.linear_kl.default, (*shared, wants, triton, *kl)
        yield torch.ops.leaf_kernels.linear_kl_topk.default, (*shared, wants, triton, ids[:3], log_probs[:3], True)


@pytest.mark.parametrize("triton", [False, True])
def test_operators_pass_opcheck(triton):
    for operator, arguments in operator_calls(triton):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("loss", [kl, topk])
def test_one_graph_for_all_lengths(loss):
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    loss = functools.partial(loss, impl="auto")  # the same operator; its insides are not traced
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    torch._dynamo.reset()
    for n in range(3, 23):
        tensors = inputs(n)
        options = {"token_weight": torch.rand(n), "rows": torch.arange(n - 1), "chunk_rows": 8}
        out, expected = compiled(tensors, **options), loss(tensors, **options)
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(
            torch.autograd.grad(out.loss, tensors[0]), torch.autograd.grad(expected.loss, tensors[0])
        )
    assert len(graphs) <= 2  # the first length, then any
