"""A stage's table: Parquet shards and manifest.json in one folder, reusable, resumable and checked.

The manifest names every finished shard with its checksum, so a shard that is half written, cut off or altered is never
read as good. Each file appears under its name only when it is complete.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import pathlib
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

MANIFEST = "manifest.json"
SHARD_UNITS = 256  # what a killed stage loses at most
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
    if manifest is None:
        raise ValueError(f"{folder} holds no table: run `leaf {folder.name}` first")
    if not manifest["complete"]:
        raise ValueError(f"{folder} is unfinished: run `leaf {folder.name}` again, it goes on where it stopped")
    good = _good_shards(folder, manifest)
    if good < len(manifest["shards"]):
        raise ValueError(f"{folder / manifest['shards'][good]['file']} is damaged: run `leaf {folder.name}` again")
    return Table(folder, manifest)


def is_current(path: str | os.PathLike[str], key: Mapping[str, Any]) -> bool:
    """Whether `path` holds a finished, undamaged table made with `key`."""
    folder = pathlib.Path(path)
    manifest = _read_manifest(folder)
    return bool(
        manifest
        and manifest["complete"]
        and manifest["key"] == _plain(key)
        and _good_shards(folder, manifest) == len(manifest["shards"])
    )


def write_table(
    path: str | os.PathLike[str],
    key: Mapping[str, Any],
    schema: pa.Schema,
    units: Sequence[Unit],
    produce: Callable[[Sequence[Unit]], Iterable[tuple[list[Row], Mapping[str, int]]]],
    log: Callable[[str], None],
) -> Table:
    """The table of `units` under `key`, computing only what is missing.

    A finished table with an equal key is returned as it is; an unfinished one goes on after its last whole shard; with
    another key everything is computed again. `log` is told which of these it was, and which entries of the key changed.

    Args:
        key: whatever the content depends on, JSON-serialisable.
        produce: called once with the units that are missing; yields, for each in order, its rows and its counts.
    """
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"key": _plain(key), "complete": False, "counts": {}, "shards": []}
    old = _read_manifest(folder)
    if old and old["key"] != manifest["key"]:
        log(f"{folder.name}: computed again, because {_changed(old['key'], manifest['key'])} changed")
    elif old:
        shards = old["shards"][: _good_shards(folder, old)]
        if len(shards) < len(old["shards"]):
            log(f"{folder.name}: {old['shards'][len(shards)]['file']} is damaged, computed again from there")
        elif old["complete"]:
            log(f"{folder.name}: unchanged")
            return Table(folder, old)
        elif shards:
            log(f"{folder.name}: resumed after {len(shards)} of {-(-len(units) // SHARD_UNITS)} shards")
        manifest["shards"] = shards
    # The old manifest stays until the first new shard is whole: a run that fails before that has lost nothing.

    rows: list[Row] = []
    counts: collections.Counter[str] = collections.Counter()
    shard_units = 0

    def close_shard() -> None:
        nonlocal shard_units
        file = f"part-{len(manifest['shards']):05d}.parquet"
        checksum = _write_atomically(folder / file, _parquet(rows, schema))
        facts = {"units": shard_units, "rows": len(rows), "sha256": checksum, "counts": dict(counts)}
        manifest["shards"].append({"file": file, **facts})
        _write_manifest(folder, manifest)
        rows.clear()
        counts.clear()
        shard_units = 0

    todo = units[sum(shard["units"] for shard in manifest["shards"]) :]
    for unit_rows, unit_counts in produce(todo) if todo else ():
        rows += unit_rows
        counts.update(unit_counts)
        shard_units += 1
        if shard_units == SHARD_UNITS:
            close_shard()
    if shard_units or not manifest["shards"]:  # a table of no units still has its columns
        close_shard()
    manifest |= {"complete": True, "counts": _counts(manifest)}
    _write_manifest(folder, manifest)
    for stale in {p.name for p in folder.glob("part-*")} - {shard["file"] for shard in manifest["shards"]}:
        (folder / stale).unlink()
    return Table(folder, manifest)


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
    _write_atomically(pathlib.Path(path), text.encode())


def _write_atomically(path: pathlib.Path, content: bytes | memoryview) -> str:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return hashlib.sha256(content).hexdigest()


def _parquet(rows: list[Row], schema: pa.Schema) -> memoryview:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
    return memoryview(sink.getvalue())


def _read_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _write_manifest(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def _good_shards(folder: pathlib.Path, manifest: Mapping[str, Any]) -> int:
    """How many shards, from the first, are as they were written."""
    for n, shard in enumerate(manifest["shards"]):
        path = folder / shard["file"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != shard["sha256"]:
            return n
    return len(manifest["shards"])


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
