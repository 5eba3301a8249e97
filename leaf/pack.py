"""Training items and packs: what the trainer's data loader yields.

A *group* is an original and its counterfactuals: `{"id", "original": {"input_ids", "response_start"} | None,
"counterfactuals": [{...}, ...]}`. A *pack* holds whole groups whose counterfactuals share the original's prefix.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from leaf_kernels import SharedPrefixLayout, deal, pack_sizes, packed_sizes

from .teacher import TeacherCache
from .units import token_ids

logger = logging.getLogger(__name__)

Group = dict[str, Any]
Pack = dict[str, Any]


def build_groups(
    scores: Iterable[dict[str, Any]],
    counterfactuals: Iterable[dict[str, Any]],
    encode_text: Callable[[str, str], tuple[list[int], Any, int]],
    *,
    originals: str = "all",
) -> list[Group]:
    """One group per scored row, in order, with all of its counterfactuals that were not dropped by verification.

    Instruction-level and response-level counterfactuals of a row join one group, so that each original response token
    counts once however often the response was cut.

    Args:
        scores: rows of the scores table.
        counterfactuals: rows of the counterfactuals table; `verified` False is left out, null (not asked) is used.
        encode_text: `Encoder.encode_text`, (prompt, response) → (input_ids, offsets, response_start).
        originals: "all" keeps rows without a counterfactual, "paired" leaves them out.
    """
    if originals not in ("all", "paired"):
        raise ValueError(f"originals must be 'all' or 'paired', got {originals!r}")
    by_source = defaultdict(list)
    for row in counterfactuals:
        if row["verified"] is not False:
            input_ids, _, response_start = encode_text(row["prompt"], row["response"])
            by_source[row["source_id"]].append({"input_ids": input_ids, "response_start": response_start})
    groups: dict[str, Group] = {}
    for row in scores:
        # The original is that of the instruction level when both levels were scored: its target is the whole response.
        if row["status"] != "ok" or (row["id"] in groups and row["cut"] != 0):
            continue
        if row["cut"] == 0:
            original = {"input_ids": token_ids(row), "response_start": row["response_start"]}
        else:
            start = next(i for i, scored in enumerate(row["scored"]) if scored)
            original = {"input_ids": token_ids(row), "response_start": start}
        groups[row["id"]] = {"id": row["id"], "original": original, "counterfactuals": by_source.pop(row["id"], [])}
    if by_source:
        raise ValueError(
            f"{len(by_source)} counterfactual source(s) have no scored row, first {next(iter(by_source))!r}: "
            "the two tables come from different runs"
        )
    return [g for g in groups.values() if originals == "all" or g["counterfactuals"]]


def sequences(group: Group) -> list[list[int]]:
    """The token sequences of a group: its original, where it has one, then its counterfactuals."""
    members = [group["original"]] if group["original"] else []
    return [member["input_ids"] for member in [*members, *group["counterfactuals"]]]


class Collator:
    """Deals the groups of a micro-batch to the ranks and puts each share into few packs of at most `max_tokens` tokens
    (`leaf_kernels.pack_groups`), in their order within a pack; never changes what is in it.

    Every rank gets the groups of all ranks and keeps its own: about as many packed tokens as any other, in equally many
    packs (an idle one has a single token without weight), so that sharded models are run in step.

    Returns `{"packs": [...]}`. A pack has the model's inputs (`input_ids`, `position_ids` [1, N], `layout`) and the losses'
    (all counted per packed row; the row that predicts a member's first own token may lie in the shared prefix):

    - `rows` [M]: rows whose hidden state enters a loss.
    - `weight_original`, `weight_counterfactual` [N] fp32: how often a row predicts a response token of an original, and
      Σu over those of counterfactuals. KL at a row depends on the row alone, so members that share it add their weights.
    - `label_rows`, `labels`, `label_is_original`, `label_weight` [K]: the same, one entry per predicted token, for
      cross-entropy: members that share a row have different labels there.
    - what `answers` knows of the teacher at `rows` [M, ...].

    And two numbers for the log: `deleted` tokens of `deletable` ones, see `deletions`.

    `concat` counts every response token once (u = 1), as the authors' released code does; otherwise
    u = 1 / (counterfactuals of that group in the step).
    """

    def __init__(
        self, max_tokens: int, concat: bool = False, rank: int = 0, ranks: int = 1, answers: TeacherCache | None = None
    ):
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self.max_tokens, self.concat = max_tokens, concat
        self.rank, self.ranks, self.answers = rank, ranks, answers

    def __call__(self, groups: Sequence[Group]) -> dict[str, list[Pack]]:
        sizes = packed_sizes([sequences(group) for group in groups])
        dealt = deal(sizes, self.ranks)
        shares = [[g for g, to in enumerate(dealt) if to == rank] for rank in range(self.ranks)]
        cuts = [pack_sizes([sizes[g] for g in share], self.max_tokens) for share in shares]
        mine = shares[self.rank]
        # The largest first: ranks that wait for each other in every pack then run packs of like size
        cuts[self.rank].sort(key=lambda pack: -sum(sizes[mine[g]] for g in pack))
        packs = [[groups[mine[g]] for g in pack] for pack in cuts[self.rank]]
        packs += [[]] * (max(1, *map(len, cuts)) - len(packs))
        return {"packs": [self._pack(pack) for pack in packs]}

    def _pack(self, groups: Sequence[Group]) -> Pack:
        members = []
        for group in groups:
            share = 1.0 if self.concat else 1.0 / max(len(group["counterfactuals"]), 1)
            members += [(group["original"], True, 1.0)] if group["original"] else []
            members += [(c, False, share) for c in group["counterfactuals"]]
        layout, input_ids = SharedPrefixLayout.from_groups([sequences(group) for group in groups] or [[[0]]])

        none = torch.empty(0, dtype=torch.int64)
        rows, labels, original, weights = [none], [none], [none.bool()], [none.float()]
        for m, (member, kind, share) in enumerate(members):
            start = member["response_start"]
            ids = torch.as_tensor(member["input_ids"])
            if not 0 < start < len(ids):
                raise ValueError(f"response_start must lie in [1, {len(ids)}) so that a target follows, got {start}")
            rows.append(layout.member_rows(m)[start - 1 : -1])
            labels.append(ids[start:])
            original.append(torch.full_like(rows[-1], kind, dtype=torch.bool))
            weights.append(torch.full_like(rows[-1], share, dtype=torch.float32))
        label_rows, is_original, weight = (torch.cat(parts) for parts in (rows, original, weights))

        unique, of_row = label_rows.unique(return_inverse=True)

        def per_row(mask: torch.Tensor) -> torch.Tensor:
            return torch.zeros(layout.num_tokens).index_add_(0, label_rows[mask], weight[mask])

        return {
            "input_ids": input_ids[None],
            "position_ids": layout.position_ids[None],
            "layout": layout,
            "rows": unique,
            "weight_original": per_row(is_original),
            "weight_counterfactual": per_row(~is_original),
            "label_rows": label_rows,
            "labels": torch.cat(labels),
            "label_is_original": is_original,
            "label_weight": weight,
            **self._answers([member for member, *_ in members], of_row, len(unique)),
            **deletions(groups),
        }

    def _answers(self, members: Sequence[dict[str, Any]], of_row: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
        """At each row that of the first member there: what the others say of a shared row is the same."""
        if self.answers is None:
            return {}
        known = [self.answers.read(member["input_ids"], member["response_start"]) for member in members]
        known = known or [self.answers.empty()]
        first = torch.empty(rows, dtype=torch.int64)
        first.scatter_reduce_(0, of_row, torch.arange(len(of_row)), "amin", include_self=False)
        return {name: torch.cat([each[name] for each in known])[first] for name in known[0]}


def deletions(groups: Iterable[Group]) -> dict[str, int]:
    """Over the counterfactuals of groups that have an original: `deleted`, by how many tokens they are shorter than it, and
    `deletable`, how many stood before their targets (of the prompt, and of the response up to the cut)."""
    pairs = [(len(g["original"]["input_ids"]), c) for g in groups if g["original"] for c in g["counterfactuals"]]
    deleted = sum(whole - len(c["input_ids"]) for whole, c in pairs)
    return {"deleted": deleted, "deletable": deleted + sum(c["response_start"] for _, c in pairs)}


def choose(group: Group, index: int, epoch: int, seed: int, count: int | str) -> Group:
    """`group` with the `count` counterfactuals that this epoch uses ("all" = every one), cycled by seed and epoch."""
    available = group["counterfactuals"]
    if count == "all" or len(available) <= int(count):
        return group
    first = (seed + index + epoch * int(count)) % len(available)
    return {**group, "counterfactuals": [available[(first + j) % len(available)] for j in range(int(count))]}


class GroupDataset(Dataset):
    """Groups, indexed by (index, epoch): the sampler's keys carry the epoch, so that workers need no shared state."""

    def __init__(self, groups: Sequence[Group], seed: int, count: int | str):
        self.groups, self.seed, self.count = groups, seed, count

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, key: tuple[int, int]) -> Group:
        index, epoch = key
        return choose(self.groups[index], index, epoch, self.seed, self.count)


