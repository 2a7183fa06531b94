"""Gradients of masked causal attention in Triton: two kernels, neither of which shares a result.

FlashAttention-2, arXiv 2307.08691, algorithm 2, without its atomics. The query kernel first finds
delta = rowsum(dO * O / z) and with it the gradient of the mask; the key kernel walks the query
heads of its group. With P scaled by z all else is the backward pass of plain attention.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.attention import first_keys
from trainer.kernels.attention_tiles import (
    BOUND_BYTES,
    DOT_FLOPS,
    LOG2_E,
    MASK_BYTES,
    ROWS_BYTES,
    STATISTIC_BYTES,
    compiled_constants,
    constants,
    load_rows,
    sees,
    store_rows,
)
from trainer.kernels.compilation import ENABLE_FP_FUSION, TOKENS, Compilation

_QUERY_TILE = {"ROWS": 64, "COLUMNS": 64}
_KEY_TILE = {"ROWS": 32, "COLUMNS": 64}
_OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": ENABLE_FP_FUSION}


@triton.jit
def _query_tiles(
    d_queries: tl.tensor,
    queries: tl.tensor,
    gradients: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    row: tl.tensor,
    first: tl.tensor,
    logarithm: tl.tensor,
    along: tl.tensor,
    begin: tl.int32,
    end: tl.int32,
    length: tl.int32,
    key_stride: tl.int32,
    value_stride: tl.int32,
    scale: tl.float32,
    MASKED: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Adds what the keys from `begin` to `end` give to the gradient of the queries."""
    for start in range(begin, end, COLUMNS):
        keys = load_rows(key, start, key_stride, length, COLUMNS, HEAD_DIM, WIDTH)
        values = load_rows(value, start, value_stride, length, COLUMNS, HEAD_DIM, WIDTH)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        weights = tl.exp2(scores * scale - logarithm[:, None])
        if MASKED:
            column = start + tl.arange(0, COLUMNS)
            seen = sees(row[:, None], column[None, :], first[:, None], HAS_BOUNDS)
            weights = tl.where(seen, weights, 0.0)
        d_weights = tl.dot(gradients, tl.trans(values), input_precision="ieee")
        d_scores = weights * (d_weights - along[:, None])
        d_queries = tl.dot(d_scores.to(keys.dtype), keys, d_queries, input_precision="ieee")
    return d_queries


