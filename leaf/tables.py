"""A stage's table: Parquet shards and manifest.json in one folder, reusable, resumable and checked.

The manifest is written last and names every shard with its checksum, so a shard that is cut off or altered is never read as
good. Each file appears under its name only when it is complete, and the name tells what the table is made from: a table that
is computed again does not touch the one before until it is finished, and several processes can write one table.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import os
import pathlib
import re
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from leaf_kernels import deal

from .config import asked_of_the_hub

MANIFEST = "manifest.json"
SHARD_UNITS = 256  # what a killed stage loses at most
# The same where units have sizes. A smaller table is cut into so many shards that it can still be dealt out.
SHARD_SIZE, SHARDS = 2**17, 64
_FACTS = b"leaf"  # what a shard says of itself, in its Parquet metadata
_SAMPLES, _SAMPLE_BYTES = 16, 4096

Row = dict[str, Any]
Unit = TypeVar("Unit")


@dataclass(frozen=True)
class Table:
    """A finished table. `counts` are summed over the shards; `fingerprint` names the content."""

    path: pathlib.Path
    manifest: Mapping[str, Any]

    @property
    def counts(self) -> dict[str, int]:
        return _counts(self.manifest)

    @property
    def fingerprint(self) -> str:
        return digest([shard["sha256"] for shard in self.manifest["shards"]])

    def arrow(self, columns: list[str] | None = None) -> pa.Table:
        return pa.concat_tables(list(self._shards(columns)))

    def pandas(self) -> Any:
        return self.arrow().to_pandas()

    def rows(self) -> list[Row]:
        return list(self)

    def __iter__(self) -> Iterator[Row]:
        for shard in self._shards():
            yield from shard.to_pylist()

    def __len__(self) -> int:
        return sum(shard["rows"] for shard in self.manifest["shards"])

    def _shards(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        for shard in self.manifest["shards"]:
            yield pq.read_table(self.path / shard["file"], columns=columns)


def open_table(path: str | os.PathLike[str]) -> Table:
    """The finished table in `path`.

    Raises:
        ValueError: there is none, it is unfinished, or a shard differs from what was written.
    """
    folder = pathlib.Path(path)
    manifest = _read_manifest(folder)
    command = f"run `leaf {folder.name.partition('-')[0]}`"  # the stage of score-teacher is score
    finished = {shard["file"] for shard in manifest["shards"]} if manifest else set()
    if {path.name for path in folder.glob("part-*.parquet")} - finished:
        raise ValueError(f"{folder} is unfinished: {command} again, it goes on where it stopped")
    if manifest is None:
        raise ValueError(f"{folder} holds no table: {command} first")
    for shard in manifest["shards"]:
        if not _is_good(folder, shard):
            raise ValueError(f"{folder / shard['file']} is damaged: {command} again")
    return Table(folder, manifest)


def current_table(path: str | os.PathLike[str], key: Mapping[str, Any]) -> Table | None:
    """The finished, undamaged table in `path` if it was made with `key`."""
    folder = pathlib.Path(path)
    manifest = _read_manifest(folder)
    if manifest and manifest["key"] == _plain(key) and all(_is_good(folder, shard) for shard in manifest["shards"]):
        return Table(folder, manifest)
    return None


def write_table(
    path: str | os.PathLike[str],
    key: Mapping[str, Any],
    schema: pa.Schema,
    units: Sequence[Unit],
    produce: Callable[[Sequence[Unit]], Iterable[tuple[list[Row], Mapping[str, int]]]],
    log: Callable[[str], None],
    *,
    sizes: Sequence[int] | None = None,
    rank: int = 0,
    ranks: int = 1,
    in_step: bool = False,
) -> Table | None:
    """The table of `units` under `key`, computing only what is missing.

    A finished table with an equal key is returned as it is; an unfinished one goes on with the shards that are missing; with
    another key everything is computed again. `log` is told which of these it was, and which entries of the key changed.

    Args:
        key: whatever the content depends on, JSON-serialisable.
        produce: called with units that are missing; yields, for each in order, its rows and its counts. Without `sizes` the
            missing units are all from some unit on; with `sizes` they can be any, and `produce` must not depend on which.
        sizes: how much work each unit is. Shards are then of equal work instead of equal length.
        rank, ranks: with `sizes`, the shards are dealt out to so many processes, all of which call this. Rank 0 waits for
            the others' shards and finishes the table; the others return None when theirs are written.
        in_step: `produce` works in step with the other ranks: unless the table is finished, it is called whether or not
            units are missing here, and it is run to its end.
    """
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _cut(len(units), sizes)
    bounds = [(shard.start, shard.stop) for shard in shards]
    tag = digest({"key": _plain(key), "shards": bounds, "sizes": sizes})[:8]  # units of other sizes are other units
    files = [folder / f"part-{n:05d}-{tag}.parquet" for n in range(len(shards))]
    old, damaged = _read_manifest(folder), set[str]()
    if old and old["key"] != _plain(key):
        log(f"{folder.name}: computed again, because {_changed(old['key'], _plain(key))} changed")
    elif old:
        damaged = {shard["file"] for shard in old["shards"] if not _is_good(folder, shard)}
        if not damaged:
            log(f"{folder.name}: unchanged")
            if rank == 0:
                _remove_others(folder, old)
            return Table(folder, old)
        log(f"{folder.name}: {min(damaged)} is damaged, computed again")

    missing = [n for n, file in enumerate(files) if file.name in damaged or not _is_whole(file)]
    if sizes is None:
        missing = list(range(missing[0], len(files))) if missing else []
        mine = missing
    else:
        # All shards are dealt out, not those that are missing: by now another process may have written one of its own.
        dealt = deal([sum(sizes[shard]) for shard in shards], ranks)
        mine = [n for n in missing if dealt[n] == rank]
    for n in mine:  # nobody else may: by now they may have written theirs anew
        files[n].unlink(missing_ok=True)
    if len(missing) < len(files):
        log(f"{folder.name}: resumed after {len(files) - len(missing)} of {len(files)} shards")
    todo = [unit for n in mine for unit in units[shards[n]]]
    produced = iter(produce(todo) if todo or in_step else ())
    for n in mine:
        rows: list[Row] = []
        counts: collections.Counter[str] = collections.Counter()
        for _ in units[shards[n]]:
            unit_rows, unit_counts = next(produced)
            rows += unit_rows
            counts.update(unit_counts)
        facts = {"units": shards[n].stop - shards[n].start, "rows": len(rows), "counts": dict(counts)}
        write_bytes(files[n], _parquet(rows, schema.with_metadata({_FACTS: json.dumps(facts)})))
    if in_step:
        collections.deque(produced, maxlen=0)
    if rank != 0:
        return None
    awaited = [file for n, file in enumerate(files) if n not in mine]

    def arrived() -> bool:
        while awaited and _is_whole(awaited[-1]):  # each is read to its end once
            awaited.pop()
        return not awaited

    wait_until(arrived, f"{folder.name}: waiting for the shards of the other processes", log)
    manifest: dict[str, Any] = {"key": _plain(key), "shards": [_facts(file) for file in files]}
    _write_manifest(folder, manifest | {"counts": _counts(manifest)})
    _remove_others(folder, manifest)
    return Table(folder, manifest)


def _remove_others(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Shards of the table before, or of one that was never finished: a folder holds one table."""
    for stale in {path.name for path in folder.glob("part-*")} - {shard["file"] for shard in manifest["shards"]}:
        (folder / stale).unlink(missing_ok=True)


