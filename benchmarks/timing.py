"""How the GPU benchmarks measure: interleaved timings, anchors, what ran where, a run case by case. Knows no op.

Times are those of the device (CUDA events), with a cold L2 cache and every launch queued in advance. On a CPU the same code
runs with the wall clock, so that it can be tried out; such numbers are for nobody, and no verdict on them is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from leaf_kernels._runtime.launch import slug
from leaf_kernels.testing import AllocationRecorder

RESULTS = Path(__file__).parent / "results"
ROUNDS, PER_ROUND = 5, 10  # 50 samples of every call

Row = dict[str, Any]


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

    @classmethod
    def of(cls, values: list[float]) -> Timing:
        cuts = statistics.quantiles(values, n=5)
        return cls(statistics.median(values), cuts[0], cuts[-1], len(values))

    def columns(self, spread: float) -> Row:
        """Of a row of results; `spread` as `interleave` returns it."""
        own = {"ms": self.median, "p20_ms": self.p20, "p80_ms": self.p80, "samples": self.samples}
        return {**own, "rounds": ROUNDS, "aa_spread": spread}


def interleave(
    calls: dict[str, Call], device: torch.device, deadline: Deadline, per_round: int | None = None
) -> tuple[dict[str, Timing], float]:
    """Times of calls that take turns, so that clocks and heat treat them alike, and the A–A spread.

    The first call opens and closes each round. The spread is the largest relative difference of these two medians of one
    and the same call: differences between calls of less than twice that mean nothing. `per_round`: samples, for calls so
    long that PER_ROUND are too many.
    """
    count = per_round or PER_ROUND
    first, samples, spread = next(iter(calls)), {name: list[float]() for name in calls}, 0.0
    scratch = torch.empty(2**28 if device.type == "cuda" else 1, dtype=torch.int8, device=device)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            deadline.check()
            samples[name] += _sample(call, device, scratch, count)
        again = _sample(calls[first], device, scratch, count)
        opening = statistics.median(samples[first][-count:])
        spread = max(spread, abs(statistics.median(again) / opening - 1))
    return {name: Timing.of(values) for name, values in samples.items()}, spread


def _sample(call: Call, device: torch.device, scratch: torch.Tensor, count: int) -> list[float]:
    """Times in ms, after one run that is not counted."""
    if device.type != "cuda":
        times = []
        for _ in range(count + 1):
            state, start = call.setup(), time.perf_counter()
            call.run(state)
            times.append(1e3 * (time.perf_counter() - start))
        return times[1:]
    marks, host = [], 0.0
    for _ in range(count + 1):
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


def allocated(call: Call, device: torch.device, warm: bool = True) -> Row:
    """Columns of what one run allocates beyond what was there: the most at one time, and the largest single allocation.

    Tensors of our operators count like those of everybody else. On a CPU they are those that torch's dispatcher sees; on
    CUDA all that is asked of torch's allocator, the libraries' and Triton code's as well. `warm`: after a run in which
    compilation and cuBLAS allocate.
    """
    if warm:
        call.run(call.setup())
    state = call.setup()
    if device.type != "cuda":
        with AllocationRecorder() as recorder:
            call.run(state)
        return {"peak_bytes": recorder.peak, "largest_bytes": recorder.largest}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    largest = _largest_allocation(lambda: call.run(state), device)
    return {"peak_bytes": torch.cuda.max_memory_allocated(device) - before, "largest_bytes": largest}


def _largest_allocation(run: Callable[[], object], device: torch.device) -> int | None:
    """From the history of torch's CUDA allocator; None where it keeps none."""
    history = torch.cuda.memory
    if history.get_allocator_backend() != "native":
        run()
        return None
    history._record_memory_history(context=None, stacks="python")  # sizes, no tracebacks
    try:
        run()
        entries = history._snapshot()["device_traces"][torch.cuda.device(device).idx]
    finally:
        history._record_memory_history(enabled=None)
    return max((entry["size"] for entry in entries if entry["action"] == "alloc"), default=None)


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


