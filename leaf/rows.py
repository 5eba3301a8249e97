"""Reads input rows of every supported format and says which of their characters may be scored."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """An input row: a conversation whose last message is the response, and what of it may be scored.

    `scored` holds (message, start, end): character ranges of message contents. `record` is the row as it was read.
    """

    id: str
    messages: list[dict[str, str]]
    scored: list[tuple[int, int, int]]
    answer: str | None = None
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """A row that cannot be used: `reason` is a slug to count by, `detail` is for the reader."""

    id: str
    reason: str
    detail: str = ""


def read_rows(
    data: str | Path | Iterable[Mapping[str, Any]],
    *,
    prompt_column: str | None = None,
    response_column: str | None = None,
    answer_column: str | None = None,
    prompt_template: str | None = None,
    protect: Iterable[str] = (),
    system: str | None = None,
    limit: int | None = None,
    responses: str = "dataset",
) -> Iterator[Row | Skip]:
    """Reads rows from a JSON list, JSONL or Parquet file, a dataset name, or an iterable of dicts.

    A dataset (hub id or folder) is named `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`; the split is "train" by default.
    The prompt comes from `prompt_template` or `prompt_column`, else from the first of `messages`, `instruction`
    (+ `input`), `prompt`, `context_messages` that the row has; the response from `response_column`, else from `messages`,
    `output` (with `step_response` before it) or `completion`; the answer from `answer_column`, else `prompt_answer`,
    `answer`, `tests`, or HumanEval's `test` and `entry_point` with the `prompt`.

    In a template every `{column}` stands for a field of the row and everything else is literal text, braces included.
    Scored are the texts of user turns; literals of the template and what a regular expression of `protect` matches are
    not. `system` is put before conversations without a system turn. With `responses="teacher"` rows need no response.
    Ids are the rows' `id`, else their 0-based position; a repeated id gets `#2`, `#3`, … .

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: no rows at all, a malformed file or row (with its position), a missing field (with those found).
    """
    if responses not in ("dataset", "teacher"):
        raise ValueError(f"responses must be 'dataset' or 'teacher', got {responses!r}")
    patterns = [_compiled(pattern) for pattern in protect]
    parts = _template_parts(prompt_template) if prompt_template else None
    seen: Counter[str] = Counter()  # ids, and how far each has been numbered
    repeated = 0
    count = 0
    for position, (where, record) in enumerate(_records(data)):
        if limit is not None and position >= limit:
            break
        count += 1
        if not isinstance(record, Mapping):
            raise ValueError(f"{where}: a row must be an object with named fields, got {type(record).__name__}")
        base = str(record["id"]) if record.get("id") is not None else str(position)
        row_id = base
        while row_id in seen:
            seen[base] += 1
            row_id = f"{base}#{seen[base]}"
        seen[row_id] = 1
        repeated += row_id != base
        turns = _prompt(where, record, prompt_column, parts)
        response = _response(where, record, response_column, optional=responses == "teacher")
        if system and all(role != "system" for role, _ in turns):
            turns.insert(0, ("system", [(system, False)]))
        messages, scored = _assemble(turns, patterns)
        if not response.strip() and responses == "dataset":
            yield Skip(row_id, "empty_response", f"{where}: the response is empty")
        elif not any(m["content"].strip() for m in messages if m["role"] == "user"):
            yield Skip(row_id, "empty_prompt", f"{where}: the prompt is empty")
        else:
            messages.append({"role": "assistant", "content": response})
            yield Row(row_id, messages, scored, _answer(where, record, answer_column), dict(record))
    if repeated:
        logger.warning("%d rows repeat the id of an earlier row; '#2', '#3', … was added to theirs", repeated)
    if not count and limit != 0:
        raise ValueError(f"{data}: no rows in it")


def _records(data: str | Path | Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Every record with a description of where it is."""
    if not isinstance(data, (str, Path)):
        yield from ((f"row {n}", record) for n, record in enumerate(data))
        return
    path = Path(data)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        yield from ((f"{path}: row {n}", r) for n, r in enumerate(r for batch in batches for r in batch.to_pylist()))
    elif path.is_file():
        yield from _json_records(path)
    else:
        name, *config, split = str(data).split(":") if ":" in str(data) else (str(data), "train")
        if Path(name).suffix in (".json", ".jsonl") or (Path(name).is_absolute() and not Path(name).is_dir()):
            raise FileNotFoundError(
                f"{path}: no such file; rows are a .json, .jsonl or .parquet file, or the name of a data set"
            )
        import datasets

        rows = datasets.load_dataset(name, *config, split=split)
        yield from ((f"{data}: row {n}", record) for n, record in enumerate(rows))


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON list or of a JSONL file; which of the two it is shows in the first character."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = next((line.strip()[0] for line in file if line.strip()), "")
            file.seek(0)
            if first == "[":
                yield from ((f"{path}: row {n}", record) for n, record in enumerate(json.load(file)))
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}: line {number}", _json_line(path, number, line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); is it a Parquet file without its suffix?") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a valid JSON list: {error}") from error


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: line {number} is not valid JSON: {error.msg} at column {error.colno}; wanted is a list of rows, or a "
            "row per line"
        ) from error


