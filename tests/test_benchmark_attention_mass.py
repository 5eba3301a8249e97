"""The GPU benchmark of attention_mass on a CPU: what plain torch computes, the gate, a run on a tiny case."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import attention_mass as benchmark
from benchmarks import tables, timing
from leaf_kernels import attention_mass

CPU = torch.device("cpu")
CASE = benchmark.CASES[0]


@pytest.fixture
def quick(monkeypatch):
    """Two samples of everything."""
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "PER_ROUND", 2)


def tiny() -> benchmark.Problem:
    return benchmark.make(CASE.tiny(), CPU)


def test_the_case_is_what_it_says():
    model = CASE.pack.model
    assert (model.Hq, model.Hk, model.D, CASE.queries) == (32, 8, 128, 200)
    layout, _ = CASE.pack.sequences()
    assert not layout.has_prefix
    assert all(300 <= b - a <= 1000 for a, b, *_ in layout.spans()), "every sequence has its queries"
    problem = tiny()
    starts = problem.layout.segment_starts.tolist()
    expected = [n for b in starts[1:] for n in (b - 2, b - 1)]
    assert problem.chosen().nonzero().squeeze(1).tolist() == expected


def test_plain_torch_computes_the_masses_of_the_specification():
    problem = tiny()
    wide = problem._replace(q=problem.q.double(), k=problem.k.double())
    expected = attention_mass(wide.q, wide.k, wide.layout, queries=wide.chosen(), impl="reference")
    torch.testing.assert_close(benchmark.eager(wide)(), expected)
    assert benchmark.eager(problem)().dtype == torch.float32
    few = benchmark.eager(wide.first_heads())()
    torch.testing.assert_close(few, expected[: len(few)])


def test_a_run_measures_and_fills_its_table(quick, tmp_path, capsys):
    path = tmp_path / "some-gpu" / "attention_mass.json"
    assert benchmark.run(path, CPU, 60, commit="a")
    assert f"{path}: complete" in capsys.readouterr().out
    written = json.loads(path.read_text())
    rows = {r["provider"]: r for r in written["rows"] if "ms" in r}
    assert rows.keys() == benchmark.PROVIDERS.keys()
    for r in rows.values():
        assert r["gate"] == "passed"
        assert 0 < r["mass_error"] < 0.01
        assert 0 < r["largest_bytes"] <= r["peak_bytes"]
        assert {"heads", "queries", "flop", "roofline", "samples", "aa_spread", "commit"} <= set(r)
    for row in written["rows"]:
        row |= {"driver": "x", "power_limit_w": "x"}
    timing.write_json(path, written)
    lines = tables.gpu_attention_mass(tmp_path).splitlines()
    assert [line.split(" | ")[1] for line in lines[-3:]] == ["**ours**", "eager", "compile"]
    assert tables.gpu_attention_mass(tmp_path / "other").startswith("Not measured yet")


@pytest.mark.parametrize("name", ["leaf", "compile"])
def test_a_wrong_result_is_not_timed(quick, monkeypatch, name):
    right = benchmark.PROVIDERS[name]
    monkeypatch.setitem(benchmark.PROVIDERS, name, lambda problem: lambda: right(problem)() * 1.01)
    rows = {r["provider"]: r for r in benchmark.measure(CASE.tiny(), CPU, timing.Deadline(60))}
    assert "above the budget" in rows[name]["absent"]
    if name == "leaf":
        assert rows["eager"]["absent"] == "not timed: leaf failed"
    else:
        assert rows["eager"]["ms"] > 0
