"""How losses of hidden states and heads are gated and measured: what linear_kl and cross_entropy share.

A problem is a NamedTuple of tensors and numbers; a provider turns it into a call that returns the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch

from benchmarks.timing import Call, Deadline, Row, allocated, interleave, reason, state
from leaf_kernels.testing import assert_close_to_fp64

ACCURACY_ROWS = 512
LOGIT_STD = 2.5
SANE = {"loss_error": 0.05, "dx_error": 0.2, "dw_error": 0.2}  # of a peer; far outside of what rounding does
LOSS_FLOOR = 1e-5  # of ours: plain torch may be right by chance, the loss is one number

Loss = Callable[[], torch.Tensor]  # a scalar to differentiate by `Problem.trained`
Providers = Mapping[str, Callable[[Any], Loss]]  # with "leaf", ours, and "eager", plain torch


class Problem(Protocol):
    """loss = mean over `rows`, the only ones whose weight is not 0."""

    @property
    def rows(self) -> torch.Tensor: ...

    @property
    def trained(self) -> list[torch.Tensor]:
        """Hidden states [N, D], and the head [V, D] unless it is frozen."""

    def flop(self) -> int:
        """Which have to be done."""

    def first(self, n: int) -> Problem:
        """The first `n` rows as a problem of their own."""

    def oracle(self) -> list[torch.Tensor]:
        """As `step`, in fp64."""

    def __iter__(self) -> Iterator[Any]: ...


def step(loss: Loss, problem: Problem) -> list[torch.Tensor]:
    """[loss, dX, dW], without dW where the weight is frozen."""
    value = loss()
    return [value.detach(), *torch.autograd.grad(value, problem.trained)]


class Gate:
    """Errors against fp64 on a problem of few rows; `check` raises AssertionError where they are not acceptable."""

    def __init__(self, problem: Problem, providers: Providers):
        self.problem, self.providers, self.oracle = problem, providers, problem.oracle()
        self.plain = step(providers["eager"](problem), problem)

    def errors(self, result: list[torch.Tensor]) -> dict[str, float]:
        pairs = zip(SANE, result, self.oracle)
        return {name: float((x.double() - exact).norm() / exact.norm()) for name, x, exact in pairs}

    def check(self, name: str) -> dict[str, float]:
        result = step(self.providers[name](self.problem), self.problem)
        errors, bounds = self.errors(result), SANE
        if name == "leaf":
            for what, *tensors in zip(("dX", "dW"), result[1:], self.plain[1:], self.oracle[1:]):
                try:
                    assert_close_to_fp64(*tensors)
                except AssertionError as error:
                    raise AssertionError(f"{what}: {error}") from error
            bounds = SANE | {"loss_error": 2 * self.errors(self.plain)["loss_error"] + LOSS_FLOOR}
        for what, error in errors.items():
            if not error <= bounds[what]:
                raise AssertionError(f"{what} {error:.2e} is above {bounds[what]:.2e}")
        return errors


def memory(run: Callable[[], list[torch.Tensor]], problem: Problem) -> Row:
    """Bytes allocated in one step."""
    own = allocated(Call(lambda _: run()), problem.rows.device)
    inputs = sum(x.nbytes for x in problem if isinstance(x, torch.Tensor))
    hidden = problem.trained[0].element_size()
    gradients = sum(x.numel() * size for x, size in zip(problem.trained, (hidden, 4)))
    return {**own, "beyond_bytes": own["peak_bytes"] - gradients, "total_bytes": own["peak_bytes"] + inputs}


def measure(
    problem: Problem,
    facts: Row,
    providers: Providers,
    deadline: Deadline,
    *,
    timed: bool = True,
    products: Callable[[Any, Call], tuple[int, Callable[[], None]]] | None = None,
) -> Iterator[Row]:
    """Rows of one case: what met its bounds, and the reason for what did not or is not there.

    `products` turns a step of ours into its rows per chunk and the matrix products alone, timed as "gemms". Without ours
    nothing is timed. Raises OutOfTime.
    """
    torch._dynamo.reset()  # every case compiles for its own shapes, and none counts as a recompilation
    device, few = problem.rows.device, problem.first(ACCURACY_ROWS)
    found, reasons, calls = dict[str, Row](), dict[str, str](), dict[str, Call]()

    def attempt(name: str, run: Callable[[], None]) -> None:
        deadline.check()
        try:
            run()
        except Exception as error:  # whatever a peer fails with is its reason to be absent
            reasons[name] = reason(error)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def accuracy(name: str, gate: Gate) -> None:
        found[name] = {**gate.check(name), "accuracy_rows": len(few.rows), "gate": "passed"}

    def full_size(name: str) -> None:
        run = partial(step, providers[name](problem), problem)
        found[name] |= memory(run, problem)
        calls[name] = Call(lambda _: run())

    def gemms() -> None:
        chunk_rows, run = products(problem, calls["leaf"])  # type: ignore[misc]
        found["leaf"]["chunk_rows"] = chunk_rows
        found["gemms"] = {"chunk_rows": chunk_rows, "gate": "none: no loss"}
        calls["gemms"] = Call(lambda _: run())

    gate = Gate(few, providers)
    for name in providers:
        attempt(name, partial(accuracy, name, gate))
    del gate  # its fp64 tensors are large
    for name in list(found):
        attempt(name, partial(full_size, name))
    facts = {**facts, "mode": "step", "rows": len(problem.rows), "dtype": "bfloat16", "flop": problem.flop()}
    if "leaf" not in calls:
        reasons |= {name: "not timed: leaf failed" for name in calls}
        calls.clear()
    elif timed and products:
        attempt("gemms", gemms)
    for name, why in reasons.items():
        yield {**facts, "provider": name, "absent": why}
    times, spread = interleave(calls, device, deadline) if timed and calls else ({}, 0.0)
    now = state(device)
    for name in calls:
        row: Row = {**facts, "provider": name, **found[name], **now}
        if name in times:
            row |= times[name].columns(spread)
        yield row
