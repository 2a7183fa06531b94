"""Static evidence about kernels: compiled ahead of time for GPUs that need not be there.

Everything is read from what the compiler made; times are predictions at stated ceilings, never
measurements.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.errors import InputError
from launch.bench_kernels.static.sass import LOADS, STORES, Kernel, read_cubin
from launch.commands import child_environment

ROOT = Path(__file__).resolve().parents[3]
KERNELS = "launch.bench_kernels.static.kernels"
"""Module whose launches() are those of every Triton kernel."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Limits of one multiprocessor, and the ceilings that predicted times assume."""

    name: str
    shared_bytes: int
    """Shared memory of a multiprocessor; a block may have 1 KiB less, and 1 KiB is reserved."""
    bytes_per_second: float
    """90% of the data sheet's memory bandwidth."""
    flops_per_second: float
    """80% of the data sheet's dense bf16 rate."""


GPUS = {
    80: Gpu("A100 80 GB SXM", 164 << 10, 0.9 * 2.039e12, 0.8 * 312e12),
    90: Gpu("H100 SXM", 228 << 10, 0.9 * 3.35e12, 0.8 * 989e12),
    100: Gpu("B200", 228 << 10, 0.9 * 8.0e12, 0.8 * 2250e12),
}
REGISTERS = 65536
THREADS = 2048
BLOCKS = 32


@dataclass(frozen=True, slots=True)
class Loop:
    """One loop of a kernel, as instructions of one warp."""

    instructions: int
    tensor_core: int
    """Matrix instructions: HMMA, HGMMA or UTC*MMA."""
    bulk_loads: int
    """UTMALDG."""
    local_accesses: int
    """LDL and STL: spilled registers."""
    barriers: int
    """BAR: points at which the warps of a block wait for each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One kernel for one architecture."""

    kernel: str
    backend: Literal["triton", "cuda"]
    arch: str
    """sm_80, sm_90 or sm_100."""
    shape: str | None
    """Problem for which the bytes are counted."""
    registers: int
    """Per thread."""
    spill_bytes: int
    """Per thread."""
    shared_bytes: int
    """Per block."""
    threads: int
    """Per block."""
    occupancy: float
    """Resident warps over those a multiprocessor can hold."""
    limited_by: str
    """What keeps occupancy down: registers, shared memory, threads or blocks."""
    instructions: int
    load_bits: int | None
    """Width that carries most bytes of its global loads (static.sass.Kernel.main_width).
    Tiles by the tensor memory accelerator count as 128: they move in units of 16 bytes."""
    store_bits: int | None
    load_widths: dict[int, int]
    """Bits to number of instructions."""
    store_widths: dict[int, int]
    has_dot: bool
    tensor_core: str | None
    """HMMA, HGMMA or UTCMMA; None: no matrix instruction."""
    loops: list[Loop]
    bytes_moved: int | None
    """Device memory traffic of a launch of `shape`."""
    minimum_bytes: int | None
    """Inputs read once and outputs written once."""
    bytes_over_minimum: float | None
    predicted_us: float | None
    """At GPUS' ceilings; None where bytes, or a matrix kernel's operations, are not known."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A kernel that does not compile."""

    kernel: str
    arch: str
    message: str


