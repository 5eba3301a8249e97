"""Wheels that carry compiled kernels: what is built, and that an installed one serves all that it says (docs/wheels.md)."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from leaf_kernels._runtime import launch, precompiled

ROOT = Path(__file__).parents[1]
pytest.importorskip("triton", reason="compiles kernels")

# Every kernel that Triton is asked for goes to `found`, with whether it was compiled for it
COUNT = """
import json, sys
from triton import knobs
from leaf_kernels._runtime.precompiled import serve_precompiled
from leaf_kernels.precompile import launched_for, shipped_calls

def count(calls, sizes):
    found = {}
    def listener(*, metadata, cache_hit, **_):
        found[metadata["hash"]] = "served" if cache_hit else "compiled"
    knobs.compilation.listener = listener
    for tokens in sizes:
        with launched_for("sm_90"):
            for call in calls:
                call(tokens, "cpu")
    knobs.compilation.listener = None
    return found
"""


def python(code: str, *arguments: str, executable: Path | None = None, **environment: str) -> Any:
    """What the program printed last, as JSON. It runs without Triton's interpreter unless told otherwise.

    executable: of another environment, whose packages alone count. None: this one, with this checkout.
    """
    interpreter = [sys.executable] if executable is None else [str(executable), "-I"]
    done = subprocess.run(
        [*interpreter, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def build(source: Path, out: Path, *options: str, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(out), *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def project(folder: Path) -> Path:
    """A copy of what a wheel is built from."""
    for name in ("leaf", "leaf_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_precompiled"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


# -- the build -------------------------------------------------------------------------------------------------------


def test_a_wheel_with_kernels_is_one_for_the_installed_triton(tmp_path):
    """What the build does with a compiler that writes one file."""
    source = project(tmp_path / "project")
    (source / "leaf_kernels" / "precompile.py").write_text(
        "import pathlib, sys\n*architectures, _, folder = sys.argv[1:]\n"
        "pathlib.Path(folder).mkdir(parents=True)\n(pathlib.Path(folder) / 'kernel').write_text(' '.join(architectures))\n"
    )
    path = build(source, tmp_path, "--no-build-isolation", LEAF_KERNELS_PRECOMPILE="sm_80;sm_90")
    name, tagged_version, *tags = path.stem.split("-")
    assert (name, tagged_version) == ("leaf_kernels", f"0.1.0+triton{importlib.metadata.version('triton')}")
    lines = importlib.metadata.distribution("triton").read_text("WHEEL").splitlines()
    for tag in (line[5:] for line in lines if line.startswith("Tag: ")):
        assert all(part in tags[i].split(".") for i, part in enumerate(tag.split("-"))), (tag, tags)
    with zipfile.ZipFile(path) as wheel:
        assert wheel.read("leaf_kernels/_precompiled/kernel").decode() == "sm_80 sm_90"
        assert "leaf_kernels/ops/linear_kl/kernels.py" in wheel.namelist()


def test_without_torch_or_triton_it_says_what_to_install(monkeypatch):
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("LEAF_KERNELS_PRECOMPILE", "sm_90")
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(SystemExit, match=r"torch is not installed.*--no-build-isolation"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_the_docs_say_what_was_built():
    facts = json.loads((ROOT / "benchmarks" / "results" / "wheels" / "triton-3.9.0.json").read_text())
    docs = (ROOT / "docs" / "wheels.md").read_text()
    assert f"[{facts['kernels']} kernels, {facts['bytes'] / 2**20:.1f} MiB]" in docs
    assert f"{facts['kernels']} for {', '.join(facts['architectures'])} and Triton {facts['triton']}\n" in docs


# -- keys ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys() -> dict[str, Any]:
    """What kernels are specialised for: a hook sees what would be compiled, and refuses it."""
    return python("""
import json
import torch
from transformers import Qwen2Config
from triton import knobs
from leaf.trace import fake_model
from leaf_kernels import SharedPrefixLayout, linear_kl
from leaf_kernels.integrations.transformers import MassRecorder, packed_inputs, register
from leaf_kernels.precompile import launched_for, shipped_calls

found = {}

def refuse(*, key, fn, **_):
    found.setdefault(fn.name.rpartition(".")[2], set()).add(str(key))
    return True

knobs.runtime.jit_cache_hook = refuse
wanted = ("attention of Qwen2.5-1.5B", "attention mass of Qwen2.5-1.5B", "forward_kl", "top-k over 50257", "scores")
calls = [call for name, call in shipped_calls() if name.startswith(wanted)]
counts = []
for tokens in (1, 16, 5003):
    with launched_for("sm_90"):
        for call in calls:
            call(tokens, "cpu")
    counts.append({name: len(keys) for name, keys in found.items()})
shipped = dict(found)

