"""SharedPrefixLayout.from_groups on 100k packed tokens in 1000 segments, pack_groups on 100k groups; on one thread.

    pytest benchmarks/test_layout.py
    pytest benchmarks/test_layout.py --benchmark-json=benchmarks/results/layout.json

The goal of from_groups is 50 ms. Lists of ints are the hard case: they become a tensor first. pack_groups spends
most of its time on that too, in proportion to the tokens; its groups here are two short sequences each.
"""

from __future__ import annotations

import random

import pytest
import torch

from leaf_kernels import SharedPrefixLayout, pack_groups

GROUPS, MEMBERS, ROOT, SHARED, OWN = 125, 8, 408, 180, 56


def groups() -> list[list[list[int]]]:
    """Eight sequences each, more than half of their tokens in shared prefixes of random length."""
    rng = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(32000) for _ in range(n)]

    roots = [tokens(ROOT) for _ in range(GROUPS)]
    return [[root, *(root[: rng.randrange(2 * SHARED)] + tokens(OWN) for _ in range(MEMBERS - 1))] for root in roots]


@pytest.mark.benchmark(group="from_groups, 100k packed tokens, 1000 segments")
@pytest.mark.parametrize("members", [list, torch.tensor], ids=["lists", "tensors"])
def test_from_groups(benchmark, members):
    torch.set_num_threads(1)
    packed = [[members(ids) for ids in group] for group in groups()]
    layout, input_ids = benchmark(SharedPrefixLayout.from_groups, packed)
    separate = sum(len(ids) for group in packed for ids in group)
    benchmark.extra_info.update(threads=1, torch=torch.__version__, tokens=len(input_ids), separate=separate)
    assert layout.num_segments == GROUPS * MEMBERS == 1000
    assert len(input_ids) == 100_000 < separate / 2


@pytest.mark.benchmark(group="pack_groups, 100k groups")
def test_pack_groups(benchmark):
    torch.set_num_threads(1)
    rng = random.Random(0)
    groups = [[[1] * rng.randrange(10, 50), [1] * rng.randrange(10, 50)] for _ in range(100_000)]
    packs = benchmark.pedantic(pack_groups, (groups, 2048), rounds=3)
    benchmark.extra_info.update(threads=1, torch=torch.__version__, tokens=sum(len(m) for g in groups for m in g))
    assert sum(map(len, packs)) == len(groups)
