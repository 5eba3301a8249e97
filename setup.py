"""Build script. It imports neither torch nor Triton and asks no driver, so that it builds anywhere.

With LEAF_KERNELS_PRECOMPILE="sm_80;sm_90;sm_100" another process compiles kernels into the wheel, for the Triton that is
installed (docs/wheels.md). Keys of Triton's cache contain a hash of its libraries, which differ for every Python and
platform, so that wheel has the tags of Triton's own and its version in the local version. CUDA's is not in it: the
assembler that compiled the kernels is Triton's.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution as Installed
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ARCHITECTURES = os.environ.get("LEAF_KERNELS_PRECOMPILE", "").replace(";", " ").split()


def triton() -> Installed:
    try:
        distribution("torch")
        return distribution("triton")
    except PackageNotFoundError as error:
        raise SystemExit(
            f"LEAF_KERNELS_PRECOMPILE: {error.name} is not installed. The wheel is for the Triton of the environment that "
            "builds it: install torch and that Triton, and build with --no-build-isolation"
        ) from error


class WithKernels(build_py):
    def run(self) -> None:
        super().run()
        library = Path(self.build_lib).resolve()
        folder = library / "leaf_kernels" / "_precompiled"
        shutil.rmtree(folder, ignore_errors=True)  # of a build before
        command = [sys.executable, "-m", "leaf_kernels.precompile", *ARCHITECTURES, "--output", str(folder)]
        subprocess.run(command, check=True, cwd=library, env={**os.environ, "TRITON_INTERPRET": "0"})


class ForTriton(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        lines = (triton().read_text("WHEEL") or "").splitlines()
        tags = [line.removeprefix("Tag: ").split("-") for line in lines if line.startswith("Tag: ")]
        python, abi, platform = (".".join(dict.fromkeys(part)) for part in zip(*tags))
        return python, abi, platform


class Platform(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if ARCHITECTURES:
    local = triton().version.replace("+", ".")
    setup(
        cmdclass={"build_py": WithKernels, "bdist_wheel": ForTriton},
        distclass=Platform,
        options={"egg_info": {"tag_build": f"+triton{local}"}},
    )
else:
    setup()
