"""For all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest
import torch

# Models here are tiny: a second thread costs more than it brings, and spins when the other core is busy.
torch.set_num_threads(1)


def _interpreted(config: pytest.Config) -> bool:
    """Whether the chosen tests run kernels in Triton's interpreter."""
    selected = config.getoption("markexpr")
    return not any(mark in selected and f"not {mark}" not in selected for mark in ("gpu", "compile_gate"))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """All files, one per core, unless -n says otherwise. A GPU is not shared out."""
    if hasattr(config, "workerinput") or not config.pluginmanager.hasplugin("xdist"):
        return  # a worker has no workers of its own
    option, everything = config.option, config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if everything and _interpreted(config) and option.numprocesses is None and not option.collectonly:
        # In order: the files that take longest come first
        option.numprocesses, option.dist, option.loadscopereorder = os.cpu_count(), "loadfile", False


def pytest_configure(config: pytest.Config) -> None:
    """Triton's interpreter must be asked for before a kernel is defined."""
    if _interpreted(config):
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes packages look as if they were not there, also those that an earlier test has imported."""

    def hide(*names: str) -> None:
        for name in names:
            for module in [name, *(m for m in sys.modules if m.startswith(f"{name}."))]:
                monkeypatch.setitem(sys.modules, module, None)

    return hide
