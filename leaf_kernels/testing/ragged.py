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
