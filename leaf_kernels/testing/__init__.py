"""Helpers for tests of the ops, ours and those of whoever builds on them."""

from __future__ import annotations

from .allocations import record_allocations, record_peak_bytes
from .budget import assert_close_to_fp64
from .ragged import ragged_lengths, ragged_starts
from .sync import refuse_host_sync

__all__ = [
    "assert_close_to_fp64",
    "ragged_lengths",
    "ragged_starts",
    "record_allocations",
    "record_peak_bytes",
    "refuse_host_sync",
]
