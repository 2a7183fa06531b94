"""Measurements in turns, and their ratios."""

import statistics
from collections.abc import Callable

from data.progress import Progress
from launch.bench_kernels.config import BenchKernelsConfig


def alternate(
    name: str, calls: dict[str, Callable[[], float]], config: BenchKernelsConfig
) -> dict[str, list[float]]:
    """Seconds of each call, one of each in turn; the first round is not counted."""
    seconds: dict[str, list[float]] = {kind: [] for kind in calls}
    with Progress(name, total=(config.repeats + 1) * len(calls), unit="run") as bar:
        for round_number in range(config.repeats + 1):
            for kind, call in calls.items():
                taken = call()
                if round_number:
                    seconds[kind].append(taken)
                bar.update()
    return seconds


def median_ratio(over: list[float], under: list[float]) -> float:
    """The median of ratios of neighbours in time: the machine's own speed drifts."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
