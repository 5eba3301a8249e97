"""`leaf demo --preset fast`: what it leaves behind, and that LeaF still does what it did.

The thresholds are computed from the committed seeds (`benchmarks/demo_seeds.py --preset fast`): for k seeds, the lowest mean
of any k of them, minus the standard error of such a mean. They move with a new run of all seeds and with nothing else.
"""

from __future__ import annotations

import io
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from leaf.demo import run, summary
from leaf.demo.models import accuracy
from leaf.demo.task import TEST_SETS, make_rows

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "demo" / "fast.json"


def measures(results: dict[str, Any]) -> dict[str, list[float]]:
    """What is held, for every seed whose student lies in the useful window."""
    held = {
        "leaf - kd": results["paired"]["leaf - kd"]["adversarial"],
        "leaf - random": results["paired"]["leaf - random"]["adversarial"],
        "auroc": results["detection"]["auroc_student_wrong_misleading"],
    }
    inside = results["window"]["inside"]
    return {name: [value for value, useful in zip(values, inside) if useful] for name, values in held.items()}


def threshold(values: list[float], k: int) -> float:
    assert len(values) >= 10
    return statistics.mean(sorted(values)[:k]) - statistics.stdev(values) / math.sqrt(k)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What `leaf demo --preset fast --output-dir $LEAF_TEST_DEMO` has left there; run here without that variable."""
    if just_run := os.environ.get("LEAF_TEST_DEMO"):
        return json.loads(Path(just_run, "results.json").read_text()), Path(just_run)
    folder = tmp_path_factory.mktemp("demo")
    return run("fast", folder), folder


@pytest.mark.timeout(900)  # a machine whose cores are busy
def test_results(demo: tuple[dict[str, Any], Path]) -> None:
    results, folder = demo
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["preset"] == "fast"
    assert results["seeds"] == [0]
    assert list(results["arms"]) == ["teacher", "student", "kd", "random", "leaf"]
    for metrics in results["arms"].values():
        assert set(metrics) == {*TEST_SETS, "attention_to_confounder"}
        assert all(len(values) == 1 and 0 <= values[0] <= 1 for values in metrics.values())
    keys = {"auroc", "precision", "recall", "operands_flagged", "teacher_accuracy_on_counterfactuals"}
    assert keys <= results["detection"].keys()
    kd, leaf = (results["arms"][arm]["adversarial"][0] for arm in ("kd", "leaf"))
    assert results["paired"]["leaf - kd"]["adversarial"][0] == pytest.approx(leaf - kd, abs=1e-4)
    assert results["counts"]["leaf"]["kept"][0] <= results["counts"]["leaf"]["made"][0]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary(results))
    shown = console.export_text()
    assert f"{leaf - kd:+.3f}" in shown
    assert "outside the useful window" not in shown


def test_files(demo: tuple[dict[str, Any], Path]) -> None:
    results, folder = demo
    assert (folder / "report.html").stat().st_size > 10_000
    assert {"arms.png", "tokens.png"} <= {path.name for path in (folder / "plots").iterdir()}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 10
    assert {True, False} == {row["misleading"] for row in rows}
    for name in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(folder / "models" / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / "models" / name)
        score = accuracy(model, tokenizer, make_rows("adversarial", 500, 0))
        assert score == pytest.approx(results["arms"][name]["adversarial"][0], abs=0.01)


def test_leaf_beats_its_controls(demo: tuple[dict[str, Any], Path]) -> None:
    results, _ = demo
    assert results["window"]["inside"] == [True]
    for name, committed in measures(json.loads(COMMITTED.read_text())).items():
        assert measures(results)[name][0] > max(threshold(committed, 1), 0), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_leaf_beats_its_controls_on_three_seeds(tmp_path: Path) -> None:
    results = run("fast", tmp_path, seeds=(0, 1, 2))
    assert results["window"]["inside"] == [True] * 3
    for name, committed in measures(json.loads(COMMITTED.read_text())).items():
        assert statistics.mean(measures(results)[name]) > threshold(committed, 3), name
