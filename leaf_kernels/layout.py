"""`SharedPrefixLayout`: what a packed batch looks like. Torch only; built on the host, used on any device."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils import _pytree

T = TypeVar("T")

_OP = "SharedPrefixLayout"


class SharedPrefixLayout:
    """N packed tokens in S segments, each of which may continue the start of another one.

    Segment s holds the packed positions `[segment_starts[s], segment_starts[s + 1])`. With `prefix_lens[s] > 0` its tokens
    also attend the positions `[prefix_starts[s], prefix_starts[s] + prefix_lens[s])`, which must be the start of a *root*: a
    segment without a prefix. Only roots are shared; prefixes do not nest. Positions beyond `segment_starts[S]` belong to no
    segment (output 0, lse -inf, gradient 0). `cu_seqlens` is the case without prefixes.

    Args:
        segment_starts: [S + 1] int32 on the CPU, non-decreasing, first 0, last at most `num_tokens`. Segments may be empty.
        prefix_starts: [S] int32 on the CPU; ignored where the prefix length is 0. None: no prefixes.
        prefix_lens: [S] int32 on the CPU. None: no prefixes.
        num_tokens: N; default `segment_starts[S]`.

    Attributes known to the host: `num_tokens`, `num_segments`, `has_prefix`, `max_len` (the longest sequence, its prefix
    included) and `has_tail` (there are positions that belong to no segment).

    Raises:
        ValueError, TypeError: naming the first segment that breaks a rule. The ops trust a layout that exists.

    Build it where the batch is collated, then move it once with `.to(device, non_blocking=True)`: nothing is ever read back.
    """

    # No dataclass: FSDP2 with mixed precision takes those apart on their way into a layer, and makes new ones.

    segment_starts: torch.Tensor
    prefix_starts: torch.Tensor
    prefix_lens: torch.Tensor
    num_tokens: int
    num_segments: int
    has_prefix: bool
    max_len: int  # longest sequence, its prefix included
    has_tail: bool  # positions beyond the last segment exist
    _cache: dict[Any, Any]

    def __init__(
        self,
        segment_starts: torch.Tensor,
        prefix_starts: torch.Tensor | None = None,
        prefix_lens: torch.Tensor | None = None,
        num_tokens: int = -1,
    ):
        given = {"segment_starts": segment_starts, "prefix_starts": prefix_starts, "prefix_lens": prefix_lens}
        for name, tensor in given.items():
            value: Any = tensor
            if value is None and name != "segment_starts":
                value = torch.zeros(max(len(segment_starts) - 1, 0), dtype=torch.int32)
            floats = not isinstance(value, torch.Tensor) or value.is_floating_point() or value.dtype == torch.bool
            if floats or value.ndim != 1:
                raise TypeError(f"{_OP}: {name} must be a 1-D integer tensor, got {value!r}")
            if value.device.type != "cpu":
                raise ValueError(
                    f"{_OP}: {name} is on {value.device}; build the layout on the CPU, then use .to(device)"
                )
            if value.numel() and int(value.abs().amax()) > torch.iinfo(torch.int32).max:
                raise ValueError(f"{_OP}: {name} must fit in int32, got {int(value.abs().amax())}")
            object.__setattr__(self, name, value.to(torch.int32).contiguous())
        if len(self.segment_starts) == 0:
            raise ValueError(f"{_OP}: segment_starts must have S + 1 >= 1 entries, got none")
        S = len(self.segment_starts) - 1
        last = int(self.segment_starts[-1])
        N = last if num_tokens == -1 else int(num_tokens)
        self._validate(S, N, last)
        lens = self.segment_starts.diff() + self.prefix_lens
        for name, fact in {
            "num_tokens": N,
            "num_segments": S,
            "has_prefix": bool((self.prefix_lens > 0).any()),
            "max_len": int(lens.max()) if S else 0,
            "has_tail": last < N,
            "_cache": {},
        }.items():
            object.__setattr__(self, name, fact)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{_OP}: {name} cannot be set: a layout never changes; build another one")

    def __repr__(self) -> str:
        facts = zip(("num_tokens", "num_segments", "has_prefix", "max_len", "has_tail"), self._facts())
        return f"{_OP}({', '.join(f'{name}={fact}' for name, fact in facts)}, device={str(self.device)!r})"

    def _validate(self, S: int, N: int, last: int) -> None:
        starts, prefix_starts, prefix_lens = self.segment_starts, self.prefix_starts, self.prefix_lens
        for name in ("prefix_starts", "prefix_lens"):
            if len(getattr(self, name)) != S:
                raise ValueError(f"{_OP}: {name} must have one entry per segment ({S}), got {len(getattr(self, name))}")
        if int(starts[0]) != 0:
            raise ValueError(f"{_OP}: segment_starts must begin with 0, got {int(starts[0])}")
        own = starts.diff()
        _refuse(own < 0, "segment_starts must not decrease", own)
        if last > N:
            raise ValueError(f"{_OP}: segment_starts ends at {last}, beyond num_tokens={N}")
        _refuse(prefix_lens < 0, "prefix_lens must not be negative", prefix_lens)
        if S == 0 or not bool((prefix_lens > 0).any()):
            return
        # A prefix must be the start of a root. Empty segments can share a start, so take the longest root that begins there.
        root_len = torch.zeros(N + 1, dtype=torch.int32)
        root_len.scatter_reduce_(0, starts[:-1].long(), torch.where(prefix_lens == 0, own, 0), "amax")
        shared = prefix_lens > 0
        outside = (prefix_starts < 0) | (prefix_starts > N)
        _refuse(shared & outside, f"prefix_starts must lie in [0, {N}]", prefix_starts)
        available = root_len[torch.where(shared, prefix_starts, 0).long()]
        _refuse(
            shared & (prefix_lens > available),
            "a prefix must lie at the start of a segment that has no prefix itself; longest possible here is the root's "
            "length. Offending prefix_lens",
            prefix_lens,
        )

    # -- constructors ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], num_tokens: int = -1) -> SharedPrefixLayout:
        """Segments of the given lengths, nothing shared."""
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(torch.as_tensor(lengths, dtype=torch.int64), 0, out=starts[1:])
        return cls(starts, num_tokens=num_tokens)

    @classmethod
    def from_groups(
        cls, groups: Sequence[Sequence[Sequence[int] | torch.Tensor]]
    ) -> tuple[SharedPrefixLayout, torch.Tensor]:
        """Packs groups of token sequences; each member shares the longest common token prefix with its group's first one.

        Args:
            groups: one list per group: `[ids_root, ids_member, ...]`, each the ids of one unpadded sequence. Works for a
                prompt and its counterfactuals, for the completions of one prompt (GRPO), for a preferred and a rejected
                answer (DPO). Members share with their group's first one only, not with each other.

        Returns:
            The layout, with one segment per sequence in the order given, and the packed `input_ids` [N] int64.

        Every non-empty member keeps at least its last token as its own, also when it equals the root or a prefix of it, so
        that each member has a row whose output is its last hidden state. An empty sequence is a zero-length segment.
        """
        ids, lengths, roots, shared = shared_prefixes(groups)
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(lengths - shared, 0, out=starts[1:])
        layout = cls(starts, torch.where(shared > 0, starts[roots], 0), shared)
        first_own = lengths.cumsum(0) - lengths + shared
        own = torch.arange(len(ids)) >= first_own.repeat_interleave(lengths)
        return layout, ids[own.to(ids.device)]

    # -- derived ---------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.segment_starts.device

    @property
    def segment_ids(self) -> torch.Tensor:
        """[N] int64: the segment of each packed position, S for positions beyond the last segment."""

        def build() -> torch.Tensor:
            positions = torch.arange(self.num_tokens, device=self.device, dtype=torch.int32)
            return torch.searchsorted(self.segment_starts[1:].contiguous(), positions, right=True)

        return self.cached("segment_ids", build)

    @property
    def position_ids(self) -> torch.Tensor:
        """[N] int64: each token's position in its own, unpacked sequence; 0 beyond the last segment."""

        def build() -> torch.Tensor:
            offset = torch.cat([self.prefix_lens - self.segment_starts[:-1], self.prefix_lens.new_zeros(1)])
            segments = self.segment_ids
            positions = torch.arange(self.num_tokens, device=self.device) + offset[segments]
            return torch.where(segments < self.num_segments, positions, 0)

        return self.cached("position_ids", build)

    def spans(self) -> list[tuple[int, int, int, int]]:
        """(start, end, prefix_start, prefix_len) of every segment, on the host, where they stay known after `.to()`."""

        def build() -> list[tuple[int, int, int, int]]:
            starts = self.segment_starts.tolist()
            return list(zip(starts[:-1], starts[1:], self.prefix_starts.tolist(), self.prefix_lens.tolist()))

        return self.cached("spans", build)

    def member_rows(self, m: int) -> torch.Tensor:
        """Packed rows of *every* position of sequence m, those of its shared prefix included: losses gather through it.

        The row that predicts the member's first own token lies in the root. Returns [length of the sequence] int64 on the
        CPU, wherever the layout is (it is meant for the collator).
        """
        start, end, prefix_start, prefix_len = self.spans()[m]
        return torch.cat([torch.arange(prefix_start, prefix_start + prefix_len), torch.arange(start, end)])

    def cached(self, key: Any, build: Callable[[], T]) -> T:
        """`build()`, once per layout: schedules are shared by all layers of a model."""
        if key not in self._cache:
            with torch.inference_mode(False):  # training may follow, and saves this for its backward
                self._cache[key] = build()
        return self._cache[key]

    # -- moving ----------------------------------------------------------------------------------------------------------

    def _map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> SharedPrefixLayout:
        with torch.inference_mode(False):  # as in `cached`
            moved = _rebuild([fn(t) for t in self._tensors()], self._facts())
        if self.device.type == "cpu" or "spans" in self._cache:
            moved._cache["spans"] = self.spans()  # known to the host: never read back from the device
        return moved

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> SharedPrefixLayout:
        """This layout on another device, the same object at every call: each device builds its schedules once, also where a
        model that spans devices moves the layout to each of its layers."""
        target = torch.device(device)
        if target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())
        if self.device == target:
            return self
        key = ("to", target, non_blocking)
        return self.cached(key, lambda: self._map(lambda t: t.to(device, non_blocking=non_blocking)))

    def pin_memory(self, device: Any = None) -> SharedPrefixLayout:
        """A copy in pinned memory, so that `.to(..., non_blocking=True)` overlaps with compute."""
        return self._map(lambda t: t.pin_memory())

    def _tensors(self) -> list[torch.Tensor]:
        return [self.segment_starts, self.prefix_starts, self.prefix_lens]

    def _facts(self) -> tuple[int, int, bool, int, bool]:
        return (self.num_tokens, self.num_segments, self.has_prefix, self.max_len, self.has_tail)


