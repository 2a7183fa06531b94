"""Causal attention with a mask per head in Triton: forward, and where the backward pass is.

FlashAttention-2, arXiv 2307.08691, algorithm 1, with the mask in the epilogue. A head whose mask is
0 walks no tiles, and neither do rows over keys of other documents or outside the window.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.attention import Inputs, first_keys, score_scale
from trainer.kernels.attention_backward_triton import backward as backward
from trainer.kernels.attention_tiles import (
    FP32,
    LOG2_E,
    choose,
    constants,
    key_limits,
    load_mask,
    load_rows,
    position,
    store_rows,
    visible,
)
from trainer.kernels.launching import Tile

_TILES = {
    80: (Tile(128, 32, 8, 3), Tile(64, 32, 8, 2)),
    90: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    100: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
    FP32: (Tile(64, 16, 8, 2), Tile(32, 16, 8, 2)),
}
# Finite, so that the difference of two of them is a number.
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _attend(
    q: tl.tensor,
    sources: tl.tuple,
    limits: tl.tuple,
    S: tl.int32,
    scale: tl.float32,
    HAS_BOUNDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Unmasked output and logsumexp (base 2) of a tile of queries, both 0 without keys."""
    key, value, first, stride_ks, stride_vs = sources
    start_m, low, diagonal, high = limits
    offs_m = start_m + tl.arange(0, BLOCK_M)
    # exp(x) = 2^(x log2 e), and a GPU computes powers of 2.
    scale = scale * LOG2_E
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    m_i = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    for start_n in range(low, high, BLOCK_N):
        k = load_rows(key, start_n, stride_ks, S, BLOCK_N, HEAD_DIM, BLOCK_D)
        # Products of fp32 stay fp32; of others this says nothing.
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        if HAS_BOUNDS or start_n >= diagonal:
            offs_n = start_n + tl.arange(0, BLOCK_N)
            seen = visible(offs_m, offs_n, first, S, HAS_BOUNDS)
            qk = tl.where(seen, qk, float("-inf"))
        # m_i stays finite in rows that see nothing yet, so that their p is 0 and not NaN.
        m_new = tl.maximum(m_i, tl.max(qk, 1) * scale)
        p = tl.exp2(qk * scale - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = load_rows(value, start_n, stride_vs, S, BLOCK_N, HEAD_DIM, BLOCK_D)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m_i = m_new
    # Rows without keys: of heads whose mask is 0.
    m_i = tl.where(l_i == 0.0, 0.0, m_i)
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    # Base 2, as the backward pass computes: converting twice would round large scores twice.
    return acc / l_i[:, None], m_i + tl.log2(l_i)


@triton.jit
def forward_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    head_mask: tl.tensor,
    first: tl.tensor,
    output: tl.tensor,
    logsumexp: tl.tensor,
    S: tl.int32,
    H: tl.int32,
    stride_qb: tl.int64,
    stride_qs: tl.int32,
    stride_qh: tl.int64,
    stride_kb: tl.int64,
    stride_ks: tl.int32,
    stride_kh: tl.int64,
    stride_vb: tl.int64,
    stride_vs: tl.int32,
    stride_vh: tl.int64,
    scale: tl.float32,
    HAS_MASK: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Output and logsumexp of BLOCK_M rows of one head."""
    block, off_b, off_h = position(S, H, BLOCK_M)
    # The last rows have the most keys and come first.
    start_m = (tl.cdiv(S, BLOCK_M) - 1 - block) * BLOCK_M
    z = load_mask(head_mask, off_h, HAS_MASK)
    query += off_b * stride_qb + off_h * stride_qh
    key += off_b * stride_kb + off_h // GROUP * stride_kh
    value += off_b * stride_vb + off_h // GROUP * stride_vh
    first += off_b.to(tl.int64) * S
    q = load_rows(query, start_m, stride_qs, S, BLOCK_M, HEAD_DIM, BLOCK_D)
    sources = (key, value, first, stride_ks, stride_vs)
    limits = key_limits(first, z, start_m, S, HAS_BOUNDS, BLOCK_M, BLOCK_N)
    o, lse = _attend(q, sources, limits, S, scale, HAS_BOUNDS, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    # logsumexp is [B, H, S], output [B, S, H, D].
    logsumexp += (off_b * H + off_h).to(tl.int64) * S
    tl.store(logsumexp + offs_m, lse, mask=offs_m < S)
    output += (off_b.to(tl.int64) * S * H + off_h) * HEAD_DIM
    stride_os = H * HEAD_DIM
    store_rows(output, o * z, start_m, stride_os, S, BLOCK_M, HEAD_DIM, BLOCK_D)


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output [B, S, H, D] and logsumexp [B, H, S] to base 2, 0 of heads whose mask is 0."""
    inputs = Inputs(*arguments)
    query, key, value, head_mask, documents, window, scale = inputs
    batch, length, heads, _ = query.shape
    output = query.new_empty(query.shape)
    logsumexp = query.new_empty((batch, heads, length), dtype=torch.float32)
    first = first_keys(query, documents, window)
    options = constants(choose(_TILES, query), inputs, first is not None)
    with torch.cuda.device_of(query):
        forward_kernel[(triton.cdiv(length, options["BLOCK_M"]) * batch * heads,)](
            query,
            key,
            value,
            query if head_mask is None else head_mask.contiguous(),
            query if first is None else first,
            output,
            logsumexp,
            length,
            heads,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            score_scale(query, scale),
            **options,
        )
    return output, logsumexp
