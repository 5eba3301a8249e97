"""benchmarks/demo_gpu.py with tiny models that pass for right: arm by arm, cut, continued, summed up, in the page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import demo_gpu, plot, tables
from leaf.demo import comparison, models
from leaf.demo.arms import ARMS
from leaf.demo.models import Size, make_model
from leaf.demo.task import make_tokenizer

CPU = torch.device("cpu")
TINY = dataclasses.replace(
    demo_gpu.RECIPE,
    teacher=Size(16, heads=2),
    student=Size(8, layers=1, heads=2),
    teacher_steps=2,
    student_max_steps=2,
    corpus_rows=6,
    test_rows=4,
    steps=1,
    groups=2,
)
COMPARED = {name: demo_gpu.COMPARED[name] for name in ("kd", "leaf", "tau_0.15")}


@pytest.fixture(autouse=True)
def all_are_right(monkeypatch):
    """Models that have learnt nothing: every answer of theirs counts, so that there are groups to train on."""
    select_rows, verify_rows = comparison.select_rows, comparison.verify_rows

    def selected(*arguments, **options):
        for one in select_rows(*arguments, **options):
            yield dataclasses.replace(one, status="ok", teacher=dataclasses.replace(one.teacher, right=True))

    def verified(*arguments, **options):
        return ({**row, "verified": True} for row in verify_rows(*arguments, **options))

    monkeypatch.setattr(models, "VALIDATION_ROWS", 8)
    monkeypatch.setattr(comparison, "select_rows", selected)
    monkeypatch.setattr(comparison, "verify_rows", verified)


def run(folder: Path, budget: float = 120, **options) -> bool:
    options = {"resume": True, "commit": "a", "seeds": (0, 1), "recipe": TINY, "arms": COMPARED, **options}
    return demo_gpu.run(folder, CPU, budget, **options)


def test_a_run_that_is_cut_goes_on_with_the_same_models_and_is_summed_up(tmp_path, monkeypatch, capsys):
    folder, ran = tmp_path / "some-gpu", []
    distil = comparison.distil

    def cut(student, teacher, groups, recipe, seed):
        if len(ran) == 1:
            raise KeyboardInterrupt  # as if the machine had gone
        ran.append(student.lm_head.weight.clone())
        return distil(student, teacher, groups, recipe, seed)

    monkeypatch.setattr(comparison, "distil", cut)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    first = json.loads((folder / "demo" / "seed-00.json").read_text())
    assert list(first["arms"]) == ["teacher", "student", "kd"]
    assert not (folder / "demo.json").exists()

    def go_on(student, *rest):
        ran.append(student.lm_head.weight.clone())
        return distil(student, *rest)

    monkeypatch.setattr(comparison, "distil", go_on)
    assert run(folder)
    assert len(ran) == 2 * len(COMPARED), "no arm ran twice"
    assert torch.equal(ran[0], ran[1])
    assert torch.equal(ran[0], ran[2])
    assert not torch.equal(ran[0], ran[3])
    assert not list(folder.rglob("*.pt*"))
    second = json.loads((folder / "demo" / "seed-00.json").read_text())
    assert {arm: second["arms"][arm] for arm in first["arms"]} == first["arms"]
    assert second["counts"]["leaf"]["made"] == second["counts"]["leaf"]["kept"] > 0

    results = json.loads((folder / "demo.json").read_text())
    assert results["seeds"] == [0, 1]
    assert list(results["arms"]) == ["teacher", "student", *COMPARED]
    assert set(results["paired"]) == {"leaf - kd"}
    assert "complete" in capsys.readouterr().out
    before = (folder / "demo.json").read_bytes()
    assert run(folder, budget=0)
    assert (folder / "demo.json").read_bytes() == before

    page = tables.gpu_demo(tmp_path)
    assert "| **LeaF**, span |" in page
    assert "| tau 0.15 |" in page
    assert [path.name for path in plot.main(tmp_path)] == ["demo.png"]
    # Other code is measured from the start
    assert not run(folder, budget=-1, commit="b")


@pytest.mark.slow
def test_without_its_models_a_seed_starts_anew(tmp_path, capsys):
    assert not run(tmp_path, budget=-1)
    assert "still to measure: seed 0 (3 arms), seed 1 (3 arms)" in capsys.readouterr().out
    two = {name: ARMS[name] for name in ("kd", "random")}
    assert run(tmp_path, seeds=(0,), arms={"kd": two["kd"]})
    path = tmp_path / "demo" / "seed-00.json"
    written = json.loads(path.read_text())
    written["arms"]["kd"]["clean"] = 0.123  # of models that are lost
    path.write_text(json.dumps(written))
    assert run(tmp_path, seeds=(0,), arms=two)
    assert json.loads(path.read_text())["arms"]["kd"]["clean"] != 0.123


@pytest.mark.slow
def test_an_arm_without_groups_in_one_seed_is_absent_from_the_summary(tmp_path, monkeypatch):
    prune, calls = comparison.prune, []

    def first_has_none(rows, config):
        calls.append(config)
        return prune(rows, config) if len(calls) > 1 else ()

    monkeypatch.setattr(comparison, "prune", first_has_none)
    assert run(tmp_path, arms={name: COMPARED[name] for name in ("kd", "tau_0.15")})
    results = json.loads((tmp_path / "demo.json").read_text())
    assert "tau_0.15" in json.loads((tmp_path / "demo" / "seed-01.json").read_text())["arms"]
    assert list(results["arms"]) == ["teacher", "student", "kd"]
    assert results["absent"]["tau_0.15"].startswith("NothingToLearn: demo: no group is left")


def test_sizes_of_the_recipe_are_those_that_are_said():
    tokenizer = make_tokenizer()
    with torch.device("meta"):
        both = [make_model(tokenizer, size, seed=0) for size in (demo_gpu.RECIPE.teacher, demo_gpu.RECIPE.student)]
    assert [round(sum(p.numel() for p in model.parameters()) / 1e6) for model in both] == [52, 23]
    assert {"kd", "random", "student_gradient", "leaf", "leaf_collective"} < set(demo_gpu.COMPARED)
