"""The search for tiles: what it takes, what it drops, what it ships. In the interpreter, on two tiles."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks import timing, tune
from benchmarks.compile_gate import Case
from leaf_kernels._runtime import launch
from leaf_kernels.ops.pruned_attention.configs import TILES, Tile


def row(
    tile: list[int], ms: float, *, case: str = "forward-64", options: str = "none", shipped: bool = False
) -> dict[str, Any]:
    return {"case": case, "options": options, "tile": tile, "ms": ms, "shipped": shipped, "aa_spread": 0.02}


def test_the_fastest_is_shipped_where_the_difference_is_more_than_noise():
    within = [row([1], 1.0, shipped=True), row([2], 0.97), row([3], 1.5)]
    beyond = [row([1], 1.0, options="all", shipped=True), row([2], 0.9, options="all"), row([3], 0.8, options="all")]
    anchors = {"case": "anchors", "copy_gb_s": 1.0}
    found = tune.verdicts([anchors, *within, *beyond])
    assert [(one["tile"], one["ratio"]) for one in found] == [([1], 1.0), ([3], pytest.approx(1.25))]
    assert tune.table(found) == {"forward": {"64": [[1], [3]]}}
    assert [line.rsplit(": ", 1)[1] for line in tune.summary([*within, *beyond])] == [
        "[1], the shipped one",
        "[3], 1.25 times as fast as the shipped one",
    ]


def test_nothing_faster_leaves_the_shipped_table_alone():
    rows = [row([1], 1.0, options=options, shipped=True) for options in ("none", "all")]
    assert tune.table(tune.verdicts(rows)) == {}


def test_a_run(monkeypatch, tmp_path):
    """Each tile is measured, one with a wrong result is not; the table is what launches read."""
    right, wrong = torch.arange(4.0), Tile(16, 48, 1, 1)
    asked: list[tuple[str, str, int]] = []

    def attention_launch(case: Case, layout: Any) -> Any:
        asked.append((case.kernel, case.options, case.size))
        return lambda tile: lambda: (right, right * 1.1 if tile == wrong else right + 0.01)

    monkeypatch.setattr(tune, "attention_launch", attention_launch)
    monkeypatch.setattr(tune, "TINY", [*tune.TINY, wrong])
    assert tune.main(["--output", str(tmp_path), "--cases", "forward-64"]) == 0
    assert asked == [("forward", "none", 16), ("forward", "all", 16)]
    rows = [one for one in json.loads((tmp_path / "tune.json").read_text())["rows"] if "tile" in one]
    assert [(one["options"], one["tile"], one["shipped"]) for one in rows] == [
        (options, list(tile), tile == tune.TINY[0]) for options in ("none", "all") for tile in tune.TINY[:2]
    ]
    assert all(one["ms"] > 0 and one["samples"] == 50 for one in rows)
    shipped = json.loads((tmp_path / "cpu.json").read_text())
    assert shipped["environment"]["torch"] == torch.__version__
    assert set(shipped["tiles"]) <= {"forward"}
    assert any(line.startswith("forward-64, options all") for line in tune.summary(rows))


def test_results_are_equal_up_to_rounding():
    """Also where one is empty: the deterministic backward_kv gives no dq."""
    some, none = torch.linspace(-1, 1, 5), torch.empty(0)
    assert tune.same((some, none), (some + 0.01, none))
    assert not tune.same((some, none), (some + 0.03, none))


def test_an_update_keeps_what_was_not_searched(tmp_path):
    """And forgets what is not faster any more."""
    path, kept = tmp_path / "gpu.json", [[1], [2]]
    timing.write_json(path, {"tiles": {"forward": {"64": kept, "128": kept}, "mass": {"64": kept}}})
    faster = [
        row([1], 1.0, options=o, shipped=s) if s else row([5], 0.5, options=o) for o in ("none", "all") for s in (1, 0)
    ]
    same = [row([1], 1.0, case="forward-128", options=options, shipped=True) for options in ("none", "all")]
    tune.update(path, tune.verdicts([*faster, *same]), {"gpu": "a"})
    assert json.loads(path.read_text()) == {
        "environment": {"gpu": "a"},
        "tiles": {"forward": {"64": [[5], [5]]}, "mass": {"64": kept}},
    }


@pytest.mark.compile_gate
def test_tiles_that_spill_or_do_not_fit_are_dropped():
    case = Case("sm_80", "forward", 64)
    assert tune.compiles(case, Tile(64, 32, 4, 2))
    assert not tune.compiles(case, Tile(128, 128, 4, 4)), "too much for the registers of four warps"


def test_every_kernel_that_a_launch_asks_for_is_searched():
    assert {(s.kernel, s.size) for s in tune.SEARCHES} == {(k, n) for k, sizes in TILES["sm_90"].items() for n in sizes}
    assert launch.slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"
