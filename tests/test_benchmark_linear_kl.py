"""The GPU benchmark of linear_kl, as far as a CPU can tell: goals from rows, how peers are called, a run on tiny cases."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import linear_kl, losses, tables, timing

CPU = torch.device("cpu")
CASES = {case.name: case for case in linear_kl.CASES}


@pytest.fixture
def quick(monkeypatch):
    """Two samples of everything."""
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "PER_ROUND", 2)


@pytest.fixture(params=["1B-8B", "1B-8B frozen", "1B-8B masked", "1B-8B jsd"])
def problem(request) -> linear_kl.Problem:
    return linear_kl.make(CASES[request.param].tiny(), CPU)


# -- goals -------------------------------------------------------------------------------------------------------------


def row(case: str, provider: str, ms: float = 1.0, dx: float = 1e-3, dw: float = 1e-3, gib: float = 0.5) -> dict:
    return {
        "case": case,
        "provider": provider,
        "ms": ms,
        "dx_error": dx,
        "dw_error": dw,
        "beyond_bytes": gib * 2**30,
        "aa_spread": 0.01,
    }


def verdict(rows: list[dict], goal: str, case: str, what: str) -> dict:
    (found,) = (v for v in linear_kl.verdicts(rows) if (v["goal"], v["case"], v["what"]) == (goal, case, what))
    return found


@pytest.mark.parametrize(
    ("ms", "passed", "stretch", "noise"),
    [(1.07, True, True, False), (1.14, True, False, True), (1.16, False, False, True), (1.2, False, False, False)],
)
def test_overhead_is_ours_over_the_products(ms: float, passed: bool, stretch: bool, noise: bool):
    got = verdict([row("1B-70B", "leaf", ms), row("1B-70B", "gemms")], "C1", "1B-70B", "time / gemms")
    assert got["value"] == pytest.approx(ms)
    assert (got["passed"], got["passed_stretch"], got["noise"]) == (passed, stretch, noise)


def test_a_goal_without_a_stretch_has_none():
    got = verdict([row("1B-8B", "leaf"), row("1B-8B", "gemms")], "C1", "1B-8B", "time / gemms")
    assert (got["wanted"], got["stretch"], got["passed"], got["passed_stretch"]) == (1.25, None, True, None)


@pytest.mark.parametrize(("ms", "passed", "stretch"), [(1.5, False, False), (1.65, True, False), (1.8, True, True)])
def test_speedup_is_the_peer_over_ours(ms: float, passed: bool, stretch: bool):
    got = verdict([row("1B-70B", "leaf"), row("1B-70B", "trl", ms)], "C2", "1B-70B", "trl / time")
    assert got["value"] == pytest.approx(ms)
    assert (got["passed"], got["passed_stretch"]) == (passed, stretch)


def test_memory_is_held_at_every_number_of_rows():
    what = "GiB beyond inputs, dX, dW"
    rows = [row("1B-8B", "leaf", gib=0.9), row("1B-8B 32k", "leaf", gib=1.5), row("1B-8B 128k", "leaf", gib=2.1)]
    for r in rows[1:]:
        del r["ms"], r["aa_spread"]  # as in a row of memory only
    got = [verdict(rows, "C6", case, what) for case in ("1B-8B", "1B-8B 32k", "1B-8B 128k")]
    assert [v["value"] for v in got] == pytest.approx([0.9, 1.5, 2.1])
    assert [v["passed"] for v in got] == [True, True, False]
    assert [v["passed_stretch"] for v in got] == [True, False, False]
    assert not any(v["noise"] for v in got)


@pytest.mark.parametrize(("dx", "dw", "passed"), [(1e-3, 2e-3, True), (1.1e-3, 1e-3, False), (1e-3, 2.2e-3, False)])
def test_the_worse_of_both_gradients_counts(dx: float, dw: float, passed: bool):
    rows = [row("1.5B-72B", "leaf", dx=dx, dw=dw), row("1.5B-72B", "trl", dx=1e-3, dw=2e-3)]
    assert verdict(rows, "C7", "1.5B-72B", "error / trl")["passed"] is passed


def test_what_was_not_measured_is_neither_passed_nor_failed():
    absent = {"case": "1B-70B", "provider": "trl", "absent": "not there"}
    anchors = {"case": "anchors", "matmul_tflop_s": 1.0}
    got = verdict([anchors, absent, row("1B-70B", "leaf")], "C2", "1B-70B", "trl / time")
    assert (got["passed"], got["reason"]) == (None, "not measured: trl")
    assert verdict([], "C7", "1B-8B", "error / trl")["reason"] == "not measured: leaf, trl"
    untimed = {key: value for key, value in row("1B-8B", "leaf").items() if key != "ms"}
    assert verdict([untimed, row("1B-8B", "gemms")], "C1", "1B-8B", "time / gemms")["reason"] == "not measured: leaf"
    assert all(v["passed"] is None for v in linear_kl.verdicts([]))


def test_goals_name_what_exists():
    for goal in linear_kl.GOALS:
        assert goal.kind in linear_kl.WHAT
        assert goal.peer in {"", "gemms", *linear_kl.PROVIDERS}
        assert goal.kind not in ("overhead", "speedup") or CASES[goal.case].timed
        assert goal.kind != "error" or not CASES[goal.case].frozen  # which has no dW to compare
    assert {goal.id for goal in linear_kl.GOALS} == {"C1", "C2", "C6", "C7"}


def test_the_page_shows_goals_per_gpu(tmp_path):
    assert tables.gpu_linear_kl(tmp_path).startswith("Not measured yet")
    rows = [{**row("1B-70B", "leaf"), "roofline": 0.712}, row("1B-70B", "gemms"), row("1B-70B", "fla", 2.0)]
    where = dict.fromkeys(("gpu", "driver", "power_limit_w", "torch", "triton", "commit"), "x")
    anchor = {"case": "anchors", "copy_gb_s": 1.0, "matmul_tflop_s": 2.0, **where}
    timing.write_json(
        tmp_path / "some-gpu" / "linear_kl.json", {"rows": [anchor, *rows], "goals": linear_kl.verdicts(rows)}
    )
    lines = tables.gpu_linear_kl(tmp_path).splitlines()
    assert "| C1 | 1B-70B | time / gemms | 1.00 | ≤ 1.15 | ≤ 1.08 | 71% | reached |" in lines
    assert "| C2 | 1B-70B | fla / time | 2.00 | ≥ 2.40 | ≥ 3.00 | 71% | missed |" in lines
    assert "| C2 | 1B-8B | trl / time | – | – | – | – | not measured: leaf, trl |" in lines


def test_the_page_reads_where_the_benchmarks_write():
    assert tables.gpu_linear_kl.__defaults__ == tables.gpu_attention.__defaults__ == (timing.RESULTS,)


# -- problems and products ---------------------------------------------------------------------------------------------


def test_cases_are_what_they_say():
    sizes = {name: (case.Ds, case.Dt, case.V) for name, case in CASES.items()}
    assert sizes["1B-70B"] == (2048, 8192, 128256)
    assert sizes["1.5B-72B"] == (1536, 8192, 151936)
    assert {size for name, size in sizes.items() if name.startswith("1B-8B")} == {(2048, 4096, 128256)}
    masked = linear_kl.make(CASES["1B-8B masked"].tiny(), CPU)
    assert len(masked.rows) == len(masked.student_hidden) / 4
    weight = masked.token_weight(torch.float64)
    assert weight.nonzero().squeeze(1).tolist() == masked.rows.tolist()
    assert weight.sum() == pytest.approx(1)
    assert ((masked.labels() != -100) == (weight != 0)).all()
    for hidden, head in (masked[:2], masked[2:4]):
        logits = hidden.detach().float() @ head.detach().float().T
        assert 2 < logits.std() < 3


def test_first_rows_are_a_mean_of_their_own():
    masked = linear_kl.make(CASES["1B-8B masked"].tiny(), CPU)
    few = masked.first(64)
    assert len(few.student_hidden) == len(few.teacher_hidden) == 64
    assert few.token_weight().sum() == pytest.approx(1)
    assert ((few.labels() == 0) == (masked.labels() == 0)[:64]).all()
    assert few.student_hidden.requires_grad
    assert few.student_hidden.is_leaf


def test_ours_is_told_its_rows(problem, monkeypatch):
    """Otherwise it looks for them itself, and the host waits."""
    given: dict = {}
    monkeypatch.setattr(
        linear_kl, "linear_kl", lambda *_, **options: given.update(options) or types.SimpleNamespace(loss=0)
    )
    linear_kl.leaf(problem)()
    assert given["rows"] is problem.rows


@pytest.mark.parametrize("name", ["leaf", "eager"])
def test_gradients_are_those_of_fp64(problem, name: str):
    errors = losses.Gate(problem, linear_kl.PROVIDERS).check(name)
    assert set(errors) == {"loss_error", "dx_error", *(["dw_error"] if problem.student_weight.requires_grad else [])}
    assert all(0 <= error < 0.02 for error in errors.values())


def test_the_bounds_catch_a_peer_that_computes_something_else(monkeypatch):
    gate = losses.Gate(linear_kl.make(CASES["1B-8B"].tiny(), CPU), linear_kl.PROVIDERS)
    for wrong in (lambda loss: loss * 1.1, lambda loss: loss.detach() + 0.7 * (loss - loss.detach())):
        monkeypatch.setitem(linear_kl.PROVIDERS, "trl", lambda p, wrong=wrong: lambda: wrong(linear_kl.eager(p)()))
        with pytest.raises(AssertionError, match="_error"):
            gate.check("trl")
    # Ours has to meet the error of plain torch, a peer does not
    monkeypatch.setitem(linear_kl.PROVIDERS, "leaf", lambda p: lambda: linear_kl.eager(p)() * 1.03)
    monkeypatch.setitem(linear_kl.PROVIDERS, "trl", linear_kl.PROVIDERS["leaf"])
    gate.check("trl")
    with pytest.raises(AssertionError, match="above the budget"):
        gate.check("leaf")


@pytest.mark.parametrize("chunk_rows", [7, 128])
def test_the_products_are_those_of_the_floor(problem, chunk_rows: int):
    run = linear_kl.gemms(problem, min(chunk_rows, len(problem.rows)))
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == problem.flop()


@pytest.mark.parametrize("chunk_rows", [5, 32])
def test_chunks_of_ours_are_seen(problem, chunk_rows: int):
    def run() -> None:
        linear_kl.linear_kl(*problem[:4], rows=problem.rows, chunk_rows=chunk_rows).loss.backward()
        torch.mm(torch.ones(999, 2), torch.ones(2, 3))  # whatever else it multiplies

    assert linear_kl.observed_chunk_rows(run, problem) == chunk_rows
    with pytest.raises(RuntimeError, match="saw no product"):
        linear_kl.observed_chunk_rows(lambda: None, problem)


# -- peers -------------------------------------------------------------------------------------------------------------


def textbook(student_hidden, student_weight, teacher_hidden, teacher_weight, beta: float) -> torch.Tensor:
    """[rows]"""
    logits = student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T
    return linear_kl.divergence(*(z.float().log_softmax(-1) for z in logits), beta)


class ChunkedDivergenceFunction:
    """The names and the order of TRL's."""

    @staticmethod
    def apply(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        beta,
        temperature,
        student_logit_scale,
        student_final_logit_softcapping,
        teacher_logit_scale,
        teacher_final_logit_softcapping,
    ):
        assert student_bias is teacher_bias is None
        assert student_final_logit_softcapping is teacher_final_logit_softcapping is None
        assert temperature == student_logit_scale == teacher_logit_scale == 1
        values = textbook(student_hidden, student_weight, teacher_hidden, teacher_weight, beta)
        return values, values.detach()


