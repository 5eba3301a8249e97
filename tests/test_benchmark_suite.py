"""The CPU suite: what `suite.compare` measures and refuses, its peers' formulas, and the file of which tables are made."""

from __future__ import annotations

import json
import statistics
import time
import types
from functools import partial

import pytest
import torch

from benchmarks import (
    attention,
    conftest,
    cross_entropy,
    linear_kl,
    losses,
    suite,
    tables,
    test_ops,
    timing,
    token_scores,
)
from leaf_kernels import pruned_attention

CPU = torch.device("cpu")
FILE = timing.RESULTS / "cpu_suite.json"


class Benchmark:
    """pytest-benchmark's fixture, as far as the suite needs it."""

    def __init__(self) -> None:
        self.extra_info: dict = {}
        self.ran = 0

    def pedantic(self, run, args=(), setup=lambda: None, rounds=1, warmup_rounds=0):
        times = []
        for _ in range(warmup_rounds + rounds):
            setup()
            start = time.perf_counter()
            run(*args)
            times.append(time.perf_counter() - start)
            self.ran += 1
        median = statistics.median(times[warmup_rounds:])
        self.stats = types.SimpleNamespace(stats=types.SimpleNamespace(median=median))


@pytest.fixture(autouse=True)
def threads():
    yield
    torch.set_num_threads(1)


def arm(seconds: float, numel: int, error: float = 1e-3) -> suite.Arm:
    def run() -> torch.Tensor:
        time.sleep(seconds)
        return torch.zeros(numel)

    return suite.Arm(run, lambda: {"some_error": error})


def test_rows_hold_times_peaks_and_errors_of_every_arm():
    benchmark = Benchmark()
    rows = suite.compare(benchmark, {"leaf": arm(0.01, 100), "slow": arm(0.04, 1000, 1e-5)}, op="x", case="y")
    assert benchmark.extra_info["rows"] == list(rows.values())
    assert [row["provider"] for row in rows.values()] == ["leaf", "slow"]
    for row in rows.values():
        assert (row["op"], row["case"], row["gate"], row["samples"]) == ("x", "y", "passed", timing.ROUNDS)
        assert row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        assert {"torch", "triton", "commit", "processor", "threads"} <= set(row)
    assert rows["leaf"]["ms"] >= 10
    assert suite.ratio(rows, "ms", "slow") > 1.5
    assert suite.ratio(rows, "peak_bytes", "slow") == 10
    assert rows["slow"]["largest_bytes"] == 4000
    assert rows["slow"]["roofline"] is None
    assert rows["slow"]["some_error"] == 1e-5
    expected = abs(1e3 * benchmark.stats.stats.median / rows["leaf"]["ms"] - 1)
    assert rows["leaf"]["aa_spread"] == pytest.approx(expected)


def test_nothing_is_timed_where_one_is_wrong():
    def wrong() -> dict[str, float]:
        raise AssertionError("dX is off")

    benchmark = Benchmark()
    with pytest.raises(AssertionError, match="dX is off"):
        suite.compare(benchmark, {"leaf": arm(0, 1), "other": arm(0, 1)._replace(check=wrong)}, op="x")
    assert benchmark.ran == 0
    assert not benchmark.extra_info


# -- what the others compute -------------------------------------------------------------------------------------------


def small_pack() -> attention.Problem:
    case = test_ops.ATTENTION_CASES[1]._replace(lengths=(20, 40), tokens=100)
    return attention.problems(case, CPU, torch.float32)[1]


@pytest.mark.parametrize("attend", [test_ops.sdpa, test_ops.eager])
def test_one_sequence_after_the_other(attend):
    problem = small_pack()
    provider = test_ops.one_by_one(problem, attend)
    out = provider.attend(None, *provider.tensors)
    expected = pruned_attention(problem.q, problem.k, problem.v, problem.layout, impl="reference")
    torch.testing.assert_close(out, expected)


def test_scores_one_after_the_other():
    problem = token_scores.make(token_scores.Case("", 64, 10, 20, 8, 6), CPU)
    expected = token_scores.scores(problem, "reference").score
    torch.testing.assert_close(test_ops.scores_one_by_one(problem), expected, rtol=0, atol=1e-6)


