"""Gradients of masked causal attention in Triton: two kernels, neither of which shares a result.

FlashAttention-2, arXiv 2307.08691, algorithm 2, without its atomics. The query kernel first finds
delta = rowsum(dO * O / z) and with it the gradient of the mask; the key kernel walks the query
heads of its group. With P scaled by z all else is the backward pass of plain attention:
dP = dO V^T, dS = P * (dP - delta), dQ = dS K, dK = dS^T Q, dV = P^T dO.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.attention import Inputs, first_keys, score_scale
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

_QUERY_TILES = {
    80: (Tile(64, 64, 8, 2), Tile(64, 16, 8, 2)),
    90: (Tile(64, 64, 4, 2), Tile(128, 32, 8, 2)),
    100: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
    120: (Tile(64, 32, 8, 2), Tile(64, 16, 8, 2)),
    FP32: (Tile(32, 32, 8, 2), Tile(32, 16, 8, 2)),
}
_KEY_TILES = {
    80: (Tile(32, 64, 8, 2), Tile(16, 64, 8, 2)),
    90: (Tile(32, 128, 8, 2), Tile(16, 64, 8, 2, together=False)),
    100: (Tile(32, 64, 8, 2), Tile(32, 32, 8, 2)),
    FP32: (Tile(16, 64, 8, 2), Tile(16, 32, 8, 2)),
}


@triton.jit
def _query_gradient(
    tile: tl.tuple,
    sources: tl.tuple,
    limits: tl.tuple,
    S: tl.int32,
    scale: tl.float32,
    HAS_BOUNDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Gradient of a tile of queries, but for the mask; 0 without keys."""
    q, do, lse, delta = tile
    key, value, first, stride_ks, stride_vs = sources
    start_m, low, diagonal, high = limits
    offs_m = start_m + tl.arange(0, BLOCK_M)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in range(low, high, BLOCK_N):
        k = load_rows(key, start_n, stride_ks, S, BLOCK_N, HEAD_DIM, BLOCK_D)
        v = load_rows(value, start_n, stride_vs, S, BLOCK_N, HEAD_DIM, BLOCK_D)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        # Of keys that are not seen this may be infinite; the next lines replace it by 0.
        p = tl.exp2(qk * (scale * LOG2_E) - lse[:, None])
        if HAS_BOUNDS or start_n >= diagonal:
            offs_n = start_n + tl.arange(0, BLOCK_N)
            seen = visible(offs_m, offs_n, first, S, HAS_BOUNDS)
            p = tl.where(seen, p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq * scale


@triton.jit
def _delta(o: tl.tensor, do: tl.tensor, z: tl.tensor) -> tl.tensor:
    """rowsum(dO * O / z): the output was scaled by the mask z, and is 0 where that is 0."""
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    return delta / tl.where(z == 0.0, 1.0, z)


@triton.jit
def backward_query_kernel(
    d_output: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    head_mask: tl.tensor,
    first: tl.tensor,
    output: tl.tensor,
    logsumexp: tl.tensor,
    d_query: tl.tensor,
    deltas: tl.tensor,
    partial: tl.tensor,
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
    """Gradient of BLOCK_M queries, their delta, and their part of the mask's [B * blocks, H].
    Output and gradients are contiguous [B, S, H, D], logarithms and deltas [B, H, S]."""
    block, off_b, off_h = position(S, H, BLOCK_M)
    start_m = (tl.cdiv(S, BLOCK_M) - 1 - block) * BLOCK_M  # rows with the most keys come first
    z = load_mask(head_mask, off_h, HAS_MASK)
    query += off_b * stride_qb + off_h * stride_qh
    key += off_b * stride_kb + off_h // GROUP * stride_kh
    value += off_b * stride_vb + off_h // GROUP * stride_vh
    off_bs = off_b.to(tl.int64) * S
    offs = (off_bs * H + off_h) * HEAD_DIM
    stride_os = H * HEAD_DIM
    do = load_rows(d_output + offs, start_m, stride_os, S, BLOCK_M, HEAD_DIM, BLOCK_D)
    o = load_rows(output + offs, start_m, stride_os, S, BLOCK_M, HEAD_DIM, BLOCK_D)
    delta = _delta(o, do, z)
    if HAS_MASK:
        tl.store(partial + (off_b * tl.cdiv(S, BLOCK_M) + block) * H + off_h, tl.sum(delta, 0))
    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows = off_bs * H + off_h.to(tl.int64) * S + offs_m
    tl.store(deltas + rows, delta, mask=offs_m < S)
    lse = tl.load(logsumexp + rows, mask=offs_m < S, other=0.0)
    q = load_rows(query, start_m, stride_qs, S, BLOCK_M, HEAD_DIM, BLOCK_D)
    tile = (q, do, lse, delta)
    limits = key_limits(first + off_bs, z, start_m, S, HAS_BOUNDS, BLOCK_M, BLOCK_N)
    sources = (key, value, first + off_bs, stride_ks, stride_vs)
    dq = _query_gradient(
        tile, sources, limits, S, scale, HAS_BOUNDS, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D
    )
    store_rows(d_query + offs, dq * z, start_m, stride_os, S, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _query_limits(
    last: tl.tensor,
    start_n: tl.int32,
    S: tl.int32,
    HAS_BOUNDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Where the queries that see the keys from `start_n` begin, where those that see all of them do
    unless there are bounds, where they end, and where all queries end."""
    low = start_n // BLOCK_M * BLOCK_M
    high = S
    if HAS_BOUNDS:
        # Last queries never decrease: that of the last key ends last.
        high = tl.load(last + tl.minimum(start_n + BLOCK_N, S) - 1) + 1
    diagonal = tl.minimum(low + (BLOCK_M if BLOCK_M > BLOCK_N else BLOCK_N), high)
    return low, diagonal, high, S


@triton.jit
def _last_seen(
    last: tl.tensor, offs_n: tl.tensor, S: tl.int32, HAS_BOUNDS: tl.constexpr
) -> tl.tensor:
    """The last query that sees each key, if there are bounds."""
    seen = offs_n
    if HAS_BOUNDS:
        seen = tl.load(last + offs_n, mask=offs_n < S, other=0)
    return seen


@triton.jit
def _key_gradients(
    tile: tl.tuple,
    sources: tl.tuple,
    limits: tl.tuple,
    scale: tl.float32,
    HAS_MASK: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    OF_KEYS: tl.constexpr,
    OF_VALUES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Gradients of a tile of keys, but for the scale, and of values; 0 where not asked for.
    Scores are transposed: [keys, queries]."""
    k, v, offs_n, last_m = tile
    d_outputs, queries, stride_os, stride_qs, stride_qh = sources[0]
    logsumexp, deltas, head_mask = sources[1]
    first_head, off_bh = sources[2]
    low, diagonal, high, S = limits
    BLOCK_D: tl.constexpr = k.shape[1]
    dk = tl.zeros(k.shape, tl.float32)
    dv = tl.zeros(k.shape, tl.float32)
    # One program sums over the query heads that read its key head: no atomics.
    for off_h in range(first_head, first_head + GROUP):
        z = load_mask(head_mask, off_h, HAS_MASK)
        d_output = d_outputs + off_h * HEAD_DIM
        query = queries + stride_qh * off_h
        rows = (off_bh + off_h).to(tl.int64) * S
        # A head whose mask is 0 has no queries.
        for start_m in range(tl.where(z == 0.0, high, low), high, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            q = load_rows(query, start_m, stride_qs, S, BLOCK_M, HEAD_DIM, BLOCK_D)
            do = load_rows(d_output, start_m, stride_os, S, BLOCK_M, HEAD_DIM, BLOCK_D)
            inside = offs_m < S
            lse = tl.load(logsumexp + rows + offs_m, mask=inside, other=0.0)
            delta = tl.load(deltas + rows + offs_m, mask=inside, other=0.0)
            qk = tl.dot(k, tl.trans(q), input_precision="ieee")
            # Rows past S need no mask: their do and delta are 0.
            p = tl.exp2(qk * (scale * LOG2_E) - lse[None, :]) * z
            if HAS_BOUNDS or start_m < diagonal:
                seen = offs_n[:, None] <= offs_m[None, :]
                if HAS_BOUNDS:
                    seen = seen & (offs_m[None, :] <= last_m[:, None])
                p = tl.where(seen, p, 0.0)
            if OF_VALUES:
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
            if OF_KEYS:
                dp = tl.dot(v, tl.trans(do), input_precision="ieee")
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def backward_key_kernel(
    d_output: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    head_mask: tl.tensor,
    last: tl.tensor,
    logsumexp: tl.tensor,
    deltas: tl.tensor,
    d_key: tl.tensor,
    d_value: tl.tensor,
    S: tl.int32,
    KV_H: tl.int32,
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
    TOGETHER: tl.constexpr,
) -> None:
    """Gradients of BLOCK_N keys and values of one key head, over the GROUP heads that read it."""
    block, off_b, off_h = position(S, KV_H, BLOCK_N)
    start_n = block * BLOCK_N
    off_bs = off_b.to(tl.int64) * S
    # Of contiguous [B, S, KV_H, D]; the GROUP-fold for query heads.
    stride_s = KV_H * HEAD_DIM
    key += off_b * stride_kb + off_h * stride_kh
    value += off_b * stride_vb + off_h * stride_vh
    k = load_rows(key, start_n, stride_ks, S, BLOCK_N, HEAD_DIM, BLOCK_D)
    v = load_rows(value, start_n, stride_vs, S, BLOCK_N, HEAD_DIM, BLOCK_D)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    last += off_bs
    tile = (k, v, offs_n, _last_seen(last, offs_n, S, HAS_BOUNDS))
    limits = _query_limits(last, start_n, S, HAS_BOUNDS, BLOCK_M, BLOCK_N)
    d_output += off_bs * stride_s * GROUP
    query += off_b * stride_qb
    rows = (d_output, query, stride_s * GROUP, stride_qs, stride_qh)
    src = (rows, (logsumexp, deltas, head_mask), (off_h * GROUP, off_b * KV_H * GROUP))
    dk, dv = _key_gradients(
        tile, src, limits, scale, HAS_MASK, HAS_BOUNDS, GROUP, BLOCK_M, HEAD_DIM, True, TOGETHER
    )
    offs = off_bs * stride_s + off_h * HEAD_DIM
    store_rows(d_key + offs, dk * scale, start_n, stride_s, S, BLOCK_N, HEAD_DIM, BLOCK_D)
    if not TOGETHER:
        _, dv = _key_gradients(
            tile, src, limits, scale, HAS_MASK, HAS_BOUNDS, GROUP, BLOCK_M, HEAD_DIM, False, True
        )
    store_rows(d_value + offs, dv, start_n, stride_s, S, BLOCK_N, HEAD_DIM, BLOCK_D)


def backward(
    gradient: Tensor, output: Tensor, logsumexp: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and the mask (empty [0] without one)."""
    inputs = Inputs(*arguments)
    query, key, value, head_mask, documents, window, scale = inputs
    batch, length, heads, _ = query.shape
    key_heads = key.shape[2]
    first = first_keys(query, documents, window)
    mask = query if head_mask is None else head_mask.contiguous()
    strides = [n for x in (query, key, value) for n in x.stride()[:3]]
    pointers = (gradient.contiguous(), query, key, value, mask)
    d_query, d_key, d_value = (x.new_empty(x.shape) for x in (query, key, value))
    output, logsumexp = output.contiguous(), logsumexp.contiguous()
    deltas = torch.empty_like(logsumexp)
    options = constants(choose(_QUERY_TILES, query), inputs, first is not None)
    blocks = triton.cdiv(length, options["BLOCK_M"])
    partial = deltas.new_empty((0 if head_mask is None else batch * blocks, heads))
    with torch.cuda.device_of(query):
        backward_query_kernel[(blocks * batch * heads,)](
            *pointers,
            query if first is None else first,
            output,
            logsumexp,
            d_query,
            deltas,
            deltas if head_mask is None else partial,
            length,
            heads,
            *strides,
            score_scale(query, scale),
            **options,
        )
        tile = choose(_KEY_TILES, query)
        options = constants(tile, inputs, first is not None)
        backward_key_kernel[(triton.cdiv(length, options["BLOCK_N"]) * batch * key_heads,)](
            *pointers,
            query if first is None else _last_queries(first),
            logsumexp,
            deltas,
            d_key,
            d_value,
            length,
            key_heads,
            *strides,
            score_scale(query, scale),
            **options,
            TOGETHER=tile.together,
        )
    return d_query, d_key, d_value, partial.sum(0)[: 0 if head_mask is None else heads]


def _last_queries(first: Tensor) -> Tensor:
    """[B, S] int32, the last query that sees each key, from the first key of each query."""
    position = torch.arange(first.shape[1], dtype=torch.int32, device=first.device)
    keys = position.expand_as(first).contiguous()
    return torch.searchsorted(first, keys, right=True, out_int32=True) - 1
