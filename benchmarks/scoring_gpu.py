"""The teacher's scoring pass on a GPU, goal D2: a random model of 8B parameters on one row. On a machine with an NVIDIA GPU:

    python -m benchmarks.scoring_gpu --budget 540
    python -m benchmarks.scoring_gpu --budget 540 --continue   # where the first run was cut
    python benchmarks/tables.py                                # puts the results into the documentation

Written to benchmarks/results/<gpu>/scoring.json case by case: rows of 4k, 32k and 128k tokens, of which 128 are the
response; tokens per second and what is allocated at most, weights included. Implementations:

    leaf        `leaf.sensitivity.sensitivities`, layers checkpointed
    released    the authors' procedure with its one-line repair (`retain_grad`): gradients of the parameters, all logits

4k tokens are what the released procedure can be expected to hold; both take turns there. Longer rows take up to minutes, so
that each is timed once, after a run that is not. What does not fit is recorded as absent.

Nothing is measured of an implementation unless its norms are those of fp64, on a small model in fp32. On a CPU,
`--output DIR` runs everything on tiny cases; the numbers mean nothing.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.e2e import SMALL_TEACHER, TEACHER, WITHIN, model_flop
from benchmarks.scoring import one_row, score_ours, score_released
from benchmarks.timing import (
    Call,
    Deadline,
    Row,
    allocated,
    command,
    environment,
    interleave,
    judge,
    line,
    reason,
    run_cases,
    state,
)
from leaf.data import Sample
from leaf_kernels import SharedPrefixLayout

CHECKED = 192  # tokens of the row on which norms are held against fp64
GOAL, WANTED = "D2", 2.5  # the released procedure's time over ours


class Case(NamedTuple):
    """`once`: a pass takes so long that one of each has to do."""

    name: str
    tokens: int
    once: bool = True

    def tiny(self) -> Case:
        """For a CPU: the same kind of case, small enough to take no time."""
        return self._replace(tokens=128 + self.tokens // 1024)


CASES = (Case("4k", 4096, once=False), Case("32k", 32768), Case("128k", 131072))

PROVIDERS: dict[str, Callable[[PreTrainedModel, Sample], torch.Tensor]] = {
    "leaf": score_ours,
    "released": score_released,
}


def score(name: str, model: PreTrainedModel, row: Sample) -> torch.Tensor:
    """Norms of the row's tokens, on the CPU."""
    model.requires_grad_(name == "released").set_attn_implementation("sdpa")
    return PROVIDERS[name](model, row)


def flop(model: PreTrainedModel, row: Sample) -> int:
    """Of a forward and a backward by inputs; gradients by weights, which "released" makes, are none of the case's work."""
    tokens = len(row.input_ids)
    return model_flop(model, [SharedPrefixLayout.from_lengths([tokens])], tokens - row.response_start, passes=2)


def make_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    with device:
        # A model's config is its own: scoring changes it
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()


def check(name: str, device: torch.device) -> float:
    """Relative error of the norms of the prompt against fp64. Raises AssertionError where it is out of bounds."""
    model, row = make_model(SMALL_TEACHER, device, torch.float32), one_row(CHECKED)
    exact = score_released(copy.deepcopy(model).double(), row)[: row.response_start]
    got = score(name, model, row)[: row.response_start].double()
    if name == "leaf":
        assert all(p.grad is None for p in model.parameters()), "parameters have gradients"
    error = float((got - exact).norm() / exact.norm())
    if not error <= WITHIN:
        raise AssertionError(f"norm_error {error:.2e} is above {WITHIN:.0e}")
    return error


