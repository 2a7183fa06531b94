"""Takes what `make gpu-check` checks through Triton's own compiler and launcher, without a GPU; run
by test_compilation.py in a process of its own.

Tensors are on the CPU, and a driver for sm_90 looks at each launch instead of making it. Triton
itself compares shared memory with what the driver says there is.
"""

import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from launch.gpu_cases import ROWS, arguments, cases
from trainer.kernels import attention_tiles, registry

ARCHITECTURE = 90
SHARED_BYTES = 227 << 10
LARGEST_GRID = (2**31 - 1, 65535, 65535)
CPU = torch.device("cpu")
TYPES = {
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*fp32": torch.float32,
    "*fp64": torch.float64,
    "*i32": torch.int32,
    "*i64": torch.int64,
}
LAUNCHES: Counter[str] = Counter()


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


class Driver:
    """What Triton asks a GPU's driver."""

    launcher_cls = Launcher
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES},
        # Module, function, registers, spills, threads of a block.
        load_binary=lambda *_: (1, 1, 32, 0, 1024),
        unload_module=lambda module: None,
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)


def main(largest: float) -> None:
    """Prints the kernels that were launched, and how often."""
    triton.runtime.driver.set_active(Driver())
    registry._has_triton = lambda kind: True
    attention_tiles.architecture = lambda device: ARCHITECTURE
    registry.choose("triton", CPU)
    for name, row in ROWS.items():
        for case in cases(name, largest):
            differentiable, constants = arguments(name, case, CPU)
            leaves = [None if x is None else x.requires_grad_() for x in differentiable]
            results = [x for x in row.run(case, *leaves, *constants) if x.requires_grad]
            wanted = [x for x in leaves if x is not None]
            torch.autograd.grad(results, wanted, [torch.ones_like(x) for x in results])
    for kernel, count in LAUNCHES.items():
        print(kernel, count)


if __name__ == "__main__":
    main(float(sys.argv[1]))
