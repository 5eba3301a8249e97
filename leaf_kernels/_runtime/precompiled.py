"""Kernels that a wheel brings compiled: a read-only layer in front of Triton's cache. Knows Triton, not torch.

`python -m leaf_kernels.precompile` fills FOLDER as Triton's own cache is filled, a folder per kernel, named by the key that
Triton computes from its own build, the kernel's source, its arguments and the GPU. So nothing has to be compared here: what
does not fit is not found, and Triton compiles.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
FOLDER = PACKAGE / "_precompiled"
MANIFEST = "manifest.json"


@functools.cache  # asked for at every launch
def serve_precompiled() -> None:
    """Makes Triton look into FOLDER before the cache that is set now; without a FOLDER nothing is touched."""
    if not FOLDER.is_dir():
        return
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    manager_class: Any = knobs.cache.manager_class or FileCacheManager

    def manager(key: str, override: bool = False, dump: bool = False) -> Any:
        ours = (FOLDER / key).is_dir() and not (override or dump or knobs.compilation.always_compile)
        return PrecompiledKernel(FOLDER / key) if ours else manager_class(key, override=override, dump=dump)

    # Not a class: Triton would only call it, and other kernels get exactly the manager that they would have got
    knobs.cache.manager_class = manager  # type: ignore[assignment]


class PrecompiledKernel:
    """Triton's cache manager for the files of one kernel, which are all there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_group(self, filename: str) -> dict[str, str]:
        return {path.name: str(path) for path in self.folder.iterdir()}


def precompiled_kernels(gpus: Collection[str] = ()) -> str:
    """Whether this installation brings compiled kernels, for what, and whether the installed Triton and `gpus` can use them.

    gpus: architectures of the machine, as "sm_90".
    """
    try:
        manifest = json.loads((FOLDER / MANIFEST).read_text())
    except FileNotFoundError:
        return "none: compiled at first use"
    what = f"{manifest['kernels']} for {', '.join(manifest['architectures'])} and Triton {manifest['triton']}"
    try:
        import triton
    except ImportError:
        return f"{what}, which is not installed"
    if triton.__version__ != manifest["triton"]:
        return f"{what}, but {triton.__version__} is installed: compiled at first use"
    if triton_build() != manifest["triton_build"]:
        return f"{what}, but another build of it is installed (for another Python?): compiled at first use"
    if sources() != manifest["sources"]:
        return f"{what}, but the sources of the kernels have changed: compiled at first use"
    if absent := sorted(set(gpus) - set(manifest["architectures"])):
        return f"{what}, none for {', '.join(absent)}: compiled at first use there"
    return what


def triton_build() -> str:
    """What of a cache key comes from Triton itself; reads its libraries."""
    from triton.runtime.cache import triton_key

    return hashlib.sha256(triton_key().encode()).hexdigest()


def sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.glob("ops/*/kernels.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