def wait_until(done: Callable[[], bool], what: str, log: Callable[[str], None]) -> None:
    """Looks every second for what other processes write, and says so after a minute."""
    for second in itertools.count():
        if done():
            return
        if second == 60:
            log(what)
        time.sleep(1)


def _cut(units: int, sizes: Sequence[int] | None) -> list[slice]:
    """Shards of consecutive units; a table of no units has one, which holds its columns."""
    if sizes is None:
        ends = [*range(SHARD_UNITS, units, SHARD_UNITS), units]
    else:
        limit = min(max(sum(sizes), 1) / SHARDS, SHARD_SIZE)
        passed = [total // limit for total in itertools.accumulate(sizes, initial=0)]
        ends = [n for n in range(1, units) if passed[n] > passed[n - 1]] + [units]
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


def digest(value: Any) -> str:
    """Hash of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def model_key(name: str) -> str:
    """What identifies a model: the commit of a hub model; of a folder, a hash of config, tokenizer, sizes and samples.

    Of a weight file the hash covers the size, the header and 16 evenly spaced blocks of 4 KiB: enough to tell two
    trainings of one architecture apart without reading a 70B model from disk.
    """
    folder = pathlib.Path(name)
    if not folder.is_dir():
        from transformers import AutoConfig

        with asked_of_the_hub(name):
            return f"{name}@{AutoConfig.from_pretrained(name)._commit_hash}"
    total = hashlib.sha256()
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    texts = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt"))
    for path in (*texts, *weights):
        size = path.stat().st_size
        total.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if path in texts:
                total.update(file.read())
                continue
            if path.suffix == ".safetensors":
                length = file.read(8)
                total.update(length + file.read(min(size, *struct.unpack("<Q", length.ljust(8, b"\0")))))
            for block in range(_SAMPLES):
                file.seek(max(size - _SAMPLE_BYTES, 0) * block // (_SAMPLES - 1))
                total.update(file.read(_SAMPLE_BYTES))
    return total.hexdigest()[:16]


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file so that it is never seen half written."""
    write_bytes(pathlib.Path(path), text.encode())


def write_bytes(path: pathlib.Path, content: bytes | memoryview) -> None:
    """Write a file so that it is never seen half written. What could not be written leaves nothing behind."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # the disk is full: at least this does not take the place that others need
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


def _parquet(rows: list[Row], schema: pa.Schema) -> memoryview:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd", write_page_checksum=True)
    return memoryview(sink.getvalue())


def _is_whole(path: pathlib.Path) -> bool:
    """Whether a shard that no manifest vouches for yet can be read to its end."""
    try:
        pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        return False
    return True


def _facts(path: pathlib.Path) -> dict[str, Any]:
    """A shard's entry in the manifest."""
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"file": path.name, **json.loads(pq.read_schema(path).metadata[_FACTS]), "sha256": checksum}


def _read_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if {"key", "shards"} <= manifest.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):  # there is none, or none that vouches for anything
        return None


def _write_manifest(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def _is_good(folder: pathlib.Path, shard: Mapping[str, Any]) -> bool:
    """Whether a shard is as it was when its table was finished."""
    path = folder / shard["file"]
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]


def _counts(manifest: Mapping[str, Any]) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for shard in manifest["shards"]:
        total.update(shard["counts"])
    return dict(sorted(total.items()))


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(_change(name, old.get(name), new.get(name)) for name in names)


def _change(name: str, old: Any, new: Any) -> str:
    """What a reader can use of a changed entry: of a hash or of something long, that it changed."""
    if isinstance(old, dict) and isinstance(new, dict):
        return f"{name}: {_changed(old, new)}"
    texts = [json.dumps(value, ensure_ascii=False) for value in (old, new)]
    opaque = any(len(text) > 40 or re.fullmatch(r'"[0-9a-f]{16}"', text) for text in texts)
    return name if opaque else f"{name} ({' -> '.join(texts)})"


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(value, sort_keys=True))