class LigerFusedLinearJSD:
    def __init__(self, jsd_beta=0.5, ignore_index=-100, temperature=1.0, accum_dtype=None):
        self.beta = jsd_beta

    def __call__(self, student_input, student_weight, teacher_input, teacher_weight, shift_labels):
        kept = slice(None) if shift_labels is None else shift_labels != -100
        values = textbook(student_input, student_weight, teacher_input, teacher_weight, self.beta)
        return values[kept].mean()


class LigerFusedLinearJSDLoss(LigerFusedLinearJSD):
    def __init__(
        self,
        weight_hard_loss=0.5,
        weight_soft_loss=0.5,
        beta=0.5,
        ignore_index=-100,
        temperature=1.0,
        compiled=True,
        chunk_size=1024,
    ):
        assert (weight_hard_loss, weight_soft_loss) == (0, 1)
        super().__init__(beta)

    def __call__(self, student_input, student_weight, teacher_input, teacher_weight, true_labels):
        assert true_labels is not None
        return super().__call__(student_input, student_weight, teacher_input, teacher_weight, true_labels)


class FusedKLDivLoss:
    def __init__(self, reduction="batchmean", accumulate_grad_in_fp32=True):
        self.fp32 = accumulate_grad_in_fp32

    def __call__(self, x, target_x, weight, target_weight):
        return textbook(x, weight, target_x, target_weight, 0.0).mean()


