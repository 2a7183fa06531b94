"""What `python -m launch.bench_kernels --static` does: compiles kernels for GPUs, prints facts."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from data.files import require_writable, write_copy
from data.progress import Progress
from data.tables import print_table
from launch.bench_kernels import traffic as kernel_traffic
from launch.bench_kernels.config import BenchKernelsConfig
from launch.bench_kernels.static import compile as static
from launch.bench_kernels.static import cuda as static_cuda
from launch.bench_kernels.static.compile import GPUS, Failure, Loop, Record
from launch.bench_kernels.traffic import Traffic

NOTES = """\
load, store: bits per access of a thread that carry most of a kernel's bytes, inside its loops if \
it has any there.
mma/tma: matrix instructions and UTMALDG of one warp in each loop that has any, innermost first.
moved/min: device memory traffic of the launch over inputs and outputs once each; partial sums are \
in it, what other programs read again (masks, gains, indices, the keys of attention) counts once. \
CUDA kernels with 1 element a thread instead of 8 serve shapes that forbid 16-byte accesses.
predicted: that traffic, and matrix operations where there are any, at the ceilings above. A \
prediction, not a measurement: no kernel ran. Short kernels take longer than this.
"""
TRAFFIC_NOTES = """\
eager: of each aten kernel its distinct inputs and its outputs, on fake tensors, views excepted.
torch.compile: Inductor's own count over the kernels that its CPU scheduler fuses. A lower bound \
for a GPU, where sums over rows and sums over columns do not fuse; but what is accessed by index \
counts whole, however little of it is.
ours: what the Triton kernels of the pass move; reductions of partial sums are in it. \
cross_entropy and distillation leave the gradient in their forward pass and have no other.
"""


def run(config: BenchKernelsConfig) -> None:
    """Compiles, prints the report and writes it to --json; status 1 if a kernel did not compile."""
    require_writable(config.json, "--json")
    report = measure(config.archs)
    print_report(report)
    write_copy(config.json, as_json(report))
    if report["failures"]:
        sys.exit(1)


def measure(archs: Sequence[int], module: str = static.KERNELS) -> dict[str, Any]:
    """The report, with dataclasses still in it.

    Raises:
        InputError: triton is missing.
    """
    static.require_triton()
    with Progress("compile", unit="kernel") as bar:
        records, failures = static.compile_triton(archs, module, bar.update)
        cuda_records, cuda_failures = static_cuda.compile_cuda(archs, bar.update)
    traffic = []
    with Progress("count", total=len(kernel_traffic.OPERATORS), unit="operator") as bar:
        for operator in kernel_traffic.OPERATORS:
            traffic += kernel_traffic.count(operator)
            bar.update()
    return {
        "versions": static.versions() | static_cuda.nvcc_version(),
        "ceilings": {f"sm_{arch}": GPUS[arch] for arch in archs},
        "records": records + cuda_records,
        "failures": failures + cuda_failures,
        "traffic": traffic,
    }


def as_json(report: dict[str, Any]) -> dict[str, Any]:
    """The report in plain values; each operator's traffic with that of its Triton kernel."""
    plain: dict[str, Any] = {"versions": report["versions"]}
    plain["ceilings"] = {name: asdict(gpu) for name, gpu in report["ceilings"].items()}
    for key in ("records", "failures"):
        plain[key] = [asdict(entry) for entry in report[key]]
    plain["traffic"] = [
        asdict(line) | {"kernel_bytes": kernel_bytes(line, report["records"])}
        for line in report["traffic"]
    ]
    return plain


def kernel_bytes(line: Traffic, records: Sequence[Record]) -> int | None:
    """What the Triton kernels for one pass of an operator move; None where there are none."""
    name = f"{line.operator}.{line.direction}"
    moved = {
        record.kernel: record.bytes_moved or 0
        for record in records
        if record.backend == "triton" and record.kernel.startswith(name)
    }
    return sum(moved.values()) or None


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Prints a table per architecture, the traffic of the operators, and what is counted."""
    # Redirected output would be cut at 80 columns.
    console = console or Console(width=None if Console().is_terminal else 150)
    console.print(", ".join(f"{name} {number}" for name, number in report["versions"].items()))
    records: list[Record] = report["records"]
    for name, gpu in report["ceilings"].items():
        console.print(
            f"\n{name}: ceilings {gpu.bytes_per_second / 1e12:.2f} TB/s, "
            f"{gpu.flops_per_second / 1e12:.0f} TFLOP/s (90% and 80% of the data sheet of "
            f"{gpu.name})"
        )
        print_table(_kernel_table([record for record in records if record.arch == name]), console)
    console.print(NOTES, markup=False)
    print_table(_traffic_table(report["traffic"], records), console)
    console.print(TRAFFIC_NOTES, markup=False)
    if shutil.which("nvcc") is None:
        console.print("nvcc is not installed: the CUDA kernels of csrc/ are left out.")
    failures: list[Failure] = report["failures"]
    for failure in failures:
        message = f"{failure.kernel} does not compile for {failure.arch}: {failure.message}"
        console.print(message, markup=False)


def _kernel_table(records: Sequence[Record]) -> Table:
    table = Table()
    table.add_column("kernel", overflow="fold")
    for heading in ("registers", "spill B", "shared B", "occupancy", "load", "store"):
        table.add_column(heading, justify="right")
    table.add_column("mma/tma")
    for heading in ("moved/min", "predicted µs"):
        table.add_column(heading, justify="right")
    for record in records:
        ratio, time = record.bytes_over_minimum, record.predicted_us
        table.add_row(
            record.kernel.replace("[", r"\["),
            str(record.registers),
            str(record.spill_bytes),
            str(record.shared_bytes),
            f"{record.occupancy:.0%} {record.limited_by}",
            _bits(record.load_bits),
            _bits(record.store_bits),
            _loops(record.tensor_core, record.loops),
            "-" if ratio is None else f"{ratio:.3f}",
            "-" if time is None else f"{time:.1f}",
        )
    return table


def _bits(width: int | None) -> str:
    return "-" if width is None else str(width)


def _loops(tensor_core: str | None, loops: Sequence[Loop]) -> str:
    busy = [f"{loop.tensor_core}/{loop.bulk_loads}" for loop in loops if _is_busy(loop)]
    return " ".join(filter(None, (tensor_core, *busy))) or "-"


def _is_busy(loop: Loop) -> bool:
    return bool(loop.tensor_core or loop.bulk_loads)


def _traffic_table(traffic: Sequence[Traffic], records: Sequence[Record]) -> Table:
    table = Table(title="MB moved by one call")
    table.add_column("operator")
    table.add_column("shape", overflow="fold")
    for heading in ("eager", "torch.compile", "ours"):
        table.add_column(heading, justify="right")
    for line in traffic:
        counts = (line.eager_bytes, line.compiled_bytes, kernel_bytes(line, records))
        table.add_row(
            f"{line.operator}.{line.direction}",
            line.shape.replace("[", r"\["),
            *("-" if count is None else f"{count / 1e6:.0f}" for count in counts),
        )
    return table
