"""Operators, their tests and their benchmark need what a machine for training has, and no more."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Python imports a module of this name first, in every process.
SITECUSTOMIZE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"tyro", "zstandard", "gguf"}:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


@pytest.fixture
def python(tmp_path: Path) -> list[str]:
    """A command that runs Python where packages are missing."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    paths = (str(folder), os.environ.get("PYTHONPATH"))
    return ["env", "PYTHONPATH=" + os.pathsep.join(filter(None, paths)), sys.executable]


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def test_packages_are_missing(python: list[str]) -> None:
    code = "import tyro"
    result = subprocess.run([*python, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "No module named 'tyro'" in result.stderr


def test_operators_are_tested(python: list[str]) -> None:
    """All tests of a GPU are collected, and some run on the CPU that stands in for it."""
    stand_in = "tests.trainer.kernels.stand_in_gpu"
    command = (*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-p", stand_in)
    told = run(*command, "-k", "reference and (rope or model)", "tests/trainer/kernels")
    found = re.search(r"^(\d+) passed, (?:\d+ skipped, )?(\d+) deselected", told, re.MULTILINE)
    assert found is not None and int(found[1]) >= 40 and int(found[2]) > 800, told[-300:]


def test_operators_are_timed(python: list[str], tmp_path: Path) -> None:
    bench = (*python, "-m", "launch.bench_kernels")
    assert "--static" in run(*bench, "--help")
    sizes = "--vocabularies 5000 --tokens 512 --hidden 32 --repeats 1".split()
    run(*bench, "--cpu", *sizes, "--json", str(tmp_path / "cpu.json"))
    assert json.loads((tmp_path / "cpu.json").read_text())["gather_scale_speedup"] > 0


@pytest.mark.slow
def test_kernels_are_compiled(python: list[str], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    report = tmp_path / "static.json"
    run(*python, "-m", "launch.bench_kernels", "--static", "--archs", "90", "--json", str(report))
    assert json.loads(report.read_text())["records"]
