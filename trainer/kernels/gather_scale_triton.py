"""Gather-scale in Triton: weights with masks folded in, and both mask gradients in one pass.

Backward, each program walks its share of the weight's rows in one block of columns, and writes
zeros for what was left out. It adds up its part of the column mask's gradient in registers and
writes its part of the row mask's; one reduction over the programs follows for each. There are no
atomics, and the number of programs depends on the shape alone, so results are the same bits every
time.

Strides have no declared type, so that one that is 1 becomes a constant and neighbours are read at
once. An index out of range reads nothing and gives NaN: there is no way to raise without waiting.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.compilation import CHANNELS, ENABLE_FP_FUSION, WIDTH, Compilation

_FORWARD_ROWS, _FORWARD_COLUMNS = 8, 512
_BACKWARD_ROWS, _BACKWARD_COLUMNS = 16, 256
_PROGRAMS = 16
_OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": ENABLE_FP_FUSION}


@triton.jit
def _index(
    indices: tl.tensor, place: tl.tensor, count: tl.tensor, size: tl.tensor, HAS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Which rows or columns are meant by `place`, and which of them exist."""
    present = place < count
    index = place.to(tl.int64)
    if HAS:
        index = tl.load(indices + place, mask=present, other=0)
        present = present & (index >= 0) & (index < size)
    return index, present


