"""LeaF: find distracting tokens, delete them, distil. See https://arxiv.org/abs/2506.07851.

Importing this package imports neither torch nor transformers: names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from leaf_kernels._version import __version__

if TYPE_CHECKING:
    from .config import RunConfig as RunConfig
    from .run import run_all as run_all
    from .trainer import LeafArguments as LeafArguments
    from .trainer import LeafTrainer as LeafTrainer

_HOME = {"LeafArguments": ".trainer", "LeafTrainer": ".trainer", "RunConfig": ".config", "run_all": ".run"}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value  # resolved once
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
