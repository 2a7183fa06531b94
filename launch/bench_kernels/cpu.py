"""What `python -m launch.bench_kernels --cpu` measures: operators that pay without a GPU too.

Both sides of each ratio run in turns in one process that keeps freed memory, as one that trains
does; ratios of time are medians over neighbouring pairs. Peak memory is measured by memory.py.
"""

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data.errors import InputError
from data.files import require_writable, write_copy
from data.tables import print_table
from launch.bench_kernels.config import BenchKernelsConfig
from launch.bench_kernels.documents import measure_documents, print_documents
from launch.bench_kernels.losses import LOSSES, Loss, loss_inputs
from launch.bench_kernels.memory import peak_bytes, require_memory
from launch.bench_kernels.turns import alternate, median_ratio
from trainer.kernels import registry
from trainer.kernels.gather_scale import gather_scale
from trainer.parallel import keep_freed_memory

GOALS = {
    "linear_ce_memory_ratio": "goal: at most 0.15",
    "linear_ce_time_ratio": "goal: at most 1.1",
    "gather_scale_speedup": "goal: at least 3",
    "gather_scale_speedup_small": "no goal",
    "documents_time_ratio": "goal: at most 1.05",
}


class Weight(NamedTuple):
    """A weight [out, in], of which gather-scale keeps half of the rows and columns."""

    name: str
    out: int
    width: int
    run: int = 1
    """Rows that are kept or dropped together, as those of a head are."""


LAYERS = {
    "LLaMA 7B": (
        Weight("attention", 4096, 4096, 128),
        Weight("up", 11008, 4096),
        Weight("down", 4096, 11008),
    ),
    "Sheared LLaMA 1.3B": (
        Weight("attention", 2048, 2048, 128),
        Weight("up", 5504, 2048),
        Weight("down", 2048, 5504),
    ),
    "SmolLM2 135M": (
        Weight("attention", 576, 576, 64),
        Weight("up", 1536, 576),
        Weight("down", 576, 1536),
    ),
}
"""Matrices of a layer (arXiv 2307.09288, 2310.06694, 2502.02737)."""

SHOWS = 1 << 26
"""Bytes that surely show in the memory of a process."""
SMALL = "SmolLM2 135M"
"""Its weights take about a millisecond or less: what is measured there decides about no goal."""


def run(config: BenchKernelsConfig) -> None:
    """Measures, prints the result and writes it to --json."""
    require_writable(config.json, "--json")
    result = measure(config)
    print_result(result)
    write_copy(config.json, result)


