"""Programs that mean harm, or make mistakes that do, as every kind of caller can run them: whatever they do, the verdict
holds, no process and no file of theirs is left, and nothing outside has changed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator

import pytest

from leaf import sandbox

NOBODY = 65534
DRIVER = """
import json, sandbox, sys
print(json.dumps([sandbox._run(program, sys.argv[1]) for program in json.load(sys.stdin)]))
"""


class Caller:
    """An interpreter of some user that calls a copy of the sandbox."""

    def __init__(self, folder: pathlib.Path, interpreter: str, user: int, kind: str):
        self.folder, self.interpreter, self.user, self.kind = folder, interpreter, user, kind
        self.temporary = folder / "tmp"
        self.outside = folder / "outside"  # a file of the caller's
        for name in ("sandbox.py", "sandbox_child.py"):
            shutil.copy(pathlib.Path(sandbox.__file__).with_name(name), folder)
        self.temporary.mkdir()
        self.outside.write_text("kept")
        for path in (self.temporary, self.outside):
            os.chown(path, user, -1)

    def edit(self, old: str, new: str) -> None:
        path = self.folder / "sandbox_child.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def start(self, *codes: str, tests: str = "") -> subprocess.Popen[str]:
        change = {"user": self.user, "group": self.user, "extra_groups": []} if self.user != os.getuid() else {}
        driver = subprocess.Popen(
            [self.interpreter, "-B", "-c", DRIVER, self.kind],
            cwd=self.folder,
            env={"TMPDIR": str(self.temporary), "SECRET": "token"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **change,  # type: ignore[call-overload]
        )
        assert driver.stdin
        driver.stdin.write(json.dumps([{"prompt": "", "code": code, "tests": tests} for code in codes]))
        driver.stdin.close()
        driver.stdin = None
        return driver

    def verdicts(self, *codes: str, tests: str = "") -> list[bool]:
        """Raises:
        OSError: what the driver said when it failed.
        """
        said, error = self.start(*codes, tests=tests).communicate(timeout=60)
        self.check_clean()
        if not said:
            raise OSError(error)
        return json.loads(said)

    def __call__(self, code: str, tests: str = "") -> bool:
        return self.verdicts(code, tests=tests)[0]

    def check_clean(self) -> None:
        assert not self.processes()
        assert list(self.temporary.iterdir()) == []
        assert self.outside.read_text() == "kept"

    def processes(self) -> list[str]:
        """Command lines of the sandbox and of what it runs: a forked process keeps the one of its parent."""
        found = []
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if str(self.folder / "sandbox_child.py") in line or "9876.5" in line:
                    found.append(line)
        return found


@contextlib.contextmanager
def calling(interpreter: str, user: int, kind: str) -> Iterator[Caller]:
    folder = pathlib.Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    folder.chmod(0o755)
    try:
        yield Caller(folder, interpreter, user, kind)
    finally:
        shutil.rmtree(folder)


@functools.cache
def working(user: int, kind: str) -> tuple[str | None, str]:
    """The first interpreter that it works with, or None and why there is none."""
    refused = ""
    for interpreter in filter(os.path.exists, dict.fromkeys([sys.executable, "/usr/bin/python3"])):
        with calling(interpreter, user, kind) as caller:
            try:
                assert caller("import decimal")
                return interpreter, ""
            except OSError as error:
                refused = str(error).strip().rpartition("\n")[2]
    return None, refused


SLOWLY = [pytest.param(f"nobody, {isolation}", marks=pytest.mark.slow) for isolation in ("namespaces", "limits")]


@pytest.fixture(params=["own user, namespaces", "own user, limits", *SLOWLY])
def caller(request: pytest.FixtureRequest) -> Iterator[Caller]:
    """Every way that there is here."""
    who, kind = request.param.split(", ")
    if who == "nobody" and os.getuid() != 0:
        pytest.skip("only root can start a process of another user")
    user = NOBODY if who == "nobody" else os.getuid()
    interpreter, refused = working(user, kind)
    if interpreter is None:
        pytest.skip(f"not possible here: {refused}")
    with calling(interpreter, user, kind) as caller:
        yield caller


def test_right_and_wrong(caller: Caller) -> None:
    code = "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\ndef f(x): return A(x).x + 1\n"
    assert caller(code, "assert f(1) == 2\nassert f(2) == 3")
    assert not caller(code, "assert f(1) == 2\nassert f(2) == 4")
    assert not caller('def f(): return 0\nx = """', 'assert f() == 1  # """')  # tests are no part of its last string


EARLY = [
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "def f(): raise SystemExit(0)",
    "def f():\n    import os\n    os._exit(0)",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "import os\nfor n in range(64):\n    try: os.write(n, b'r' * 17)\n    except OSError: pass\nos._exit(0)",
    "import os; os.closerange(0, 64)",
    'def f(): return 1\nx = """',
    "if False:\n    def f(): return 1\n",
    "assert = 1",
    "def f(): return 1\0",
    "(" * 100000,
    "def f(): return f()",
    "import os\nos.write = lambda *a: 1\nos._exit(0)",
]


