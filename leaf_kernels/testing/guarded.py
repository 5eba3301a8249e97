"""Outputs that show what a kernel did not write, and where it wrote too far."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

_BAND = 64  # elements on either side; a multiple of every vector width
_MARK = 123


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """Inside, what `torch.empty` and `torch.empty_like` return is full of NaN and lies between two guard bands.

    Raises AssertionError on exit if a band was written to. Integers hold the least value of their dtype instead of NaN.
    """
    original = torch.empty
    bands: list[torch.Tensor] = []

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        storage = original(shape.numel() + 2 * _BAND, dtype=dtype, device=device)
        storage.fill_(math.nan if storage.is_floating_point() else torch.iinfo(storage.dtype).min)
        for band in (storage[:_BAND], storage[-_BAND:]):
            bands.append(band.fill_(_MARK))
        return storage[_BAND : _BAND + shape.numel()].view(shape)

    def empty_like(like: torch.Tensor) -> torch.Tensor:
        return empty(like.shape, dtype=like.dtype, device=like.device)

    with mock.patch.object(torch, "empty", empty), mock.patch.object(torch, "empty_like", empty_like):
        yield
    for band in bands:
        if not bool((band == _MARK).all()):
            raise AssertionError(f"a kernel wrote beyond an output of dtype {band.dtype}")
