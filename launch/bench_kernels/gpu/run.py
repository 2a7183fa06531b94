"""What `python -m launch.bench_kernels` does on a GPU: times every operator beside others."""

import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError
from data.files import require_distinct, require_writable, write_copy
from data.log import logger
from data.progress import Progress
from launch.bench_kernels.config import BenchKernelsConfig
from launch.bench_kernels.gpu import report as gpu_report
from launch.bench_kernels.gpu import timing
from launch.bench_kernels.gpu.benchmarks import BENCHMARKS, COMPILE, MODELS, Model
from launch.bench_kernels.gpu.facts import facts
from launch.bench_kernels.gpu.report import Result
from trainer.kernels import library, registry

SECONDS_PER_PASS = 0.3
MESSAGE_CHARACTERS = 600
OUT_OF_TIME = "the time budget is spent"

Side = dict[str, Any]
"""Plain values that name one timing; "comparison": the code is that of others and may fail."""


def run(config: BenchKernelsConfig) -> None:
    """Measures, writes the report to --json and --csv and prints it.

    Raises:
        InputError: there is no GPU.
        SystemExit: status 1; an operator failed.
    """
    require_distinct({"--json": config.json, "--csv": config.csv})
    require_writable(config.json, "--json")
    require_writable(config.csv, "--csv")
    if not torch.cuda.is_available():
        made_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
        raise InputError(
            f"PyTorch {torch.__version__}, made for {made_for}, sees no GPU, and there is nothing "
            "to time without one. If nvidia-smi shows one, its driver is older than that CUDA: "
            "install a PyTorch made for an older one. --static reports what the compiler makes of "
            "the kernels, --cpu times what runs on a CPU"
        )
    # Kernels on a GPU are never interpreted; Triton reads this when it is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    registry.operators()
    if not library.is_loaded("cuda"):
        why = library.problem("cuda") or "csrc/ is not built"
        logger.warning(f"{why}: the CUDA operators are not timed. Build them: {library.BUILD}")
    report = measure("cuda", config.budget_seconds)
    write_copy(config.json, report)
    if config.csv is not None:
        gpu_report.write_csv(Path(config.csv), report["facts"], report["timings"])
    gpu_report.print_report(report["facts"], report["timings"])
    sys.stdout.flush()
    if not is_usable(torch.device("cuda")):
        # What a broken device keeps from ending is ended.
        os._exit(1)
    if not report["passed"]:
        sys.exit(1)


def measure(
    device: str,
    budget_seconds: float,
    *,
    models: Sequence[Model] = MODELS,
    seconds: float = SECONDS_PER_PASS,
    operators: Iterable[str] = BENCHMARKS,
) -> dict[str, Any]:
    """The report in plain values.

    Args:
        device: what to run on.
        budget_seconds: time for all of it; what is left then is skipped.
        models: shapes to time.
        seconds: for each timing.
        operators: names in BENCHMARKS.

    Returns:
        "passed": every operator ran; "facts", "timings" (lines of report.py).
    """
    names = list(operators)
    # Before a kernel can take the device down.
    found = facts(torch.device(device))
    timed, lost = time_all(plan(names, device, models, seconds), device, budget_seconds)
    shapes = [asdict(model) for model in models]
    timed.sort(key=lambda r: (names.index(r["operator"]), shapes.index(r["model"])))
    return {
        "passed": not lost and all(result["status"] != "failed" for result in timed),
        "facts": found,
        "timings": gpu_report.lines(timed, found["gpu"]),
    }


def time_all(sides: Sequence[Side], device: str, budget_seconds: float) -> tuple[list[Result], str]:
    """One result for each side, and why the last ones were not run, if that is not for the time.

    A side that raises has that as its result. After an illegal access, say, no later call would
    work: nothing more is run, and neither is it after Ctrl-C.
    """
    end, lost = time.monotonic() + budget_seconds, ""
    results: list[Result] = []
    with Progress("timing", total=len(sides), unit="timing") as bar:
        for side in sides:
            result = side | {"status": "skipped", "message": OUT_OF_TIME}
            if not lost and time.monotonic() < end:
                try:
                    result = time_one(side, torch.device(device))
                    if not is_usable(torch.device(device)):
                        lost = f"the device answers no more after {_name(side)}"
                except KeyboardInterrupt:
                    lost = "interrupted"
            if lost and result["status"] == "skipped":
                result["message"] = f"not run: {lost}"
            results.append(result)
            bar.message(f"{result['status']:8} {_line(result)}  {result['message']}".rstrip())
            bar.update()
    return results, lost


def time_one(side: Side, device: torch.device) -> Result:
    """The side with "status" (ok, failed, not comparable), "message", and what it took."""
    try:
        found = timing.measure(side, device)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        status = "not comparable" if side.get("comparison") else "failed"
        return side | {"status": status, "message": text[:MESSAGE_CHARACTERS]}
    return side | {"status": "ok", "message": ""} | found


def is_usable(device: torch.device) -> bool:
    """Whether the device still answers; after an illegal access it does not."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def plan(names: Sequence[str], device: str, models: Sequence[Model], seconds: float) -> list[Side]:
    """All sides of all benchmarks in the order of their worth, for the time may not last: first
    models come first, and of each torch.compile last, whose compiler takes the longest."""
    sides = [{"operator": name} | side for name in names for side in _sides(name, device)]
    sides.sort(key=lambda side: side["side"] == COMPILE)
    return [
        side | {"model": asdict(model), "seconds": seconds} for model in models for side in sides
    ]


def backends(name: str, device: str) -> dict[str, registry.Kernels]:
    """What an operator can run as on a device, and the choice that makes it so.

    Computations that are no operators of the registry run as "pytorch".
    """
    found: dict[str, registry.Kernels] = {}
    choices: tuple[registry.Kernels, ...] = ("reference", "triton", "auto")
    for choice in choices:
        try:
            with registry.chosen(choice, device) as running:
                found.setdefault(running.get(name, "pytorch"), choice)
        except InputError:
            continue
    return found


def _sides(name: str, device: str) -> list[Side]:
    """All sides of a benchmark: ours in each implementation that is not eager."""
    row = BENCHMARKS[name]
    sides: list[Side] = [{"side": "eager", "choice": "auto", "comparison": True}]
    if row.ours is None:
        return sides
    ours = {b: choice for b, choice in backends(name, device).items() if b != "reference"}
    sides += [{"side": backend, "choice": choice} for backend, choice in ours.items()]
    others = (COMPILE, *row.others)
    return sides + [{"side": side, "choice": "auto", "comparison": True} for side in others]


def _name(side: Side) -> str:
    return f"{side['operator']} {side['side']}, {side['model']['name']}"


def _line(result: Result) -> str:
    times = (f"{p['pass']} {1e6 * p['seconds']:.1f} µs" for p in result.get("passes", ()))
    return f"{_name(result)}  {', '.join(times)}".rstrip()
