"""benchmarks/gpu.py, as far as a CPU can tell: what its stages run, that they end with the budget, and that they go on."""

from __future__ import annotations

import importlib
import json
import math
import os
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, tables

CPU = torch.device("cpu")


def started(folder: Path, seconds: float = math.inf, commit: str | None = "a") -> gpu.Run:
    return gpu.Run(CPU, folder, time.monotonic() + seconds, commit, dict(os.environ))


# -- processes ---------------------------------------------------------------------------------------------------------


def test_a_command_that_outlives_the_budget_ends_with_its_children(tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    assert gpu.execute(["-c", parent], started(tmp_path, seconds=2)) is None
    assert time.monotonic() - start < 30
    time.sleep(5)
    assert not (tmp_path / "late").exists()


def test_a_command_tells_its_status_and_what_it_printed(tmp_path):
    assert gpu.execute(["-c", "print('x'); raise SystemExit(7)"], started(tmp_path), tmp_path / "log") == 7
    assert (tmp_path / "log").read_text() == "x\n"


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """What would be run."""
    seen: list[list[str]] = []
    monkeypatch.setattr(gpu, "execute", lambda command, run, log=None: seen.append(list(command)) or 0)
    return seen


@pytest.mark.parametrize("stage", gpu.BENCHMARKS)
def test_a_stage_is_its_benchmark_continued_within_the_budget(tmp_path, commands, capsys, stage):
    assert gpu.benchmark(stage, started(tmp_path, seconds=100))
    (command,) = commands
    assert command[:2] == ["-m", gpu.BENCHMARKS[stage]]
    assert command[2:5] == ["--continue", "--output", str(tmp_path)]
    options = dict(zip(command[5::2], command[6::2]))
    assert 80 < float(options["--budget"]) <= 90
    assert options["--commit"] == "a"
    # The benchmark takes these words: with a spent budget it starts nothing and names what is missing
    options["--budget"] = "-1"
    words = [*command[2:5], *(word for pair in options.items() for word in pair)]
    assert importlib.import_module(gpu.BENCHMARKS[stage]).main(words) == 1
    assert "still to measure" in capsys.readouterr().out


# -- the whole command -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no NVIDIA GPU here" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="writes where it is told to, on a CPU")
def test_stages_share_the_budget_and_what_did_not_fit_is_named(tmp_path, monkeypatch, capsys):
    ran: list[str] = []

    def benchmark(stage: str, run: gpu.Run) -> bool:
        ran.append(stage)
        if stage == "kl":
            time.sleep(max(run.left, 0) + 0.01)
        return stage != "kl"

    monkeypatch.setattr(gpu, "check", lambda run: ran.append("check") or True)
    monkeypatch.setattr(gpu, "benchmark", benchmark)
    assert gpu.main(["--output", str(tmp_path), "--budget", "0.5"]) == 1
    assert ran == ["check", "attention", "kl"]
    assert f"not done: {', '.join(gpu.STAGES[2:])};" in capsys.readouterr().out
    assert gpu.main(["--output", str(tmp_path), "--stage", "attention"]) == 0
    assert ran[3:] == ["attention"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="writes where it is told to, on a CPU")
def test_peers_come_from_a_folder_of_wheels(tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "some_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_peer.py", "there = True\n")
        wheel.writestr("some_peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-peer\nVersion: 1.0\n")
        wheel.writestr(
            "some_peer-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("some_peer-1.0.dist-info/RECORD", "")
    code = "import importlib.metadata, some_peer; assert importlib.metadata.version('some-peer') == '1.0'"
    monkeypatch.setattr(gpu, "check", lambda run: gpu.execute(["-c", code], run) == 0)
    command = ["--output", str(tmp_path), "--stage", "check"]
    assert gpu.main(command) == 1
    assert gpu.main([*command, "--wheels", str(wheels)]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="writes where it is told to, on a CPU")
def test_a_folder_without_wheels_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path), "--wheels", str(tmp_path)])
    assert "no *.whl in there" in capsys.readouterr().err


# -- check -------------------------------------------------------------------------------------------------------------

TESTS = """
import os
from pathlib import Path
import pytest

HERE = Path(__file__).parent

@pytest.mark.parametrize("name", ["a", "b c"])
def test_good(name):
    with (HERE / "runs").open("a") as runs:
        runs.write(name + ";")

def test_bad():
    assert (HERE / "fixed").exists(), "not fixed"

@pytest.mark.skip(reason="not here")
def test_skipped():
    pass
"""


