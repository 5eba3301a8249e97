"""benchmarks/scoring.py at small sizes: its arms agree, its figures come from what ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import scoring


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(scoring, "SIZES", {"teacher": (64, 96, 2), "student": (32, 64, 2)})
    for name, value in {"ROWS": 2, "PROMPT": 40, "RESPONSE": 9, "VOCABULARY": 300}.items():
        monkeypatch.setattr(scoring, name, value)
    scoring.make_models(tmp_path)
    return tmp_path


def test_the_arms_measure_the_same_norms(small: Path) -> None:
    norms = {name: [list(model) for model in arm(small)] for name, arm in scoring.ARMS.items()}
    for name in ("lean", "ours"):
        for ours, theirs in zip(norms[name], norms["released"], strict=True):
            torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-4, atol=0)


def test_memory_of_the_released_procedure_grows_with_the_vocabulary_ours_does_not() -> None:
    ours, released = (
        [scoring.peak_of(f, n, 2) for n in (256, 512)] for f in (scoring.score_ours, scoring.score_released)
    )
    assert released[1] - released[0] > 256 * scoring.VOCABULARY * 4
    assert ours[1] - ours[0] < 256 * 64 * 4 * 40


def test_committed_figures_hold_what_is_promised() -> None:
    result = json.loads((scoring.RESULTS / "scoring_cpu.json").read_text())
    ratios = result["ratios"]
    assert len(result["rounds"]) == scoring.ROUNDS
    assert ratios["ours"]["mib"] <= 0.42
    assert ratios["ours"]["seconds"] <= 0.44
    assert all(ratios["ours"][name] < ratios["lean"][name] for name in ("mib", "seconds"))
