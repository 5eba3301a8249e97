"""`python -m leaf_kernels.testing`: what it prints, and that an op that is wrong does not pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import leaf_kernels
from leaf_kernels.testing import __main__ as command
from leaf_kernels.testing import assert_close_to_fp64, selfcheck

ROOT = Path(__file__).parents[2]
CPU = selfcheck.Where(torch.device("cpu"), torch.float32, "auto")
OPS = tuple(selfcheck.CHECKS)


def run(code: list[str], interpret: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": "", **environment}
    path = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(ROOT)]))
    command = [sys.executable, "-W", "ignore", *code]
    return subprocess.run(command, capture_output=True, text=True, env={**variables, "PYTHONPATH": path}, timeout=120)


def verdicts(output: str) -> dict[str, str]:
    lines = [line.split() for line in output.splitlines()]
    return {words[1]: words[0] for words in lines if words[:1] in (["ok"], ["FAIL"])}


def test_every_public_op_is_checked():
    helpers = {"deal", "pack_groups", "pack_sizes", "packed_sizes"}
    functions = {name for name in leaf_kernels.__all__ if name.islower() and not name.startswith("_")}
    assert functions - helpers == set(OPS)


@pytest.mark.parametrize(
    ("interpret", "served"),
    [("0", "what serves a CPU"), pytest.param("1", "in the interpreter", marks=pytest.mark.slow)],
)
def test_the_command_passes_here_without_pytest(interpret, served):
    as_command = "import runpy; runpy.run_module('leaf_kernels.testing', run_name='__main__')"
    done = run(["-c", f"import sys; sys.modules['pytest'] = None; {as_command}"], interpret)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts(done.stdout) == dict.fromkeys(OPS, "ok")
    assert served in done.stdout
    assert done.stdout.endswith("every op passed\n")
    for name in ("leaf-kernels", "python", "torch", "triton", "gpu"):
        assert any(line.startswith(f"{name} ") for line in done.stdout.splitlines())


@pytest.mark.parametrize(("interpret", "status"), [("0", 0), ("1", 1)])
def test_a_missing_triton_is_said_and_fails_only_where_it_is_needed(tmp_path, interpret, status):
    (tmp_path / "triton.py").write_text("raise ImportError('blocked')")
    done = run(["-m", "leaf_kernels.testing"], interpret, PYTHONPATH=str(tmp_path))
    assert done.returncode == status, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("triton "))
    assert "missing (blocked)" in line
    assert ("pip install triton" in line) == bool(status)
    assert set(verdicts(done.stdout).values()) == {"FAIL" if status else "ok"}


def spoilt(op):
    """The op with its main result slightly off, or one flag or span too many."""

    def wrong(*args, impl, **options):
        result = op(*args, impl=impl, **options)
        if impl == "reference":  # the specification stays
            return result
        first, *rest = [result] if isinstance(result, torch.Tensor) else result
        first = first * 1.001 if first.is_floating_point() else first.clone()
        if not first.is_floating_point():
            first[0] = 1 - first[0].int()
        return first if isinstance(result, torch.Tensor) else type(result)(first, *rest)

    return wrong


@pytest.mark.parametrize("op", OPS)
def test_a_broken_op_fails_by_name(monkeypatch, capsys, op):
    monkeypatch.setattr(command, "here", lambda: CPU)
    monkeypatch.setattr(selfcheck, op, spoilt(getattr(selfcheck, op)))
    assert command.main() == 1
    printed = capsys.readouterr().out
    assert verdicts(printed) == {name: "FAIL" if name == op else "ok" for name in OPS}
    assert printed.endswith(f"failed: {op}\n")


def test_an_op_that_raises_fails_with_its_error(monkeypatch):
    def raises(*args, **options):
        raise OSError("no ptxas")

    monkeypatch.setattr(selfcheck, "linear_kl", raises)
    (failed,) = (outcome for outcome in selfcheck.run(CPU) if outcome.failure)
    assert (failed.op, failed.failure) == ("linear_kl", "OSError: no ptxas")


def test_the_budget_returns_the_measure_that_comes_nearest_to_it():
    oracle = torch.zeros(4, dtype=torch.float64)
    plain = torch.tensor([1.0, 0.0, 0.0, 0.0])  # RMS 0.5, maximum 1
    assert assert_close_to_fp64(torch.full((4,), 0.9), plain, oracle) == pytest.approx((0.9, 1.0))  # maximum: 0.9 of 2
    assert assert_close_to_fp64(torch.tensor([1.8, 0, 0, 0]), plain, oracle, times=4) == pytest.approx((0.9, 2.0))
    assert assert_close_to_fp64(oracle, oracle, oracle) == (0.0, 0.0)
