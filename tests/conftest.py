"""For all tests."""

from __future__ import annotations

import os

import pytest
import torch

# Models here are tiny: a second thread costs more than it brings, and spins when the other core is busy.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Triton kernels run in its interpreter, which must be asked for before a kernel is defined."""
    selected = config.getoption("markexpr")
    if not any(mark in selected and f"not {mark}" not in selected for mark in ("gpu", "compile_gate")):
        os.environ.setdefault("TRITON_INTERPRET", "1")
