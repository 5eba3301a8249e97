"""The command line: what is imported, what it says, what it returns."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from leaf import __version__, cli

COMMANDS = (
    "demo",
    "doctor",
    "estimate",
    "run",
    "select",
    "score",
    "prune",
    "cache",
    "distill",
    "eval",
    "report",
    "export",
)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_imports_no_heavy_package() -> None:
    script = (
        "import sys, leaf, leaf.cli\n"
        "try: leaf.cli.main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'rich', 'yaml', 'triton'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_m_leaf() -> None:
    done = subprocess.run([sys.executable, "-m", "leaf", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"leaf {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"leaf {command}" in out
    assert "--debug" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "required: COMMAND"),
        (("dustill",), "invalid choice: 'dustill'"),
        (("run", "--max-lenght", "3"), "leaf run: unknown option --max-lenght; did you mean '--max-length'"),
        (("score", "--lambda", "0.3"), "leaf score: unknown option --lambda"),
        (("prune", "--tau", "0.1"), "leaf prune: tau has no effect with rule=quantile"),
        (("run", "--config", "absent.yaml"), "leaf run: --config: cannot read absent.yaml"),
    ],
)
def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="has no effect"):
        cli.main(["prune", "--debug", "--tau", "0.1"])


def test_bad_input_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    code, _, err = run(capsys, "select", "--output", str(tmp_path / "run"))
    assert code == 2
    assert "no rows: give --data" in err
    code, _, err = run(capsys, "select", "--data", str(tmp_path / "x.jsonl"), "--output", str(tmp_path / "run"))
    assert code == 2
    assert "no such file" in err
    assert not (tmp_path / "run").exists()
    code, _, err = run(capsys, "score", "--output", str(tmp_path / "run"), "--student", "s", "--teacher", "t")
    assert code == 2
    assert "holds no table: run `leaf select` first" in err


def test_a_rank_whose_peer_is_gone_says_so_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(message: str) -> None:
        def command(_: object) -> int:
            raise RuntimeError(message)

        monkeypatch.setattr(cli, "_stages", command)

    fails(
        "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:23941. This is typically caused by ..."
    )
    assert run(capsys, "distill") == (
        2,
        "",
        "leaf distill: another process of this run ended; its own message says why\n",
    )
    fails("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        cli.main(["distill"])
