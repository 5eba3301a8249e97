"""Every way to a teacher that two processes have, through the command line: the training is that of `replicate`."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from typing import Any

import pytest
import torch
from launched import leaf
from small import write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from leaf.tables import open_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

TRAINING = {"max_steps": 4, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "logging_steps": 1}


def losses(folder: pathlib.Path) -> list[float]:
    logged = (json.loads(row["entry"]) for row in open_table(folder / "distill"))
    return [entry["loss"] for entry in logged if "loss" in entry]


def test_teacher_modes(tmp_path: pathlib.Path, prepared: dict[str, Any]) -> None:
    vocabulary = len(AutoTokenizer.from_pretrained(prepared["student"]))
    found = {}
    for mode in ("replicate", "fsdp2", "cached_hidden", "cached_topk"):
        output = shutil.copytree(tmp_path / "run", tmp_path / mode)
        options = {
            **prepared,
            "output": str(output),
            "teacher_mode": mode,
            "cache_topk": vocabulary,
            "training": TRAINING,
        }
        done = leaf("run", "--config", write_config(tmp_path / f"{mode}.yaml", options))
        assert done.returncode == 0, done.stderr
        assert "score: unchanged" in done.stderr
        assert (output / "cache").exists() == mode.startswith("cached")
        assert (output / "report.html").exists()
        found[mode] = losses(output)
        assert len(found[mode]) == TRAINING["max_steps"]
        model = AutoModelForCausalLM.from_pretrained(output / "model")
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
        assert logits.isfinite().all()
    for mode, tolerance in {"fsdp2": 1e-4, "cached_hidden": 1e-4, "cached_topk": 1e-3}.items():
        assert all(map(math.isfinite, found[mode]))
        assert found[mode] == pytest.approx(found["replicate"], rel=tolerance, abs=tolerance * 1e-2), mode
    assert len(set(found["replicate"])) > 1, "nothing was trained"
