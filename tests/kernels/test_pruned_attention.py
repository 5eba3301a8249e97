"""pruned_attention and attention_mass: laws of the specification, and the fast CPU path against it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from attention import dense, keep_mask
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from leaf_kernels import SharedPrefixLayout, attention_mass, pruned_attention

D = 4


def layouts() -> dict[str, SharedPrefixLayout]:
    g = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(9, (n,), generator=g).tolist()

    root, other = ids(13), ids(5)
    shared, _ = SharedPrefixLayout.from_groups(
        [[root, root[:6] + root[9:], root[:12], root, root[2:]], [[], [3]], [other, [*other[:2], 7]]]
    )
    tail = SharedPrefixLayout(shared.segment_starts, shared.prefix_starts, shared.prefix_lens, shared.num_tokens + 3)
    return {"shared": shared, "tail": tail, "plain": SharedPrefixLayout.from_lengths([0, 5, 1, 0, 17, 2, 0])}


def qkv(N: int, Hq: int = 4, Hk: int = 2, dtype=torch.float64, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, H, D, generator=g, dtype=dtype).requires_grad_() for H in (Hq, Hk, Hk)]


OPTIONS = {
    "none": {},
    "scale": {"scale": 0.7},
    "keep": {"keep": True},
    "window": {"window": 3},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": True},
    "keep+window": {"keep": True, "window": 2},
    "all": {"keep": True, "window": 5, "softcap": 1.5, "sinks": True, "scale": 1.3},
}


def options_for(name: str, N: int, Hq: int) -> dict:
    options = dict(OPTIONS[name])
    if options.get("keep"):
        options["keep"] = keep_mask(N)
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-1, 2, Hq, dtype=torch.float64).requires_grad_()
    return options


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout_name", ["shared", "tail", "plain"])
def test_equals_one_dense_softmax(layout_name: str, name: str, impl: str):
    layout = layouts()[layout_name]
    q, k, v = qkv(layout.num_tokens)
    options = options_for(name, layout.num_tokens, 4)
    inputs = [q, k, v] + ([options["sinks"]] if "sinks" in options else [])
    out = pruned_attention(q, k, v, layout, impl=impl, **options)
    expected, *_ = dense(q, k, v, layout, **options)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    actual = torch.autograd.grad(out, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for a, b in zip(actual, wanted):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("Hq", "Hk"), [(1, 1), (3, 1), (6, 2), (7, 1)])
def test_any_gqa_ratio(Hq: int, Hk: int):
    layout = layouts()["shared"]
    q, k, v = qkv(layout.num_tokens, Hq, Hk)
    torch.testing.assert_close(pruned_attention(q, k, v, layout), dense(q, k, v, layout)[0])


def test_lse_merges_and_leaves_the_sink_out():
    layout = layouts()["shared"]
    q, k, v = qkv(layout.num_tokens)
    sinks = torch.full((4,), 30.0, dtype=torch.float64)
    _, lse = pruned_attention(q, k, v, layout, return_lse=True)
    _, with_sink = pruned_attention(q, k, v, layout, return_lse=True, sinks=sinks)
    torch.testing.assert_close(lse, with_sink)
    # Two halves of the keys, merged by their lse, give the whole
    keep = keep_mask(layout.num_tokens)
    (a, la), (b, lb) = (pruned_attention(q, k, v, layout, keep=m, return_lse=True) for m in (keep, ~keep))
    whole, lse = pruned_attention(q, k, v, layout, return_lse=True)
    merged = sum(x * torch.exp(lx - lse).T[..., None] for x, lx in ((a, la), (b, lb)))
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(torch.logaddexp(la, lb), lse)


@pytest.mark.parametrize("softcap", [None, 1.0])
def test_rows_without_keys(softcap):
    """Output 0, lse -inf, every gradient exactly 0 and finite, the sinks' included."""
    layout = layouts()["tail"]
    N = layout.num_tokens
    q, k, v = qkv(N)
    sinks = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros(N, dtype=torch.bool)
    out, lse = pruned_attention(q, k, v, layout, keep=nothing, sinks=sinks, softcap=softcap, return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    for gradient in torch.autograd.grad(out.sum() + torch.where(lse.isfinite(), lse, 0).sum(), [q, k, v, sinks]):
        assert (gradient == 0).all()
    out = pruned_attention(q, k, v, layout, keep=nothing)  # the path through SDPA
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), [q, k, v]))


