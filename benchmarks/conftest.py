"""What pytest-benchmark writes about the machine into files that are committed: the processor, not the host."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    cpu = {name: machine_info["cpu"].get(name) for name in ("brand_raw", "arch", "count")}
    kept = {name: machine_info[name] for name in ("system", "python_version")}
    machine_info.clear()
    machine_info.update(kept, cpu=cpu)
