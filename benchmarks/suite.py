"""What the CPU cases of `pytest benchmarks/` share: a gate, then memory, then interleaved times of several implementations.

A case is one pytest-benchmark test. Its `extra_info["rows"]` has a row per implementation, in the words of the GPU
benchmarks (`benchmarks.timing`): what was run where, median and quantiles, the peak of allocated bytes beyond the inputs
and the largest single allocation, errors against fp64. Implementations take turns, so that whatever else the machine does
treats them alike. pytest-benchmark times ours ("leaf") once more at the end of every round: how far its median is from the
one before is the A–A spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.timing import ROUNDS, Call, Row, Timing, allocated, environment

THREADS = 1  # a machine that also does something else has one core to spare rather than all
CPU = torch.device("cpu")


class Arm(NamedTuple):
    """One implementation of a case."""

    run: Callable[[], object]  # what is timed
    check: Callable[[], dict[str, float]]  # errors against fp64; raises AssertionError where they are out of bounds


def compare(benchmark: Any, arms: dict[str, Arm], **facts: Any) -> dict[str, Row]:
    """Measures `arms`, of which "leaf" is ours, and leaves their rows in the extra_info of `benchmark`.

    Raises:
        AssertionError: an implementation is wrong. Then nothing was timed.
    """
    torch.set_num_threads(THREADS)
    rows: dict[str, Row] = {}
    for name, arm in arms.items():
        errors = arm.check()
        memory = allocated(Call(lambda _, arm=arm: arm.run()), CPU)  # type: ignore[misc]
        rows[name] = {**facts, "provider": name, **errors, "gate": "passed", **memory, "roofline": None}
    seconds: dict[str, list[float]] = {name: [] for name in arms}

    def everyone() -> None:
        for name, arm in arms.items():
            start = time.perf_counter()
            arm.run()
            seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(arms["leaf"].run, setup=everyone, rounds=ROUNDS, warmup_rounds=1)
    times = {name: Timing.of([1e3 * s for s in values[-ROUNDS:]]) for name, values in seconds.items()}
    spread = abs(1e3 * benchmark.stats.stats.median / times["leaf"].median - 1)
    where = {**environment(CPU), "threads": THREADS}
    for name, timing in times.items():
        rows[name] |= {**timing.columns(spread), **where}
    benchmark.extra_info["rows"] = list(rows.values())
    return rows


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the error over that of the exact result."""
    return float((got.detach().double() - exact).norm() / exact.norm())


def ratio(rows: dict[str, Row], column: str, peer: str) -> float:
    """The peer's over ours."""
    return rows[peer][column] / rows["leaf"][column]
