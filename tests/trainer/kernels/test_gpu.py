"""What `pytest -m gpu` selects, and what becomes of it without a GPU and where one is lost."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.kernels import backends

ROOT = Path(__file__).resolve().parents[3]
FOLDER = "tests/trainer/kernels"
STAND_IN = ("-p", "tests.trainer.kernels.stand_in_gpu")


def run(*arguments: str) -> str:
    """What pytest prints, whose Triton interprets."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=120,
    )
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return result.stdout


def outcomes(printed: str, outcome: str) -> list[str]:
    """Names of tests, once each."""
    found = re.findall(rf"^{outcome} \S+::test_(\w+\[.*?[-\]])", printed, re.MULTILINE)
    return [name.rstrip("-]").replace("[", " ") for name in dict.fromkeys(found)]


def test_every_operator_is_tested_in_every_implementation() -> None:
    listed = run("-m", "gpu", *STAND_IN, "--collect-only", FOLDER)
    found = set(re.findall(r"/test_(\w+)\.py::\w+\[(\w+)", listed))
    both = {"reference", "triton"}
    expected = {
        "attention": {*both, "cuda"},
        "cross_entropy": both,
        "gather_scale": {*both, "cuda"},
        "linear_cross_entropy": both,
        "linear_loss": both,
        "model": {*both, "cuda"},
        "rms_norm": both,
        "rope": both,
        "swiglu": both,
        "trial": {*both, "cuda"},
    }
    assert found == {(name, backend) for name, several in expected.items() for backend in several}


def test_a_lost_or_hanging_device_costs_one_test() -> None:
    """Its process is replaced, and the tests after it run."""
    timed = importlib.util.find_spec("pytest_timeout") is not None
    limits = ("--timeout", "10", "--timeout-method", "thread") if timed else ("-k", "not hangs")
    files = (f"{FOLDER}/planted_gpu_tests.py", f"{FOLDER}/test_rope.py::test_without_positions")
    printed = run("-m", "gpu", *STAND_IN, "-rpf", "-n", "1", *limits, *files)
    failed = {"loses_the_device triton", *(["hangs triton"] if timed else [])}
    assert set(outcomes(printed, "FAILED")) == failed
    # The summary repeats the reason where pytest does not cut its lines, as with CI set.
    assert len(re.findall(r"^worker 'gw\d+' crashed while running", printed, re.M)) == len(failed)
    passed = set(outcomes(printed, "PASSED"))
    for name in ("before", "between", "after", "without_positions"):
        assert passed >= {f"{name} reference", f"{name} triton"}


def test_operators_that_fail_are_replaced_before_a_run() -> None:
    printed = run("-m", "gpu", *STAND_IN, f"{FOLDER}/planted_trials.py")
    assert re.search(r"^5 passed", printed, re.MULTILINE), printed


@pytest.mark.parametrize(
    ("mode", "shared"), [("Default", True), ("Default\nExclusive_Process", False), (None, True)]
)
def test_a_gpu_for_one_process_alone_is_known(
    mode: str | None, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if mode is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, 0, mode)

    monkeypatch.setattr(subprocess, "run", answer)
    assert backends.can_be_shared() is shared


def test_without_a_gpu_the_reason_is_told() -> None:
    printed = run("-m", "gpu", f"{FOLDER}/test_rope.py")
    assert re.search(r"SKIPPED .* needs a GPU, and PyTorch \S+ sees none", printed)
    assert " passed" not in printed and " failed" not in printed
