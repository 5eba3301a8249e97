"""Which launch configuration a GPU gets: its architecture's, one tuned on it, the smallest where it is not known."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from leaf_kernels._runtime import launch
from leaf_kernels.ops.pruned_attention.configs import Tile, fused_tile, tile_for

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    yield
    launch._table.cache_clear()
    launch.tuned.cache_clear()


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "small"),
        ((8, 9), "small"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "small"),
    ],
)
def test_architectures(monkeypatch, capability, arch):
    monkeypatch.setattr(launch, "_capability", lambda _: capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch.architecture(GPU) == arch


def test_unknown_gpus_get_the_smallest_configuration_and_one_warning(monkeypatch):
    monkeypatch.setattr(launch, "_capability", lambda _: (13, 0))
    with pytest.warns(UserWarning, match=r"compute capability 13\.0; taking the smallest"):
        assert launch.architecture(GPU) == "small"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch.architecture(GPU) == "small"


def tiles(extras: bool, dtype: torch.dtype = torch.bfloat16) -> dict[tuple[str, int], Tile | None]:
    sizes = (16, 64, 80, 128, 192, 256)
    found = {
        (name, size): tile_for(name, size, dtype, GPU, extras=extras) for name in ("forward", "mass") for size in sizes
    }
    return {**found, **{("fused", size): fused_tile(size, dtype, GPU, extras=extras) for size in sizes}}


@pytest.mark.parametrize("extras", [False, True])
def test_what_was_tuned_on_this_gpu_replaces_what_is_shipped(monkeypatch, tmp_path, extras):
    """At the nearest head size above, for that kernel alone; not for fp32, not on another GPU."""
    monkeypatch.setattr(launch, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    shipped, exact = tiles(extras), tiles(extras, torch.float32)
    pair = [[16, 32, 4, 1], [32, 16, 8, 2]]
    table = {"tiles": {"forward": {"128": pair}, "backward_fused": {"64": pair}}}
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(table))
    launch.tuned.cache_clear()
    assert tiles(extras) == shipped

    launch.tuned.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    changed = dict.fromkeys([("forward", 80), ("forward", 128), ("fused", 16), ("fused", 64)], Tile(*pair[extras]))
    assert tiles(extras) == {**shipped, **changed}
    assert tiles(extras, torch.float32) == exact


@pytest.mark.parametrize("table", [None, {"tiles": {"forward": {"64": [[16, 32, 4, 1], [32, 16, 8, 2]]}}}])
def test_a_compiled_program_knows_its_tiles(monkeypatch, tmp_path, table):
    """Without a graph break: what a GPU is called and what its file says are constants of the graph."""
    monkeypatch.setattr(launch, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    if table:
        (tmp_path / "nvidia-h200.json").write_text(json.dumps(table))

    def block(x: torch.Tensor) -> torch.Tensor:
        return x + tile_for("forward", 64, torch.bfloat16, GPU, extras=True).block_m

    torch._dynamo.reset()  # the graph of the other case
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())).item() == (32 if table else 128)
