"""The CUDA kernels of gather_scale: compiled for GPUs by nvcc, and run on the CPU by a shim."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainer.kernels.cases import (
    DTYPES,
    Case,
    assert_close,
    draw_case,
    expected_backward,
    expected_forward,
)

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
DRIVER = Path(__file__).with_name("gather_scale_driver.cpp")
# Several tiles of rows and columns, and sizes that allow and forbid 16-byte accesses.
SIZES = (1, 31, 40, 64, 264, 300, 520)

INSTANCES = CSRC / "gather_scale_instances.cu"


class Arguments(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "gradient weight rows columns row_scale column_scale result d_weight d_row_scale "
                "d_column_scale"
            ).split()
        ),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("out", "in", "n", "m")),
    )


def compile_driver(target: Path, *flags: str, include: Path = CSRC) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    command = ["g++", "-O1", "-std=c++17", "-w", *flags]
    command += [f"-I{include}", f"-I{CSRC}", str(DRIVER), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return target


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.gather_scale_on_cpu.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(compile_driver(tmp_path_factory.mktemp("driver") / "driver.so", "-fPIC", "-shared"))


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr() or 16


def call(driver: ctypes.CDLL, case: Case, seed: int, gradient: Tensor | None, *out: Tensor) -> str:
    """Runs forward into `out`, or backward into the three of `out`; returns the error."""
    results = (None, *out) if gradient is not None else (*out, None, None, None)
    arguments = Arguments(
        *(address(tensor) for tensor in (gradient, case.weight, case.rows, case.columns)),
        *(address(tensor) for tensor in (case.row_scale, case.column_scale, *results)),
        case.weight.stride(0),
        *case.weight.shape,
        case.n,
        case.m,
    )
    wide = gradient is not None and gradient.dtype != case.weight.dtype
    error = driver.gather_scale_on_cpu(
        ctypes.byref(arguments), DTYPES.index(case.weight.dtype), gradient is not None, wide, seed
    )
    return "" if error is None else error.decode()


def draw_rows(seed: int, dtype: torch.dtype) -> Case:
    case = draw_case(seed, dtype, SIZES)
    return case if case.weight.stride(1) == 1 else case._replace(weight=case.weight.contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_equals_indexing(driver: ctypes.CDLL, dtype: torch.dtype) -> None:
    for seed in range(8):
        case = draw_rows(seed, dtype)
        found = torch.full((case.n, case.m), torch.nan, dtype=dtype)
        assert call(driver, case, seed, None, found) == ""
        assert_close(found, expected_forward(case))


def check_backward(driver: ctypes.CDLL, seed: int, dtype: torch.dtype) -> None:
    case = draw_rows(seed, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gradient = torch.randn(case.n, case.m).to(wide if seed % 2 else dtype)
    d_weight = torch.full(case.weight.shape, torch.nan, dtype=dtype)
    scales = [torch.full((size,), torch.nan, dtype=wide) for size in case.weight.shape]
    assert call(driver, case, seed, gradient, d_weight, *scales) == ""
    expected = expected_backward(case, gradient)
    absolute = case._replace(weight=case.weight.abs())
    sizes = expected_backward(absolute, gradient.abs())
    for found, wanted, size in zip((d_weight, *scales), expected, sizes, strict=True):
        assert_close(found, wanted, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_equals_indexing(driver: ctypes.CDLL, dtype: torch.dtype) -> None:
    for seed in range(8):
        check_backward(driver, seed, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("original", "planted"),
    [
        ("  __syncthreads();\n", ""),
        ("  if (task.row_sums == nullptr) return;\n", "  if (threadIdx.x > 63) return;\n"),
        ("values[0], 2);", "values[0], 4);"),
        ("if (kIndexed && place[v] < 0) continue;", ""),
    ],
    ids=["no barrier", "divergent barrier", "wrong lane", "columns left out"],
)
def test_planted_errors_are_noticed(tmp_path: Path, original: str, planted: str) -> None:
    source = (CSRC / "gather_scale_kernels.cuh").read_text("utf-8")
    assert source.count(original) == 1
    changed = source.replace(original, planted)
    (tmp_path / "gather_scale_kernels.cuh").write_text(changed, "utf-8")
    driver = load(compile_driver(tmp_path / "driver.so", "-fPIC", "-shared", include=tmp_path))
    with pytest.raises(AssertionError):
        for seed in range(8):
            check_backward(driver, seed, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sanitizer",
    [("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), ("-fsanitize=thread",)],
    ids=["address", "thread"],
)
def test_sanitizers_find_nothing(tmp_path: Path, sanitizer: tuple[str, ...]) -> None:
    program = compile_driver(tmp_path / "driver", "-g", "-DSHORN_MAIN", *sanitizer)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer cannot run with this kernel's address randomisation")
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == "swept"


@pytest.mark.parametrize(
    "flags",
    [
        ["-arch=sm_90a"],
        pytest.param(["-arch=sm_90a", "-DEVERY_TYPE"], marks=pytest.mark.slow),
        pytest.param(["-arch=sm_80", "-DEVERY_TYPE"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_compiles_for_gpus_without_spills(tmp_path: Path, flags: list[str]) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    command = ["nvcc", "-cubin", "-std=c++17", "-O3", "-Xptxas", "-v", *flags]
    command += [f"-I{CSRC}", str(INSTANCES), "-o", str(tmp_path / "kernels.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    report = result.stderr + result.stdout
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    # Both directions, vectorised or not, with or without columns; sums; inverse of an index.
    assert len(spills) == len(registers) == (16 + 24 + 2 + 2 if "-DEVERY_TYPE" in flags else 15)
    assert set(spills) == {("0", "0")}
    assert max(registers) <= 128  # two blocks of 256 threads on a multiprocessor
