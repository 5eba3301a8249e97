"""benchmarks/e2e.py at small sizes: everybody trains on the same loss, lengths are found by bisection, goals from rows."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from benchmarks import e2e, tables, timing

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """One round, and three cases."""
    monkeypatch.setattr(timing, "ROUNDS", 2)
    lengths = [2048, 4096]
    monkeypatch.setattr(e2e, "LENGTHS", lengths)
    monkeypatch.setattr(e2e, "CASES", (e2e.Case("step"), *(e2e.Case(f"longest {n}", n) for n in lengths)))


# -- implementations ---------------------------------------------------------------------------------------------------


class GKDTrainer:
    """TRL's loss, in its words; beta = 0 is KL(teacher ‖ student). Its trainer hands it the rows of the response alone."""

    @staticmethod
    def generalized_jsd_loss(student, teacher, labels=None, beta=0.5, temperature=1.0, reduction="batchmean"):
        assert (labels, beta, temperature, reduction) == (None, 0.0, 1.0, "sum")
        return F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), reduction="sum", log_target=True)


class LigerFusedLinearJSD:
    """Liger's, in its words: a mean over the rows that have a label, here all of them."""

    def __init__(self, jsd_beta):
        assert jsd_beta == 0.0

    def __call__(self, student, student_weight, teacher, teacher_weight, labels):
        assert len(student) == len(teacher) == len(labels)
        assert (labels != -100).all()
        logits = student @ student_weight.T, teacher @ teacher_weight.T
        return GKDTrainer.generalized_jsd_loss(*logits, beta=0.0, reduction="sum") / len(labels)


@pytest.fixture
def peers(monkeypatch):
    """Stand-ins for the peers' libraries."""
    for name, module in (
        ("trl.experimental.gkd", types.SimpleNamespace(GKDTrainer=GKDTrainer)),
        ("liger_kernel.transformers", types.SimpleNamespace(LigerFusedLinearJSD=LigerFusedLinearJSD)),
    ):
        parent = name.rsplit(".", 1)[0]
        for part in {parent, parent.split(".")[0]}:
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        monkeypatch.setitem(sys.modules, name, module)
    for cached in (e2e._gkd_loss, e2e._liger_loss):
        cached.cache_clear()
    yield
    for cached in (e2e._gkd_loss, e2e._liger_loss):
        cached.cache_clear()


@pytest.mark.parametrize("name", e2e.PROVIDERS)
def test_everybody_has_the_same_loss_and_gradients(peers, name):
    errors = e2e.check(name, CPU)
    assert set(errors) == {"loss_error", "gradient_error"}
    assert all(error < 1e-5 for error in errors.values())


def test_a_wrong_gradient_is_found(monkeypatch):
    def wrong(pair, ids, start):
        value = e2e.released(pair, ids, start)
        return 1.01 * value - 0.01 * value.detach()  # the loss itself is right

    monkeypatch.setitem(e2e.PROVIDERS, "released", lambda *both: e2e.one_by_one(wrong, *both))
    with pytest.raises(AssertionError, match="gradient_error"):
        e2e.check("released", CPU)


def test_cases_are_what_they_say():
    groups = e2e.CASES[0].make(1000)
    lengths = [len(ids) for ids, _ in e2e.members(groups)]
    assert len(groups) == 8
    assert len(lengths) > 16
    assert all(560 <= n <= 1000 for n in lengths)
    assert e2e.response_tokens(groups) == 200 * len(lengths)
    ((ids, start),) = e2e.members(e2e.Case("", 4096).make(300))
    assert (len(ids), start, max(ids)) == (4096, 4096 - 512, 299)


# -- lengths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, *e2e.LENGTHS])
def test_the_longest_sample_is_found_in_few_steps(monkeypatch, limit):
    rows: list[dict] = []
    bench, tried = e2e.Bench(CPU, rows), []

    def step(name, case, checkpointing):
        assert checkpointing
        tried.append(case.tokens)
        if case.tokens > limit:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(bench, "step", step)
    monkeypatch.setattr(bench, "memory", lambda run: {})
    monkeypatch.setattr(bench, "recover", lambda: None)
    for case in e2e.CASES[1:]:
        assert e2e.longest(rows) == {}, "not known before every length is there"
        rows.append({"provider": "leaf", "tokens": case.tokens, **bench.fits("leaf", case)})
    assert e2e.longest(rows) == {"leaf": limit}
    assert len(tried) <= math.ceil(math.log2(len(e2e.LENGTHS) + 1))
    (said,) = (text for text in e2e.summary(rows) if text.startswith("longest context"))
    assert said.endswith(f"{'at least ' if limit == e2e.LENGTHS[-1] else ''}{limit} tokens")


@pytest.mark.parametrize(
    ("error", "row"),
    [
        (
            RuntimeError("CUDA error: out of memory\nmore"),
            {"fits": False, "why": "RuntimeError: CUDA error: out of memory"},
        ),
        (RuntimeError("int32 overflow\nmore"), {"absent": "RuntimeError: int32 overflow"}),
    ],
)
def test_only_memory_is_too_little_for_a_length(monkeypatch, error, row):
    rows: list[dict] = []
    bench = e2e.Bench(CPU, rows)

    def step(*arguments, **options):
        raise error

    monkeypatch.setattr(bench, "step", step)
    assert bench.fits("leaf", e2e.Case("", 4096)) == row
    assert "pair" not in bench.__dict__, "made only to be cleaned up"
    rows.append({"provider": "leaf", "tokens": 4096, **row})
    follows = bench.fits("leaf", e2e.Case("", 8192))
    assert follows == ({"fits": False, "follows": True} if "fits" in row else row)


