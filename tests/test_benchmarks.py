"""The GPU benchmark, as far as a CPU can tell: goals from rows, masks and padding of the peers, cutting and going on."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks import (
    attention,
    attention_mass,
    cross_entropy,
    e2e,
    linear_kl,
    plot,
    scoring_gpu,
    tables,
    timing,
    token_scores,
)
from leaf_kernels import pruned_attention

CPU = torch.device("cpu")
CASES = {case.name: case for case in attention.CASES}


@pytest.fixture
def quick(monkeypatch):
    """Two samples of everything, and two cases."""
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "PER_ROUND", 2)
    monkeypatch.setattr(attention, "CASES", (CASES["8b-4k"], CASES["1b-groups-16-layers"]))


# -- goals -------------------------------------------------------------------------------------------------------------


def row(case: str, mode: str, provider: str, ms: float, token_ratio: float = 1.0, aa_spread: float = 0.01) -> dict:
    return {
        "case": case,
        "mode": mode,
        "provider": provider,
        "ms": ms,
        "token_ratio": token_ratio,
        "aa_spread": aa_spread,
    }


def verdict(rows: list[dict], goal: str, case: str, mode: str) -> dict:
    (found,) = (v for v in attention.verdicts(rows) if (v["goal"], v["case"], v["mode"]) == (goal, case, mode))
    return found


def test_backward_counts_the_better_variant_and_reports_both():
    rows = [
        row("1b-packed", "backward", "torch_varlen", 1.2),
        row("1b-packed", "backward", "leaf", 1.5),
        row("1b-packed", "backward", "leaf fused", 1.0),
    ]
    got = verdict(rows, "A2", "1b-packed", "backward")
    assert got["ratio"] == pytest.approx(1.2)
    assert got["ratios"] == pytest.approx({"leaf": 0.8, "leaf fused": 1.2})
    assert got["passed"]
    assert not got["passed_stretch"]
    assert not verdict(rows[:2], "A2", "1b-packed", "backward")["passed"]


def test_the_best_vendor_is_the_one_to_beat():
    rows = [
        row("8b-4k", "forward", "torch_varlen", 2.0),
        row("8b-4k", "forward", "cudnn", 1.0),
        row("8b-4k", "forward", "flex", 0.1),
        row("8b-4k", "forward", "leaf", 1.25),
    ]
    got = verdict(rows, "A4", "8b-4k", "forward")
    assert (got["peer"], got["passed"], got["passed_stretch"]) == ("cudnn", True, False)


def test_sharing_must_save_its_tokens():
    def rows(ours: float) -> list[dict]:
        case = "1b-groups-16-layers"
        return [row(case, "step", "torch_varlen", 15.0, 1.5), row(case, "step", "leaf", ours, 1.5)]

    got = verdict(rows(10.0), "A5", "1b-groups-16-layers", "step")
    assert got["wanted"] == pytest.approx(0.92 * 1.5)
    assert got["passed"]
    assert not verdict(rows(11.0), "A5", "1b-groups-16-layers", "step")["passed"]


@pytest.mark.parametrize(("ours", "noise"), [(1.0, True), (0.985, True), (0.9, False), (1.1, False)])
def test_small_differences_are_called_noise(ours: float, noise: bool):
    rows = [row("1.5b-packed", "forward", "torch_varlen", 1.0), row("1.5b-packed", "forward", "leaf", ours)]
    assert verdict(rows, "A2b", "1.5b-packed", "forward")["noise"] is noise


@pytest.mark.parametrize(
    ("value", "at_most", "spread", "passed", "further", "noise"),
    [
        (2.0, False, 0.0, True, False, False),
        (3.0, False, 0.0, True, True, False),
        (1.9, False, 0.03, False, False, True),
        (1.9, False, 0.02, False, False, False),
        (2.0, True, 0.01, True, True, True),
        (3.1, True, 0.0, False, False, False),
    ],
)
def test_a_value_is_held_against_its_bounds(value, at_most, spread, passed, further, noise):
    got = timing.judge(value, 2.0, 3.0, at_most=at_most, spread=spread)
    assert (got["passed"], got["passed_stretch"], got["noise"]) == (passed, further, noise)
    assert timing.judge(value, 2.0, at_most=at_most)["passed_stretch"] is None


def test_what_was_not_measured_is_neither_passed_nor_failed():
    absent = {"case": "1b-packed", "mode": "all", "provider": "torch_varlen", "absent": "not there"}
    got = verdict([absent, row("1b-packed", "forward", "leaf", 1.0)], "A1", "1b-packed", "forward")
    assert got["passed"] is None
    assert got["reason"] == "not measured: torch_varlen"
    assert all(v["passed"] is None for v in attention.verdicts([]))


def test_goals_name_what_exists():
    for goal in attention.GOALS:
        assert goal.mode in CASES[goal.case].modes
        assert set(goal.peers) <= set(attention.PROVIDERS)
    assert {goal.id for goal in attention.GOALS} == {"A1", "A2", "A2b", "A3", "A4", "A5"}


# -- cases and peers ---------------------------------------------------------------------------------------------------


def test_cases_are_what_they_say():
    for case in attention.CASES:
        packed, separate = case.sequences()
        if case.groups:
            assert packed.has_prefix
            assert not separate.has_prefix
            assert 1.2 < separate.num_tokens / packed.num_tokens < 1.8
        else:
            assert packed is separate
            assert case.lengths[1] >= packed.max_len >= 0.9 * case.lengths[1]
            assert case.tokens - case.lengths[0] < packed.num_tokens <= case.tokens


def expected(problem: attention.Problem) -> torch.Tensor:
    return pruned_attention(problem.q, problem.k, problem.v, problem.layout, impl="reference")


@pytest.mark.parametrize("name", ["1b-packed", "1b-groups"])
def test_flex_sees_the_mask_of_the_pack(name: str):
    packed, _ = attention.problems(CASES[name].tiny(), CPU)
    provider = attention.flex(packed)
    with torch.no_grad():  # on a CPU it has no backward
        out = provider.rows(provider.attend(provider.plan(), *(x.detach() for x in provider.tensors)))
    torch.testing.assert_close(out, expected(packed), rtol=2e-2, atol=2e-2)


def test_padding_reaches_nobody():
    problem, _ = attention.problems(CASES["1b-packed"].tiny(), CPU)
    provider = attention.cudnn(problem)
    attention.Gate(problem).check(provider, factor=2)
    assert torch.equal(provider.rows(provider.upstream), problem.upstream)


def vendor(window_size=None, enable_gqa=None, is_causal=False, causal=False):
    """Fails where the call would not be causal or grouped, in the words of whichever library."""
    assert window_size == (-1, 0) or is_causal or causal


def varlen_now(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    vendor(window_size=window_size)
    assert enable_gqa
    assert cu_q.dtype == torch.int32
    return q * 2


def varlen_of_torch_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
    vendor(is_causal=is_causal)
    return q * 2


def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=False):
    vendor(causal=causal)
    return q * 2


@pytest.mark.parametrize("version", [varlen_now, varlen_of_torch_2_10])
def test_torch_varlen_is_called_as_its_version_wants(monkeypatch, version):
    import torch.nn.attention.varlen

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", version)
    problem, _ = attention.problems(CASES["1b-packed"].tiny(), CPU)
    provider = attention.torch_varlen(problem)
    assert torch.equal(provider.attend(provider.plan(), *provider.tensors), problem.q * 2)


def test_flash_attn_is_called_causally(monkeypatch):
    module = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    problem, _ = attention.problems(CASES["1b-packed"].tiny(), CPU)
    provider = attention.flash_attn(problem)
    assert torch.equal(provider.attend(provider.plan(), *provider.tensors), problem.q * 2)


# -- a run -------------------------------------------------------------------------------------------------------------


def test_rows_describe_themselves_and_absent_peers_say_why(quick):
    rows = list(attention.measure(CASES["8b-4k"].tiny(), CPU, timing.Deadline(60)))
    measured = {(r["provider"], r["mode"]): r for r in rows if "ms" in r}
    assert {"leaf", "leaf fused", "cudnn"} == {provider for provider, _ in measured}
    assert {mode for _, mode in measured} == {"forward", "backward"}
    for r in measured.values():
        assert r["ms"] > 0
        assert 0 < r["largest_bytes"] < r["peak_bytes"]
        assert {"model", "heads", "flop", "samples", "aa_spread", "tokens", "token_ratio", "gate"} <= set(r)
    assert {"torch_varlen", "flash_attn"} == {r["provider"] for r in rows if r.get("absent")}


def test_a_wrong_result_is_not_timed(quick, monkeypatch):
    def wrong(problem: attention.Problem) -> attention.Provider:
        right = attention.leaf(problem, deterministic=True)
        return right._replace(attend=lambda plan, q, k, v: right.attend(plan, q, k, v) * 1.1)

    monkeypatch.setitem(attention.PROVIDERS, "leaf", wrong)
    rows = list(attention.measure(CASES["8b-4k"].tiny(), CPU, timing.Deadline(60)))
    assert not any("ms" in r for r in rows)
    reasons = {r["provider"]: r["absent"] for r in rows}
    assert "above the budget" in reasons["leaf"]
    assert reasons["cudnn"] == "not timed: leaf failed"


def test_a_cut_run_goes_on(quick, tmp_path, monkeypatch, capsys):
    path = tmp_path / "attention.json"
    measure = attention.measure

    def cut(case, *arguments):
        if case.groups:
            raise timing.OutOfTime
        return measure(case, *arguments)

    monkeypatch.setattr(attention, "measure", cut)
    assert not attention.run(path, CPU, 60, commit="a")
    assert "still to measure: 1b-groups-16-layers" in capsys.readouterr().out
    first = json.loads(path.read_text())["rows"]
    assert {r["case"] for r in first} == {"anchors", "8b-4k"}
    assert all(r["commit"] == "a" and r["torch"] == torch.__version__ for r in first)

    monkeypatch.setattr(attention, "measure", measure)
    assert attention.run(path, CPU, 60, resume=True, commit="a")
    both = json.loads(path.read_text())
    assert both["rows"][: len(first)] == first
    assert {r["case"] for r in both["rows"]} == {"anchors", "8b-4k", "1b-groups-16-layers"}
    assert next(v for v in both["goals"] if v["goal"] == "A5")["token_ratio"] > 1
    # Rows of other code are not continued
    assert not attention.run(path, CPU, 0, resume=True, commit="b")
    assert json.loads(path.read_text()) == both
    assert not list(tmp_path.glob("*.partial"))


def test_a_case_that_fails_takes_no_other_with_it(quick, tmp_path, monkeypatch, capsys):
    path, measure = tmp_path / "attention.json", attention.measure

    def broken(case, *arguments):
        yield from measure(case, *arguments)
        if not case.groups:
            raise RuntimeError("illegal access\nmore")

    monkeypatch.setattr(attention, "measure", broken)
    assert not attention.run(path, CPU, 60, commit="a")
    assert "RuntimeError: illegal access" in capsys.readouterr().err, "with its traceback"
    rows = json.loads(path.read_text())["rows"]
    failed = [row for row in rows if row["case"] == "8b-4k" and row.get("absent") == "RuntimeError: illegal access"]
    assert [row["provider"] for row in failed] == ["leaf"]
    assert any(row["case"] == "8b-4k" and "ms" in row for row in rows), "what came before is kept"
    assert any(row["case"] == "1b-groups-16-layers" and "ms" in row for row in rows)
    assert not attention.run(path, CPU, 60, resume=True, commit="a")
    assert json.loads(path.read_text())["rows"] == rows


class Named(NamedTuple):
    name: str

    def tiny(self):
        return self


def test_what_cuda_was_lost_to_is_measured_again_after_what_was_not_reached(tmp_path, monkeypatch, capsys):
    path, cases, ran, lost = tmp_path / "some.json", [Named("a"), Named("b"), Named("c")], [], ["b"]
    monkeypatch.setattr(timing, "anchors", lambda device, deadline: {"copy_gb_s": 1.0, "matmul_tflop_s": 2.0})
    monkeypatch.setattr(timing, "usable", lambda device: ran[-1] not in lost)

    def measure(case, deadline):
        ran.append(case.name)
        yield {"case": case.name, "provider": "peer", "absent": "ModuleNotFoundError: no peer"}
        if case.name in lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield {"case": case.name, "provider": "leaf", "ms": 1.0}

    def run() -> bool:
        where = {"gpu": "none", "commit": "a"}
        return timing.run_cases(path, CPU, 60, where, cases, measure, resume=True, only=())

    assert not run()
    assert ran == ["a", "b"], "nothing is tried without CUDA"
    out = capsys.readouterr().out
    assert "b: leaf is absent: RuntimeError: CUDA error: an illegal memory access" in out
    assert "still to measure: b, c" in out
    assert not run()
    assert ran[2:] == ["c", "b"], "one that fails every time keeps no other from being measured"
    lost.clear()
    assert run()
    assert ran[4:] == ["b"], "what has its reason to be absent is not tried again"
    rows = json.loads(path.read_text())["rows"]
    found = sorted((row["case"], row["provider"], "absent" in row) for row in rows if row["case"] != "anchors")
    assert found == [(name, *own) for name in "abc" for own in (("leaf", False), ("peer", True))]
    assert not any("lost" in row for row in rows)


def test_cuda_is_lost_where_it_fails_whatever_is_asked(monkeypatch):
    def fail(device):
        raise RuntimeError("CUDA error: device-side assert triggered")

    assert timing.usable(CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert timing.usable(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert not timing.usable(torch.device("cuda"))


@pytest.mark.parametrize(("gpu", "said"), [("none", False), ("some GPU", True)])
def test_verdicts_are_printed_for_a_gpu_only(tmp_path, monkeypatch, capsys, gpu, said):
    monkeypatch.setattr(timing, "anchors", lambda *_: {"copy_gb_s": 1.0, "matmul_tflop_s": 2.0})
    row = {"case": "a", "mode": "step", "provider": "leaf", "ms": 2.0, "flop": 1e9}
    timing.run_cases(
        tmp_path / "some.json", CPU, 60, {"gpu": gpu}, [Named("a")], lambda *_: [row],
        summary=lambda rows: ["D3  a: reached"], resume=False, only=(),
    )  # fmt: skip
    out = capsys.readouterr().out
    assert ("D3  a: reached" in out, "of the roofline" in out) == (said, said)
    assert "complete" in out


FILES = {
    "attention": attention,
    "attention_mass": attention_mass,
    "cross_entropy": cross_entropy,
    "e2e": e2e,
    "linear_kl": linear_kl,
    "scoring": scoring_gpu,
    "token_scores": token_scores,
}


@pytest.mark.parametrize(("name", "module"), FILES.items(), ids=FILES)
def test_a_case_that_failed_has_a_place_in_every_page(tmp_path, monkeypatch, capsys, name, module):
    class Broken(NamedTuple):
        name: str

        def tiny(self):
            raise RuntimeError("no such case")

    anchors = {"copy_gb_s": 1.0, "matmul_tflop_s": 2.0, "driver": "x", "power_limit_w": "x"}
    monkeypatch.setattr(timing, "anchors", lambda device, deadline: anchors)
    monkeypatch.setattr(module, "CASES", tuple(Broken(case.name) for case in module.CASES[:2]))
    assert not module.run(tmp_path / "some-gpu" / f"{name}.json", CPU, 60, commit="a")
    printed = capsys.readouterr().out
    assert all(f"{case.name}: leaf is absent: RuntimeError: no such case" in printed for case in module.CASES)
    assert "commit `a`" in getattr(tables, f"gpu_{name}")(tmp_path)


def test_a_spent_budget_starts_nothing(tmp_path):
    assert not attention.run(tmp_path / "attention.json", CPU, -1)
    assert not (tmp_path / "attention.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    with pytest.raises(SystemExit):
        attention.main([])
    assert "no NVIDIA GPU here" in capsys.readouterr().err


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository, with the file that says where it is."""

    def git(*arguments: str) -> str:
        own = ["-c", "user.name=x", "-c", "user.email=x@x"]
        return subprocess.run(
            ["git", *own, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in ("timing.py", "results/some.json"):
        (tmp_path / "benchmarks" / name).write_text("0")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "benchmarks" / "timing.py"))
    return tmp_path / "benchmarks", git("rev-parse", "HEAD").strip()


