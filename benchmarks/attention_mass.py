"""attention_mass against plain torch: what attention each token receives from the end of its sequence. On an NVIDIA GPU:

    python -m benchmarks.attention_mass --budget 540
    python benchmarks/tables.py                        # puts the results into the documentation

Writes benchmarks/results/<gpu>/attention_mass.json. One layer with the heads of Llama-3.1-8B, a pack of sequences of 300
to 1000 tokens, the last 200 of each as queries. A time is written only if the masses have just met the error budget against
fp64 on the same inputs; what cannot run is in the file as absent, with the reason.

    leaf            the schedule of the layout is there already, as it is in every layer of a model but the first
    eager, compile  the chosen queries against all keys of their sequence, probabilities summed; the same under
                    torch.compile. Sequences padded to one length, the padding itself untimed

On a CPU, `--output DIR` runs every step on a tiny case, nothing compiled; the numbers mean nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import attention
from benchmarks.timing import (
    Call,
    Deadline,
    Row,
    allocated,
    command,
    environment,
    interleave,
    reason,
    run_cases,
    state,
)
from leaf_kernels import SharedPrefixLayout, attention_mass
from leaf_kernels.testing import assert_close_to_fp64


class Case(NamedTuple):
    """The last `queries` tokens of every sequence of a pack."""

    name: str
    pack: attention.Case
    queries: int = 200

    def tiny(self) -> Case:
        """For a CPU: the same kind of case, small enough to take no time."""
        return self._replace(pack=self.pack.tiny(), queries=2)


CASES = (Case("8B packed", attention.Case("", attention.LLAMA_8B, ("forward",), lengths=(300, 1000))),)


class Problem(NamedTuple):
    layout: SharedPrefixLayout  # nothing shared, every segment longer than `last`; on the device
    q: torch.Tensor  # [N, Hq, D]
    k: torch.Tensor  # [N, Hk, D]
    last: int  # queries: so many of each segment

    def flop(self) -> int:
        """2·Hq·D for q·k of every query and key it sees: L - C of a segment before its C queries, then 1, …, C of these.

        Ours computes them twice, as it holds no probabilities: it reaches 1/2 at most.
        """
        C = self.last
        pairs = sum((b - a - C) * C + C * (C + 1) // 2 for a, b, *_ in self.layout.spans())
        return 2 * self.q.shape[1] * self.q.shape[2] * pairs

    def chosen(self) -> torch.Tensor:
        """[N] bool"""
        left = self.layout.segment_starts[1:][self.layout.segment_ids] - torch.arange(len(self.q), device=self.q.device)
        return left <= self.last

    def first_heads(self) -> Problem:
        """The queries of the first key head."""
        return self._replace(q=self.q[:, : self.q.shape[1] // self.k.shape[1]], k=self.k[:, :1])


def make(case: Case, device: torch.device) -> Problem:
    pack, _ = attention.problems(case.pack, device)
    return Problem(pack.layout.to(device), pack.q, pack.k, case.queries)


# -- implementations ---------------------------------------------------------------------------------------------------


Mass = Callable[[], torch.Tensor]  # [Hq, N]


def leaf(problem: Problem) -> Mass:
    layout, q, k, _ = problem
    # Asked for, so that it is refused where there is no kernel, not replaced by something slow
    return partial(attention_mass, q, k, layout, queries=problem.chosen(), impl="triton" if q.is_cuda else "auto")


def eager(problem: Problem, compiled: bool = False) -> Mass:
    layout, q, k, last = problem
    S, L, device = layout.num_segments, layout.max_len, q.device
    group, scale, wide = q.shape[1] // k.shape[1], q.shape[2] ** -0.5, torch.promote_types(q.dtype, torch.float32)
    place = layout.segment_ids * L + layout.position_ids
    keys = k.new_zeros(S * L, *k.shape[1:])
    keys[place] = k
    keys = keys.unflatten(0, (S, L)).transpose(1, 2)[:, :, None]  # [S, Hk, 1, L, D]
    rows = layout.segment_starts[1:, None] + torch.arange(-last, 0, device=device)  # [S, C]
    queries = q[rows].unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4)  # [S, Hk, group, C, D]
    hidden = torch.arange(L, device=device) > layout.position_ids[rows][:, None, None, :, None]

    def mass(queries: torch.Tensor, keys: torch.Tensor, hidden: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        logits = (queries @ keys.mT).to(wide) * scale
        sums = logits.masked_fill(hidden, -torch.inf).softmax(-1).sum(-2)  # [S, Hk, group, L]
        return sums.flatten(1, 2).transpose(0, 1).flatten(1)[:, place]

    run = torch.compile(mass, dynamic=False) if compiled and q.is_cuda else mass
    return lambda: run(queries, keys, hidden, place)


PROVIDERS: dict[str, Callable[[Problem], Mass]] = {
    "leaf": leaf,
    "eager": eager,
    "compile": partial(eager, compiled=True),
}


# -- measuring ---------------------------------------------------------------------------------------------------------


class Gate:
    """The error budget against fp64, on the queries of the first key head: at most twice the error of plain torch.

    A peer may have twice that.
    """

    def __init__(self, problem: Problem):
        few = problem.first_heads()
        self.plain = eager(few)()
        self.oracle = eager(few._replace(q=few.q.double(), k=few.k.double()))()

    def check(self, name: str, mass: Mass) -> dict[str, float]:
        """Relative error against fp64. Raises AssertionError."""
        got, factor = mass()[: len(self.oracle)], 1 if name == "leaf" else 2
        allowed = self.oracle + factor * (self.plain - self.oracle)
        assert_close_to_fp64(got, allowed, self.oracle, max_lse=float(self.oracle.max()))
        return {"mass_error": float((got.double() - self.oracle).norm() / self.oracle.norm())}


def measure(case: Case, device: torch.device, deadline: Deadline) -> Iterator[Row]:
    """Rows of one case: what met its bounds, and the reason for what did not. Without ours nothing is timed.

    Raises OutOfTime.
    """
    torch._dynamo.reset()  # every case compiles for its own shapes, and none counts as a recompilation
    problem = make(case, device)
    gate, calls, found, reasons = Gate(problem), dict[str, Call](), dict[str, Row](), dict[str, str]()
    for name, provider in PROVIDERS.items():
        deadline.check()
        try:
            run = provider(problem)
            own = Call(lambda _, run=run: run())  # type: ignore[misc]
            found[name] = {**gate.check(name, run), "gate": "passed", **allocated(own, device)}
            calls[name] = own
        except Exception as error:  # whatever it fails with is its reason to be absent
            reasons[name] = reason(error)
    if "leaf" not in calls:
        reasons |= dict.fromkeys(calls, "not timed: leaf failed")
        calls.clear()
    model = case.pack.model
    facts = {
        "op": "attention_mass",
        "case": case.name,
        "mode": "forward",
        "heads": f"{model.Hq}/{model.Hk}/{model.D}",
        "dtype": "bfloat16",
        "tokens": problem.layout.num_tokens,
        "segments": problem.layout.num_segments,
        "queries": case.queries * problem.layout.num_segments,
        "flop": problem.flop(),
    }
    for name, why in reasons.items():
        yield {**facts, "provider": name, "absent": why}
    if not calls:
        return
    times, spread = interleave(calls, device, deadline)
    now = state(device)
    for name, timing in times.items():
        yield {**facts, "provider": name, **found[name], **timing.columns(spread), **now}


def run(
    path: Path,
    device: torch.device,
    budget: float,
    *,
    resume: bool = False,
    commit: str | None = None,
    only: Iterable[str] = (),
) -> bool:
    """Measures the cases into `path`, case by case. True: every case is there and our implementation met its budget."""
    return run_cases(
        path,
        device,
        budget,
        environment(device, commit),
        CASES,
        lambda case, deadline: measure(case, device, deadline),
        resume=resume,
        only=only,
    )


main = partial(command, __doc__, CASES, "attention_mass", run)


if __name__ == "__main__":
    sys.exit(main())
