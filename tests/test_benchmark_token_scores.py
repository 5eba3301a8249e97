"""The GPU benchmark of token_scores, as far as a CPU can tell: goals from rows, what it refuses, a run on tiny cases."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import tables, timing
from benchmarks import token_scores as benchmark

CPU = torch.device("cpu")
CASES = {case.name: case for case in benchmark.CASES}


@pytest.fixture
def quick(monkeypatch):
    """Two samples of everything."""
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "PER_ROUND", 2)


def row(case: str, provider: str, ms: float, mode: str = "scores") -> dict:
    return {"case": case, "provider": provider, "mode": mode, "ms": ms, "aa_spread": 0.01}


def verdict(rows: list[dict], case: str, what: str) -> dict:
    (found,) = (v for v in benchmark.verdicts(rows) if (v["case"], v["what"]) == (case, what))
    return found


@pytest.mark.parametrize(
    ("ms", "passed", "stretch", "noise"),
    [(0.65, True, True, False), (0.69, True, False, True), (0.71, False, False, True), (0.8, False, False, False)],
)
def test_the_time_at_128k_is_a_goal_of_its_own(ms, passed, stretch, noise):
    got = verdict([row("128k", "leaf", ms), row("128k", "leaf", 0.1, "select")], "128k", "ms")
    assert got["value"] == ms
    assert (got["passed"], got["passed_stretch"], got["noise"]) == (passed, stretch, noise)


@pytest.mark.parametrize(("ms", "passed", "stretch"), [(0.19, False, False), (0.25, True, False), (0.31, True, True)])
def test_speedup_is_torch_over_ours(ms, passed, stretch):
    rows = [
        row("8k", "leaf", 0.1),
        row("8k", "torch", ms),
        row("8k", "compile", 0.01),
        row("8k", "torch", 9.0, "select"),
    ]
    got = verdict(rows, "8k", "torch / time")
    assert got["value"] == pytest.approx(ms / 0.1)
    assert (got["passed"], got["passed_stretch"]) == (passed, stretch)


def test_what_was_not_measured_is_neither_passed_nor_failed():
    absent = {"case": "8k", "provider": "torch", "absent": "not there"}
    got = verdict([{"case": "anchors"}, absent, row("8k", "leaf", 0.1)], "8k", "torch / time")
    assert (got["passed"], got["reason"]) == (None, "not measured: torch")
    assert all(v["passed"] is None for v in benchmark.verdicts([]))


def test_goals_name_what_exists():
    assert {goal.id for goal in benchmark.GOALS} == {"B1", "B2"}
    for goal in benchmark.GOALS:
        assert goal.case in CASES
        assert goal.peer in {"", *benchmark.PROVIDERS}


def test_cases_are_what_they_say():
    for case in benchmark.CASES:
        lengths = case.lengths()
        assert sum(lengths) == case.tokens
        assert all(case.shortest <= n <= case.longest for n in lengths[:-1])
    assert [len(case.lengths()) for case in benchmark.CASES[::2]] == [pytest.approx(131072 / 650, rel=0.1), 1]
    problem = benchmark.make(CASES["8k"].tiny(), CPU)
    assert problem.teacher.shape == (128, 128)
    assert problem.segment_starts[-1] == 128


def test_a_run_measures_every_case_and_says_so(quick, tmp_path, capsys):
    path = tmp_path / "token_scores.json"
    assert benchmark.run(path, CPU, 60, commit="a")
    written = json.loads(path.read_text())
    rows = [r for r in written["rows"] if r["case"] != "anchors"]
    assert len(rows) == len(benchmark.CASES) * len(benchmark.PROVIDERS) * len(benchmark.MODES)
    for r in rows:
        assert r["ms"] > 0
        assert r["gate"] == "passed"
        assert 0 < r["norm_error"] < benchmark.NORM_ERROR
        assert 0 < r["score_error"] < benchmark.SCORE_ERROR
        assert 0 < r["largest_bytes"] <= r["peak_bytes"]
        assert r["roofline"] is None, "of a CPU"
        assert {"p20_ms", "p80_ms", "samples", "tokens", "segments", "bytes", "torch", "commit"} <= set(r)
    assert {v["goal"] for v in written["goals"] if v["passed"] is not None} == {"B1", "B2"}
    assert any(timing.line(goal).startswith("B2  8k, torch / time") for goal in written["goals"])
    assert "complete" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["norms", "scores", "flags", "spans"])
def test_a_wrong_result_is_not_timed(quick, monkeypatch, wrong):
    def broken(problem: benchmark.Problem, mode: str):
        def run() -> benchmark.Result:
            scores, flags, spans = benchmark.select(problem, "reference")
            if wrong == "norms":
                scores = scores._replace(student_norm=scores.student_norm * 1.001)
            elif wrong == "scores":
                scores = scores._replace(score=scores.score + 0.001)
            elif wrong == "flags":
                flags = ~flags
            else:
                spans = spans._replace(end=spans.end + 1)
            return scores, flags, spans

        return run

    monkeypatch.setitem(benchmark.PROVIDERS, "leaf", broken)
    rows = list(benchmark.measure(CASES["8k"].tiny(), CPU, timing.Deadline(60)))
    assert not any("ms" in r for r in rows)
    reasons = {r["provider"]: r["absent"] for r in rows}
    assert {"norms": "norm_error", "scores": "score_error"}.get(wrong, f"{wrong} are not") in reasons["leaf"]
    assert reasons["torch"] == "not timed: leaf failed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    with pytest.raises(SystemExit):
        benchmark.main([])
    assert "no NVIDIA GPU here" in capsys.readouterr().err


def test_the_page_shows_goals_per_gpu(tmp_path):
    assert tables.gpu_token_scores(tmp_path).startswith("Not measured yet")
    assert tables.gpu_token_scores.__defaults__ == (timing.RESULTS,)
    rows = [{**row("128k", "leaf", 0.5), "roofline": 0.9}, row("128k", "torch", 1.0)]
    where = dict.fromkeys(("gpu", "driver", "power_limit_w", "torch", "triton", "commit"), "x")
    anchor = {"case": "anchors", "copy_gb_s": 1.0, "matmul_tflop_s": 2.0, **where}
    path = tmp_path / "some-gpu" / "token_scores.json"
    timing.write_json(path, {"rows": [anchor, *rows], "goals": benchmark.verdicts(rows)})
    lines = tables.gpu_token_scores(tmp_path).splitlines()
    assert "| B1 | 128k | ms | 0.50 | ≤ 0.70 | ≤ 0.66 | 90% | reached |" in lines
    assert "| B2 | 128k | torch / time | 2.00 | ≥ 1.30 | ≥ 1.50 | 90% | reached |" in lines
    assert "| B2 | 8k | torch / time | – | – | – | – | not measured: leaf, torch |" in lines