def test_a_failure_of_ours_at_a_length_is_one_of_the_run(quick, monkeypatch, tmp_path):
    memory = e2e.Bench.memory
    monkeypatch.setattr(e2e.Bench, "checked", ({"leaf": {}}, {}))
    monkeypatch.setattr(e2e.Bench, "memory", lambda *both: memory(*both)["no such column"])
    assert not e2e.run(tmp_path / "e2e.json", CPU, 60, commit="a", only=["longest 2048"])
    assert e2e.longest(json.loads((tmp_path / "e2e.json").read_text())["rows"]) == {}


# -- goals -------------------------------------------------------------------------------------------------------------


def lengths_of(provider: str, limit: int) -> list[dict]:
    return [{"case": "longest", "provider": provider, "tokens": n, "fits": n <= limit} for n in e2e.LENGTHS]


def test_goals_take_the_best_peer():
    rows = [{"provider": name, "ms": ms, "aa_spread": 0.01} for name, ms in (("leaf", 10.0), ("released", 47.0))]
    for name, limit in (("leaf", 2**17), ("released", 2**13), ("trl_gkd", 2**14), ("liger", 3 * 2**14)):
        rows += lengths_of(name, limit)
    d1, peer, d3 = e2e.verdicts(rows)
    assert (d1["goal"], d1["value"], d1["passed"], d1["passed_stretch"]) == ("D1", 16, True, None)
    assert peer["what"] == "longest context / liger"
    assert peer["value"] == pytest.approx(8 / 3)
    assert (d3["goal"], d3["value"], d3["passed"], d3["passed_stretch"]) == ("D3", pytest.approx(4.7), True, False)
    assert not e2e.verdicts([*rows[:2], *lengths_of("leaf", 2**16), *lengths_of("released", 2**13)])[0]["passed"]


def test_what_was_not_measured_is_neither_passed_nor_failed():
    verdicts = e2e.verdicts(lengths_of("leaf", 2**17))
    assert [v["passed"] for v in verdicts] == [None] * 3
    assert verdicts[1]["reason"] == "not measured: trl_gkd or liger"
    assert e2e.verdicts([{"provider": "released", "ms": 1.0}])[2]["reason"] == "not measured: leaf"


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_measures_goes_on_and_fills_its_table(quick, tmp_path, monkeypatch, not_installed):
    not_installed("trl", "liger_kernel")
    for cached in (e2e._gkd_loss, e2e._liger_loss):
        cached.cache_clear()
    path = tmp_path / "some-gpu" / "e2e.json"
    assert e2e.run(path, CPU, 120, commit="a", only=["step"])
    first = json.loads(path.read_text())["rows"]
    timed = {row["provider"]: row for row in first if "ms" in row}
    assert set(timed) == {"leaf", "released"}
    for row in timed.values():
        assert row["ms"] > 0
        assert row["gate"] == "passed"
        assert row["peak_bytes"] > 10**6
        assert 0 < row["largest_bytes"] < row["peak_bytes"]
        assert row["flop"] > 10**7
        assert {"loss_error", "gradient_error", "mode", "aa_spread", "samples", "commit", "transformers"} <= set(row)
    assert {row["provider"] for row in first if "absent" in row} == {"trl_gkd", "liger"}

    assert e2e.run(path, CPU, 120, commit="a", resume=True)
    both = json.loads(path.read_text())
    assert both["rows"][: len(first)] == first
    lengths = [(row["provider"], row["tokens"], row["fits"]) for row in both["rows"] if "fits" in row]
    assert sorted(lengths) == [(name, n, True) for name in ("leaf", "released") for n in (16, 32)]
    for row in both["rows"]:
        assert "fits" not in row or {"gate", "loss_error", "gradient_error"} <= set(row)
    assert "longest context, leaf: at least 32 tokens" in list(e2e.summary(both["rows"]))

    for row in both["rows"]:
        row |= {"driver": "x", "power_limit_w": "x"}
    timing.write_json(path, both)
    assert any(line.startswith("| D3 | step | released / time |") for line in tables.gpu_e2e(tmp_path).splitlines())


def test_without_ours_nothing_is_measured(quick, monkeypatch, tmp_path):
    def wrong(pair, groups):
        run = e2e.one_by_one(e2e.released, pair, groups)
        return lambda: run() * 1.1

    monkeypatch.setitem(e2e.PROVIDERS, "leaf", wrong)
    assert not e2e.run(tmp_path / "e2e.json", CPU, 60, commit="a")
    rows = json.loads((tmp_path / "e2e.json").read_text())["rows"]
    assert not any("ms" in row or "fits" in row for row in rows)
    reasons = {row["provider"]: row["absent"] for row in rows if "absent" in row}
    assert "loss_error" in reasons["leaf"]
    assert reasons["released"] == "not measured: leaf failed"
