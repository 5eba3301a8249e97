"""What tensors a piece of code creates, those inside the operators of `leaf_kernels` too."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._runtime.library import LAUNCHERS


class AllocationRecorder(TorchDispatchMode):
    """While entered: `sizes` (elements of every tensor created); in bytes `live` (now), `peak` and `largest` (of one)."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.live = self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in LAUNCHERS:  # opaque: we look at what it runs instead
            with self:
                return LAUNCHERS[func](*args, **kwargs)
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in before:
                before.add(storage._cdata)
                self.sizes.append(storage.nbytes() // x.element_size())
                self._created(storage)
        return result

    def _created(self, storage: torch.UntypedStorage) -> None:
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, storage.nbytes())
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, nbytes: int) -> None:
        self.live -= nbytes


@contextmanager
def record_allocations() -> Iterator[list[int]]:
    """Collects the number of elements of every tensor that is created inside (a view creates none)."""
    with AllocationRecorder() as recorder:
        yield recorder.sizes


@contextmanager
def record_peak_bytes() -> Iterator[list[int]]:
    """On exit, the list holds one number: the most bytes that tensors created inside held at one time."""
    peak: list[int] = []
    with AllocationRecorder() as recorder:
        yield peak
    peak.append(recorder.peak)