# A turn is (role, pieces), a piece is (text, may it be scored).
Turn = tuple[str, list[tuple[str, bool]]]


def _template_parts(template: str) -> list[str]:
    """Literals at even places, column names at odd ones. Only `{name}` is a column, so `\\boxed{}` stays as it is."""
    parts = re.split(r"\{([A-Za-z_]\w*)\}", template)
    if len(parts) == 1:
        raise ValueError(f"prompt_template must name a column as {{column}}, got {template!r}")
    return parts


_PROMPT_REMEDY = "Name it with --prompt-column, or build it with --prompt-template"


def _missing(where: str, wanted: str, record: Mapping[str, Any], remedy: str) -> ValueError:
    has = ", ".join(map(repr, record)) or "no fields"
    return ValueError(f"{where}: no {wanted}; the row has {has}. {remedy}")


def _text(where: str, name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise ValueError(f"{where}: field {name!r} must be text, got {type(value).__name__}")


def _turns(where: str, name: str, value: Any) -> list[Turn]:
    """A string is one user turn; otherwise a list of messages. User turns may be scored."""
    if not isinstance(value, list):
        return [("user", [(_text(where, name, value), True)])]
    if not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in value):
        raise ValueError(f"{where}: field {name!r} must be text or a list of messages with 'role' and 'content'")
    return [(m["role"], [(_text(where, f"{name}.content", m["content"]), m["role"] == "user")]) for m in value]


def _prompt(where: str, record: Mapping[str, Any], column: str | None, parts: list[str] | None) -> list[Turn]:
    if parts:
        if absent := [name for name in parts[1::2] if name not in record]:
            raise _missing(
                where, f"field {absent[0]!r} (named by prompt_template)", record, "Correct --prompt-template"
            )
        texts = [_text(where, p, record[p]) if n % 2 else p for n, p in enumerate(parts)]
        return [("user", [(text, bool(n % 2)) for n, text in enumerate(texts)])]
    if column:
        if column not in record:
            raise _missing(where, f"field {column!r}", record, "Correct --prompt-column")
        return _turns(where, column, record[column])
    if record.get("messages") is not None:
        turns = _turns(where, "messages", record["messages"])
        return turns[:-1] if turns and turns[-1][0] == "assistant" else turns
    if "instruction" in record:
        turns = _turns(where, "instruction", record["instruction"])
        if extra := _text(where, "input", record.get("input")):
            turns[-1][1].extend([("\n", False), (extra, True)])
        return turns
    if "prompt" in record:
        return _turns(where, "prompt", record["prompt"])
    if "context_messages" in record:
        value = record["context_messages"]
        nested = isinstance(value, list) and value and isinstance(value[0], list)  # several conversations: the first
        return _turns(where, "context_messages", value[0] if nested else value)
    raise _missing(where, "prompt ('messages', 'instruction', 'prompt' or 'context_messages')", record, _PROMPT_REMEDY)


def _response(where: str, record: Mapping[str, Any], column: str | None, *, optional: bool) -> str:
    if column:
        if column in record:
            return _text(where, column, record[column])
        raise _missing(where, f"field {column!r}", record, "Correct --response-column")
    if record.get("messages") is not None:
        turns = _turns(where, "messages", record["messages"])
        return turns[-1][1][0][0] if turns and turns[-1][0] == "assistant" else ""
    if "output" in record:
        return _text(where, "step_response", record.get("step_response")) + _text(where, "output", record["output"])
    if "completion" in record:
        turns = _turns(where, "completion", record["completion"])
        return turns[-1][1][0][0] if turns else ""
    if optional:
        return ""
    raise _missing(where, "response ('messages', 'output' or 'completion')", record, "Name it with --response-column")


def _answer(where: str, record: Mapping[str, Any], column: str | None) -> str | None:
    """The reference answer as text; lists and HumanEval's fields become JSON, None or empty text is no answer."""
    if column and column not in record:
        raise _missing(where, f"field {column!r}", record, "Correct --answer-column")
    names = [column] if column else ["prompt_answer", "answer", "tests"]
    value = next((record[n] for n in names if record.get(n) not in (None, "")), None)
    if value is None and not column and "def check(" in str(record.get("test")) and record.get("entry_point"):
        value = {name: record[name] for name in ("prompt", "test", "entry_point") if isinstance(record.get(name), str)}
    if value is None:
        return None
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"protect: {pattern!r} is not a regular expression: {error}") from error


def _assemble(
    turns: list[Turn], protect: list[re.Pattern[str]]
) -> tuple[list[dict[str, str]], list[tuple[int, int, int]]]:
    """Messages, and their scored ranges without what is protected."""
    messages, scored = [], []
    for number, (role, pieces) in enumerate(turns):
        content = "".join(text for text, _ in pieces)
        allowed = bytearray().join(bytes([may]) * len(text) for text, may in pieces)
        for match in (m for pattern in protect for m in pattern.finditer(content)):
            allowed[match.start() : match.end()] = bytes(match.end() - match.start())
        scored += [(number, run.start(), run.end()) for run in re.finditer(rb"\x01+", allowed)]
        messages.append({"role": role, "content": content})
    return messages, scored
