"""Goal D4 on an NVIDIA GPU: a fresh process with an empty cache launches what a wheel carries and compiles nothing.

    pytest -m gpu tests/kernels/test_precompiled_gpu.py

Says how long the first call of each op took there, as it is served and as it is compiled; in the file that LEAF_FIRST_CALLS
names too. Triton's own start, once for a process, is apart: with an empty cache it compiles its launcher in C, which no
wheel can bring.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import GPU_ONLY

from benchmarks.timing import write_json
from leaf_kernels.testing.offline import CAPABILITY

pytest.importorskip("triton", reason="launches kernels")


def on_gpu(test: Any) -> Any:
    """A test that needs a GPU; that of the file needs none."""
    for mark in GPU_ONLY:
        test = mark(test)
    return test


CALLS = """
import json, sys, time
from pathlib import Path
import leaf_kernels._runtime.precompiled as precompiled
from leaf_kernels.precompile import precompile, shipped_calls

names = (
    "attention of Llama-3.2-1B, deterministic=True", "attention of Llama-3.2-1B, deterministic=False",
    "attention mass of Llama-3.2-1B", "forward_kl over 128256, training=True", "top-k over 128256, training=True",
    "scores of torch.bfloat16, masked=True",
)
calls = {name: call for name, call in shipped_calls() if name in names}
assert set(calls) == set(names)
folder = Path(sys.argv[1])
"""

PRECOMPILE = """
for call in calls.values():
    precompile(sys.argv[2], folder, call)
print("{}")
"""

LAUNCH = """
import torch, triton
torch.zeros(1, device="cuda")
precompiled.FOLDER = folder
compiled = []
triton.knobs.compilation.listener = lambda *, metadata, cache_hit, **_: cache_hit or compiled.append(metadata["name"])
start = time.perf_counter()
triton.runtime.driver.active.utils
seconds = {"Triton's own start": time.perf_counter() - start}
for name, call in calls.items():
    start = time.perf_counter()
    call(4096, "cuda")
    torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start
print(json.dumps([seconds, compiled]))
"""


def run(code: str, *arguments: str, cache: Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CALLS + code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@on_gpu
def test_a_fresh_process_compiles_nothing_that_is_carried(tmp_path, request):
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if arch not in CAPABILITY:
        pytest.skip(f"kernels are compiled ahead for {', '.join(CAPABILITY)}, not for {arch}")
    carried = tmp_path / "carried"
    run(PRECOMPILE, str(carried), arch, cache=tmp_path / "build")
    served, compiled = run(LAUNCH, str(carried), cache=tmp_path / "served")
    fresh, all_compiled = run(LAUNCH, str(tmp_path / "absent"), cache=tmp_path / "fresh")
    say = request.config.pluginmanager.get_plugin("terminalreporter").write_line
    say(f"\nfirst calls on {torch.cuda.get_device_name()}, seconds: carried, compiled")
    for name, seconds in served.items():
        say(f"  {name}: {seconds:.2f}, {fresh[name]:.2f}")
    if path := os.environ.get("LEAF_FIRST_CALLS"):
        seconds = {name: {"carried": served[name], "compiled": fresh[name]} for name in served}
        write_json(Path(path), {"seconds": seconds, "compiled_though_carried": compiled})
    assert compiled == []
    assert len(all_compiled) >= len(list(carried.iterdir()))


def test_what_was_measured_is_written(tmp_path, request, monkeypatch):
    """With a stand-in for the processes on a GPU."""
    first_calls, launched = tmp_path / "first_calls.json", iter([0.5, 4.0])

    def processes(code, *arguments, cache):
        return [{"Triton's own start": 0.25, "scores": next(launched)}, ["forward"]] if code is LAUNCH else None

    monkeypatch.setitem(globals(), "run", processes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setenv("LEAF_FIRST_CALLS", str(first_calls))
    with pytest.raises(AssertionError, match="forward"):  # a kernel that is carried was compiled
        test_a_fresh_process_compiles_nothing_that_is_carried(tmp_path, request)
    written = json.loads(first_calls.read_text())
    assert written["seconds"]["Triton's own start"] == {"carried": 0.25, "compiled": 0.25}
    assert written["seconds"]["scores"] == {"carried": 0.5, "compiled": 4.0}
    assert written["compiled_though_carried"] == ["forward"]
