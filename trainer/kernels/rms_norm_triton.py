"""RMSNorm with a residual in Triton: a row of the stream stays in registers.

Forward: each program normalises a few blocks of rows, keeping the gain. Backward: each program
walks its share of the rows and adds up its part of the gain's gradient in registers; one reduction
over the programs follows. There are no atomics, and the number of programs depends on the shape
alone, so results are the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.launching import ENABLE_FP_FUSION, as_rows

_FORWARD_STEPS = 4
_PROGRAMS = 256


@triton.jit
def _weights(
    gain: tl.tensor,
    scale: tl.tensor,
    N: tl.tensor,
    HAS_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The gain in fp32, and the factor that makes a sum over N columns a (scaled) mean."""
    offs_n = tl.arange(0, BLOCK_N)
    w = tl.load(gain + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    factor = 1.0 / N
    if HAS_SCALE:
        factor = factor * tl.load(scale)
    return w, factor


@triton.jit
def forward_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    gain: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    rstd: tl.tensor,
    M: tl.int32,
    N: tl.int32,
    stride_x: tl.int32,
    stride_residual: tl.int32,
    eps: tl.float32,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Norm, sum and inverse root mean square of STEPS blocks of BLOCK_M rows."""
    offs_n = tl.arange(0, BLOCK_N)
    w, factor = _weights(gain, scale, N, HAS_SCALE, BLOCK_N)
    for step in range(STEPS):
        offs_m = (tl.program_id(0) * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        # Rows times a stride may exceed 32 bits.
        rows = offs_m[:, None].to(tl.int64)
        h = tl.load(x + rows * stride_x + offs_n[None, :], mask=inside, other=0.0)
        h = h.to(tl.float32)
        offs = rows * N + offs_n[None, :]
        if HAS_RESIDUAL:
            r = tl.load(residual + rows * stride_residual + offs_n[None, :], mask=inside, other=0.0)
            # The norm is that of the rounded sum, which is what the next block reads.
            rounded = (h + r.to(tl.float32)).to(total.dtype.element_ty)
            tl.store(total + offs, rounded, mask=inside)
            h = rounded.to(tl.float32)
        # Columns past N were loaded as 0 and add nothing.
        inverse = tl.rsqrt(tl.sum(h * h, 1) * factor + eps)
        tl.store(rstd + offs_m, inverse, mask=offs_m < M)
        y = h * inverse[:, None] * w[None, :]
        tl.store(out + offs, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    d_out: tl.tensor,
    d_direct: tl.tensor,
    total: tl.tensor,
    rstd: tl.tensor,
    gain: tl.tensor,
    scale: tl.tensor,
    d_total: tl.tensor,
    partial: tl.tensor,
    M: tl.int32,
    N: tl.int32,
    steps: tl.int32,
    stride_d_out: tl.int32,
    stride_d_direct: tl.int32,
    stride_total: tl.int32,
    HAS_DIRECT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Gradient of the sum for `steps` blocks of BLOCK_M rows, and their part of the gain's, row
    `program_id` of partial [programs, N]. d_direct is the gradient that the sum gets besides."""
    offs_n = tl.arange(0, BLOCK_N)
    w, factor = _weights(gain, scale, N, HAS_SCALE, BLOCK_N)
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        offs_m = (tl.program_id(0) * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        rows = offs_m[:, None].to(tl.int64)
        inverse = tl.load(rstd + offs_m, mask=offs_m < M, other=0.0)[:, None]
        h = tl.load(total + rows * stride_total + offs_n[None, :], mask=inside, other=0.0)
        dy = tl.load(d_out + rows * stride_d_out + offs_n[None, :], mask=inside, other=0.0)
        xhat = h.to(tl.float32) * inverse
        dy = dy.to(tl.float32)
        # Elementwise: the reduction over BLOCK_M rows waits until after the loop.
        dw += dy * xhat
        wdy = dy * w[None, :]
        # d rstd / d h takes out of wdy what points along h.
        c1 = tl.sum(wdy * xhat, 1)[:, None] * factor
        dh = (wdy - xhat * c1) * inverse
        if HAS_DIRECT:
            direct = tl.load(
                d_direct + rows * stride_d_direct + offs_n[None, :], mask=inside, other=0.0
            )
            dh += direct.to(tl.float32)
        offs = rows * N + offs_n[None, :]
        tl.store(d_total + offs, dh.to(d_total.dtype.element_ty), mask=inside)
    offs = tl.program_id(0).to(tl.int64) * N + offs_n
    tl.store(partial + offs, tl.sum(dw, 0), mask=offs_n < N)


def forward(
    x: Tensor, gain: Tensor, residual: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, sum (empty without a residual) and inverse root mean square of x [..., d]."""
    rows = as_rows(x)
    before = rows if residual is None else as_rows(residual)
    m, n = rows.shape
    out = x.new_empty(x.shape)
    total = x.new_empty(0 if residual is None else x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    options = _options(n)
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(m, _FORWARD_STEPS * options["BLOCK_M"]),)](
            rows,
            before,
            gain.contiguous(),
            gain if scale is None else scale,
            out,
            total,
            rstd,
            m,
            n,
            rows.stride(0),
            before.stride(0),
            eps,
            HAS_RESIDUAL=residual is not None,
            HAS_SCALE=scale is not None,
            STEPS=_FORWARD_STEPS,
            **options,
        )
    return out, total, rstd


def backward(
    gradient: Tensor,
    total_gradient: Tensor | None,
    total: Tensor,
    rstd: Tensor,
    gain: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum [..., d] and of the gain [d]."""
    d_out, rows = as_rows(gradient), as_rows(total)
    d_direct = d_out if total_gradient is None else as_rows(total_gradient)
    m, n = rows.shape
    options = _options(n)
    steps = triton.cdiv(triton.cdiv(m, options["BLOCK_M"]), _PROGRAMS)
    programs = triton.cdiv(m, options["BLOCK_M"] * steps)
    d_total = total.new_empty(total.shape)
    partial = total.new_empty(programs, n, dtype=torch.float32)
    with torch.cuda.device_of(total):
        backward_kernel[(programs,)](
            d_out,
            d_direct,
            rows,
            rstd,
            gain.contiguous(),
            gain if scale is None else scale,
            d_total,
            partial,
            m,
            n,
            steps,
            d_out.stride(0),
            d_direct.stride(0),
            rows.stride(0),
            HAS_DIRECT=total_gradient is not None,
            HAS_SCALE=scale is not None,
            **options,
        )
    return d_total, partial.sum(0).to(gain.dtype)


def _options(width: int) -> dict[str, int]:
    """Tiles of whole rows, about 4096 values or one row, and 512 values a warp up to 32 warps."""
    columns = triton.next_power_of_2(width)
    return {
        "BLOCK_M": max(1, 4096 // columns),
        "BLOCK_N": columns,
        "num_warps": min(32, max(8, columns // 512)),
        "num_stages": 1,
        "enable_fp_fusion": ENABLE_FP_FUSION,
    }