def test_what_ends_before_the_tests_have_passed_is_wrong(caller: Caller) -> None:
    passed = caller.verdicts(*EARLY, tests="assert f() == 1")
    assert [code for code, verdict in zip(EARLY, passed) if verdict] == []


# Each is right where the sandbox refuses what it tries.
REFUSED = {
    "processes": """
import os
for n in range(20):
    try: child = os.fork()
    except OSError: continue
    if child == 0:
        import time
        os.setsid(); time.sleep(9876.5)
    raise SystemExit
""",
    "threads": """
import threading
try: threading.Thread(target=print).start()
except RuntimeError: pass
else: raise SystemExit
""",
    "memory": "try: [0] * 2**40\nexcept MemoryError: pass\nelse: raise SystemExit",
    "much memory in small parts": """
kept = []
try:
    while True: kept.append(bytearray(1 << 24))
except MemoryError: pass
assert len(kept) < 64
""",
    "large files": """
file = open("large", "wb", buffering=0)
try:
    for n in range(17): file.write(bytes(1 << 20))
except OSError: pass
else: raise SystemExit
assert file.tell() <= 16 << 20
""",
    "open files": """
kept = []
try:
    for n in range(100): kept.append(open("f"+str(n), "w"))
except OSError: pass
assert len(kept) < 64
""",
    "higher limits": """
import resource
for name in ("CPU", "AS", "FSIZE", "NPROC", "NOFILE", "CORE"):
    try: resource.setrlimit(getattr(resource, "RLIMIT_" + name), (1 << 40, 1 << 40))
    except (ValueError, OSError): pass
    else: raise SystemExit
""",
    "input": "try: input()\nexcept EOFError: pass\nelse: raise SystemExit",
    "environment": """
import os
assert set(os.environ) == {"HOME", "TMPDIR", "PATH"}
assert os.path.samefile(os.environ["HOME"], ".")
""",
    "rights of root": """
import os
assert 0 not in (*os.getresuid(), *os.getresgid())
for change in (os.setuid, os.setgid):
    try: change(0)
    except OSError: pass
    else: raise SystemExit
""",
    "capabilities": """
import ctypes
libc = ctypes.CDLL(None)
sets = (ctypes.c_uint32 * 6)()
assert libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), sets) == 0 and not any(sets)
assert libc.prctl(39, 0, 0, 0, 0) == 1  # and none can be had from a file: PR_GET_NO_NEW_PRIVS
""",
    "packages": "import sys\nassert not any('site-packages' in path or path == '' for path in sys.path)",
    "descriptors": """
import os
for n in range(3, 64):  # but for the one that says whether the tests passed
    try: os.fstat(n)
    except OSError: continue
    import stat
    assert stat.S_ISFIFO(os.fstat(n).st_mode)
""",
}


def test_what_is_refused(caller: Caller) -> None:
    refused = caller.verdicts(*REFUSED.values())
    assert [name for name, verdict in zip(REFUSED, refused) if not verdict] == []


def unless_refused(code: str) -> str:
    """A program that is right where `code` raises OSError."""
    return "try:\n" + textwrap.indent(code, "    ") + "\nexcept OSError: pass\nelse: raise SystemExit"


def test_other_users_files_stay_as_they_are(caller: Caller) -> None:
    if caller.kind == "limits" and caller.user != 0:
        pytest.skip("without namespaces a program has the rights of an ordinary caller")
    outside = str(caller.outside)
    changes = [
        f"open({outside!r}, 'w')",
        f"import os\nos.unlink({outside!r})",
        "import os\nopen(os.path.dirname(os.__file__) + '/leaf-test', 'w')",
        f"import os\nos.mkdir({str(caller.folder / 'new')!r})",
    ]
    refused = caller.verdicts(*map(unless_refused, changes))
    assert [change for change, verdict in zip(changes, refused) if not verdict] == []


def test_namespaces_hide_files_processes_and_the_network(caller: Caller) -> None:
    if caller.kind == "limits":
        pytest.skip("without namespaces they are in sight")
    semaphores = ctypes.CDLL(None).semget(0x1EAF, 1, 0o1666)  # IPC_CREAT
    with socket.create_server(("127.0.0.1", 0)) as server:
        hidden = [
            f"open({str(caller.outside)!r})",
            "open('/etc/passwd')",
            "open('/proc/self/status')",
            f"import socket\nsocket.create_connection({server.getsockname()!r}, timeout=1)",
            "import os\nfor n in range(100): open(str(n), 'wb').write(bytes(1 << 20))",  # 64 MiB in all
            "for n in range(5000): open(str(n), 'wb').close()",
            "import ctypes\nif ctypes.CDLL(None).unshare(1 << 28): raise OSError",  # a user namespace, to be root there
            "import os\nif os.getppid() == 0 and os.getpid() == 1: raise OSError",
            "import os\nif os.statvfs(os.__file__).f_flag & os.ST_RDONLY: raise OSError",
            "import ctypes\nif ctypes.CDLL(None).semget(0x1EAF, 1, 0) == -1: raise OSError",
        ]
        refused = caller.verdicts(*map(unless_refused, hidden))
    if semaphores != -1:
        ctypes.CDLL(None).semctl(semaphores, 0, 0)  # IPC_RMID
    assert [each for each, verdict in zip(hidden, refused) if not verdict] == []


