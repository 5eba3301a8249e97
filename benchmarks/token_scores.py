"""token_scores, flag_tokens and flagged_spans against vectorised torch: goals B1, B2. On a machine with an NVIDIA GPU:

    python -m benchmarks.token_scores --budget 540
    python -m benchmarks.token_scores --budget 540 --continue     # where the first run was cut
    python benchmarks/tables.py                                   # puts the results into the documentation

Writes benchmarks/results/<gpu>/token_scores.json after every case. Gradients are bf16, random normal rows of different
length, every position scored. Modes:

    scores      token_scores alone: what the goals are about
    select      token_scores, then flag_tokens (the 0.1-quantile), then flagged_spans

Implementations: `torch` is our specification, all segments at once in eager torch; `compile` is the same under
torch.compile. A time is written only if norms and scores have just met their bounds against fp64 on the same inputs, and
flags and spans are those of the specification on the same scores. What cannot run is in the file as absent, with the reason.

On a CPU, `--output DIR` runs every step on tiny cases, nothing compiled; the numbers mean nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

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
from leaf_kernels import FlaggedSpans, TokenScores, flag_tokens, flagged_spans, token_scores

Q = 0.1
# Of a norm relative, of a score absolute; a sum of 8192 squares in fp32 stays below
NORM_ERROR, SCORE_ERROR = 1e-5, 1e-4
ORACLE_ROWS = 4096  # that are in fp64 at a time


class Case(NamedTuple):
    """A pack of `tokens`, in segments of a length between `shortest` and `longest`; widths of teacher and student."""

    name: str
    tokens: int
    shortest: int = 300
    longest: int = 1000
    Dt: int = 8192
    Ds: int = 2048

    def lengths(self) -> list[int]:
        generator, lengths = torch.Generator().manual_seed(0), list[int]()
        while sum(lengths) < self.tokens:
            drawn = int(torch.randint(self.shortest, self.longest + 1, (1,), generator=generator))
            lengths.append(min(drawn, self.tokens - sum(lengths)))
        return lengths

    def tiny(self) -> Case:
        """For a CPU: the same kind of case, small enough to take no time."""
        n = 64
        return self._replace(
            tokens=self.tokens // n,
            shortest=self.shortest // n,
            longest=self.longest // n,
            Dt=self.Dt // n,
            Ds=self.Ds // n,
        )


CASES = (
    Case("128k", 131072),
    Case("8k", 8192),
    Case("128k in one segment", 131072, 131072, 131072),
)


# -- goals -------------------------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """Of mode `scores`. Without a peer our milliseconds are at most `wanted`, else the peer's time / ours at least that."""

    id: str
    case: str
    wanted: float
    stretch: float
    peer: str = ""


GOALS = (
    Goal("B1", "128k", 0.70, 0.66),
    Goal("B2", "128k", 1.3, 1.5, "torch"),
    Goal("B2", "8k", 2.0, 3.0, "torch"),
)


def verdicts(rows: Iterable[Row]) -> list[Row]:
    """Every goal held against the rows of one run: `passed` is None where something was not measured."""
    times = {(row["case"], row["provider"]): row for row in rows if row.get("mode") == "scores" and "ms" in row}
    out = []
    for goal in GOALS:
        names = ("leaf", goal.peer) if goal.peer else ("leaf",)
        what = f"{goal.peer} / time" if goal.peer else "ms"
        verdict: Row = {"goal": goal.id, "case": goal.case, "what": what, "passed": None}
        out.append(verdict)
        if missing := [name for name in names if (goal.case, name) not in times]:
            verdict["reason"] = "not measured: " + ", ".join(missing)
            continue
        ours, at_most = times[goal.case, "leaf"], not goal.peer
        value = ours["ms"] if at_most else times[goal.case, goal.peer]["ms"] / ours["ms"]
        verdict |= judge(value, goal.wanted, goal.stretch, at_most=at_most, spread=ours["aa_spread"])
        verdict["roofline"] = ours.get("roofline")
    return out


# -- problems and implementations --------------------------------------------------------------------------------------


class Problem(NamedTuple):
    teacher: torch.Tensor  # [N, Dt]
    student: torch.Tensor  # [N, Ds]
    segment_starts: torch.Tensor  # [S + 1] int32

    def nbytes(self) -> int:
        """Which have to be read: N·(Dt + Ds) elements, once. What is written, a few numbers per token, is not counted."""
        return self.teacher.nbytes + self.student.nbytes


