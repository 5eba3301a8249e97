"""`TeacherCache`: what a teacher says of each response, read from disk where the teacher does not fit beside the student.

A folder is a table (`leaf.tables`) with a row for each sequence, which says where its rows lie in one of the safetensors
files beside it, and their checksum. A sequence is found by the hash of its token ids, in whatever order, pack or run it
comes. `leaf.teacher_build` writes it.
"""

from __future__ import annotations

import array
import functools
import hashlib
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .objective import Head
from .tables import open_table

HEAD = b"head"  # the entry of the teacher's head, where sequences have their hash
INDEX = pa.schema(
    [
        *(("sequence", pa.binary()), ("file", pa.string())),
        *((name, pa.int64()) for name in ("first", "rows", "response_start", "crc32")),
        *((name, pa.float64()) for name in ("covered_mean", "covered_min")),  # of a top-k cache
    ]
)
Tensors = Mapping[str, torch.Tensor]


class NotCached(LookupError, ValueError):
    """A sequence, or some of its rows, that no build of the cache was asked for."""


class Entry(NamedTuple):
    """Where the rows of a sequence are, and of which of its tokens."""

    file: str
    first: int
    rows: int  # 0: the tensors as they are, for the head
    response_start: int
    crc32: int


def entries(index: pa.Table) -> Iterator[tuple[bytes, Entry]]:
    """The rows of an index, as (sequence, entry)."""
    columns = (index[name].to_pylist() for name in ("sequence", *Entry._fields))
    return ((sequence, Entry(*place)) for sequence, *place in zip(*columns))


def sequence_key(input_ids: Sequence[int] | torch.Tensor) -> bytes:
    """SHA-256 of the token ids as little-endian int32."""
    ids = array.array("i", input_ids.tolist() if isinstance(input_ids, torch.Tensor) else input_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return hashlib.sha256(ids.tobytes()).digest()


def checksum(tensors: Tensors) -> int:
    """CRC-32 of contents, names, dtypes and row shapes."""
    total = 0
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape[1:])}".encode(), total)
        total = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), total)  # type: ignore[arg-type]
    return total


class TeacherCache:
    """What a teacher says of each response, from a folder that `leaf cache` wrote; the `teacher` of a `LeafTrainer`.

    Only reads. Files are mapped into memory when they are first needed, in each process by itself, and every entry is held
    against its checksum whenever it is read. Threads can share it; pickled, it opens its files again.

    Attributes:
        kind: "hidden" (the teacher's last hidden states) or "topk" (its K most probable tokens).
        temperature: of the log-probabilities of a top-k cache, else None.

    Raises:
        ValueError: the folder holds no cache, an unfinished one, or its table is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        table = open_table(folder)
        self.folder, self.key = table.path, table.manifest["key"]
        if "kind" not in self.key:
            raise ValueError(f"{folder} is the table of another stage, not a teacher cache: give the folder `cache`")
        self.kind: str = self.key["kind"]
        self.temperature: float | None = self.key.get("temperature")
        self._entries = dict(entries(table.arrow()))
        self._mapped: dict[str, Tensors] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "head"} | {"_mapped": {}}

    def __len__(self) -> int:
        """Sequences."""
        return len(self._entries) - (HEAD in self._entries)

    @property
    def says(self) -> str:
        """What is kept, in words."""
        return "last hidden states" if self.kind == "hidden" else f"the {self.key['k']} most probable tokens"

    @functools.cached_property
    def head(self) -> Head | None:
        """The teacher's head, for "hidden": weight [V', Dt] in its own dtype, on the CPU. None for "topk"."""
        if self.kind != "hidden":
            return None
        tensors = self._read(self._entries[HEAD])
        softcap = tensors["softcap"].item() if "softcap" in tensors else None
        return Head(tensors["weight"], tensors.get("bias"), softcap, tensors["logit_scale"].item())

    @property
    def vocab_size(self) -> int:
        """Columns of the teacher's head; for "topk" those that its softmax was over."""
        return self.key["vocab_size"] if self.head is None else len(self.head.weight)

    def read(self, input_ids: Sequence[int] | torch.Tensor, response_start: int) -> dict[str, torch.Tensor]:
        """What the teacher says at the rows response_start − 1 … len − 2, which predict the response.

        Returns:
            {"teacher_hidden": [R, Dt] in the teacher's dtype}, or {"topk_ids": [R, K] int64, "topk_logprobs": [R, K] fp32},
            the most probable first; R = len(input_ids) − response_start.

        Raises:
            NotCached: the cache was built for other sequences, or for less of this response.
            ValueError: `response_start` leaves no row, or the file is missing or damaged.
        """
        entry = self._entry(input_ids, response_start)
        skipped = response_start - entry.response_start
        tensors = {name: tensor[skipped:] for name, tensor in self._read(entry).items()}
        if self.kind == "hidden":
            return {"teacher_hidden": tensors["hidden"].clone()}
        return {"topk_ids": tensors["ids"].to(torch.int64), "topk_logprobs": tensors["logprobs"].clone()}

    def check(self, groups: Iterable[dict[str, Any]]) -> None:
        """Raises NotCached where `read` would, for any sequence of groups; reads nothing but the index."""
        for group in groups:
            for member in filter(None, (group["original"], *group["counterfactuals"])):
                self._entry(member["input_ids"], member["response_start"])

    def empty(self) -> dict[str, torch.Tensor]:
        """What `read` returns, of no row."""
        if self.head is not None:
            return {"teacher_hidden": self.head.weight.new_empty(0, self.head.weight.shape[1])}
        ids = torch.empty(0, self.key["k"], dtype=torch.int64)
        return {"topk_ids": ids, "topk_logprobs": ids.float()}

    def _entry(self, input_ids: Sequence[int] | torch.Tensor, response_start: int) -> Entry:
        if not 0 < response_start < len(input_ids):
            raise ValueError(f"response_start must lie in [1, {len(input_ids)}), got {response_start}")
        entry = self._entries.get(sequence_key(input_ids))
        if entry is None:
            raise NotCached(
                f"{self.folder} holds nothing for a sequence of {len(input_ids)} tokens: it was built for other rows; run "
                f"`leaf cache --output {self.folder.parent}` with the options of this run"
            )
        if response_start < entry.response_start:
            raise NotCached(
                f"{self.folder} holds the response of this sequence from token {entry.response_start} on, not from "
                f"{response_start}: run `leaf cache --output {self.folder.parent}` with the options of this run"
            )
        return entry

    def _read(self, entry: Entry) -> Tensors:
        """Mapped, and checked: all rows of an entry, or the head."""
        try:
            tensors = rows_of(self._file(entry.file), entry)
            good = checksum(tensors) == entry.crc32
        except (OSError, SafetensorError):
            good = False
        if not good:
            raise ValueError(
                f"{self.folder / entry.file} is damaged or missing: run `leaf cache --output {self.folder.parent}` again, "
                "which checks all files and computes this one anew"
            )
        return tensors

    def _file(self, name: str) -> Tensors:
        if name not in self._mapped:
            self._mapped[name] = load_file(self.folder / name)
        return self._mapped[name]


def rows_of(tensors: Tensors, entry: Entry) -> Tensors:
    """An entry's share of the tensors of its file."""
    if not entry.rows:
        return tensors
    return {name: tensor[entry.first : entry.first + entry.rows] for name, tensor in tensors.items()}
