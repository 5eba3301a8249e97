"""The GPU benchmark of linear_cross_entropy on a CPU: its gate, how peers are called, a run on tiny cases."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from benchmarks import cross_entropy, losses, tables, timing

CPU = torch.device("cpu")
CASES = {case.name: case for case in cross_entropy.CASES}


@pytest.fixture
def quick(monkeypatch):
    """Two samples of everything."""
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "PER_ROUND", 2)


@pytest.fixture(params=["1B", "1B masked"])
def problem(request) -> cross_entropy.Problem:
    return cross_entropy.make(CASES[request.param].tiny(), CPU)


def test_cases_are_what_they_say(problem):
    assert {name: (case.D, case.V, case.N) for name, case in CASES.items()} == {
        "1B": (2048, 128256, 8192),
        "1.5B": (1536, 151936, 8192),
        "1B masked": (2048, 128256, 8192),
    }
    assert len(problem.rows) in (len(problem.hidden), len(problem.hidden) / 4)
    assert (problem.labels != -100).nonzero().squeeze(1).tolist() == problem.rows.tolist()
    few = problem.first(64)
    assert few.labels.tolist() == problem.labels[:64].tolist()
    assert (few.labels != -100).sum() == len(few.rows)
    assert few.hidden.is_leaf


def test_ours_is_told_its_rows(problem, monkeypatch):
    """Otherwise it looks for them itself, and the host waits."""
    given: dict = {}
    monkeypatch.setattr(
        cross_entropy,
        "linear_cross_entropy",
        lambda *_, **options: given.update(options) or types.SimpleNamespace(loss=1),
    )
    cross_entropy.leaf(problem)()
    assert given["rows"] is problem.rows


@pytest.mark.parametrize("name", ["leaf", "eager"])
def test_gradients_are_those_of_fp64(problem, name: str):
    errors = losses.Gate(problem, cross_entropy.PROVIDERS).check(name)
    assert set(errors) == {"loss_error", "dx_error", "dw_error"}
    assert all(0 <= error < 0.02 for error in errors.values())


# -- peers -------------------------------------------------------------------------------------------------------------


class LigerFusedLinearCrossEntropyLoss:
    """The names and the order of Liger's."""

    def __init__(self, ce_weight=None, ignore_index=-100, reduction="mean", accum_dtype=None):
        self.accum_dtype = accum_dtype

    def __call__(self, lin_weight, _input, target, bias=None):
        return F.cross_entropy((_input @ lin_weight.T).float(), target)


def cut(e, c, targets, ignore_index=-100, reduction="mean", shift=False, filter_eps="high"):
    """Apple's, in its words."""
    return F.cross_entropy((e @ c.T).float(), targets)


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    module = types.SimpleNamespace(LigerFusedLinearCrossEntropyLoss=LigerFusedLinearCrossEntropyLoss)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", types.SimpleNamespace(linear_cross_entropy=cut))


@pytest.mark.parametrize("name", ["liger", "liger_fp32", "cce", "cce_exact"])
def test_peers_are_called_with_what_is_theirs(peers, problem, name: str):
    errors = losses.Gate(problem, cross_entropy.PROVIDERS).check(name)
    assert all(error < 0.02 for error in errors.values())


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_from_end_to_end(quick, tmp_path, capsys, monkeypatch):
    for name in ("liger_kernel", "cut_cross_entropy"):
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    path = tmp_path / "some-gpu" / "cross_entropy.json"
    assert cross_entropy.run(path, CPU, 60, commit="a")
    out = capsys.readouterr().out
    assert "1B: cce is absent: ModuleNotFoundError" in out
    assert f"{path}: complete" in out
    written = json.loads(path.read_text())
    rows = {(r["case"], r["provider"]): r for r in written["rows"] if "ms" in r}
    assert rows.keys() == {(case, name) for case in CASES for name in ("leaf", "eager", "compile")}
    for r in rows.values():
        assert r["gate"] == "passed"
        assert 0 < r["largest_bytes"] <= r["peak_bytes"] < r["total_bytes"]
        assert {"op", "mode", "dims", "flop", "roofline", "dw_error", "liger_kernel", "cut_cross_entropy"} <= set(r)
    assert rows["1B masked", "leaf"]["rows"] * 4 == rows["1B masked", "leaf"]["tokens"]

    for row in written["rows"]:
        row |= {"driver": "x", "power_limit_w": "x"}
        if (row["case"], row.get("provider")) == ("1B", "eager"):
            row |= {"ms": 3.0, "p20_ms": 3.0, "p80_ms": 3.0, "aa_spread": 0.01, "roofline": 0.25, "loss_error": 0.02}
            row |= {"peak_bytes": 5 * 2**20, "largest_bytes": None}
        elif (row["case"], row.get("provider")) == ("1B", "leaf"):
            row["ms"] = 1.5
    timing.write_json(path, written)
    lines = tables.gpu_cross_entropy(tmp_path).splitlines()
    assert "| 1B | eager | 3.00 | 2.00 | 1% | 25% | 5 | – | 2e-02 |" in lines
    assert any(line.startswith("| 1B | **ours** | 1.50 | 1.00 |") for line in lines)
    assert any(line.startswith("| 1B | cce | – | – | – | – | – | – | absent: ModuleNotFoundError") for line in lines)


def test_a_wrong_result_is_not_timed(quick, monkeypatch):
    monkeypatch.setitem(cross_entropy.PROVIDERS, "leaf", lambda p: lambda: cross_entropy.leaf(p)() * 1.1)
    rows = list(cross_entropy.measure(CASES["1B"].tiny(), CPU, timing.Deadline(60)))
    assert all("absent" in r for r in rows)
    reasons = {r["provider"]: r["absent"] for r in rows}
    assert "above the budget" in reasons["leaf"]
    assert reasons["eager"] == "not timed: leaf failed"
