"""The Triton kernels in the interpreter: tests of the operators again, in processes of their own.

Triton decides at its import whether it interprets, and any test may have imported it.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDER = Path("tests/trainer/kernels")

# By process, of which each takes about as long: files, and the tests they must at least pass.
FILES = [
    {"test_model.py": 10, "interpreted_kernels.py": 13, "test_swiglu.py": 40},
    {"test_attention.py": 60, "test_rms_norm.py": 51, "test_rope.py": 66},
    {"test_cross_entropy.py": 99, "test_gather_scale.py": 30, "test_linear_cross_entropy.py": 55},
]
LEFT_OUT = "not (threads or own_chunks)"


@pytest.mark.parametrize("files", FILES, ids=" ".join)
def test_passes_in_the_interpreter(files: dict[str, int]) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "-k", LEFT_OUT, *(str(FOLDER / name) for name in files)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=300,
    )
    names = re.findall(r"^PASSED \S+/(\w+\.py)::.*\n", result.stdout, re.MULTILINE)
    told = re.sub(r"^PASSED .*\n", "", result.stdout, flags=re.MULTILINE)
    assert result.returncode == 0, told[-6000:]
    passed = Counter(names)
    assert all(passed[name] >= least for name, least in files.items()), passed
    assert "skipped" not in result.stdout.splitlines()[-1]
