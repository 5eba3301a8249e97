"""The score stage: the same tables from any number of processes, whenever they are killed, and every row accounted for."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import random
import subprocess
import sys

import pytest
import torch
from small import Said, word_problems, write_rows

import leaf.run
from leaf import cli, sensitivity
from leaf.config import RunConfig
from leaf.demo.comparison import one_thread
from leaf.run import Run, run_stages
from leaf.stages import encoded, selected_rows
from leaf.tables import open_table

TABLES = ("score-teacher", "score-student", "score")

# Forks one child after the other, each of which scores until it is killed after the given seconds; the last one is not.
# Imports are done once, and no thread is alive when a child is made.
KILL = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
import leaf.run, leaf.stages
from leaf import cli
for delay in [*map(float, sys.argv[1].split(",")), None]:
    child = os.fork()
    if child == 0:
        os._exit(cli.main(sys.argv[2:]))
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
"""


def config(pair: dict[str, str], folder: pathlib.Path, rows: int = 12) -> RunConfig:
    """Packs of about two samples, each in a shard of its own; two lengths of rows."""
    problems = word_problems(rows)
    for row in problems[::3]:
        row["prompt"] = "A robe takes 2 bolts of blue fiber. " * 4 + row["prompt"]
    data = write_rows(folder / "rows.jsonl", problems)
    return RunConfig.from_mapping(
        {
            **pair,
            "data": data,
            "output": str(folder / "run"),
            "select": "all",
            "max_tokens": 180,
            "signal": "perplexity",
        }
    )


def contents(folder: str) -> dict[str, tuple[str, dict[str, int]]]:
    return {name: (table.fingerprint, table.counts) for name in TABLES for table in [open_table(f"{folder}/{name}")]}


def command(options: RunConfig) -> list[str]:
    flags = ("teacher", "student", "output", "max_tokens", "signal")
    return ["score", *(text for name in flags for text in (f"--{name.replace('_', '-')}", str(getattr(options, name))))]


@pytest.fixture(scope="module")
def whole(pair: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, int]]]:
    options = config(pair, tmp_path_factory.mktemp("whole"))
    with one_thread():
        run_stages(options, ("select", "score"))
    lengths = [len(row["input_ids"]) for row in open_table(f"{options.output}/score")]
    assert len(open_table(f"{options.output}/score-teacher").manifest["shards"]) >= 6, lengths
    return contents(options.output)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_share_the_work_and_the_tables_are_those_of_one_process(
    pair: dict[str, str], tmp_path: pathlib.Path, whole: dict[str, tuple[str, dict[str, int]]], ranks: int
) -> None:
    """Bitwise: the packs are planned for the whole table, whoever measures them."""
    options = config(pair, tmp_path)
    run_stages(options, ("select",))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "leaf", *command(options)],
            env={**environment, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, errors
    assert contents(options.output) == whole


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_to_the_same_tables(
    pair: dict[str, str], tmp_path: pathlib.Path, whole: dict[str, tuple[str, dict[str, int]]], kills: int
) -> None:
    options = config(pair, tmp_path)
    run_stages(options, ("select",))
    rng = random.Random(kills)
    delays = ",".join(str(rng.uniform(0.2, 1.5)) for _ in range(kills))
    done = subprocess.run(
        [sys.executable, "-c", KILL, delays, *command(options)], capture_output=True, text=True, timeout=600, check=True
    )
    assert done.stdout.split()[0] == "killed", "the first came before the end"
    assert done.stdout.split()[-1] == "0", done.stderr
    assert contents(options.output) == whole


def test_what_does_not_fit_is_counted_with_its_length(
    pair: dict[str, str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for 100 tokens: pairs are parted, the long rows are skipped, and a run says so and fails."""
    options = config(pair, tmp_path)
    measure, seen = sensitivity.Scorer._measure, []

    def small(self: sensitivity.Scorer, batch: list):
        tokens = sum(len(sample.input_ids) for sample in batch)
        seen.append(tokens)
        if tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return measure(self, batch)

    monkeypatch.setattr(sensitivity.Scorer, "_measure", small)
    said = Said()
    problems = run_stages(options, ("select", "score"), said)
    rows = open_table(f"{options.output}/score").rows()
    long = [row for row in rows if row["status"] == "skipped"]
    assert [row["id"] for row in long] == ["p0", "p3", "p6", "p9"]
    assert {row["reason"] for row in long} == {"oom"}
    details = [row["detail"] for row in long]
    assert all(detail.endswith("tokens do not fit into memory, not even alone") for detail in details), details
    assert all(row["teacher_norm"] for row in rows if row["status"] == "ok")
    assert len(seen) < 30, "a size that did not fit is not tried again"
    assert problems == ["score: 4 of 12 rows were skipped, more than --max-skip-fraction 0.01 (skipped:oom 4)"]
    assert any("do not fit into memory with the teacher (skipped: oom)" in line for line in said)


def test_the_teacher_alone_is_quantized_and_measured_again(
    pair: dict[str, str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for bitsandbytes."""
    options = config(pair, tmp_path, rows=2)
    load, quantized = leaf.run.load_model, []

    def stand_in(name: str, *args: object, quantization: str | None, **_: object):
        quantized.append((pathlib.Path(name).name, quantization))
        return load(name, *args)

    monkeypatch.setattr(leaf.run, "load_model", stand_in)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    run_stages(options, ("select", "score"))
    said = Said()
    run_stages(dataclasses.replace(options, teacher_quantization="4bit"), ("select", "score"), said)
    assert quantized == [("teacher", None), ("student", None), ("teacher", "4bit")]
    assert 'score-teacher: computed again, because quantization (null -> "4bit") changed' in said
    assert "score-student: unchanged" in said
    assert sum("quantized to 4bit" in line for line in said) == 1


def test_another_error_is_not_taken_for_a_lack_of_memory(
    pair: dict[str, str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(sensitivity.Scorer, "_measure", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_stages(config(pair, tmp_path), ("select", "score"))


def test_dry_run_counts_and_writes_nothing(
    pair: dict[str, str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")  # of the tables
    options = config(pair, tmp_path)
    run_stages(options, ("select",))
    before = sorted(pathlib.Path(options.output).rglob("*"))
    flags = [*command(options), "--dry-run"]
    assert cli.main(flags) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in ("samples 12 12 ", "packs of up to 180 ", "score, teacher", "score, student", "memory in MiB"):
        assert part in out, part
    longest = max(select_lengths(options))
    assert f"longest sample {longest} {longest} " in out

    assert cli.main([*flags, "--max-length", "100"]) == 1
    out, err = capsys.readouterr()
    assert "samples 8 8 skipped: too_long 4 4 " in " ".join(out.split())
    assert "score: 8 of 12 left (skipped:too_long 4)" in " ".join(err.split())
    assert "4 of 12 rows were skipped, more than --max-skip-fraction 0.01" in " ".join(err.split())
    assert cli.main([*flags, "--max-length", "100", "--max-skip-fraction", "0.4"]) == 0
    assert sorted(pathlib.Path(options.output).rglob("*")) == before


def select_lengths(options: RunConfig) -> list[int]:
    units = encoded(Run(options), selected_rows(Run(options)))
    return [len(unit.student.input_ids) for unit in units]
