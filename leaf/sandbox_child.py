"""Runs one program and its tests with few rights: a script that `leaf.sandbox` starts, alone in a fresh interpreter.

    python -I -S sandbox_child.py FOLDER namespaces|limits < program.json

It forks. The child gives up what it may do, runs the program and then its tests; the parent waits for it, kills it when
its time is over, and exits with RIGHT, WRONG or, where the confinement itself failed, FAILED and a message on stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import sys
import types
from typing import Any, NoReturn

RIGHT, WRONG, FAILED = 0, 10, 11
NOBODY = 65534
CPU_SECONDS, WALL_SECONDS = 5, 10
LIMITS = {
    resource.RLIMIT_CPU: CPU_SECONDS,
    resource.RLIMIT_AS: 1 << 30,
    resource.RLIMIT_FSIZE: 16 << 20,
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_NPROC: 0,  # no process and no thread besides the one that is there, so nothing outlives it
}
DISK = b"size=64m,nr_inodes=4096,mode=755"  # of the private file system, which is memory

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION_3 = 0x20080522

READY = b"r"  # the program starts now: whatever happens from here on is its own doing


def main(folder: str, isolation: str) -> int:
    program = json.load(sys.stdin)
    token = os.urandom(16)
    if isolation == "namespaces":
        unshare()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        run_confined(program, folder, isolation, writer, token)
    os.close(writer)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(WALL_SECONDS)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # its id stays its own until no alarm can come any more
    signal.alarm(0)
    _, status = os.waitpid(child, 0)
    said = os.read(reader, 64)  # nobody is left to write more
    if not said:
        return FAILED
    return RIGHT if status == 0 and said == READY + token else WRONG


def run_confined(program: dict[str, str], folder: str, isolation: str, writer: int, token: bytes) -> NoReturn:
    """The token goes to the parent after the last test only: a program that exits early has said nothing."""
    write, leave = os.write, os._exit  # before the program can replace them
    try:
        null = os.open(os.devnull, os.O_RDWR)
        confine(folder, isolation)
        write(writer, READY)  # fails where the parent is gone, whose death would not be told any more
    except BaseException as error:
        write(2, f"{type(error).__name__}: {error}".encode())
        leave(1)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    try:
        run(**program)
    except BaseException:  # SystemExit among them
        leave(1)
    write(writer, token)
    leave(0)


def run(prompt: str, code: str, tests: str) -> None:
    """Runs `code` and then `tests` in one module. What does not compile alone is the body of the prompt's function, which
    ends at the first line that is not indented."""
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses and pickle look there
    sources = [prompt, code, tests]
    try:
        compile(code, "program", "exec", dont_inherit=True)
    except Exception:
        sources = [prompt + re.split(r"\n(?=\S)", code)[0], tests] if prompt else sources
    for source in sources:  # apart, so that an open string or block of the program cannot swallow its tests
        exec(compile(source, "program", "exec", dont_inherit=True), module.__dict__)


def confine(folder: str, isolation: str) -> None:
    """Gives up what this process may do; `folder` becomes what it can write to."""
    root = os.getuid() == 0
    uid, gid = (NOBODY, NOBODY) if root else (os.getuid(), os.getgid())
    home = folder
    os.umask(0o022)
    if isolation == "namespaces":
        build_root(folder)
        os.chroot(folder)
        home = "/tmp"  # of the new root
        os.mkdir(home, 0o700)
    os.chown(home, uid, gid)
    os.chdir(home)
    os.environ.clear()
    os.environ.update(HOME=home, TMPDIR=home, PATH="/usr/bin:/bin")
    sys.argv, sys.dont_write_bytecode = [""], True
    if root:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    libc("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())  # none
    libc("prctl", *map(ctypes.c_ulong, (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)))
    libc("prctl", *map(ctypes.c_ulong, (PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)))
    for name, limit in LIMITS.items():
        resource.setrlimit(name, (limit, limit))
    check_confinement(uid)


def check_confinement(uid: int) -> None:
    """That limits bind, and that the program will find the standard library."""
    try:
        with open(os.__file__):
            pass
    except PermissionError:
        raise PermissionError(f"user {uid} may not read {os.path.dirname(os.__file__)}") from None
    try:
        stray = os.fork()
    except OSError:
        return
    if stray == 0:
        os._exit(0)
    os.waitpid(stray, 0)
    raise OSError("the limit on processes does not bind")


def unshare() -> None:
    """Namespaces of its own for the child that is forked next. Who is not root may make them inside a user namespace."""
    uid, gid = os.getuid(), os.getgid()
    wanted = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    libc("unshare", wanted | (CLONE_NEWUSER if uid else 0))
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def build_root(folder: str) -> None:
    """A file system in memory at `folder`: empty but for what an interpreter reads, which cannot be written."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, DISK)
    libraries = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", sys.base_prefix, sys.base_exec_prefix]
    for path in filter(os.path.exists, dict.fromkeys(libraries)):
        target = bind(path, folder)
        for point in mounts_in(target):  # one by one: what is mounted below a folder is not made read-only with it
            kept = os.statvfs(point).f_flag & MS_NOEXEC  # a flag of the original may not be taken away
            mount(None, point, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)
    bind(os.devnull, folder)


def bind(path: str, folder: str) -> str:
    target = folder + path
    os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
    if not os.path.exists(target):
        open(target, "x").close()
    mount(path, target, None, MS_BIND | MS_REC)
    return target


def mounts_in(path: str) -> list[str]:
    """`path` and the mount points below it."""
    with open("/proc/self/mountinfo") as file:
        points = {re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4]) for line in file}
    return [path, *(point for point in sorted(points) if point.startswith(path + "/"))]


def mount(source: str | None, target: str, kind: str | None, flags: int, options: bytes | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    libc("mount", *texts, ctypes.c_ulong(flags), options)


def libc(name: str, *arguments: Any) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except OSError as error:
        print(error, file=sys.stderr)  # noqa: T201 - `leaf.sandbox` reads it
        sys.exit(FAILED)
