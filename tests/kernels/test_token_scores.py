"""token_scores: laws, and a loop over segments as the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segments import IMPLS, pack, slices, starts

from leaf_kernels import SharedPrefixLayout, flag_tokens, token_scores
from leaf_kernels.ops.token_scores import op
from leaf_kernels.testing import guarded_outputs, refuse_host_sync

INF, NAN = math.inf, math.nan


def min_max(values: list[float], constant: float) -> list[float]:
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else constant for v in values]


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), masked=st.booleans(), tail=st.integers(0, 3))
def test_scores_are_those_of_a_loop(impl, seed, masked, tail):
    teacher, student, segment_starts, scored = pack(seed, tail)
    out = token_scores(teacher, student, segment_starts, scored=scored if masked else None, impl=impl)
    norms, score = torch.zeros(2, len(teacher)), torch.full((len(teacher),), INF)
    for here in slices(segment_starts):
        rows = [i for i in range(here.start, here.stop) if scored[i] or not masked]
        if rows:
            norms[:, rows] = torch.stack([teacher[rows].norm(dim=1), student[rows].norm(dim=1)])
            t, s = (min_max(n[rows].tolist(), 0.0) for n in norms)
            score[rows] = torch.tensor(min_max([a - b for a, b in zip(t, s)], 1.0))
    torch.testing.assert_close((out.teacher_norm, out.student_norm, out.score), (*norms, score))


def test_scaling_a_model_changes_nothing():
    teacher, student, segment_starts, _ = pack(0)
    score = token_scores(teacher, student, segment_starts).score
    torch.testing.assert_close(token_scores(teacher * 1e-3, student * 8, segment_starts).score, score)


@pytest.mark.parametrize("impl", IMPLS)
def test_constants(impl):
    """A constant norm normalises to 0; a constant difference scores 1, so that nothing is flagged."""
    one = torch.ones(4, 1)
    ramp = torch.tensor([[1.0], [2.0], [3.0], [5.0]])
    segment_starts = starts(0, 4)
    assert token_scores(one, ramp, segment_starts, impl=impl).score.tolist() == [1, 0.75, 0.5, 0]
    assert token_scores(ramp, one, segment_starts, impl=impl).score.tolist() == [0, 0.25, 0.5, 1]
    for teacher, student in ((one, one), (ramp, ramp), (ramp[:1], one[:1])):
        where = starts(0, len(teacher))
        score = token_scores(teacher, student, where, impl=impl).score
        assert score.tolist() == [1] * len(teacher)
        assert not flag_tokens(score, where, q=0.9).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("which", [0, 1], ids=["teacher", "student"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_norms_stay_in_their_segment(bad, which, impl):
    teacher, student = torch.arange(1.0, 10).square()[:, None], torch.ones(9, 1)
    segment_starts, scored = starts(0, 3, 6, 9), torch.ones(9, dtype=torch.bool)
    scored[5] = scored[8] = False
    clean = token_scores(teacher, student, segment_starts, scored=scored, impl=impl)
    (teacher, student)[which][[4, 8]] = bad  # scored in the second segment, not scored in the third
    out = token_scores(teacher, student, segment_starts, scored=scored, impl=impl)
    assert out.score[3:5].isnan().all()
    assert out.score[[5, 8]].tolist() == [INF, INF]
    rest = [0, 1, 2, 6, 7]
    assert torch.equal(out.score[rest], clean.score[rest])
    assert flag_tokens(out.score, segment_starts, q=0.0).nonzero().flatten().tolist() == [0, 6]
    assert not flag_tokens(out.score, segment_starts, rule="threshold", tau=2.0)[3:6].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_norms_are_accumulated_wide(dtype, impl):
    """Entries of 1e-4 square to 0 in fp16, and a bf16 sum of 4096 ones stops at 256."""
    gradient = torch.full((3, 4096), 1e-4, dtype=dtype)
    out = token_scores(gradient, torch.ones(3, 4096, dtype=dtype), starts(0, 3), impl=impl)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert {x.dtype for x in out} == {wide}
    torch.testing.assert_close(out.teacher_norm, gradient.to(wide).norm(dim=1))
    torch.testing.assert_close(out.student_norm, torch.full((3,), 64.0, dtype=wide))
    mixed = token_scores(gradient, torch.ones(3, 2), starts(0, 3), impl=impl)
    torch.testing.assert_close(mixed.student_norm, torch.full((3,), 2**0.5))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("segments", [starts(0, 300), starts(0, 129, 129, 130, 290)], ids=["one", "four and a tail"])
def test_long_segments_and_odd_strides(segments, masked):
    """Several blocks of rows and of columns, nothing written beside the outputs."""
    g = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(300, 140, generator=g)[:, 1:136], torch.randn(70, 300, generator=g).T
    scored = torch.rand(600, generator=g)[::2] < 0.7 if masked else None
    with guarded_outputs():
        out = token_scores(teacher, student, segments, scored=scored, impl="triton")
    expected = token_scores(teacher, student, segments, scored=scored, impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_rows_that_are_not_scored_are_not_read():
    """Nor those beyond the last segment: NaN there changes nothing."""
    gradient = torch.ones(5, 3)
    gradient[2:] = NAN
    for where, scored in ((starts(0, 5), torch.arange(5) < 2), (starts(0, 2), None)):
        out = token_scores(gradient, gradient, where, scored=scored, impl="triton")
        assert out.teacher_norm.tolist() == out.student_norm.tolist() == pytest.approx([3**0.5] * 2 + [0] * 3)
        assert out.score.tolist() == [1, 1, INF, INF, INF]


def test_operator_passes_opcheck():
    teacher, student, segment_starts, scored = pack(1)
    for mask in (scored, None):
        torch.library.opcheck(torch.ops.leaf_kernels.token_scores.default, (teacher, student, segment_starts, mask))


def test_one_graph_for_all_lengths():
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(token_scores, fullgraph=True, backend=backend)
    for seed in range(20):
        teacher, student, segment_starts, scored = pack(seed, segments=3 + seed)
        out = compiled(teacher, student, segment_starts, scored=scored, impl="triton")
        torch.testing.assert_close(out, token_scores(teacher, student, segment_starts, scored=scored))
    assert len(graphs) <= 2  # the first length, then any


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("segment_starts", [starts(0), starts(0, 0), starts(0, 0, 0)])
@pytest.mark.parametrize("N", [0, 2])
def test_nothing_to_score(segment_starts, N, impl):
    out = token_scores(torch.ones(N, 3), torch.ones(N, 2), segment_starts, impl=impl)
    assert out.score.tolist() == [INF] * N


def test_no_host_sync_and_no_gradients():
    teacher, student, segment_starts, scored = pack(1)
    teacher.requires_grad_()
    with refuse_host_sync():
        out = token_scores(teacher, student, segment_starts, scored=scored)
        op.scores(teacher.detach(), student, segment_starts, scored)  # an operator would hide a sync
    assert not any(x.requires_grad for x in out)


def test_segment_starts_of_a_layout():
    layout = SharedPrefixLayout.from_lengths([2, 0, 3])
    out = token_scores(torch.rand(5, 3), torch.rand(5, 3), layout.segment_starts)
    assert out.score.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: token_scores(torch.zeros(2), torch.zeros(2, 1), s), ValueError, "teacher_grad must have 2 dim"),
        (lambda s: token_scores(torch.zeros(2, 1), torch.zeros(3, 1), s), ValueError, "student_grad must have shape"),
        (
            lambda s: token_scores(torch.zeros(2, 1).long(), torch.zeros(2, 1), s),
            TypeError,
            "teacher_grad must be a fl",
        ),
        (lambda s: token_scores(torch.zeros(2, 1), torch.zeros(2, 1), s.long()), TypeError, "segment_starts must be"),
        (lambda s: token_scores(torch.zeros(2, 1), torch.zeros(2, 1), s[:0]), ValueError, "segment_starts must have S"),
        (lambda s: token_scores(*[torch.zeros(2, 1)] * 2, s, scored=torch.zeros(2)), TypeError, "scored must be"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(starts(0, 2))
