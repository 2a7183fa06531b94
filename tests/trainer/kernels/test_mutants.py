"""The tests of the operators notice mistakes in the Triton kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.kernels.mutants import KERNELS, MUTANTS

ROOT = Path(__file__).resolve().parents[3]


def test_mutants_change_the_kernels() -> None:
    assert len(MUTANTS) >= 12
    assert len({(mutant.operator, mutant.mistake) for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        source = (KERNELS / f"{mutant.module}.py").read_text("utf-8")
        assert source.count(mutant.right) > mutant.occurrence, mutant
        assert mutant.right != mutant.wrong


@pytest.mark.slow
def test_every_mutant_is_caught() -> None:
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-c", "from tests.trainer.kernels.mutants import main; main()"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    lines = result.stdout.splitlines()
    print(result.stdout)
    assert len(lines) == len(MUTANTS)
    assert not [line for line in lines if "NOT CAUGHT" in line]
