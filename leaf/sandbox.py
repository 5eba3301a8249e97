"""Runs generated code in a process of its own with few rights. It keeps mistakes in; it is not a security boundary.

A program never has root's rights: it runs as nobody (uid 65534) where the caller is root, else as the caller. It is one
process without children or threads, with limits on time, memory, files and their size (`sandbox_child.LIMITS`), with an
empty environment and no input, its output goes nowhere, and only the standard library can be imported. How else it is
kept apart depends on the kernel, which is asked once:

- "namespaces": no network, no other process in sight, and a private file system in memory that holds the interpreter's
  own files, read-only, and an empty folder. It ends with the program.
- "limits", where the kernel refuses namespaces (most containers, some distributions), with a warning: the program can
  read and write what its user may, reach the network, and, where the caller is not root, signal the caller's processes.

A verdict is not forged by accident: exiting early, printing, or catching exceptions does not pass. Tests and program share
an interpreter, so one written to cheat can: it can find the token that reports success on the stack, or return objects
that equal everything. Kernel bugs are not guarded against either. A caller that is killed leaves its folder
`leaf-sandbox-…` in the temporary directory. Against hostile code use a virtual machine.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

logger = logging.getLogger(__name__)

SCRIPT = pathlib.Path(__file__).with_name("sandbox_child.py")
RIGHT, WRONG = 0, 10  # its exit codes
PATIENCE = 40  # seconds; it stops a program after 10


def passes(code: str, tests: str, prompt: str = "") -> bool:
    """Whether `code` runs and then `tests` run in the same module, without an exception, within the limits.

    Args:
        prompt: the beginning of a program; `code` that does not compile alone goes on in its last function.

    Raises:
        ValueError: there is no way to run code safely enough here; names the remedy.
        OSError: the confinement failed, though it had worked before.
    """
    return _run({"prompt": prompt, "code": code, "tests": tests}, isolation())


@functools.cache
def isolation() -> str:
    """How programs are kept apart here, "namespaces" or "limits"; found out by running one.

    Raises:
        ValueError: neither works; names the remedy.
    """
    refused: list[str] = []
    for kind in ("namespaces", "limits") if sys.platform == "linux" else ():
        try:
            if _run({"prompt": "", "code": "import decimal", "tests": "assert decimal.Decimal(2) == 2"}, kind):
                if refused:
                    logger.warning("generated code is kept apart by limits and its user alone: %s", refused[0])
                return kind
            refused.append(f"{kind}: a program that is right did not pass")
        except OSError as error:
            refused.append(f"{kind}: {error}")
    raise ValueError(
        f"generated code cannot be run safely enough here ({'; '.join(refused) or 'it takes Linux'}). Start leaf on Linux "
        "as an ordinary user, or as root with an interpreter that every user can read and the right to change users; or "
        "grade with a function of yours, --grader module:function"
    )


def _run(program: dict[str, str], kind: str) -> bool:
    command = [sys.executable, "-I", "-S", str(SCRIPT)]
    with _folder() as folder:
        try:
            done = subprocess.run(
                [*command, folder, kind],
                input=json.dumps(program).encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={},
                cwd="/",
                start_new_session=True,  # what it sends to its process group does not reach the caller
                timeout=PATIENCE,
                check=False,
            )
        except (
            subprocess.TimeoutExpired
        ):  # an ordinary user's program can stop the script that waits for it, or kill it
            return False
    if done.returncode not in (RIGHT, WRONG) and done.returncode >= 0:
        raise OSError(done.stderr.decode(errors="replace").strip())
    return done.returncode == RIGHT


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A new folder that is gone afterwards, whatever was done in it."""
    folder = tempfile.mkdtemp(prefix="leaf-sandbox-")
    try:
        yield folder
    finally:
        try:
            os.rmdir(folder)
        except (
            OSError
        ):  # not empty; unreadable folders and chains longer than a path may be are no trouble to these two
            subprocess.run(["chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL, check=False)
            subprocess.run(["rm", "-rf", folder], check=False)