found.clear()
register()
layout, ids = SharedPrefixLayout.from_groups([[range(400), [*range(200), *range(301, 500)]], [range(37)]])
config = Qwen2Config(hidden_size=1536, intermediate_size=64, num_hidden_layers=1, num_attention_heads=12,
                     num_key_value_heads=2, vocab_size=151936)
with launched_for("sm_90"):
    model = fake_model(config, torch.bfloat16).requires_grad_(True)
    head = model.get_output_embeddings().weight
    mass = MassRecorder(torch.ones(layout.num_tokens, dtype=torch.bool))
    hidden = model.base_model(**packed_inputs(layout, ids), mass=mass).last_hidden_state[0]
    linear_kl(hidden, head, hidden.detach(), head.detach()).loss.backward()
missing = {name: len(keys - shipped[name]) for name, keys in found.items()}
print(json.dumps({"counts": counts, "missing": missing}))
""")


def test_no_length_enters_a_key(keys):
    first = keys["counts"][0]
    assert all(counts == first for counts in keys["counts"]), keys
    assert first == {
        "forward": 1, "row_terms": 1, "backward_q": 1, "backward_kv": 2, "denominators": 1, "column_sums": 1,
        "divergence_rows": 4, "tail_rows": 2, "row_norms": 4, "segment_scores": 2, "flag_segments": 4, "count_runs": 1,
        "place_runs": 1,
    }  # fmt: skip


def test_a_training_step_of_a_model_asks_for_what_is_shipped(keys):
    """Through transformers: with its strides, its views and a shared prefix."""
    names = ("forward", "row_terms", "backward_q", "backward_kv", "denominators", "column_sums", "divergence_rows")
    assert keys["missing"] == dict.fromkeys(names, 0)


# -- the layer in front of the cache ---------------------------------------------------------------------------------


@pytest.fixture
def carried(tmp_path, monkeypatch) -> Path:
    """An installation that carries the kernel "ABC"; Triton's own cache is empty."""
    from triton import knobs

    folder = tmp_path / "carried"
    (folder / "ABC").mkdir(parents=True)
    (folder / "ABC" / "norm.json").write_text("{}")
    (folder / "ABC" / "norm.cubin").write_bytes(b"code")
    monkeypatch.setattr(precompiled, "FOLDER", folder)
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path / "cache")
        yield folder


def serve() -> None:
    precompiled.serve_precompiled.__wrapped__()  # once per process otherwise


def test_a_carried_kernel_is_served_and_nothing_is_written(carried, tmp_path):
    from triton import knobs

    serve()
    group = knobs.cache.manager_class("ABC").get_group("norm.json")
    assert group == {name: str(carried / "ABC" / name) for name in ("norm.json", "norm.cubin")}
    assert not (tmp_path / "cache").exists()


def test_other_kernels_get_the_manager_that_was_there(carried):
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    class Mine(FileCacheManager):
        pass

    knobs.cache.manager_class = Mine
    serve()
    assert type(knobs.cache.manager_class("XYZ")) is Mine
    assert isinstance(knobs.cache.manager_class("ABC"), precompiled.PrecompiledKernel)
    with knobs.compilation.scope():
        knobs.compilation.always_compile = True
        assert type(knobs.cache.manager_class("ABC")) is Mine
    knobs.cache.override_dir = knobs.cache.dump_dir = knobs.cache.dir
    assert type(knobs.cache.manager_class("ABC", dump=True)) is Mine, "the key of a dump is another one"
    assert type(knobs.cache.manager_class("ABC", override=True)) is Mine


def test_a_launch_on_a_gpu_looks_there_first(monkeypatch):
    order = []
    kernel = mock.MagicMock()
    kernel.__getitem__.return_value.side_effect = lambda *_, **__: order.append("launched")
    monkeypatch.setattr(launch, "serve_precompiled", lambda: order.append("looked"))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    launch.launch(kernel, 1, mock.MagicMock(spec=torch.Tensor, device=torch.device("cuda", 0)))
    assert order == ["looked", "launched"]
    launch.launch(kernel, 1, torch.zeros(1))
    assert order[2:] == ["launched"], "the interpreter compiles nothing"


def test_nothing_is_touched_where_nothing_is_carried(carried, monkeypatch):
    from triton import knobs

    monkeypatch.setattr(precompiled, "FOLDER", carried / "absent")
    serve()
    assert knobs.cache.manager_class is None


def test_what_is_carried_is_said(carried, monkeypatch):
    import triton

    def manifest(**changes: str) -> None:
        facts = {"triton": triton.__version__, "triton_build": "b", "sources": precompiled.sources()}
        facts |= {"architectures": ["sm_80", "sm_90"], "kernels": 7, **changes}
        (carried / precompiled.MANIFEST).write_text(json.dumps(facts))

    monkeypatch.setattr(precompiled, "triton_build", lambda: "b")
    assert precompiled.precompiled_kernels() == "none: compiled at first use"
    manifest()
    assert precompiled.precompiled_kernels() == f"7 for sm_80, sm_90 and Triton {triton.__version__}"
    found = precompiled.precompiled_kernels(["sm_90", "sm_89", "sm_89"])
    assert found == f"7 for sm_80, sm_90 and Triton {triton.__version__}, none for sm_89: compiled at first use there"
    manifest(triton="3.5.0")
    assert f"Triton 3.5.0, but {triton.__version__} is installed: compiled" in precompiled.precompiled_kernels()
    manifest(triton_build="another")
    assert "another build of it is installed" in precompiled.precompiled_kernels()
    manifest(sources="another")
    assert "sources of the kernels have changed" in precompiled.precompiled_kernels()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "which is not installed" in precompiled.precompiled_kernels()


