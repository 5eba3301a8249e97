"""Every public op once, on small inputs, against fp64; what `python -m leaf_kernels.testing` prints. Needs no pytest."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import (
    SharedPrefixLayout,
    __version__,
    attention_mass,
    flag_tokens,
    flagged_spans,
    linear_cross_entropy,
    linear_kl,
    linear_kl_topk,
    pruned_attention,
    token_scores,
)
from .._runtime.launch import interpreted
from .attention import attention_in_chunks
from .budget import assert_close_to_fp64
from .ragged import ragged_lengths, ragged_starts

Accuracy = tuple[float, float]  # error and budget; (0, 0) where a result has to be exact

# The error of plain torch; twice what our tests allow, for a machine on which nobody has looked at the numbers
TIMES = 4.0
DS, DT, K = 48, 80, 16  # hidden sizes of student and teacher; entries of the teacher's top K


class Where(NamedTuple):
    """What is checked: the implementation `impl` on `device`, computing in `dtype`."""

    device: torch.device
    dtype: torch.dtype
    impl: str
    size: int = 1  # factor of all sizes

    @property
    def rows(self) -> int:
        return 64 * self.size

    @property
    def vocabulary(self) -> int:
        return 67 * self.size

    def normal(self, *shape: int, seed: int, std: float = 1.0) -> torch.Tensor:
        """The same numbers on every device."""
        return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).to(self.device, self.dtype)


def here() -> Where:
    """The kernels on an NVIDIA GPU and in Triton's interpreter, else what serves a CPU.

    The kernels are asked for by name, so that nothing else answers where they cannot run. The interpreter's 16-bit products
    are not those of a GPU, so fp32 there; and it is slow.
    """
    if torch.cuda.is_available() and torch.version.cuda:
        kernels = torch.cuda.get_device_capability() >= (8, 0)
        device = torch.device("cuda", torch.cuda.current_device())
        return Where(device, torch.bfloat16, "triton" if kernels else "auto", size=8)
    impl, size = ("triton", 1) if interpreted() else ("auto", 8)
    return Where(torch.device("cpu"), torch.float32, impl, size)


# -- the report --------------------------------------------------------------------------------------------------------


def environment(where: Where) -> Iterator[tuple[str, str]]:
    """What a result depends on, as names and values."""
    yield "leaf-kernels", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    yield "triton", _triton(where)
    if where.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(where.device)
        yield "gpu", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB, driver {_driver()}"
    else:
        yield "gpu", "none"
    yield "checked", _served(where)


def _triton(where: Where) -> str:
    try:
        import triton
    except ImportError as error:
        needed = where.impl == "triton"
        remedy = "no kernel can run: pip install triton" if needed else "a CPU needs none"
        return f"missing ({error}); {remedy}"
    return triton.__version__


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def _served(where: Where) -> str:
    dtype = str(where.dtype).removeprefix("torch.")
    if where.impl == "triton":
        return f"the Triton kernels in {dtype}, {'in the interpreter' if where.device.type == 'cpu' else 'on the GPU'}"
    if where.device.type == "cuda":
        return f"plain torch in {dtype}: the kernels need a GPU of compute capability 8.0"
    return f"what serves a CPU, in {dtype} (TRITON_INTERPRET=1: the kernels, in Triton's interpreter)"


class Outcome(NamedTuple):
    """Of one op; `failure` says why it failed and is empty where it passed."""

    op: str
    error: float = 0.0
    budget: float = 0.0
    failure: str = ""

    def __str__(self) -> str:
        measured = f"error {self.error:.1e}  budget {self.budget:.1e}" if self.budget else "exact"
        return f"{'FAIL' if self.failure else 'ok':6}{self.op:22}{self.failure or measured}"


def run(where: Where) -> Iterator[Outcome]:
    """The outcome of every public op, one after the other."""
    for op, check in CHECKS.items():
        try:
            yield Outcome(op, *check(where))
        except AssertionError as error:
            yield Outcome(op, failure=str(error))
        except Exception as error:  # a compiler, a driver, a missing package: each is for the user to read
            yield Outcome(op, failure=f"{type(error).__name__}: {error}")


# -- the checks --------------------------------------------------------------------------------------------------------


def _compare(
    names: Sequence[str],
    actual: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    oracle: Sequence[torch.Tensor],
    max_lse: float = 0.0,
) -> Accuracy:
    found = []
    for name, *triple in zip(names, actual, plain, oracle, strict=True):
        try:
            found.append(assert_close_to_fp64(*triple, max_lse=max_lse, times=TIMES))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return max(found, key=lambda pair: pair[0] / pair[1] if pair[1] else 0.0)


def _exact(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> Accuracy:
    wrong = sum(int((a != b).sum()) for a, b in zip(got, wanted, strict=True))
    if wrong:
        raise AssertionError(f"{wrong} values are not those of the specification on the same input")
    return 0.0, 0.0


def _pack(where: Where) -> tuple[SharedPrefixLayout, list[torch.Tensor]]:
    """Two sequences with a common prefix, and one alone; q and k, v, upstream of 2 heads and 1."""
    root, short = torch.arange(41 * where.size), torch.arange(5)
    layout, ids = SharedPrefixLayout.from_groups([[root, torch.cat([root[: len(root) // 2], root[-19:]])], [short]])
    tensors = [where.normal(len(ids), heads, 16, seed=n) for n, heads in enumerate((2, 1, 1, 2))]
    return layout.to(where.device), tensors


def _pruned_attention(where: Where) -> Accuracy:
    layout, tensors = _pack(where)
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    upstream = tensors[3]
    out: Any = pruned_attention(q, k, v, layout, impl=where.impl)
    actual = [out, *torch.autograd.grad(out, [q, k, v], upstream)]
    plain = attention_in_chunks(q, k, v, layout, upstream)
    oracle = attention_in_chunks(q.double(), k.double(), v.double(), layout, upstream.double())
    names = ("out", "dq", "dk", "dv")
    wanted = [getattr(plain, name) for name in names], [getattr(oracle, name) for name in names]
    return _compare(names, actual, *wanted)


def _attention_mass(where: Where) -> Accuracy:
    layout, (q, k, *_) = _pack(where)
    queries = torch.arange(len(q), device=where.device) % 3 == 0
    q, k = q.float(), k.float()  # rounded to `dtype` already; the plain result is that of fp32
    plain, oracle = (
        attention_mass(x, y, layout, queries=queries, impl="reference") for x, y in ((q, k), (q.double(), k.double()))
    )
    mass = attention_mass(q.to(where.dtype), k.to(where.dtype), layout, queries=queries, impl=where.impl)
    return _compare(["mass"], [mass], [plain], [oracle], max_lse=float(oracle.max()))


def _losses(where: Where, op: Callable[..., Any], plain: Callable[..., torch.Tensor], *constants: Any) -> Accuracy:
    """Loss per row, dX and dW of an op (hidden, weight, *constants) and of textbook code that returns the former.

    The oracle is the op's specification in fp64.
    """
    hidden = where.normal(where.rows, DS, seed=0)
    weight = where.normal(where.vocabulary, DS, seed=1, std=2 * DS**-0.5)

    def results(dtype: torch.dtype, run: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        others = [x.to(dtype) if x.is_floating_point() else x for x in constants]
        loss, per_row = run(*leaves, *others)
        return [per_row.detach(), *torch.autograd.grad(loss, leaves)]

    def textbook(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        per_row = plain(*tensors)
        return per_row.sum(), per_row

    actual = results(where.dtype, lambda *x: op(*x, impl=where.impl)[:2])
    oracle = results(torch.float64, lambda *x: op(*x, impl="reference")[:2])
    names = ("loss per row", "gradient of the hidden states", "gradient of the weight")
    return _compare(names, actual, results(where.dtype, textbook), oracle, max_lse=10)


def _log_probs(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(F.linear(hidden, weight), -1, dtype=torch.promote_types(hidden.dtype, torch.float32))


def _plain_kl(hidden: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    kl = F.kl_div(_log_probs(hidden, weight), _log_probs(teacher, head), reduction="none", log_target=True)
    return kl.sum(-1)


def _plain_kl_topk(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor
) -> torch.Tensor:
    """The K tokens, and one bucket that holds all others."""
    student = _log_probs(hidden, weight)
    kept, teacher = student.gather(-1, ids), log_probs.to(student.dtype)
    rest = (torch.log1p(-x.exp().sum(-1, keepdim=True)) for x in (kept, teacher))
    student, teacher = (torch.cat(pair, -1) for pair in zip((kept, teacher), rest))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _plain_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(_log_probs(hidden, weight), labels, reduction="none")


def _teacher(where: Where) -> tuple[torch.Tensor, torch.Tensor]:
    return where.normal(where.rows, DT, seed=2), where.normal(where.vocabulary, DT, seed=3, std=2 * DT**-0.5)


def _linear_kl(where: Where) -> Accuracy:
    return _losses(where, linear_kl, _plain_kl, *_teacher(where))


def _linear_kl_topk(where: Where) -> Accuracy:
    hidden, weight = _teacher(where)
    log_probs, ids = _log_probs(hidden.float(), weight.float()).topk(K)
    return _losses(where, linear_kl_topk, _plain_kl_topk, ids, log_probs)


def _linear_cross_entropy(where: Where) -> Accuracy:
    labels = torch.randint(where.vocabulary, (where.rows,), generator=torch.Generator().manual_seed(4)).to(where.device)
    return _losses(where, linear_cross_entropy, _plain_cross_entropy, labels)


def _gradients(where: Where) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of both models and segment_starts. Rows differ in length, so that the extent of the norms is large."""
    starts = ragged_starts(ragged_lengths(6, 30 * where.size))
    N = int(starts[-1])
    length = 0.1 + torch.arange(N, device=where.device).remainder(10)[:, None].to(where.dtype) / 10
    teacher, student = (where.normal(N, width, seed=width) * length for width in (DT, DS))
    return teacher, student, starts.to(where.device)


