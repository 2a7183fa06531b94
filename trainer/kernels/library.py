"""The compiled operators of csrc/, where they were built, and which implementation runs."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch

Backend = Literal["reference", "c++", "cuda"]

FOLDER = Path(__file__).resolve().parent

_loaded: set[str] = set()
_reference_only = False


def load() -> None:
    """Loads the libraries that were built for this PyTorch; without them the references run."""
    for device in ("cpu", "cuda"):
        path = FOLDER / f"_shorn_{device}.so"
        if path.exists() and (device == "cpu" or torch.version.cuda is not None):
            # A library built for another machine or a newer PyTorch is as good as none.
            with suppress(OSError, RuntimeError):
                torch.ops.load_library(path)
                _loaded.add(device)


def is_loaded(kind: str) -> bool:
    """Whether the library for a type of device ("cpu", "cuda") was built and could be loaded."""
    return kind in _loaded


def which(device: torch.device | str = "cpu") -> Backend:
    """What computes the operators on `device`: PyTorch itself, or a compiled library."""
    kind = torch.device(device).type
    if _reference_only or kind not in _loaded:
        return "reference"
    return "c++" if kind == "cpu" else "cuda"


def reference_is_forced() -> bool:
    """Whether this is inside `reference_only`."""
    return _reference_only


@contextmanager
def reference_only() -> Iterator[None]:
    """Within it, operators run as PyTorch operations also where they were compiled."""
    global _reference_only
    before, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = before
