"""SwiGLU in Triton: elementwise, one pass forward and one backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.launching import ENABLE_FP_FUSION, as_rows

_FORWARD_TILE, _BACKWARD_TILE = 4096, 2048
"""Values of a program; backward it holds five tensors instead of three."""
_COLUMNS = 1024
_OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": ENABLE_FP_FUSION}


@triton.jit
def _tile(
    M: tl.tensor, N: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """This program's rows [BLOCK_M, 1] and columns [1, BLOCK_N], and which of them exist."""
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    offs_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    # Rows times a stride may exceed 32 bits.
    return offs_m.to(tl.int64), offs_n, (offs_m < M) & (offs_n < N)


@triton.jit
def forward_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    M: tl.int32,
    N: tl.int32,
    stride_gate: tl.int32,
    stride_up: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """out [M, N] = silu(gate) * up, in fp32 and rounded once."""
    offs_m, offs_n, inside = _tile(M, N, BLOCK_M, BLOCK_N)
    g = tl.load(gate + offs_m * stride_gate + offs_n, mask=inside, other=0.0)
    u = tl.load(up + offs_m * stride_up + offs_n, mask=inside, other=0.0)
    g = g.to(tl.float32)
    y = g * tl.sigmoid(g) * u.to(tl.float32)
    tl.store(out + offs_m * N + offs_n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    d_out: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    d_gate: tl.tensor,
    d_up: tl.tensor,
    M: tl.int32,
    N: tl.int32,
    stride_d_out: tl.int32,
    stride_gate: tl.int32,
    stride_up: tl.int32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Gradients [M, N] of gate and up."""
    offs_m, offs_n, inside = _tile(M, N, BLOCK_M, BLOCK_N)
    dy = tl.load(d_out + offs_m * stride_d_out + offs_n, mask=inside, other=0.0)
    g = tl.load(gate + offs_m * stride_gate + offs_n, mask=inside, other=0.0)
    u = tl.load(up + offs_m * stride_up + offs_n, mask=inside, other=0.0)
    dy, g, u = dy.to(tl.float32), g.to(tl.float32), u.to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    # silu'(g) = sigmoid(g) * (1 + g * (1 - sigmoid(g))), of which g * sigmoid(g) is there already.
    dg = dy * u * sigmoid * (1.0 + g - silu)
    offs = offs_m * N + offs_n
    tl.store(d_gate + offs, dg.to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + offs, (dy * silu).to(d_up.dtype.element_ty), mask=inside)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..., F]."""
    out = gate.new_empty(gate.shape)
    _launch(forward_kernel, _FORWARD_TILE, (gate, up), (out,))
    return out


def backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up [..., F]."""
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _launch(backward_kernel, _BACKWARD_TILE, (gradient, gate, up), (d_gate, d_up))
    return d_gate, d_up


def _launch(
    kernel: triton.JITFunction, tile: int, inputs: tuple[Tensor, ...], results: tuple[Tensor, ...]
) -> None:
    """A kernel whose arguments are inputs, results, M, N and the strides of inputs."""
    rows = [as_rows(x) for x in inputs]
    m, n = rows[0].shape
    columns = min(_COLUMNS, triton.next_power_of_2(n))
    block = tile // columns
    with torch.cuda.device_of(inputs[0]):
        kernel[(triton.cdiv(m, block), triton.cdiv(n, columns))](
            *rows,
            *results,
            m,
            n,
            *(x.stride(0) for x in rows),
            BLOCK_M=block,
            BLOCK_N=columns,
            **_OPTIONS,
        )
