"""Which implementation of the operators a test runs, and on which device.

On a CPU: the reference, the operator around it, and compiled code. `pytest -m gpu` runs the same
tests on a GPU. Triton's interpreter must be chosen before Triton is imported, and any test may have
done that: what runs in it runs in a process of its own (test_triton.py), with TRITON_INTERPRET=1.
"""

import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from trainer.kernels import library, registry
from trainer.kernels.launching import Tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu"
"""What tests of operators compute on; conftest.py makes it "cuda" for `pytest -m gpu`."""

# Tiles so small that small tensors need several programs, and programs several steps.
TILES: dict[str, dict[str, object]] = {
    "attention": {"_TILES": {80: (Tile(32, 16, 4, 1), Tile(16, 16, 4, 1))}},
    "attention_backward": {
        "_QUERY_TILES": {80: (Tile(16, 32, 4, 1), Tile(16, 16, 4, 1))},
        "_KEY_TILES": {80: (Tile(16, 32, 4, 1), Tile(16, 16, 4, 1, together=False))},
    },
    "cross_entropy": {"_ROW": 64, "_WALK": 32},
    "gather_scale": {
        "_FORWARD_COLUMNS": 128,
        "_BACKWARD_ROWS": 8,
        "_BACKWARD_COLUMNS": 64,
        "_PROGRAMS": 3,
    },
    "rms_norm": {"_FORWARD_STEPS": 2, "_PROGRAMS": 3},
    "rope": {"_TILE": 256},
    "swiglu": {"_FORWARD_TILE": 2048, "_BACKWARD_TILE": 512, "_COLUMNS": 128},
}


Sizes = tuple[int, ...]


def large(*sizes: Sizes) -> tuple[Sizes, ...]:
    """Sizes of real models, which fill a GPU's own tiles: none on a CPU, which takes too long."""
    return sizes if DEVICE == "cuda" else ()


def on_gpu(operator: str) -> tuple[str, ...]:
    """The implementations of an operator that a GPU has, of the arguments of `running`."""
    others = [known.name for known in registry.operators() if known.compiled or known.fused]
    # All operators run in a model, and are tried before a run.
    several = operator in (*others, "model", "trial")
    return ("reference", "triton", "cuda") if several else ("reference", "triton")


def is_missing(operator: str, backend: str) -> bool:
    """Whether a backend of an operator needs a library of csrc/ that was not built."""
    compiled = backend == "compiled" or (backend == "cuda" and operator == "gather_scale")
    return compiled and not library.is_loaded(torch.device(DEVICE).type)


@contextmanager
def running(backend: str) -> Iterator[None]:
    """Operators run as "reference" (PyTorch operations), "operator" (an opaque operator, also where
    it would not pay), "triton", or "compiled" and "cuda" (what a run takes by itself, on a CPU and
    on a GPU); memory that PyTorch hands out is filled with NaN."""
    choices: dict[str, registry.Kernels] = {"reference": "reference", "triton": "triton"}
    reference = backend == "reference"
    deterministic = torch.are_deterministic_algorithms_enabled()
    # This is what fills memory. On a GPU it would also forbid what training runs.
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    assert bool(torch.empty(64, device=DEVICE).isnan().all())
    try:
        choice = choices.get(backend, "auto")
        with (
            registry.chosen(choice, DEVICE),
            patch.object(registry, "runs_reference", lambda *_: reference),
        ):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def on_device() -> Iterator[None]:
    """Tensors are made on DEVICE, random ones with the numbers that a CPU draws: what a test allows
    was found for these."""
    names = ("rand", "randn", "randint", "randperm")
    draws: dict[str, Any] = {name: _drawn_on_cpu(getattr(torch, name)) for name in names}
    with torch.device(DEVICE), patch.multiple(torch, **draws):
        yield


def _drawn_on_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def draw(*sizes: object, requires_grad: bool = False, **options: object) -> Tensor:
        if "device" not in options:
            return (
                function(*sizes, device="cpu", **options).to(DEVICE).requires_grad_(requires_grad)
            )
        return function(*sizes, requires_grad=requires_grad, **options)

    return draw


def has_gpu() -> bool:
    """Whether there is one to run on."""
    return torch.cuda.is_available()


def can_be_shared() -> bool:
    """Whether several processes may use the GPU at a time, as far as its driver tells."""
    command = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return True
    return "Exclusive" not in told


def synchronize() -> None:
    """Waits for the GPU; raises RuntimeError for what a kernel has done wrong."""
    if DEVICE != "cpu":
        torch.cuda.synchronize()
