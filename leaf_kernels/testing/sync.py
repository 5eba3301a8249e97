"""Host syncs, found without a GPU."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}


class refuse_host_sync(TorchDispatchMode):
    """Inside, an op whose result's value or size the host waits for on a GPU raises; `.item()` and `.tolist()` included."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in _SYNCS or by_mask or unsized:
            raise AssertionError(f"host sync: {func}")
        return func(*args, **(kwargs or {}))
