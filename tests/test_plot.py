"""benchmarks/plot.py: the figures of the documentation, from the committed files and from those of a made-up GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import attention, e2e, plot, tables, timing

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]
WHERE = {"gpu": "Some GPU", "torch": "2.13", "commit": "0123456789abcdef+changes"}


def texts(fig) -> list[str]:
    """What is written outside the axes, the axes' own labels and what stands in them."""
    inside = [
        text for ax in fig.axes for text in (*ax.texts, *ax.get_yticklabels(), *ax.get_legend_handles_labels()[1])
    ]
    return [
        getattr(text, "get_text", lambda text=text: text)() for text in (*fig.texts, fig._supxlabel, *inside) if text
    ]


def test_the_committed_figures_are_those_of_the_committed_data(tmp_path):
    drawn = {path.relative_to(tmp_path) for path in plot.main(output=tmp_path)}
    assert drawn == {path.relative_to(plot.RESULTS) for path in plot.RESULTS.rglob("*.png")}
    for path in drawn:
        made, committed = (Image.open(folder / path).info[plot.DIGEST] for folder in (tmp_path, plot.RESULTS))
        assert made == committed, f"{path} is older than its data: run python benchmarks/plot.py"
        assert min(Image.open(tmp_path / path).size) > 400


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_figure_of_the_documentation_is_drawn(document):
    known = {(plot.RESULTS / f"{drawing.name}.png") for drawing in plot.drawings(plot.RESULTS)}
    for target in re.findall(r"""(?:\]\(|src=")([^)":]+\.(?:png|svg|jpg))[)"]""", document.read_text()):
        assert (document.parent / target).resolve() in known, target


def test_figures_say_where_they_are_from():
    assert plot.where(WHERE) == "Some GPU, torch 2.13, commit 0123456789ab with changes"
    assert plot.where({"processor": "x86_64", "torch": "2"}) == "x86_64, torch 2, commit not recorded"


# -- of a GPU ----------------------------------------------------------------------------------------------------------


def lengths(provider: str, limit: int) -> list[dict]:
    """Tried are the longest that fits and the shortest that does not."""
    found = []
    for tokens in e2e.LENGTHS:
        row = {"case": f"longest {tokens}", "provider": provider, "tokens": tokens, "fits": tokens <= limit, **WHERE}
        found.append({**row, "peak_bytes": tokens * 2**20} if tokens == limit else {**row, "follows": True})
    return found


@pytest.fixture
def results(tmp_path) -> Path:
    """Of a GPU on which attention was measured in part, and steps altogether."""
    anchor = {"case": "anchors", **WHERE}
    facts = {"op": "attention", "case": "1b-packed", "mode": "forward", "aa_spread": 0.01, "token_ratio": 1.0, **WHERE}
    rows = [
        {**facts, "provider": "leaf", "ms": 1.0, "roofline": 0.52},
        {**facts, "provider": "torch_varlen", "ms": 1.5, "roofline": 0.347},
    ]
    steps = [row for name, limit in (("leaf", 2**17), ("released", 2**12)) for row in lengths(name, limit)]
    steps += [
        {"case": "step", "provider": name, "ms": ms, "aa_spread": 0.01}
        for name, ms in (("leaf", 10.0), ("released", 30.0))
    ]
    for name, module, own in (("attention", attention, rows), ("e2e", e2e, steps)):
        timing.write_json(
            tmp_path / "some-gpu" / f"{name}.json", {"rows": [anchor, *own], "goals": module.verdicts(own)}
        )
    timing.write_json(tmp_path / "compile" / "other.json", {"rows": []})
    return tmp_path


def drawn(results: Path, name: str) -> list[str]:
    (drawing,) = (one for one in plot.drawings(results) if one.name == f"some-gpu/{name}")
    fig = drawing.draw(*(plot.json.loads(path.read_text()) for path in drawing.sources))
    return texts(fig)


def test_a_gpu_has_its_figures(results):
    written = plot.main(results)
    assert {str(path.relative_to(results)) for path in written} == {
        "some-gpu/e2e.png", "some-gpu/goals.png", "some-gpu/roofline.png"
    }  # fmt: skip
    assert Image.open(written[0]).info[plot.DIGEST]
    figures = tables.gpu_figures(results)
    assert "![Goals, some-gpu](../benchmarks/results/some-gpu/goals.png)" in figures
    assert figures.count("![") == 3


def test_goals_reached_missed_and_not_measured(results):
    shown = drawn(results, "goals")
    assert "A1  1b-packed: forward, torch_varlen / time" in shown
    assert {"1.50", "3.00", "32.00", "not measured"} <= set(shown)  # attention, D3 and D1
    assert "Some GPU, torch 2.13, commit 0123456789ab with changes" in shown


def test_goals_lie_on_the_side_of_their_verdict():
    goals = [
        {"goal": "X", "case": "a", "what": "w", "value": 2.0, "wanted": 4.0, "at_most": True, "stretch": None},
        {"goal": "X", "case": "b", "what": "w", "value": 2.0, "wanted": 4.0, "at_most": False, "stretch": 5.0},
    ]
    for goal, passed in zip(goals, (True, False)):
        goal |= {"passed": passed, "noise": False}
    fig = plot.goals({"rows": [WHERE], "goals": goals})
    reached, missed = (bar.get_x() + bar.get_width() for bar in fig.axes[0].patches)
    assert (reached, missed) == (2, 0.5)


def test_memory_and_roofline(results):
    assert {"leaf: up to 128k", "released: up to 4k"} <= set(drawn(results, "e2e"))
    shown = drawn(results, "roofline")
    assert {"attention: 1b-packed, forward", "0.52", "0.35", "leaf", "torch_varlen"} <= set(shown)


def test_what_was_not_measured_is_not_drawn(tmp_path):
    for name, module in (("attention", attention), ("e2e", e2e)):
        path = tmp_path / "some-gpu" / f"{name}.json"
        timing.write_json(path, {"rows": [{"case": "anchors", **WHERE}], "goals": module.verdicts([])})
    assert plot.main(tmp_path) == []
    assert tables.gpu_figures(tmp_path).startswith("No figure yet")