def floor_ms(row: Row, anchor: Row) -> float | None:
    """What the work of a row takes at least: its `flop` at the speed of the anchor's matmul, or its `bytes` at that of its
    copy, whichever is longer. None where the row states neither, and on a CPU, where the anchors are no roofline.

    Both are those of the case, whatever an implementation computes or reads beyond: fractions of a case compare like times.
    """
    if anchor["gpu"] == "none":
        return None
    speeds = {"flop": 1e9 * anchor["matmul_tflop_s"], "bytes": 1e6 * anchor["copy_gb_s"]}
    return max((row[what] / speed for what, speed in speeds.items() if what in row), default=None)


# -- what ran where ----------------------------------------------------------------------------------------------------


def environment(device: torch.device, commit: str | None = None, packages: Sequence[str] = ()) -> dict[str, Any]:
    """What a result depends on and does not change while it is measured. `commit` where there is no git."""
    versions = {name.replace("-", "_"): _version(name) for name in ("triton", *packages)}
    facts = {"torch": torch.__version__, **versions, "commit": commit or _commit()}
    if device.type != "cuda":
        return {"gpu": "none", "processor": platform.processor() or platform.machine(), **facts}
    fixed = _nvidia_smi(device, {"driver": "driver_version", "power_limit_w": "power.limit"})
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": capability,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
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
    """The same for the same code only: with a hash of what is changed; never the same where it is not known."""

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, check=True).stdout

    try:
        head = git("rev-parse", "HEAD").decode().strip()
        changes = git("diff", "HEAD", "--", ":/", ":!/benchmarks/results")
    except (OSError, subprocess.SubprocessError):
        return f"unknown {os.urandom(4).hex()}"
    return head + (f"+changes.{hashlib.sha256(changes).hexdigest()[:8]}" if changes else "")


def write_json(path: Path, content: object) -> None:
    """At once or not at all: a run that is cut leaves the file of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)


# -- a run -------------------------------------------------------------------------------------------------------------


def usable(device: torch.device) -> bool:
    """False after an illegal access or an assertion on the device: then every call fails, in this process only."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def reason(error: Exception) -> str:
    """Why something is absent, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def judge(
    value: float, wanted: float, stretch: float | None = None, *, at_most: bool = False, spread: float = 0.0
) -> Row:
    """Columns of a verdict: a value held against the bound of its goal and the further one, if there is one.

    `noise` says that the value could lie on either side of `wanted`: within twice `spread`, the A–A spread of its times.
    """

    def met(bound: float) -> bool:
        return value <= bound if at_most else value >= bound

    return {
        "value": value,
        "at_most": at_most,
        "wanted": wanted,
        "stretch": stretch,
        "noise": abs(value / wanted - 1) < 2 * spread,
        "passed": met(wanted),
        "passed_stretch": None if stretch is None else met(stretch),
    }


def line(verdict: Row) -> str:
    """Of a goal that bounds a value; `passed` is None where it was not measured, and `reason` says why."""
    head = f"{verdict['goal']:4}{verdict['case']}, {verdict['what']}: "
    if verdict["passed"] is None:
        return head + verdict["reason"]
    bound = f"at {'most' if verdict['at_most'] else 'least'} {verdict['wanted']:.2f}"
    word = "reached" if verdict["passed"] else "missed"
    return f"{head}{verdict['value']:.2f}, wanted {bound}: {word}" + (", within noise" if verdict["noise"] else "")


def rooflines(rows: Iterable[Row]) -> Iterator[str]:
    """How much of the roofline our times are."""
    for row in rows:
        if row.get("provider") == "leaf" and row.get("roofline"):
            yield f"{row['case']}, {row['mode']}: {row['ms']:.3f} ms, {row['roofline']:.0%} of the roofline"


def parser(description: str | None, cases: Iterable[str]) -> argparse.ArgumentParser:
    """The options that every GPU benchmark has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start no work after this")
    options.add_argument("--continue", dest="resume", action="store_true", help="keep the cases that are in the file")
    options.add_argument("--cases", nargs="+", choices=list(cases), default=())
    options.add_argument("--output", type=Path, help="folder of the result (default: benchmarks/results/<gpu>)")
    options.add_argument("--commit", help="the commit to state where the checkout has no git")
    return options


