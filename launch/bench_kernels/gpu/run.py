"""What `python -m launch.bench_kernels` does on a GPU: checks every operator, then times it."""

import math
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError
from data.files import require_writable, write_copy
from data.machine import available_cores
from data.progress import Progress
from launch.bench_kernels.config import BenchConfig
from launch.bench_kernels.gpu import benchmarks as gpu_benchmarks
from launch.bench_kernels.gpu import cases as gpu_cases
from launch.bench_kernels.gpu import report as gpu_report
from launch.bench_kernels.gpu.benchmarks import COMPILE, Model
from launch.bench_kernels.gpu.facts import facts, takes_several_processes
from launch.bench_kernels.gpu.jobs import Budget, Job, Result, Runner, Unit
from trainer.kernels import registry

SECONDS_PER_PASS = 0.3
CHECKS_AT_ONCE = 6
"""Checks wait for the compiler rather than for the GPU."""
_CHOICES: tuple[registry.Kernels, ...] = ("reference", "triton", "auto")


def run(config: BenchConfig) -> None:
    """Checks, measures, writes the report to --json and --csv and prints it.

    Raises:
        InputError: there is no GPU.
        SystemExit: status 1; an operator was wrong, failed, or could not be checked in time.
    """
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
    report = measure("cuda", config.budget_seconds)
    write_copy(config.json, report)
    if config.csv is not None:
        gpu_report.write_csv(Path(config.csv), report["facts"], report["timings"])
    gpu_report.print_report(report["facts"], report["checks"], report["timings"])
    if not report["passed"]:
        sys.exit(1)


def measure(
    device: str,
    budget_seconds: float,
    *,
    largest: float = math.inf,
    models: Sequence[Model] = gpu_benchmarks.MODELS,
    seconds: float = SECONDS_PER_PASS,
    operators: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The report in plain values.

    Args:
        device: what to run on.
        budget_seconds: time for all of it; what is left then is skipped.
        largest: product of the sizes of the largest case.
        models: shapes to time.
        seconds: for each timing.
        operators: names; None: all.
        options: of Runner.

    Returns:
        "passed": every operator is right and ran; "facts", "checks" (results of units), "timings"
        (lines of gpu_report).
    """
    budget = Budget(budget_seconds)

    def wanted(names: Sequence[str]) -> list[str]:
        return [name for name in names if operators is None or name in operators]

    checks = [
        job for name in wanted(list(gpu_cases.ROWS)) for job in check_jobs(name, device, largest)
    ]
    benchmarks = wanted(list(gpu_benchmarks.BENCHMARKS))
    timings = [time_job(benchmarks, device, models, seconds)] if benchmarks else []
    most = CHECKS_AT_ONCE if takes_several_processes() else 1
    at_once = max(1, min(most, available_cores() // 2))

    def work(kind: str, jobs: Sequence[Job], say: Callable[[Result], str], **how: Any) -> Any:
        with Progress(kind, total=sum(len(job.units) for job in jobs), unit=kind) as bar:
            runner = Runner(device=device, budget=budget, on_result=_shown(bar, say), **options)
            return runner.run_all(jobs, **how)

    checked = work("check", checks, _check_line, at_once=at_once)
    timed = work("timing", timings, _timing_line)
    shapes = [asdict(model) for model in models]
    timed.sort(key=lambda r: (benchmarks.index(r["operator"]), shapes.index(r["model"])))
    found = facts(torch.device(device))
    failed = [r for r in checked if r["status"] != "ok"] + [
        r for r in timed if r["status"] == "failed"
    ]
    return {
        "passed": not failed,
        "facts": found,
        "checks": checked,
        "timings": gpu_report.lines(timed, found["gpu"]),
    }


def backends(name: str, device: str) -> dict[str, registry.Kernels]:
    """What an operator can run as on a device, and the choice that makes it so.

    Computations that are no operators of the registry run as "pytorch".
    """
    found: dict[str, registry.Kernels] = {}
    for choice in _CHOICES:
        try:
            with registry.chosen(choice, device) as running:
                found.setdefault(running.get(name, "pytorch"), choice)
        except InputError:
            continue
    return found


def check_jobs(name: str, device: str, largest: float = math.inf) -> list[Job]:
    """All cases of an operator, one job for each implementation."""
    cases = [asdict(case) for case in gpu_cases.cases(name, largest)]
    return [
        Job(
            f"{name}, {backend}",
            tuple(
                {
                    "kind": "check",
                    "operator": name,
                    "backend": backend,
                    "choice": choice,
                    "case": case,
                }
                for case in cases
            ),
        )
        for backend, choice in backends(name, device).items()
    ]


def time_job(names: Sequence[str], device: str, models: Sequence[Model], seconds: float) -> Job:
    """All benchmarks, in one process: a start takes as long as several timings.

    What is left when time is up comes last: the shapes of later models, and before them
    torch.compile, whose compiler takes the longest.
    """
    sides = [{"operator": name} | side for name in names for side in _sides(name, device)]
    sides.sort(key=lambda side: side["side"] == COMPILE)
    common = {"kind": "time", "seconds": seconds}
    return Job(
        "timings",
        tuple(common | side | {"model": asdict(model)} for model in models for side in sides),
    )


def _sides(name: str, device: str) -> list[Unit]:
    """All sides of a benchmark: ours in each implementation that is not eager."""
    row = gpu_benchmarks.BENCHMARKS[name]
    sides: list[Unit] = [{"side": "eager", "choice": "auto", "comparison": True}]
    if row.ours is None:
        return sides
    ours = {b: choice for b, choice in backends(name, device).items() if b != "reference"}
    sides += [{"side": backend, "choice": choice} for backend, choice in ours.items()]
    others = (COMPILE, *row.others)
    return sides + [{"side": side, "choice": "auto", "comparison": True} for side in others]


def _shown(bar: Progress, say: Callable[[Result], str]) -> Callable[[Result], None]:
    lock = threading.Lock()

    def show(result: Result) -> None:
        with lock:
            bar.message(f"{result['status']:8} {say(result)}  {result['message']}".rstrip())
            bar.update()

    return show


def _check_line(result: Result) -> str:
    error = f"  {result['worst']:.2f} of the allowed error" if "worst" in result else ""
    return gpu_report.describe(result) + error


def _timing_line(result: Result) -> str:
    times = (f"{p['pass']} {1e6 * p['seconds']:.1f} µs" for p in result.get("passes", ()))
    return f"{result['operator']} {result['side']}, {result['model']['name']}  {', '.join(times)}"
