"""Everything that a GPU has to show, for a machine that is there for minutes only:

    python -m benchmarks.gpu --budget 540                        # stage after stage, until 540 s are over
    python -m benchmarks.gpu --budget 540                        # once more: goes on where it was cut
    python -m benchmarks.gpu --budget 540 --stage attention      # one stage
    python benchmarks/tables.py                                  # puts the results into the documentation

    check        `python -m leaf_kernels.testing`, then `pytest -m gpu`: are the ops right here, and how long do first calls
                 take? Writes check.json
    attention    benchmarks.attention
    kl           benchmarks.linear_kl
    ce           benchmarks.cross_entropy
    scores       benchmarks.token_scores
    mass         benchmarks.attention_mass
    scoring      benchmarks.scoring_gpu: the teacher's scoring pass
    e2e          benchmarks.e2e: training steps and the longest context
    demo         benchmarks.demo_gpu: the built-in task with a teacher of 52M parameters, in many runs

Each stage is a process of its own, so that a crash takes no other stage with it; it starts no work after nine tenths of what
is left of the budget and is ended with it. Results are in benchmarks/results/<gpu>/, written after every case; what was
measured by the same commit on the same machine is kept, all else is measured again. Exit status 0: all is there, and right.

Peers that are not installed are recorded as absent. Where there is no network, bring their wheels:

    pip download --no-deps -d wheels trl liger-kernel fla-core cut-cross-entropy einops      # elsewhere
    python -m benchmarks.gpu --budget 540 --wheels wheels

The wheels of that folder, all of them and nothing else, are installed into a temporary folder that the stages import from.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.timing import Row, environment, judge, line, place, write_json
from leaf_kernels.testing import selfcheck

ROOT = Path(__file__).parents[1]
BENCHMARKS = {
    "attention": "benchmarks.attention",
    "kl": "benchmarks.linear_kl",
    "ce": "benchmarks.cross_entropy",
    "scores": "benchmarks.token_scores",
    "mass": "benchmarks.attention_mass",
    "scoring": "benchmarks.scoring_gpu",
    "e2e": "benchmarks.e2e",
    "demo": "benchmarks.demo_gpu",
}
STAGES = ("check", *BENCHMARKS)
TESTS: tuple[str, ...] = ("-m", "gpu", "tests/kernels", "tests/leaf/test_trainer_gpu.py")
OUTCOME = re.compile(r"^(\S+\.py::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)


class Run(NamedTuple):
    """What the stages share. `end` is a time of `time.monotonic`."""

    device: torch.device
    folder: Path
    end: float
    commit: str | None
    variables: dict[str, str]  # environment of the processes

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def execute(command: Sequence[str], run: Run, log: Path | None = None) -> int | None:
    """Exit status of a command, which prints into `log`; None: the budget ended first, and with it the command."""
    out = log.open("w") if log else None
    process = subprocess.Popen(
        [sys.executable, "-u", *command], cwd=ROOT, env=run.variables, stdout=out, stderr=out, start_new_session=True
    )
    try:
        return process.wait(None if math.isinf(run.left) else max(run.left, 0))
    except BaseException as error:  # out of time, or interrupted: nothing of it goes on, its compilers neither
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return None
    finally:
        if out:
            out.close()


def benchmark(stage: str, run: Run) -> bool:
    """True: every case is there and ours met its bounds."""
    command = ["-m", BENCHMARKS[stage], "--continue", "--output", str(run.folder)]
    if not math.isinf(run.left):
        command += ["--budget", f"{0.9 * run.left:.0f}"]
    return execute(command + (["--commit", run.commit] if run.commit else []), run) == 0


# -- check -------------------------------------------------------------------------------------------------------------


def check(run: Run) -> bool:
    """True: every op passed, and every test that applies here."""
    path, where = run.folder / "check.json", environment(run.device, run.commit)
    before = _same(path, where)
    # Tests that the same code passed on the same machine need not run again
    tests = {name: outcome for name, outcome in before.get("tests", {}).items() if outcome in ("passed", "skipped")}
    result: Row = {"environment": where, "self_check": [], "tests": tests, "tests_complete": False}
    result |= {name: before[name] for name in ("first_calls", "goals") if name in before}

    # In a process of its own: after an illegal access a GPU is lost to the process that made it
    with tempfile.TemporaryDirectory() as temporary:
        outcomes = Path(temporary) / "outcomes.json"
        status = execute(["-m", "benchmarks.gpu", "--self-check", str(outcomes)], run)
        result["self_check"] = json.loads(outcomes.read_text()) if outcomes.exists() else []
        result["self_check_status"] = status
        write_json(path, result)

        log, first_calls = Path(temporary) / "pytest.log", Path(temporary) / "first_calls.json"
        own = run._replace(variables={**run.variables, "LEAF_FIRST_CALLS": str(first_calls)})
        skip = [f"--deselect={test}" for test in tests]
        status = execute(
            ["-m", "pytest", "-v", "--tb=short", "-rfE", "-p", "no:cacheprovider", *TESTS, *skip], own, log
        )
        printed = log.read_text()
        if first_calls.exists():
            result["first_calls"] = json.loads(first_calls.read_text())
            result["goals"] = [first_calls_verdict(result["first_calls"])]
    print("\n".join([*printed.splitlines()[-200:], *map(line, result.get("goals", ()))]))
    tests |= {name: outcome.lower() for name, outcome in OUTCOME.findall(printed)}
    # 0: all passed. 1: some failed. 5: none was left to run
    result |= {"tests_complete": status in (0, 1, 5), "pytest_status": status}
    write_json(path, result)
    failed = [name for name, outcome in tests.items() if outcome in ("failed", "error", "xpass")]
    passed = result["self_check_status"] == 0 and result["tests_complete"] and not failed
    print(f"{path}: {len(tests)} tests, failed: {', '.join(failed) or 'none'}; {'all done' if passed else 'not done'}")
    return passed


def first_calls_verdict(measured: Row) -> Row:
    """D4, of what tests/kernels/test_precompiled_gpu.py wrote; missed too where a kernel was compiled that was there."""
    start, *calls = (seconds["carried"] for seconds in measured["seconds"].values())
    verdict = judge(start + max(calls), 2.0, 0.5, at_most=True)
    if measured["compiled_though_carried"]:
        verdict |= {"passed": False, "passed_stretch": False}
    return {"goal": "D4", "case": "fresh process", "what": "longest first call, s", **verdict}


def _same(path: Path, where: Row) -> Row:
    """What was found before, if the same code found it on the same machine."""
    before: Row = json.loads(path.read_text()) if path.exists() else {}
    return before if before.get("environment") == where else {}


def self_check(path: Path) -> int:
    """`python -m leaf_kernels.testing`, with its outcomes in a file."""
    where = selfcheck.here()
    outcomes = []
    for outcome in selfcheck.run(where):
        print(outcome, flush=True)
        outcomes.append({**outcome._asdict(), "impl": where.impl, "dtype": str(where.dtype).removeprefix("torch.")})
        write_json(path, outcomes)
    return int(any(outcome["failure"] for outcome in outcomes))


def half(run: Run, only: str | None) -> Run:
    """`check` compiles everything: it leaves half of the budget to the stages that follow, and goes on the next time."""
    return run if only else run._replace(end=time.monotonic() + run.left / 2)


def _only(device: torch.device) -> dict[str, str]:
    """What hides all other GPUs from the stages."""
    if device.type != "cuda":
        return {}
    visible, index = os.environ.get("CUDA_VISIBLE_DEVICES"), device.index or 0
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[index] if visible else str(index)}


# -- peers -------------------------------------------------------------------------------------------------------------


def install(wheels: Path, target: Path) -> None:
    """Every wheel of a folder into `target`, and nothing else.

    Raises:
        ValueError: there is none.
    """
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        raise ValueError(f"--wheels {wheels}: no *.whl in there")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, *found], check=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="of all stages together")
    parser.add_argument("--stage", choices=STAGES, help="only this one")
    parser.add_argument("--output", type=Path, help="folder of the results (default: benchmarks/results/<gpu>)")
    parser.add_argument("--commit", help="the commit to state where the checkout has no git")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder of wheels of the peers")
    parser.add_argument("--self-check", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.self_check:
        return self_check(chosen.self_check)
    end = time.monotonic() + chosen.budget
    device, folder = place(parser, chosen.output)
    with tempfile.TemporaryDirectory() as peers:
        if chosen.wheels:
            try:
                install(chosen.wheels, Path(peers))
            except (ValueError, subprocess.CalledProcessError) as error:
                parser.error(str(error))
        path = os.pathsep.join(filter(None, [str(ROOT), peers, os.environ.get("PYTHONPATH")]))
        run = Run(device, folder.resolve(), end, chosen.commit, {**os.environ, **_only(device), "PYTHONPATH": path})
        done = {}
        for stage in [chosen.stage] if chosen.stage else STAGES:
            if run.left > 0:
                print(f"-- {stage}", flush=True)
                done[stage] = check(half(run, chosen.stage)) if stage == "check" else benchmark(stage, run)
            else:
                done[stage] = False
    missing = [stage for stage, complete in done.items() if not complete]
    print(f"not done: {', '.join(missing)}; the same command goes on" if missing else "all done")
    return 1 if missing else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an interrupt: the stage ends too
    sys.exit(main())
