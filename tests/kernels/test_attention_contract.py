"""What the attention operators promise besides the numbers: schedules, memory, gradients, compilation, refusals."""

from __future__ import annotations

import inspect
import itertools
import math
from unittest import mock

import pytest
import torch
from attention import BLOCK, dense, keep_mask, layouts, packed, qkv, visibility
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf_kernels import SharedPrefixLayout, attention_mass, pruned_attention
from leaf_kernels.ops.attention_mass import op as mass_op
from leaf_kernels.ops.pruned_attention import op
from leaf_kernels.ops.pruned_attention.arguments import large_offsets, rows_dense
from leaf_kernels.ops.pruned_attention.configs import Tile
from leaf_kernels.ops.pruned_attention.schedule import key_tiles, query_tiles
from leaf_kernels.testing import guarded_outputs, record_allocations, record_peak_bytes, refuse_host_sync

SMALL = packed((BLOCK + 3, [(5, 4), (BLOCK, 2)]), tail=1)

groups_strategy = st.lists(
    st.tuples(st.integers(0, 50), st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), max_size=4)), max_size=4
)


def layout_of(groups, tail: int) -> SharedPrefixLayout:
    return packed(*[(root, [(min(p, root), n) for p, n in members]) for root, members in groups], tail=tail)


# -- schedules -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(groups_strategy, st.integers(0, 20), st.sampled_from([1, 3, 4, 7, 40]))
def test_query_tiles_cover_every_row_once(groups, tail, group):
    layout = layout_of(groups, tail)
    lengths = [*layout.segment_starts.diff().tolist(), tail]
    found = [(s, f) for s, f in query_tiles(layout, group, BLOCK).tolist() if s >= 0]
    expected = [(s, f) for s, n in enumerate(lengths) for f in range(0, n * group, BLOCK)]
    assert sorted(found) == expected


@settings(max_examples=60, deadline=None)
@given(groups_strategy, st.integers(0, 20))
def test_key_tiles_know_their_readers(groups, tail):
    layout = layout_of(groups, tail)
    lengths = [*layout.segment_starts.diff().tolist(), tail]
    tiles, dependants = key_tiles(layout, BLOCK)
    found = [row for row in tiles.tolist() if row[0] >= 0]
    assert sorted(row[:2] for row in found) == [[s, f] for s, n in enumerate(lengths) for f in range(0, n, BLOCK)]
    starts = [*layout.segment_starts.tolist()]
    for segment, first, begin, covering, reaching in found:
        lens = {
            s: p
            for s, (_, _, start, p) in enumerate(layout.spans())
            if p and start == starts[segment] and segment < layout.num_segments
        }
        assert sorted(dependants[begin:covering].tolist()) == [s for s, p in lens.items() if p >= first + BLOCK]
        assert sorted(dependants[begin:reaching].tolist()) == [s for s, p in lens.items() if p > first]


def test_longest_tiles_come_first():
    layout = packed((100, [(90, 40)]), (10, []))
    assert query_tiles(layout, 1, BLOCK)[0].tolist() == [1, 32], "keys 90 + 40"
    assert key_tiles(layout, BLOCK)[0][0, :2].tolist() == [0, 0], "read by 140 queries"


def test_schedules_are_built_once_and_without_a_sync():
    layout = layouts()["prefix"]
    with refuse_host_sync():
        tiles, keys = query_tiles(layout, 4, BLOCK), key_tiles(layout, BLOCK)
    assert query_tiles(layout, 4, BLOCK) is tiles
    assert key_tiles(layout, BLOCK) is keys


def test_schedules_of_many_and_of_long_segments():
    """70 000 segments, a million tokens: grids are one-dimensional and grow with tokens, not with segments x longest."""
    many = SharedPrefixLayout.from_lengths([3] * 70_000)
    long = SharedPrefixLayout.from_lengths([1 << 20])
    assert (query_tiles(many, 4, 128)[:, 0] >= 0).sum() == 70_000
    assert len(query_tiles(many, 4, 128)) <= 3 * 70_000 * 4 // 128 + 70_001
    assert len(query_tiles(long, 4, 128)) == (1 << 20) * 4 // 128 + 2
    assert len(key_tiles(long, 64)[0]) == (1 << 20) // 64 + 2


# -- gradients and inputs ------------------------------------------------------------------------------------------