@pytest.fixture
def peers(monkeypatch):
    for path, member in {
        "trl.kernels.chunked_divergence": ChunkedDivergenceFunction,
        "liger_kernel.transformers": LigerFusedLinearJSD,
        "liger_kernel.chunked_loss": LigerFusedLinearJSDLoss,
        "fla.modules": FusedKLDivLoss,
    }.items():
        *parents, _ = path.split(".")
        for i in range(len(parents)):
            monkeypatch.setitem(sys.modules, ".".join(parents[: i + 1]), types.ModuleType(parents[i]))
        monkeypatch.setitem(sys.modules, path, types.SimpleNamespace(**{member.__name__: member}))


@pytest.mark.parametrize("name", ["trl", "liger_jsd", "liger_jsd_fp32", "liger_distill", "fla", "fla_bf16"])
def test_peers_are_called_with_what_is_theirs(peers, problem, name: str):
    gate = losses.Gate(problem, linear_kl.PROVIDERS)
    if name.startswith("fla") and (problem.masked or problem.beta):
        with pytest.raises(NotImplementedError, match="no mask"):
            gate.check(name)
    else:
        assert all(error < 0.02 for error in gate.check(name).values())


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_from_end_to_end(quick, tmp_path, capsys, monkeypatch, not_installed):
    not_installed("trl", "liger_kernel", "fla")
    path = tmp_path / "linear_kl.json"
    assert linear_kl.run(path, CPU, 60, commit="a", only=["1B-70B", "1B-8B masked", "1B-8B 32k"])
    out = capsys.readouterr().out
    assert "1B-70B: trl is absent: ModuleNotFoundError" in out
    assert f"{path}: complete" in out
    written = json.loads(path.read_text())
    assert "C2  1B-70B, trl / time: not measured: trl" in map(timing.line, written["goals"])
    rows = {(r["case"], r["provider"]): r for r in written["rows"] if "provider" in r and "absent" not in r}
    for case in ("1B-70B", "1B-8B masked"):
        for name in ("leaf", "gemms", "eager", "compile"):
            r = rows[case, name]
            assert r["p20_ms"] <= r["ms"] <= r["p80_ms"]
            assert {"mode", "samples", "aa_spread", "gate", "flop", "roofline", "dims", "torch", "liger_kernel"} <= set(
                r
            )
    assert "ms" not in rows["1B-8B 32k", "leaf"]
    assert ("1B-8B 32k", "gemms") not in rows
    for (_, name), r in rows.items():
        if name != "gemms":
            assert r["beyond_bytes"] < r["peak_bytes"] < r["total_bytes"]
            assert 0 < r["largest_bytes"] < r["peak_bytes"]
            assert r["gate"] == "passed"
            assert r["accuracy_rows"] <= losses.ACCURACY_ROWS
    assert rows["1B-70B", "gemms"]["chunk_rows"] == rows["1B-70B", "leaf"]["chunk_rows"]
    assert rows["1B-8B masked", "leaf"]["rows"] * 4 == rows["1B-8B masked", "leaf"]["tokens"]
    assert next(v for v in written["goals"] if (v["goal"], v["case"]) == ("C1", "1B-70B"))["passed"] is not None
    # What is there is kept, and goes on with what is not
    assert linear_kl.run(path, CPU, 60, resume=True, commit="a", only=["1B-70B", "1B-8B frozen"])
    more = json.loads(path.read_text())["rows"]
    assert more[: len(written["rows"])] == written["rows"]
    assert {r["case"] for r in more[len(written["rows"]) :]} == {"1B-8B frozen"}


