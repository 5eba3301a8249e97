"""Tables: reuse, resume, what changed, and damage that is seen."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pytest
import tiny

from leaf import tables
from leaf.tables import Table, is_current, model_key, open_table, write_table

SCHEMA = pa.schema([("n", pa.int64()), ("text", pa.string())])


class Killed(BaseException):
    """As `kill -9`: nothing handles it."""


def produce(calls: list[int], die_at: int | None = None) -> Callable[[Sequence[int]], Iterator[Any]]:
    """Two rows for an even unit, none for an odd one."""

    def run(units: Sequence[int]) -> Iterator[tuple[list[dict[str, Any]], Mapping[str, int]]]:
        for unit in units:
            if unit == die_at:
                raise Killed
            calls.append(unit)
            odd = unit % 2
            yield [] if odd else [{"n": unit, "text": "é中"}, {"n": -unit, "text": None}], {"odd": 1} if odd else {}

    return run


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SHARD_UNITS", 3)


def build(folder: pathlib.Path, *, key: object = 1, n: int = 8, **options: Any) -> tuple[Table, list[int], list[str]]:
    calls: list[int] = []
    said: list[str] = []
    table = write_table(folder / "score", {"q": key}, SCHEMA, range(n), produce(calls, **options), said.append)
    return table, calls, said


def test_rows_counts_and_reading(tmp_path: pathlib.Path) -> None:
    table, calls, said = build(tmp_path)
    assert (calls, said, len(table), table.counts) == (list(range(8)), [], 8, {"odd": 4})
    assert [row["n"] for row in table] == [0, 0, 2, -2, 4, -4, 6, -6]
    again = open_table(tmp_path / "score")
    assert again.rows() == table.rows() == again.arrow().to_pylist()
    assert list(again.pandas()["n"]) == [row["n"] for row in table]


def test_an_unchanged_table_is_reused(tmp_path: pathlib.Path) -> None:
    first, *_ = build(tmp_path)
    second, calls, said = build(tmp_path)
    assert (calls, said) == ([], ["score: unchanged"])
    assert second.fingerprint == first.fingerprint


def test_a_changed_key_says_what_changed(tmp_path: pathlib.Path) -> None:
    build(tmp_path, n=8)
    table, calls, said = build(tmp_path, key=(2, 3), n=2)
    assert said == ["score: computed again, because q (1 -> [2, 3]) changed"]
    assert calls == [0, 1]
    assert len(table) == 2
    assert [p.name for p in (tmp_path / "score").glob("part-*")] == ["part-00000.parquet"]
    assert is_current(tmp_path / "score", {"q": (2, 3)})
    assert not is_current(tmp_path / "score", {"q": 1})


def test_a_killed_stage_resumes_after_its_last_whole_shard(tmp_path: pathlib.Path) -> None:
    with pytest.raises(Killed):
        build(tmp_path / "a", die_at=5)
    with pytest.raises(ValueError, match="unfinished: run `leaf score` again"):
        open_table(tmp_path / "a" / "score")
    resumed, calls, said = build(tmp_path / "a")
    assert (calls, said) == ([3, 4, 5, 6, 7], ["score: resumed after 1 of 3 shards"])
    whole, *_ = build(tmp_path / "b")
    assert (resumed.rows(), resumed.counts, resumed.fingerprint) == (whole.rows(), whole.counts, whole.fingerprint)


@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_shard_is_never_read(tmp_path: pathlib.Path, damage: str) -> None:
    whole, *_ = build(tmp_path)
    shard = tmp_path / "score" / "part-00001.parquet"
    content = shard.read_bytes()
    if damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(content[:-10] if damage == "cut" else content[:20] + bytes([content[20] ^ 1]) + content[21:])
    assert not is_current(tmp_path / "score", {"q": 1})
    with pytest.raises(ValueError, match=r"part-00001\.parquet is damaged"):
        open_table(tmp_path / "score")
    mended, calls, said = build(tmp_path)
    assert calls == [3, 4, 5, 6, 7]
    assert said == ["score: part-00001.parquet is damaged, computed again from there"]
    assert mended.fingerprint == whole.fingerprint


def test_a_half_written_file_is_not_seen(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise Killed

    build(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tables.os, "replace", die)
        with pytest.raises(Killed):
            build(tmp_path, key=2)
    assert json.loads((tmp_path / "score" / "manifest.json").read_text())["key"] == {"q": 1}
    assert len(open_table(tmp_path / "score")) == 8


def test_no_units_and_no_table(tmp_path: pathlib.Path) -> None:
    table, *_ = build(tmp_path, n=0)
    assert (table.rows(), table.arrow().schema.names) == ([], ["n", "text"])
    with pytest.raises(ValueError, match="holds no table: run `leaf prune` first"):
        open_table(tmp_path / "prune")


def test_a_model_key_follows_content(tmp_path: pathlib.Path) -> None:
    tokenizer = tiny.tokenizer()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny.model(tokenizer, seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    a, b, c = (model_key(str(tmp_path / name)) for name in "abc")
    assert a == b  # the same files elsewhere
    assert a != c  # another training of the same architecture: equal headers and sizes
    weights = tmp_path / "c" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert model_key(str(tmp_path / "c")) != c
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages }}")
    assert model_key(str(tmp_path / "b")) != a


def test_a_run_that_fails_before_its_first_shard_has_lost_nothing(tmp_path: pathlib.Path) -> None:
    first, *_ = build(tmp_path)
    with pytest.raises(Killed):
        build(tmp_path, key=2, die_at=1)
    assert open_table(tmp_path / "score").rows() == first.rows()
    _, calls, said = build(tmp_path)
    assert (calls, said) == ([], ["score: unchanged"])


def test_what_changed_is_readable(tmp_path: pathlib.Path) -> None:
    build(tmp_path, key={"q": 0.05, "flags": {"cap": 0.5}, "model": "0123456789abcdef"})
    _, _, said = build(tmp_path, key={"q": 0.1, "flags": {"cap": 0.4}, "model": "fedcba9876543210"})
    assert said == ["score: computed again, because q: flags: cap (0.5 -> 0.4), model, q (0.05 -> 0.1) changed"]
