"""Causal attention with a mask per head in Triton: forward, and where the backward pass is.

FlashAttention-2, arXiv 2307.08691, algorithm 1, with the mask in the epilogue. A head whose mask is
0 walks no tiles, and neither do rows over keys of other documents or outside the window.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.attention import first_keys
from trainer.kernels.attention_backward_triton import backward as backward
from trainer.kernels.attention_tiles import (
    BOUND_BYTES,
    DOT_FLOPS,
    FP32,
    LOG2_E,
    MASK_BYTES,
    ROWS_BYTES,
    STATISTIC_BYTES,
    choose,
    compiled_constants,
    compiled_tiles,
    constants,
    key_limits,
    load_mask,
    load_rows,
    position,
    store_rows,
    visible,
)
from trainer.kernels.compilation import Compilation, Tile

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
    queries: tl.tensor,
    sources: tl.tuple,
    limits: tl.tuple,
    length: tl.int32,
    scale: tl.float32,
    HAS_BOUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Unmasked output and logsumexp (base 2) of a tile of queries, both 0 without keys."""
    key, value, first, key_stride, value_stride = sources
    row_start, low, diagonal, high = limits
    row = row_start + tl.arange(0, ROWS)
    scale = scale * LOG2_E
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    denominator = tl.zeros((ROWS,), tl.float32)
    largest = tl.full((ROWS,), _LOWEST, tl.float32)
    for start in range(low, high, COLUMNS):
        keys = load_rows(key, start, key_stride, length, COLUMNS, HEAD_DIM, WIDTH)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if HAS_BOUNDS or start >= diagonal:
            column = start + tl.arange(0, COLUMNS)
            seen = visible(row, column, first, length, HAS_BOUNDS)
            scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - larger[:, None])
        shrink = tl.exp2(largest - larger)
        denominator = denominator * shrink + tl.sum(weights, 1)
        values = load_rows(value, start, value_stride, length, COLUMNS, HEAD_DIM, WIDTH)
        total = total * shrink[:, None]
        total = tl.dot(weights.to(values.dtype), values, total, input_precision="ieee")
        largest = larger
    largest = tl.where(denominator == 0.0, 0.0, largest)
    denominator = tl.where(denominator == 0.0, 1.0, denominator)
    return total / denominator[:, None], largest + tl.log2(denominator)


@triton.jit
def forward_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    head_mask: tl.tensor,
    first: tl.tensor,
    output: tl.tensor,
    logsumexp: tl.tensor,
    length: tl.int32,
    heads: tl.int32,
    query_batch_stride: tl.int64,
    query_stride: tl.int32,
    query_head_stride: tl.int64,
    key_batch_stride: tl.int64,
    key_stride: tl.int32,
    key_head_stride: tl.int64,
    value_batch_stride: tl.int64,
    value_stride: tl.int32,
    value_head_stride: tl.int64,
    scale: tl.float32,
    HAS_MASK: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Output and logsumexp of ROWS rows of one head; blocks with the most keys come first."""
    block, batch, head = position(length, heads, ROWS)
    start = (tl.cdiv(length, ROWS) - 1 - block) * ROWS
    mask = load_mask(head_mask, head, HAS_MASK)
    query += batch * query_batch_stride + head * query_head_stride
    key += batch * key_batch_stride + head // GROUP * key_head_stride
    value += batch * value_batch_stride + head // GROUP * value_head_stride
    first += batch.to(tl.int64) * length
    queries = load_rows(query, start, query_stride, length, ROWS, HEAD_DIM, WIDTH)
    sources = (key, value, first, key_stride, value_stride)
    limits = key_limits(first, mask, start, length, HAS_BOUNDS, ROWS, COLUMNS)
    total, logarithm = _attend(
        queries, sources, limits, length, scale, HAS_BOUNDS, ROWS, COLUMNS, HEAD_DIM, WIDTH
    )
    row = start + tl.arange(0, ROWS)
    logsumexp += (batch * heads + head).to(tl.int64) * length
    tl.store(logsumexp + row, logarithm, mask=row < length)
    output += (batch.to(tl.int64) * length * heads + head) * HEAD_DIM
    stride = heads * HEAD_DIM
    store_rows(output, total * mask, start, stride, length, ROWS, HEAD_DIM, WIDTH)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_mask: Tensor | None,
    documents: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, S, H, D] and logsumexp [B, H, S] to base 2, 0 of heads whose mask is 0."""
    batch, length, heads, _ = query.shape
    output = query.new_empty(query.shape)
    logsumexp = query.new_empty((batch, heads, length), dtype=torch.float32)
    first = first_keys(query, documents, window)
    tile = choose(_TILES, query)
    options = constants(tile, query, key, head_mask, first is not None)
    with torch.cuda.device_of(query):
        forward_kernel[(triton.cdiv(length, options["ROWS"]) * batch * heads,)](
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
            scale,
            **options,
            **tile.options(),
        )
    return output, logsumexp


_INTEGERS = ("length", "heads", "query_stride", "key_stride", "value_stride")
_WIDE_INTEGERS = tuple(
    f"{name}_{kind}_stride" for name in ("query", "key", "value") for kind in ("batch", "head")
)
_BYTES = 4 * ROWS_BYTES + STATISTIC_BYTES + BOUND_BYTES + MASK_BYTES

COMPILATIONS = tuple(
    Compilation(
        name="attention.forward",
        module=__name__,
        function="forward_kernel",
        signature={
            **dict.fromkeys(("query", "key", "value", "output"), "*bf16"),
            **dict.fromkeys(("head_mask", "logsumexp"), "*fp32"),
            "first": "*i32",
            **dict.fromkeys(_INTEGERS, "i32"),
            **dict.fromkeys(_WIDE_INTEGERS, "i64"),
            "scale": "fp32",
        },
        aligned=(*_INTEGERS, *_WIDE_INTEGERS),
        constants=compiled_constants(tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        architectures=(number,),
        bytes_moved=_BYTES,
        minimum_bytes=_BYTES,
        flops=2 * DOT_FLOPS,
        shape="query, key and value [2, 4096, 32, 128] bf16, mask fp32",
    )
    for number, tile in compiled_tiles(_TILES).items()
)
