"""linear_kl against its own matrix products and other libraries: goals C1, C2, C6, C7. On a machine with an NVIDIA GPU:

    pip install trl liger-kernel fla-core                      # the peers; whichever is not there is recorded as absent
    python -m benchmarks.linear_kl --budget 540
    python -m benchmarks.linear_kl --budget 540 --continue     # where the first run was cut
    python benchmarks/tables.py                                # puts the results into the documentation

Writes benchmarks/results/<gpu>/linear_kl.json after every case. A time is forward and backward of the loss, a mean over
rows, with everything that takes: allocation, casts, zeroing. Student bf16 and trainable, teacher bf16 and frozen, random
inputs whose logits have a standard deviation of 2.5. Beside its times, every provider has

    loss_error, dx_error, dw_error   relative, against fp64, on the first 512 rows of the case as a problem of their own
    peak_bytes                       the most that was allocated beyond the inputs; total_bytes: with them
    largest_bytes                    the largest single allocation
    beyond_bytes                     peak_bytes less dX and the fp32 accumulator of dW, of which a peer without one is
                                     granted the bytes all the same

Ours is measured only if its errors are at most twice those of plain torch in bf16. A peer's errors are recorded; bounds far
outside of rounding catch one that computes something else. What cannot run is in the file as absent, with the reason.

    gemms           the products that ours runs, in the same chunks, and nothing else: what C1 divides by
    eager, compile  logits of both models, log_softmax in fp32, kl_div; the same under torch.compile
    released        the loss of the paper's code: softmaxes in fp32, a NaN where a probability is 0 replaced
    trl             the chunked divergence of DistillationTrainer. On a mask it leaves rows out, as we do
    liger_jsd       LigerFusedLinearJSD, whose beta = 0 is the forward KL; liger_jsd_fp32: dW accumulated in fp32
    liger_distill   Liger's chunked distillation loss, compiled; makes dW even where the weight is frozen
    fla, fla_bf16   FusedKLDivLoss, dW accumulated in fp32 (its default) and in bf16

On a CPU, `--output DIR` runs every step on tiny cases, nothing compiled; the numbers mean nothing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import losses
from benchmarks.losses import LOGIT_STD, Loss
from benchmarks.timing import Call, Deadline, Row, command, environment, judge, line, run_cases
from leaf_kernels import linear_kl

PACKAGES = ("trl", "liger-kernel", "fla-core")


# -- cases -------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Student ← teacher: widths of their hidden states, one vocabulary, N rows."""

    name: str
    Ds: int
    Dt: int
    V: int
    N: int = 8192
    kept: float = 1.0  # share of the rows whose weight is not 0
    frozen: bool = False  # the student's weight: dX only
    beta: float = 0.0  # 0 = forward KL, else JSD
    timed: bool = True  # otherwise only memory

    def tiny(self) -> Case:
        """For a CPU: the same kind of case, small enough to take no time."""
        return self._replace(Ds=self.Ds // 64, Dt=self.Dt // 64, V=self.V // 256, N=self.N // 64)


# The memory of many rows is last: whatever breaks there takes no other case with it
CASES = (
    Case("1B-8B", 2048, 4096, 128256),
    Case("1B-70B", 2048, 8192, 128256),
    Case("1.5B-72B", 1536, 8192, 151936),
    Case("1B-8B frozen", 2048, 4096, 128256, frozen=True),
    Case("1B-8B masked", 2048, 4096, 128256, kept=0.25),
    Case("1B-8B jsd", 2048, 4096, 128256, beta=0.5),
    Case("1B-8B 32k", 2048, 4096, 128256, N=32768, timed=False),
    Case("1B-8B 128k", 2048, 4096, 128256, N=131072, timed=False),
)


# -- goals -------------------------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """What is held against `wanted`, by `kind`:

    overhead: our time / the peer's; speedup: the peer's time / ours (the only one that has to be at least `wanted`);
    memory: GiB beyond inputs, dX and dW; error: our error / the peer's, of dX or dW, whichever is larger.
    """

    id: str
    case: str
    kind: str
    wanted: float
    stretch: float | None = None
    peer: str = ""


MAIN = ("1B-8B", "1B-70B", "1.5B-72B")
GOALS = (
    Goal("C1", "1B-70B", "overhead", 1.15, 1.08, "gemms"),
    Goal("C1", "1B-8B", "overhead", 1.25, None, "gemms"),
    Goal("C2", "1B-70B", "speedup", 1.6, 1.75, "trl"),
    Goal("C2", "1B-70B", "speedup", 1.7, 2.0, "liger_jsd"),
    Goal("C2", "1B-70B", "speedup", 2.4, 3.0, "fla"),
    Goal("C2", "1B-70B", "speedup", 0.95, 1.1, "fla_bf16"),
    Goal("C2", "1B-70B", "error", 1.0, None, "fla_bf16"),  # being as fast is worth something only with the lower error
    Goal("C2", "1B-8B", "speedup", 1.5, None, "trl"),
    *(Goal("C6", case, "memory", 2.0, 1.0) for case in ("1B-8B", "1B-8B 32k", "1B-8B 128k")),
    *(
        Goal("C7", case, "error", 1.0, None, peer)
        for case in MAIN
        for peer in ("trl", "liger_jsd", "liger_jsd_fp32", "liger_distill")
    ),
)
WHAT = {"overhead": "time / {}", "speedup": "{} / time", "memory": "GiB beyond inputs, dX, dW", "error": "error / {}"}


def verdicts(rows: Iterable[Row]) -> list[Row]:
    """Every goal held against the rows of one run: `passed` is None where something was not measured."""
    found = {(row["case"], row["provider"]): row for row in rows if "provider" in row and "absent" not in row}
    out = []
    for goal in GOALS:
        needed = {"memory": "beyond_bytes", "error": "dx_error"}.get(goal.kind, "ms")
        names = ("leaf", goal.peer) if goal.peer else ("leaf",)
        both = [found.get((goal.case, name), {}) for name in names]
        verdict: Row = {"goal": goal.id, "case": goal.case, "what": WHAT[goal.kind].format(goal.peer), "passed": None}
        out.append(verdict)
        if missing := [name for name, row in zip(names, both) if needed not in row]:
            verdict["reason"] = "not measured: " + ", ".join(missing)
            continue
        value, at_most, timed = _value(goal.kind, *both), goal.kind != "speedup", needed == "ms"
        spread = both[0]["aa_spread"] if timed else 0.0
        verdict |= judge(value, goal.wanted, goal.stretch, at_most=at_most, spread=spread)
        verdict["roofline"] = both[0].get("roofline") if timed else None
    return out


def _value(kind: str, ours: Row, peer: Row | None = None) -> float:
    if kind == "memory":
        return ours["beyond_bytes"] / 2**30
    if kind == "error":
        return max(ours[name] / peer[name] for name in ("dx_error", "dw_error"))
    return ours["ms"] / peer["ms"] if kind == "overhead" else peer["ms"] / ours["ms"]


# -- problems ----------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """loss = mean over `rows` of the divergence. The teacher's tensors require no grad, the student's do where trained."""

    student_hidden: torch.Tensor  # [N, Ds]
    student_weight: torch.Tensor  # [V, Ds]
    teacher_hidden: torch.Tensor  # [N, Dt]
    teacher_weight: torch.Tensor  # [V, Dt]
    rows: torch.Tensor  # [M] int64, ascending; the others have weight 0
    beta: float

    @property
    def masked(self) -> bool:
        return len(self.rows) < len(self.student_hidden)

    @property
    def trained(self) -> list[torch.Tensor]:
        return [x for x in (self.student_hidden, self.student_weight) if x.requires_grad]

    def token_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[N]"""
        weight = torch.zeros(len(self.student_hidden), dtype=dtype, device=self.rows.device)
        return weight.index_fill_(0, self.rows, 1 / len(self.rows))

    def labels(self) -> torch.Tensor:
        """[N] int64, as peers mark rows: −100 = weight 0. What else it holds does not matter."""
        return torch.full((len(self.student_hidden),), -100, device=self.rows.device).index_fill_(0, self.rows, 0)

    def first(self, n: int) -> Problem:
        """The first `n` rows as a problem of their own."""
        hidden = self.student_hidden.detach()[:n].clone().requires_grad_()
        return self._replace(
            student_hidden=hidden, teacher_hidden=self.teacher_hidden[:n], rows=self.rows[self.rows < n]
        )

    def flop(self) -> int:
        """Of the products that nobody can leave out: 6·M·V·Ds for z, dX, dW of the student, 2·M·V·Dt for z of the teacher.

        M are the rows that count; without a dW 4·M·V·Ds.
        """
        (V, Ds), Dt = self.student_weight.shape, self.teacher_weight.shape[1]
        return 2 * len(self.rows) * V * ((1 + len(self.trained)) * Ds + Dt)

    def oracle(self) -> list[torch.Tensor]:
        """[loss, dX, dW] in fp64, a few rows at a time; without dW where the weight is frozen."""
        weights = [x.detach().double() for x in (self.student_weight, self.teacher_weight)]
        dx = torch.zeros_like(self.student_hidden, dtype=torch.float64, requires_grad=False)
        dw, loss = torch.zeros_like(weights[0]), dx.new_zeros(())
        for rows in self.rows.split(128):
            student, teacher = (x.detach()[rows].double() for x in (self.student_hidden, self.teacher_hidden))
            logits = (student @ weights[0].T).requires_grad_()
            log_teacher = F.log_softmax(teacher @ weights[1].T, -1)
            value = divergence(F.log_softmax(logits, -1), log_teacher, self.beta).sum() / len(self.rows)
            (gradient,) = torch.autograd.grad(value, logits)
            dx[rows] = gradient @ weights[0]
            dw += gradient.T @ student
            loss += value.detach()
        return [loss, dx, dw] if self.student_weight.requires_grad else [loss, dx]


def make(case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, dim: int, std: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, dim, generator=generator, device=device, dtype=dtype).mul_(std)

    hidden = normal(case.N, case.Ds).requires_grad_()
    weight = normal(case.V, case.Ds, LOGIT_STD * case.Ds**-0.5).requires_grad_(not case.frozen)
    teacher = normal(case.N, case.Dt), normal(case.V, case.Dt, LOGIT_STD * case.Dt**-0.5)
    kept = torch.randperm(case.N, generator=generator, device=device)[: int(case.N * case.kept)]
    return Problem(hidden, weight, *teacher, kept.sort().values, case.beta)


# -- implementations ---------------------------------------------------------------------------------------------------


def leaf(problem: Problem) -> Loss:
    token_weight = problem.token_weight()
    divergence = {"divergence": "jsd", "beta": problem.beta} if problem.beta else {"divergence": "forward_kl"}
    options = {**divergence, "rows": problem.rows, "token_weight": token_weight}  # rows given: no host sync
    # Asked for, so that it is refused where there is no kernel, not replaced by something slow
    impl = "triton" if token_weight.is_cuda else "auto"
    return lambda: linear_kl(*problem[:4], **options, impl=impl).loss


def eager(problem: Problem, compiled: bool = False) -> Loss:
    def loss(
        student_hidden: torch.Tensor,
        student_weight: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
        token_weight: torch.Tensor,
    ) -> torch.Tensor:
        log_student = F.log_softmax(F.linear(student_hidden, student_weight), -1, dtype=torch.float32)
        log_teacher = F.log_softmax(F.linear(teacher_hidden, teacher_weight), -1, dtype=torch.float32)
        return (divergence(log_student, log_teacher, problem.beta) * token_weight).sum()

    run = torch.compile(loss, dynamic=False) if compiled and problem.rows.is_cuda else loss
    token_weight = problem.token_weight()
    return lambda: run(*problem[:4], token_weight)


def released(problem: Problem) -> Loss:
    if problem.beta:
        raise NotImplementedError("knows no JSD")
    token_weight = problem.token_weight()

    def loss() -> torch.Tensor:
        student, teacher = (F.softmax(F.linear(*pair).float(), -1) for pair in (problem[:2], problem[2:4]))
        values = torch.nan_to_num((teacher * (teacher.log() - student.log())).sum(-1))
        return (values * token_weight).sum()

    return loss


def divergence(log_student: torch.Tensor, log_teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """Of [.., V] log-probabilities: the textbook formulas, in torch's words."""

    def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    if beta == 0:
        return kl(log_teacher, log_student)
    log_mean = torch.logaddexp(log_teacher + math.log(beta), log_student + math.log1p(-beta))
    return beta * kl(log_teacher, log_mean) + (1 - beta) * kl(log_student, log_mean)


def trl(problem: Problem) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student_hidden, student_weight, teacher_hidden, teacher_weight, rows, beta = problem
    valid = problem.labels() == 0

    def loss() -> torch.Tensor:
        hidden = (student_hidden[valid], teacher_hidden[valid]) if problem.masked else (student_hidden, teacher_hidden)
        # After each hidden state and weight a bias; temperature, and logit scale and softcap of both
        student, teacher = (hidden[0], student_weight, None), (hidden[1], teacher_weight, None)
        values, _ = ChunkedDivergenceFunction.apply(*student, *teacher, beta, 1.0, 1.0, None, 1.0, None)
        return values.sum() / len(rows)

    return loss


def liger_jsd(problem: Problem, accum_dtype: torch.dtype | None = None) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearJSD

    # beta is the teacher's share of the mixture, as in ours, and 0 stands for the forward KL
    options = {} if accum_dtype is None else {"accum_dtype": accum_dtype}
    module = LigerFusedLinearJSD(jsd_beta=problem.beta, **options)
    labels = problem.labels() if problem.masked else None
    return lambda: module(*problem[:4], labels)


def liger_distill(problem: Problem) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=problem.beta, compiled=problem.rows.is_cuda
    )
    labels = problem.labels()
    return lambda: module(*problem[:4], labels)


def fla(problem: Problem, **options: bool) -> Loss:
    from fla.modules import FusedKLDivLoss

    if problem.masked or problem.beta:
        raise NotImplementedError("knows no mask and no JSD")
    module = FusedKLDivLoss(**options)
    student_hidden, student_weight, teacher_hidden, teacher_weight, *_ = problem
    return lambda: module(student_hidden, teacher_hidden, student_weight, teacher_weight)


PROVIDERS: dict[str, Callable[[Problem], Loss]] = {
    "leaf": leaf,
    "eager": eager,
    "compile": partial(eager, compiled=True),
    "released": released,
    "trl": trl,
    "liger_jsd": liger_jsd,
    "liger_jsd_fp32": partial(liger_jsd, accum_dtype=torch.float32),
    "liger_distill": liger_distill,
    "fla": fla,
    "fla_bf16": partial(fla, accumulate_grad_in_fp32=False),
}


def observed_chunk_rows(run: Callable[[], object], problem: Problem) -> int:
    """How many rows at a time ours multiplies by the student's weight. Watched, as the choice is its own business."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        run()
    V, D = problem.student_weight.shape
    shapes = [event.input_shapes for event in profile.events() if event.name == "aten::mm"]
    rows = [left[0] for left, right, *_ in shapes if right == [D, V]]
    if not rows:
        raise RuntimeError(f"saw no product with [{D}, {V}]")
    return max(rows)


def gemms(problem: Problem, chunk_rows: int) -> Callable[[], None]:
    """z of both models, dX, dW in chunks: bf16 operands, fp32 results, into buffers that are there already."""
    rows, on_gpu = problem.rows, problem.rows.is_cuda
    # torch multiplies bf16 into fp32 on CUDA only; a CPU gets wide operands
    operand = torch.bfloat16 if on_gpu else torch.float32
    wide = {"out_dtype": torch.float32} if on_gpu else {}
    student_weight, teacher_weight = (x.detach().to(operand) for x in (problem.student_weight, problem.teacher_weight))
    hidden = [x.detach()[rows].to(operand).split(chunk_rows) for x in (problem.student_hidden, problem.teacher_hidden)]
    (V, D), device = student_weight.shape, rows.device
    buffer = torch.empty(2, chunk_rows, V, device=device)
    gradient = torch.randn(chunk_rows, V, device=device, dtype=operand)
    dx, dw = torch.empty(len(rows), D, device=device), torch.zeros(V, D, device=device)

    def run() -> None:
        for student, teacher, out in zip(*hidden, dx.split(chunk_rows)):
            n = len(student)
            torch.mm(student, student_weight.T, out=buffer[0, :n], **wide)
            torch.mm(teacher, teacher_weight.T, out=buffer[1, :n], **wide)
            torch.mm(gradient[:n], student_weight, out=out, **wide)
            if problem.student_weight.requires_grad:
                torch.addmm(dw, gradient[:n].T, student, out=dw, **wide)

    return run


# -- measuring ---------------------------------------------------------------------------------------------------------


def products(problem: Problem, ours: Call) -> tuple[int, Callable[[], None]]:
    """Rows per chunk of ours, and its matrix products in such chunks."""
    chunk_rows = observed_chunk_rows(lambda: ours.run(None), problem)
    return chunk_rows, gemms(problem, chunk_rows)


def measure(case: Case, device: torch.device, deadline: Deadline) -> Iterator[Row]:
    """Rows of one case; see `losses.measure`."""
    facts = {
        "op": "linear_kl",
        "case": case.name,
        "dims": f"{case.Ds}/{case.Dt}/{case.V}",
        "tokens": case.N,
        "divergence": f"jsd {case.beta}" if case.beta else "forward_kl",
        "frozen": case.frozen,
    }
    return losses.measure(make(case, device), facts, PROVIDERS, deadline, timed=case.timed, products=products)


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
        verdicts,
        lambda rows: map(line, verdicts(rows)),
        resume=resume,
        only=only,
    )


main = partial(command, __doc__, CASES, "linear_kl", run)


if __name__ == "__main__":
    sys.exit(main())
