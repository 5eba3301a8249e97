"""What a user installs, and what continuous integration really runs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built where importing torch or triton fails: the build needs neither."""
    blocked, out = tmp_path_factory.mktemp("blocked"), tmp_path_factory.mktemp("wheel")
    for name in ("torch", "triton"):
        (blocked / f"{name}.py").write_text("raise ImportError('the build must not import this')")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
        str(ROOT),
    ]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(blocked)})
    (path,) = out.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_both_packages_and_their_data(wheel):
    names = set(wheel.namelist())
    assert {"leaf_kernels/py.typed", "leaf/py.typed", "leaf/cli.py", "leaf/demo/__init__.py"} <= names
    for path in (ROOT / "leaf" / "assets").iterdir():
        assert f"leaf/assets/{path.name}" in names
    packages = {name.split("/")[0] for name in names}
    assert {p for p in packages if not p.endswith(".dist-info")} == {"leaf", "leaf_kernels"}


def test_wheel_of_ops_alone_needs_no_recipe_packages(wheel):
    (metadata,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    required = [line for line in wheel.read(metadata).decode().splitlines() if line.startswith("Requires-Dist:")]
    base = [line for line in required if "extra ==" not in line]
    assert {line.split()[1].split(">")[0].split(";")[0] for line in base} == {"torch", "triton"}


def test_ci_runs_the_two_commands_of_the_readme():
    """Word for word, so that the README cannot rot."""
    readme = (ROOT / "README.md").read_text()
    commands = [line.strip() for line in readme.splitlines() if line.startswith("pip install -e ") and "&&" in line]
    assert len(commands) == 2, commands
    script = (ROOT / ".ci" / "run").read_text().replace("pip install --quiet", "pip install")
    for command in commands:
        assert command in script, f"{command!r} of the README is not what .ci/run runs"
