"""Building a teacher cache: one forward of the teacher over the packs of all originals and counterfactuals."""

from __future__ import annotations

import collections
import errno
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from leaf_kernels import SharedPrefixLayout, pack_groups
from leaf_kernels.integrations.transformers import NAME, check_model, register

from . import __version__
from .config import CACHED
from .generate import free_memory, is_out_of_memory
from .objective import Head, check_head, head_of, hidden_states
from .pack import Group, build_groups
from .run import Produced, Run
from .tables import SHARDS, Table, current_table, digest, model_key, open_table, write_bytes
from .teacher import HEAD, INDEX, Entry, Tensors, checksum, entries, rows_of, sequence_key

FILE_BYTES = 2**28  # of a file: what is held in memory before it is written
LOGITS = 2**26  # held at one time
COLUMNS = 2**14  # of the head that are cast at one time
MARGIN = 2**26  # bytes that the disk keeps


class Member(NamedTuple):
    """A sequence, and the first token of what is stored of it."""

    key: bytes
    input_ids: list[int]
    response_start: int

    @property
    def rows(self) -> int:
        return len(self.input_ids) - self.response_start


Pack = list[list[Member]]  # groups


class Unit(NamedTuple):
    """What one file holds: the rows of some packs, or the head."""

    file: str
    packs: list[Pack]
    bytes: int

    @property
    def members(self) -> list[Member]:
        return [member for pack in self.packs for group in pack for member in group]

    @property
    def tokens(self) -> int:
        return sum(len(member.input_ids) for member in self.members)


def cache(run: Run) -> Table | None:
    """The stage: what the teacher says of all that `distill` trains on. Nothing, where the teacher itself is there."""
    if run.config.teacher_mode not in CACHED:
        return None
    scores, counterfactuals = open_table(run.folder / "score"), open_table(run.folder / "verify")
    encode = run.encoder.encode_text
    return build_cache(run, build_groups(scores, counterfactuals, encode, originals=run.config.originals))


def build_cache(run: Run, groups: Sequence[Group]) -> Table:
    """What the teacher says of the responses of `groups`, in `cache/` of the run directory, as `--teacher-mode` asks for.

    Computes only what is missing; files of the build that are damaged are computed again. All ranks call this and share the
    work. The cache before is kept until this one is finished.

    Raises:
        ValueError: the disk has no room for it, there are no groups, teacher and student have different tokenizers, or K is
            larger than what their vocabularies share.
        OSError: the disk was full after all; what is written stays.
    """
    config, folder, name = run.config, run.folder / "cache", run.name("teacher")
    members = distinct(groups)
    if not members:
        raise ValueError(
            "there is nothing to train on, so nothing to cache: give --originals all, or verify less strictly"
        )
    sequences = sorted((m.key.hex(), m.response_start) for group in members for m in group)
    key = {"leaf": __version__, **teacher_key(run), "sequences": digest(sequences)}
    units = units_of(members, config.max_tokens, bytes_per_row(run)[key["kind"]], digest(key))
    if key["kind"] == "hidden":
        units = [Unit(f"{digest(key)}-head.safetensors", [], _head_bytes(run)), *units]
    folder.mkdir(parents=True, exist_ok=True)
    _forget_damaged(run, folder, digest(key))
    if run.is_writer and current_table(folder, {**key, "columns": INDEX.names}) is None:
        _check_room(run, folder, units)
    if run.ranks > 1:
        run.most(0)  # until all have looked: nobody must miss what another one has removed

    def produce(todo: Sequence[Unit]) -> Produced:
        in_step = config.shard_teacher
        packs = sum(len(unit.packs) for unit in todo)
        wanted, steps = (run.most(len(todo)), run.most(packs)) if in_step else (len(todo), packs)
        if not wanted:
            return
        teacher = Teacher(run.load(name, shard=in_step), key, in_step=in_step)
        for unit in todo:
            if unit.packs:
                yield _write_rows(folder / unit.file, [said for pack in unit.packs for said in teacher(pack)])
            else:
                yield _write_head(folder / unit.file, teacher.head)
        for _ in range(steps - packs):  # the ranks with more packs gather their layers from this one too
            teacher([[Member(b"", [0, 0], 1)]])

    shared_out: dict[str, Any] = {"tokens": lambda unit: unit.tokens, "in_step": config.shard_teacher}
    try:
        table = run.table("cache", key, INDEX, units, produce, **shared_out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"the disk is full and the cache in {folder} is not finished; what is written stays: make room and run `leaf "
            f"cache` again, which goes on, or give {_smaller(run, units)}"
        ) from error
    if run.is_writer:
        kept = set(table.arrow(["file"])["file"].to_pylist())
        for stale in {path.name for path in folder.glob("*.safetensors*")} - kept:
            (folder / stale).unlink()
        if key["kind"] == "topk":
            run.ui.say(_covered(table, key))
    return table


