"""The devices that a run can be estimated for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .config import did_you_mean

GIB, MIB = 2**30, 2**20
USABLE = 0.92  # of a device's memory: the rest is the context's, the libraries' and what the allocator cannot use


class Device(NamedTuple):
    """Where a run would be. Rates are the maker's, of dense products; those of a CPU are measured."""

    name: str
    memory: int  # bytes
    flops: dict[int, float]  # per second, by the size of an element
    bandwidth: float  # bytes per second
    shares: tuple[float, float]  # of these rates that models reach, at worst and at best

    def holds(self, peak: int) -> bool:
        return peak <= USABLE * self.memory

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


def _gpu(name: str, gib: float, tflops16: float, tflops32: float, tb_per_s: float) -> Device:
    return Device(name, int(gib * GIB), {2: tflops16 * 1e12, 4: tflops32 * 1e12}, tb_per_s * 1e12, (0.2, 0.6))


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", 80, 312, 19.5, 2.0),
        _gpu("a100-40gb", 40, 312, 19.5, 1.55),
        _gpu("h100", 80, 989, 67, 3.35),
        _gpu("h200", 141, 989, 67, 4.8),
        _gpu("b200", 180, 2250, 75, 7.7),
        _gpu("l4", 24, 121, 30, 0.3),
        _gpu("l40s", 48, 362, 91, 0.86),
        _gpu("rtx4090", 24, 165, 82, 1.0),
    )
}


def device_named(name: str, dtype: torch.dtype | None = None) -> Device:
    """A GPU of `GPUS`, the one that is here ("cuda", "cuda:N"), this "cpu", or "auto": the GPU where there is one.

    Raises:
        ValueError: a device that is not known, or not here.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return _this_cpu(dtype or torch.float32)
    if name == "auto" or name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: there is no GPU here; name one: {', '.join(GPUS)}")
        here = torch.cuda.get_device_properties(torch.device("cuda" if name == "auto" else name))
        words = here.name.lower().replace(" ", "")
        known = max((gpu for gpu in GPUS if gpu.split("-")[0] in words), key=len, default="a100")  # rates: rough
        return GPUS[known]._replace(name=here.name, memory=here.total_memory)
    raise ValueError(
        f"--device must be auto, cpu, cuda, cuda:N or one of {', '.join(GPUS)}, got {name!r}{did_you_mean(name, GPUS)}"
    )


def _this_cpu(dtype: torch.dtype) -> Device:
    a, big = torch.ones(1024, 1024, dtype=dtype), torch.ones(2**25, dtype=torch.float32)

    def fastest(run: Callable[[], object]) -> float:
        run()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    flops = 2 * 1024**3 / fastest(lambda: a @ a)
    bandwidth = big.nbytes / fastest(lambda: big.sum())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device("cpu", memory, {2: flops, 4: flops}, bandwidth, (0.25, 1.0))