# -- both wheels, installed ------------------------------------------------------------------------------------------


def environment(folder: Path, wheel: Path) -> Path:
    """The interpreter of a new environment with that wheel in it and nothing else."""
    venv.create(folder, with_pip=True)
    executable = folder / "bin" / "python"
    subprocess.run([str(executable), "-I", "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    return executable


def add_dependencies(executable: Path) -> None:
    """Torch and Triton of this environment, but not what it has of this project: an editable install is a .pth file."""
    (site,) = executable.parents[1].glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])


INTERPRETER = """
import json, torch, leaf_kernels
from leaf_kernels import SharedPrefixLayout, linear_kl, pruned_attention
layout, _ = SharedPrefixLayout.from_groups([[[1, 5, 6, 7, 8, 2], [1, 5, 7, 8, 2]]])
q, k, v = (torch.randn(layout.num_tokens, heads, 16) for heads in (4, 2, 2))
a, b = (pruned_attention(q, k, v, layout, impl=impl) for impl in ("triton", "reference"))
torch.testing.assert_close(a, b)
x, w = torch.randn(5, 8), torch.randn(40, 8)
a, b = (linear_kl(x, w, -x, w, impl=impl)[0] for impl in ("triton", "reference"))
torch.testing.assert_close(a, b)
print(json.dumps(leaf_kernels.__file__))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_plain_wheel(tmp_path):
    """Built in isolation, that is without torch and Triton, imported without them, then run in Triton's interpreter."""
    wheel = build(project(tmp_path / "project"), tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    executable = environment(tmp_path / "env", wheel)
    alone = (
        "import importlib.util, leaf_kernels; print('true' if importlib.util.find_spec('torch') is None else 'false')"
    )
    assert python(alone, executable=executable)
    add_dependencies(executable)
    assert str(tmp_path) in python(INTERPRETER, executable=executable, TRITON_INTERPRET="1")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_with_kernels_compiles_nothing_that_it_ships(tmp_path):
    """All that it ships for one architecture, at other lengths; and what no longer fits is compiled."""
    wheel = build(project(tmp_path / "project"), tmp_path, "--no-build-isolation", LEAF_KERNELS_PRECOMPILE="sm_90")
    executable = environment(tmp_path / "env", wheel)
    add_dependencies(executable)
    assert str(tmp_path) in python(INTERPRETER, executable=executable, TRITON_INTERPRET="1")

    empty = tmp_path / "cache"
    served, manifest = python(
        COUNT
        + """
from leaf_kernels._runtime import precompiled
serve_precompiled()
found = count([call for _, call in shipped_calls()], (1, 4096, 5003))
print(json.dumps([found, json.loads((precompiled.FOLDER / precompiled.MANIFEST).read_text())]))
""",
        executable=executable,
        TRITON_CACHE_DIR=str(empty),
    )
    assert set(served.values()) == {"served"}
    assert len(served) == manifest["kernels"] > 90
    assert not empty.exists(), "nothing was compiled, so nothing was kept"

    scores = (
        COUNT
        + """
import triton
from leaf_kernels.testing import precompiled_kernels
import triton.runtime.cache as cache
if sys.argv[1:]:
    triton.__version__ = cache.__version__ = sys.argv[1]
serve_precompiled()
found = count([call for name, call in shipped_calls() if name == "scores of torch.float32, masked=False"], (999,))
print(json.dumps([list(found.values()), precompiled_kernels()]))
"""
    )

    def run_scores(*arguments: str, cache: str) -> tuple[set[str], str]:
        found, said = python(scores, *arguments, executable=executable, TRITON_CACHE_DIR=str(tmp_path / cache))
        return set(found), said

    found, said = run_scores(cache="same")
    assert (found, "compiled at first use" in said) == ({"served"}, False), said
    found, said = run_scores("3.5.0", cache="version")
    assert (found, "but 3.5.0 is installed" in said) == ({"compiled"}, True), said
    (kernels,) = (tmp_path / "env").glob("lib/python*/site-packages/leaf_kernels/ops/token_scores/kernels.py")
    kernels.write_text("\n" + kernels.read_text())  # a key holds the line of a kernel, too
    found, said = run_scores(cache="source")
    assert (found, "sources of the kernels have changed" in said) == ({"compiled"}, True), said
