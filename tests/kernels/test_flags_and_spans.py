"""flag_tokens and flagged_spans: laws, the paper's vector, and a loop over segments as the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segments import IMPLS, pack, slices, starts

from leaf_kernels import FlaggedSpans, flag_tokens, flagged_spans, token_scores
from leaf_kernels.ops.token_scores import op
from leaf_kernels.testing import guarded_outputs, ragged_lengths, ragged_starts, refuse_host_sync

INF, NAN = math.inf, math.nan
PAPER = [0.01, 0.02, 0.9, 0.03, 0.8, 0.7, 0.7, 0.7, 0.9, 0.9, 0.8, 0.7, 0.6]
QUANTILES = [{"q": q} for q in (0, 0.05, 0.29, 0.5, 1)]
# 1/12 is one of the scores; 0.3 is between two
THRESHOLDS = [{"rule": "threshold", "tau": tau} for tau in (0.3, 1 / 12, 0.0, -0.0)]


def assert_same(actual: FlaggedSpans, expected: FlaggedSpans) -> None:
    """The unused slots included."""
    for name, got, wanted in zip(FlaggedSpans._fields, actual, expected):
        assert got.dtype == wanted.dtype == torch.int32
        assert torch.equal(got, wanted), f"{name}: got {got.tolist()}, wanted {wanted.tolist()}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("rule", "spans"),
    [
        ({"q": 0.05}, [(0, 0, 1)]),
        ({"q": 0.10}, [(0, 0, 2)]),
        ({"rule": "threshold", "tau": 0.05}, [(0, 0, 2), (0, 3, 4)]),
    ],
)
def test_parity_vector(rule, spans, impl):
    score, segment_starts = torch.tensor(PAPER), starts(0, 13)
    flags = flag_tokens(score, segment_starts, **rule, impl=impl)
    assert flagged_spans(flags, segment_starts, impl=impl).to_list() == spans


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rule=st.sampled_from(QUANTILES + THRESHOLDS),
    cap=st.sampled_from([0.5, 0.2, INF]),
    protect=st.booleans(),
)
def test_flags_and_spans_are_those_of_a_loop(impl, seed, rule, cap, protect):
    _, _, segment_starts, scored = pack(seed, segments=5)
    g = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 12, scored.shape, generator=g) / 12  # with ties
    score[~scored] = INF
    flaggable = torch.rand(scored.shape, generator=g) < 0.8 if protect else None
    flags = flag_tokens(score, segment_starts, cap=cap, flaggable=flaggable, impl=impl, **rule)
    expected, spans = torch.zeros_like(scored), []
    for number, here in enumerate(slices(segment_starts)):
        finite = sorted(v for v in score[here].tolist() if v < INF)
        if not finite:
            continue
        threshold = rule.get("tau")
        if threshold is None:
            threshold = min(finite[min(int(rule["q"] * len(finite)), len(finite) - 1)], cap)
        threshold = torch.tensor(threshold).item()  # to fp32, which scores are in
        for i in range(here.start, here.stop):
            expected[i] = score[i] <= threshold and scored[i] and (flaggable is None or flaggable[i])
            if expected[i] and i > here.start and expected[i - 1]:
                spans[-1] = (number, spans[-1][1], i + 1)
            elif expected[i]:
                spans.append((number, i, i + 1))
    assert torch.equal(flags, expected)
    assert flagged_spans(flags, segment_starts, impl=impl).to_list() == spans


# -- flag_tokens -------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
    kind=st.sampled_from(["any bits", "ties", "close"]),
    rule=st.sampled_from(QUANTILES + THRESHOLDS),
    cap=st.sampled_from([0.5, -0.25, 0.0, INF]),
    protect=st.booleans(),
)
def test_kernel_flags_what_the_specification_flags(seed, dtype, kind, rule, cap, protect):
    """Scores of any sign and size, subnormals and both zeros; ±inf anywhere, a NaN here and there."""
    _, _, segment_starts, mask = pack(seed, segments=4)
    N, g = len(mask), torch.Generator().manual_seed(seed)
    if kind == "any bits":
        integers = {torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
        info = torch.iinfo(integers)
        score = torch.randint(info.min, info.max, (N,), generator=g, dtype=integers).view(dtype)
        score[score.isnan()] = 0.25
    elif kind == "ties":
        score = torch.randint(-12, 12, (N,), generator=g).to(dtype) / 12
    else:  # neighbours in floating point, around the power of two where the exponent changes
        score = 1 + torch.finfo(dtype).eps * torch.randint(-3, 4, (N,), generator=g).to(dtype)

    def some(share: float) -> torch.Tensor:
        return torch.rand(N, generator=g) < share

    for value, share in ((0.0, 0.1), (-0.0, 0.1), (INF, 0.2), (-INF, 0.1), (NAN, 0.02)):
        score[some(share)] = value
    options = {"cap": cap, "flaggable": mask if protect else None, **rule}
    flags = flag_tokens(score, segment_starts, impl="triton", **options)
    assert torch.equal(flags, flag_tokens(score, segment_starts, impl="reference", **options))


@pytest.mark.parametrize("q", [0.0, 0.123, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_statistics_of_long_segments(dtype, q):
    """Several blocks, one of them without scores; odd strides; nothing written beside the flags."""
    g = torch.Generator().manual_seed(0)
    score = torch.randn(600, generator=g, dtype=dtype)[::2]
    score[64:140] = INF
    flaggable = (torch.rand(600, generator=g) < 0.5)[::2]
    segment_starts = starts(0, 203, 203, 204, 290)
    with guarded_outputs():
        flags = flag_tokens(score, segment_starts, q=q, cap=INF, flaggable=flaggable, impl="triton")
    expected = torch.zeros(300, dtype=torch.bool)
    for here in slices(segment_starts):
        finite = score[here][score[here].isfinite()].sort().values
        if len(finite):
            expected[here] = (score[here] <= finite[min(int(q * len(finite)), len(finite) - 1)]) & flaggable[here]
    assert torch.equal(flags, expected)
    assert expected.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_quantile_index_is_taken_in_fp64(impl):
    """0.29 · 100 is 28.999…96 in fp64 and 29.000001 in fp32."""
    score = torch.arange(100) / 1000
    assert flag_tokens(score, starts(0, 100), q=0.29, impl=impl).sum() == int(0.29 * 100) + 1 == 29


@pytest.mark.parametrize("impl", IMPLS)
def test_limits_have_the_precision_of_the_scores(impl):
    """0.1 in fp32 is above 0.1 in fp64, and flagged where 0.1 is the limit; an fp64 score beside it is not."""
    for rule in ({"rule": "threshold", "tau": 0.1}, {"q": 1.0, "cap": 0.1}):
        assert flag_tokens(torch.tensor([0.1]), starts(0, 1), impl=impl, **rule).tolist() == [True]
        beside = torch.tensor([0.1, 0.1 + 2e-17], dtype=torch.float64)
        assert flag_tokens(beside, starts(0, 2), impl=impl, **rule).tolist() == [True, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_zeros_of_both_signs_are_one_score(impl):
    score = torch.tensor([0.0, -0.0, 1.0, -0.0, 0.0])
    for q in (0.0, 0.5):
        assert flag_tokens(score, starts(0, 5), q=q, impl=impl).tolist() == [True, True, False, True, True]
    for tau in (0.0, -0.0):
        flags = flag_tokens(score, starts(0, 5), rule="threshold", tau=tau, impl=impl)
        assert flags.tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("impl", IMPLS)
def test_one_nan_is_enough_to_flag_nothing(impl):
    score = torch.tensor([0.1, NAN, 0.3, 0.1, 0.3])
    for rule in ({"q": 0.5}, {"rule": "threshold", "tau": 0.2}):
        flags = flag_tokens(score, starts(0, 3, 5), impl=impl, **rule)
        assert flags[:4].tolist() == [False, False, False, True]


@pytest.mark.parametrize("impl", IMPLS)
def test_protected_tokens_count(impl):
    score, flaggable = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([False, True, True, True])
    flags = flag_tokens(score, starts(0, 4), q=0.25, flaggable=flaggable, impl=impl)
    assert flags.tolist() == [False, True, False, False]


# -- flagged_spans -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_spans_do_not_cross_segments_and_always_fit(impl):
    flags = torch.ones(6, dtype=torch.bool)
    spans = flagged_spans(flags, starts(0, 2, 2, 5), impl=impl)
    assert spans.to_list() == [(0, 0, 2), (2, 2, 5)]  # position 5 belongs to no segment
    assert {x.dtype for x in spans} == {torch.int32}
    assert len(spans.start) == (6 + 3) // 2
    assert spans.start[2:].tolist() == spans.segment[2:].tolist() == spans.end[2:].tolist() == [-1, -1]
    alternating = torch.tensor([True, False, True] * 4)  # the most spans that there can be
    spans = flagged_spans(alternating, starts(0, 3, 6, 9, 12), impl=impl)
    assert spans.count == len(spans.start) == 8
    assert spans.to_list() == [(i // 3, i, i + 1) for i in range(12) if i % 3 != 1]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    segments=st.sampled_from([2, 3, 8, 40]),
    longest=st.sampled_from([1, 9, 150]),
    share=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    tail=st.sampled_from([0, 1, 70]),
)
def test_kernels_find_the_spans_of_the_specification(seed, segments, longest, share, tail):
    segment_starts = ragged_starts(ragged_lengths(segments, longest, seed=seed))
    N = int(segment_starts[-1]) + tail
    flags = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < share
    expected = flagged_spans(flags, segment_starts, impl="reference")
    assert_same(flagged_spans(flags, segment_starts, impl="triton"), expected)


@pytest.mark.parametrize("N", [1, 63, 64, 65, 128, 300])
@pytest.mark.parametrize("kind", ["one", "every seventh is none", "over the edges of blocks"])
def test_runs_cross_blocks(N, kind):
    """A block has 64 positions. Nothing is written beside the spans."""
    position = torch.arange(N)
    if kind == "one":
        flags = position >= 0
    elif kind == "every seventh is none":
        flags = position % 7 > 0  # ends and starts at every place of a block
    else:
        flags = (position % 64 > 60) | (position % 64 < 2)
    for segment_starts in (starts(0, N), starts(0, 0, N // 3, N // 2, N // 2, N)):
        with guarded_outputs():
            spans = flagged_spans(flags, segment_starts, impl="triton")
        assert_same(spans, flagged_spans(flags, segment_starts, impl="reference"))


def test_more_blocks_than_a_block_has_positions():
    flags = torch.arange(64 * 65) % 5 > 1
    spans = flagged_spans(flags, starts(0, 64 * 65), impl="triton")
    assert_same(spans, flagged_spans(flags, starts(0, 64 * 65), impl="reference"))


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("segment_starts", [starts(0), starts(0, 0), starts(0, 0, 0)])
@pytest.mark.parametrize("N", [0, 2])
def test_nothing_to_flag(segment_starts, N, impl):
    for rule in ({"q": 0.5}, {"rule": "threshold", "tau": 1.0}):
        assert flag_tokens(torch.zeros(N), segment_starts, impl=impl, **rule).tolist() == [False] * N
    with guarded_outputs():
        spans = flagged_spans(torch.ones(N, dtype=torch.bool), segment_starts, impl=impl)
    assert spans.count == 0
    assert spans.start.tolist() == [-1] * min(N, (N + len(segment_starts) - 1) // 2)


def test_no_host_sync_and_no_gradients():
    teacher, student, segment_starts, flaggable = pack(1, segments=3)
    score = token_scores(teacher, student, segment_starts).score.requires_grad_()
    with refuse_host_sync():
        flags = flag_tokens(score, segment_starts, q=0.3, flaggable=flaggable)
        flag_tokens(score, segment_starts, rule="threshold", tau=0.3)
        spans = flagged_spans(flags, segment_starts)
        op.flags(score.detach(), segment_starts, 0.3, 0.5, flaggable)  # an operator would hide a sync
        op.spans(flags, segment_starts)
    assert not flags.requires_grad
    assert not flag_tokens(score, segment_starts, q=0.3, impl="triton").requires_grad
    with refuse_host_sync(), pytest.raises(AssertionError, match="host sync"):
        spans.to_list()


def test_five_launches(monkeypatch):
    teacher, student, segment_starts, _ = pack(1, segments=3)
    names = []

    def launch(kernel, *arguments, **constants):
        names.append(kernel.__name__)
        run(kernel, *arguments, **constants)

    run = op.launch
    monkeypatch.setattr(op, "launch", launch)
    score = token_scores(teacher, student, segment_starts, impl="triton").score
    flagged_spans(flag_tokens(score, segment_starts, q=0.3, impl="triton"), segment_starts, impl="triton")
    assert names == ["row_norms", "segment_scores", "flag_segments", "count_runs", "place_runs"]


def test_operators_pass_opcheck():
    teacher, student, segment_starts, flaggable = pack(1, segments=3)
    score, operators = token_scores(teacher, student, segment_starts).score, torch.ops.leaf_kernels
    torch.library.opcheck(operators.flag_tokens.default, (score, segment_starts, 0.3, 0.5, flaggable))
    torch.library.opcheck(operators.flag_tokens.default, (score, segment_starts, None, 0.5, None))
    torch.library.opcheck(operators.flagged_spans.default, (flaggable, segment_starts))


def test_one_graph_for_all_lengths():
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    def select(teacher, student, segment_starts, scored, impl):
        score = token_scores(teacher, student, segment_starts, scored=scored, impl=impl).score
        flags = flag_tokens(score, segment_starts, q=0.3, impl=impl)
        return flags, flagged_spans(flags, segment_starts, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(select, fullgraph=True, backend=backend)
    for seed in range(8):
        arguments = pack(seed, segments=2 + seed % 3)
        flags, spans = compiled(*arguments, impl="triton")
        expected, expected_spans = select(*arguments, impl="reference")
        assert torch.equal(flags, expected)
        assert_same(spans, expected_spans)
    assert len(graphs) <= 2  # the first length, then any


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: flag_tokens(torch.zeros(2), s), ValueError, "rule='quantile' needs q"),
        (lambda s: flag_tokens(torch.zeros(2), s, q=1.5), ValueError, "q in .0, 1."),
        (lambda s: flag_tokens(torch.zeros(2), s, q=0.1, tau=0.1), ValueError, "and no tau"),
        (lambda s: flag_tokens(torch.zeros(2), s, rule="threshold"), ValueError, "needs tau"),
        (lambda s: flag_tokens(torch.zeros(2), s, rule="top"), ValueError, "'quantile', 'threshold', got 'top'"),
        (
            lambda s: flag_tokens(torch.zeros(2), s, q=0, flaggable=torch.ones(2)),
            TypeError,
            "flaggable must be torch.bool",
        ),
        (lambda s: flagged_spans(torch.zeros(2), s), TypeError, "flags must be torch.bool"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(starts(0, 2))


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_before_the_first_segment_are_in_none(impl: str):
    """As those beyond the last: the result is that of the segments alone."""
    teacher, student, segment_starts, scored = pack(0)
    more = [torch.cat([x[:3] * 9, x]) for x in (teacher, student)]
    mask, shifted = torch.cat([torch.ones(3, dtype=torch.bool), scored]), segment_starts + 3
    alone = token_scores(teacher, student, segment_starts, scored=scored, impl=impl)
    among = token_scores(*more, shifted, scored=mask, impl=impl)
    assert torch.equal(among.score[3:], alone.score)
    assert torch.equal(among.score[:3], torch.full((3,), torch.inf))
    assert torch.equal(among.teacher_norm[:3], torch.zeros(3))
    flags = flag_tokens(torch.cat([torch.zeros(3), alone.score]), shifted, q=0.3, impl=impl)
    assert torch.equal(flags[3:], flag_tokens(alone.score, segment_starts, q=0.3, impl=impl))
    assert not flags[:3].any()
    spans = flagged_spans(torch.cat([torch.ones(3, dtype=torch.bool), flags[3:]]), shifted, impl=impl).to_list()
    expected = flagged_spans(flags[3:], segment_starts, impl=impl).to_list()
    assert spans == [(segment, start + 3, end + 3) for segment, start, end in expected]
