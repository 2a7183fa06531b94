"""Triton kernels with known properties, for tests of the static report."""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from launch.bench_kernels.static.kernels import Launch, Launches, empty

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


def launch(name: str, kernel: Any, *arguments: Any, block: int, num_warps: int = 4) -> Launch:
    call = partial(kernel[(1,)], *arguments, BLOCK=block, num_warps=num_warps, num_stages=3)
    return Launch(name, kernel.__name__, call, f"[{ROWS}, {COLUMNS}]")


def launches() -> Launches:
    x, y = (empty(ROWS, COLUMNS, dtype="bf16") for _ in range(2))
    wide, other = empty(ROWS, COLUMNS), empty(ROWS, COLUMNS)
    limit = torch.empty(1, dtype=torch.int32, device="meta")
    return (
        launch("scale", scale_kernel, x, wide, y, 1024, block=1024),
        launch("product", product_kernel, x, x, y, 1024, block=64),
        launch("narrow", scale_kernel, x, wide, y, 1023, block=128),
        # 1,024 threads leave 64 registers to each, and 128 values of the sum.
        launch("spilling", spilling_kernel, wide, other, 1023, block=131072, num_warps=32),
        launch("wrong", wrong_kernel, limit, wide, block=128),
    )
