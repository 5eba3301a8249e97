"""How the GPU benchmarks measure: interleaved timings, anchors, what ran where. Knows no op.

Times are those of the device (CUDA events), with a cold L2 cache and every launch queued in advance. On a CPU the same code
runs with the wall clock, so that it can be tried out; such numbers are for nobody.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROUNDS, PER_ROUND = 5, 10  # 50 samples of every call


class OutOfTime(Exception):
    """The budget is spent. What was written stays."""


class Deadline:
    """`check()` raises once the budget is spent: before each piece of work, so that a compilation in flight may overrun."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise OutOfTime


class Call(NamedTuple):
    """Something to time; `setup` runs before every `run`, untimed, and gives it its argument."""

    run: Callable[[Any], object]
    setup: Callable[[], Any] = lambda: None


class Timing(NamedTuple):
    """Milliseconds."""

    median: float
    p20: float
    p80: float
    samples: int


def interleave(calls: dict[str, Call], device: torch.device, deadline: Deadline) -> tuple[dict[str, Timing], float]:
    """Times of calls that take turns, so that clocks and heat treat them alike, and the A–A spread.

    The first call opens and closes each round. The spread is the largest relative difference of these two medians of one
    and the same call: differences between calls of less than twice that mean nothing.
    """
    first, samples, spread = next(iter(calls)), {name: list[float]() for name in calls}, 0.0
    scratch = torch.empty(2**28 if device.type == "cuda" else 1, dtype=torch.int8, device=device)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            deadline.check()
            samples[name] += _sample(call, device, scratch)
        again = _sample(calls[first], device, scratch)
        opening = statistics.median(samples[first][-PER_ROUND:])
        spread = max(spread, abs(statistics.median(again) / opening - 1))
    return {name: _timing(values) for name, values in samples.items()}, spread


def _timing(values: list[float]) -> Timing:
    cuts = statistics.quantiles(values, n=5)
    return Timing(statistics.median(values), cuts[0], cuts[-1], len(values))


def _sample(call: Call, device: torch.device, scratch: torch.Tensor) -> list[float]:
    """PER_ROUND times in ms, after one run that is not counted."""
    if device.type != "cuda":
        times = []
        for _ in range(PER_ROUND + 1):
            state, start = call.setup(), time.perf_counter()
            call.run(state)
            times.append(1e3 * (time.perf_counter() - start))
        return times[1:]
    marks, host = [], 0.0
    for _ in range(PER_ROUND + 1):
        state = call.setup()
        scratch.zero_()  # drives everything else out of the L2 cache
        # The device waits while the host queues the launches, half as long again as it took the last time: they are not
        # what is timed. (The uncounted run may have compiled, hence the limit.) Cycles at 2 GHz.
        torch.cuda._sleep(int(min(max(0.5e-3, 1.5 * host), 0.05) * 2e9))
        queued = time.perf_counter()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call.run(state)
        end.record()
        host = time.perf_counter() - queued
        marks.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks[1:]]


def anchors(device: torch.device, deadline: Deadline) -> dict[str, float]:
    """What this device does on the two simplest things: copy, and multiply in bf16 (8192³ on a GPU)."""
    n, numel = (8192, 2**29) if device.type == "cuda" else (128, 2**16)
    source = torch.randn(numel, device=device, dtype=torch.bfloat16)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    target, product = torch.empty_like(source), torch.empty_like(a)
    calls = {
        "copy": Call(lambda _: target.copy_(source)),
        "matmul": Call(lambda _: torch.mm(a, b, out=product)),
    }
    times, spread = interleave(calls, device, deadline)
    return {
        "copy_gb_s": 2 * source.nbytes / times["copy"].median / 1e6,
        "matmul_tflop_s": 2 * n**3 / times["matmul"].median / 1e9,
        "aa_spread": spread,
    }


# -- what ran where ----------------------------------------------------------------------------------------------------


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """What a result depends on and does not change while it is measured. `commit` where there is no git."""
    facts = {"torch": torch.__version__, "triton": _version("triton"), "commit": commit or _commit()}
    if device.type != "cuda":
        return {"gpu": "none", "processor": platform.processor() or platform.machine(), **facts}
    fixed = _nvidia_smi(device, {"driver": "driver_version", "power_limit_w": "power.limit"})
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": capability,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "flash_attn": _version("flash-attn"),
        **fixed,
        **facts,
    }


def state(device: torch.device) -> dict[str, Any]:
    """Clocks, power and heat now; read right after a measurement, while the device is still warm."""
    if device.type != "cuda":
        return {}
    fields = {
        "sm_clock_mhz": "clocks.sm",
        "memory_clock_mhz": "clocks.mem",
        "power_w": "power.draw",
        "temperature_c": "temperature.gpu",
    }
    return _nvidia_smi(device, fields)


def _nvidia_smi(device: torch.device, fields: dict[str, str]) -> dict[str, str]:
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(fields.values())}",
        "--format=csv,noheader,nounits",
        f"--id={uuid}",
    ]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return dict.fromkeys(fields, f"unknown: {type(error).__name__}")
    return dict(zip(fields, (value.strip() for value in line.strip().split(","))))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_json(path: Path, content: object) -> None:
    """At once or not at all: a run that is cut leaves the file of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)
