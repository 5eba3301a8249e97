"""Helpers for tests of the ops, ours and those of whoever builds on them."""

from __future__ import annotations

from .._runtime.launch import gpu_shapes
from .._runtime.precompiled import precompiled_kernels
from .allocations import AllocationRecorder, record_allocations, record_peak_bytes
from .attention import AttentionResult, attention_in_chunks
from .budget import assert_close_to_fp64
from .covering import pairwise
from .guarded import guarded_outputs
from .offline import Compiled, compile_offline
from .ragged import pruned_groups, ragged_lengths, ragged_starts
from .sync import refuse_host_sync

__all__ = [
    "AllocationRecorder",
    "AttentionResult",
    "Compiled",
    "assert_close_to_fp64",
    "attention_in_chunks",
    "compile_offline",
    "gpu_shapes",
    "guarded_outputs",
    "pairwise",
    "precompiled_kernels",
    "pruned_groups",
    "ragged_lengths",
    "ragged_starts",
    "record_allocations",
    "record_peak_bytes",
    "refuse_host_sync",
]