def make(case: Case, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def gradient(width: int) -> torch.Tensor:
        length = torch.rand(case.tokens, 1, generator=generator, device=device).add_(0.1).bfloat16()
        rows = torch.randn(case.tokens, width, generator=generator, device=device, dtype=torch.bfloat16)
        return rows.mul_(length)

    starts = torch.tensor([0, *case.lengths()]).cumsum(0).int().to(device)
    return Problem(gradient(case.Dt), gradient(case.Ds), starts)


Result = tuple[TokenScores, torch.Tensor, FlaggedSpans]


def scores(problem: Problem, impl: str) -> TokenScores:
    return token_scores(*problem, impl=impl)


def select(problem: Problem, impl: str) -> Result:
    result = scores(problem, impl)
    flags = flag_tokens(result.score, problem.segment_starts, q=Q, impl=impl)
    return result, flags, flagged_spans(flags, problem.segment_starts, impl=impl)


MODES: dict[str, Callable[[Problem, str], object]] = {"scores": scores, "select": select}


def leaf(problem: Problem, mode: str) -> Callable[[], object]:
    # Asked for, so that it is refused where there is no kernel, not replaced by something slow
    return partial(MODES[mode], problem, "triton" if problem.teacher.is_cuda else "auto")


def eager(problem: Problem, mode: str) -> Callable[[], object]:
    return partial(MODES[mode], problem, "reference")


def compiled(problem: Problem, mode: str) -> Callable[[], object]:
    run = torch.compile(MODES[mode], dynamic=False) if problem.teacher.is_cuda else MODES[mode]
    return partial(run, problem, "reference")


PROVIDERS: dict[str, Callable[[Problem, str], Callable[[], object]]] = {
    "leaf": leaf,
    "torch": eager,
    "compile": compiled,
}


# -- measuring ---------------------------------------------------------------------------------------------------------


def oracle(problem: Problem) -> TokenScores:
    """In fp64, norms a few rows at a time. The norm of a row of one entry is that entry: E2 and E3 of given norms."""
    norms = [
        torch.cat([rows.double().norm(dim=1, keepdim=True) for rows in gradient.split(ORACLE_ROWS)])
        for gradient in problem[:2]
    ]
    return token_scores(*norms, problem.segment_starts, impl="reference")


def check(result: Result, exact: TokenScores, problem: Problem) -> dict[str, float]:
    """Errors against fp64. Raises AssertionError where they, the flags or the spans are not as they should be."""
    got, flags, spans = result
    norms = zip(got[:2], exact[:2])
    errors = {
        "norm_error": max(float(((x.double() - wanted) / wanted).abs().max()) for x, wanted in norms),
        "score_error": float((got.score.double() - exact.score).abs().max()),
    }
    for (name, error), bound in zip(errors.items(), (NORM_ERROR, SCORE_ERROR)):
        if not error <= bound:
            raise AssertionError(f"{name} {error:.2e} is above {bound:.2e}")
    wanted = flag_tokens(got.score, problem.segment_starts, q=Q, impl="reference")
    if not torch.equal(flags, wanted):
        raise AssertionError("flags are not those of the specification on the same scores")
    pairs = zip(spans, flagged_spans(wanted, problem.segment_starts, impl="reference"))
    if not all(torch.equal(x, y) for x, y in pairs):
        raise AssertionError("spans are not those of the specification on the same flags")
    return errors


def measure(case: Case, device: torch.device, deadline: Deadline) -> Iterator[Row]:
    """Rows of one case: what met its bounds, and the reason for what did not. Without ours nothing is timed.

    Raises OutOfTime.
    """
    torch._dynamo.reset()  # every case compiles for its own shapes, and none counts as a recompilation
    problem = make(case, device)
    exact = oracle(problem)
    found, reasons = dict[str, dict[str, float]](), dict[str, str]()
    calls, memory = dict[tuple[str, str], Call](), dict[tuple[str, str], Row]()
    for name, provider in PROVIDERS.items():
        deadline.check()
        try:
            runs = {mode: provider(problem, mode) for mode in MODES}
            runs["scores"]()  # compiles
            errors = check(runs["select"](), exact, problem)  # type: ignore[arg-type]
            own = {(name, mode): Call(lambda _, run=run: run()) for mode, run in runs.items()}  # type: ignore[misc]
            memory |= {key: allocated(call, device) for key, call in own.items()}
            calls |= own
            found[name] = errors
        except Exception as error:  # whatever it fails with is its reason to be absent
            reasons[name] = reason(error)
    if "leaf" not in found:
        reasons |= dict.fromkeys(found, "not timed: leaf failed")
        calls.clear()
    facts = {
        "op": "token_scores",
        "case": case.name,
        "dims": f"{case.Ds}/{case.Dt}",
        "tokens": case.tokens,
        "segments": len(problem.segment_starts) - 1,
        "dtype": "bfloat16",
        "bytes": problem.nbytes(),
    }
    for name, why in reasons.items():
        yield {**facts, "provider": name, "absent": why}
    if not calls:
        return
    named = {f"{name} {mode}": call for (name, mode), call in calls.items()}
    times, spread = interleave(named, device, deadline)
    now = state(device)
    for name, mode in calls:
        own = {**found[name], **memory[name, mode], **times[f"{name} {mode}"].columns(spread)}
        yield {**facts, "provider": name, "mode": mode, "gate": "passed", **own, **now}


def run(
    path: Path,
    device: torch.device,
    budget: float,
    *,
    resume: bool = False,
    commit: str | None = None,
    only: Iterable[str] = (),
) -> bool:
    """Measures the cases into `path`, case by case. True: every case is there and our implementation met its bounds."""
    return run_cases(
        path,
        device,
        budget,
        environment(device, commit),
        CASES,
        lambda case, deadline: measure(case, device, deadline),
        verdicts,
        lambda rows: map(line, verdicts(rows)),
        resume=resume,
        only=only,
    )


main = partial(command, __doc__, CASES, "token_scores", run)


if __name__ == "__main__":
    sys.exit(main())
