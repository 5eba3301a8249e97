"""LeafTrainer on an NVIDIA GPU, with Triton kernels: a step has the loss and the gradient of one on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import on_ranks
from training import Gradients, arguments, groups, model, train

from leaf.trainer import LeafTrainer

HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU of compute capability 8.0 or newer"),
]

FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
CASES: dict[str, tuple[dict[str, Any], float]] = {  # options, error of the whole gradient that is allowed
    "fp32": ({}, 1e-4),
    "packs, checkpoints in host memory": (
        {"max_tokens": 1, "activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}},
        1e-4,
    ),
    "fsdp2": (FSDP, 1e-4),
    "fsdp2, offloaded": ({**FSDP, "fsdp_config": {**FSDP["fsdp_config"], "cpu_offload": True}}, 1e-4),
    "bf16": ({"bf16": True}, 0.2),  # the outputs of this model are peaked
    "fsdp2, bf16": ({**FSDP, "bf16": True}, 0.2),
}


def steps(output: str, options: dict[str, Any]) -> Any:
    gradients = Gradients()
    pair = model(0).float(), model(1, hidden=32).float()
    trainer = LeafTrainer(*pair, arguments(output, use_cpu=False, **options), groups(), callbacks=[gradients])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [{name: g.cpu() for name, g in step.items()} for step in gradients.steps]


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_a_cpu(case: str, tmp_path):
    options, allowed = CASES[case]
    ((losses, gradients),) = on_ranks(steps, str(tmp_path), options, world_size=1)  # a process group of its own
    expected_losses, expected = train(tmp_path)
    assert losses == pytest.approx(expected_losses, rel=max(allowed / 10, 1e-5))
    for step, reference in zip(gradients, expected):
        assert step.keys() == reference.keys()
        ours, exact = (torch.cat([g[name].double().flatten() for name in reference]) for g in (step, reference))
        assert (ours - exact).norm() < allowed * exact.norm()
