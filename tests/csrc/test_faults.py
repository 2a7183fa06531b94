"""The shim that runs CUDA kernels on a CPU notices every kind of fault, plain or with sanitizers.

tests/csrc/faults.cpp has a small kernel for each kind, correct and faulty.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("faults.cpp")
CSRC = Path(__file__).resolve().parents[2] / "csrc"
BUILDS = {
    "plain": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}
DEADLOCK = "deadlock: a barrier that some threads never reach"
# Fault, build and what it says: every way in which the fault is caught.
CAUGHT = (
    ("missing barrier", "plain", "wrong values"),
    ("missing barrier", "thread", "data race"),
    ("race between blocks", "plain", "wrong values"),
    ("race between blocks", "thread", "data race"),
    ("sum without atomics", "thread", "data race"),
    ("out of bounds", "address", "heap-buffer-overflow"),
    ("out of bounds in shared memory", "address", "heap-buffer-overflow"),
    ("misaligned access", "address", "misaligned address"),
    ("divergent barrier", "plain", DEADLOCK),
    ("two barriers", "plain", "threads wait at different barriers"),
    ("divergent shuffle", "plain", DEADLOCK),
)
FAULTS = tuple(dict.fromkeys(fault for fault, _, _ in CAUGHT))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The program in every build."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("faults")
    for name, flags in BUILDS.items():
        command = ["g++", "-g", "-O1", "-std=c++17", *flags, f"-I{CSRC}", str(SOURCE)]
        result = subprocess.run(
            [*command, "-o", str(folder / name)], capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, result.stderr
    return {name: folder / name for name in BUILDS}


def run(program: Path, fault: str, kind: str) -> tuple[int, str]:
    """Exit status and all that is printed; skips where the system does not let sanitizers run."""
    result = subprocess.run(
        [str(program), fault, kind], capture_output=True, text=True, timeout=600
    )
    printed = result.stdout + result.stderr
    if "unexpected memory mapping" in printed:
        pytest.skip("ThreadSanitizer cannot run with this kernel's address randomisation")
    return result.returncode, printed


@pytest.mark.parametrize(("fault", "build", "message"), CAUGHT)
def test_a_fault_is_caught(programs: dict[str, Path], fault: str, build: str, message: str) -> None:
    status, printed = run(programs[build], fault, "faulty")
    assert status != 0
    assert message in printed


@pytest.mark.parametrize("build", BUILDS)
def test_correct_kernels_pass(programs: dict[str, Path], build: str) -> None:
    for fault in FAULTS:
        status, printed = run(programs[build], fault, "correct")
        assert (status, printed.splitlines()[0]) == (0, "right"), f"{fault}: {printed}"


def test_order_hides_what_only_a_sanitizer_sees(programs: dict[str, Path]) -> None:
    """Fibers take turns, so a sum without atomics comes out right: values alone prove nothing."""
    assert run(programs["plain"], "sum without atomics", "faulty") == (0, "right\n")