@triton.jit
def forward_kernel(
    weight: tl.tensor,
    rows: tl.tensor,
    row_scale: tl.tensor,
    columns: tl.tensor,
    column_scale: tl.tensor,
    result: tl.tensor,
    n: tl.int32,
    m: tl.int32,
    height: tl.int32,
    width: tl.int32,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    DOUBLE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS x COLUMNS values of the result."""
    nan = float("nan")
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row, has_row = _index(rows, i, n, height, HAS_ROWS)
    column, has_column = _index(columns, j, m, width, HAS_COLUMNS)
    source = weight + row[:, None] * row_stride + column[None, :] * column_stride
    values = tl.load(source, mask=has_row[:, None] & has_column[None, :], other=nan)
    values = values.to(tl.float64 if DOUBLE else tl.float32)
    if HAS_ROW_SCALE:
        values = values * tl.load(row_scale + row, mask=has_row, other=nan)[:, None]
    if HAS_COLUMN_SCALE:
        values = values * tl.load(column_scale + column, mask=has_column, other=nan)[None, :]
    target = result + i[:, None].to(tl.int64) * m + j[None, :]
    inside = (i < n)[:, None] & (j < m)[None, :]
    tl.store(target, values.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _placed(
    places: tl.tensor, index: tl.tensor, size: tl.tensor, HAS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Where in the result rows or columns are, and which of them are in it."""
    place = index
    present = index < size
    if HAS:
        place = tl.load(places + index, mask=present, other=-1)
        present = place >= 0
    return place, present


@triton.jit
def _factors(
    scale: tl.tensor,
    index: tl.tensor,
    present: tl.tensor,
    DOUBLE: tl.constexpr,
    HAS: tl.constexpr,
) -> tl.tensor:
    """Masks of rows or columns, ones where there are none."""
    factors = tl.full(index.shape, 1.0, tl.float64 if DOUBLE else tl.float32)
    if HAS:
        factors = tl.load(scale + index, mask=present, other=0.0)
    return factors


@triton.jit
def backward_kernel(
    gradient: tl.tensor,
    weight: tl.tensor,
    row_places: tl.tensor,
    row_scale: tl.tensor,
    column_places: tl.tensor,
    column_scale: tl.tensor,
    d_weight: tl.tensor,
    row_partial: tl.tensor,
    column_partial: tl.tensor,
    height: tl.int32,
    width: tl.int32,
    steps: tl.int32,
    gradient_row_stride: tl.tensor,
    gradient_column_stride: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    DOUBLE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_ROW_SCALE: tl.constexpr,
    NEED_COLUMN_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Gradients for `steps` groups of ROWS rows and COLUMNS columns of the weight: its own, parts
    of the masks', row_partial [blocks of columns, height] and column_partial [programs, width].
    row_places [height] and column_places [width] are places in the result, -1 if left out."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    j, has_column = _placed(column_places, column, width, HAS_COLUMNS)
    by_column = _factors(column_scale, column, has_column, DOUBLE, HAS_COLUMN_SCALE)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float64 if DOUBLE else tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        i, has_row = _placed(row_places, row, height, HAS_ROWS)
        by_row = _factors(row_scale, row, has_row, DOUBLE, HAS_ROW_SCALE)[:, None]
        inside = has_row[:, None] & has_column[None, :]
        start = row[:, None].to(tl.int64)
        source = gradient + i[:, None].to(tl.int64) * gradient_row_stride
        source += j[None, :].to(tl.int64) * gradient_column_stride
        outer = tl.load(source, mask=inside, other=0.0).to(tl.float64 if DOUBLE else tl.float32)
        if NEED_ROW_SCALE or NEED_COLUMN_SCALE:
            source = weight + start * row_stride + column[None, :].to(tl.int64) * column_stride
            values = tl.load(source, mask=inside, other=0.0)
            product = outer * values.to(tl.float64 if DOUBLE else tl.float32)
            if NEED_ROW_SCALE:
                target = row_partial + tl.program_id(1).to(tl.int64) * height + row
                tl.store(target, tl.sum(product * by_column, 1), mask=row < height)
            if NEED_COLUMN_SCALE:
                sums += product * by_row
        if NEED_WEIGHT:
            result = (outer * by_row * by_column).to(d_weight.dtype.element_ty)
            within = (row < height)[:, None] & (column < width)[None, :]
            tl.store(d_weight + start * width + column[None, :], result, mask=within)
    if NEED_COLUMN_SCALE:
        target = column_partial + tl.program_id(0).to(tl.int64) * width + column
        tl.store(target, tl.sum(sums, 0), mask=column < width)


def forward(
    weight: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    columns: Tensor | None,
    column_scale: Tensor | None,
) -> Tensor:
    """[n, m] in the weight's dtype, contiguous."""
    height, width = weight.shape
    n = height if rows is None else rows.shape[0]
    m = width if columns is None else columns.shape[0]
    result = weight.new_empty(n, m)
    if not result.numel():
        return result
    grid = (triton.cdiv(n, _FORWARD_ROWS), triton.cdiv(m, _FORWARD_COLUMNS))
    with torch.cuda.device_of(weight):
        forward_kernel[grid](
            weight,
            *_selection(weight, rows, row_scale, columns, column_scale),
            result,
            n,
            m,
            height,
            width,
            *weight.stride(),
            **_flags(weight, rows, row_scale, columns, column_scale),
            ROWS=_FORWARD_ROWS,
            COLUMNS=_FORWARD_COLUMNS,
            **_OPTIONS,
        )
    return result


def backward(
    gradient: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    columns: Tensor | None,
    column_scale: Tensor | None,
    need_weight: bool,
    need_row_scale: bool,
    need_column_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, row scale and column scale; those not needed are empty [0]."""
    height, width = weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    steps = max(1, triton.cdiv(triton.cdiv(height, _BACKWARD_ROWS), _PROGRAMS))
    programs = triton.cdiv(height, _BACKWARD_ROWS * steps)
    blocks = triton.cdiv(width, _BACKWARD_COLUMNS)
    d_weight = weight.new_empty((height, width) if need_weight else 0)
    row_partial = weight.new_empty((blocks, height) if need_row_scale else (0, 0), dtype=dtype)
    column_partial = weight.new_empty(
        (programs, width) if need_column_scale else (0, 0), dtype=dtype
    )
    row_places, column_places = _places(rows, height), _places(columns, width)
    if height and width:
        with torch.cuda.device_of(weight):
            backward_kernel[(programs, blocks)](
                gradient,
                weight,
                *_selection(weight, row_places, row_scale, column_places, column_scale),
                d_weight if need_weight else weight,
                row_partial if need_row_scale else weight,
                column_partial if need_column_scale else weight,
                height,
                width,
                steps,
                *gradient.stride(),
                *weight.stride(),
                **_flags(weight, rows, row_scale, columns, column_scale),
                NEED_WEIGHT=need_weight,
                NEED_ROW_SCALE=need_row_scale,
                NEED_COLUMN_SCALE=need_column_scale,
                ROWS=_BACKWARD_ROWS,
                COLUMNS=_BACKWARD_COLUMNS,
                **_OPTIONS,
            )
    return d_weight, row_partial.sum(0), column_partial.sum(0)


def _places(index: Tensor | None, size: int) -> Tensor | None:
    """[size] int32: where in `index` each row or column is, -1 for those left out."""
    if index is None:
        return None
    order = torch.arange(index.shape[0], dtype=torch.int32, device=index.device)
    return order.new_full((size,), -1).index_copy(0, index, order)


def _selection(weight: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
    """Indices and scales; the weight stands for what is absent and is not read for it."""
    return tuple(weight if tensor is None else tensor.contiguous() for tensor in given)


def _flags(
    weight: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    columns: Tensor | None,
    column_scale: Tensor | None,
) -> dict[str, bool]:
    return {
        "DOUBLE": weight.dtype == torch.float64,
        "HAS_ROWS": rows is not None,
        "HAS_ROW_SCALE": row_scale is not None,
        "HAS_COLUMNS": columns is not None,
        "HAS_COLUMN_SCALE": column_scale is not None,
    }


_WEIGHT = 2 * WIDTH * CHANNELS
_MASKS = 4 * (WIDTH + CHANNELS)
_PARTIAL = 4 * (_PROGRAMS * CHANNELS + triton.cdiv(CHANNELS, _BACKWARD_COLUMNS) * WIDTH)
_SHAPE = "weight [4096, 11008] bf16, all 4096 rows by index, both scales fp32"
_COMMON = {
    "weight": "*bf16",
    "row_scale": "*fp32",
    "column_scale": "*fp32",
    "height": "i32",
    "width": "i32",
    "row_stride": "i32",
}
_CONSTANTS: dict[str, int | float | bool] = {
    "DOUBLE": False,
    "HAS_ROWS": True,
    "HAS_ROW_SCALE": True,
    "HAS_COLUMNS": False,
    "HAS_COLUMN_SCALE": True,
    "column_stride": 1,
}

COMPILATIONS = (
    Compilation(
        name="gather_scale.forward",
        module=__name__,
        function="forward_kernel",
        signature={
            **_COMMON,
            "rows": "*i64",
            "columns": "*bf16",
            "result": "*bf16",
            "n": "i32",
            "m": "i32",
        },
        aligned=("n", "m", "height", "width", "row_stride"),
        constants={**_CONSTANTS, "ROWS": _FORWARD_ROWS, "COLUMNS": _FORWARD_COLUMNS},
        num_warps=_OPTIONS["num_warps"],
        num_stages=_OPTIONS["num_stages"],
        bytes_moved=2 * _WEIGHT + _MASKS + 8 * WIDTH,
        minimum_bytes=2 * _WEIGHT + _MASKS + 8 * WIDTH,
        shape=_SHAPE,
    ),
    Compilation(
        name="gather_scale.backward",
        module=__name__,
        function="backward_kernel",
        signature={
            **_COMMON,
            **dict.fromkeys(("gradient", "d_weight", "column_places"), "*bf16"),
            "row_places": "*i32",
            **dict.fromkeys(("row_partial", "column_partial"), "*fp32"),
            "steps": "i32",
            "gradient_row_stride": "i32",
        },
        aligned=("height", "width", "steps", "row_stride", "gradient_row_stride"),
        constants={
            **_CONSTANTS,
            "gradient_column_stride": 1,
            "NEED_WEIGHT": True,
            "NEED_ROW_SCALE": True,
            "NEED_COLUMN_SCALE": True,
            "ROWS": _BACKWARD_ROWS,
            "COLUMNS": _BACKWARD_COLUMNS,
        },
        num_warps=_OPTIONS["num_warps"],
        num_stages=_OPTIONS["num_stages"],
        bytes_moved=3 * _WEIGHT + _MASKS + 4 * WIDTH + 2 * _PARTIAL,
        minimum_bytes=3 * _WEIGHT + 2 * _MASKS + 8 * WIDTH,
        shape=_SHAPE,
    ),
)
