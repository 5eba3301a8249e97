"""What benchmarks/packing.py calls tokens, ratio and fill, on groups that can be counted by hand."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def packing() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "packing.py"))


def test_measure(packing):
    def group(own: int, shared: int) -> dict[str, Any]:
        root = {"input_ids": list(range(shared + own))}
        return {"original": root, "counterfactuals": [{"input_ids": [*range(shared), *range(-own, 0)]}]}

    # 1000, 1448 and 1048 tokens in packs of 2048, one group of 3000
    groups = [group(100, 800), group(224, 1000), group(500, 48), group(1000, 1000)]
    measured = packing["measure"](groups)
    assert measured["sequences"] == 8
    assert measured["packed_tokens"] == 1000 + 1448 + 1048 + 3000
    assert measured["separate_tokens"] == measured["packed_tokens"] + 800 + 1000 + 48 + 1000
    assert measured["ratio"] == measured["separate_tokens"] / measured["packed_tokens"]
    assert measured["budgets"][2048] == {
        "larger_groups": 1,
        "pack_groups": {"packs": 2, "fill": 3496 / 4096},
        "sequential": {"packs": 3, "fill": 3496 / 6144},
    }
    assert measured["budgets"][8192]["sequential"] == {"packs": 1, "fill": 6496 / 8192}


def test_sequential_cut(packing):
    assert packing["sequential_cut"]([4, 6, 5, 6, 10], 10) == 4
    assert packing["sequential_cut"]([], 10) == 0