def test_what_it_does_to_its_parent_is_its_own_loss(caller: Caller) -> None:
    killers = [f"import os\nos.kill({target}, 9)\nraise SystemExit" for target in ("os.getppid()", "0")]
    assert caller.verdicts(*killers, "pass") == [False, False, True]


ENDLESS = [
    "while True: pass",
    "import time; time.sleep(9876.5)",
    "while True: print('x' * 100000)",
    "import signal\nfor n in {*range(1, 32)} - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
    "import os; os.execv('/bin/sleep', ['sleep', '9876.5'])",
]


def test_what_does_not_end_is_ended(caller: Caller) -> None:
    caller.edit("CPU_SECONDS, WALL_SECONDS = 5, 10", "CPU_SECONDS, WALL_SECONDS = 1, 2")
    drivers = [caller.start(code) for code in ENDLESS]
    assert [driver.communicate(timeout=30) for driver in drivers] == [("[false]\n", "")] * len(ENDLESS)
    caller.check_clean()


def test_its_folder_is_removed_whatever_is_in_it(caller: Caller) -> None:
    mode = caller.outside.stat().st_mode
    assert caller(f"""
import os
os.symlink({str(caller.outside)!r}, "link")
os.symlink({str(caller.folder)!r}, "folder")
for n in range(100): open(str(n), "w").close()
for name in ("a", "a/b", "a/b/c"):
    os.mkdir(name); open(name + "/-rf *\\n", "w").close()
for name in ("a/b/c", "a/b", "a"): os.chmod(name, 0)
os.mkdir("deep"); os.chdir("deep")
for n in range(300):
    os.mkdir("x" * 20); os.chdir("x" * 20)
""")
    assert caller.outside.stat().st_mode == mode
    assert caller("import os\nos.chmod(os.environ['HOME'], 0)")


def test_an_interrupted_caller_leaves_nothing(caller: Caller) -> None:
    driver = caller.start("import time; time.sleep(9876.5)")
    deadline = time.monotonic() + 20
    while len(caller.processes()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(caller.processes()) == 2  # the script and the program
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=5)
    time.sleep(0.2)
    caller.check_clean()


def test_a_limit_that_does_not_bind_is_found_before_the_program_runs(caller: Caller) -> None:
    caller.edit("    resource.RLIMIT_NPROC: 0,", "    # ")
    with pytest.raises(OSError, match="the limit on processes does not bind"):
        caller("pass")


def forget() -> None:
    sandbox.isolation.cache_clear()


@pytest.fixture
def fresh() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.mark.usefixtures("fresh")
def test_refused_where_nothing_works(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(sys, "platform", "darwin")
        with pytest.raises(ValueError, match=r"it takes Linux.*--grader module:function"):
            sandbox.passes("pass", "assert True")
    broken = tmp_path / "broken.py"
    broken.write_text("import sys; sys.exit('unshare: not permitted')")
    monkeypatch.setattr(sandbox, "SCRIPT", broken)
    with pytest.raises(ValueError, match="namespaces: unshare: not permitted; limits: unshare: not permitted"):
        sandbox.isolation()


@pytest.mark.usefixtures("fresh")
def test_fewer_walls_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def run(program: dict[str, str], kind: str) -> bool:
        if kind == "namespaces":
            raise OSError("unshare: not permitted")
        return True

    monkeypatch.setattr(sandbox, "_run", run)
    with caplog.at_level(logging.WARNING):
        assert sandbox.isolation() == "limits"
        assert sandbox.isolation() == "limits"
    assert [record.getMessage() for record in caplog.records] == [
        "generated code is kept apart by limits and its user alone: namespaces: unshare: not permitted"
    ]


MOUNTED = """
import sandbox, sys
for attempt in ("pass", f"open({sys.argv[1] + '/left'!r}, 'w')"):
    code = f"import os; assert os.path.ismount({sys.argv[1]!r}); {attempt}"
    print(sandbox._run({"prompt": "", "code": code, "tests": ""}, "namespaces"))
"""


def test_what_is_mounted_among_the_interpreters_files_is_read_only_too(tmp_path: pathlib.Path) -> None:
    place = next((path for path in ("/usr/src", "/usr/games", "/usr/local/games") if os.path.isdir(path)), "")
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o mode=777 leaf-test "$0" && exec "$@"', place]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("only who may mount can put something among the interpreter's files")
    for name in ("sandbox.py", "sandbox_child.py"):
        shutil.copy(pathlib.Path(sandbox.__file__).with_name(name), tmp_path)
    driver = [sys.executable, "-B", "-c", MOUNTED, place]
    done = subprocess.run([*mount, *driver], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False"], done.stderr