def require_triton() -> Path:
    """Folder of the tools in the triton wheel. Raises InputError where there is none."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        raise InputError(
            "triton is not installed, and it brings the compiler and disassembler that the static "
            "report needs; pip install triton (Linux)"
        )
    tools = Path(found.origin).parent / "backends" / "nvidia" / "bin"
    for tool in ("nvdisasm", "cuobjdump"):
        if not (tools / tool).exists():
            raise InputError(f"{tools / tool} is missing; reinstall triton, 3.6 to 3.9")
    return tools


def versions() -> dict[str, str]:
    """Versions of what compiled and counted."""
    return {name: importlib.metadata.version(name) for name in ("torch", "triton")}


def compile_triton(
    archs: Sequence[int],
    module: str = KERNELS,
    on_kernel: Callable[[], None] = lambda: None,
) -> tuple[list[Record], list[Failure]]:
    """Compiles every kernel that `module.launches()` launches for every architecture.

    Args:
        archs: of GPUS.
        module: name of a module with launches().
        on_kernel: called after each kernel and architecture.

    Raises:
        InputError: triton or its tools are missing.
    """
    tools = require_triton()
    records, failures = [], []
    with tempfile.TemporaryDirectory() as folder:
        for facts in _run_worker(archs, module, Path(folder), on_kernel):
            name, arch = facts["kernel"], facts["arch"]
            if "error" in facts:
                failures.append(Failure(name, f"sm_{arch}", facts["error"]))
                continue
            (kernel,) = read_cubin(Path(folder, f"{name}.sm_{arch}.cubin"), tools)
            records.append(make_record(kernel, backend="triton", **facts))
    return records, failures


def make_record(
    code: Kernel,
    *,
    kernel: str,
    backend: Literal["triton", "cuda"],
    arch: int,
    threads: int,
    shared_bytes: int,
    has_dot: bool,
    shape: str | None = None,
    bytes_moved: int | None = None,
    minimum_bytes: int | None = None,
    flops: int | None = None,
) -> Record:
    """Puts together what the cubin tells and what the launch does.

    Args:
        shared_bytes: per block, what a launch adds included.
        flops: floating-point operations of matrix products.
    """
    occupancy, limited_by = occupancy_of(code.registers, shared_bytes, threads, arch)
    loads, stores = code.widths(LOADS), code.widths(STORES)
    ratio = bytes_moved / minimum_bytes if bytes_moved and minimum_bytes else None
    return Record(
        kernel=kernel,
        backend=backend,
        arch=f"sm_{arch}",
        shape=shape,
        registers=code.registers,
        spill_bytes=code.spill_bytes,
        shared_bytes=shared_bytes,
        threads=threads,
        occupancy=occupancy,
        limited_by=limited_by,
        instructions=len(code.instructions),
        load_bits=128 if code.bulk_loads else code.main_width(LOADS),
        store_bits=128 if code.bulk_stores else code.main_width(STORES),
        load_widths=loads,
        store_widths=stores,
        has_dot=has_dot,
        tensor_core="+".join(sorted(code.tensor_core)) or None,
        loops=[
            Loop(
                instructions=len(loop.instructions),
                tensor_core=sum(loop.tensor_core.values()),
                bulk_loads=loop.bulk_loads,
                local_accesses=loop.local_accesses,
                barriers=loop.counts["BAR"],
            )
            for loop in code.loops
        ],
        bytes_moved=bytes_moved,
        minimum_bytes=minimum_bytes,
        bytes_over_minimum=ratio,
        predicted_us=_predict(arch, bytes_moved, flops, has_dot),
    )


def occupancy_of(registers: int, shared_bytes: int, threads: int, arch: int) -> tuple[float, str]:
    """Resident warps over the most there can be, and what limits them.

    Registers are given to warps in units of 256, and to four warps at a time.
    """
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    blocks = {
        "registers": REGISTERS // per_warp // 4 * 4 // warps,
        "shared memory": GPUS[arch].shared_bytes // (-(-(shared_bytes + 1024) // 128) * 128),
        "threads": THREADS // (warps * 32),
        "blocks": BLOCKS,
    }
    limit = min(blocks, key=lambda name: blocks[name])
    return blocks[limit] * warps / (THREADS // 32), limit


def _predict(arch: int, bytes_moved: int | None, flops: int | None, has_dot: bool) -> float | None:
    if bytes_moved is None or (has_dot and not flops):
        return None
    gpu = GPUS[arch]
    return 1e6 * max(bytes_moved / gpu.bytes_per_second, (flops or 0) / gpu.flops_per_second)


def _run_worker(
    archs: Iterable[int], module: str, folder: Path, on_kernel: Callable[[], None]
) -> list[dict[str, Any]]:
    """What the worker says about each kernel; started again where the compiler takes it down."""
    request = {"module": module, "archs": list(archs), "folder": str(folder)}
    found: list[dict[str, Any]] = []
    while True:
        done = [(facts["kernel"], facts["arch"]) for facts in found]
        started = None
        for facts in (run := _Worker(request | {"done": done})):
            if facts.pop("finished", False):
                found.append(facts)
                started = None
                on_kernel()
            else:
                started = facts
        if started is not None:
            said = f"compiler ended with status {run.status}: {run.message[-500:]}"
            found.append({**started, "error": said})
            on_kernel()
        elif run.status:
            raise AssertionError(f"{module}: {run.message[-3000:]}")
        else:
            return found


class _Worker:
    """One run of static/worker.py: iterating yields what it says, then tells how it ended."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.status = 0
        self.message = ""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.bench_kernels.static.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(),
                text=True,
            )
            assert process.stdin is not None and process.stdout is not None
            with process:
                process.stdin.write(json.dumps(self.request))
                process.stdin.close()
                yield from map(json.loads, process.stdout)
            self.status = process.returncode
            errors.seek(0)
            self.message = errors.read().strip()


def _environment() -> dict[str, str]:
    """This process's, without the interpreter of kernels, and with our packages to import."""
    environment = child_environment()
    environment.pop("TRITON_INTERPRET", None)
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    return environment
