"""Time of one side of one benchmark.

On a GPU: CUDA events, medians. Before each timed call other work is queued, long enough that the
call's kernels are all launched before the first of them starts: what is measured is the GPU's time,
not Python's. That work also replaces what the L2 cache holds, by reading: data that still has to be
written back would cost time inside the timed call. Calls take turns among several sets of
arguments.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from launch.bench_kernels.gpu.benchmarks import (
    BENCHMARKS,
    BOTH,
    FORWARD,
    Function,
    Model,
    Tensors,
    function_of,
)
from trainer.kernels import registry

WARM_UP = 3
LEAST_REPEATS = 5
MOST_REPEATS = 100
FILLER_BYTES = 2**30
MOST_FILLS = 16
FIRST_FILLS = 200
"""Before anything is timed: a tenth of a second, in which an idle GPU's clocks rise."""
LARGEST_DIFFERENCE = 0.05
"""Between two sides' results, over the largest: bf16 rounds at different places."""


class DifferentResultError(Exception):
    """A side computes something else, so that its time says nothing."""


class Timer(Protocol):
    """Times calls on one kind of device."""

    def times(self, call: Callable[[int], object], repeats: int) -> list[float]:
        """Seconds of call(0), call(1), ..."""


class CpuTimer:
    """Wall time of calls that compute before they return."""

    def times(self, call: Callable[[int], object], repeats: int) -> list[float]:
        found = []
        for index in range(repeats):
            start = time.perf_counter()
            call(index)
            found.append(time.perf_counter() - start)
        return found


class CudaTimer:
    """Time between CUDA events, behind enough queued work to hide the launches."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._filler = torch.zeros(FILLER_BYTES // 4, device=device)
        self._fill_seconds = min(self._between(lambda index: self._filler.sum(), FIRST_FILLS, 0))

    def times(self, call: Callable[[int], object], repeats: int) -> list[float]:
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call(0)
        launching = time.perf_counter() - start
        return self._between(call, repeats, 1 + math.ceil(2 * launching / self._fill_seconds))

    def _between(self, call: Callable[[int], object], repeats: int, fills: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in "se"] for _ in range(repeats)]
        for index, (start, end) in enumerate(pairs):
            for _ in range(min(fills, MOST_FILLS)):
                self._filler.sum()
            start.record()
            call(index)
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def measure(unit: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Times a side in each of its passes.

    Args:
        unit: operator, side, choice (of the registry), model, and seconds to measure for.

    Returns:
        {"passes": [{"pass", "seconds" (median), "fastest", "slowest", "repeats", "work"}, ...],
        "unit": of the work, "sets": how many sets of arguments took turns}.

    Raises:
        DifferentResultError: the side's results are not those of eager.
    """
    name, model = unit["operator"], Model(**unit["model"])
    row, function = BENCHMARKS[name], function_of(name, unit["side"])
    timer: Timer = CudaTimer(device) if device.type == "cuda" else CpuTimer()
    torch.manual_seed(0)
    with registry.chosen(unit["choice"], device):
        sets = [row.inputs(model, device)]
        _require_same(function, row.eager, sets[0])
        sets += [row.inputs(model, device) for _ in range(_sets(sets[0], device) - 1)]
        calls = _calls(function, sets)
        passes = [
            {"pass": kind, "work": work, **_summary(timer, calls[kind], unit["seconds"])}
            for kind, work in row.work(model).items()
        ]
    return {"passes": passes, "unit": row.unit, "sets": len(sets)}


def _summary(timer: Timer, call: Callable[[int], object], seconds: float) -> dict[str, Any]:
    about = min(timer.times(call, WARM_UP))
    repeats = max(LEAST_REPEATS, min(MOST_REPEATS, int(seconds / max(about, 1e-9))))
    found = timer.times(call, repeats)
    extremes = {"fastest": min(found), "slowest": max(found)}
    return {"seconds": statistics.median(found), **extremes, "repeats": repeats}


def _calls(function: Function, sets: Sequence[Tensors]) -> dict[str, Callable[[int], object]]:
    """By pass: a call with the index-th set of arguments, starting over after the last."""
    gradients = [[_gradient(x) for x in _results(function(*inputs))] for inputs in sets]

    def forward(index: int) -> object:
        return function(*sets[index % len(sets)])

    def both(index: int) -> object:
        inputs = sets[index % len(sets)]
        wanted = [x for x in inputs if x.requires_grad]
        # A package without masks gives them no gradient.
        return torch.autograd.grad(
            _results(function(*inputs)), wanted, gradients[index % len(sets)], allow_unused=True
        )

    return {FORWARD: forward, BOTH: both}


def _gradient(result: Tensor) -> Tensor:
    """Random; 1 for a loss, as training has it: some packages skip work then."""
    return torch.randn_like(result) if result.dim() else torch.ones_like(result)


def _results(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _require_same(function: Function, eager: Function, inputs: Tensors) -> None:
    """Both on copies: some packages work in place."""
    found, expected = (
        _results(side(*(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)))
        for side in (function, eager)
    )
    for index, (result, wanted) in enumerate(zip(found, expected, strict=True)):
        if result.shape != wanted.shape:
            raise DifferentResultError(f"result {index} has shape {list(result.shape)}")
        difference = float((result.detach().float() - wanted.detach().float()).abs().max())
        largest = float(wanted.detach().float().abs().max())
        if not difference <= LARGEST_DIFFERENCE * largest:
            raise DifferentResultError(
                f"result {index} is off by {difference:.3g} where the largest is {largest:.3g}"
            )


def _sets(inputs: Tensors, device: torch.device) -> int:
    size = sum(x.numel() * x.element_size() for x in inputs)
    if device.type != "cuda":
        return rotations(size, 0, size)
    # Memory that earlier timings left to PyTorch is free too.
    torch.cuda.empty_cache()
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return rotations(size, cache, torch.cuda.mem_get_info(device)[0])


def rotations(set_bytes: int, cache_bytes: int, free_bytes: int) -> int:
    """How many sets of arguments take turns: together twice the cache, at least two, and no more
    than a quarter of the free memory beyond these."""
    needed = math.ceil(2 * cache_bytes / set_bytes)
    return max(2, min(needed, free_bytes // 4 // set_bytes))
