"""Which program of a kernel works on what: flat lists of tiles, built on the layout's device without a sync.

The lists have a fixed capacity that follows from the sizes alone; programs of unused entries (segment -1) end at once.
Tiles never cross segments. The positions that belong to no segment are tiles of one more segment, number S, which has no
keys: every output row is written by somebody. The longest tiles come first, so that the last programs to start are short.
"""

from __future__ import annotations

import torch

from ...layout import SharedPrefixLayout


def query_tiles(layout: SharedPrefixLayout, group: int, block: int) -> torch.Tensor:
    """Tiles of `block` query rows for each key head: [T, 2] int32, (segment, first row), longest first.

    The rows of a segment are position * `group` + head of the group, so that any ratio of heads fills a tile.
    """
    return layout.cached(("query_tiles", group, block), lambda: _query_tiles(layout, group, block))


def key_tiles(layout: SharedPrefixLayout, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of `block` keys and who reads them besides their own segment.

    Returns:
        tiles [T, 5] int32: (segment, first key, a, b, c), longest first. Among `dependants`, entries a to c are the segments
            whose prefix reaches into the tile, entries a to b those whose prefix covers all of it.
        dependants [S] int32: segments grouped by their root, longest prefix first.
    """
    return layout.cached(("key_tiles", block), lambda: _key_tiles(layout, block))


def _lengths(layout: SharedPrefixLayout) -> torch.Tensor:
    """[S + 1] int64: length of every segment, then the number of positions that belong to none."""
    starts = layout.segment_starts
    return torch.cat([starts, starts.new_full((1,), layout.num_tokens)]).diff().long()


def _cut(rows: torch.Tensor, capacity: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(segment, first row, used) [capacity] of every tile of `block` rows, in order of the segments."""
    tiles = (rows + block - 1) // block
    ends = tiles.cumsum(0)
    index = torch.arange(capacity, device=rows.device)
    segment = torch.searchsorted(ends, index, right=True)
    used = segment < len(rows)
    segment = segment.clamp(max=len(rows) - 1)
    first = (index - (ends - tiles)[segment]) * block
    return segment, first, used


def _longest_first(cost: torch.Tensor, used: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
    table = torch.stack(columns, dim=1)
    table[:, 0] = torch.where(used, table[:, 0], -1)
    order = torch.argsort(torch.where(used, cost, -1), descending=True, stable=True)
    return table[order].int()


def _query_tiles(layout: SharedPrefixLayout, group: int, block: int) -> torch.Tensor:
    S = layout.prefix_lens.shape[0]
    segment, first, used = _cut(_lengths(layout) * group, layout.num_tokens * group // block + S + 1, block)
    prefix = torch.nn.functional.pad(layout.prefix_lens, (0, 1)).long()
    keys = torch.where(segment < S, prefix[segment] + (first + block) // group, 0)
    return _longest_first(keys, used, segment, first)


def _key_tiles(layout: SharedPrefixLayout, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    S = layout.prefix_lens.shape[0]
    lengths, prefix = _lengths(layout), layout.prefix_lens.long()
    # A prefix lies in the one non-empty segment that holds its first token. Sorted by (root, -prefix), as one number.
    root = torch.searchsorted(layout.segment_starts[1:].contiguous(), layout.prefix_starts.contiguous(), right=True)
    rank, dependants = torch.sort(torch.where(prefix > 0, root * 2**32 - prefix, (S + 1) * 2**32), stable=True)
    queries = torch.nn.functional.pad(lengths[:-1][dependants].cumsum(0), (1, 0))

    segment, first, used = _cut(lengths, layout.num_tokens // block + S + 1, block)
    begin = torch.searchsorted(rank, segment * 2**32 - (1 << 31))  # no prefix is that long
    covering = torch.searchsorted(rank, segment * 2**32 - first - block, right=True)  # prefix >= first + block
    reaching = torch.searchsorted(rank, segment * 2**32 - first)  # prefix > first
    rows = torch.where(segment < S, lengths[segment] - first + queries[reaching] - queries[begin], 0)
    return _longest_first(rows, used, segment, first, begin, covering, reaching), dependants.int()