def test_the_released_loss_is_the_forward_kl():
    problem = linear_kl.make(linear_kl.Case("", 8, 12, 30, N=16, kept=0.5), CPU, torch.float32)
    ours, released = (losses.step(linear_kl.PROVIDERS[name](problem), problem) for name in ("leaf", "released"))
    for a, b in zip(ours, released, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(NotImplementedError):
        linear_kl.released(problem._replace(beta=0.5))


# -- a small suite, through the tests themselves -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        partial(
            test_ops.test_pruned_attention,
            case=test_ops.ATTENTION_CASES[0]._replace(lengths=(20, 40), tokens=100, groups=0),
            mode="step",
        ),
        partial(test_ops.test_linear_kl, case=test_ops.KL_CASES[1]._replace(Ds=16, Dt=24, V=300, N=128)),
        partial(test_ops.test_linear_cross_entropy, case=cross_entropy.Case("", 16, 300, N=256, kept=0.5)),
    ],
    ids=["pruned_attention", "linear_kl", "linear_cross_entropy"],
)
def test_a_case_runs(monkeypatch, run):
    """Of the ops whose sizes can be made small from here."""
    monkeypatch.setattr(suite, "ROUNDS", 2)
    monkeypatch.setattr(test_ops, "SAVES", 0)  # nothing, where it is small
    benchmark = Benchmark()
    run(benchmark)
    rows = {row["provider"]: row for row in benchmark.extra_info["rows"]}
    assert len(rows) >= 2
    assert all(row["peak_bytes"] >= row["largest_bytes"] > 0 and row["ms"] > 0 for row in rows.values())


# -- files -------------------------------------------------------------------------------------------------------------


def test_files_name_no_host_and_hold_no_raw_times():
    info = {"node": "some-host", "system": "Linux", "python_version": "3", "cpu": {"brand_raw": "x", "flags": ["a"]}}
    conftest.pytest_benchmark_update_machine_info(None, info)
    assert info == {"system": "Linux", "python_version": "3", "cpu": {"brand_raw": "x", "arch": None, "count": None}}
    commit = {"id": "a", "time": "b", "dirty": False, "project": "c", "branch": "d"}
    written = {"commit_info": commit, "benchmarks": [{"stats": {"median": 1.0, "data": [1.0, 2.0]}}]}
    conftest.pytest_benchmark_update_json(None, None, written)
    assert written == {
        "commit_info": {"id": "a", "time": "b", "dirty": False},
        "benchmarks": [{"stats": {"median": 1.0}}],
    }


def test_the_committed_file_is_small_and_complete():
    assert FILE.stat().st_size < 200_000
    results = json.loads(FILE.read_text())
    assert set(results["machine_info"]) == {"system", "python_version", "cpu"}
    rows = [row for run in results["benchmarks"] for row in run["extra_info"].get("rows", ())]
    ops = {"linear_kl", "linear_cross_entropy", "pruned_attention", "attention_mass", "token_scores"}
    assert {row["op"] for row in rows if row["provider"] == "leaf"} == ops
    for row in rows:
        assert row["gate"] == "passed"
        assert {"mode", "case", "ms", "peak_bytes", "torch", "triton", "commit", "aa_spread"} <= set(row)
        assert any(name.endswith("_error") for name in row)
    assert len({row["commit"] for row in rows}) == 1, "one run"
    estimates = [run["extra_info"]["estimate"] for run in results["benchmarks"] if "estimate" in run["extra_info"]]
    assert [each["case"] for each in estimates] == list(test_ops.ESTIMATES)


def test_table_of_the_suite():
    def row(provider: str, ms: float, op: str = "linear_kl") -> dict:
        where = {"threads": 1, "torch": "2", "commit": "0123456789abcdef", "rounds": 5, "aa_spread": 0.02}
        times = {"ms": ms, "p20_ms": ms - 1, "p80_ms": ms + 1, "peak_bytes": 3 * 2**20}
        if provider == "eager":  # rows of before have no largest allocation
            times["largest_bytes"] = 2 * 2**20
        errors = {"dx_error": 1e-6, "loss_error": 2e-7}
        return {"op": op, "case": "A", "mode": "step", "provider": provider, **times, **errors, **where}

    runs = [[row("leaf", 10), row("eager", 25)], [row("leaf", 1, "token_scores")]]
    estimate = {"case": "E", "predicted_mib": 90.0, "measured_mib": 100.0, "error": -0.1}
    results = {
        "machine_info": {"cpu": {"brand_raw": "some CPU"}},
        "benchmarks": [
            *({"extra_info": {"rows": rows}} for rows in runs),
            {"extra_info": {"estimate": estimate}},
        ],
    }
    lines = tables.cpu_suite(results).splitlines()
    assert lines[0].startswith("1 thread of some CPU, torch 2, commit `0123456789ab`; medians of 5 interleaved rounds")
    assert "| `linear_kl` | A, step | **ours** | 10 | 9–11 | 1.00 | 2% | 3 | – | 1e-06 |" in lines
    assert "| `linear_kl` | A, step | eager | 25 | 24–26 | 2.50 | 2% | 3 | 2 | 1e-06 |" in lines
    assert any(line.startswith("| `token_scores` |") for line in lines)
    assert "token_scores" not in tables.cpu_suite(results, "linear_kl")
    assert "| E | 90 | 100 | -10.0% |" in tables.cpu_estimates(results)
