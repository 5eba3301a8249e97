"""Shipped configurations compile for every architecture without spills: `make compile-gate`, outside the interpreter."""

from __future__ import annotations

import os

import pytest

from benchmarks.compile_gate import Case, all_cases, ci_cases, compile_case, problems, tensor_core
from leaf_kernels.ops.pruned_attention.configs import Tile
from leaf_kernels.testing import Compiled, compile_offline


@pytest.mark.compile_gate
@pytest.mark.parametrize("case", list(ci_cases()), ids=str)
def test_compiles_without_spills(case: Case):
    tile, compiled = compile_case(case)
    assert [k.kernel for k in compiled], "nothing was compiled"
    assert [(k.kernel, wrong) for k in compiled if (wrong := problems(case, tile, k))] == []


@pytest.mark.compile_gate
def test_the_gate_sees_spills():
    """A tile that is too large, on purpose."""
    from unittest import mock

    case = Case("sm_80", "backward_kv", 256)
    with mock.patch("benchmarks.compile_gate.tile_of", return_value=Tile(128, 128, 4, 2)):
        tile, (kernel,) = compile_case(case)
    found = " ".join(problems(case, tile, kernel))
    assert "spilled" in found
    assert "shared memory" in found


def test_cases_of_continuous_integration_are_some_of_all_and_few():
    ci, everything = list(ci_cases()), set(all_cases())
    assert set(ci) <= everything
    assert len(ci) + sum(case.kernel in ("mass", "token_scores", "flagged_spans") for case in ci) <= 120
    assert {case.arch for case in ci} == {case.arch for case in everything}


def test_problems_are_named():
    case = Case("sm_90", "backward_fused", 64)
    good = Compiled("backward_kv", 200, 0, 1000, 0, frozenset({"HGMMA.64x64x16.F32.BF16", "UTMAREDG.2D.ADD"}))
    tile = Tile(64, 128, 8, 2)
    assert problems(case, tile, good) == []
    bad = good._replace(stack=8, shared=1 << 20, tensor_memory=600, instructions=frozenset({"HMMA.16816"}))
    assert len(problems(case, tile, bad)) == 5
    row_pass = Case("sm_90", "jsd", 50257)
    assert problems(row_pass, Tile(1, 2048, 8, 0), good) == ["no LDG.E.128 instruction", "no STG.E.128 instruction"]
    assert tensor_core("sm_90", Tile(32, 128, 8, 2), "forward") == "HMMA"


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the message is for processes with the interpreter"
)
def test_offline_compilation_refuses_the_interpreter():
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), compile_offline("sm_90"):
        pass
    with pytest.raises(ValueError, match="arch must be one of"), compile_offline("sm_70"):
        pass
