"""Tables: reuse, resume, what changed, and damage that is seen."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pytest
import tiny

from leaf import tables
from leaf.tables import Table, current_table, model_key, open_table, write_table

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
    assert table is not None
    return table, calls, said


def parts(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted((folder / "score").glob("part-*.parquet"))


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
    assert len(parts(tmp_path)) == 1, "the old table's shards are gone"
    assert current_table(tmp_path / "score", {"q": (2, 3)})
    assert not current_table(tmp_path / "score", {"q": 1})


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
    shard = parts(tmp_path)[1]
    content = shard.read_bytes()
    if damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(content[:-10] if damage == "cut" else content[:20] + bytes([content[20] ^ 1]) + content[21:])
    assert not current_table(tmp_path / "score", {"q": 1})
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged"):
        open_table(tmp_path / "score")
    mended, calls, said = build(tmp_path)
    assert calls == [3, 4, 5, 6, 7]
    assert said == [f"score: {shard.name} is damaged, computed again", "score: resumed after 1 of 3 shards"]
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


def test_a_run_that_is_killed_has_not_touched_the_table_before_it(tmp_path: pathlib.Path) -> None:
    first, *_ = build(tmp_path)
    with pytest.raises(Killed):
        build(tmp_path, key=2, die_at=5)
    with pytest.raises(ValueError, match="unfinished"):  # it must not pass for the result of the newer run
        open_table(tmp_path / "score")
    again, calls, said = build(tmp_path)
    assert (calls, said, again.rows()) == ([], ["score: unchanged"], first.rows())
    assert open_table(tmp_path / "score").rows() == first.rows(), "what was asked for last is the table"


# -- shards of equal work, several processes ---------------------------------------------------------------------------

SIZES = [5, 1, 1, 1, 9, 2, 2, 2]


def share(folder: pathlib.Path, rank: int, ranks: int, die_at: int | None = None) -> tuple[Table | None, list[int]]:
    calls: list[int] = []
    table = write_table(
        folder / "score", {"q": 1}, SCHEMA, range(8), produce(calls, die_at), print, sizes=SIZES, rank=rank, ranks=ranks
    )
    return table, calls


@pytest.fixture
def three_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SHARDS", 3)  # of a third of the 23, at least: 0-3, 4, 5-7


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_write_what_one_process_writes(tmp_path: pathlib.Path, ranks: int, three_shards: None) -> None:
    whole, calls = share(tmp_path / "one", 0, 1)
    assert whole is not None
    assert calls == list(range(8))
    assert len(parts(tmp_path / "one")) == 3
    done = []
    for rank in reversed(range(ranks)):
        table, calls = share(tmp_path / "many", rank, ranks)
        assert (table is None) == (rank > 0)
        done += calls
    assert sorted(done) == list(range(8)), "no unit is computed twice"
    assert table is not None
    assert (table.fingerprint, table.counts) == (whole.fingerprint, whole.counts)
    if ranks == 2:
        assert done == [0, 1, 2, 3, 5, 6, 7, 4] or done == [5, 6, 7, 0, 1, 2, 3, 4], "9 against 8 + 6"


def test_what_ranks_leave_behind_is_finished_by_any_other_number_of_them(
    tmp_path: pathlib.Path, three_shards: None
) -> None:
    whole, _ = share(tmp_path / "one", 0, 1)
    with pytest.raises(Killed):
        share(tmp_path / "many", 1, 2, die_at=6)  # has written the first shard of its two
    table, calls = share(tmp_path / "many", 0, 1)
    assert calls == [4, 5, 6, 7]
    assert table is not None
    assert whole is not None
    assert table.fingerprint == whole.fingerprint


@pytest.mark.parametrize("in_step", [False, True])
def test_a_rank_in_step_produces_to_the_end_also_without_units(
    tmp_path: pathlib.Path, three_shards: None, in_step: bool
) -> None:
    went: list[str] = []

    def stepping(units: Sequence[int]) -> Iterator[Any]:
        went.append("started")
        yield from produce([])(units)
        went.append("ended")

    def write(rank: int) -> None:
        options = {"sizes": SIZES, "rank": rank, "ranks": 5, "in_step": in_step}
        write_table(tmp_path / "score", {"q": 1}, SCHEMA, range(8), stepping, print, **options)  # type: ignore[arg-type]

    for rank, units in ((4, 0), (2, 3), (1, 3), (0, 4)):
        write(rank)
        assert went == (["started", "ended"] if in_step else ["started"] if units else [])
        went.clear()
    write(0)
    assert went == [], "the table is finished"


def test_units_of_other_sizes_are_other_units(tmp_path: pathlib.Path, three_shards: None) -> None:
    """A killed run that goes on with another budget of packs: shards have the same bounds, not the same content."""
    with pytest.raises(Killed):
        share(tmp_path, 0, 1, die_at=4)
    assert len(parts(tmp_path)) == 1
    calls: list[int] = []
    write_table(tmp_path / "score", {"q": 1}, SCHEMA, range(8), produce(calls), print, sizes=[4, 2, *SIZES[2:]])
    assert tables._cut(8, [4, 2, *SIZES[2:]]) == tables._cut(8, SIZES)
    assert calls == list(range(8))


def test_a_shard_that_was_altered_before_its_table_was_finished_is_computed_again(
    tmp_path: pathlib.Path, three_shards: None
) -> None:
    whole, _ = share(tmp_path / "one", 0, 1)
    share(tmp_path / "many", 1, 2)
    for part, damage in zip(
        parts(tmp_path / "many"), (lambda c: c[:-9], lambda c: c[:30] + bytes([c[30] ^ 255]) + c[31:])
    ):
        part.write_bytes(damage(part.read_bytes()))
    table, calls = share(tmp_path / "many", 0, 1)
    assert calls == list(range(8))
    assert table is not None
    assert whole is not None
    assert table.fingerprint == whole.fingerprint


def test_rank_0_waits_for_a_shard_that_is_whole(tmp_path: pathlib.Path, three_shards: None) -> None:
    """What another rank left damaged is computed again by that rank, and not taken for good meanwhile."""
    whole, _ = share(tmp_path / "one", 0, 1)
    share(tmp_path / "many", 1, 2)
    part = parts(tmp_path / "many")[0]
    part.write_bytes(part.read_bytes()[:-9])
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(share, tmp_path / "many", 0, 2)
        with pytest.raises(concurrent.futures.TimeoutError):
            first.result(timeout=2)
        share(tmp_path / "many", 1, 2)
        table, _ = first.result(timeout=20)
    assert table is not None
    assert whole is not None
    assert table.fingerprint == whole.fingerprint


def test_a_manifest_that_cannot_be_read_is_none(tmp_path: pathlib.Path) -> None:
    first, *_ = build(tmp_path)
    (tmp_path / "score" / "manifest.json").write_text('{"key": ')
    with pytest.raises(ValueError, match="unfinished: run `leaf score` again"):
        open_table(tmp_path / "score")
    again, calls, _ = build(tmp_path)
    assert calls == []
    assert again.rows() == first.rows()


def test_sizes_make_enough_shards_to_be_dealt_out() -> None:
    sizes = [1] * 1000
    shards = tables._cut(1000, sizes)
    assert [s.start for s in shards[1:]] == [s.stop for s in shards[:-1]]
    assert (shards[0].start, shards[-1].stop) == (
        0,
        1000,
    )
    assert len(shards) == tables.SHARDS
    assert len(tables._cut(70, [3] * 70)) == tables.SHARDS
    assert len(tables._cut(1000, [tables.SHARD_SIZE // 2] * 1000)) == 500
    assert tables._cut(0, []) == [slice(0, 0)]


def test_what_changed_is_readable(tmp_path: pathlib.Path) -> None:
    build(tmp_path, key={"q": 0.05, "flags": {"cap": 0.5}, "model": "0123456789abcdef"})
    _, _, said = build(tmp_path, key={"q": 0.1, "flags": {"cap": 0.4}, "model": "fedcba9876543210"})
    assert said == ["score: computed again, because q: flags: cap (0.5 -> 0.4), model, q (0.05 -> 0.1) changed"]
