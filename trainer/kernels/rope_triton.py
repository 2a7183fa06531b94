"""Rotary positions in Triton: queries and keys in one launch, each value read and written once.

A program rotates all pairs of channels of a few positions and heads, of the queries or of the keys;
it reads the angles of its positions once for all its heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.launching import ENABLE_FP_FUSION

_TILE = 2048
"""Pairs of a program."""
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": ENABLE_FP_FUSION}


@triton.jit
def _rotate(
    x: tl.tensor,
    out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    pid_h: tl.tensor,
    S: tl.tensor,
    H: tl.tensor,
    D: tl.tensor,
    half: tl.tensor,
    stride_s: tl.tensor,
    stride_h: tl.tensor,
    stride_tb: tl.tensor,
    stride_ts: tl.tensor,
    INVERSE: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One tile [BLOCK_S, BLOCK_H, BLOCK_D] of pairs, and the channels that stay."""
    offs_s = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S))[:, None, None]
    offs_d = tl.arange(0, BLOCK_D)[None, None, :]
    inside = (offs_s < S) & (offs_d < half)
    # Positions times a stride may exceed 32 bits.
    rows = offs_s.to(tl.int64)
    # Angles that all rows of the batch share have a stride of 0 between them.
    angles = tl.program_id(2) * stride_tb + rows * stride_ts + offs_d
    c = tl.load(cos + angles, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angles, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    offs_h = (pid_h * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
    present = (offs_s < S) & (offs_h < H)
    x += rows * stride_s + offs_h.to(tl.int64) * stride_h
    # Results are contiguous [B, S, H, D].
    out += ((tl.program_id(2).to(tl.int64) * S + rows) * H + offs_h) * D
    inside = present & (offs_d < half)
    # Both halves are read before either is written: out may be x itself.
    x1 = tl.load(x + offs_d, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + half + offs_d, mask=inside, other=0.0).to(tl.float32)
    y = x1 * c - x2 * s
    tl.store(out + offs_d, y.to(out.dtype.element_ty), mask=inside)
    y = x2 * c + x1 * s
    tl.store(out + half + offs_d, y.to(out.dtype.element_ty), mask=inside)
    if REST > 0:
        offs_rest = 2 * half + tl.arange(0, REST)[None, None, :]
        inside = present & (offs_rest < D)
        tl.store(out + offs_rest, tl.load(x + offs_rest, mask=inside, other=0.0), mask=inside)


@triton.jit
def rotate_kernel(
    q: tl.tensor,
    k: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    S: tl.int32,
    H: tl.int32,
    KV_H: tl.int32,
    D: tl.int32,
    half: tl.int32,
    stride_qb: tl.int64,
    stride_qs: tl.int32,
    stride_qh: tl.int32,
    stride_kb: tl.int64,
    stride_ks: tl.int32,
    stride_kh: tl.int32,
    stride_tb: tl.int64,
    stride_ts: tl.int32,
    INVERSE: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """BLOCK_S positions and BLOCK_H heads; blocks of keys follow the blocks of queries."""
    pid_h = tl.program_id(1)
    q_blocks = tl.cdiv(H, BLOCK_H)
    x = q + tl.program_id(2) * stride_qb
    out = q_out
    stride_s = stride_qs
    stride_h = stride_qh
    if pid_h >= q_blocks:
        pid_h -= q_blocks
        x = k + tl.program_id(2) * stride_kb
        out = k_out
        stride_s = stride_ks
        stride_h = stride_kh
        H = KV_H
    _rotate(
        x,
        out,
        cos,
        sin,
        pid_h,
        S,
        H,
        D,
        half,
        stride_s,
        stride_h,
        stride_tb,
        stride_ts,
        INVERSE,
        REST,
        BLOCK_S,
        BLOCK_H,
        BLOCK_D,
    )


def forward(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Both rotated, contiguous."""
    results = query.new_empty(query.shape), key.new_empty(key.shape)
    _launch(query, key, cos, sin, inverse, results)
    return results


def forward_(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates both, which are contiguous, in place."""
    _launch(query, key, cos, sin, False, (query, key))


def _launch(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    results: tuple[Tensor, Tensor],
) -> None:
    batch, length, heads, head_dim = query.shape
    key_heads, half = key.shape[2], cos.shape[-1]
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    tile = _tile(heads, head_dim, half)
    blocks = triton.cdiv(heads, tile["BLOCK_H"]) + triton.cdiv(key_heads, tile["BLOCK_H"])
    with torch.cuda.device_of(query):
        rotate_kernel[(triton.cdiv(length, tile["BLOCK_S"]), blocks, batch)](
            query,
            key,
            cos,
            sin,
            *results,
            length,
            heads,
            key_heads,
            head_dim,
            half,
            *query.stride()[:3],
            *key.stride()[:3],
            0 if cos.dim() == 2 else cos.stride(0),
            cos.stride(-2),
            INVERSE=inverse,
            **tile,
            **_OPTIONS,
        )


def _tile(heads: int, head_dim: int, half: int) -> dict[str, int]:
    """All pairs of a head, then as many heads as fit, then positions."""
    pairs = triton.next_power_of_2(half)
    rest = head_dim - 2 * half
    block_heads = min(triton.next_power_of_2(heads), max(1, _TILE // pairs))
    return {
        "REST": triton.next_power_of_2(rest) if rest else 0,
        "BLOCK_S": max(1, _TILE // (block_heads * pairs)),
        "BLOCK_H": block_heads,
        "BLOCK_D": pairs,
    }
