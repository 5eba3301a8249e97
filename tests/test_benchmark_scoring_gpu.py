"""benchmarks/scoring_gpu.py at small sizes: both have the same norms, what fails says why, goal D2 from rows."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import scoring_gpu, tables, timing

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Two rounds, and a case of each kind."""
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(scoring_gpu, "CASES", scoring_gpu.CASES[:2])


@pytest.mark.parametrize("name", scoring_gpu.PROVIDERS)
def test_everybody_has_the_norms_of_fp64(name):
    assert scoring_gpu.check(name, CPU) < 1e-5


def test_wrong_norms_are_found_and_then_nothing_is_measured(quick, monkeypatch, tmp_path):
    ours = scoring_gpu.score_ours
    monkeypatch.setitem(scoring_gpu.PROVIDERS, "leaf", lambda model, row: 1.01 * ours(model, row))
    assert not scoring_gpu.run(tmp_path / "scoring.json", CPU, 60, commit="a")
    rows = [row for row in json.loads((tmp_path / "scoring.json").read_text())["rows"] if row["case"] != "anchors"]
    assert not any("ms" in row for row in rows)
    reasons = {row["provider"]: row["absent"] for row in rows}
    assert "norm_error" in reasons["leaf"]
    assert reasons["released"] == "not measured: leaf failed"


def test_parameters_with_gradients_are_found(monkeypatch):
    monkeypatch.setitem(scoring_gpu.PROVIDERS, "leaf", scoring_gpu.score_released)
    monkeypatch.setattr(torch.nn.Module, "requires_grad_", lambda self, wanted=True: self)
    with pytest.raises(AssertionError, match="parameters have gradients"):
        scoring_gpu.check("leaf", CPU)


# -- goals -------------------------------------------------------------------------------------------------------------


def rows_of(case: str, **ms: float) -> list[dict]:
    return [{"case": case, "provider": name, "ms": value, "aa_spread": 0.01} for name, value in ms.items()]


def test_d2_is_the_released_time_over_ours():
    rows = [
        *rows_of("4k", leaf=10.0, released=30.0),
        *rows_of("32k", leaf=10.0, released=20.0),
        *rows_of("128k", leaf=1.0),
    ]
    rows.append({"case": "128k", "provider": "released", "absent": "OutOfMemoryError: CUDA out of memory"})
    short, long, longest = scoring_gpu.verdicts(rows)
    assert (short["goal"], short["value"], short["passed"], short["noise"]) == ("D2", 3, True, False)
    assert (long["value"], long["passed"]) == (2, False)
    assert longest["passed"] is None
    assert longest["reason"] == "not measured: released (OutOfMemoryError)"
    assert [verdict["reason"] for verdict in scoring_gpu.verdicts([])] == ["not measured: leaf"] * 3


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_measures_goes_on_and_fills_its_table(quick, tmp_path):
    path = tmp_path / "some-gpu" / "scoring.json"
    assert scoring_gpu.run(path, CPU, 120, commit="a", only=["4k"])
    first = json.loads(path.read_text())["rows"]
    assert scoring_gpu.run(path, CPU, 120, commit="a", resume=True)
    both = json.loads(path.read_text())
    assert both["rows"][: len(first)] == first
    measured = {(row["case"], row["provider"]): row for row in both["rows"] if row["case"] != "anchors"}
    assert set(measured) == {(case, name) for case in ("4k", "32k") for name in scoring_gpu.PROVIDERS}
    for (case, _), row in measured.items():
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens"] / row["ms"])
        assert row["peak_bytes"] > 10**5
        assert row["samples"] == (1 if case == "32k" else timing.ROUNDS)
        assert row["flop"] > 10**7
        assert {"norm_error", "gate", "mode", "commit", "transformers"} <= set(row)
    ours, released = (measured["32k", name]["peak_bytes"] for name in ("leaf", "released"))
    assert ours < released
    assert any(line.startswith("4k, leaf: ") for line in scoring_gpu.summary(both["rows"]))

    for row in both["rows"]:
        row |= {"driver": "x", "power_limit_w": "x", "gpu": "Some GPU"}
    timing.write_json(path, both)
    lines = tables.gpu_scoring(tmp_path).splitlines()
    assert any(line.startswith("| D2 | 4k | released / time |") for line in lines)
    assert any(line.startswith("| Some GPU | 32k | leaf |") for line in lines)


def test_what_does_not_fit_is_absent_and_the_rest_goes_on(quick, tmp_path, monkeypatch):
    released = scoring_gpu.score_released

    def too_long(model, row):
        if len(row.input_ids) != scoring_gpu.CHECKED:
            raise torch.OutOfMemoryError("no memory")
        return released(model, row)

    monkeypatch.setitem(scoring_gpu.PROVIDERS, "released", too_long)
    path = tmp_path / "some-gpu" / "scoring.json"
    assert scoring_gpu.run(path, CPU, 60, commit="a")
    rows = [row for row in json.loads(path.read_text())["rows"] if row["case"] != "anchors"]
    assert [row["provider"] for row in rows if "ms" in row] == ["leaf", "leaf"]
    assert {row["absent"] for row in rows if "absent" in row} == {"OutOfMemoryError: no memory"}


def test_cleaning_up_makes_no_model(monkeypatch):
    bench = scoring_gpu.Bench(CPU)
    monkeypatch.setattr(scoring_gpu, "make_model", lambda *arguments: pytest.fail("made only to be cleaned up"))
    bench.recover()
