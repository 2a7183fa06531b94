"""RMSNorm with mask and residual in Triton: a row of the stream stays in registers.

Forward: each program normalises a few groups of rows, keeping gain and mask. Backward: each program
walks its share of the rows and adds up its part of the gain's gradient in registers; one reduction
over the programs follows. There are no atomics, and the number of programs depends on the shape
alone, so results are the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.compilation import ENABLE_FP_FUSION, TOKENS, WIDTH, Compilation
from trainer.kernels.rms_norm import split_gain

LARGEST_WIDTH = 65536
_FORWARD_STEPS = 4
_PROGRAMS = 256


@triton.jit
def forward_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    gain: tl.tensor,
    mask: tl.tensor,
    scale: tl.tensor,
    normed: tl.tensor,
    total: tl.tensor,
    inverse: tl.tensor,
    rows: tl.int32,
    width: tl.int32,
    x_stride: tl.int32,
    residual_stride: tl.int32,
    eps: tl.float32,
    HAS_RESIDUAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Norm, sum and inverse root mean square of STEPS groups of ROWS rows."""
    column = tl.arange(0, COLUMNS)
    in_width = column < width
    factor = tl.load(gain + column, mask=in_width, other=0.0).to(tl.float32)
    if HAS_MASK:
        factor = factor * tl.load(mask + column, mask=in_width, other=0.0)
    weight = 1.0 / width
    if HAS_SCALE:
        weight = weight * tl.load(scale)
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & in_width[None, :]
        start = row[:, None].to(tl.int64)
        values = tl.load(x + start * x_stride + column[None, :], mask=inside, other=0.0)
        values = values.to(tl.float32)
        here = start * width + column[None, :]
        if HAS_RESIDUAL:
            before = tl.load(
                residual + start * residual_stride + column[None, :], mask=inside, other=0.0
            )
            rounded = (values + before.to(tl.float32)).to(total.dtype.element_ty)
            tl.store(total + here, rounded, mask=inside)
            values = rounded.to(tl.float32)
        root = tl.rsqrt(tl.sum(values * values, 1) * weight + eps)
        tl.store(inverse + row, root, mask=row < rows)
        result = values * root[:, None] * factor[None, :]
        tl.store(normed + here, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    gradient: tl.tensor,
    total_gradient: tl.tensor,
    total: tl.tensor,
    inverse: tl.tensor,
    gain: tl.tensor,
    mask: tl.tensor,
    scale: tl.tensor,
    d_total: tl.tensor,
    partial: tl.tensor,
    rows: tl.int32,
    width: tl.int32,
    steps: tl.int32,
    gradient_stride: tl.int32,
    total_gradient_stride: tl.int32,
    total_stride: tl.int32,
    HAS_TOTAL_GRADIENT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Gradient of the sum for `steps` groups of ROWS rows, and their part of the gradient of
    gain * mask, row `program_id` of partial [programs, width]."""
    column = tl.arange(0, COLUMNS)
    in_width = column < width
    factor = tl.load(gain + column, mask=in_width, other=0.0).to(tl.float32)
    if HAS_MASK:
        factor = factor * tl.load(mask + column, mask=in_width, other=0.0)
    weight = 1.0 / width
    if HAS_SCALE:
        weight = weight * tl.load(scale)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & in_width[None, :]
        start = row[:, None].to(tl.int64)
        root = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        values = tl.load(total + start * total_stride + column[None, :], mask=inside, other=0.0)
        outer = tl.load(
            gradient + start * gradient_stride + column[None, :], mask=inside, other=0.0
        )
        normalised = values.to(tl.float32) * root
        outer = outer.to(tl.float32)
        sums += outer * normalised
        inner = outer * factor[None, :]
        along = tl.sum(inner * normalised, 1)[:, None] * weight
        result = (inner - normalised * along) * root
        if HAS_TOTAL_GRADIENT:
            direct = tl.load(
                total_gradient + start * total_gradient_stride + column[None, :],
                mask=inside,
                other=0.0,
            )
            result += direct.to(tl.float32)
        here = start * width + column[None, :]
        tl.store(d_total + here, result.to(d_total.dtype.element_ty), mask=inside)
    place = tl.program_id(0).to(tl.int64) * width + column
    tl.store(partial + place, tl.sum(sums, 0), mask=in_width)


def supports(x: Tensor) -> bool:
    """Whether the kernels take this tensor; the reference does the rest."""
    return x.dtype != torch.float64 and x.numel() > 0 and x.shape[-1] <= LARGEST_WIDTH


def forward(
    x: Tensor,
    gain: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, sum (empty without a residual) and inverse root mean square of x [..., d]."""
    flat = _flatten(x)
    before = flat if residual is None else _flatten(residual)
    rows, width = flat.shape
    normed = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
    tile = _tile(width)
    grid = (triton.cdiv(rows, _FORWARD_STEPS * tile["ROWS"]),)
    with torch.cuda.device_of(x):
        forward_kernel[grid](
            flat,
            before,
            gain.contiguous(),
            gain if mask is None else mask.contiguous(),
            gain if scale is None else scale,
            normed,
            total,
            inverse,
            rows,
            width,
            flat.stride(0),
            before.stride(0),
            eps,
            HAS_RESIDUAL=residual is not None,
            HAS_MASK=mask is not None,
            HAS_SCALE=scale is not None,
            STEPS=_FORWARD_STEPS,
            **tile,
            **_options(width),
        )
    return normed, total, inverse


def backward(
    gradient: Tensor,
    total_gradient: Tensor | None,
    total: Tensor,
    inverse: Tensor,
    gain: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum [..., d], gain [d] and mask [d] (empty without one)."""
    outer, values = _flatten(gradient), _flatten(total)
    direct = outer if total_gradient is None else _flatten(total_gradient)
    rows, width = values.shape
    tile = _tile(width)
    steps = triton.cdiv(triton.cdiv(rows, tile["ROWS"]), _PROGRAMS)
    programs = triton.cdiv(rows, tile["ROWS"] * steps)
    d_total = total.new_empty(total.shape)
    partial = total.new_empty(programs, width, dtype=torch.float32)
    with torch.cuda.device_of(total):
        backward_kernel[(programs,)](
            outer,
            direct,
            values,
            inverse,
            gain.contiguous(),
            gain if mask is None else mask.contiguous(),
            gain if scale is None else scale,
            d_total,
            partial,
            rows,
            width,
            steps,
            outer.stride(0),
            direct.stride(0),
            values.stride(0),
            HAS_TOTAL_GRADIENT=total_gradient is not None,
            HAS_MASK=mask is not None,
            HAS_SCALE=scale is not None,
            **tile,
            **_options(width),
        )
    return d_total, *split_gain(partial.sum(0), gain, mask)


def _flatten(x: Tensor) -> Tensor:
    """[rows, d] with contiguous rows; a copy only where the strides leave no other way."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _tile(width: int) -> dict[str, int]:
    columns = triton.next_power_of_2(width)
    return {"ROWS": max(1, 4096 // columns), "COLUMNS": columns}


def _options(width: int) -> dict[str, int | bool]:
    warps = min(32, max(8, triton.next_power_of_2(width) // 512))
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": ENABLE_FP_FUSION}


_PASS = 2 * TOKENS * WIDTH
_PER_ROW = 4 * TOKENS
_PER_COLUMN = (2 + 4) * WIDTH
_STREAM = "[8192, 4096] bf16 with gain bf16, mask fp32"
_ROWS = dict.fromkeys(("x", "residual", "gain", "normed", "total"), "*bf16")
_GRADIENTS = dict.fromkeys(("gradient", "total_gradient", "total", "gain", "d_total"), "*bf16")

COMPILATIONS = (
    Compilation(
        name="rms_norm.forward",
        module=__name__,
        function="forward_kernel",
        signature={
            **_ROWS,
            **dict.fromkeys(("mask", "scale", "inverse"), "*fp32"),
            **dict.fromkeys(("rows", "width", "x_stride", "residual_stride"), "i32"),
            "eps": "fp32",
        },
        aligned=("rows", "width", "x_stride", "residual_stride"),
        constants={
            "HAS_RESIDUAL": True,
            "HAS_MASK": True,
            "HAS_SCALE": True,
            "STEPS": _FORWARD_STEPS,
            **_tile(WIDTH),
        },
        num_warps=int(_options(WIDTH)["num_warps"]),
        num_stages=1,
        bytes_moved=4 * _PASS + _PER_ROW + _PER_COLUMN,
        minimum_bytes=4 * _PASS + _PER_ROW + _PER_COLUMN,
        shape=f"x and residual {_STREAM}",
    ),
    Compilation(
        name="rms_norm.backward",
        module=__name__,
        function="backward_kernel",
        signature={
            **_GRADIENTS,
            **dict.fromkeys(("mask", "scale", "inverse", "partial"), "*fp32"),
            **dict.fromkeys(("rows", "width", "steps"), "i32"),
            **dict.fromkeys(("gradient_stride", "total_gradient_stride"), "i32"),
            "total_stride": "i32",
        },
        aligned=(
            *("rows", "width", "steps", "gradient_stride", "total_gradient_stride"),
            "total_stride",
        ),
        constants={
            "HAS_TOTAL_GRADIENT": True,
            "HAS_MASK": True,
            "HAS_SCALE": True,
            **_tile(WIDTH),
        },
        num_warps=int(_options(WIDTH)["num_warps"]),
        num_stages=1,
        bytes_moved=4 * _PASS + _PER_ROW + _PER_COLUMN + 2 * 4 * _PROGRAMS * WIDTH,
        minimum_bytes=4 * _PASS + _PER_ROW + 2 * _PER_COLUMN,
        shape=f"gradients of norm and sum {_STREAM}",
    ),
)
