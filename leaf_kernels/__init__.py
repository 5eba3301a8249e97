"""Fused ops for distilling on pruned, prefix-sharing packs. See https://arxiv.org/abs/2506.07851.

Importing this package touches neither CUDA nor Triton: names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .layout import SharedPrefixLayout as SharedPrefixLayout
    from .modules import LinearCrossEntropyLoss as LinearCrossEntropyLoss
    from .modules import LinearKLLoss as LinearKLLoss
    from .ops.attention_mass.api import attention_mass as attention_mass
    from .ops.linear_kl.api import linear_cross_entropy as linear_cross_entropy
    from .ops.linear_kl.api import linear_kl as linear_kl
    from .ops.linear_kl.api import linear_kl_topk as linear_kl_topk
    from .ops.pruned_attention.api import pruned_attention as pruned_attention
    from .ops.token_scores.api import flag_tokens as flag_tokens
    from .ops.token_scores.api import flagged_spans as flagged_spans
    from .ops.token_scores.api import token_scores as token_scores
    from .packing import deal as deal
    from .packing import pack_groups as pack_groups
    from .packing import pack_sizes as pack_sizes
    from .packing import packed_sizes as packed_sizes
    from .types import FlaggedSpans as FlaggedSpans
    from .types import Impl as Impl
    from .types import LinearCrossEntropyOutput as LinearCrossEntropyOutput
    from .types import LinearKLOutput as LinearKLOutput
    from .types import LinearKLTopkOutput as LinearKLTopkOutput
    from .types import TokenScores as TokenScores

_HOME = {
    "FlaggedSpans": ".types",
    "Impl": ".types",
    "LinearCrossEntropyLoss": ".modules",
    "LinearCrossEntropyOutput": ".types",
    "LinearKLLoss": ".modules",
    "LinearKLOutput": ".types",
    "LinearKLTopkOutput": ".types",
    "SharedPrefixLayout": ".layout",
    "TokenScores": ".types",
    "attention_mass": ".ops.attention_mass.api",
    "deal": ".packing",
    "flag_tokens": ".ops.token_scores.api",
    "flagged_spans": ".ops.token_scores.api",
    "linear_cross_entropy": ".ops.linear_kl.api",
    "linear_kl": ".ops.linear_kl.api",
    "linear_kl_topk": ".ops.linear_kl.api",
    "pack_groups": ".packing",
    "pack_sizes": ".packing",
    "packed_sizes": ".packing",
    "pruned_attention": ".ops.pruned_attention.api",
    "token_scores": ".ops.token_scores.api",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value  # resolved once
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
