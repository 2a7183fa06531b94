"""Takes what `make gpu-check` checks through Triton's own compiler and launcher, without a GPU; run
by test_compilation.py in a process of its own. Tensors are on the CPU.
"""

import sys

import torch
import triton

from launch.bench_kernels.gpu.cases import ROWS, arguments, cases
from tests.trainer.kernels.checking_driver import ARCHITECTURE, LAUNCHES, Driver
from trainer.kernels import attention_tiles, registry

CPU = torch.device("cpu")


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