def test_grouped_query_strides_upstream_and_inputs_left_alone():
    """Slices of one QKV projection, strided within a head too, and upstream gradients of stride 0: as contiguous ones."""
    N, D = SMALL.num_tokens, 16
    projection = torch.randn(N, 4, 2 * D + 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    q, k, v = projection[:, :2, :D], projection[:, 2:3, 1 : 2 * D + 1 : 2], projection[:, 3:, 2 : D + 2]
    before = projection.detach().clone()
    results = []
    for inputs in ((q, k, v), tuple(x.contiguous() for x in (q, k, v))):
        for upstream in (torch.ones(()).expand(N, 2, D), torch.ones(N, D, 2).transpose(1, 2)):
            out = pruned_attention(*inputs, SMALL, impl="triton")
            with guarded_outputs():
                results.append([out, *torch.autograd.grad(out, [projection], upstream)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    assert torch.equal(projection, before)


@pytest.mark.parametrize("deterministic", [True, False])
def test_every_other_input_may_be_a_view(deterministic: bool):
    """keep, sinks and queries with gaps, upstream gradients transposed; q and k of attention_mass as slices."""
    N, D = SMALL.num_tokens, 16
    g = torch.Generator().manual_seed(0)
    wide = [torch.randn(N, heads, 2 * D, generator=g)[..., ::2] for heads in (4, 2, 2)]
    masks = torch.rand(N, 2, generator=g) > 0.3
    sinks = torch.randn(8, generator=g)[::2]
    upstream = torch.randn(D, 4, N, generator=g).permute(2, 1, 0), torch.randn(N, 4, generator=g).T
    results = []
    for form in (lambda x: x, lambda x: x.contiguous()):
        q, k, v = (form(x).requires_grad_() for x in wide)
        s = form(sinks).requires_grad_()
        keep, queries = form(masks[:, 0]), form(masks[:, 1])
        out, lse = pruned_attention(
            q, k, v, SMALL, keep=keep, sinks=s, return_lse=True, impl="triton", deterministic=deterministic
        )
        gradients = torch.autograd.grad((out, lse), (q, k, v, s), tuple(form(x) for x in upstream))
        mass = attention_mass(q, k, SMALL, queries=queries, keep=keep, sinks=s, impl="triton")
        results.append([out, lse, mass, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("deterministic", [True, False])
def test_every_subset_of_requires_grad(deterministic: bool):
    tensors = [*qkv(SMALL.num_tokens, 2, 1, 16, torch.float32), torch.tensor([0.3, -0.2], requires_grad=True)]

    def gradients(flags) -> list[torch.Tensor | None]:
        some = [x.detach().clone().requires_grad_(flag) for x, flag in zip(tensors, flags)]
        out, lse = pruned_attention(
            *some[:3], SMALL, sinks=some[3], return_lse=True, impl="triton", deterministic=deterministic
        )
        assert out.requires_grad == any(flags)
        if any(flags):
            (out.sum() + lse[:, :-1].sum()).backward()
        return [x.grad for x in some]

    full = gradients([True] * 4)
    for flags in itertools.product([False, True], repeat=4):
        with mock.patch.object(op, "launch", wraps=op.launch) as launches:
            for got, flag, expected in zip(gradients(flags), flags, full):
                assert (got is not None) == flag
                if flag:
                    torch.testing.assert_close(got, expected)
        names = [call.args[0].__name__ for call in launches.call_args_list]
        assert ("backward_kv" in names) == (flags[1] or flags[2]), "nothing is computed that nobody asked for"
        alone = flags[0] and (deterministic or not (flags[1] or flags[2]))
        assert ("backward_q" in names) == alone
        reduced = [call.kwargs["DQ"] != "none" for call in launches.call_args_list if "DQ" in call.kwargs]
        assert not any(reduced) or (flags[0] and not deterministic), "dq is not computed where nobody asked for it"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_forward_runs(mode):
    q, k, v = qkv(SMALL.num_tokens, 2, 1, 16, torch.float32)
    layout = SharedPrefixLayout(SMALL.segment_starts, SMALL.prefix_starts, SMALL.prefix_lens, SMALL.num_tokens)
    with mode():
        assert not pruned_attention(q, k, v, layout, impl="triton").requires_grad
    assert [key[0] for key in layout._cache] == ["query_tiles"], "no schedule of a backward that will not run"


def test_a_layout_that_was_used_for_inference_serves_training():
    q, k, v = qkv(SMALL.num_tokens, 2, 1, 16, torch.float32)
    with torch.inference_mode():
        layout = SMALL._map(torch.clone)  # what moving it to a device does
        pruned_attention(q, k, v, layout, impl="triton")
        attention_mass(q, k, layout, queries=torch.ones(len(q), dtype=torch.bool), impl="triton")
    pruned_attention(q, k, v, layout, impl="triton").sum().backward()
    assert q.grad is not None


def test_double_backward_is_refused():
    q, k, v = qkv(SMALL.num_tokens, 2, 1, 16, torch.float32)
    out = pruned_attention(q, k, v, SMALL, impl="triton")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_backward_twice_doubles():
    q, k, v = qkv(SMALL.num_tokens, 2, 1, 16, torch.float32)
    loss = pruned_attention(q, k, v, SMALL, impl="triton").square().sum()
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in (q, k, v)]
    loss.backward()
    assert all(torch.equal(x.grad, 2 * g) for x, g in zip((q, k, v), once))


def test_checkpointing_gives_the_same_gradients():
    inputs = qkv(SMALL.num_tokens, 2, 1, 16, torch.float32)

    def attend(q, k, v):
        return pruned_attention(q, k, v, SMALL, impl="triton")

    plain = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    again = torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(again.square().sum(), inputs), plain))


def test_a_checkpointing_policy_can_name_the_operator():
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    inputs = qkv(SMALL.num_tokens, 2, 1, 16, torch.float32)
    seen = []

    def policy(_, called, *args, **kwargs):
        seen.append(str(called))
        mine = called is torch.ops.leaf_kernels.pruned_attention.default
        return CheckpointPolicy.MUST_SAVE if mine else CheckpointPolicy.PREFER_RECOMPUTE

    with mock.patch.object(op, "launch", wraps=op.launch) as launches:
        out = checkpoint(
            lambda q, k, v: pruned_attention(q, k, v, SMALL, impl="triton"),
            *inputs,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )
        out.sum().backward()
    assert "leaf_kernels.pruned_attention.default" in seen
    assert [call.args[0].__name__ for call in launches.call_args_list].count("forward") == 1, "saved, not run again"


# -- NaN and absent rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_is_not_attended_changes_nothing(deterministic: bool):
    """NaN in removed keys, the tail, another group, the root behind a member's prefix: bitwise no effect on the member."""
    layout = packed((BLOCK + 5, [(7, 6)]), (20, [(9, 5)]), tail=2)
    N = layout.num_tokens
    keep = torch.ones(N, dtype=torch.bool)
    keep[3] = False
    q, k, v = (x.detach() for x in qkv(N, 4, 2, 16, torch.float32))
    member = (layout.segment_ids == 1).nonzero().flatten()

    def run() -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = pruned_attention(*inputs, layout, keep=keep, impl="triton", deterministic=deterministic)
        gradients = torch.autograd.grad(out[member].sum(), inputs)
        return [out[member], *(g[member] for g in gradients)]

    clean = run()
    for x in (k, v):
        x[3] = math.nan
    for x in (q, k, v):
        x[7 : BLOCK + 5] = math.nan
        x[layout.segment_ids >= 2] = math.nan  # the other group and the tail
    assert all(torch.equal(a, b) for a, b in zip(run(), clean))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("hidden", ["everything", "first tile"])
def test_rows_without_keys(hidden: str, deterministic: bool):
    layout = layouts()["long_prefix"]
    N = layout.num_tokens
    keep = torch.zeros(N, dtype=torch.bool)
    if hidden == "first tile":
        keep = torch.arange(N) >= BLOCK + 2
    q, k, v = qkv(N, 2, 1, 16, torch.float32)
    sinks = torch.zeros(2, requires_grad=True)
    with guarded_outputs():
        out, lse = pruned_attention(
            q, k, v, layout, keep=keep, sinks=sinks, return_lse=True, impl="triton", deterministic=deterministic
        )
        absent = ~visibility(layout, keep, None).any(-1)
        assert absent[:BLOCK].all()
        assert (out[absent] == 0).all()
        assert (lse[:, absent] == -math.inf).all()
        assert lse[:, ~absent].isfinite().all()
        loss = out.sum() + torch.where(lse.isfinite(), lse, 0).sum()
        dq, dk, dv, dsinks = torch.autograd.grad(loss, [q, k, v, sinks])
    assert (dq[absent] == 0).all()
    assert (dk[~keep] == 0).all()
    assert (dv[~keep] == 0).all()
    assert all(g.isfinite().all() for g in (dq, dk, dv, dsinks))
    if hidden == "everything":
        assert (dsinks == 0).all()


def test_absent_keys_do_not_overflow_into_the_queries():
    """All logits near -320: a key that is not there has q·k = 0, an exponential of e^320 above the others, and k = 0."""
    layout = packed((BLOCK + 3, [(BLOCK + 1, 3)]))
    q, k, v = qkv(layout.num_tokens, 2, 1, 16, torch.float32)
    with torch.no_grad():
        q.abs_().add_(9)
        k.abs_().add_(8).neg_()
    keep = torch.arange(layout.num_tokens) != 2
    gradients = []
    for deterministic in (True, False):
        out = pruned_attention(q, k, v, layout, keep=keep, impl="triton", deterministic=deterministic)
        gradients.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for split, fused in zip(*gradients):
        assert split.isfinite().all()
        torch.testing.assert_close(fused, split, rtol=0, atol=2e-3)  # what dz cancels at logits of this size


def test_a_nan_stays_visible_in_its_own_row():
    q, k, v = qkv(SMALL.num_tokens, 2, 1, 16, torch.float32)
    with torch.no_grad():
        q[4] = math.nan
    out, lse = pruned_attention(q, k, v, SMALL, impl="triton", return_lse=True)
    assert out[4].isnan().all()
    assert lse[:, 4].isnan().all()
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert dq[4].isnan().all()


def test_no_tokens_and_no_segments():
    for layout in (SharedPrefixLayout.from_lengths([0, 0]), SharedPrefixLayout.from_lengths([])):
        q, k, v = qkv(0, 4, 2, 16, torch.float32)
        out, lse = pruned_attention(q, k, v, layout, return_lse=True, impl="triton")
        assert (out.shape, lse.shape) == ((0, 4, 16), (4, 0))
        assert all(g.shape == x.shape for g, x in zip(torch.autograd.grad(out.sum(), [q, k, v]), (q, k, v)))
        nobody = torch.zeros(0, dtype=torch.bool)
        assert attention_mass(q, k, layout, queries=nobody, impl="triton").shape == (4, 0)


# -- attention mass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["short", "long_prefix"])
@pytest.mark.parametrize(
    ("Hq", "Hk", "options"),
    [
        (2, 2, {}),
        (3, 1, {"keep": True, "window": 20}),
        (6, 2, {"softcap": 1.0, "sinks": True}),
        (18, 1, {"window": 3}),
    ],
)
def test_attention_mass_kernel(name: str, Hq: int, Hk: int, options: dict):
    layout = layouts()[name]
    N = layout.num_tokens
    q, k, v = (x.detach() for x in qkv(N, Hq, Hk, 24, torch.float32))
    options = dict(options)
    if "keep" in options:
        options["keep"] = keep_mask(N)
    if "sinks" in options:
        options["sinks"] = torch.linspace(-1, 2, Hq)
    queries = torch.rand(N, generator=torch.Generator().manual_seed(5)) > 0.8
    with guarded_outputs():
        mass = attention_mass(q, k, layout, queries=queries, impl="triton", **options)
    _, p, _ = dense(*(x.double() for x in (q, k, v)), layout, **options)
    torch.testing.assert_close(mass, p[:, queries].sum(1).float(), rtol=1e-5, atol=1e-6)


def test_attention_mass_reads_chosen_queries_only():
    layout = layouts()["long_prefix"]
    N = layout.num_tokens
    q, k, _ = (x.detach() for x in qkv(N, 2, 1, 16, torch.float32))
    queries = torch.zeros(N, dtype=torch.bool)
    queries[5] = True
    clean = attention_mass(q, k, layout, queries=queries, impl="triton")
    q[2 * BLOCK :] = math.nan
    assert torch.equal(attention_mass(q, k, layout, queries=queries, impl="triton"), clean)


# -- memory and offsets --------------------------------------------------------------------------------------------


def test_launchers_allocate_results_and_row_terms_only():
    """Run as plain functions, each for itself. Kernels are stand-ins here."""
    layout = SharedPrefixLayout.from_lengths([64] * 64)
    N, Hq, Hk, D = layout.num_tokens, 8, 1, 16
    q, k, v = (x.detach() for x in qkv(N, Hq, Hk, D, torch.float32))
    starts = (layout.segment_starts, layout.prefix_starts, layout.prefix_lens)
    options = (1.0, None, None, [BLOCK, BLOCK, 1, 1])
    rows, (keys, dependants) = query_tiles(layout, Hq, BLOCK), key_tiles(layout, BLOCK)
    queries = torch.ones(N, dtype=torch.bool)
    with mock.patch.object(op, "launch"), mock.patch.object(mass_op, "launch"), record_allocations() as sizes:
        out, lse = op.forward(q, k, v, None, None, *starts, rows, *options)
        denominator, delta, _ = op.row_terms(out, q, lse, None, None, Hk)
        saved = (q, k, v, None, q, denominator, delta, *starts)
        op.backward_q(*saved, rows, *options)
        op.backward_kv(*saved, keys, dependants, *options, False)
        split = list(sizes)
        op.backward_kv(*saved, keys, dependants, *options, True)
        mass_op.mass(
            q, k, queries, mass_op.chosen_ranges(layout, queries), None, None, *starts, rows, keys, dependants, *options
        )
    result, row = N * Hq * D, N * Hq
    assert sorted(split) == sorted([result, row, row, row, 0, result, N * D, N * D, 0, 0])
    assert max(sizes) == result, "the fused backward sums dq in one fp32 buffer of its size"
    bf16 = [x.bfloat16() for x in (q, k, v)]
    with mock.patch.object(op, "launch"), record_peak_bytes() as peak:
        op.backward_kv(*bf16, None, bf16[0], denominator, delta, *starts, keys, dependants, *options, True)
    assert peak[0] <= 3.3 * bf16[0].nbytes, "fp32 sums, dq, and a quarter for dk and dv at this GQA group of 8"


def test_schedules_are_small():
    layout = SharedPrefixLayout.from_lengths([64] * 64)
    with record_allocations() as sizes:
        query_tiles(layout, 8, BLOCK)
        key_tiles(layout, BLOCK)
    assert max(sizes) <= 5 * (layout.num_tokens * 8 // BLOCK + 65)


def test_offsets_are_64_bit_where_strides_need_it():
    """[N, H, D] views of meta tensors: heads far apart, as after a transpose of [H, N, D]."""
    near = torch.empty(1 << 20, 8, 128, device="meta")
    far = torch.empty(32, 1 << 20, 128, device="meta").transpose(0, 1)
    tile = Tile(128, 64, 8, 3)
    assert not large_offsets(tile, near)
    assert large_offsets(tile, far)
    assert large_offsets(tile, near, far)


def test_forced_64_bit_offsets_change_nothing():
    inputs = qkv(SMALL.num_tokens, 4, 2, 16, torch.float32)
    results = []
    for large in (False, True):
        with mock.patch.object(op, "large_offsets", lambda *_, large=large: large):
            out = pruned_attention(*inputs, SMALL, impl="triton")
            results.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize(
    ("stride", "large"),
    [
        pytest.param(((1 << 31) + 16, 16, 1), True, id="tokens apart"),
        pytest.param((16, (1 << 31) + 16, 1), True, id="heads apart"),
        pytest.param((1 << 28, 16, 1), True, id="tokens of a tile apart"),  # 15 of them are beyond 2^31
        pytest.param((1 << 26, 16, 1), False, id="segments apart"),  # 32 of them are
    ],
)
def test_offsets_beyond_two_to_the_31(stride, large: bool):
    """In storage that exists only where it is touched."""
    tokens = {1 << 28: packed((18, [(1, 1)])), 1 << 26: packed((33, [(32, 2), (3, 1)]))}
    layout = tokens.get(stride[0], packed((2, [(1, 1)])))
    N, D = layout.num_tokens, 16
    near = [x.detach().half() for x in [*qkv(N, 2, 2, D, torch.float32), torch.randn(N, 2, D)]]
    size = stride[0] * (N - 1) + stride[1] + D

    def spread(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(size, dtype=x.dtype).as_strided((N, 2, D), stride).copy_(x)

    far = [spread(x) for x in near]
    assert large_offsets(Tile(BLOCK, BLOCK, 1, 1), far[0]) == large
    assert rows_dense(far[0]) is far[0], "addressed, not copied"
    results = []
    for *inputs, upstream in (near, far):
        inputs = [x.requires_grad_() for x in inputs]
        out = pruned_attention(*inputs, layout, impl="triton")
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


# -- operators and compilation -------------------------------------------------------------------------------------


def test_opcheck():
    q, k, v = (x.detach() for x in qkv(SMALL.num_tokens, 4, 2, 16, torch.float32))
    starts = (SMALL.segment_starts, SMALL.prefix_starts, SMALL.prefix_lens)
    rows, (keys, dependants) = query_tiles(SMALL, 2, BLOCK), key_tiles(SMALL, BLOCK)
    options = (0.25, 7, 2.0, [BLOCK, BLOCK, 1, 1])
    keep, sinks, dlse = keep_mask(len(q)), torch.zeros(4), torch.ones(4, len(q))
    ops = torch.ops.leaf_kernels
    forward = (q, k, v, keep, sinks, *starts, rows, *options)
    out, lse = ops.pruned_attention(*forward)
    terms = (out, q, lse, dlse, sinks, 2)
    denominator, delta, _ = ops.pruned_attention_row_terms(*terms)
    saved = (q, k, v, keep, q, denominator, delta, *starts)
    for called, arguments in {
        ops.pruned_attention.default: forward,
        ops.pruned_attention_row_terms.default: terms,
        ops.pruned_attention_backward_q.default: (*saved, rows, *options),
        ops.pruned_attention_backward_kv.default: (*saved, keys, dependants, *options, True),
        ops.attention_mass.default: (
            q,
            k,
            keep,
            mass_op.chosen_ranges(SMALL, keep),
            keep,
            sinks,
            *starts,
            rows,
            keys,
            dependants,
            *options,
        ),
    }.items():
        torch.library.opcheck(called, arguments)


def test_one_graph_for_20_layouts():
    """Public functions, forward and backward, `fullgraph`; the compiled callable is the one that ran."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def step(q, k, v, queries, layout):
        out = pruned_attention(q, k, v, layout, impl="triton")
        out = pruned_attention(q, k + out, v, layout, impl="triton", window=4)
        return out, attention_mass(q, k, layout, queries=queries, impl="triton")

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    # Kernels are stand-ins that write zeros: what is counted here are graphs.
    with mock.patch.object(op, "launch", zeros), mock.patch.object(mass_op, "launch", zeros):
        for n in range(20):
            layout = packed((5 + n, [(3, 2 + n % 4)] * (2 + n % 3)), tail=1 + n % 2)
            inputs = qkv(layout.num_tokens, 2, 2, 16, torch.float32)
            out, mass = compiled(*inputs, torch.ones(layout.num_tokens, dtype=torch.bool), layout)
            gradients = torch.autograd.grad(out.sum(), inputs)
            assert [g.shape for g in gradients] == [x.shape for x in inputs]
            assert mass.shape == (2, layout.num_tokens)
    assert counter.frame_count == 1


def zeros(kernel, programs, *args, **constants):
    for x in args:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.zero_()


@pytest.mark.parametrize("deterministic", [True, False])
def test_compiled_equals_eager(deterministic: bool):
    layout = layouts()["prefix"]
    inputs = qkv(layout.num_tokens, 4, 2, 16, torch.float32)
    queries = keep_mask(layout.num_tokens)

    def step(q, k, v):
        out, lse = pruned_attention(q, k, v, layout, impl="triton", return_lse=True, deterministic=deterministic)
        return out.sum() + lse.sum(), attention_mass(q, k, layout, queries=queries, impl="triton")

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    (loss, mass), (expected, expected_mass) = compiled(*inputs), step(*inputs)
    torch.testing.assert_close(mass, expected_mass)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(a, b)


def test_compile_keys_hold_no_length():
    """What a kernel is compiled for does not change with the sizes of a batch."""
    seen = []

    def record(kernel, programs, *args, **constants):
        assert {type(a) for a in constants.values()} <= {int, bool, str}
        # Integers that a kernel is specialised on: those it was not asked to leave alone
        names = list(inspect.signature(kernel.fn).parameters)
        free = set(getattr(kernel, "do_not_specialize", None) or kernel.kwargs["do_not_specialize"])
        specialised = {n: a for n, a in zip(names, args) if isinstance(a, int) and n not in free}
        seen.append((kernel, tuple(sorted({**constants, **specialised}.items()))))

    with mock.patch.object(op, "launch", record), mock.patch.object(mass_op, "launch", record):
        for layout in (packed((5, [(3, 2)])), packed((300, [(30, 20), (17, 1)]))):
            q, k, v = qkv(layout.num_tokens, 2, 1, 16, torch.float32)
            out, lse = pruned_attention(q, k, v, layout, return_lse=True, impl="triton")
            torch.autograd.backward((out, lse), (torch.ones_like(out), torch.ones_like(lse)))
            attention_mass(q, k, layout, queries=torch.ones(len(q), dtype=torch.bool), impl="triton")
    half = len(seen) // 2
    assert len({kernel for kernel, _ in seen}) == 6
    assert seen[:half] == seen[half:]
