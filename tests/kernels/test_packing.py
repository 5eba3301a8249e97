"""pack_groups: laws of best-fit decreasing, with sizes that `from_groups` confirms."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf_kernels import SharedPrefixLayout, pack_groups, packing

# Few distinct tokens, so that long common prefixes are common; empty sequences and groups included
groups_strategy = st.lists(st.lists(st.lists(st.integers(0, 1), max_size=6), max_size=4), max_size=12)
budgets = st.integers(1, 25)


def size(groups: list[list[list[int]]]) -> int:
    return SharedPrefixLayout.from_groups(groups)[0].num_tokens


def sequential_cut(groups: list[list[list[int]]], max_tokens: int) -> list[int]:
    """Sizes of packs that are closed as soon as a group does not fit."""
    packs: list[int] = []
    for tokens in (size([group]) for group in groups):
        if packs and packs[-1] + tokens <= max_tokens:
            packs[-1] += tokens
        else:
            packs.append(tokens)
    return packs


@settings(max_examples=200, deadline=None)
@given(groups_strategy, budgets)
def test_every_group_once_and_no_pack_above_the_budget(groups, max_tokens):
    packs = pack_groups(groups, max_tokens)
    assert sorted(g for pack in packs for g in pack) == list(range(len(groups)))
    assert all(pack == sorted(pack) for pack in packs), "ascending within a pack"
    assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs), "in the order of their first groups"
    sizes = [size([groups[g] for g in pack]) for pack in packs]
    assert all(tokens <= max_tokens or len(pack) == 1 for tokens, pack in zip(sizes, packs))


@settings(max_examples=200, deadline=None)
@given(groups_strategy, budgets)
def test_few_packs(groups, max_tokens):
    packs = pack_groups(groups, max_tokens)
    smallest = sorted(size([groups[g] for g in pack]) for pack in packs)[:2]
    assert len(packs) < 2 or sum(smallest) > max_tokens, "no two packs would fit into one"
    # The bound of best-fit decreasing against the best packing there is. A cut in sequence can be a lucky one.
    assert 9 * len(packs) <= 11 * len(sequential_cut(groups, max_tokens)) + 6


@settings(max_examples=100, deadline=None)
@given(groups_strategy, budgets, st.randoms())
def test_only_sizes_count(groups, max_tokens, rng):
    packs = pack_groups(groups, max_tokens)
    renamed = [[torch.tensor(ids, dtype=torch.int64) + 7 for ids in group] for group in groups]
    assert pack_groups(renamed, max_tokens) == packs

    def pack_sizes(groups: list[list[list[int]]]) -> list[int]:
        return sorted(size([groups[g] for g in pack]) for pack in pack_groups(groups, max_tokens))

    assert pack_sizes(rng.sample(groups, len(groups))) == pack_sizes(groups), "the order of the groups does not"


@settings(max_examples=50, deadline=None)
@given(groups_strategy, budgets, st.integers(1, 5))
def test_measuring_a_part_at_a_time_changes_nothing(groups, max_tokens, at_once):
    expected = pack_groups(groups, max_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_AT_ONCE", at_once)
        assert pack_groups(groups, max_tokens) == expected


def of_sizes(*sizes: int) -> list[list[list[int]]]:
    return [[list(range(n))] for n in sizes]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (of_sizes(4, 4, 4, 6, 6, 6), [[0, 3], [1, 4], [2, 5]]),  # the first among equals, in the pack opened first
        (of_sizes(7, 5, 4, 1), [[0], [1, 2, 3]]),  # 1 goes where it leaves the least room
        (of_sizes(11, 1, 30, 9), [[0], [1, 3], [2]]),  # above the budget: alone
        (of_sizes(0, 10, 0), [[0, 1, 2]]),
        ([[[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], *of_sizes(4)], [[0, 1]]),  # 5 + 1 + 4 with the prefix shared
        ([], []),
    ],
)
def test_known_cases(groups, expected):
    assert pack_groups(groups, 10) == expected


def test_many_small_groups_fill_their_packs():
    rng = random.Random(0)
    groups = of_sizes(*(rng.randrange(20, 90) for _ in range(3000)))
    packs = pack_groups(groups, 512)
    fill = sum(len(ids) for group in groups for ids in group) / (512 * len(packs))
    assert fill > 0.98


def test_no_budget_is_refused():
    with pytest.raises(ValueError, match="pack_groups: max_tokens must be at least 1, got 0"):
        pack_groups([], 0)