def _token_scores(where: Where) -> Accuracy:
    teacher, student, starts = _gradients(where)
    plain = token_scores(teacher, student, starts, impl="reference")
    oracle = token_scores(teacher.double(), student.double(), starts, impl="reference")
    actual = token_scores(teacher, student, starts, impl=where.impl)
    # A score's error is that of the norms over their extent, of the same size here
    return _compare(oracle._fields, actual, plain, oracle, max_lse=float(oracle.teacher_norm.max()))


def _scores(where: Where) -> tuple[torch.Tensor, torch.Tensor]:
    gradients = _gradients(where)
    return token_scores(*gradients, impl="reference").score, gradients[-1]


def _flag_tokens(where: Where) -> Accuracy:
    scores = _scores(where)
    got, wanted = (flag_tokens(*scores, q=0.2, impl=impl) for impl in (where.impl, "reference"))
    return _exact([got], [wanted])


def _flagged_spans(where: Where) -> Accuracy:
    score, starts = _scores(where)
    flags = flag_tokens(score, starts, q=0.5, impl="reference")
    got, wanted = (flagged_spans(flags, starts, impl=impl) for impl in (where.impl, "reference"))
    return _exact(got, wanted)


CHECKS: dict[str, Callable[[Where], Accuracy]] = {
    "pruned_attention": _pruned_attention,
    "attention_mass": _attention_mass,
    "linear_kl": _linear_kl,
    "linear_kl_topk": _linear_kl_topk,
    "linear_cross_entropy": _linear_cross_entropy,
    "token_scores": _token_scores,
    "flag_tokens": _flag_tokens,
    "flagged_spans": _flagged_spans,
}
