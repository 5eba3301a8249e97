"""What `LeafTrainer` logs besides the loss: sums over a logging interval, and the means that a log makes of them."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from .devices import GIB
from .objective import Distillation
from .pack import Pack


class Interval(TrainerCallback):
    """The sums since the last log, of this rank. What is on the device stays there until a log is written."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.on_train_begin()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.accelerator.device)
        self._start()

    def _start(self) -> None:
        # Σ KL and Σ weight, of originals and of counterfactuals
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.accelerator.device)
        self.tokens = self.deleted = self.deletable = 0
        self.since = time.perf_counter()

    def add(self, pack: Pack, result: Distillation) -> None:
        """A pack of a training step, and what the student made of it."""
        weights = (pack[name].sum() for name in ("weight_original", "weight_counterfactual"))
        self.sums += torch.stack([result.kl_original, result.kl_counterfactual, *weights])
        if len(pack["rows"]):  # a rank without groups computes one idle token
            self.tokens += pack["layout"].num_tokens
        self.deleted += pack["deleted"]
        self.deletable += pack["deletable"]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside takes no time of `tokens_per_second`. May be nested."""
        before, since = time.perf_counter(), self.since
        try:
            yield
        finally:
            self.since = since + time.perf_counter() - before

    def close(self) -> dict[str, float]:
        """The figures of the interval, of all ranks; begins a new one. Collective.

        A mean over nothing is left out: `kl/counterfactual` and `pruned_fraction` of steps without counterfactuals.
        """
        seconds, peak = time.perf_counter() - self.since, peak_memory(self.accelerator.device)
        host = [self.tokens, self.deleted, self.deletable, seconds, peak]
        mine = torch.cat([self.sums, torch.tensor(host, dtype=torch.float64).to(self.sums.device)])
        ranks = self.accelerator.gather(mine[None])
        kl_o, kl_c, n_o, n_c, tokens, deleted, deletable, *_ = ranks.sum(0).tolist()
        seconds, peak = ranks[:, -2:].amax(0).tolist()
        self._start()
        means = {
            "kl/original": (kl_o, n_o),
            "kl/counterfactual": (kl_c, n_c),
            "pruned_fraction": (deleted, deletable),
            "tokens_per_second": (tokens, seconds),
        }
        return {name: total / n for name, (total, n) in means.items() if n} | {"peak_memory_gib": peak / GIB}


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU, since training began; of the process elsewhere, since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
