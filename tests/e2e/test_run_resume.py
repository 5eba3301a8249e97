"""A run that is killed goes on, and ends where an uninterrupted one ends."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from small import Said, word_problems, write_rows

from leaf import tables
from leaf.config import RunConfig
from leaf.run import run_all, run_stages
from leaf.tables import open_table

# `kill -9` in the middle of writing the second shard of the table that is named.
KILLED = """
import os, signal, sys
from leaf import cli, tables
tables.SHARD_UNITS = 2
replace = os.replace
def die(source, target):
    if f"/{sys.argv[1]}/part-00001" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = die
cli.main(sys.argv[2:])
"""

# `kill -9` in the middle of writing the second checkpoint.
KILLED_TRAINING = """
import os, signal, sys
from leaf import cli
from transformers import TrainerState
save = TrainerState.save_to_json
def die(self, path):
    if self.global_step == 2:
        open(path, "w").write('{"glob')
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, path)
TrainerState.save_to_json = die
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "table", ["score-teacher", *(pytest.param(name, marks=pytest.mark.slow) for name in ("score", "prune"))]
)
def test_kill_and_resume_equals_an_uninterrupted_run(
    tmp_path: pathlib.Path, pair: dict[str, str], table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SHARD_UNITS", 2)
    data = write_rows(tmp_path / "rows.jsonl", word_problems(5))
    options = {**pair, "data": data, "select": "all", "verify": "none", "max_tokens": 140}  # two rows a pack
    stages = ("select", "score", "prune")

    def config(name: str) -> RunConfig:
        return RunConfig.from_mapping({**options, "output": str(tmp_path / name)})

    run_stages(config("whole"), stages)
    killed = config("killed")
    run_stages(killed, ("select",) if table.startswith("score") else ("select", "score"))
    argv = [table.split("-")[0], "--output", killed.output]
    argv += (
        [*(flag for role in pair for flag in (f"--{role}", pair[role])), "--max-tokens", "140"]
        if argv[0] == "score"
        else ["--verify", "none"]
    )
    done = subprocess.run([sys.executable, "-c", KILLED, table, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((pathlib.Path(killed.output) / table).glob("part-*.parquet"))) == 1
    with pytest.raises(ValueError, match="unfinished"):
        open_table(f"{killed.output}/{table}")

    said = Said()
    run_stages(killed, stages, said)
    assert f"{table}: resumed after 1 of 3 shards" in said
    assert "select: unchanged" in said
    for name in ("select", "score-teacher", "score-student", "score", "prune"):
        whole, resumed = (open_table(tmp_path / run / name) for run in ("whole", "killed"))
        assert (resumed.rows(), resumed.counts) == (whole.rows(), whole.counts)


def test_killed_training_resumes_from_its_last_whole_checkpoint(tmp_path: pathlib.Path, pair: dict[str, str]) -> None:
    options = {
        **pair,
        "data": write_rows(tmp_path / "rows.jsonl", word_problems(4)),
        "select": "all",
        "verify": "none",
        "output": str(tmp_path / "run"),
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "save_steps": 1,
            "save_total_limit": 3,
        },
    }
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(options))  # JSON is YAML
    whole = RunConfig.from_mapping(options)
    run_stages(whole, ("select", "score", "prune", "verify"))
    shutil.copytree(whole.output, tmp_path / "killed")
    run_stages(whole, ("distill",))

    argv = [
        sys.executable,
        "-c",
        KILLED_TRAINING,
        "distill",
        "--config",
        str(file),
        "--output",
        str(tmp_path / "killed"),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (first,) = (tmp_path / "killed" / "checkpoints").glob("*/checkpoint-1/model.safetensors")
    written = first.stat().st_mtime_ns
    said = Said()
    run_stages(RunConfig.from_mapping({**options, "output": str(tmp_path / "killed")}), ("distill",), said)
    assert "distill: resumed from checkpoint-1" in said
    assert first.stat().st_mtime_ns == written  # the first step was not taken again
    uninterrupted, resumed = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("run", "killed"))
    assert uninterrupted.keys() == resumed.keys()
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in resumed)


@pytest.mark.slow
def test_two_ranks_write_one_run(tmp_path: pathlib.Path, pair: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lenient.py").write_text("def right(response, answer):\n    return True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    options = {**pair, "data": write_rows(tmp_path / "rows.jsonl", word_problems(5)), "grader": "lenient:right"}
    options |= {"max_new_tokens": 2, "device": "cpu"}

    def run(name: str, batch_size: int) -> dict[str, object]:
        training = {"max_steps": 2, "per_device_train_batch_size": batch_size, "learning_rate": 1e-2}
        return {**options, "output": str(tmp_path / name), "training": training}

    run_all(RunConfig.from_mapping(run("one", 4)))
    file = tmp_path / "two.yaml"
    file.write_text(json.dumps(run("two", 2)))
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*argv, "-m", "leaf", "run", "--config", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
    for table in ("select", "score", "verify"):
        assert open_table(tmp_path / "one" / table).rows() == open_table(tmp_path / "two" / table).rows()
    shares = [path.read_text().splitlines() for path in sorted((tmp_path / "two" / "responses").glob("*/*.jsonl"))]
    assert min(map(len, shares)) > 0  # both ranks were asked
    assert len({line for share in shares for line in share}) == sum(map(len, shares))
