"""setup.py builds what it can, and never fails for want of a compiler or of PyTorch."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BUILD = """
import sys
hide_torch, target = sys.argv[1:]
if hide_torch == "yes":
    sys.modules["torch"] = None
sys.argv = ["setup.py", "build_ext", "--build-lib", target, "--build-temp", target]
exec(compile(open("setup.py").read(), "setup.py", "exec"))
"""

# A PyTorch without CUDA lacks symbols that the CUDA library asks for: there they stay unresolved.
REGISTER = """
import ctypes, os, sys
import torch
import trainer.kernels.gather_scale
if torch.version.cuda is None:
    ctypes.CDLL(sys.argv[1], mode=os.RTLD_LAZY)
else:
    torch.ops.load_library(sys.argv[1])
for name in ("shorn::gather_scale_compiled", "shorn::gather_scale_backward_compiled"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
print("registered")
"""


def build(target: Path, hide_torch: bool = False, **environment: str) -> tuple[set[str], str]:
    """Names of the libraries that a build leaves in `target`, and what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", BUILD, "yes" if hide_torch else "no", str(target)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return {path.name for path in target.rglob("*.so")}, result.stdout + result.stderr


def test_without_pytorch_nothing_is_compiled(tmp_path: Path) -> None:
    assert build(tmp_path, hide_torch=True)[0] == set()


def test_failing_compiler_is_only_a_warning(tmp_path: Path) -> None:
    false = shutil.which("false")
    assert false is not None
    # No nvcc: only the C++ operator is tried.
    libraries, output = build(tmp_path, CXX=false, PATH=str(tmp_path), CUDA_HOME=str(tmp_path))
    assert libraries == set()
    assert "warning: csrc/gather_scale.cpp was not built" in output


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_need_not_be_on_the_path(variable: str, tmp_path: Path) -> None:
    false = shutil.which("false")
    assert false is not None
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    (tmp_path / "cuda" / "bin" / "nvcc").symlink_to(false)
    toolkit = str(tmp_path / "cuda")
    environment = {"CUDA_HOME": "", "CUDA_PATH": "", "PATH": str(tmp_path), variable: toolkit}
    libraries, output = build(tmp_path, False, CXX=false, SHORN_CUDA="1", **environment)
    assert libraries == set()
    assert f"{toolkit}/bin/nvcc" in output
    assert "warning: csrc/gather_scale.cu was not built" in output


COMPARE = """
import sys
import torch
torch.version.cuda = sys.argv[1] if sys.argv[1] != "none" else None
sys.argv = ["setup.py", "--version"]
exec(compile(open("setup.py").read(), "setup.py", "exec"))
"""


@pytest.mark.parametrize(
    ("release", "cuda", "told"),
    [
        (
            "13.0",
            "12.6",
            r"nvcc is of CUDA 13.0, and this PyTorch is made for CUDA 12.6: .*CUDA_HOME",
        ),
        (
            "13.0",
            "none",
            r"this PyTorch \(\S+\) has no CUDA: the CUDA operator is compiled, but not",
        ),
        ("13.1", "13.0", None),
        ("12.8", "13.0", None),
        ("", "13.0", None),
    ],
)
def test_nvcc_is_compared_with_pytorch(
    release: str, cuda: str, told: str | None, tmp_path: Path
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "-c", COMPARE, cuda],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "SHORN_CUDA": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    if told is None:
        assert "warning: " not in result.stderr
    else:
        assert re.search(f"warning: {told}", result.stderr), result.stderr


@pytest.mark.slow
def test_both_operators_are_built_where_nvcc_is(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    libraries, _ = build(tmp_path, SHORN_CUDA="1")
    assert libraries == {"_shorn_cpu.so", "_shorn_cuda.so"}
    (library,) = tmp_path.rglob("_shorn_cuda.so")
    result = subprocess.run(
        [sys.executable, "-c", REGISTER, str(library)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert result.stdout.strip() == "registered", result.stderr
    for path in tmp_path.rglob("*.so"):
        found = re.search(rb"shorn built with torch \d[^\s\0]+, CUDA (\S+?)\0", path.read_bytes())
        assert found is not None
        assert (found[1] == b"none") == ("cpu" in path.name)