def teacher_key(run: Run) -> dict[str, Any]:
    """What the cache depends on, but for its sequences."""
    config, name, shared = run.config, run.name("teacher"), run.shared_vocabulary()
    key: dict[str, Any] = {"kind": CACHED[config.teacher_mode], "teacher": model_key(name), "dtype": run.dtype}
    key["quantization"] = run.quantization(name)
    if key["kind"] == "hidden":
        return key
    if config.cache_topk > shared:
        raise ValueError(f"cache_topk must be at most {shared}, the vocabulary of both models, got {config.cache_topk}")
    return key | {"k": config.cache_topk, "temperature": config.temperature, "vocab_size": shared}


def distinct(groups: Sequence[Group]) -> list[list[Member]]:
    """The sequences of groups, each once, with the smallest response_start that it has anywhere."""
    named: list[list[tuple[bytes, list[int]]]] = []
    starts: dict[bytes, int] = {}
    for group in groups:
        named.append([])
        for member in filter(None, (group["original"], *group["counterfactuals"])):
            ids, start = list(member["input_ids"]), member["response_start"]
            if not 0 < start < len(ids):
                raise ValueError(f"response_start must lie in [1, {len(ids)}) so that a target follows, got {start}")
            key = sequence_key(ids)
            if key not in starts:
                named[-1].append((key, ids))
            starts[key] = min(start, starts.get(key, start))
    return [[Member(key, ids, starts[key]) for key, ids in group] for group in named if group]


def units_of(members: Sequence[list[Member]], max_tokens: int, width: int, key: str) -> list[Unit]:
    """Files of at most `FILE_BYTES`, but for larger packs, and enough of them to be dealt out.

    Each is named by `key` and by what it holds: a cache of another teacher beside it is not touched.
    """
    packs = [
        [members[g] for g in pack] for pack in pack_groups([[m.input_ids for m in g] for g in members], max_tokens)
    ]
    sizes = [width * sum(member.rows for group in pack for member in group) for pack in packs]
    limit = min(sum(sizes) / SHARDS, FILE_BYTES)
    cut: list[tuple[list[Pack], int]] = []
    for pack, size in zip(packs, sizes):
        if cut and cut[-1][1] + size <= limit:
            cut[-1] = (cut[-1][0] + [pack], cut[-1][1] + size)
        else:
            cut.append(([pack], size))
    named = [Unit("", some, size) for some, size in cut]
    held = (digest([member.key.hex() for member in unit.members]) for unit in named)
    return [unit._replace(file=f"{key}-{each}.safetensors") for unit, each in zip(named, held)]


# -- what the teacher says ---------------------------------------------------------------------------------------------


