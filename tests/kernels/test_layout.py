"""SharedPrefixLayout: construction, validation, positions, members, moving."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree

from leaf_kernels import SharedPrefixLayout

# Few distinct tokens, so that long common prefixes are common; empty sequences included
groups_strategy = st.lists(st.lists(st.lists(st.integers(0, 1), max_size=6), max_size=4), max_size=4)


@settings(max_examples=200, deadline=None)
@given(groups_strategy)
def test_members_are_rebuilt_from_the_pack(groups):
    layout, input_ids = SharedPrefixLayout.from_groups(groups)
    members = [member for group in groups for member in group]
    assert layout.num_segments == len(members)
    assert layout.num_tokens == len(input_ids)
    starts = layout.segment_starts.tolist()
    for m, member in enumerate(members):
        rows = layout.member_rows(m)
        assert input_ids[rows].tolist() == member
        assert layout.position_ids[rows].tolist() == list(range(len(member)))
        assert (starts[m + 1] > starts[m]) == bool(member), "every non-empty member owns its last token"
    assert layout.max_len == max((len(m) for m in members), default=0)
    assert layout.has_prefix == bool((layout.prefix_lens > 0).any())


@settings(max_examples=100, deadline=None)
@given(groups_strategy)
def test_prefixes_are_as_long_as_possible(groups):
    layout, _ = SharedPrefixLayout.from_groups(groups)
    lengths = iter(layout.prefix_lens.tolist())
    for group in groups:
        for i, member in enumerate(group):
            common = 0
            while i and common < min(len(group[0]), len(member) - 1) and group[0][common] == member[common]:
                common += 1
            assert next(lengths) == common


@settings(max_examples=50, deadline=None)
@given(groups_strategy, st.randoms())
def test_lists_tuples_and_tensors_are_packed_alike(groups, rng):
    kinds = [
        list,
        tuple,
        torch.tensor,
        lambda ids: torch.tensor([ids], dtype=torch.int32),
    ]  # [1, n], as tokenizers give it
    mixed = [[rng.choice(kinds)(ids) for ids in group] for group in groups]
    (layout, input_ids), (expected, expected_ids) = map(SharedPrefixLayout.from_groups, (mixed, groups))
    assert input_ids.dtype == torch.int64
    assert (layout.spans(), input_ids.tolist()) == (expected.spans(), expected_ids.tolist())


def test_equal_member_keeps_its_last_token():
    layout, ids = SharedPrefixLayout.from_groups([[[5, 6, 7], [5, 6, 7], [5, 6]]])
    assert layout.prefix_lens.tolist() == [0, 2, 1]
    assert ids.tolist() == [5, 6, 7, 7, 6]


@pytest.mark.parametrize(
    "groups",
    [
        [[1, 5, 6], [1, 5, 7]],  # the level of the groups forgotten
        torch.zeros(2, 3, dtype=torch.int64),
        [[torch.zeros(2, 3, dtype=torch.int64)]],  # two sequences in one member
        [[torch.tensor([1.5, 2.0])]],
        [["text"]],
        [[[[1, 2], [3, 4]]]],
    ],
    ids=str,
)
def test_what_is_no_group_of_sequences_is_refused(groups):
    with pytest.raises(TypeError, match=r"from_groups: a member must be .* groups is a list of groups"):
        SharedPrefixLayout.from_groups(groups)


def test_tail_belongs_to_no_segment():
    layout = SharedPrefixLayout.from_lengths([2, 0, 1], num_tokens=5)
    assert layout.segment_ids.tolist() == [0, 0, 2, 3, 3]
    assert layout.position_ids.tolist() == [0, 1, 0, 0, 0]


def test_nothing_at_all():
    layout, ids = SharedPrefixLayout.from_groups([])
    assert (layout.num_segments, layout.num_tokens, layout.max_len, layout.has_prefix) == (0, 0, 0, False)
    assert layout.position_ids.shape == ids.shape == (0,)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"segment_starts": [1, 2]}, "must begin with 0, got 1"),
        ({"segment_starts": [0, 3, 2]}, "must not decrease, got -1 at segment 1"),
        ({"segment_starts": [0, 3], "num_tokens": 2}, "beyond num_tokens=2"),
        ({"segment_starts": []}, "S \\+ 1 >= 1 entries"),
        ({"segment_starts": [0, 3, 5], "prefix_starts": [0, 1], "prefix_lens": [0, 1]}, "start of a segment"),
        ({"segment_starts": [0, 3, 5], "prefix_starts": [0, 0], "prefix_lens": [0, 4]}, "got 4 at segment 1"),
        ({"segment_starts": [0, 3, 5], "prefix_starts": [0, 9], "prefix_lens": [0, 1]}, "must lie in \\[0, 5\\]"),
        ({"segment_starts": [0, 3, 5], "prefix_starts": [0, 0], "prefix_lens": [0, -1]}, "must not be negative"),
        (
            {"segment_starts": [0, 3, 5], "prefix_starts": [0], "prefix_lens": [0]},
            "one entry per segment \\(2\\), got 1",
        ),
        # a prefix of a segment that has a prefix itself
        ({"segment_starts": [0, 3, 5, 6], "prefix_starts": [0, 0, 3], "prefix_lens": [0, 1, 1]}, "no prefix itself"),
    ],
)
def test_bad_layouts_are_refused(kwargs, message: str):
    tensors = {k: v if k == "num_tokens" else torch.tensor(v, dtype=torch.int32) for k, v in kwargs.items()}
    with pytest.raises(ValueError, match=message):
        SharedPrefixLayout(**tensors)


def test_float_starts_are_refused():
    with pytest.raises(TypeError, match="segment_starts must be a 1-D integer tensor"):
        SharedPrefixLayout(torch.tensor([0.0, 1.0]))


def test_is_frozen_moves_and_flattens():
    layout, _ = SharedPrefixLayout.from_groups([[[1, 2, 3], [1, 2, 4]]])
    with pytest.raises(AttributeError, match="never changes"):
        layout.num_tokens = 7
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert (moved.device.type, moved.num_tokens, moved.has_prefix) == ("meta", 4, True)
    leaves, spec = _pytree.tree_flatten(layout)
    assert len(leaves) == 3
    again = _pytree.tree_unflatten(leaves, spec)
    assert again.position_ids.tolist() == layout.position_ids.tolist()


def test_schedules_are_built_once():
    layout = SharedPrefixLayout.from_lengths([3, 4])
    assert layout.position_ids is layout.position_ids


def test_schedules_are_built_once_on_every_device():
    """accelerate moves the arguments of every layer that is on another device."""
    layout = SharedPrefixLayout.from_lengths([3, 4])
    first = layout.to("meta")
    assert layout.to(torch.device("meta")) is first
    assert first.segment_ids is layout.to("meta").segment_ids
    assert SharedPrefixLayout.from_lengths([3]).to("meta").num_tokens == 3
