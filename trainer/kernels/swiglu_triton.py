"""Masked SwiGLU in Triton: one pass forward, one backward that also sums the mask's gradient.

Backward, each program walks its share of the rows in one block of columns and adds up its part of
the mask's gradient in registers, elementwise: nothing in the loop waits for other threads. One
reduction over the programs follows. There are no atomics, and the number of programs depends on the
shape alone, so results are the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.compilation import CHANNELS, ENABLE_FP_FUSION, TOKENS, Compilation

_FORWARD_TILE = 4096
_FORWARD_COLUMNS = 1024
_BACKWARD_TILE = 2048
_PROGRAMS = 256
_OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": ENABLE_FP_FUSION}


@triton.jit
def forward_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    mask: tl.tensor,
    result: tl.tensor,
    rows: tl.int32,
    width: tl.int32,
    gate_stride: tl.int32,
    up_stride: tl.int32,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS x COLUMNS values of the result."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_width = column < width
    inside = (row < rows)[:, None] & in_width[None, :]
    start = row[:, None].to(tl.int64)
    values = tl.load(gate + start * gate_stride + column[None, :], mask=inside, other=0.0)
    factors = tl.load(up + start * up_stride + column[None, :], mask=inside, other=0.0)
    values = values.to(tl.float32)
    product = values * tl.sigmoid(values) * factors.to(tl.float32)
    if HAS_MASK:
        product = product * tl.load(mask + column, mask=in_width, other=0.0)[None, :]
    here = start * width + column[None, :]
    tl.store(result + here, product.to(result.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    gradient: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    mask: tl.tensor,
    d_gate: tl.tensor,
    d_up: tl.tensor,
    partial: tl.tensor,
    rows: tl.int32,
    width: tl.int32,
    steps: tl.int32,
    gradient_stride: tl.int32,
    gate_stride: tl.int32,
    up_stride: tl.int32,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Gradients of gate and up for `steps` groups of ROWS rows and COLUMNS columns, and their part
    of the mask's gradient, row `program_id(0)` of partial [programs, width]."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_width = column < width
    if HAS_MASK:
        scale = tl.load(mask + column, mask=in_width, other=0.0)[None, :]
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & in_width[None, :]
        start = row[:, None].to(tl.int64)
        outer = tl.load(
            gradient + start * gradient_stride + column[None, :], mask=inside, other=0.0
        )
        values = tl.load(gate + start * gate_stride + column[None, :], mask=inside, other=0.0)
        factors = tl.load(up + start * up_stride + column[None, :], mask=inside, other=0.0)
        outer = outer.to(tl.float32)
        values = values.to(tl.float32)
        factors = factors.to(tl.float32)
        sigmoid = tl.sigmoid(values)
        activated = values * sigmoid
        if HAS_MASK:
            sums += outer * activated * factors
            outer = outer * scale
        here = start * width + column[None, :]
        for_gate = outer * factors * sigmoid * (1.0 + values - activated)
        tl.store(d_gate + here, for_gate.to(d_gate.dtype.element_ty), mask=inside)
        tl.store(d_up + here, (outer * activated).to(d_up.dtype.element_ty), mask=inside)
    if HAS_MASK:
        place = tl.program_id(0).to(tl.int64) * width + column
        tl.store(partial + place, tl.sum(sums, 0), mask=in_width)


def supports(gate: Tensor) -> bool:
    """Whether the kernels take this tensor; the reference does the rest."""
    return gate.dtype != torch.float64 and gate.numel() > 0


def forward(gate: Tensor, up: Tensor, mask: Tensor | None) -> Tensor:
    """silu(gate) * up * mask, [..., F]."""
    values, factors = _flatten(gate), _flatten(up)
    rows, width = values.shape
    result = gate.new_empty(gate.shape)
    tile = _forward_tile(width)
    grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, tile["COLUMNS"]))
    with torch.cuda.device_of(gate):
        forward_kernel[grid](
            values,
            factors,
            values if mask is None else mask.contiguous(),
            result,
            rows,
            width,
            values.stride(0),
            factors.stride(0),
            HAS_MASK=mask is not None,
            **tile,
            **_OPTIONS,
        )
    return result


def backward(
    gradient: Tensor, gate: Tensor, up: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up [..., F] and of the mask [F] (empty without one)."""
    outer, values, factors = _flatten(gradient), _flatten(gate), _flatten(up)
    rows, width = values.shape
    tile = _backward_tile(width)
    steps = triton.cdiv(triton.cdiv(rows, tile["ROWS"]), _PROGRAMS)
    programs = triton.cdiv(rows, tile["ROWS"] * steps)
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    partial = gate.new_empty(0 if mask is None else programs, width, dtype=torch.float32)
    with torch.cuda.device_of(gate):
        backward_kernel[(programs, triton.cdiv(width, tile["COLUMNS"]))](
            outer,
            values,
            factors,
            values if mask is None else mask.contiguous(),
            d_gate,
            d_up,
            values if mask is None else partial,
            rows,
            width,
            steps,
            outer.stride(0),
            values.stride(0),
            factors.stride(0),
            HAS_MASK=mask is not None,
            **tile,
            **_OPTIONS,
        )
    return d_gate, d_up, partial.new_empty(0) if mask is None else partial.sum(0)


