"""Table and CSV of what was timed on a GPU."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data.files import write_text
from data.tables import print_table
from launch.bench_kernels.static.compile import GPUS, Gpu

NOTES = """\
GPU time of one call in bf16, launches hidden behind queued work: medians.
GB/s: inputs and outputs once each, the least there is to move, over the time; TFLOP/s: operations \
of the matrix products. copy: the same of a copy in memory, on this GPU, in this run.
Others apply no mask. A side that computes something else, or fails, is not compared. Liger's \
SwiGLU writes its gradients over its arguments, which then are not those of the other sides.
"""
Result = dict[str, Any]
"""One timing: "operator", "side", "model", "status" (ok, failed, not comparable, skipped),
"message", and what timing.measure found."""
Line = dict[str, Any]
"""One pass of a result."""
SLOWER = {"PCIE", "NVL", "MIG", "40GB"}
"""In the names of cards that share an architecture with one that is listed, not its data sheet."""


def ceiling_of(gpu: str) -> Gpu | None:
    """What the data sheet lets expect of a card, by its name; None for one that is not listed."""
    words = gpu.replace("-", " ").split()
    if SLOWER & {word.upper() for word in words}:
        return None
    return next((known for known in GPUS.values() if known.name.split()[0] in words), None)


def lines(timings: Sequence[Result], gpu: str) -> list[Line]:
    """One line for each pass of each side, with rates and ratios; None where there is none."""
    ceiling, found = ceiling_of(gpu), []
    for result in timings:
        for measured in result.get("passes", ({"pass": "all"},)):
            line = _line(result, measured)
            if "seconds" in measured:
                line |= _rates(line, measured, result["unit"], ceiling)
            found.append(line)
    seconds = {_key(line): line["microseconds"] for line in found if line["side"] == "eager"}
    copies = [line["rate"] for line in found if line["operator"] == "copy" and line["rate"]]
    for line in found:
        eager = seconds.get(_key(line))
        if line["microseconds"] and eager:
            line["eager_over_it"] = eager / line["microseconds"]
        if line["unit"] == "GB/s" and copies:
            line["of_copy"] = line["rate"] / max(copies)
    return found


def _line(result: Result, measured: dict[str, Any]) -> Line:
    numbers = ("microseconds", "rate", "unit", "of_ceiling", "of_copy", "eager_over_it", "repeats")
    return {
        "operator": result["operator"],
        "model": result["model"]["name"],
        "pass": measured["pass"],
        "side": result["side"],
        "status": result["status"],
        **dict.fromkeys(numbers),
        "message": result["message"],
    }


def _rates(line: Line, measured: dict[str, Any], unit: str, ceiling: Gpu | None) -> Line:
    rate = measured["work"] / measured["seconds"]
    moves = unit == "bytes"
    found = {
        "microseconds": 1e6 * measured["seconds"],
        "rate": rate / (1e9 if moves else 1e12),
        "unit": "GB/s" if moves else "TFLOP/s",
        "repeats": measured["repeats"],
    }
    if ceiling is not None:
        most = ceiling.bytes_per_second if moves else ceiling.flops_per_second
        found["of_ceiling"] = rate / most
    return found


def _key(line: Line) -> tuple[str, str, str]:
    return line["operator"], line["model"], line["pass"]


def write_csv(path: Path, facts: dict[str, str], timings: Sequence[Line]) -> None:
    """One row for each line; what it was measured on stands in every row."""
    rows = [line | facts for line in timings]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]) if rows else list(facts))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def print_report(
    facts: dict[str, str],
    timings: Sequence[Line],
    console: Console | None = None,
) -> None:
    """Prints what it was measured on, the timings, and what went wrong."""
    # Redirected output would be cut at 80 columns.
    console = console or Console(width=None if Console().is_terminal else 150)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), markup=False)
    ceiling = ceiling_of(facts["gpu"])
    if ceiling is not None:
        console.print(
            f"ceiling: {ceiling.bytes_per_second / 1e12:.2f} TB/s, "
            f"{ceiling.flops_per_second / 1e12:.0f} TFLOP/s (90% and 80% of the data sheet of "
            f"{ceiling.name})"
        )
    print_table(_timing_table(timings), console)
    console.print(NOTES, markup=False)
    for line in dict.fromkeys(_complaints(timings)):
        console.print(line, markup=False)


def _complaints(timings: Iterable[Line]) -> Iterable[str]:
    for line in timings:
        if line["status"] != "ok":
            # A package that is not installed would be named for every operator and model.
            whole = line["message"].startswith("ModuleNotFoundError")
            where = line["side"] if whole else f"{line['operator']} {line['side']}, {line['model']}"
            yield f"{line['status']}: {where}: {line['message']}"


def _timing_table(timings: Sequence[Line]) -> Table:
    table = Table()
    for heading in ("operator", "model", "pass", "side"):
        table.add_column(heading)
    for heading in ("µs", "rate", "of ceiling", "of copy", "× eager"):
        table.add_column(heading, justify="right")
    for line in timings:
        if line["status"] == "ok":
            names = (line[key] for key in ("operator", "model", "pass", "side"))
            ratios = (_percent(line[key]) for key in ("of_ceiling", "of_copy"))
            faster = line["eager_over_it"]
            table.add_row(
                *names,
                f"{line['microseconds']:.1f}",
                f"{line['rate']:.0f} {line['unit']}",
                *ratios,
                "-" if faster is None else f"{faster:.2f}",
            )
    return table


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.0%}"
