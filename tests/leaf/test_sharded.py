"""A teacher whose layers are shared by two processes measures what the whole one measures, through kills, without hanging.

Starting the processes takes most of the time.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import time
from typing import Any

import pytest
import tiny
import torch
from distributed import on_ranks

from leaf import sensitivity, tables
from leaf.config import RunConfig
from leaf.run import run_stages
from leaf.tables import open_table

pytestmark = pytest.mark.slow


def config(folder: pathlib.Path, **options: object) -> RunConfig:
    pair = {role: str(folder / role) for role in ("teacher", "student")}
    return RunConfig(
        **pair,
        data=str(folder / "rows.jsonl"),
        select="all",
        max_tokens=100,
        device="cpu",
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    tokenizer = tiny.tokenizer()
    for role, seed in (("teacher", 1), ("student", 0)):
        tiny.model(tokenizer, seed=seed, hidden=16, tie_word_embeddings=role == "teacher").save_pretrained(
            tmp_path / role
        )
        tokenizer.save_pretrained(tmp_path / role)
    rows = [
        {"id": f"r{n}", "prompt": f"Tom has {n} books. " * (1 + n % 3), "completion": f"The answer is {n}"}
        for n in range(7)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def score(folder: pathlib.Path, output: str, **options: Any) -> None:
    run_stages(config(folder, output=output, shard_teacher=True, **options), ["score"])


def killed(folder: pathlib.Path, output: str) -> None:
    """Rank 1 is gone after its first shard, before rank 0 has written one."""
    signal.alarm(120)  # ranks that wait for each other are killed
    write = tables.write_bytes

    def and_die(path: pathlib.Path, content: Any) -> None:
        if "score-teacher" in str(path) and os.environ["RANK"] == "0":
            time.sleep(120)
        write(path, content)
        if "score-teacher" in str(path):
            os._exit(9)

    tables.write_bytes = and_die
    score(folder, output)


def resumed(folder: pathlib.Path, output: str) -> dict[str, Any]:
    """Goes on; has nothing left but to finish the table; finds it finished; meets a pack that does not fit."""
    signal.alarm(120)
    calls: list[int] = []
    attempt = sensitivity.Scorer._try

    def counted(self: Any, batch: Any, checkpoints: bool, offload: bool = False) -> Any:
        if self.in_step:
            assert checkpoints, "a pack without checkpoints"
            weight = self.layers[0].mlp.up_proj.weight
            calls.append(sum(len(sample.input_ids) for sample in batch))
            assert weight.to_local().numel() * 2 == weight.numel(), "a rank holds half of a layer"
        return attempt(self, batch, checkpoints, offload)

    sensitivity.Scorer._try = counted  # type: ignore[method-assign]
    score(folder, output)
    first = list(calls)
    if os.environ["RANK"] == "0":
        pathlib.Path(output, "score-teacher", "manifest.json").unlink()
    score(folder, output)
    score(folder, output)
    again = calls[len(first) :]

    def too_large(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    sensitivity.Scorer._measure = too_large  # type: ignore[method-assign]
    with pytest.raises(MemoryError, match="smaller --max-tokens"):
        score(folder, output, dtype="bfloat16")
    return {"first": first, "again": again}


def test_shards_through_a_kill_and_unequal_numbers_of_packs(folder: pathlib.Path) -> None:
    whole, output = config(folder, output=str(folder / "whole")), str(folder / "run")
    run_stages(whole, ["select", "score"])
    run_stages(config(folder, output=output), ["select"])
    table = folder / "run" / "score-teacher"
    with pytest.raises(Exception, match="exit code 9"):
        on_ranks(killed, folder, output)
    assert len(list(table.glob("part-*.parquet"))) == 1
    assert not (table / "manifest.json").exists()
    results = on_ranks(resumed, folder, output)
    packs = len(open_table(folder / "whole" / "score-teacher").manifest["shards"])
    done = [result["first"] for result in results]
    assert len(done[0]) == len(done[1]), "in step"
    idle = [tokens for rank in done for tokens in rank if tokens == 2]
    assert len(done[0]) + len(done[1]) - len(idle) == packs - 1, "nothing that was there is measured again"
    assert idle, "unequal shares"
    assert [result["again"] for result in results] == [[], []]
    tables_of = (open_table(folder / run / "score-teacher") for run in ("run", "whole"))
    for one, other in zip(*tables_of, strict=True):
        assert one["norm"] == pytest.approx(other["norm"], rel=1e-5, abs=1e-7)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