def _flatten(x: Tensor) -> Tensor:
    """[rows, F] with contiguous rows; a copy only where the strides leave no other way."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _forward_tile(width: int) -> dict[str, int]:
    columns = min(_FORWARD_COLUMNS, triton.next_power_of_2(width))
    return {"ROWS": _FORWARD_TILE // columns, "COLUMNS": columns}


def _backward_tile(width: int) -> dict[str, int]:
    columns = min(_BACKWARD_TILE, triton.next_power_of_2(width))
    return {"ROWS": _BACKWARD_TILE // columns, "COLUMNS": columns}


_PASS = 2 * TOKENS * CHANNELS
_MASK = 4 * CHANNELS
_SHAPE = "gate and up [8192, 11008] bf16, mask fp32"

COMPILATIONS = (
    Compilation(
        name="swiglu.forward",
        module=__name__,
        function="forward_kernel",
        signature={
            **dict.fromkeys(("gate", "up", "result"), "*bf16"),
            "mask": "*fp32",
            **dict.fromkeys(("rows", "width", "gate_stride", "up_stride"), "i32"),
        },
        aligned=("rows", "width", "gate_stride", "up_stride"),
        constants={"HAS_MASK": True, **_forward_tile(CHANNELS)},
        num_warps=_OPTIONS["num_warps"],
        num_stages=_OPTIONS["num_stages"],
        bytes_moved=3 * _PASS + _MASK,
        minimum_bytes=3 * _PASS + _MASK,
        shape=_SHAPE,
    ),
    Compilation(
        name="swiglu.backward",
        module=__name__,
        function="backward_kernel",
        signature={
            **dict.fromkeys(("gradient", "gate", "up", "d_gate", "d_up"), "*bf16"),
            **dict.fromkeys(("mask", "partial"), "*fp32"),
            **dict.fromkeys(("rows", "width", "steps", "gradient_stride"), "i32"),
            **dict.fromkeys(("gate_stride", "up_stride"), "i32"),
        },
        aligned=("rows", "width", "steps", "gradient_stride", "gate_stride", "up_stride"),
        constants={"HAS_MASK": True, **_backward_tile(CHANNELS)},
        num_warps=_OPTIONS["num_warps"],
        num_stages=_OPTIONS["num_stages"],
        bytes_moved=5 * _PASS + _MASK + 2 * 4 * _PROGRAMS * CHANNELS,
        minimum_bytes=5 * _PASS + 2 * _MASK,
        shape=_SHAPE,
    ),
)
