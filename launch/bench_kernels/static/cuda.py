"""Static evidence about the CUDA kernels of csrc/, which nvcc compiles where it is installed."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from data.errors import InputError
from launch.bench_kernels.static.compile import (
    ROOT,
    Failure,
    Record,
    make_record,
    require_triton,
)
from launch.bench_kernels.static.sass import read_cubin

CSRC = ROOT / "csrc"
OUT, IN, ROWS, COLUMNS = 11008, 4096, 5504, 2048
"""Weight of a feed-forward layer of LLaMA 2 7B and the selection for which traffic is counted."""
_BACKWARD_ROWS = 32
"""Rows whose column sums the backward kernel adds up: kBackwardRows."""


class Traffic(NamedTuple):
    """Device memory traffic of one launch; a sector of 32 bytes counts whole, what every block
    reads again (indices, scales) once."""

    shape: str
    bytes_moved: int
    minimum_bytes: int


def sources() -> list[Path]:
    """The files of csrc/ that instantiate kernels; none where only the package is installed."""
    return sorted(CSRC.glob("*_instances.cu"))


def traffic() -> dict[str, Traffic]:
    """By kernel: those for aligned shapes. Others serve small or ragged weights."""
    found = {}
    for gathered in (False, True):
        m = COLUMNS if gathered else IN
        select = 12 * ROWS + (12 * COLUMNS if gathered else 4 * IN)
        words = f"[{OUT}, {IN}] bf16, {ROWS} rows, {m} columns"
        tail = f"8, {str(gathered).lower()}>"
        # With half of the columns kept hardly a sector of a row is left out.
        forward = 2 * ROWS * IN + 2 * ROWS * m + select
        found[f"forward_kernel<BFloat16, {tail}"] = Traffic(words, forward, forward)
        places = 8 * OUT + (8 * IN if gathered else 4 * IN)
        parts = 4 * (-(-IN // 2048) * OUT + -(-OUT // _BACKWARD_ROWS) * IN)
        for gradient, size in (("BFloat16", 2), ("float", 4)):
            moved = size * ROWS * m + 2 * ROWS * IN + 2 * OUT * IN + places
            found[f"backward_kernel<BFloat16, {gradient}, {tail}"] = Traffic(
                f"{words}, gradient {size * 8} bits", moved + parts, moved + 4 * (OUT + IN)
            )
    return found


def compile_cuda(
    archs: Sequence[int], on_source: Callable[[], None] = lambda: None
) -> tuple[list[Record], list[Failure]]:
    """Compiles every kernel of csrc/ for every architecture; nothing where there is no nvcc.

    Raises:
        InputError: the disassembler, which the triton wheel brings, is missing.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return [], []
    tools = require_triton()
    records: list[Record] = []
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sources():
            for arch in archs:
                cubin = Path(folder, f"{source.stem}.sm_{arch}.cubin")
                try:
                    _compile(nvcc, source, arch, cubin)
                    records += _read(source, arch, cubin, tools)
                except InputError as error:
                    failures.append(Failure(source.name, f"sm_{arch}", str(error)))
                on_source()
    return records, failures


def nvcc_version() -> dict[str, str]:
    """{"nvcc": version} where it is installed."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return {}
    result = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60)
    found = re.search(r"release ([\d.]+)", result.stdout)
    return {"nvcc": found[1] if found else "unknown"}


def _compile(nvcc: str, source: Path, arch: int, cubin: Path) -> None:
    target = f"sm_{arch}{'a' if arch >= 90 else ''}"
    command = [nvcc, "-cubin", "-std=c++17", "-O3", f"-arch={target}", f"-I{CSRC}"]
    result = subprocess.run(
        [*command, str(source), "-o", str(cubin)], capture_output=True, text=True, timeout=600
    )
    if result.returncode:
        raise InputError(f"{nvcc}: {result.stderr.strip()[-1000:]}")


def _read(source: Path, arch: int, cubin: Path, tools: Path) -> list[Record]:
    operator = source.name.removesuffix("_instances.cu")
    header = source.with_name(f"{operator}_kernels.cuh").read_text("utf-8")
    threads = re.search(r"constexpr int kThreads = (\d+);", header)
    assert threads is not None, f"{operator}_kernels.cuh does not define kThreads"
    known = traffic()
    records = []
    for code in read_cubin(cubin, tools):
        name = short_name(code.name)
        record = make_record(
            code,
            kernel=f"{operator}.{name}",
            backend="cuda",
            arch=arch,
            threads=int(threads[1]),
            shared_bytes=code.shared_bytes,
            has_dot=False,
            **(known[name]._asdict() if name in known else {}),
        )
        records.append(record)
    return sorted(records, key=lambda record: record.kernel)


def short_name(mangled: str) -> str:
    """ "forward_kernel<BFloat16, 8, true>", or the symbol itself where c++filt is missing."""
    demangle = shutil.which("c++filt")
    if demangle is None:
        return mangled
    result = subprocess.run([demangle, mangled], capture_output=True, text=True, check=True)
    name = re.sub(r"\bshorn::(gpu::)?", "", result.stdout.strip()).removeprefix("void ")
    return re.sub(r"\(.*", "", name)
