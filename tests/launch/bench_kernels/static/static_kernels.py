"""Triton kernels with known properties, for tests of the static report."""

import triton
import triton.language as tl

from trainer.kernels.compilation import Compilation

ROWS, COLUMNS = 64, 1024


@triton.jit
def scale_kernel(
    x: tl.tensor, z: tl.tensor, y: tl.tensor, count: tl.int32, BLOCK: tl.constexpr
) -> None:
    """Multiplies: two inputs, one output, no loop."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    product = tl.load(x + offsets, mask=inside).to(tl.float32) * tl.load(z + offsets, mask=inside)
    tl.store(y + offsets, product.to(y.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(
    x: tl.tensor, w: tl.tensor, y: tl.tensor, depth: tl.int32, BLOCK: tl.constexpr
) -> None:
    """A tile of a matrix product: one loop with a dot."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK):
        left = tl.load(x + lanes[:, None] * depth + start + lanes[None, :])
        right = tl.load(w + (start + lanes)[:, None] * BLOCK + lanes[None, :])
        total = tl.dot(left, right, total)
    tl.store(y + lanes[:, None] * BLOCK + lanes[None, :], total.to(y.dtype.element_ty))


@triton.jit
def spilling_kernel(x: tl.tensor, y: tl.tensor, count: tl.int32, BLOCK: tl.constexpr) -> None:
    """Carries more through its loop than a thread's registers hold."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(count):
        total = total * 1.5 + tl.load(x + step * BLOCK + lanes)
    tl.store(y + lanes, total)


@triton.jit
def wrong_kernel(x: tl.tensor, y: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Refused by the compiler: the loop's variable changes its type."""
    lanes = tl.arange(0, BLOCK)
    total = 0
    for step in range(tl.load(x)):
        total = total + tl.load(y + step)
    tl.store(y + lanes, total)


def compilation(
    name: str,
    function: str,
    signature: dict[str, str],
    block: int,
    aligned: tuple[str, ...] = (),
    num_warps: int = 4,
) -> Compilation:
    return Compilation(
        name=name,
        module=__name__,
        function=function,
        signature=signature,
        aligned=aligned,
        constants={"BLOCK": block},
        num_warps=num_warps,
        num_stages=3,
        bytes_moved=8 * ROWS * COLUMNS,
        minimum_bytes=8 * ROWS * COLUMNS,
        shape=f"[{ROWS}, {COLUMNS}]",
    )


def compilations() -> tuple[Compilation, ...]:
    scale = {"x": "*bf16", "z": "*fp32", "y": "*bf16", "count": "i32"}
    spilling = {"x": "*fp32", "y": "*fp32", "count": "i32"}
    product = {"x": "*bf16", "w": "*bf16", "y": "*bf16", "depth": "i32"}
    return (
        compilation("scale", "scale_kernel", scale, 1024, ("count",)),
        compilation("product", "product_kernel", product, 64, ("depth",)),
        compilation("narrow", "scale_kernel", scale, 128),
        # 1,024 threads leave 64 registers to each, and 128 values of the sum.
        compilation("spilling", "spilling_kernel", spilling, 131072, num_warps=32),
        compilation("wrong", "wrong_kernel", {"x": "*i32", "y": "*fp32"}, 128),
    )
