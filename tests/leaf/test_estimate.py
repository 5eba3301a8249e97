"""Predictions against what tensors really take, laws that they must obey, and what is refused."""

from __future__ import annotations

import io
import itertools
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import pytest
import tiny
import torch
from rich.console import Console
from transformers import PreTrainedConfig

from leaf import cli
from leaf.config import CACHED
from leaf.devices import GPUS, device_named
from leaf.estimate import Estimator, Stage, Workload, counterfactual_groups, half_response, read_config, report
from leaf.loading import with_adapters
from leaf.objective import Head
from leaf.sensitivity import Scorer
from leaf.teacher import TeacherCache
from leaf.teacher_build import Teacher, distinct
from leaf.trainer import LeafArguments, LeafTrainer
from leaf_kernels.testing import record_peak_bytes

CPU = GPUS["a100"]._replace(name="cpu")  # any rates: nothing is measured here
VOCABULARY = 2000


def config(arch: str = "llama", hidden: int = 64, vocab_size: int = VOCABULARY) -> PreTrainedConfig:
    return tiny.model(tiny.tokenizer(), arch=arch, hidden=hidden, vocab_size=vocab_size).config


def estimator(pair: PreTrainedConfig, length: int = 128, rows: int = 2, **options: object) -> Estimator:
    workload, device = Workload([length] * rows, mean=length), options.pop("device", CPU)
    dtype = torch.bfloat16 if device.is_gpu else torch.float32  # type: ignore[attr-defined]
    return Estimator(pair, pair, workload, device, dtype, max_tokens=length * rows, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_scoring_takes_what_is_predicted(arch: str) -> None:
    """Not within 15 %: the same bytes, but for small tensors, because it is the same code."""
    model = tiny.model(tiny.tokenizer(), arch=arch, hidden=64, vocab_size=VOCABULARY)
    stage = estimator(model.config).scoring("teacher")
    scorer = Scorer(model)
    assert ("checkpoints" in stage.name) == (scorer.keeps < 2 * 128)
    with record_peak_bytes() as peak:
        scorer([half_response(128, VOCABULARY, n) for n in range(2)])
    assert stage.weights == sum(p.nbytes for p in {*model.parameters(), *model.buffers()})
    assert stage.activations + stage.scratch == pytest.approx(peak[0], rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_distillation_takes_what_is_predicted(tmp_path: pathlib.Path, checkpointing: bool) -> None:
    student, teacher = (tiny.model(tiny.tokenizer(), seed=seed, hidden=64, vocab_size=VOCABULARY) for seed in (0, 1))
    stage = estimator(student.config, length=128, rows=3).distillation(checkpointing)
    groups = counterfactual_groups(128, VOCABULARY, 2)
    options = {"use_cpu": True, "gradient_checkpointing": checkpointing, "disable_tqdm": True, "save_strategy": "no"}
    arguments = LeafArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, max_tokens=384, **options
    )
    trainer = LeafTrainer(student, teacher, arguments, train_dataset=groups * 4)
    with record_peak_bytes() as peak:
        trainer.train()
    assert stage.state == 3 * sum(p.nbytes for p in student.parameters())
    # The gradients and AdamW's states are created inside
    assert stage.peak - stage.weights == pytest.approx(peak[0], rel=0.05)


class Known(TeacherCache):
    """Zeros, of a teacher of 64 hidden units."""

    def __init__(self, mode: str) -> None:
        weight = torch.zeros(VOCABULARY, 64)
        self.head = Head(weight, None, None, 1.0) if mode == "cached_hidden" else None
        self.kind, self.temperature = CACHED[mode], 1.0
        self.key = {"k": 8, "vocab_size": VOCABULARY}

    def check(self, groups: object) -> None: ...

    def read(self, input_ids: Sequence[int], response_start: int) -> dict[str, torch.Tensor]:
        rows = len(input_ids) - response_start
        return {name: t.new_zeros(rows, t.shape[1]) for name, t in self.empty().items()}


@pytest.mark.parametrize(
    ("mode", "rank"), [("replicate", 8), ("cached_hidden", None), ("cached_topk", None), ("cached_topk", 8)]
)
def test_distillation_from_a_cache_and_of_adapters(tmp_path: pathlib.Path, mode: str, rank: int | None) -> None:
    student, teacher = (tiny.model(tiny.tokenizer(), seed=seed, hidden=64, vocab_size=VOCABULARY) for seed in (0, 1))
    options = {"teacher_mode": mode, "lora_rank": rank, "cache_topk": 8}
    stage = estimator(student.config, length=128, rows=3, **options).distillation(False)
    whole = sum(p.nbytes for p in {*student.parameters(), *student.buffers()})
    if rank:
        student = with_adapters(student, rank, 16, seed=0)
    adapters = sum(p.nbytes for name, p in student.named_parameters() if ".lora_" in name)
    taught = {"replicate": whole, "cached_hidden": VOCABULARY * 64 * 4, "cached_topk": 0}[mode]
    assert stage.weights == whole + adapters + taught
    assert stage.state == 3 * sum(p.nbytes for p in student.parameters() if p.requires_grad)
    arguments = LeafArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_tokens=384,
        use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    groups = counterfactual_groups(128, VOCABULARY, 2)
    trainer = LeafTrainer(student, teacher if mode == "replicate" else Known(mode), arguments, train_dataset=groups * 4)
    with record_peak_bytes() as peak:
        trainer.train()
    assert stage.peak - stage.weights == pytest.approx(peak[0], rel=0.05)


@pytest.mark.parametrize("mode", CACHED)
def test_a_cache_takes_what_is_predicted(mode: str) -> None:
    teacher = tiny.model(tiny.tokenizer(), hidden=64, vocab_size=VOCABULARY)
    stage = estimator(teacher.config, length=128, rows=3, teacher_mode=mode, cache_topk=8).caching()
    key = {"kind": CACHED[mode], "k": 8, "vocab_size": VOCABULARY, "temperature": 1.0, "dtype": "float32"}
    asked, groups = Teacher(teacher, key), distinct(counterfactual_groups(128, VOCABULARY, 2))
    with record_peak_bytes() as peak:
        asked(groups)
    assert stage.activations == pytest.approx(peak[0], rel=0.05)


def test_a_teacher_that_devices_share_is_not_estimated() -> None:
    names = [stage.name for stage in estimator(config(), teacher_mode="fsdp2").all()]
    assert not any(name.startswith(("distil", "cache")) for name in names)
    assert "cache" in [stage.name for stage in estimator(config(), teacher_mode="cached_topk").all()]


def test_generation_holds_its_cache_at_full_width() -> None:
    pair = config()
    short, long = (estimator(pair, max_new_tokens=n).generation("teacher") for n in (8, 2000))
    per_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, their size, bytes
    assert long.activations - 2008 * per_token < short.activations
    assert long.activations >= 2128 * per_token


def test_memory_grows_with_the_length_and_with_the_vocabulary_by_weights_and_scratch_only() -> None:
    lengths = [estimator(config(), length=n).scoring("teacher") for n in (64, 128, 256)]
    assert lengths[0].peak < lengths[1].peak < lengths[2].peak
    assert lengths[0].weights == lengths[2].weights
    small, large = (estimator(config(vocab_size=v), device=GPUS["h100"]).scoring("teacher") for v in (2000, 8000))
    assert large.weights > small.weights
    assert large.peak - small.peak <= (large.weights - small.weights) + 6000 * 256 * 6  # logits and their gradient
    assert large.peak - large.weights < 256 * 8000 * 10, "two matrices of [rows, vocabulary]"


def test_a_gpu_is_predicted_without_one() -> None:
    pair = config()
    stages = estimator(pair, device=GPUS["h100"]).all()
    assert [stage.name.split(",")[0] for stage in stages] == [
        *("generate", "generate", "score", "score", "distil", "distil", "eval"),
    ]
    for stage in stages:
        assert stage.peak > stage.weights > 0
        assert 0 < stage.seconds[0] < stage.seconds[1]
    in_fp32 = estimator(pair).scoring("teacher")
    assert stages[2].weights * 2 == pytest.approx(in_fp32.weights, rel=1e-3), "bfloat16 on a GPU, but for buffers"
    plain, checkpoints = stages[4:6]
    assert checkpoints.peak < plain.peak


def test_fake_shapes_leave_nothing_behind() -> None:
    from leaf.sensitivity import TILE_ROWS

    before = dict(TILE_ROWS)
    estimator(config(), device=GPUS["h100"]).scoring("teacher")
    assert before == TILE_ROWS
    x = torch.randn(8, 2, 16)
    from leaf_kernels import SharedPrefixLayout, pruned_attention

    out = pruned_attention(x, x, x, SharedPrefixLayout.from_lengths([8]))
    torch.testing.assert_close(out[0], x[0])  # the first row sees itself alone


def test_refusals_name_the_remedy(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"must be auto, cpu, cuda, cuda:N or one of .*h100.* did you mean 'h100'"):
        device_named("h10")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU here; name one"):
            device_named("cuda")
    with pytest.raises(ValueError, match=r"give a folder with a config\.json"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(ValueError, match="unheard-of"):
        read_config(str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match="linear_attention"):
        read_config(str(tmp_path / "config.json"))


def test_command(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two configs and nothing else; one as a file. What does not fit is told with what to change."""
    config().save_pretrained(tmp_path)
    pair = ("--teacher", str(tmp_path), "--student", str(tmp_path / "config.json"))
    assert cli.main(["estimate", *pair, "--length", "64", "--max-tokens", "128", "--device", "l4"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2 rows of 64 tokens in a pack" in out
    assert "l4, 24 GiB; frozen models in bfloat16" in out
    assert "not fit" not in out
    assert cli.main(["estimate", *pair, "--length", "1"]) == 2
    assert cli.main(["estimate", *pair, "--device", "h1000"]) == 2
    assert "did you mean 'h100'" in capsys.readouterr().err


@pytest.mark.parametrize(("weights", "shown", "unit"), [(2**20, "1.0", "MiB"), (2**30, "1.00", "GiB")])
def test_a_narrow_terminal_cuts_nothing_and_small_models_have_a_size(weights: int, shown: str, unit: str) -> None:
    name = "distil, gradient_checkpointing"
    console = Console(file=io.StringIO(), width=80)
    report(estimator(config()), [Stage(name, weights, 0, 0, (0.00015, 0.00046))], console)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"memory in {unit}" in " ".join(out.split())
    (header,) = (line for line in out.splitlines() if line.split()[:1] == ["stage"])
    column = [line[: header.index("weights")].split() for line in out.splitlines()]
    assert "".join(itertools.chain(*column)).count(name.replace(" ", "")) == 1, out
    assert "…" not in out
    (row,) = (line for line in out.splitlines() if line.split()[:1] == ["distil,"])
    assert row.split()[1] == shown
    assert "0.00015 to" in row


@pytest.mark.parametrize(
    ("stage", "remedy"),
    [
        ("distil", "gradient_checkpointing: true"),
        ("generate, teacher", "--max-new-tokens"),
        ("score, student", "--max-length"),
    ],
)
def test_what_does_not_fit(stage: str, remedy: str) -> None:
    from leaf.estimate import _remedy

    device = GPUS["l4"]
    assert remedy in _remedy(Stage(stage, 2**30, 2**40, 0, (1, 2)), device)
    assert "larger device" in _remedy(Stage(stage, 2**40, 0, 0, (1, 2)), device)


@pytest.mark.gpu
def test_peak_on_a_gpu() -> None:
    """Against torch's own count, in a process of its own."""
    script = """
import torch, sys
from transformers import AutoModelForCausalLM, LlamaConfig
from leaf.devices import device_named
from leaf.estimate import Estimator, Workload, half_response
from leaf.sensitivity import Scorer
config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16)
work = Workload([4096] * 2, mean=4096)
stage = Estimator(config, config, work, device_named("cuda"), torch.bfloat16).scoring("teacher")
scorer = Scorer(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda())
torch.cuda.reset_peak_memory_stats()
scorer([half_response(4096, 32000, n) for n in range(2)])
error = stage.peak / torch.cuda.max_memory_allocated() - 1
sys.exit(f"{stage} is {error:.1%} off" if abs(error) > 0.15 else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
