"""`leaf cache` between verify and distill."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from small import Said, word_problems, write_rows

from leaf import cli
from leaf.config import STAGES, RunConfig
from leaf.distill import load_teacher
from leaf.pack import build_groups
from leaf.run import Run, run_stages
from leaf.tables import open_table
from leaf.teacher import TeacherCache

BEFORE = STAGES[: STAGES.index("cache")]


def config(folder: pathlib.Path, pair: dict[str, str], **options: Any) -> RunConfig:
    data = write_rows(folder / "rows.jsonl", word_problems(4))
    common = {"output": str(folder / "run"), "select": "all", "verify": "none", "level": "both", "device": "cpu"}
    return RunConfig(**pair, data=data, **common, **options)


def test_everything_that_is_distilled_is_cached(tmp_path: pathlib.Path, pair: dict[str, str]) -> None:
    run_stages(config(tmp_path, pair), [*BEFORE, "cache"])
    folder = tmp_path / "run" / "cache"
    assert not folder.exists(), "nothing to do with --teacher-mode replicate"

    hidden = config(tmp_path, pair, teacher_mode="cached_hidden")
    run_stages(hidden, ["cache"])
    run = Run(hidden)
    groups = build_groups(open_table(run.folder / "score"), open_table(run.folder / "verify"), run.encoder.encode_text)
    cache = load_teacher(run)
    assert isinstance(cache, TeacherCache)
    for group in groups:
        for member in (group["original"], *group["counterfactuals"]):
            read = cache.read(**member)["teacher_hidden"]
            assert read.shape == (len(member["input_ids"]) - member["response_start"], 16)
    assert len(cache) >= len(groups) + 1

    topk = {"teacher_mode": "cached_topk", "cache_topk": 3}
    with pytest.raises(ValueError, match="was built with kind hidden, and this run has topk: run `leaf cache`"):
        load_teacher(Run(config(tmp_path, pair, **topk)))
    run_stages(config(tmp_path, pair, **topk, temperature=2.0), ["cache"])
    with pytest.raises(ValueError, match=r"was built with temperature 2.0, and this run has 1.0"):
        load_teacher(Run(config(tmp_path, pair, **topk)))
    cache = load_teacher(Run(config(tmp_path, pair, teacher_mode="cached_topk", temperature=2.0)))
    assert isinstance(cache, TeacherCache)
    assert cache.read(**groups[0]["original"])["topk_ids"].shape[1] == 3

    said = Said()
    run_stages(config(tmp_path, pair, teacher_mode="cached_hidden", q=0.3), ["prune", "verify", "cache"], said)
    assert any(line.startswith("cache: computed again, because") and "kind" in line for line in said)


@pytest.mark.slow
def test_its_size_is_estimated_before(
    tmp_path: pathlib.Path, pair: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_stages(config(tmp_path, pair), BEFORE)
    run = Run(config(tmp_path, pair))
    groups = build_groups(open_table(run.folder / "score"), open_table(run.folder / "verify"), run.encoder.encode_text)
    originals = [group["original"] for group in groups if group["original"]]
    rows = sum(len(member["input_ids"]) - member["response_start"] for member in originals)
    argv = ["estimate", "--data", str(tmp_path / "rows.jsonl"), "--device", "h100", "--lora-rank", "2"]
    argv += [word for role, name in pair.items() for word in (f"--{role}", name)]
    for level in ("instruction", "both"):
        assert cli.main([*argv, "--teacher-mode", "cached_topk", "--level", level]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"cache on disk: {rows * 64 * 8 / 2**30:.3g} GiB for {rows} response tokens of the originals" in said
        assert "LoRA of rank 2; --teacher-mode cached_topk" in said
    assert cli.main([*argv, "--teacher-mode", "fsdp2"]) == 0
    assert "distil is not estimated with --teacher-mode fsdp2" in " ".join(capsys.readouterr().out.split())


def test_on_the_command_line(tmp_path: pathlib.Path, pair: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    run_stages(config(tmp_path, pair), BEFORE)
    models = [word for role, name in pair.items() for word in (f"--{role}", name)]
    command = ["cache", *models, "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main(command) == 2
    assert "needs no cache: give `leaf cache --teacher-mode cached_hidden` or" in capsys.readouterr().err
    assert cli.main([*command, "--teacher-mode", "cached_topk", "--cache-topk", "7"]) == 0
    assert "cache: the 7 most probable of" in capsys.readouterr().err
    cache = TeacherCache(tmp_path / "run" / "cache")
    assert (cache.kind, cache.temperature, cache.key["k"]) == ("topk", 1.0, 7)
    assert cli.main(["distill", *models, "--output", str(tmp_path / "run"), "--teacher-mode", "cached_hidden"]) == 2
    assert "run `leaf cache`" in capsys.readouterr().err
