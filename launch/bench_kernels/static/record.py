"""What a launch asks Triton for, and what Triton compiles of it for a GPU that need not be there.

It asks Triton, and needs one that compiles: TRITON_INTERPRET must not be set.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from launch.bench_kernels.static.kernels import Launch
from trainer.kernels import attention_tiles


@dataclass(frozen=True)
class Driver:
    """What Triton asks of a GPU's driver before it compiles; `arch` is 90 for sm_90."""

    arch: int

    def get_current_device(self) -> int:
        # Triton remembers the target of a device.
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def record(launch: Launch, arch: int) -> tuple[Any, dict[str, Any]]:
    """The @triton.jit function that a launch runs on an architecture, and its arguments and options
    by name; nothing is compiled."""
    found: list[tuple[Any, dict[str, Any]]] = []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        if self.__name__ == launch.kernel:
            found.append((self, dict(zip(self.arg_names, arguments, strict=False)) | named))

    with (
        patch.object(JITFunction, "run", run),
        patch.object(attention_tiles, "architecture", lambda device: arch),
    ):
        launch.call()
    (recorded,) = found
    return recorded


def traffic(arguments: dict[str, Any]) -> dict[str, int]:
    """Bytes of device memory that a launch moves, and the least its operator can.

    Each tensor counts once, though programs read masks, gains, tables and the keys of attention
    again: an L2 cache serves that. Logits, in place of which their gradient is left, count twice,
    and so do partial sums, which a reduction reads; an operator at best moves only what they add
    up to. Scalars do not count.
    """
    tensors = {
        id(t): (name, t) for name, t in arguments.items() if isinstance(t, Tensor) and t.dim()
    }
    sizes = [(name, t.numel() * t.element_size(), t.shape[0]) for name, t in tensors.values()]
    once = sum(size for name, size, _ in sizes if not name.endswith("partial"))
    once += sum(size for name, size, _ in sizes if name == "logits")
    partial = [(size, parts) for name, size, parts in sizes if name.endswith("partial")]
    return {
        "bytes_moved": once + sum(2 * size for size, _ in partial),
        "minimum_bytes": once + sum(size // parts for size, parts in partial),
    }


def compile_one(launch: Launch, arch: int, cubin: Path) -> dict[str, Any]:
    """Compiles one kernel for one architecture; what the cubin does not tell."""
    function, arguments = record(launch, arch)
    driver.set_active(Driver(arch))
    compiled = function.run(grid=(1,), warmup=True, **arguments)
    cubin.write_bytes(compiled.asm["cubin"])
    return {
        "shared_bytes": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "has_dot": "tt.dot" in compiled.asm["ttir"],
        **traffic(arguments),
    }