def test_changes_are_told_from_other_changes(checkout):
    folder, head = checkout
    (folder / "results" / "some.json").write_text("what was measured is no change")
    assert timing._commit() == head
    found = []
    for content in (b"1", b"2", b"\xff", b"1"):
        (folder / "timing.py").write_bytes(content)
        found.append(timing._commit())
    assert all(commit.startswith(f"{head}+changes") for commit in found)
    assert found[0] == found[3]
    assert len(set(found)) == 3
    told = plot.where({"gpu": "x", "torch": "x", "commit": found[0]})
    assert told.endswith(f"commit {head[:12]} with changes")


def test_code_that_is_not_known_is_never_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "timing.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    commit = timing.environment(CPU)["commit"]
    assert commit.startswith("unknown")
    assert timing.environment(CPU)["commit"] != commit


# -- the page ----------------------------------------------------------------------------------------------------------


def test_table_of_goals(tmp_path):
    assert tables.gpu_attention(tmp_path).startswith("Not measured yet")
    ours = {**row("1b-packed", "forward", "leaf", 1.0), "roofline": 0.4}
    rows = [row("1b-packed", "forward", "torch_varlen", 1.5), ours]
    where = dict.fromkeys(("gpu", "driver", "power_limit_w", "torch", "triton", "commit"), "x")
    anchor = {"case": "anchors", "copy_gb_s": 1.0, "matmul_tflop_s": 2.0, **where}
    path: Path = tmp_path / "some-gpu" / "attention.json"
    timing.write_json(path, {"rows": [anchor, *rows], "goals": attention.verdicts(rows)})
    lines = tables.gpu_attention(tmp_path).splitlines()
    assert "| A1 | 1b-packed | forward | torch_varlen | 1.50× | – | 1.25× | 1.50× | 40% | reached |" in lines
    assert any(line.startswith("| A5 |") and line.endswith("not measured: leaf or leaf fused |") for line in lines)
