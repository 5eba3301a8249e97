"""linear_cross_entropy against plain torch and other libraries' fused heads. On a machine with an NVIDIA GPU:

    pip install liger-kernel cut-cross-entropy                     # the peers; whichever is not there is recorded as absent
    python -m benchmarks.cross_entropy --budget 540
    python -m benchmarks.cross_entropy --budget 540 --continue     # where the first run was cut
    python benchmarks/tables.py                                    # puts the results into the documentation

Writes benchmarks/results/<gpu>/cross_entropy.json after every case. A time is forward and backward of the mean loss over the
labelled rows. Inputs (random labels), gate and columns are as in benchmarks.linear_kl.

    eager, compile     logits, in fp32 for the softmax, F.cross_entropy; the same under torch.compile
    liger, liger_fp32  Liger's fused linear cross-entropy, dW accumulated in bf16 (its default) and in fp32
    cce, cce_exact     Apple's cut cross-entropy, as it comes, and with no gradient left out for being small

On a CPU, `--output DIR` runs every step on tiny cases, nothing compiled; the numbers mean nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import losses
from benchmarks.losses import LOGIT_STD, Loss
from benchmarks.timing import Deadline, Row, command, environment, run_cases
from leaf_kernels import linear_cross_entropy

PACKAGES = ("liger-kernel", "cut-cross-entropy")


class Case(NamedTuple):
    """Width of the hidden states, vocabulary, N rows."""

    name: str
    D: int
    V: int
    N: int = 8192
    kept: float = 1.0  # share of the rows that have a label

    def tiny(self) -> Case:
        """For a CPU: the same kind of case, small enough to take no time."""
        return self._replace(D=self.D // 64, V=self.V // 256, N=self.N // 64)


CASES = (
    Case("1B", 2048, 128256),
    Case("1.5B", 1536, 151936),
    Case("1B masked", 2048, 128256, kept=0.25),
)


class Problem(NamedTuple):
    """loss = mean over `rows` of the cross-entropy."""

    hidden: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    labels: torch.Tensor  # [N] int64; −100 outside of `rows`
    rows: torch.Tensor  # [M] int64, ascending

    @property
    def trained(self) -> list[torch.Tensor]:
        return [self.hidden, self.weight]

    def first(self, n: int) -> Problem:
        """The first `n` rows as a problem of their own."""
        hidden = self.hidden.detach()[:n].clone().requires_grad_()
        return self._replace(hidden=hidden, labels=self.labels[:n], rows=self.rows[self.rows < n])

    def flop(self) -> int:
        """Of the products that nobody can leave out: 6·M·V·D for z, dX and dW of the rows that have a label."""
        return 6 * len(self.rows) * self.weight.numel()

    def oracle(self) -> list[torch.Tensor]:
        """[loss, dX, dW] in fp64, a few rows at a time."""
        weight = self.weight.detach().double()
        dx, dw = torch.zeros_like(self.hidden.detach(), dtype=torch.float64), torch.zeros_like(weight)
        loss = dx.new_zeros(())
        for rows in self.rows.split(128):
            hidden = self.hidden.detach()[rows].double()
            logits = (hidden @ weight.T).requires_grad_()
            value = F.cross_entropy(logits, self.labels[rows], reduction="sum") / len(self.rows)
            (gradient,) = torch.autograd.grad(value, logits)
            dx[rows] = gradient @ weight
            dw += gradient.T @ hidden
            loss += value.detach()
        return [loss, dx, dw]


def make(case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    hidden = torch.randn(case.N, case.D, dtype=dtype, **options)
    weight = torch.randn(case.V, case.D, dtype=dtype, **options).mul_(LOGIT_STD * case.D**-0.5)
    rows = torch.randperm(case.N, **options)[: int(case.N * case.kept)].sort().values
    labels = torch.full((case.N,), -100, device=device)
    labels[rows] = torch.randint(case.V, (len(rows),), **options)
    return Problem(hidden.requires_grad_(), weight.requires_grad_(), labels, rows)


# -- implementations ---------------------------------------------------------------------------------------------------


def leaf(problem: Problem) -> Loss:
    hidden, weight, labels, rows = problem
    # Asked for, so that it is refused where there is no kernel, not replaced by something slow. Rows given: no host sync
    impl = "triton" if hidden.is_cuda else "auto"
    return lambda: linear_cross_entropy(hidden, weight, labels, rows=rows, impl=impl).loss / len(rows)


def eager(problem: Problem, compiled: bool = False) -> Loss:
    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    run = torch.compile(loss, dynamic=False) if compiled and problem.rows.is_cuda else loss
    return lambda: run(*problem[:3])


def liger(problem: Problem, accum_dtype: torch.dtype | None = None) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(**({} if accum_dtype is None else {"accum_dtype": accum_dtype}))
    return lambda: module(problem.weight, problem.hidden, problem.labels)


def cce(problem: Problem, **options: Any) -> Loss:
    from cut_cross_entropy import linear_cross_entropy as cut

    return lambda: cut(*problem[:3], **options)


PROVIDERS: dict[str, Callable[[Problem], Loss]] = {
    "leaf": leaf,
    "eager": eager,
    "compile": partial(eager, compiled=True),
    "liger": liger,
    "liger_fp32": partial(liger, accum_dtype=torch.float32),
    "cce": cce,
    "cce_exact": partial(cce, filter_eps=None),
}


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(case: Case, device: torch.device, deadline: Deadline) -> Iterator[Row]:
    """Rows of one case; see `losses.measure`."""
    facts = {"op": "linear_cross_entropy", "case": case.name, "dims": f"{case.D}/{case.V}", "tokens": case.N}
    return losses.measure(make(case, device), facts, PROVIDERS, deadline)


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
        environment(device, commit, PACKAGES),
        CASES,
        lambda case, deadline: measure(case, device, deadline),
        resume=resume,
        only=only,
    )


main = partial(command, __doc__, CASES, "cross_entropy", run)


if __name__ == "__main__":
    sys.exit(main())
