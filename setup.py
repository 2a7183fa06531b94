"""Package build: compiles csrc/ where that is possible; the rest is in pyproject.toml.

The compiled operators need PyTorch while building, so they are built only without isolation
(`pip install --no-build-isolation`); the CUDA one also needs nvcc, and a PyTorch with CUDA or
SHORN_CUDA=1. Without them, and when a compiler fails, the package installs as pure Python, whose
operators run as PyTorch operations.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
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


def nvcc_version() -> str:
    """The CUDA version of nvcc, "unknown" where it does not tell."""
    try:
        told = subprocess.run([str(find_nvcc()), "--version"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    found = re.search(r"release (\d+\.\d+)", told.stdout)
    return found[1] if found else "unknown"


def torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return "unknown"


def built_with(cuda: str) -> list[str]:
    """What a library tells of its origin; csrc/gather_scale_torch.h makes texts of these."""
    return [f"-DSHORN_TORCH={torch_version()}", f"-DSHORN_TOOLKIT={cuda}"]


def compare_cuda() -> None:
    """Says where nvcc's CUDA is none that PyTorch's is sure to run beside. The library brings
    nvcc's runtime, which a driver may be too old for that is new enough for PyTorch."""
    import torch

    ours, theirs = nvcc_version(), torch.version.cuda
    if theirs is None:
        problem = (
            f"this PyTorch ({torch.__version__}) has no CUDA: the CUDA operator is compiled, but "
            "not linked to one that has. To be used, it must be built with the one that uses it"
        )
    elif "unknown" not in ours and int(ours.split(".")[0]) > int(theirs.split(".")[0]):
        problem = (
            f"nvcc is of CUDA {ours}, and this PyTorch is made for CUDA {theirs}: a driver that is "
            "new enough for that may be too old for the CUDA operator, which runs then pass over. "
            f"Set CUDA_HOME to a toolkit of CUDA {theirs} or older"
        )
    else:
        return
    print(f"warning: {problem}", file=sys.stderr)


def extensions() -> list[Extension]:
    if torch_folder() is None:
        return []
    names = {"cpu": "csrc/gather_scale.cpp"}
    if wants_cuda():
        names["cuda"] = "csrc/gather_scale.cu"
        compare_cuda()
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
            built = built_with("none")
            return [compiler, *FLAGS, *built, "-fPIC", "-fopenmp-simd", f"-I{include}", *output]
        host = ["-Xcompiler", "-fPIC", "-DUSE_CUDA", f"-I{include}"]
        # Python loads PyTorch's libraries out of sight of others: what is used must be linked. A
        # PyTorch without CUDA has no such library, and compiles ours all the same.
        cuda = ["-ltorch_cuda"] if (libraries / "libtorch_cuda.so").exists() else []
        nvcc = find_nvcc()
        assert nvcc is not None
        built = built_with(nvcc_version())
        return [nvcc, *FLAGS, *built, *ARCHITECTURES, *host, *output, *cuda]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildOperators})
