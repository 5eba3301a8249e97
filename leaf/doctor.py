"""`leaf doctor`: what this machine has, and whether a pair of models and its rows will work, before hours are spent."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import os
import platform
import shutil
import sysconfig
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid
from rich.text import Text

from leaf_kernels.testing import precompiled_kernels

from . import sandbox
from .config import RunConfig, asked_of_the_hub

PACKAGES = ("leaf-kernels", "torch", "triton", "transformers", "accelerate", "datasets", "flash-attn", "vllm")
OPTIONAL = ("flash-attn", "vllm")
FIRST_ROWS = 32

_PLAIN: dict[str, Any] = {"box": box.SIMPLE, "title_justify": "left", "title_style": "bold"}


def check(config: RunConfig, console: Console) -> bool:
    """Prints the report: environment always, the pair when both models are given, the rows when data is given too.

    Returns:
        Whether nothing was found that will stop a run.
    """
    console.print(_environment())
    if config.device != "auto":
        from .run import device_of

        device_of(config)
    problems = []
    if config.teacher and config.student:
        problems = _pair(config, console)
        if config.data and not problems:
            problems = _rows(config, console)
    elif config.teacher or config.student or config.data:
        console.print("Give --teacher and --student (and --data) to check a pair of models (and its rows).")
    for problem in problems:
        console.print(Text("✗ ", "red") + Text(problem))
    return not problems


def _environment() -> Grid:
    import torch

    grid = Grid("", _whole(), title="environment", show_header=False, **_PLAIN)
    grid.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "absent (optional)" if name in OPTIONAL else "absent"
        grid.add_row(name, version)
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    grid.add_row("compiled kernels", precompiled_kernels([f"sm_{gpu.major}{gpu.minor}" for gpu in gpus]))
    if triton := importlib.util.find_spec("triton"):
        grid.add_row("C compiler", _c_compiler(Path(str(triton.origin)).parent))
    grid.add_row("cpu", f"{torch.get_num_threads()} threads")
    for n, gpu in enumerate(gpus):
        grid.add_row(f"cuda:{n}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        grid.add_row("cuda", "none: everything runs on the CPU with the reference implementations")
    try:
        grid.add_row("generated code", f"can be run (--grader python), kept apart by {sandbox.isolation()}")
    except ValueError as error:
        grid.add_row("generated code", Text(f"--grader python is refused: {error}"))
    return grid


def _whole(header: str = "") -> Column:
    """A column whose cells take more lines where they are too long, as paths are: nothing of them is cut."""
    return Column(header, overflow="fold")


def _c_compiler(triton: Path) -> Text:
    """Whether there is what Triton compiles its launcher with on its first launch, in its own order of looking for it."""
    if not (triton / "backends" / "nvidia" / "driver.c").exists():
        return Text("not needed by this Triton")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    missing = [what for what, there in (("a C compiler", compiler), (str(header), header.exists())) if not there]
    if missing:
        remedy = "install gcc (or set CC) and Python's headers (python3-dev)"
        return Text(
            f"Triton needs one for its first launch on a GPU; missing: {' and '.join(missing)}. {remedy}", "yellow"
        )
    return Text(f"{compiler}, which Triton needs for its first launch on a GPU")


def _pair(config: RunConfig, console: Console) -> list[str]:
    """Prints what the two models share; returns what makes them unusable together."""
    from transformers import AutoConfig, AutoTokenizer

    from leaf_kernels.integrations.transformers import check_model

    from .data import DifferentTokenizers, check_pair
    from .run import different_tokenizers, make_encoder
    from .tables import model_key

    names = {role: config.named(role) for role in ("teacher", "student")}
    configs, tokenizers, problems = dict[str, Any](), dict[str, Any](), list[str]()
    for role, name in names.items():
        with asked_of_the_hub(name):
            configs[role], tokenizers[role] = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    grid = Grid("", _whole("teacher"), _whole("student"), title="pair", **_PLAIN)

    def row(label: str, values: list[Any]) -> None:
        grid.add_row(label, *(Text(str(value)) for value in values))

    row("model", list(names.values()))
    row("architecture", [c.model_type for c in configs.values()])
    row("columns of the head", [c.get_text_config().vocab_size for c in configs.values()])
    row("tokens", [len(t) for t in tokenizers.values()])
    row("end of sequence", [t.eos_token for t in tokenizers.values()])
    templates = [t.chat_template for t in tokenizers.values()]
    student_template = "used for both" if templates[1] else "none"
    row("chat template", ["the same" if templates[0] == templates[1] else "another, not used", student_template])
    packing = []
    for role, model_config in configs.items():
        try:
            check_model(model_config)
            packing.append("yes")
        except ValueError as error:
            packing.append("no")
            problems.append(f"{role}: {error}")
    row("attention can be packed", packing)
    reader, note = "student", ""
    try:
        encoder = make_encoder(config)
        reader = "teacher"
        encoder.read_by(tokenizers["teacher"])
        note = different_tokenizers(encoder)
    except ValueError as error:  # slow tokenizer, no chat template
        problems.append(f"{reader}: {error}")
    try:
        shared, note = str(check_pair(tokenizers["student"], tokenizers["teacher"])), ""
    except DifferentTokenizers:
        shared = "different tokenizers: scores only"
    grid.add_row("tokens with equal ids", Text(shared), "")
    if model_key(names["teacher"]) == model_key(names["student"]):
        problems.append("teacher and student are the same model: every score difference is 0 and nothing can be learnt")
    console.print(grid)
    if note:
        console.print(Text(note, "yellow"))
    return problems


def _rows(config: RunConfig, console: Console) -> list[str]:
    """Prints how the first rows are read and one sample, as the models see it."""
    from .data import Row, Sample
    from .report import terminal_heatmap
    from .run import make_encoder, read

    rows = list(itertools.islice(read(config, config.data), FIRST_ROWS))
    encoder = make_encoder(config)
    encoded = [unit for row in rows for unit in (encoder.encode(row) if isinstance(row, Row) else [row])]
    samples = [item for item in encoded if isinstance(item, Sample)]
    skipped = Counter(item.reason for item in encoded if not isinstance(item, Sample))
    prompt_tokens = sum(s.response_start for s in samples)
    scored = sum(sum(s.scored) for s in samples)
    grid = Grid("", "", title=f"first {len(rows)} rows", show_header=False, **_PLAIN)
    grid.add_row("usable", f"{len(samples)} of {len(rows)}")
    for reason, count in skipped.items():
        grid.add_row(f"skipped: {reason}", str(count))
    if samples:
        lengths = sorted(len(s.input_ids) for s in samples)
        grid.add_row("tokens of a row", f"median {lengths[len(lengths) // 2]}, longest {lengths[-1]}")
        grid.add_row("scorable share of the prompts", f"{scored / max(1, prompt_tokens):.0%}")
        kept = sum(_letters(str(encoder.tokenizer.decode(s.input_ids))) == _letters(s.text) for s in samples)
        note = "" if kept == len(samples) else "; the tokenizer does not know what is written in the others"
        grid.add_row("kept by the tokenizer", f"{kept} of {len(samples)}{note}")
    console.print(grid)
    if not samples:
        return ["none of the first rows can be used"]
    sample = samples[0]
    console.print(f"sample {sample.id}: coloured = scored, dim = context, green = what is learnt", highlight=False)
    console.print(terminal_heatmap(asdict(sample)) + Text(sample.text[sample.prompt_chars :], "green"))
    return []


def _letters(text: str) -> str:
    """Without whitespace, which decoding may move."""
    return "".join(text.split())
