"""Figures of a run as matplotlib `(fig, ax)`, and what they and the report read from a row of the scores table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

Span = tuple[int, int]

# Okabe and Ito's colours, told apart with every common colour blindness.
BLUE, VERMILLION, GREEN, SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
COLOURS = (BLUE, VERMILLION, GREEN, SKY, "#CC79A7", "#E69F00")
BINS = np.linspace(0.0, 1.0, 51)


# --- what the tables say about one sample -----------------------------------------------------------------------------


def token_texts(row: Mapping[str, Any]) -> list[str]:
    """Text of every token of a scores row; joined they are `text` up to the end of the last token.

    Characters between two tokens go to the later one, and a character that several tokens share (byte-level BPE) to the
    first of them, so the others are empty.
    """
    texts, shown = [], 0
    for start, end in row["offsets"]:
        texts.append(row["text"][shown:end] if end > start else "")
        shown = max(shown, end)
    return texts


def deleted_tokens(row: Mapping[str, Any], removed: Iterable[Span]) -> list[int]:
    """Indices of the prompt tokens of `row` that overlap a removed character range."""
    prompt, spans = row["offsets"][: row["response_start"]], list(removed)
    return [i for i, (start, end) in enumerate(prompt) if any(start < b and a < end for a, b in spans)]


def finite(values: Sequence[float | None]) -> np.ndarray:
    """float64 copy with null and infinite entries as NaN."""
    array = np.array(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)


def prompt_values(row: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The scored quantities of the prompt tokens, NaN where a token is not scored; E2 gives the normalised norms."""
    n = row["response_start"]
    score = finite(row["score"][:n])
    values = {"score": score}
    for model in ("teacher", "student"):
        norm = np.where(np.isnan(score), np.nan, finite(row[f"{model}_norm"][:n]))
        low, high = (np.nanmin(norm), np.nanmax(norm)) if np.isfinite(norm).any() else (0.0, 0.0)
        values[f"{model}_norm"] = norm
        values[model] = (norm - low) / (high - low) if high > low else norm - low
    return values


# --- figures ----------------------------------------------------------------------------------------------------------


def axes(width: float, height: float, **grid: Any) -> tuple[Figure, Any]:
    """A figure of its own (pyplot would keep it in global state) and its axes, an array where `grid` has several."""
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    found = fig.subplots(**grid)
    for ax in np.ravel(found):
        ax.spines[["top", "right"]].set_visible(False)
    return fig, found