class GroupSampler:
    """Micro-batches of all ranks together, `batch_size` groups each, the same on every rank: see `Collator`.

    The last one may be short: nothing is ever repeated to fill it up. What a step holds depends on batch size × accumulation
    × ranks alone.
    """

    def __init__(self, size: int, batch_size: int, seed: int, shuffle: bool):
        self.size, self.batch_size, self.seed, self.shuffle, self.epoch = size, batch_size, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.arange(self.size)
        if self.shuffle:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        for chunk in order.split(self.batch_size):
            yield [(int(i), self.epoch) for i in chunk]


class GroupStream(IterableDataset):
    """The same for groups that come as a stream, which every rank reads.

    A stream for training repeats itself and counts its passes, as epochs: the Trainer knows one endless epoch of it, so
    counterfactuals cycle and a run resumes at the right place in any pass. What ends a pass short is not filled up.
    """

    def __init__(self, groups: Iterable[Group], batch_size: int, seed: int, count: int | str, repeat: bool):
        self.groups, self.batch_size, self.seed, self.count, self.repeat = groups, batch_size, seed, count, repeat

    def __iter__(self) -> Iterator[list[Group]]:
        for epoch in itertools.count() if self.repeat else (0,):
            chunk: list[Group] = []
            index = -1
            for index, group in enumerate(self.groups):
                chunk.append(choose(group, index, epoch, self.seed, self.count))
                if len(chunk) == self.batch_size:
                    yield chunk
                    chunk = []
            if index < 0:
                raise ValueError(
                    f"LeafTrainer: pass {epoch + 1} over the data set gave no groups; a stream must be an iterable that "
                    "starts again (not a generator), or hold enough groups for max_steps"
                )
            if chunk:
                yield chunk