@triton.jit
def backward_query_kernel(
    gradient: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    head_mask: tl.tensor,
    first: tl.tensor,
    output: tl.tensor,
    logsumexp: tl.tensor,
    d_query: tl.tensor,
    delta: tl.tensor,
    partial: tl.tensor,
    length: tl.int32,
    heads: tl.int32,
    gradient_batch_stride: tl.int64,
    gradient_stride: tl.int32,
    gradient_head_stride: tl.int64,
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
    """Gradient of ROWS rows of one head's queries, their delta [B, H, S], and their part of the
    mask's gradient in partial [B * blocks, H]."""
    blocks = tl.cdiv(length, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks
    start = block * ROWS
    pair = tl.program_id(0) // blocks
    batch, head = pair // heads, pair % heads
    row = start + tl.arange(0, ROWS)
    here = pair.to(tl.int64) * length
    dense = batch.to(tl.int64) * length * heads * HEAD_DIM + head * HEAD_DIM
    gradient += batch * gradient_batch_stride + head * gradient_head_stride
    query += batch * query_batch_stride + head * query_head_stride
    key += batch * key_batch_stride + head // GROUP * key_head_stride
    value += batch * value_batch_stride + head // GROUP * value_head_stride
    stride = heads * HEAD_DIM
    gradients = load_rows(gradient, start, gradient_stride, length, ROWS, HEAD_DIM, WIDTH)
    outputs = load_rows(output + dense, start, stride, length, ROWS, HEAD_DIM, WIDTH)
    along = tl.sum(outputs.to(tl.float32) * gradients.to(tl.float32), 1)
    low = 0
    high = tl.minimum(start + ROWS, length)
    diagonal = start // COLUMNS * COLUMNS
    first_of_row = row
    if HAS_BOUNDS:
        first += batch.to(tl.int64) * length
        first_of_row = tl.load(first + row, mask=row < length, other=0)
        low = tl.load(first + start) // COLUMNS * COLUMNS
    if HAS_MASK:
        mask = tl.load(head_mask + head)
        low = tl.where(mask == 0.0, high, low)
        along = along / tl.where(mask == 0.0, 1.0, mask)
        tl.store(partial + (batch * blocks + block) * heads + head, tl.sum(along, 0))
    tl.store(delta + here + row, along, mask=row < length)
    logarithm = tl.load(logsumexp + here + row, mask=row < length, other=0.0) * LOG2_E
    queries = load_rows(query, start, query_stride, length, ROWS, HEAD_DIM, WIDTH)
    d_queries = tl.zeros((ROWS, WIDTH), tl.float32)
    for MASKED in tl.static_range(2):
        d_queries = _query_tiles(
            d_queries,
            queries,
            gradients,
            key,
            value,
            row,
            first_of_row,
            logarithm,
            along,
            tl.maximum(diagonal, low) if MASKED else low,
            high if MASKED else diagonal,
            length,
            key_stride,
            value_stride,
            scale * LOG2_E,
            HAS_BOUNDS or MASKED == 1,
            HAS_BOUNDS,
            COLUMNS,
            HEAD_DIM,
            WIDTH,
        )
    if HAS_MASK:
        scale = scale * mask
    store_rows(d_query + dense, d_queries * scale, start, stride, length, ROWS, HEAD_DIM, WIDTH)


@triton.jit
def _key_tiles(
    d_keys: tl.tensor,
    d_values: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    gradient: tl.tensor,
    query: tl.tensor,
    first: tl.tensor,
    logsumexp: tl.tensor,
    delta: tl.tensor,
    column: tl.tensor,
    mask: tl.float32,
    begin: tl.int32,
    end: tl.int32,
    length: tl.int32,
    gradient_stride: tl.int32,
    query_stride: tl.int32,
    scale: tl.float32,
    MASKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Adds what the queries from `begin` to `end` of one head give to the gradients of keys and
    values. Tiles are transposed: [keys, queries]."""
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        queries = load_rows(query, start, query_stride, length, ROWS, HEAD_DIM, WIDTH)
        gradients = load_rows(gradient, start, gradient_stride, length, ROWS, HEAD_DIM, WIDTH)
        logarithm = tl.load(logsumexp + row, mask=row < length, other=0.0) * LOG2_E
        along = tl.load(delta + row, mask=row < length, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision="ieee")
        weights = tl.exp2(scores * scale - logarithm[None, :])
        if MASKED:
            first_of_row = row
            if HAS_BOUNDS:
                first_of_row = tl.load(first + row, mask=row < length, other=0)
            seen = sees(row[None, :], column[:, None], first_of_row[None, :], HAS_BOUNDS)
            weights = tl.where(seen, weights, 0.0)
        if HAS_MASK:
            weights = weights * mask
        rounded = weights.to(gradients.dtype)
        d_values = tl.dot(rounded, gradients, d_values, input_precision="ieee")
        d_weights = tl.dot(values, tl.trans(gradients), input_precision="ieee")
        d_scores = weights * (d_weights - along[None, :])
        d_keys = tl.dot(d_scores.to(queries.dtype), queries, d_keys, input_precision="ieee")
    return d_keys, d_values


@triton.jit
def backward_key_kernel(
    gradient: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    head_mask: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    logsumexp: tl.tensor,
    delta: tl.tensor,
    d_key: tl.tensor,
    d_value: tl.tensor,
    length: tl.int32,
    key_heads: tl.int32,
    gradient_batch_stride: tl.int64,
    gradient_stride: tl.int32,
    gradient_head_stride: tl.int64,
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
    """Gradients of COLUMNS keys and values of one key head, over the GROUP heads that read it."""
    blocks = tl.cdiv(length, COLUMNS)
    start = tl.program_id(0) % blocks * COLUMNS
    pair = tl.program_id(0) // blocks
    batch, key_head = pair // key_heads, pair % key_heads
    column = start + tl.arange(0, COLUMNS)
    key += batch * key_batch_stride + key_head * key_head_stride
    value += batch * value_batch_stride + key_head * value_head_stride
    gradient += batch * gradient_batch_stride
    query += batch * query_batch_stride
    keys = load_rows(key, start, key_stride, length, COLUMNS, HEAD_DIM, WIDTH)
    values = load_rows(value, start, value_stride, length, COLUMNS, HEAD_DIM, WIDTH)
    low = start // ROWS * ROWS
    high = length
    if HAS_BOUNDS:
        first += batch.to(tl.int64) * length
        final = tl.minimum(start + COLUMNS, length) - 1
        high = tl.load(last + batch.to(tl.int64) * length + final) + 1
    diagonal = tl.minimum(low + (ROWS if ROWS > COLUMNS else COLUMNS), high)
    d_keys = tl.zeros((COLUMNS, WIDTH), tl.float32)
    d_values = tl.zeros((COLUMNS, WIDTH), tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        here = (batch * key_heads * GROUP + head).to(tl.int64) * length
        begin = low
        mask = 1.0
        if HAS_MASK:
            mask = tl.load(head_mask + head)
            begin = tl.where(mask == 0.0, high, low)
        for PART in tl.static_range(2):
            d_keys, d_values = _key_tiles(
                d_keys,
                d_values,
                keys,
                values,
                gradient + head * gradient_head_stride,
                query + head * query_head_stride,
                first,
                logsumexp + here,
                delta + here,
                column,
                mask,
                tl.maximum(diagonal, begin) if PART else begin,
                high if PART else diagonal,
                length,
                gradient_stride,
                query_stride,
                scale * LOG2_E,
                HAS_BOUNDS or PART == 0,
                HAS_MASK,
                HAS_BOUNDS,
                ROWS,
                HEAD_DIM,
                WIDTH,
            )
    stride = key_heads * HEAD_DIM
    dense = batch.to(tl.int64) * length * stride + key_head * HEAD_DIM
    store_rows(d_key + dense, d_keys * scale, start, stride, length, COLUMNS, HEAD_DIM, WIDTH)
    store_rows(d_value + dense, d_values, start, stride, length, COLUMNS, HEAD_DIM, WIDTH)


def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_mask: Tensor | None,
    documents: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and the mask (empty [0] without one)."""
    batch, length, heads, _ = query.shape
    key_heads = key.shape[2]
    first = first_keys(query, documents, window)
    mask = query if head_mask is None else head_mask.contiguous()
    strides = [n for x in (gradient, query, key, value) for n in x.stride()[:3]]
    inputs = (gradient, query, key, value, mask)
    d_query, d_key, d_value = (x.new_empty(x.shape) for x in (query, key, value))
    output, logsumexp = output.contiguous(), logsumexp.contiguous()
    delta = torch.empty_like(logsumexp)
    options = constants(_QUERY_TILE, query, key, head_mask, first is not None)
    blocks = triton.cdiv(length, options["ROWS"])
    partial = delta.new_empty((0 if head_mask is None else batch * blocks, heads))
    with torch.cuda.device_of(query):
        backward_query_kernel[(blocks * batch * heads,)](
            *inputs,
            query if first is None else first,
            output,
            logsumexp,
            d_query,
            delta,
            delta if head_mask is None else partial,
            length,
            heads,
            *strides,
            scale,
            **options,
            **_OPTIONS,
        )
        options = constants(_KEY_TILE, query, key, head_mask, first is not None)
        backward_key_kernel[(triton.cdiv(length, options["COLUMNS"]) * batch * key_heads,)](
            *inputs,
            query if first is None else first,
            query if first is None else _last_queries(first),
            logsumexp,
            delta,
            d_key,
            d_value,
            length,
            key_heads,
            *strides,
            scale,
            **options,
            **_OPTIONS,
        )
    return d_query, d_key, d_value, partial.sum(0)[: 0 if head_mask is None else heads]


def _last_queries(first: Tensor) -> Tensor:
    """[B, S] int32, the last query that sees each key, from the first key of each query."""
    position = torch.arange(first.shape[1], dtype=torch.int32, device=first.device)
    keys = position.expand_as(first).contiguous()
    return torch.searchsorted(first, keys, right=True, out_int32=True) - 1


_INPUTS = ("gradient", "query", "key", "value")
_INTEGERS = ("length", *(f"{name}_stride" for name in _INPUTS))
_WIDE_INTEGERS = tuple(f"{name}_{kind}_stride" for name in _INPUTS for kind in ("batch", "head"))
_SIGNATURE = {
    **dict.fromkeys(_INPUTS, "*bf16"),
    **dict.fromkeys(("head_mask", "logsumexp", "delta"), "*fp32"),
    "first": "*i32",
    **dict.fromkeys(_INTEGERS, "i32"),
    **dict.fromkeys(_WIDE_INTEGERS, "i64"),
    "scale": "fp32",
}
_QUERY_BYTES = 6 * ROWS_BYTES + 2 * STATISTIC_BYTES + BOUND_BYTES + MASK_BYTES
_KEY_BYTES = 6 * ROWS_BYTES + 2 * STATISTIC_BYTES + 2 * BOUND_BYTES + MASK_BYTES
_SHAPE = "gradient, query, key and value [2, 4096, 32, 128] bf16, mask fp32"

COMPILATIONS = (
    Compilation(
        name="attention.backward_query",
        module=__name__,
        function="backward_query_kernel",
        signature={
            **_SIGNATURE,
            **dict.fromkeys(("output", "d_query"), "*bf16"),
            "partial": "*fp32",
            "heads": "i32",
        },
        aligned=(*_INTEGERS, *_WIDE_INTEGERS, "heads"),
        constants=compiled_constants(_QUERY_TILE),
        num_warps=_OPTIONS["num_warps"],
        num_stages=_OPTIONS["num_stages"],
        bytes_moved=_QUERY_BYTES + 2 * MASK_BYTES * (TOKENS // _QUERY_TILE["ROWS"]),
        minimum_bytes=_QUERY_BYTES + MASK_BYTES,
        flops=3 * DOT_FLOPS,
        shape=_SHAPE,
    ),
    Compilation(
        name="attention.backward_key",
        module=__name__,
        function="backward_key_kernel",
        signature={
            **_SIGNATURE,
            **dict.fromkeys(("d_key", "d_value"), "*bf16"),
            "last": "*i32",
            "key_heads": "i32",
        },
        aligned=(*_INTEGERS, *_WIDE_INTEGERS, "key_heads"),
        constants=compiled_constants(_KEY_TILE),
        num_warps=_OPTIONS["num_warps"],
        num_stages=_OPTIONS["num_stages"],
        bytes_moved=_KEY_BYTES,
        minimum_bytes=_KEY_BYTES,
        flops=4 * DOT_FLOPS,
        shape=_SHAPE,
    ),
)