def test_removed_keys_still_query():
    layout = SharedPrefixLayout.from_lengths([3])
    q, k, v = qkv(3)
    keep = torch.tensor([True, False, True])
    out = pruned_attention(q, k, v, layout, keep=keep)
    torch.testing.assert_close(out[1], v[0].repeat_interleave(2, 0))  # row 1 sees row 0 only


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_nan_in_what_is_not_attended_changes_nothing(impl: str):
    """Another segment's values, a removed key, the tail: bitwise no effect."""
    layout = layouts()["tail"]
    N = layout.num_tokens
    q, k, v = (x.detach() for x in qkv(N))
    keep = torch.ones(N, dtype=torch.bool)
    keep[3] = False
    clean = pruned_attention(q, k, v, layout, keep=keep, impl=impl)
    for bad in (math.nan, math.inf):
        k[3], v[3], q[-1], k[-1], v[-1] = (bad,) * 5
        assert torch.equal(pruned_attention(q, k, v, layout, keep=keep, impl=impl), clean)
    rows = layout.segment_ids == 7  # the last group shares nothing with the first one
    assert rows.any()
    k[0], v[0] = math.nan, math.nan
    assert torch.equal(pruned_attention(q, k, v, layout, keep=keep, impl=impl)[rows], clean[rows])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("prefix", [False, True])
def test_nan_stays_in_its_segment(prefix: bool, window):
    """Segments of 19 and 20 tokens share a padded bucket; the NaN is in a segment of its own."""
    lengths = [2, 40, 20, 19, 20]
    layout = SharedPrefixLayout.from_lengths(lengths)
    if prefix:
        lens = torch.tensor([0, 0, 7, 7, 6], dtype=torch.int32)
        layout = SharedPrefixLayout(layout.segment_starts, torch.where(lens > 0, 2, 0).int(), lens)
    q, k, v = qkv(layout.num_tokens)
    with torch.no_grad():
        q[0], k[0], v[0] = (math.nan,) * 3
    out = pruned_attention(q, k, v, layout, window=window)
    assert out[:2].isnan().all()
    assert out[2:].isfinite().all()
    for gradient in torch.autograd.grad(out[2:].sum(), [q, k, v]):
        assert gradient[2:].isfinite().all()


def test_no_tokens():
    layout = SharedPrefixLayout.from_lengths([0, 0])
    q, k, v = qkv(0)
    out, lse = pruned_attention(q, k, v, layout, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 4, D), (4, 0))
    assert pruned_attention(q, k, v, layout).shape == (0, 4, D)
    assert attention_mass(q, k, layout, queries=torch.zeros(0, dtype=torch.bool)).shape == (4, 0)


def test_gradcheck_with_lse():
    layout, _ = SharedPrefixLayout.from_groups([[[1, 2, 3], [1, 9]]])
    q, k, v = qkv(layout.num_tokens, 2, 1)
    sinks = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda q, k, v, s: pruned_attention(q, k, v, layout, softcap=2.0, sinks=s, return_lse=True), (q, k, v, sinks)
    )


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 1), max_size=9), min_size=1, max_size=4), min_size=1, max_size=5),
    st.sampled_from([None, 1, 3]),
    st.booleans(),
)
def test_fast_path_equals_specification(groups, window, with_keep):
    layout, _ = SharedPrefixLayout.from_groups(groups)
    N = layout.num_tokens
    assume(N)
    q, k, v = qkv(N)
    options = {"window": window, "keep": keep_mask(N) if with_keep else None}
    fast, slow = (pruned_attention(q, k, v, layout, impl=impl, **options) for impl in ("auto", "reference"))
    torch.testing.assert_close(fast, slow)
    for a, b in zip(torch.autograd.grad(fast.sum(), [q, k, v]), torch.autograd.grad(slow.sum(), [q, k, v])):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_strided_inputs_and_expanded_gradients(impl: str):
    """Slices of one QKV projection, and an upstream gradient of stride 0."""
    layout = layouts()["shared"]
    N = layout.num_tokens
    qkv_packed = torch.randn(N, 3, 2, 2 * D, dtype=torch.float64, requires_grad=True)
    views = qkv_packed.unbind(1)
    strided = [x[..., ::2] for x in views]
    out = pruned_attention(*strided, layout, impl=impl)
    expected = pruned_attention(*(x.contiguous() for x in strided), layout, impl=impl)
    torch.testing.assert_close(out, expected)
    one = torch.ones((), dtype=torch.float64)
    a, b = (
        torch.autograd.grad(x, qkv_packed, u)[0]
        for x, u in ((out, one.expand_as(out)), (expected, torch.ones_like(out)))
    )
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3))[1:])
def test_every_subset_of_requires_grad(flags):
    layout = layouts()["shared"]
    inputs = qkv(layout.num_tokens)
    full = torch.autograd.grad(pruned_attention(*inputs, layout).sum(), inputs)
    some = [x.detach().requires_grad_(flag) for x, flag in zip(inputs, flags)]
    before = [x.detach().clone() for x in some]
    pruned_attention(*some, layout).sum().backward()
    for x, flag, gradient, old in zip(some, flags, full, before):
        assert torch.equal(x, old), "an input was modified"
        assert (x.grad is not None) == flag
        if flag:
            torch.testing.assert_close(x.grad, gradient)


