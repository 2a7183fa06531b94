"""The compiled operators of csrc/, where they were built."""

from contextlib import suppress
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
NAMES = ("gather_scale_compiled", "gather_scale_backward_compiled")
"""The operators that a library implements."""

_loaded: set[str] = set()


def load() -> None:
    """Loads the libraries that were built for this PyTorch; without them the references run."""
    for device in ("cpu", "cuda"):
        path = FOLDER / f"_shorn_{device}.so"
        if path.exists() and (device == "cpu" or torch.version.cuda is not None):
            # One built for another machine or PyTorch, or from older sources, is as good as none.
            with suppress(OSError, RuntimeError):
                torch.ops.load_library(path)
                if all(_implements(name, device) for name in NAMES):
                    _loaded.add(device)


def _implements(name: str, device: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"shorn::{name}", key)


def is_loaded(kind: str) -> bool:
    """Whether the library for a type of device ("cpu", "cuda") was built and could be loaded."""
    return kind in _loaded
