"""Rows on disk and an ear for what a run says."""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console, RenderableType

T = TypeVar("T")


def word_problems(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"p{n}",
            "prompt": f"Tom has {n} bööks 中. The sign says {n + 1}. Eva gives Tom 2. How many does Tom have now?",
            "completion": f"{n} plus 2 equals {n + 2}.\nThe answer is {n + 2}",
            "answer": str(n + 2),
        }
        for n in range(count)
    ]


def write_rows(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_config(path: pathlib.Path, options: Mapping[str, Any]) -> str:
    path.write_text(json.dumps(options))  # JSON is YAML
    return str(path)


class Said(list[str]):
    """A `leaf.run.Ui` that remembers the messages, and what is shown as a log file has it."""

    def say(self, message: str) -> None:
        self.append(message)

    def show(self, renderable: RenderableType) -> None:
        console = Console(file=io.StringIO(), width=80)
        console.print(renderable)
        self.append(console.file.getvalue())

    def track(self, items: Iterable[T], total: int, description: str, tokens: object = None) -> Iterator[T]:
        return iter(items)
