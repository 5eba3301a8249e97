"""Ragged inputs."""

from __future__ import annotations

import torch


def ragged_lengths(num_segments: int, max_len: int, *, seed: int = 0) -> list[int]:
    """Segment lengths in [0, max_len], in random order; always one empty and one of length 1 (`num_segments >= 2`)."""
    if num_segments < 2 or max_len < 1:
        raise ValueError(f"ragged_lengths: want at least 2 segments of up to 1 token, got {num_segments} and {max_len}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, max_len + 1, (num_segments - 2,), generator=generator).tolist()
    lengths = torch.tensor([0, 1, *drawn])
    return lengths[torch.randperm(num_segments, generator=generator)].tolist()


def ragged_starts(lengths: list[int]) -> torch.Tensor:
    """[S + 1] int32: where each segment begins, and where the last one ends."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def pruned_groups(
    num_groups: int, *, prompt: tuple[int, int] = (300, 1000), response: int = 200, seed: int = 0
) -> list[list[torch.Tensor]]:
    """Token ids as pruning makes them, for `SharedPrefixLayout.from_groups`: an original and its counterfactuals.

    A prompt of a length in `prompt` (42 at least) with a response, then 1–4 copies that each lack 5–40 consecutive tokens
    somewhere in the prompt, so that a copy shares what stands before its deletion.
    """
    generator = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    groups = []
    for _ in range(num_groups):
        length = between(*prompt)
        ids = torch.arange(length + response)  # all distinct: what is shared is exactly what stands before the deletion
        group = [ids]
        for _ in range(between(1, 4)):
            removed = between(5, 40)
            start = between(1, length - removed)
            group.append(torch.cat([ids[:start], ids[start + removed :]]))
        groups.append(group)
    return groups
