"""token_scores, flag_tokens and flagged_spans on an NVIDIA GPU, at the shapes of real models:

    pytest -m gpu tests/kernels/test_token_scores_gpu.py

Scores are held against fp64, flags and spans must be those of the specification on the same scores. Data is random normal.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
from gpu import DEVICE, GPU_ONLY, IMPL, compilations, no_sync

from leaf_kernels import FlaggedSpans, TokenScores, flag_tokens, flagged_spans, token_scores
from leaf_kernels.testing import ragged_lengths, ragged_starts

pytestmark = GPU_ONLY
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of teacher and student: Llama 1B from 70B, 8B from 70B; and widths that no load of 16 bytes divides
WIDTHS = [(8192, 2048), (8192, 4096), (4096, 4096), (4095, 777), (33, 1)]
RULES = [{"q": 0.0}, {"q": 0.1}, {"q": 0.29, "cap": math.inf}, {"q": 1.0}, {"rule": "threshold", "tau": 0.45}]


class Pack(NamedTuple):
    teacher: torch.Tensor
    student: torch.Tensor
    segment_starts: torch.Tensor
    mask: torch.Tensor


def pack(lengths: list[int], widths: tuple[int, int], dtype: torch.dtype, tail: int = 5, device: str = DEVICE) -> Pack:
    """On the device. Rows differ in length by up to a factor of 10, so that the extent of the norms is large."""
    segment_starts = ragged_starts(lengths).to(device)
    N, g = sum(lengths) + tail, torch.Generator(device).manual_seed(0)

    def gradient(width: int) -> torch.Tensor:
        length = torch.rand(N, 1, generator=g, device=device).add_(0.1).to(dtype)
        return torch.randn(N, width, generator=g, device=device, dtype=dtype).mul_(length)

    mask = torch.rand(N, generator=g, device=device) < 0.8
    return Pack(gradient(widths[0]), gradient(widths[1]), segment_starts, mask)


def select(pack: Pack, impl: str = IMPL) -> tuple[TokenScores, torch.Tensor, FlaggedSpans]:
    """All three ops, one after the other."""
    scores = token_scores(pack.teacher, pack.student, pack.segment_starts, scored=pack.mask, impl=impl)
    flags = flag_tokens(scores.score, pack.segment_starts, q=0.1, impl=impl)
    return scores, flags, flagged_spans(flags, pack.segment_starts, impl=impl)


def assert_equal(actual, expected) -> None:
    """Bit by bit, in every tensor of a result."""
    for a, b in zip(actual, expected):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert_equal(a, b)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_scores_against_fp64(dtype, widths, masked):
    teacher, student, segment_starts, mask = pack(ragged_lengths(12, 700), widths, dtype)
    scored = mask if masked else None
    got = token_scores(teacher, student, segment_starts, scored=scored, impl=IMPL)
    exact = token_scores(teacher.double(), student.double(), segment_starts, scored=scored, impl="reference")
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    for x, wanted, atol in zip(got, exact, (0, 0, 10 * tolerance)):
        assert x.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(x.double(), wanted, rtol=tolerance, atol=atol)


def test_mixed_dtypes():
    teacher, student, segment_starts, _ = pack([500, 300], (4096, 2048), torch.bfloat16)
    got = token_scores(teacher, student.float(), segment_starts, impl=IMPL)
    assert_equal([got], [token_scores(teacher, student, segment_starts, impl=IMPL)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_and_transposed_gradients(dtype):
    """Rows that do not start at 16 bytes, and columns that are not next to each other."""
    teacher, student, segment_starts, mask = pack([300, 0, 1, 211], (4100, 1030), dtype)
    views = (teacher[:, 1:4098], student.T.contiguous().T)
    mask = mask.repeat_interleave(2)[::2]
    got = token_scores(*views, segment_starts, scored=mask, impl=IMPL)
    exact = token_scores(*(x.double() for x in views), segment_starts, scored=mask, impl="reference")
    torch.testing.assert_close([x.double() for x in got], list(exact), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "lengths",
    [[131072], [131072, 0, 131072], [650] * 201, [1] * 3000 + [40] * 3000, [0] * 1000 + [5000] + [0] * 1000],
    ids=["one", "two", "packed", "short", "empty"],
)
def test_flags_and_spans_of_long_and_many_segments(lengths, rule):
    p = pack(lengths, (64, 32), torch.bfloat16, tail=4099)
    score = token_scores(p.teacher, p.student, p.segment_starts, scored=p.mask, impl=IMPL).score
    for flaggable in (None, p.mask):
        flags = flag_tokens(score, p.segment_starts, flaggable=flaggable, impl=IMPL, **rule)
        expected = flag_tokens(score, p.segment_starts, flaggable=flaggable, impl="reference", **rule)
        assert torch.equal(flags, expected)
        spans = flagged_spans(flags, p.segment_starts, impl=IMPL)
        assert_equal(spans, flagged_spans(flags, p.segment_starts, impl="reference"))


@pytest.mark.parametrize("rule", [*RULES, {"q": 0.5, "cap": 0.1}, {"rule": "threshold", "tau": -0.1}], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_flags_of_any_score(dtype, rule):
    """Any bits: subnormals, both zeros, ±inf; ties; NaN in every second segment. Against the specification on the CPU."""
    segment_starts = ragged_starts(ragged_lengths(40, 3000))
    N, g = int(segment_starts[-1]) + 9, torch.Generator().manual_seed(0)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(integers)
    bits = torch.randint(info.min, info.max, (N,), generator=g, dtype=integers).view(dtype).nan_to_num(nan=0.1)
    for score in (
        bits,
        (torch.randn(N, generator=g) / 3).to(dtype),
        torch.randint(-9, 9, (N,), generator=g).to(dtype) / 9,
    ):
        score[::17], score[1::17], score[2::17], score[3::17] = 0.0, -0.0, math.inf, -math.inf
        for first, last in list(zip(segment_starts.tolist(), segment_starts.tolist()[1:]))[::2]:
            score[first:last][-1:] = math.nan
        flags = flag_tokens(score.to(DEVICE), segment_starts.to(DEVICE), impl=IMPL, **rule)
        assert torch.equal(flags.cpu(), flag_tokens(score, segment_starts, impl="reference", **rule))


def test_limits_are_not_rounded_twice():
    """q and limits reach the kernel in fp64, whatever Triton does with Python floats."""
    score = (torch.arange(100, device=DEVICE) / 1000).double()
    segment_starts = torch.tensor([0, 100], dtype=torch.int32, device=DEVICE)
    assert int(flag_tokens(score, segment_starts, q=0.29, impl=IMPL).sum()) == 29
    one = segment_starts[:1].new_tensor([0, 1])
    for tau, flagged in ((0.1, True), (0.1 - 2e-17, False)):
        score = torch.tensor([0.1], dtype=torch.float64, device=DEVICE)
        assert bool(flag_tokens(score, one, rule="threshold", tau=tau, impl=IMPL)) is flagged


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("N", [0, 1, 1023, 1024, 1025, 131072, 2_000_003])
def test_spans_of_any_flags(N, share):
    """2 000 003 positions are more blocks than a block has positions."""
    flags = torch.rand(N, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE) < share
    for edges in ([0], [0, N], [0, 0, N // 3, N // 3, N // 3 + min(N, 1), N // 2, N]):
        segment_starts = torch.tensor(edges, dtype=torch.int32, device=DEVICE)
        spans = flagged_spans(flags, segment_starts, impl=IMPL)
        assert_equal(spans, flagged_spans(flags, segment_starts, impl="reference"))


def test_offsets_beyond_two_to_the_31():
    """The last segment of gradients with more than 2^31 elements, against that segment alone."""
    N, width, last = 270_000, 8192, 777
    if torch.cuda.get_device_properties(DEVICE).total_memory < 14 * 2**30:
        pytest.skip("needs 14 GB of GPU memory")
    p = pack([N - last, last], (width, 64), torch.bfloat16, tail=0)
    assert p.teacher.numel() > 2**31
    scores, flags, spans = select(p)
    start = torch.tensor([0, last], dtype=torch.int32, device=DEVICE)
    alone = select(Pack(p.teacher[-last:], p.student[-last:], start, p.mask[-last:]))
    assert_equal([x[-last:] for x in scores], alone[0])
    assert torch.equal(flags[-last:], alone[1])
    offset = N - last
    assert [(a - 1, b - offset, c - offset) for a, b, c in spans.to_list() if a == 1] == alone[2].to_list()


def test_repeats_bitwise():
    p = pack(ragged_lengths(200, 1300), (8192, 2048), torch.bfloat16)
    first = select(p)
    for _ in range(5):
        assert_equal(select(p), first)


def test_no_host_sync():
    p = pack([500, 0, 300], (4096, 2048), torch.bfloat16)
    select(p)  # compiles
    flag_tokens(p.teacher[:, 0].float(), p.segment_starts, rule="threshold", tau=0.1, flaggable=p.mask, impl=IMPL)
    with no_sync():
        select(p)
        flag_tokens(p.teacher[:, 0].float(), p.segment_starts, rule="threshold", tau=0.1, flaggable=p.mask, impl=IMPL)


def test_auto_is_the_kernel():
    p = pack([500, 0, 300], (4096, 2048), torch.bfloat16)
    assert_equal(select(p, "auto"), select(p))


def test_twenty_packs_compile_once():
    """Tokens and segments of every residue, one segment and one token among them."""
    widths = (1008, 2016)
    packs = [pack([1], widths, torch.bfloat16, tail=0)]
    packs += [pack(ragged_lengths(2 + n, 50 + n, seed=n), widths, torch.bfloat16, tail=n) for n in range(19)]
    select(pack([40, 50], widths, torch.bfloat16))
    with compilations() as names:
        for p in packs:
            select(p)
    assert not names, f"20 packs compiled {len(names)} more kernels: {sorted(set(names))}"


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(select, fullgraph=True, backend=counter)
    for n in range(8):
        p = pack([500 + n, 300 - n], (256, 128), torch.bfloat16, tail=1 + n)
        assert_equal(compiled(p), select(p))
    assert counter.frame_count <= 2  # the first length, then any


def test_graph_capture_and_replay():
    static, fresh = (pack([500, 0, 300], (4096, 2048), torch.bfloat16, tail=tail) for tail in (5, 5))
    fresh.teacher.mul_(torch.rand(len(fresh.teacher), 1, device=DEVICE).bfloat16())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile outside the capture
        select(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select(static)
    static.teacher.copy_(fresh.teacher)
    graph.replay()
    assert_equal(captured, select(fresh))


def test_tensors_on_a_second_gpu():
    """While the current device is the first."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    p = pack([500, 0, 300], (256, 128), torch.bfloat16, device="cuda:1")
    with torch.cuda.device(0):
        got = select(p)
    assert got[0].score.device == torch.device("cuda:1")
    assert_equal(
        [x.cpu() for x in got[2]], [x.cpu() for x in flagged_spans(got[1], p.segment_starts, impl="reference")]
    )
