"""The Triton kernels in the interpreter: tests of the operators again, in processes of their own.

Triton decides at its import whether it interprets, and any test may have imported it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# File, and the tests it must at least have passed.
FILES = [
    ("interpreted_kernels.py", 13),
    ("test_attention.py", 50),
    ("test_cross_entropy.py", 99),
    ("test_gather_scale.py", 30),
    ("test_linear_cross_entropy.py", 55),
    ("test_model.py", 11),
    ("test_rms_norm.py", 52),
    ("test_rope.py", 41),
    ("test_swiglu.py", 43),
]


@pytest.mark.parametrize(("name", "least"), FILES, ids=[name for name, _ in FILES])
def test_passes_in_the_interpreter(name: str, least: int) -> None:
    pytest.importorskip("triton")
    file = ROOT / "tests" / "trainer" / "kernels" / name
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "not threads",
            str(file),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    summary = re.search(r"(\d+) passed", result.stdout)
    assert summary is not None and int(summary[1]) >= least, result.stdout[-300:]
    assert "skipped" not in result.stdout.splitlines()[-1]
