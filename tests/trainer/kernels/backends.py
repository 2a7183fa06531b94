"""Which implementation of the operators a test runs.

Triton's interpreter must be chosen before Triton is imported, and any test may have done that: what
runs in it runs in processes of its own (test_triton.py), which set TRITON_INTERPRET=1.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from trainer.kernels import registry
from trainer.kernels.launching import Tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

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


@contextmanager
def running(backend: str) -> Iterator[None]:
    """Operators run as "reference" (PyTorch operations), "operator" (one opaque operator) or
    "triton"; memory that PyTorch hands out is filled with NaN."""
    choices: dict[str, registry.Choice] = {"reference": "reference", "triton": "triton"}
    reference = backend == "reference"
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(64).isnan().all())
    try:
        choice = choices.get(backend, "auto")
        with (
            registry.chosen(choice, "cpu"),
            patch.object(registry, "runs_reference", lambda *_: reference),
        ):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