class Bench:
    """The model, made when it is first needed, and what passed its check."""

    def __init__(self, device: torch.device):
        self.device = device

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        gpu = self.device.type == "cuda"
        config, dtype = (TEACHER, torch.bfloat16) if gpu else (SMALL_TEACHER, torch.float32)
        return make_model(config, self.device, dtype)

    @functools.cached_property
    def checked(self) -> dict[str, float | str]:
        """The error of what is right, the reason of what is not."""
        found: dict[str, float | str] = {}
        for name in PROVIDERS:
            try:
                found[name] = check(name, self.device)
            except Exception as error:  # whatever it fails with is its reason to be absent
                found[name] = reason(error)
        if isinstance(found["leaf"], str):
            found["released"] = "not measured: leaf failed"
        return found

    def measure(self, case: Case, deadline: Deadline) -> Iterator[Row]:
        """Rows of one case. Raises OutOfTime."""
        gpu, row = self.device.type == "cuda", one_row(case.tokens)
        facts = {"op": "scoring pass", "case": case.name, "mode": "row", "model": "8B" if gpu else "small"}
        facts |= {"tokens": case.tokens, "dtype": "bfloat16" if gpu else "float32"}
        found: dict[str, Row] = {}
        for name, error in self.checked.items():
            deadline.check()
            if isinstance(error, str):
                yield {**facts, "provider": name, "absent": error}
                continue
            try:
                found[name] = {"norm_error": error, "gate": "passed", **self.memory(name, row, case)}
                if case.once:
                    found[name] |= self.seconds(name, row)
            except Exception as failure:  # out of memory, or what else a library says to so many tokens
                found.pop(name, None)
                yield {**facts, "provider": name, "absent": reason(failure)}
            finally:
                self.recover()
        if found and not case.once:
            calls = {name: Call(lambda _, name=name: self.run(name, row)) for name in found}  # type: ignore[misc]
            times, spread = interleave(calls, self.device, deadline, per_round=1)
            for name, timing in times.items():
                found[name] |= timing.columns(spread)
        now = state(self.device)
        for name, own in found.items():
            rate = {"tokens_per_second": 1e3 * case.tokens / own["ms"], "flop": flop(self.model, row)}
            yield {**facts, "provider": name, **own, **rate, **now}

    def run(self, name: str, row: Sample) -> None:
        score(name, self.model, row)
        self.model.zero_grad()

    def memory(self, name: str, row: Sample, case: Case) -> Row:
        """Of the first run where a second would take too long."""
        weights = sum(p.nbytes for p in self.model.parameters())
        own = allocated(Call(lambda _: self.run(name, row)), self.device, warm=not case.once)
        return {**own, "peak_bytes": weights + own["peak_bytes"]}

    def seconds(self, name: str, row: Sample) -> Row:
        """Of one run, which ends with a copy to the host."""
        start = time.perf_counter()
        self.run(name, row)
        return {"ms": 1e3 * (time.perf_counter() - start), "samples": 1}

    def recover(self) -> None:
        """After a run that may have failed half-way, or before there was a model, which is not made here."""
        if model := self.__dict__.get("model"):
            model.zero_grad()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def verdicts(rows: list[Row]) -> list[Row]:
    """D2 in every case; `passed` is None where one of the two was not measured."""
    out = []
    for case in CASES:
        own = {row["provider"]: row for row in rows if row["case"] == case.name}
        verdict: Row = {"goal": GOAL, "case": case.name, "what": "released / time", "passed": None}
        out.append(verdict)
        if missing := [name for name in PROVIDERS if "ms" not in own.get(name, {})]:
            why = own.get(missing[0], {}).get("absent", "")
            verdict["reason"] = f"not measured: {missing[0]}" + (f" ({why.partition(':')[0]})" if why else "")
            continue
        value = own["released"]["ms"] / own["leaf"]["ms"]
        verdict |= judge(value, WANTED, spread=own["leaf"].get("aa_spread", 0.0))
        verdict["roofline"] = own["leaf"].get("roofline")
    return out


def summary(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if "tokens_per_second" in row:
            speed, peak = row["tokens_per_second"], row["peak_bytes"] / 2**30
            yield f"{row['case']}, {row['provider']}: {speed:.0f} tokens/s, peak {peak:.1f} GiB"
    yield from map(line, verdicts(rows))


def run(
    path: Path,
    device: torch.device,
    budget: float,
    *,
    resume: bool = False,
    commit: str | None = None,
    only: Iterable[str] = (),
) -> bool:
    """Measures the cases into `path`, case by case. True: every case is there and our implementation is right."""
    where = environment(device, commit, ("transformers",))
    measure = Bench(device).measure
    return run_cases(path, device, budget, where, CASES, measure, verdicts, summary, resume=resume, only=only)


main = partial(command, __doc__, CASES, "scoring", run)


if __name__ == "__main__":
    sys.exit(main())