def listed(value: Any) -> list[float]:
    """A number or a list of numbers, one per seed or sample, without the missing ones."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _bars(groups: Mapping[str, Mapping[str, Any]], xlabel: str) -> tuple[Figure, Any]:
    """Horizontal means with one standard deviation and up to 20 single values, one row per group, one colour per series."""
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    fig, ax = axes(6.4, 1.0 + 0.13 * len(groups) * (len(series) + 1))
    for s, name in enumerate(series):
        colour = COLOURS[s % len(COLOURS)]
        for g, group in enumerate(groups.values()):
            values, y = listed(group.get(name)), g + 0.8 * ((s + 0.5) / len(series) - 0.5)
            if not values:
                continue
            mean, sd = mean_sd(values)
            label = name if name not in ax.get_legend_handles_labels()[1] else None
            ax.barh(y, mean, 0.8 / len(series), color=colour, alpha=0.8, label=label)
            if len(values) > 1:
                ax.errorbar(mean, y, xerr=sd, color="black", lw=0.9, capsize=2)
            if 1 < len(values) <= 20:  # seeds; samples by the thousand would be a black bar
                ax.plot(values, [y] * len(values), "o", ms=2.2, color="black", alpha=0.45)
    ax.set_yticks(range(len(groups)), list(groups), parse_math=False)  # "$" is text
    ax.invert_yaxis()
    ax.set_xlabel(xlabel)
    ax.grid(axis="x", alpha=0.25)
    ax.set_axisbelow(True)
    if len(series) > 1:
        fig.legend(loc="outside upper right", ncols=len(series), frameon=False, fontsize="small")
    return fig, ax


def plot_arms(results: Mapping[str, Any]) -> tuple[Figure, Any]:
    """Accuracy of every arm (`results["arms"]`), or before and after (`results["accuracy"]`): mean, sd, single seeds."""
    if results.get("arms"):
        groups = {
            words(arm): {words(m): v for m, v in metrics.items() if not m.startswith("attention")}
            for arm, metrics in results["arms"].items()
        }
    elif results.get("accuracy"):
        groups = {label: {"accuracy": value} for label, value in flatten(results["accuracy"])}
    else:
        raise ValueError(f'plot_arms: results must hold "arms" or "accuracy", got the keys {sorted(results)}')
    return _bars(groups, "accuracy")


def plot_attention(attention: Mapping[str, Any]) -> tuple[Figure, Any]:
    """Attention mass on the confounding tokens, {label ("before", "after", an arm): a number or a list of them}."""
    return _bars(
        {label: {"mass": value} for label, value in flatten(attention)}, "attention mass on confounding tokens"
    )


def plot_score_histogram(
    scores: Iterable[Mapping[str, Any]], threshold: float | Sequence[float] | None = None
) -> tuple[Figure, Any]:
    """Histogram of D over all scored tokens of a scores table, with the threshold, or the range of one per sample."""
    return draw_histogram(sum((score_counts(row) for row in scores), np.zeros(len(BINS) - 1)), threshold)


def score_counts(row: Mapping[str, Any]) -> np.ndarray:
    values = finite(row["score"]) if row["status"] == "ok" else np.array([])
    return np.histogram(values[~np.isnan(values)], BINS)[0]


def draw_histogram(counts: np.ndarray, threshold: float | Sequence[float] | None) -> tuple[Figure, Any]:
    fig, ax = axes(6.4, 2.8)
    ax.stairs(counts, BINS, fill=True, color=BLUE, alpha=0.8)
    if thresholds := listed(threshold):
        median = float(np.median(thresholds))
        ax.axvline(median, color=VERMILLION, ls="--", lw=1.4, label=f"threshold {median:.3f}")
        if len(thresholds) > 1:
            low, high = np.quantile(thresholds, [0.05, 0.95])
            ax.axvspan(low, high, color=VERMILLION, alpha=0.15, lw=0, zorder=0, label="5–95 % of the samples")
        ax.legend(frameon=False, fontsize="small")
    ax.set_xlim(0, 1)
    ax.set_xlabel("D (low: the student is sensitive where the teacher is not)")
    ax.set_ylabel("scored tokens")
    return fig, ax


def plot_tokens(row: Mapping[str, Any], removed: Iterable[Span] = (), *, columns: int = 100) -> tuple[Figure, Any]:
    """The heat map of one scores row as a picture: four lanes under the words of the prompt, wrapped at `columns`.

    `removed` are the deleted character ranges of `text`. Scripts that matplotlib's default font lacks show as boxes.
    """
    values, deleted = prompt_values(row), set(deleted_tokens(row, removed))
    raw = token_texts(row)[: row["response_start"]]
    texts = [text.strip(" ").replace("\n", "⏎") or "␣" for text in raw]
    has_lanes = [bool(v >= 0) or i in deleted for i, v in enumerate(values["score"])]
    lines: list[list[tuple[int, int]]] = [[]]  # of (token, column)
    x = 0
    for i, text in enumerate(texts):
        if (x and x + len(text) > columns) or (i and "\n" in raw[i - 1]):
            lines, x = [*lines, []], 0
        lines[-1].append((i, x))
        x += len(text) + 1

    inch, margin, lane_height = 0.09, 8, 0.75  # inches of a column; the others in columns
    heights = [5.4 if any(has_lanes[i] for i, _ in line) else 2.2 for line in lines]
    fig = Figure(figsize=((columns + margin) * inch, (sum(heights) + 1) * inch))
    FigureCanvasAgg(fig)
    ax = fig.add_axes((0, 0, 1, 1), xlim=(-margin, columns), ylim=(sum(heights), -1))
    ax.set_axis_off()
    font: dict[str, Any] = {"family": "monospace", "fontsize": inch * 72 / 0.605, "va": "baseline", "parse_math": False}
    # D is squared as on the page: most scores lie near 0.5, and only low ones are to catch the eye.
    blues, oranges = matplotlib.colormaps["Blues"], matplotlib.colormaps["Oranges"]
    lanes = {
        "teacher": blues(values["teacher"]),
        "student": blues(values["student"]),
        "D": oranges((1 - values["score"]) ** 2),
        "pruned": [VERMILLION if i in deleted else "0.93" for i in range(len(texts))],
    }
    for number, line in enumerate(lines):
        top = sum(heights[:number])
        for i, x in line:
            colour = VERMILLION if i in deleted else "black" if has_lanes[i] else "0.6"
            ax.text(x, top + 1.2, texts[i], color=colour, **font)
            if i in deleted:
                ax.plot([x, x + len(texts[i])], [top + 0.75] * 2, color=VERMILLION, lw=1.2)
        for lane, (name, colours) in enumerate(lanes.items()):
            y = top + 1.6 + lane_height * lane
            if heights[number] > 3:
                ax.text(-1, y + 0.6, name, ha="right", color="0.45", **font | {"fontsize": 5.5})
            for i, x in line:
                if has_lanes[i]:
                    ax.add_patch(Rectangle((x, y), len(texts[i]), 0.65, fc=colours[i], ec="0.85", lw=0.3))
    return fig, ax


def words(name: str) -> str:
    return str(name).replace("_", " ")


def flatten(tree: Any, label: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts as ("outer · inner", value)."""
    if not isinstance(tree, Mapping):
        yield label, tree
        return
    for key, value in tree.items():
        yield from flatten(value, f"{label} · {words(key)}" if label else words(key))
