"""Draws every figure of README.md and docs/ from the committed results, and from nothing else:  python benchmarks/plot.py

A figure lies beside its data in `benchmarks/results/`, says on which machine and commit the data was measured, and carries a
digest of the data, by which a test knows that it is up to date. Where nothing was measured no file is drawn.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from leaf.plots import BLUE, COLOURS, GREEN, VERMILLION, axes, plot_arms

RESULTS = Path(__file__).parent / "results"
DIGEST = "Data"  # what the PNG calls its digest

Groups = dict[str, dict[str, float]]  # {label: {series: value}}


def where(facts: dict[str, Any], machine: str | None = None) -> str:
    """From which machine and code: of an environment, or of a row that holds one."""
    machine = machine or (facts["processor"] if facts.get("gpu", "none") == "none" else facts["gpu"])
    head, _, changes = facts.get("commit", "not recorded").partition("+")
    commit = head if " " in head else head[:12] + (" with changes" if changes else "")
    return f"{machine}, torch {facts['torch']}, commit {commit}"


def what_of(row: dict[str, Any]) -> str:
    return f"{row['op']}: {row['case']}, {row['mode']}"


# -- drawing -----------------------------------------------------------------------------------------------------------


def palette(names: Iterable[str]) -> dict[str, str]:
    """A colour each; ours and the released recipe have the same in every figure."""
    fixed, others = {"leaf": BLUE, "released": VERMILLION}, itertools.cycle(COLOURS[2:])
    return {name: fixed.get(name) or next(others) for name in dict.fromkeys(names)}


def label(ax: Any, text: str, x: float, y: float, *, right: bool, **style: Any) -> None:
    """A small text beside a point."""
    place = {"xytext": (6 if right else -6, 0), "textcoords": "offset points", "ha": "left" if right else "right"}
    box = {"fc": "white", "ec": "none", "pad": 0.6}
    ax.annotate(text, (x, y), va="center", fontsize=7, bbox=box, zorder=2, **place, **style)


def dots(ax: Any, groups: Groups, colours: dict[str, str], xlabel: str, number: str = "{:.1f}") -> None:
    """A line per group, on it a dot per series; the values of the first and the last beside them."""
    for s, (name, colour) in enumerate(colours.items()):  # smaller and smaller, so that none hides another
        found = [(group[name], y) for y, group in enumerate(groups.values()) if name in group]
        ax.scatter(*zip(*found), s=52 / (1 + 0.5 * s), color=colour, label=name, zorder=3)
    for y, group in enumerate(groups.values()):
        for pick in dict.fromkeys((max, min) if len(group) > 1 else (max,)):
            label(ax, number.format(pick(group.values())), pick(group.values()), y, right=pick is max)
    ax.set_yticks(range(len(groups)), list(groups), fontsize=8, parse_math=False)
    ax.set_xlabel(xlabel)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)


def octaves(axis: Any, values: list[int], labels: list[str] | None = None) -> None:
    """Powers of two and no other ticks."""
    axis.set_ticks(values, labels or [f"{value:g}×" for value in values])
    axis.set_minor_locator(NullLocator())


def cpu_suite(results: dict[str, Any]) -> Figure:
    """Time and memory of everybody else over ours, op by op and case by case."""
    times: Groups = {}
    peaks: Groups = {}
    row: dict[str, Any] = {}
    for run in results["benchmarks"]:
        rows = {row["provider"]: row for row in run["extra_info"].get("rows", ())}
        for name, row in rows.items():
            if name != "leaf":
                for groups, column in ((times, "ms"), (peaks, "peak_bytes")):
                    peer = name.partition(":")[0]  # "released: sdpa" is what the released code runs
                    groups.setdefault(what_of(row), {})[peer] = row[column] / rows["leaf"][column]
    fig, both = axes(9, 1.3 + 0.3 * len(times), ncols=2, sharey=True)
    colours = palette(name for group in times.values() for name in group)
    for ax, groups, what in zip(both, (times, peaks), ("time", "peak memory")):
        ax.set_xscale("log")
        dots(ax, groups, colours, f"{what} ÷ ours")
        octaves(ax.xaxis, [0.25, 0.5, 1, 2, 4, 8, 16])
        low, high = (pick(v for g in groups.values() for v in g.values()) for pick in (min, max))
        ax.set_xlim(min(low, 1) / 1.6, max(high, 1) * 1.6)
        ax.axvline(1, color="black", lw=1, zorder=1)
    both[0].invert_yaxis()
    handles, names = both[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False, fontsize="small")
    fig.suptitle("Right of 1: ours needs less", x=0.01, ha="left", fontsize=10)
    return noted(fig, where(row, f"{row['threads']} thread of {results['machine_info']['cpu']['brand_raw']}"))


def scoring_memory(results: dict[str, Any]) -> Figure:
    fig, ax = axes(6.4, 4)
    for arm, colour, marker in (("released", VERMILLION, "o"), ("ours", BLUE, "s")):
        rows = [row for row in results["rows"] if arm in row]
        ax.plot([r["tokens"] for r in rows], [r[arm] / 2**20 for r in rows], color=colour, marker=marker, label=arm)
    lengths, per_token = [row["tokens"] for row in results["rows"]], results["checkpoint_bytes_per_token"]
    ax.plot(lengths, [n * per_token / 2**20 for n in lengths], "k--", lw=1, label="checkpoints alone")
    by_length(ax, lengths, "tokens of the row", "peak beyond the weights, MiB")
    ax.set_yscale("log")
    ax.set_title("Scoring one row: {layers} layers of {hidden}, V = {vocabulary}".format(**results["model"]), size=10)
    return noted(fig, where(results["environment"]))


def by_length(ax: Any, lengths: list[int], xlabel: str, ylabel: str) -> None:
    ax.set_xscale("log")
    octaves(ax.xaxis, lengths, [f"{n / 1024:g}k" for n in lengths])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize="small")


def demo(results: dict[str, Any]) -> Figure:
    return noted(plot_arms(results)[0], where(*results["environments"][-1:]))


# -- of a GPU ----------------------------------------------------------------------------------------------------------


def e2e(results: dict[str, Any]) -> Figure | None:
    """Peak memory of a step by the tokens of its sample; a cross where one did not fit."""
    rows = [row for row in results["rows"] if "fits" in row]
    if not any("peak_bytes" in row for row in rows):
        return None
    fig, ax = axes(6.4, 4)
    top = max(row["peak_bytes"] for row in rows if "peak_bytes" in row) / 2**30
    for s, (name, colour) in enumerate(palette(row["provider"] for row in rows).items()):
        own = sorted((row["tokens"], row.get("peak_bytes")) for row in rows if row["provider"] == name and row["fits"])
        measured = [(tokens, peak / 2**30) for tokens, peak in own if peak]
        longest = f"{own[-1][0] / 1024:g}k" if own else "none"
        ax.plot(
            [n for n, _ in measured], [gib for _, gib in measured], "o-", color=colour, label=f"{name}: up to {longest}"
        )
        if failed := [row["tokens"] for row in rows if row["provider"] == name and not row["fits"]]:
            ax.plot(min(failed), top * (1.06 + 0.04 * s), "x", color=colour)
    lengths = sorted({row["tokens"] for row in rows})
    by_length(ax, [n for n in lengths if n & (n - 1) == 0] or lengths, "tokens of the sample", "peak memory, GiB")
    ax.set_title("A step of a 1B student and an 8B teacher; ×: does not fit", size=10)
    return noted(fig, where(rows[0]))


def goals(*files: dict[str, Any]) -> Figure | None:
    """Every goal of every file: by which factor it is reached or missed."""
    every = sorted((goal for results in files for goal in results["goals"]), key=lambda goal: goal["goal"])
    if not any(goal["passed"] is not None for goal in every):
        return None
    fig, ax = axes(8, 1.2 + 0.24 * len(every))
    labels = []
    for y, goal in enumerate(every):
        against = goal["what"] if "what" in goal else f"{goal['mode']}, {goal.get('peer', 'peers')} / time"
        labels.append(f"{goal['goal']}  {goal['case']}: {against}")
        if goal["passed"] is None:
            label(ax, "not measured", 1, y, right=True, color="0.5")
            continue
        value, at_most = goal.get("ratio", goal.get("value")), goal.get("at_most", False)
        factor = goal["wanted"] / value if at_most else value / goal["wanted"]
        colour = "0.5" if goal["noise"] else GREEN if goal["passed"] else VERMILLION
        ax.barh(y, factor - 1, left=1, height=0.6, color=colour, alpha=0.8)
        end = factor
        if goal["stretch"]:
            stretch = goal["wanted"] / goal["stretch"] if at_most else goal["stretch"] / goal["wanted"]
            ax.plot(stretch, y, "|", color="black", ms=8)
            end = max(factor, stretch) if factor >= 1 else factor
        label(ax, f"{value:.2f}", end, y, right=factor >= 1)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xlim(low / 1.3, high * 1.3)
    octaves(ax.xaxis, [n for n in (0.125, 0.25, 0.5, 1, 2, 4, 8) if low / 1.3 <= n <= high * 1.3])
    ax.axvline(1, color="black", lw=1, zorder=1)
    ax.set_ylim(-0.8, len(every) - 0.2)
    ax.set_yticks(range(len(every)), labels, fontsize=8, parse_math=False)
    ax.invert_yaxis()
    ax.set_xlabel("of what is wanted (right of 1: reached; grey: within noise; |: stretch)")
    return noted(fig, "\n".join(dict.fromkeys(where(results["rows"][0]) for results in files if results["goals"])))


def roofline(*files: dict[str, Any]) -> Figure | None:
    """Of every row that says what fraction of its bound it reaches."""
    rows = [row for results in files for row in results["rows"] if row.get("roofline") is not None]
    if not rows:
        return None
    groups: Groups = {}
    for row in rows:
        groups.setdefault(what_of(row), {})[row["provider"]] = row["roofline"]
    fig, ax = axes(8, 1.3 + 0.28 * len(groups))
    dots(ax, groups, palette(row["provider"] for row in rows), "fraction of the roofline", "{:.2f}")
    ax.set_xlim(-0.08, 1.1)
    ax.axvline(1, color="black", lw=1, zorder=1)
    ax.invert_yaxis()
    fig.legend(loc="outside upper right", ncols=4, frameon=False, fontsize="small")
    return noted(fig, "\n".join(dict.fromkeys(map(where, rows))))


def noted(fig: Figure, text: str) -> Figure:
    fig.supxlabel(text, x=0.01, ha="left", fontsize=6.5, color="0.4")
    return fig


# -- files -------------------------------------------------------------------------------------------------------------


class Drawing(NamedTuple):
    """A figure of the folder of results, the files that it is drawn from, and how: None where they hold nothing for it."""

    name: str
    sources: list[Path]
    draw: Callable[..., Figure | None]


def drawings(results: Path) -> Iterator[Drawing]:
    for name, draw in (
        ("cpu_suite", cpu_suite),
        ("scoring_memory", scoring_memory),
        ("demo/full", demo),
        ("demo/fast", demo),
        ("demo/fast_any_word", demo),
    ):
        yield Drawing(name, [results / f"{name}.json"], draw)
    for folder in sorted({path.parent for path in results.glob("*/*.json")}):
        yield Drawing(f"{folder.name}/demo", [folder / "demo.json"], demo)
        paths = sorted(folder.glob("*.json"))
        if measured := [path for path in paths if _has_goals(json.loads(path.read_text()))]:
            yield Drawing(f"{folder.name}/e2e", [folder / "e2e.json"], e2e)
            yield Drawing(f"{folder.name}/goals", measured, goals)
            yield Drawing(f"{folder.name}/roofline", measured, roofline)


def _has_goals(results: dict[str, Any]) -> bool:
    """Or none: what `benchmarks.tune` found are no goals."""
    return {"rows", "goals"} <= results.keys() and all("goal" in goal for goal in results["goals"])


def digest(sources: list[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def main(results: Path = RESULTS, output: Path | None = None) -> list[Path]:
    """Draws all that `results` holds data for, below `output` (by default beside the data); the files that were written."""
    written = []
    for name, sources, draw in drawings(results):
        if not all(path.exists() for path in sources):
            continue
        fig = draw(*(json.loads(path.read_text()) for path in sources))
        if fig is not None:
            path = (output or results) / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            fig.savefig(path, dpi=150, metadata={DIGEST: digest(sources)})
            written.append(path)
    return written


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path in main():
        print(path)