def _rebuild(tensors: Sequence[Any], facts: tuple[int, int, bool, int, bool]) -> SharedPrefixLayout:
    """A layout from parts that were validated before (moved, unflattened): validating again would read the device."""
    layout = object.__new__(SharedPrefixLayout)
    for name, value in zip(("segment_starts", "prefix_starts", "prefix_lens"), tensors):
        object.__setattr__(layout, name, value)
    for name, fact in zip(("num_tokens", "num_segments", "has_prefix", "max_len", "has_tail"), facts):
        object.__setattr__(layout, name, fact)
    object.__setattr__(layout, "_cache", {})
    return layout


def shared_prefixes(
    groups: Sequence[Sequence[Sequence[int] | torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sequences of all groups end to end, and how much of each its group's first one holds already.

    Returns:
        ids: [T] int64, every token of every sequence. lengths: [S] int64. roots: [S] int64, the first sequence of each one's
        group. shared: [S] int64, the longest common prefix with it that leaves a last token; 0 for the first one itself.
    """
    members = [_as_ids(member) for group in groups for member in group]
    ids = torch.cat(members) if members else torch.zeros(0, dtype=torch.int64)
    lengths = torch.tensor([member.numel() for member in members], dtype=torch.int64)
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.int64)
    roots = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    starts = lengths.cumsum(0) - lengths

    # Every token against the token as far into the root. Behind the root's end this compares with what follows there, which
    # is never used: a prefix is at most as long as the root, and shorter than its member.
    tokens = ids.to("cpu")
    opposite = torch.arange(len(ids)) - (starts - starts[roots]).repeat_interleave(lengths)
    differs = (tokens != tokens[opposite]).nonzero().squeeze(1)
    first = torch.cat([differs, lengths.sum()[None]])[torch.searchsorted(differs, starts)]
    most = torch.minimum(lengths[roots], (lengths - 1).clamp(min=0))
    most[roots == torch.arange(len(roots))] = 0
    return ids, lengths, roots, torch.minimum(first - starts, most)


def _as_ids(member: Sequence[int] | torch.Tensor) -> torch.Tensor:
    if isinstance(member, list) and member and not isinstance(member[0], (list, tuple, torch.Tensor)):
        return torch.frombuffer(array("q", member), dtype=torch.int64)  # several times as fast as torch.as_tensor
    ids = None if isinstance(member, (str, bytes)) or member is None else torch.as_tensor(member)
    if ids is not None and ids.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=ids.device)
    if (
        ids is None
        or ids.ndim == 0
        or ids.numel() != ids.shape[-1]
        or ids.is_floating_point()
        or ids.dtype == torch.bool
    ):
        got = type(member).__name__ if ids is None else f"{ids.dtype} of shape {tuple(ids.shape)}"
        raise TypeError(
            "from_groups: a member must be the token ids of one unpadded sequence, integers in a list or a 1-D tensor, got "
            f"{got}; groups is a list of groups, a group a list of sequences"
        )
    return ids.to(torch.int64).reshape(-1)


def _refuse(bad: torch.Tensor, rule: str, values: torch.Tensor) -> None:
    if bool(bad.any()):
        s = int(bad.nonzero()[0])
        raise ValueError(f"{_OP}: {rule}, got {int(values[s])} at segment {s}")


_pytree.register_pytree_node(
    SharedPrefixLayout,
    lambda layout: (layout._tensors(), layout._facts()),
    _rebuild,  # type: ignore[arg-type]
    serialized_type_name="leaf_kernels.SharedPrefixLayout",
)
