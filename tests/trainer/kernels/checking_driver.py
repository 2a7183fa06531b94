"""A driver that looks at Triton's launches instead of making them, as on a GPU.

Triton itself compares shared memory with what the driver says there is.
"""

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from launch.bench_kernels.static.compile import GPUS
from launch.bench_kernels.static.record import Driver

LARGEST_GRID = (2**31 - 1, 65535, 65535)
TYPES = {
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*fp32": torch.float32,
    "*fp64": torch.float64,
    "*i32": torch.int32,
    "*i64": torch.int64,
}
LAUNCHES: Counter[str] = Counter()
"""By kernel, "module.function"."""


class Launcher:
    """Stands for a compiled kernel's launcher."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = f"{source.fn.module}.{source.fn.__name__}"
        self.signature: dict[str, str] = source.signature
        # There is no allocator for what a kernel wants besides its arguments.
        assert metadata.global_scratch_size == 0, self.name

    def __call__(self, *given: Any) -> None:
        """Grid, six things that are Triton's, and the kernel's arguments."""
        grid, values = given[:3], given[9:]
        for size, most in zip(grid, LARGEST_GRID, strict=True):
            assert 0 < size <= most, (self.name, grid)
        for (argument, kind), value in zip(self.signature.items(), values, strict=True):
            if kind.startswith("*"):
                fits = isinstance(value, Tensor) and value.dtype == TYPES[kind]
            elif kind.startswith("i"):
                fits = isinstance(value, int) and value.bit_length() < int(kind[1:])
            else:
                fits = kind == "constexpr" or (kind == "fp32" and isinstance(value, float))
            assert fits, (self.name, argument, kind, value)
        LAUNCHES[self.name] += 1


@dataclass(frozen=True)
class CheckingDriver(Driver):
    """What Triton asks of a GPU's driver when it launches a kernel."""

    launcher_cls = Launcher

    @property
    def utils(self) -> SimpleNamespace:
        # A block may have 1 KiB less than a multiprocessor.
        shared = GPUS[self.arch].shared_bytes - 1024
        return SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": shared},
            # Module, function, registers, spills, threads of a block.
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
            unload_module=lambda module: None,
        )