def place(parser: argparse.ArgumentParser, output: Path | None) -> tuple[torch.device, Path]:
    """The device to measure, and the folder of its results."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        return device, output or RESULTS / slug(torch.cuda.get_device_name(device))
    if output is None:
        parser.error("no NVIDIA GPU here; --output DIR tries the command out on the CPU, on tiny cases")
    torch.set_num_threads(1)  # the cases are so small that a second thread only waits
    return torch.device("cpu"), output


def command(
    description: str | None,
    cases: Iterable[Any],
    name: str,
    run: Callable[..., bool],
    arguments: list[str] | None = None,
) -> int:
    """The command of a benchmark: its options, handed to `run`, which measures into `<name>.json`; the exit status."""
    options = parser(description, (case.name for case in cases))
    chosen = options.parse_args(arguments)
    device, folder = place(options, chosen.output)
    path = folder / f"{name}.json"
    return 0 if run(path, device, chosen.budget, resume=chosen.resume, commit=chosen.commit, only=chosen.cases) else 1


def run_cases(
    path: Path,
    device: torch.device,
    budget: float,
    where: Row,
    cases: Iterable[Any],
    measure: Callable[[Any, Deadline], Iterable[Row]],
    verdicts: Callable[[list[Row]], list[Row]] = lambda rows: [],
    summary: Callable[[list[Row]], Iterable[str]] = lambda rows: (),
    *,
    resume: bool,
    only: Iterable[str],
    rows: list[Row] | None = None,
) -> bool:
    """Measures the cases into `path`, case by case. True: every case is there, and our implementation ("leaf") in each.

    A case has a `name`, and `tiny()` for a CPU. `where` is the environment; `summary` says the outcome in lines.
    `rows`, empty, collects the rows, for a `measure` that goes by those before. Every row with a time gets its `roofline`:
    `floor_ms` by the anchors of this run over that time, or None. What a case fails with is its reason to be without ours,
    and the next one follows, unless CUDA is of no use any more: then the run ends, the rows of the case are marked `lost`,
    and the next run measures it again, after the cases that this one did not reach.
    """
    cases, deadline, rows = list(cases), Deadline(budget), [] if rows is None else rows
    if resume and path.exists():  # only what was measured by the same code on the same machine goes on
        before = [row for row in json.loads(path.read_text())["rows"] if where.items() <= row.items()]
        lost = {row["case"] for row in before if "lost" in row}
        rows += [row for row in before if row["case"] not in lost]
        cases.sort(key=lambda case: case.name in lost)
    done, todo = {row["case"] for row in rows}, ["anchors", *(only or (case.name for case in cases))]

    def add(new: Iterable[Row]) -> None:
        new = [{**row, **where} for row in new]
        anchor = next(row for row in (*rows, *new) if row["case"] == "anchors")
        for row in new:
            if "ms" in row:
                floor = floor_ms(row, anchor)
                row["roofline"] = floor and floor / row["ms"]
        rows.extend(new)
        write_json(path, {"rows": rows, "goals": verdicts(rows)})

    def attempt(case: Any) -> Iterator[Row]:
        try:
            yield from measure(case if device.type == "cuda" else case.tiny(), deadline)
        except OutOfTime:
            raise
        except Exception as error:
            traceback.print_exc()
            yield {"case": case.name, "provider": "leaf", "absent": reason(error)}

    try:
        if "anchors" not in done:
            add([{"case": "anchors", **anchors(device, deadline), **state(device)}])
        for case in cases:
            if case.name in todo and case.name not in done:
                deadline.check()
                print(f"{case.name} …", flush=True)
                new = list(attempt(case))
                if not usable(device):
                    add({**row, "lost": True} for row in new)
                    print(f"{case.name} made CUDA unusable for this process; --continue goes on")
                    break
                add(new)
    except OutOfTime:
        print(f"out of time after {budget:.0f} s; --continue goes on")
    missing = [name for name in todo if name not in {row["case"] for row in rows if "lost" not in row}]
    for row in rows:
        if "absent" in row:
            print(f"{row['case']}: {row['provider']} is absent: {row['absent']}")
    if where["gpu"] != "none":  # on a CPU times are for nobody
        for line in [*rooflines(rows), *summary(rows)]:
            print(line)
    print(f"{path}: " + (f"still to measure: {', '.join(missing)}" if missing else "complete"))
    return not missing and not any(row["provider"] == "leaf" for row in rows if "absent" in row)
