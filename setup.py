"""Package build: compiles csrc/ where that is possible; the rest is in pyproject.toml.

The compiled operators need PyTorch while building, so they are built only without isolation
(`pip install --no-build-isolation`); the CUDA one also needs nvcc, and a PyTorch with CUDA or
SHORN_CUDA=1. Without them, and when a compiler fails, the package installs as pure Python, whose
operators run as PyTorch operations.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HEADERS = sorted(str(path) for path in Path("csrc").glob("*.*h"))
# The stable ABI of PyTorch 2.10: one build runs with that version and later ones.
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
FLAGS = ["-O3", "-std=c++17", TARGET]
# A100, H100, and intermediate code for what comes later.
ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]


def torch_folder() -> Path | None:
    spec = find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def find_nvcc() -> str | None:
    """The CUDA compiler: on the path, or in the toolkit, whose folder usually is not on it."""
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=Path(toolkit, "bin"))


def wants_cuda() -> bool:
    if find_nvcc() is None:
        return False
    if os.environ.get("SHORN_CUDA") == "1":
        return True
    import torch

    return torch.version.cuda is not None


def extensions() -> list[Extension]:
    if torch_folder() is None:
        return []
    names = {"cpu": "csrc/gather_scale.cpp"}
    if wants_cuda():
        names["cuda"] = "csrc/gather_scale.cu"
    return [
        Extension(f"trainer.kernels._shorn_{device}", [source], depends=HEADERS, optional=True)
        for device, source in names.items()
    ]


class BuildOperators(build_ext):
    """Shared libraries that torch.ops.load_library loads; no Python modules."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(self.command(ext.sources[0], target), check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # The package works without it: what is missing is speed.
            target.unlink(missing_ok=True)
            print(f"warning: {ext.sources[0]} was not built ({error})", file=sys.stderr)

    def command(self, source: str, target: Path) -> list[str]:
        """The compiler's call."""
        folder = torch_folder()
        assert folder is not None
        include, libraries = folder / "include", folder / "lib"
        output = ["-shared", "-o", str(target), source, f"-L{libraries}", "-ltorch_cpu"]
        if not source.endswith(".cu"):
            compiler = os.environ.get("CXX", "c++")
            return [compiler, *FLAGS, "-fPIC", "-fopenmp-simd", f"-I{include}", *output]
        host = ["-Xcompiler", "-fPIC", "-DUSE_CUDA", f"-I{include}"]
        # Python loads PyTorch's libraries out of sight of others: what is used must be linked. A
        # PyTorch without CUDA has no such library, and compiles ours all the same.
        cuda = ["-ltorch_cuda"] if (libraries / "libtorch_cuda.so").exists() else []
        nvcc = find_nvcc()
        assert nvcc is not None
        return [nvcc, *FLAGS, *ARCHITECTURES, *host, *output, *cuda]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOperators})
