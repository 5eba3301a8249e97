"""A run that is killed goes on, and ends where an uninterrupted one ends."""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys

import pytest
from small import Said, word_problems, write_rows

from leaf import tables
from leaf.config import RunConfig
from leaf.run import run_stages
from leaf.tables import open_table

# `kill -9` in the middle of writing the second shard of the table that is named.
KILLED = """
import os, signal, sys
from leaf import cli, tables
tables.SHARD_UNITS = 2
replace = os.replace
def die(source, target):
    if str(target).endswith(sys.argv[1] + "/part-00001.parquet"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = die
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize("table", ["score-teacher", "prune"])
def test_kill_and_resume_equals_an_uninterrupted_run(
    tmp_path: pathlib.Path, pair: dict[str, str], table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SHARD_UNITS", 2)
    data = write_rows(tmp_path / "rows.jsonl", word_problems(5))
    options = {**pair, "data": data, "select": "all", "verify": "none"}
    stages = ("select", "score", "prune")

    def config(name: str) -> RunConfig:
        return RunConfig.from_mapping({**options, "output": str(tmp_path / name)})

    run_stages(config("whole"), stages)
    killed = config("killed")
    run_stages(killed, ("select",) if table.startswith("score") else ("select", "score"))
    argv = [table.split("-")[0], "--output", killed.output]
    argv += (
        [flag for role in pair for flag in (f"--{role}", pair[role])] if argv[0] == "score" else ["--verify", "none"]
    )
    done = subprocess.run([sys.executable, "-c", KILLED, table, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (pathlib.Path(killed.output) / table / "part-00000.parquet").exists()
    with pytest.raises(ValueError, match="unfinished"):
        open_table(f"{killed.output}/{table}")

    said = Said()
    run_stages(killed, stages, said)
    assert f"{table}: resumed after 1 of 3 shards" in said
    assert "select: unchanged" in said
    for name in ("select", "score-teacher", "score-student", "score", "prune"):
        whole, resumed = (open_table(tmp_path / run / name) for run in ("whole", "killed"))
        assert (resumed.rows(), resumed.counts) == (whole.rows(), whole.counts)