@pytest.fixture
def tests(tmp_path, monkeypatch) -> Path:
    """A file of tests in place of those of the kernels, and no self-check."""
    path = tmp_path / "test_some.py"
    path.write_text(TESTS)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "TESTS", (path.name,))
    execute = gpu.execute

    def without_self_check(command, run, log=None):
        return 0 if "--self-check" in command else execute(command, run, log)

    monkeypatch.setattr(gpu, "execute", without_self_check)
    return path


def test_check_records_every_test_and_runs_only_what_is_left(tests, tmp_path, capsys):
    folder = tmp_path / "results"
    assert not gpu.check(started(folder))
    written = json.loads((folder / "check.json").read_text())
    outcomes = {name.split("::")[1]: outcome for name, outcome in written["tests"].items()}
    expected = {"test_good[a]": "passed", "test_good[b c]": "passed", "test_bad": "failed", "test_skipped": "skipped"}
    assert outcomes == expected
    assert written["tests_complete"]
    assert "not fixed" in capsys.readouterr().out

    (tmp_path / "fixed").touch()
    assert gpu.check(started(folder))
    written = json.loads((folder / "check.json").read_text())
    assert sorted(written["tests"].values()) == ["passed", "passed", "passed", "skipped"]
    assert (tmp_path / "runs").read_text() == "a;b c;"
    # Other code is tested from the start
    assert gpu.check(started(folder, commit="b"))
    assert (tmp_path / "runs").read_text() == "a;b c;a;b c;"


FIRST_CALLS = """
import json, os
from pathlib import Path

def test_first_calls():
    seconds = {"Triton's own start": {"carried": 0.5, "compiled": 0.5}, "scores": {"carried": 1.25, "compiled": 9.0}}
    file = Path(os.environ["LEAF_FIRST_CALLS"])
    file.write_text(json.dumps({"seconds": seconds, "compiled_though_carried": COMPILED}))
    assert not COMPILED
"""


@pytest.mark.parametrize(("compiled", "verdict"), [([], "reached"), (["forward"], "missed")])
def test_first_calls_are_kept_judged_and_have_a_table(tests, tmp_path, capsys, compiled, verdict):
    folder = tmp_path / "some-gpu"
    assert "Not measured yet" in tables.gpu_first_calls(tmp_path)
    tests.write_text(f"COMPILED = {compiled}\n{FIRST_CALLS}")
    assert gpu.check(started(folder)) is not bool(compiled)
    assert f"longest first call, s: 1.75, wanted at most 2.00: {verdict}" in capsys.readouterr().out
    tests.write_text("def test_other(): pass")  # the next call keeps them: what passed does not run again
    gpu.check(started(folder))
    table = tables.gpu_first_calls(tmp_path)
    assert f"| D4 | fresh process | longest first call, s | 1.75 | ≤ 2.00 | ≤ 0.50 | – | {verdict} |" in table
    assert f"compiled though the wheel carries it: {', '.join(compiled) or 'nothing'}." in table
    assert "| scores | 1.25 | 9.00 |" in table
    gpu.check(started(folder, commit="b"))  # other code: its own or none
    assert "Not measured yet" in tables.gpu_first_calls(tmp_path)


def test_check_that_is_cut_keeps_what_it_has_and_is_not_done(tests, tmp_path, monkeypatch):
    printed = "tests/x.py::test_one PASSED [ 50%]\ntests/x.py::test_two "
    monkeypatch.setattr(gpu, "execute", lambda command, run, log=None: log and log.write_text(printed) and None)
    assert not gpu.check(started(tmp_path))
    written = json.loads((tmp_path / "check.json").read_text())
    assert written["tests"] == {"tests/x.py::test_one": "passed"}
    assert not written["tests_complete"]


def test_the_self_check_writes_its_outcomes(tmp_path, monkeypatch, capsys):
    from leaf_kernels.testing import selfcheck

    def outcomes(where):
        yield selfcheck.Outcome("one", 1e-3, 2e-3)
        yield selfcheck.Outcome("two", failure="wrong")

    monkeypatch.setattr(selfcheck, "run", outcomes)
    assert gpu.main(["--self-check", str(tmp_path / "outcomes.json")]) == 1
    one, two = json.loads((tmp_path / "outcomes.json").read_text())
    assert (one["op"], one["error"], one["budget"], one["failure"]) == ("one", 1e-3, 2e-3, "")
    assert two["failure"] == "wrong"
    assert "FAIL" in capsys.readouterr().out