@pytest.mark.parametrize("case", ["1B-8B", "1B-8B frozen"])
def test_memory_grants_dx_and_dw_in_fp32(case):
    """A step that makes 1000 bytes beside its gradients, of which dW is accumulated in fp32 and returned in bf16."""
    problem = linear_kl.make(CASES[case].tiny(), CPU)
    hidden, weight = problem.student_hidden.detach(), problem.student_weight

    def run() -> list[torch.Tensor]:
        dx, dw32, more = torch.zeros_like(hidden), weight.detach().float(), torch.ones(250)
        return [more.sum(), dx, *([dw32.bfloat16()] if weight.requires_grad else [])]

    # the loss of 4 bytes, and dW in both dtypes
    rounded = 2 * weight.numel() if weight.requires_grad else 4 * weight.numel()
    assert losses.memory(run, problem)["beyond_bytes"] == pytest.approx(1000 + rounded, abs=16)


def test_a_wrong_result_is_not_timed(quick, monkeypatch):
    monkeypatch.setitem(linear_kl.PROVIDERS, "leaf", lambda p: lambda: linear_kl.leaf(p)() * 1.1)
    rows = list(linear_kl.measure(CASES["1B-8B"].tiny(), CPU, timing.Deadline(60)))
    assert all("absent" in r for r in rows)
    reasons = {r["provider"]: r["absent"] for r in rows}
    assert "above the budget" in reasons["leaf"]
    assert reasons["eager"] == "not timed: leaf failed"


def test_a_peer_out_of_memory_says_so(quick, monkeypatch):
    def hungry(problem: linear_kl.Problem) -> linear_kl.Loss:
        if len(problem.student_hidden) > losses.ACCURACY_ROWS:
            raise torch.OutOfMemoryError("too many logits\nand more lines")
        return linear_kl.eager(problem)

    monkeypatch.setitem(linear_kl.PROVIDERS, "eager", hungry)
    case = CASES["1B-8B 128k"].tiny()
    rows = {r["provider"]: r for r in linear_kl.measure(case, CPU, timing.Deadline(60))}
    assert rows["eager"]["absent"] == "OutOfMemoryError: too many logits"
    assert "ms" not in rows["eager"]
    assert rows["leaf"]["beyond_bytes"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    with pytest.raises(SystemExit):
        linear_kl.main([])
    assert "no NVIDIA GPU here" in capsys.readouterr().err
