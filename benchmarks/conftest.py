"""What pytest-benchmark writes into files that are committed: the processor, not the host; no raw times; the commit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """Some cases are timed on one thread; the next ones are not."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    cpu = {name: machine_info["cpu"].get(name) for name in ("brand_raw", "arch", "count")}
    kept = {name: machine_info[name] for name in ("system", "python_version")}
    machine_info.clear()
    machine_info.update(kept, cpu=cpu)


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    commit = output_json["commit_info"]
    output_json["commit_info"] = {name: commit.get(name) for name in ("id", "time", "dirty")}
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