def measure(config: BenchKernelsConfig) -> dict[str, Any]:
    """All ratios, what they follow from and what they were measured on.

    `linear_ce_memory_ratio` and `linear_ce_time_ratio` are the largest over the vocabularies,
    `gather_scale_speedup` is the smallest over the layers but SMALL, and
    `gather_scale_speedup_small` that of SMALL. `documents_time_ratio` is that of documents which
    fill their samples, so that keeping them apart saves nothing.

    Raises:
        InputError: there is not enough memory for the full logits.
    """
    require_memory(config.tokens, max(config.vocabularies), config.hidden)
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    losses = [measure_loss(config, vocabulary) for vocabulary in config.vocabularies]
    layers = [measure_layer(config, layer) for layer in LAYERS]
    documents = measure_documents(config)
    speedups = {layer["layer"]: layer["speedup"] for layer in layers}
    small = speedups.pop(SMALL)
    return {
        "linear_ce_memory_ratio": max(loss["memory_ratio"] for loss in losses),
        "linear_ce_time_ratio": max(loss["time_ratio"] for loss in losses),
        "gather_scale_speedup": min(speedups.values()),
        "gather_scale_speedup_small": small,
        "documents_time_ratio": documents[0]["time_ratio"],
        "linear_ce": losses,
        "gather_scale": layers,
        "documents": documents,
        "gather_scale_backend": registry.which("gather_scale", "cpu"),
        "hidden": config.hidden,
        "tokens": config.tokens,
        "repeats": config.repeats,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def measure_loss(config: BenchKernelsConfig, vocabulary: int) -> dict[str, Any]:
    """Peak memory and time of both losses at one vocabulary, fp32."""
    sizes = {
        "vocabulary": vocabulary,
        "tokens": config.tokens,
        "hidden": config.hidden,
        "threads": config.threads,
    }
    peaks = {kind: peak_bytes(kind, **sizes) for kind in LOSSES}
    logits = 4 * config.tokens * vocabulary
    if peaks["full"] < logits:
        raise InputError(
            f"the {logits:,} bytes of logits of --tokens {config.tokens} and --vocabularies "
            f"{vocabulary} do not show in the memory of a process; use more, such as --tokens "
            f"{-(-SHOWS // (4 * vocabulary))}"
        )
    inputs = loss_inputs(vocabulary, config.tokens, config.hidden)

    def timed(loss: Loss) -> Callable[[], float]:
        def call() -> float:
            inputs[0].grad = inputs[1].grad = None
            start = time.perf_counter()
            loss(*inputs)
            return time.perf_counter() - start

        return call

    calls = {kind: timed(loss) for kind, loss in LOSSES.items()}
    seconds = alternate(f"loss, {vocabulary} ids", calls, config)
    return {
        "vocabulary": vocabulary,
        "memory_ratio": peaks["fused"] / peaks["full"],
        "time_ratio": median_ratio(seconds["fused"], seconds["full"]),
        "peak_bytes": peaks,
        "seconds": {kind: statistics.median(times) for kind, times in seconds.items()},
    }


def measure_layer(config: BenchKernelsConfig, layer: str) -> dict[str, Any]:
    """Gather-scale of a layer's weights, forward and backward, gradients of masks included; fp32.

    The layer's speedup is that of its weights together.
    """
    totals = {"operator": [0.0] * config.repeats, "indexing": [0.0] * config.repeats}
    weights = []
    for weight in LAYERS[layer]:
        cases = {
            "operator": _gather_scale_call(weight, gather_scale),
            "indexing": _gather_scale_call(weight, index_and_multiply),
        }
        seconds = alternate(f"{layer}, {weight.name}", cases, config)
        for kind, times in seconds.items():
            totals[kind] = [a + b for a, b in zip(totals[kind], times, strict=True)]
        weights.append(
            {
                "weight": weight.name,
                "shape": [weight.out, weight.width],
                "speedup": median_ratio(seconds["indexing"], seconds["operator"]),
                "seconds": {kind: statistics.median(times) for kind, times in seconds.items()},
            }
        )
    speedup = median_ratio(totals["indexing"], totals["operator"])
    return {"layer": layer, "speedup": speedup, "weights": weights}


def index_and_multiply(
    weight: Tensor, rows: Tensor, row_scale: Tensor, columns: Tensor, column_scale: Tensor
) -> Tensor:
    """gather_scale as PyTorch operations with PyTorch's own gradients."""
    selected = weight.index_select(0, rows).index_select(1, columns)
    selected = selected * row_scale.index_select(0, rows).unsqueeze(1)
    return selected * column_scale.index_select(0, columns)


def _gather_scale_call(weight: Weight, function: Callable[..., Tensor]) -> Callable[[], float]:
    """A measurement of one forward and backward pass, in seconds."""
    generator = torch.Generator().manual_seed(0)

    def kept(size: int, run: int) -> Tensor:
        groups = torch.randperm(size // run, generator=generator)[: size // run // 2]
        return (groups.sort()[0][:, None] * run + torch.arange(run)).flatten()

    values = torch.randn(weight.out, weight.width, generator=generator).requires_grad_()
    rows, columns = kept(weight.out, weight.run), kept(weight.width, 1)
    scales = [torch.rand(size, generator=generator).requires_grad_() for size in values.shape]
    gradient = torch.randn(len(rows), len(columns), generator=generator)

    def call() -> float:
        start = time.perf_counter()
        result = function(values, rows, scales[0], columns, scales[1])
        torch.autograd.grad(result, (values, *scales), gradient)
        return time.perf_counter() - start

    return call


def print_result(result: dict[str, Any]) -> None:
    """Prints what was measured, and the ratios beside their goals."""
    console = Console()
    table = Table(
        title=f"linear cross-entropy of {result['tokens']} tokens, forward + backward, fp32, "
        f"width {result['hidden']}"
    )
    for heading in ("vocabulary", "MB full", "MB fused", "ratio", "s full", "s fused", "ratio"):
        table.add_column(heading, justify="right")
    for loss in result["linear_ce"]:
        peaks, seconds = loss["peak_bytes"], loss["seconds"]
        table.add_row(
            f"{loss['vocabulary']:,}",
            *(f"{peaks[kind] / 1e6:.0f}" for kind in LOSSES),
            f"{loss['memory_ratio']:.3f}",
            *(f"{seconds[kind]:.2f}" for kind in LOSSES),
            f"{loss['time_ratio']:.3f}",
        )
    print_table(table, console)
    title = f"gather-scale ({result['gather_scale_backend']}), forward + backward, fp32"
    table = Table(title=title)
    for heading in ("layer", "weight"):
        table.add_column(heading)
    for heading in ("indexing, ms", "operator, ms", "faster"):
        table.add_column(heading, justify="right")
    for layer in result["gather_scale"]:
        for weight in layer["weights"]:
            shape = " x ".join(map(str, weight["shape"]))
            table.add_row(
                layer["layer"],
                f"{weight['weight']} {shape}",
                *(f"{1e3 * weight['seconds'][kind]:.2f}" for kind in ("indexing", "operator")),
                f"{weight['speedup']:.2f}",
            )
        table.add_row(layer["layer"], "all", "", "", f"{layer['speedup']:.2f}", end_section=True)
    print_table(table, console)
    print_documents(result["documents"], console)
    for name, goal in GOALS.items():
        console.print(f"{name:28}{result[name]:.3f}   ({goal})")
