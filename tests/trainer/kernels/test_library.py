"""Which implementation runs, and that there always is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.kernels import gather_scale, library

ROOT = Path(__file__).resolve().parents[3]

WITHOUT_LIBRARIES = """
from pathlib import Path
import sys
import torch
from trainer.kernels import library
from trainer.kernels import registry
library.FOLDER = Path(sys.argv[1])
from trainer.kernels.gather_scale import gather_scale
print(registry.which("gather_scale", "cpu"))
weight = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
scale = torch.rand(6, dtype=torch.float64, requires_grad=True)
arguments = (weight, torch.tensor([2, 0]), None, torch.tensor([1, 5]), scale)
torch.autograd.gradcheck(gather_scale, arguments)
torch.library.opcheck(torch.ops.shorn.gather_scale.default, arguments)
try:
    gather_scale(weight, torch.tensor([4]))
except ValueError as error:
    print(error)
print(library.problem("cpu"), library.problem("cuda"))
"""


def test_other_devices_run_the_reference() -> None:
    weight = torch.empty(4, 6, device="meta")
    assert gather_scale.gather_scale(
        weight, torch.empty(3, dtype=torch.int64, device="meta")
    ).shape == (3, 6)


def test_runs_without_a_usable_library(tmp_path: Path) -> None:
    origin = b"shorn built with torch 2.10.0+cu126, CUDA 12.6\0"
    (tmp_path / "_shorn_cpu.so").write_bytes(b"not a library\0" + origin + b"\xff")
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARIES, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    *lines, problems = result.stdout.splitlines()
    assert lines == ["reference", "gather_scale: row index 4 is out of range for 4 rows"]
    assert problems.startswith(f"{tmp_path / '_shorn_cpu.so'} does not load (")
    assert "Could not load" not in problems
    assert "; it was built with torch 2.10.0+cu126, CUDA 12.6, and this is torch " in problems
    assert problems.endswith(" None")


@pytest.mark.parametrize("size", [5, 40, 4096, -1])
def test_a_library_that_is_cut_short_is_not_loaded(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end the process."""
    whole = library._path("cpu")
    if not library.is_loaded("cpu"):
        pytest.skip("csrc/ is not built: pip install --no-build-isolation -e .")
    assert not library._is_cut_short(whole)
    (tmp_path / whole.name).write_bytes(whole.read_bytes()[:size])
    for name, value in (("FOLDER", tmp_path), ("_loaded", set()), ("_problems", {})):
        monkeypatch.setattr(library, name, value)
    library.load()
    problem = library.problem("cpu")
    assert not library.is_loaded("cpu") and problem is not None
    assert ("is cut short" in problem) == (size != 5)


def test_a_library_of_other_operators_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was built before they got other names."""
    if not library.is_loaded("cpu"):
        pytest.skip("csrc/ is not built: pip install --no-build-isolation -e .")
    monkeypatch.setattr(library, "_loaded", set())
    monkeypatch.setattr(library, "_problems", {})
    monkeypatch.setattr(library, "NAMES", ("gather_scale_of_tomorrow",))
    library.load()
    assert not library.is_loaded("cpu")
    problem = library.problem("cpu")
    assert problem is not None and "_shorn_cpu.so holds other operators" in problem


@pytest.mark.parametrize("level", ["default", pytest.param("avx2", marks=pytest.mark.slow)])
def test_every_instruction_set_computes_the_same(level: str) -> None:
    """The tests of the operator again, on a processor that could do less than this one."""
    if not library.is_loaded("cpu"):
        pytest.skip("csrc/ is not built: pip install --no-build-isolation -e .")
    tests = ROOT / "tests" / "trainer" / "kernels" / "test_gather_scale.py"
    chosen = "compiled and (equals or special or left_out or threads)"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", chosen],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": level},
        timeout=120,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert "14 passed" in result.stdout