def test_nothing_of_size_tokens_squared():
    """64 segments of 64 tokens: no allocation comes near [N, N]."""
    from leaf_kernels.testing import record_allocations

    layout = SharedPrefixLayout.from_lengths([64] * 64)
    q, k, v = (x.detach().float() for x in qkv(layout.num_tokens))
    with record_allocations() as sizes:
        pruned_attention(q, k, v, layout)
    assert max(sizes) < layout.num_tokens**2 // 4


def test_autocast_decides_the_dtype():
    layout = layouts()["plain"]
    q, k, v = qkv(layout.num_tokens, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert pruned_attention(q, k.bfloat16(), v, layout).dtype == torch.bfloat16
        out, lse = pruned_attention(q, k, v, layout, return_lse=True)
        mass = attention_mass(q, k, layout, queries=torch.ones(len(q), dtype=torch.bool))
    q16, k16, v16 = (x.bfloat16() for x in (q, k, v))
    expected, expected_lse = pruned_attention(q16, k16, v16, layout, return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse), "inputs are rounded, the softmax is not"
    assert torch.equal(mass, attention_mass(q16, k16, layout, queries=torch.ones(len(q), dtype=torch.bool)))
    with pytest.raises(TypeError, match="share one dtype"):
        pruned_attention(q, k.bfloat16(), v, layout)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(4, 4)}, ValueError, "q must have 3 dimension"),
        ({"k": torch.zeros(4, 3, D), "v": torch.zeros(4, 3, D)}, ValueError, "multiple of key heads, got 4 and 3"),
        ({"v": torch.zeros(4, 2, D + 1)}, ValueError, "v must have shape"),
        ({"layout": None}, TypeError, "layout must be a SharedPrefixLayout"),
        ({"layout": SharedPrefixLayout.from_lengths([3])}, ValueError, "q has 4 tokens but the layout describes 3"),
        ({"keep": torch.ones(4)}, TypeError, "keep must be torch.bool"),
        ({"keep": torch.ones(3, dtype=torch.bool)}, ValueError, "keep must have shape"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": (128, 0)}, TypeError, "window must be a number of tokens"),
        ({"q": torch.zeros(1, 4, 4, D)}, ValueError, "pass x\\[0\\].transpose"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"sinks": torch.zeros(2)}, ValueError, "sinks must have shape"),
        (
            {"impl": "fast"},
            ValueError,
            "impl must be one of 'auto', 'triton', 'reference', 'torch_varlen', .*, got 'fast'",
        ),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "q": torch.zeros(4, 4, D),
        "k": torch.zeros(4, 2, D),
        "v": torch.zeros(4, 2, D),
        "layout": SharedPrefixLayout.from_lengths([4]),
        **change,
    }
    with pytest.raises(error, match=message):
        pruned_attention(**arguments)


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_mass_is_the_column_sum(name: str):
    layout = layouts()["tail"]
    N = layout.num_tokens
    q, k, v = (x.detach() for x in qkv(N))
    options = options_for(name, N, 4)
    queries = torch.rand(N, generator=torch.Generator().manual_seed(5)) > 0.5
    mass = attention_mass(q, k, layout, queries=queries, **options)
    _, p, _ = dense(q, k, v, layout, **options)
    torch.testing.assert_close(mass, p[:, queries].sum(1).detach())
    assert not mass.requires_grad


def test_attention_mass_chunks_long_segments():
    layout = SharedPrefixLayout.from_lengths([300])
    q, k, _ = (x.detach() for x in qkv(300))
    mass = attention_mass(q, k, layout, queries=torch.ones(300, dtype=torch.bool))
    torch.testing.assert_close(mass.sum(1), torch.full((4,), 300.0, dtype=torch.float64))
