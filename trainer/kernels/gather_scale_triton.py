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

from trainer.kernels.gather_scale import Selection
from trainer.kernels.launching import ENABLE_FP_FUSION

_FORWARD_ROWS, _FORWARD_COLUMNS = 8, 512
_BACKWARD_ROWS, _BACKWARD_COLUMNS = 16, 256
_PROGRAMS = 16
_OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": ENABLE_FP_FUSION}


@triton.jit
def _sources(
    index: tl.tensor, offs: tl.tensor, count: tl.tensor, size: tl.tensor, HAS_INDEX: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Rows (or columns) of the weight that those of the result at `offs` come from, and which of
    them exist."""
    inside = offs < count
    src = offs.to(tl.int64)
    if HAS_INDEX:
        src = tl.load(index + offs, mask=inside, other=0)
        inside = inside & (src >= 0) & (src < size)
    return src, inside


@triton.jit
def forward_kernel(
    weight: tl.tensor,
    rows: tl.tensor,
    row_scale: tl.tensor,
    columns: tl.tensor,
    column_scale: tl.tensor,
    out: tl.tensor,
    M: tl.int32,
    N: tl.int32,
    height: tl.int32,
    width: tl.int32,
    stride_wm: tl.tensor,
    stride_wn: tl.tensor,
    DOUBLE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """BLOCK_M x BLOCK_N values of the result [M, N] of a weight [height, width]."""
    nan = float("nan")
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    src_m, has_m = _sources(rows, offs_m, M, height, HAS_ROWS)
    src_n, has_n = _sources(columns, offs_n, N, width, HAS_COLUMNS)
    # src is int64: these products do not overflow.
    w = weight + src_m[:, None] * stride_wm + src_n[None, :] * stride_wn
    values = tl.load(w, mask=has_m[:, None] & has_n[None, :], other=nan)
    values = values.to(tl.float64 if DOUBLE else tl.float32)
    if HAS_ROW_SCALE:
        values = values * tl.load(row_scale + src_m, mask=has_m, other=nan)[:, None]
    if HAS_COLUMN_SCALE:
        values = values * tl.load(column_scale + src_n, mask=has_n, other=nan)[None, :]
    target = out + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    # Not has_m & has_n: what an index out of range left as NaN is stored too.
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _positions(
    positions: tl.tensor, offs: tl.tensor, size: tl.tensor, HAS_INDEX: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Where in the result rows (or columns) `offs` of the weight are, and which of them are there:
    the inverse of `_sources`."""
    pos = offs
    inside = offs < size
    if HAS_INDEX:
        pos = tl.load(positions + offs, mask=inside, other=-1)
        inside = pos >= 0
    return pos, inside


@triton.jit
def _factors(
    scale: tl.tensor,
    offs: tl.tensor,
    inside: tl.tensor,
    DOUBLE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
) -> tl.tensor:
    """Masks of rows or columns, ones where there are none."""
    factors = tl.full(offs.shape, 1.0, tl.float64 if DOUBLE else tl.float32)
    if HAS_SCALE:
        factors = tl.load(scale + offs, mask=inside, other=0.0)
    return factors


@triton.jit
def backward_kernel(
    d_out: tl.tensor,
    weight: tl.tensor,
    row_positions: tl.tensor,
    row_scale: tl.tensor,
    column_positions: tl.tensor,
    column_scale: tl.tensor,
    d_weight: tl.tensor,
    row_partial: tl.tensor,
    column_partial: tl.tensor,
    height: tl.int32,
    width: tl.int32,
    steps: tl.int32,
    stride_dm: tl.tensor,
    stride_dn: tl.tensor,
    stride_wm: tl.tensor,
    stride_wn: tl.tensor,
    DOUBLE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_ROW_SCALE: tl.constexpr,
    NEED_COLUMN_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Gradients for `steps` blocks of BLOCK_M rows and BLOCK_N columns of the weight: its own (0
    for what the result does not have) and parts of the masks', row_partial [blocks of columns,
    height] and column_partial [programs, width]. Positions are `_inverse`."""
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    pos_n, has_n = _positions(column_positions, offs_n, width, HAS_COLUMNS)
    z_n = _factors(column_scale, offs_n, has_n, DOUBLE, HAS_COLUMN_SCALE)[None, :]
    column_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float64 if DOUBLE else tl.float32)
    for step in range(steps):
        offs_m = (tl.program_id(0) * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        pos_m, has_m = _positions(row_positions, offs_m, height, HAS_ROWS)
        z_m = _factors(row_scale, offs_m, has_m, DOUBLE, HAS_ROW_SCALE)[:, None]
        inside = has_m[:, None] & has_n[None, :]
        m = offs_m[:, None].to(tl.int64)
        source = d_out + pos_m[:, None].to(tl.int64) * stride_dm
        source += pos_n[None, :].to(tl.int64) * stride_dn
        dy = tl.load(source, mask=inside, other=0.0).to(tl.float64 if DOUBLE else tl.float32)
        if NEED_ROW_SCALE or NEED_COLUMN_SCALE:
            source = weight + m * stride_wm + offs_n[None, :].to(tl.int64) * stride_wn
            w = tl.load(source, mask=inside, other=0.0)
            product = dy * w.to(tl.float64 if DOUBLE else tl.float32)
            if NEED_ROW_SCALE:
                target = row_partial + tl.program_id(1).to(tl.int64) * height + offs_m
                tl.store(target, tl.sum(product * z_n, 1), mask=offs_m < height)
            if NEED_COLUMN_SCALE:
                column_sums += product * z_m  # elementwise: they are added up after the loop
        if NEED_WEIGHT:
            dw = (dy * z_m * z_n).to(d_weight.dtype.element_ty)
            within = (offs_m < height)[:, None] & (offs_n < width)[None, :]
            tl.store(d_weight + m * width + offs_n[None, :], dw, mask=within)
    if NEED_COLUMN_SCALE:
        target = column_partial + tl.program_id(0).to(tl.int64) * width + offs_n
        tl.store(target, tl.sum(column_sums, 0), mask=offs_n < width)


def forward(selection: Selection) -> Tensor:
    """[n, m] in the weight's dtype, contiguous."""
    weight = selection.weight
    out = weight.new_empty(selection.shape)
    if not out.numel():
        return out
    grid = (triton.cdiv(out.shape[0], _FORWARD_ROWS), triton.cdiv(out.shape[1], _FORWARD_COLUMNS))
    with torch.cuda.device_of(weight):
        forward_kernel[grid](
            *_pointers(selection),
            out,
            *out.shape,
            *weight.shape,
            *weight.stride(),
            **_flags(selection),
            BLOCK_M=_FORWARD_ROWS,
            BLOCK_N=_FORWARD_COLUMNS,
            **_OPTIONS,
        )
    return out


def backward(
    gradient: Tensor,
    selection: Selection,
    need_weight: bool,
    need_row_scale: bool,
    need_column_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, row scale and column scale; those not needed are empty [0]."""
    weight = selection.weight
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
    inverse = selection._replace(
        rows=_inverse(selection.rows, height), columns=_inverse(selection.columns, width)
    )
    if height and width:
        with torch.cuda.device_of(weight):
            backward_kernel[(programs, blocks)](
                gradient,
                *_pointers(inverse),
                d_weight if need_weight else weight,
                row_partial if need_row_scale else weight,
                column_partial if need_column_scale else weight,
                height,
                width,
                steps,
                *gradient.stride(),
                *weight.stride(),
                **_flags(selection),
                NEED_WEIGHT=need_weight,
                NEED_ROW_SCALE=need_row_scale,
                NEED_COLUMN_SCALE=need_column_scale,
                BLOCK_M=_BACKWARD_ROWS,
                BLOCK_N=_BACKWARD_COLUMNS,
                **_OPTIONS,
            )
    return d_weight, row_partial.sum(0), column_partial.sum(0)


def _inverse(index: Tensor | None, size: int) -> Tensor | None:
    """[size] int32: where in `index` each row or column is, -1 for those left out."""
    if index is None:
        return None
    order = torch.arange(index.shape[0], dtype=torch.int32, device=index.device)
    return order.new_full((size,), -1).index_copy(0, index, order)


def _pointers(selection: Selection) -> list[Tensor]:
    """The weight, indices and scales; the weight stands for what is absent and not read for it."""
    weight, *others = selection
    return [weight, *(weight if tensor is None else tensor.contiguous() for tensor in others)]


def _flags(selection: Selection) -> dict[str, bool]:
    return {
        "DOUBLE": selection.weight.dtype == torch.float64,
        "HAS_ROWS": selection.rows is not None,
        "HAS_ROW_SCALE": selection.row_scale is not None,
        "HAS_COLUMNS": selection.columns is not None,
        "HAS_COLUMN_SCALE": selection.column_scale is not None,
    }
