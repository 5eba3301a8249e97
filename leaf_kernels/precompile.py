"""Compiles kernels for a wheel, on a machine without a GPU: what the calls below launch, under the keys of Triton's cache.

    LEAF_KERNELS_PRECOMPILE="sm_80;sm_90;sm_100" pip wheel . --no-deps --no-build-isolation      # setup.py runs this module
    python -m leaf_kernels.precompile sm_90 --output FOLDER

Public functions run on tensors without values: tiles, flags, signatures and alignments are those of a launch on a GPU, and
Triton computes the keys. No length enters a key: on tokens, segments and rows no kernel is specialised, and on widths only
as being multiples of 16. What does enter is in the list below; all else is compiled at first use.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from . import (
    SharedPrefixLayout,
    attention_mass,
    flag_tokens,
    flagged_spans,
    linear_kl,
    linear_kl_topk,
    pruned_attention,
    token_scores,
)
from ._runtime.library import LAUNCHERS
from ._runtime.precompiled import FOLDER, MANIFEST, sources, triton_build
from .testing.offline import CAPABILITY, compile_instead

Call = Callable[[int, str], object]  # launches kernels for so many tokens on a device

# (key heads, query heads per key head, head size). Without keep, window, softcap and sinks, in bfloat16, both backwards.
HEADS = {
    "Llama-3.2-1B": (8, 4, 64),
    "Llama-3.2-3B": (8, 3, 128),
    "Llama-3.1-8B, Qwen3-4B and 8B": (8, 4, 128),
    "Llama-3.3-70B, Qwen2.5-72B, Qwen3-32B": (8, 8, 128),
    "Qwen2.5-0.5B": (2, 7, 64),
    "Qwen2.5-1.5B": (2, 6, 128),
    "Qwen2.5-3B": (2, 8, 128),
    "Qwen2.5-7B": (4, 7, 128),
    "Qwen2.5-14B and 32B, Qwen3-14B": (8, 5, 128),
    "Qwen3-0.6B and 1.7B": (8, 2, 128),
}
# Of the heads' products: a multiple of 16, and not. Without bias and softcap.
VOCABULARIES = (128256, 50257)


def shipped_calls() -> Iterator[tuple[str, Call]]:
    """What a wheel compiles for each architecture, by name."""
    for model, heads in HEADS.items():
        for deterministic in (True, False):
            yield f"attention of {model}, deterministic={deterministic}", partial(_attention, heads, deterministic)
        yield f"attention mass of {model}", partial(_mass, heads)
    for vocab, training in itertools.product(VOCABULARIES, (True, False)):
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            yield f"{divergence} over {vocab}, training={training}", partial(_kl, vocab, divergence, training)
        yield f"top-k over {vocab}, training={training}", partial(_topk, vocab, training)
    for dtype, masked in itertools.product((torch.bfloat16, torch.float32), (True, False)):
        yield f"scores of {dtype}, masked={masked}", partial(_scores, dtype, masked)


def _attention(heads: tuple[int, int, int], deterministic: bool, tokens: int, device: str) -> None:
    q, k, v = (_rows(device, tokens, n, heads[2]).requires_grad_() for n in (heads[0] * heads[1], heads[0], heads[0]))
    out = pruned_attention(q, k, v, _layout(tokens, device), deterministic=deterministic)
    torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))  # type: ignore[arg-type]  # a tensor: no lse


def _mass(heads: tuple[int, int, int], tokens: int, device: str) -> None:
    q, k = (_rows(device, tokens, n, heads[2]) for n in (heads[0] * heads[1], heads[0]))
    attention_mass(q, k, _layout(tokens, device), queries=torch.ones(tokens, dtype=torch.bool, device=device))


def _kl(vocab: int, divergence: str, training: bool, tokens: int, device: str) -> None:
    hidden, head = _rows(device, tokens, 64), _rows(device, vocab, 64).requires_grad_(training)
    beta = 0.5 if divergence == "jsd" else None
    linear_kl(hidden, head, hidden, head.detach(), divergence=divergence, beta=beta)


def _topk(vocab: int, training: bool, tokens: int, device: str) -> None:
    """Cross-entropy is the case of one token."""
    hidden, head = _rows(device, tokens, 64), _rows(device, vocab, 64).requires_grad_(training)
    log_probs = torch.zeros(tokens, 1, device=device)
    linear_kl_topk(hidden, head, log_probs.long(), log_probs)


def _scores(dtype: torch.dtype, masked: bool, tokens: int, device: str) -> None:
    gradient, starts = _rows(device, tokens, 64).to(dtype), _layout(tokens, device).segment_starts
    mask = torch.ones(tokens, dtype=torch.bool, device=device) if masked else None
    score = token_scores(gradient, gradient, starts, scored=mask).score
    flag_tokens(score, starts, q=0.1, flaggable=mask)
    flagged_spans(flag_tokens(score, starts, rule="threshold", tau=0.1, flaggable=mask), starts)


def _rows(device: str, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, device=device)


def _layout(tokens: int, device: str) -> SharedPrefixLayout:
    with unset_fake_temporarily():  # its tensors are validated, so they must have values
        return SharedPrefixLayout.from_lengths([tokens - tokens // 3, tokens // 3]).to(device)


class _Inside(TorchDispatchMode):
    """Runs the launchers of our operators, which fake tensors pass by."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in LAUNCHERS:
            return func(*args, **(kwargs or {}))
        with self:
            return LAUNCHERS[func](*args, **(kwargs or {}))


@contextmanager
def launched_for(arch: str) -> Iterator[list[Any]]:
    """Inside, public functions on CPU tensors are run without values, and the kernels that they launch are compiled; see
    `compile_instead`."""
    with (
        warnings.catch_warnings(),
        compile_instead(arch) as kernels,
        FakeTensorMode(allow_non_fake_inputs=True),
        _Inside(),
    ):
        # A TMA descriptor asks whether its tensor is aligned, and is told that it begins at 0
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield kernels


def precompile(arch: str, folder: Path, call: Call) -> None:
    """Puts what `call` launches on `arch` into `folder`, as `_runtime.precompiled` reads it."""
    with launched_for(arch) as kernels:
        call(999, "cpu")
    for kernel in kernels:
        # Of the group of files in Triton's cache a launch reads these two; its folder's name is the key
        for path in map(Path, kernel.metadata_group.values()):
            if path.suffix in (".json", ".cubin"):
                (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / path.parent.name / path.name)


def write_manifest(folder: Path, architectures: Sequence[str]) -> None:
    import triton

    manifest = {
        "architectures": list(architectures),
        "kernels": sum(path.is_dir() for path in folder.iterdir()),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "sources": sources(),
        "triton": triton.__version__,
        "triton_build": triton_build(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "architectures", nargs="+", choices=list(CAPABILITY), metavar="ARCH", help=", ".join(CAPABILITY)
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="default: where this installation looks for them")
    arguments = parser.parse_args()
    folder = arguments.output
    # Fresh processes: threads of torch do not survive a fork
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = itertools.product(arguments.architectures, shipped_calls())
        done = [pool.submit(precompile, arch, folder, call) for arch, (_, call) in tasks]
        for future in done:
            future.result()
    write_manifest(folder, arguments.architectures)
    print((folder / MANIFEST).read_text())  # noqa: T201  # a command


if __name__ == "__main__":
    main()