class Teacher:
    """The forward of a pack, and what is stored of it.

    in_step: the ranks hold a share of each layer and call this equally often: a pack that does not fit is not cut.
    """

    def __init__(self, model: PreTrainedModel, key: Mapping[str, Any], *, in_step: bool = False):
        register()
        check_model(model)
        model.set_attn_implementation(NAME)
        model.requires_grad_(False).eval()
        check_head(model)
        self.model, self.head, self.key, self.in_step = model, head_of(model), key, in_step

    def __call__(self, pack: Pack) -> list[tuple[Member, Tensors]]:
        """What is stored of each sequence, in order. A pack that does not fit into memory is halved."""
        try:
            return self._said(pack)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        free_memory()
        halves = [pack[: len(pack) // 2], pack[len(pack) // 2 :]]
        if len(pack) == 1:
            halves = [[pack[0][: len(pack[0]) // 2]], [pack[0][len(pack[0]) // 2 :]]]
        if self.in_step or not halves[0] or not halves[0][0]:
            tokens = sum(len(member.input_ids) for group in pack for member in group)
            raise MemoryError(
                f"sequences of {tokens} tokens do not fit into memory beside the teacher: give a smaller --max-tokens, a "
                "smaller --max-length where a single row is that long, or --device-map auto"
            )
        return self(halves[0]) + self(halves[1])

    @torch.no_grad()
    def _said(self, pack: Pack) -> list[tuple[Member, Tensors]]:
        layout, input_ids = SharedPrefixLayout.from_groups([[m.input_ids for m in group] for group in pack])
        embeddings: Any = self.model.get_input_embeddings()
        near = embeddings.weight.device
        members = [member for group in pack for member in group]
        rows = torch.cat([layout.member_rows(n)[m.response_start - 1 : -1] for n, m in enumerate(members)])
        layout = layout.to(near)
        inputs = {"input_ids": input_ids.to(near)[None], "position_ids": layout.position_ids[None], "layout": layout}
        hidden = hidden_states(self.model, inputs)
        hidden = hidden.index_select(0, rows.to(hidden.device))
        if not hidden.isfinite().all():
            raise ArithmeticError(
                f"the teacher's hidden states are infinite or NaN in {self.key['dtype']}: give another --dtype (bfloat16)"
            )
        if self.key["kind"] == "hidden":
            stored = {"hidden": hidden.cpu()}
        else:
            stored = topk(hidden, self.head, self.key["k"], self.key["vocab_size"], self.key["temperature"])
        counts = [member.rows for member in members]
        parts = {name: tensor.split(counts) for name, tensor in stored.items()}
        return [(member, {name: each[n] for name, each in parts.items()}) for n, member in enumerate(members)]


def topk(hidden: torch.Tensor, head: Head, k: int, vocab_size: int, temperature: float) -> dict[str, torch.Tensor]:
    """The k most probable tokens of each row of hidden [R, Dt], the most probable first.

    Returns:
        ids: [R, k] int32. logprobs: [R, k] fp32, log-softmax of the logits / temperature over the first `vocab_size` tokens.
        Both on the CPU.

    Logits are computed in fp32 (fp64 for fp64) whatever the teacher's dtype, for `LOGITS` of them at a time.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    hidden = hidden.to(head.weight.device)
    found = []
    for rows in hidden.split(max(LOGITS // vocab_size, 1)):
        logits = rows.new_empty(len(rows), vocab_size, dtype=dtype)
        for start in range(0, vocab_size, COLUMNS):
            columns = slice(start, min(start + COLUMNS, vocab_size))
            bias = None if head.bias is None else head.bias[columns].to(dtype)
            logits[:, columns] = torch.nn.functional.linear(rows.to(dtype), head.weight[columns].to(dtype), bias)
        logits *= head.logit_scale
        if head.softcap is not None:
            logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
        logits /= temperature
        best = logits.topk(k)
        found.append((best.indices.int().cpu(), (best.values - logits.logsumexp(1, keepdim=True)).float().cpu()))
    ids, logprobs = (torch.cat(each) for each in zip(*found))
    return {"ids": ids, "logprobs": logprobs}


# -- on disk -----------------------------------------------------------------------------------------------------------

Written = tuple[list[dict[str, Any]], dict[str, int]]  # rows of the index, and counts


def _write_rows(path: pathlib.Path, said: Sequence[tuple[Member, Tensors]]) -> Written:
    index, first = [], 0
    for member, tensors in said:
        place = {"first": first, "rows": member.rows, "response_start": member.response_start}
        row = {"sequence": member.key, "file": path.name, **place, "crc32": checksum(tensors)}
        if "logprobs" in tensors:
            covered = tensors["logprobs"].double().exp().sum(1)
            row |= {"covered_mean": covered.mean().item(), "covered_min": covered.min().item()}
        index.append(row)
        first += member.rows
    whole = {name: torch.cat([tensors[name] for _, tensors in said]) for name in said[0][1]}
    write_bytes(path, save(whole))
    return index, {"sequences": len(said), "rows": first, "bytes": sum(t.nbytes for t in whole.values())}


def _write_head(path: pathlib.Path, head: Head) -> Written:
    """All of it as tensors, so that the checksum covers it."""
    tensors = {
        "weight": head.weight,
        "bias": head.bias,
        "logit_scale": torch.tensor([head.logit_scale], dtype=torch.float64),
    }
    if head.softcap is not None:
        tensors["softcap"] = torch.tensor([head.softcap], dtype=torch.float64)
    stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None}
    write_bytes(path, save(stored))
    place = {"first": 0, "rows": 0, "response_start": 0}
    return [{"sequence": HEAD, "file": path.name, **place, "crc32": checksum(stored)}], {}


def _forget_damaged(run: Run, folder: pathlib.Path, key: str) -> None:
    """Removes the index of what is no longer as it was written: the table computes it again. Ranks share the looking."""
    shards = sorted(folder.glob("part-*.parquet"))
    mine = [shard for shard in shards if int(shard.name.split("-")[1]) % run.ranks == run.rank]
    for shard in run.ui.track(mine, len(mine), "cache: checking") if mine else ():
        files = collections.defaultdict(list)
        try:
            for _, entry in entries(pq.read_table(shard, page_checksum_verification=True)):
                files[entry.file].append(entry)
        except (OSError, pa.ArrowException):  # `write_table` sees this by itself
            continue
        for name, index in files.items():
            if name.startswith(key) and not _is_good(folder / name, index):
                run.ui.say(f"cache: {name} is damaged or missing, computed again")
                shard.unlink(missing_ok=True)
                (folder / name).unlink(missing_ok=True)


def _is_good(path: pathlib.Path, index: Sequence[Entry]) -> bool:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return False
    return all(checksum(rows_of(tensors, entry)) == entry.crc32 for entry in index)


def bytes_per_row(run: Run) -> dict[str, int]:
    """What a response token takes on disk, by the kind of the cache."""
    return widths(AutoConfig.from_pretrained(run.name("teacher")), getattr(torch, run.dtype), run.config.cache_topk)


def widths(teacher: PreTrainedConfig, dtype: torch.dtype, k: int) -> dict[str, int]:
    return {"hidden": teacher.get_text_config().hidden_size * dtype.itemsize, "topk": 8 * k}


def _head_bytes(run: Run) -> int:
    return bytes_per_row(run)["hidden"] * AutoConfig.from_pretrained(run.name("teacher")).get_text_config().vocab_size


def _check_room(run: Run, folder: pathlib.Path, units: Sequence[Unit]) -> None:
    """Says what will be written, and refuses what the disk has no room for."""
    missing = sum(unit.bytes for unit in units if not (folder / unit.file).exists())
    if not missing:
        return
    kind = run.config.teacher_mode.removeprefix("cached_")
    what = {"hidden": "hidden states", "topk": f"top-{run.config.cache_topk} log-probabilities"}[kind]
    members = [member for unit in units for member in unit.members]
    total, free = sum(unit.bytes for unit in units), shutil.disk_usage(folder).free
    rest = "" if missing == total else f", {_size(missing)} of it missing"
    counts = f"{len(members):,} sequences, {_number(sum(member.rows for member in members))} response tokens"
    run.ui.say(f"cache: {counts}, {_size(total)} of {what} to {folder}{rest} ({_size(free)} free)")
    if missing + missing // 100 + MARGIN > free:
        raise ValueError(
            f"the teacher cache needs {_size(missing)} in {folder}, where {_size(free)} are free: make room, give an "
            f"--output on a larger disk, or {_smaller(run, units)}"
        )


def _smaller(run: Run, units: Sequence[Unit]) -> str:
    """A cache that takes less."""
    if run.config.teacher_mode == "cached_topk":
        return f"a smaller --cache-topk than {run.config.cache_topk}"
    rows = sum(member.rows for unit in units for member in unit.members)
    k = run.config.cache_topk
    return f"--teacher-mode cached_topk --cache-topk {k} ({_size(rows * bytes_per_row(run)['topk'])})"


def _covered(table: Table, key: Mapping[str, Any]) -> str:
    index = table.arrow(["rows", "covered_mean", "covered_min"]).to_pylist()
    mean = sum(row["rows"] * row["covered_mean"] for row in index) / sum(row["rows"] for row in index)
    least = min(row["covered_min"] for row in index)
    return (
        f"cache: the {key['k']} most probable of {key['vocab_size']} tokens hold {mean:.4f} of the teacher's "
        f"probability on average, {least:.4f} where they hold least"
    )


def _number(n: int) -> str:
    return f"{n / 1e6:.1f}M" if n >= 10**6 else f"{n:,}"


def _size(n: int) -> str:
    return f"{n / 2**30:,.1f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"
