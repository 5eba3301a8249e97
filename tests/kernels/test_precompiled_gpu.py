"""Goal D4 on an NVIDIA GPU: a fresh process with an empty cache launches what a wheel carries and compiles nothing.

    pytest -m gpu tests/kernels/test_precompiled_gpu.py

Says how long the first call of each op took there, as it is served and as it is compiled. Triton's own start, once for a
process, is apart: with an empty cache it compiles its launcher in C, which no wheel can bring.
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

from leaf_kernels.testing.offline import CAPABILITY

pytestmark = GPU_ONLY
pytest.importorskip("triton", reason="launches kernels")

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
    assert compiled == []
    assert len(all_compiled) >= len(list(carried.iterdir()))
