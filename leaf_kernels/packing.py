"""`pack_groups`: which groups share a pack. Torch only, on the host."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

from .layout import shared_prefixes

_AT_ONCE = 1024  # groups measured in one go: the memory of a call does not grow with a data set


def pack_groups(groups: Sequence[Sequence[Sequence[int] | torch.Tensor]], max_tokens: int) -> list[list[int]]:
    """Puts whole groups into few packs of at most `max_tokens` packed tokens: best-fit decreasing.

    Each group, the largest first, goes into the fullest pack that still has room for it, or opens a new one. Its size is
    what `SharedPrefixLayout.from_groups` makes of it: a shared prefix counts once.

    Args:
        groups: as for `SharedPrefixLayout.from_groups`: `[ids_root, ids_member, ...]` each.
        max_tokens: at least 1. A larger group gets a pack of its own.

    Returns:
        The indices of the groups in each pack: every group once, ascending within a pack; packs in the order of their first
        groups. No groups, no packs.

    Deterministic, and only the sizes count: of equal groups the first one is placed first, of equally full packs the one
    that was opened first is filled. No two packs would fit into one. n log n comparisons for n groups.

    Raises:
        ValueError: `max_tokens` below 1.
    """
    return pack_sizes(packed_sizes(groups), max_tokens)


def pack_sizes(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """`pack_groups` for groups of which only the packed sizes are known."""
    if max_tokens < 1:
        raise ValueError(f"pack_groups: max_tokens must be at least 1, got {max_tokens}; it is the budget of a pack")
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that are free, pack), ascending
    for group in sorted(range(len(sizes)), key=lambda g: -sizes[g]):
        place = bisect_left(rooms, (sizes[group], 0))
        if place < len(rooms):
            room, pack = rooms.pop(place)
            packs[pack].append(group)
        else:
            room, pack = max_tokens, len(packs)
            packs.append([group])
        insort(rooms, (room - sizes[group], pack))
    return sorted(sorted(pack) for pack in packs)


def deal(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank that each piece of work goes to: the largest first, each to the rank that has least."""
    load, dealt = [0] * ranks, [0] * len(sizes)
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        dealt[n] = min(range(ranks), key=load.__getitem__)
        load[dealt[n]] += sizes[n]
    return dealt


def packed_sizes(groups: Sequence[Sequence[Sequence[int] | torch.Tensor]]) -> list[int]:
    """Tokens of each group in a pack, of which a shared prefix counts once."""
    sizes: list[int] = []
    for first in range(0, len(groups), _AT_ONCE):
        some = groups[first : first + _AT_ONCE]
        _, lengths, _, shared = shared_prefixes(some)
        members = torch.tensor([len(group) for group in some], dtype=torch.int64)
        of_group = torch.arange(len(some)).repeat_interleave(members)
        sizes += torch.zeros(len(some), dtype=torch.int64).index_add_(0, of_group, lengths - shared).tolist()
    return sizes
