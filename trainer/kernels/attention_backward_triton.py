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
from trainer.kernels.compilation import HEADS, TOKENS, Compilation, Tile

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
    length: tl.int32,
    scale: tl.float32,
    HAS_BOUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Gradient of a tile of queries, but for the mask; 0 without keys."""
    queries, gradients, logarithm, along = tile
    key, value, first, key_stride, value_stride = sources
    row_start, low, diagonal, high = limits
    row = row_start + tl.arange(0, ROWS)
    d_queries = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(low, high, COLUMNS):
        keys = load_rows(key, start, key_stride, length, COLUMNS, HEAD_DIM, WIDTH)
        values = load_rows(value, start, value_stride, length, COLUMNS, HEAD_DIM, WIDTH)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        weights = tl.exp2(scores * (scale * LOG2_E) - logarithm[:, None])
        if HAS_BOUNDS or start >= diagonal:
            column = start + tl.arange(0, COLUMNS)
            seen = visible(row, column, first, length, HAS_BOUNDS)
            weights = tl.where(seen, weights, 0.0)
        d_weights = tl.dot(gradients, tl.trans(values), input_precision="ieee")
        d_scores = weights * (d_weights - along[:, None])
        d_queries = tl.dot(d_scores.to(keys.dtype), keys, d_queries, input_precision="ieee")
    return d_queries * scale


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
    """Gradient of ROWS queries, their delta, and their part of the mask's [B * blocks, H]."""
    block, batch, head = position(length, heads, ROWS)
    start = (tl.cdiv(length, ROWS) - 1 - block) * ROWS
    mask = load_mask(head_mask, head, HAS_MASK)
    query += batch * query_batch_stride + head * query_head_stride
    key += batch * key_batch_stride + head // GROUP * key_head_stride
    value += batch * value_batch_stride + head // GROUP * value_head_stride
    sequence = batch.to(tl.int64) * length
    place = (sequence * heads + head) * HEAD_DIM
    stride = heads * HEAD_DIM
    gradients = load_rows(gradient + place, start, stride, length, ROWS, HEAD_DIM, WIDTH)
    outputs = load_rows(output + place, start, stride, length, ROWS, HEAD_DIM, WIDTH)
    along = tl.sum(outputs.to(tl.float32) * gradients.to(tl.float32), 1)
    along = along / tl.where(mask == 0.0, 1.0, mask)
    if HAS_MASK:
        tl.store(partial + (batch * tl.cdiv(length, ROWS) + block) * heads + head, tl.sum(along, 0))
    row = start + tl.arange(0, ROWS)
    here = sequence * heads + head.to(tl.int64) * length + row
    tl.store(delta + here, along, mask=row < length)
    logarithm = tl.load(logsumexp + here, mask=row < length, other=0.0)
    queries = load_rows(query, start, query_stride, length, ROWS, HEAD_DIM, WIDTH)
    limits = key_limits(first + sequence, mask, start, length, HAS_BOUNDS, ROWS, COLUMNS)
    tile = (queries, gradients, logarithm, along)
    sources = (key, value, first + sequence, key_stride, value_stride)
    d_queries = _query_gradient(
        tile, sources, limits, length, scale, HAS_BOUNDS, ROWS, COLUMNS, HEAD_DIM, WIDTH
    )
    store_rows(d_query + place, d_queries * mask, start, stride, length, ROWS, HEAD_DIM, WIDTH)


@triton.jit
def _query_limits(
    last: tl.tensor,
    start: tl.int32,
    length: tl.int32,
    HAS_BOUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Where the queries that see the keys from `start` begin, where those that see all of them do
    unless there are bounds, where they end, and where all queries end."""
    low = start // ROWS * ROWS
    high = length
    if HAS_BOUNDS:
        high = tl.load(last + tl.minimum(start + COLUMNS, length) - 1) + 1
    diagonal = tl.minimum(low + (ROWS if ROWS > COLUMNS else COLUMNS), high)
    return low, diagonal, high, length


@triton.jit
def _last_seen(
    last: tl.tensor, column: tl.tensor, length: tl.int32, HAS_BOUNDS: tl.constexpr
) -> tl.tensor:
    """The last query that sees each key, if there are bounds."""
    seen = column
    if HAS_BOUNDS:
        seen = tl.load(last + column, mask=column < length, other=0)
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
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    OF_KEYS: tl.constexpr,
    OF_VALUES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Gradients of a tile of keys, but for the scale, and of values; 0 where not asked for.
    Scores are transposed: [keys, queries]."""
    keys, values, column, last_query = tile
    gradients_of, queries_of, stride, query_stride, query_head_stride = sources[0]
    logsumexp, delta, head_mask = sources[1]
    begin, before = sources[2]
    low, diagonal, high, length = limits
    WIDTH: tl.constexpr = keys.shape[1]
    d_keys = tl.zeros(keys.shape, tl.float32)
    d_values = tl.zeros(keys.shape, tl.float32)
    for head in range(begin, begin + GROUP):
        mask = load_mask(head_mask, head, HAS_MASK)
        gradient = gradients_of + head * HEAD_DIM
        query = queries_of + query_head_stride * head
        here = (before + head).to(tl.int64) * length
        # A head whose mask is 0 has no queries.
        for start in range(tl.where(mask == 0.0, high, low), high, ROWS):
            row = start + tl.arange(0, ROWS)
            queries = load_rows(query, start, query_stride, length, ROWS, HEAD_DIM, WIDTH)
            gradients = load_rows(gradient, start, stride, length, ROWS, HEAD_DIM, WIDTH)
            inside = row < length
            logarithm = tl.load(logsumexp + here + row, mask=inside, other=0.0)
            along = tl.load(delta + here + row, mask=inside, other=0.0)
            scores = tl.dot(keys, tl.trans(queries), input_precision="ieee")
            weights = tl.exp2(scores * (scale * LOG2_E) - logarithm[None, :]) * mask
            if HAS_BOUNDS or start < diagonal:
                seen = column[:, None] <= row[None, :]
                if HAS_BOUNDS:
                    seen = seen & (row[None, :] <= last_query[:, None])
                weights = tl.where(seen, weights, 0.0)
            if OF_VALUES:
                rounded = weights.to(gradients.dtype)
                d_values = tl.dot(rounded, gradients, d_values, input_precision="ieee")
            if OF_KEYS:
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
    last: tl.tensor,
    logsumexp: tl.tensor,
    delta: tl.tensor,
    d_key: tl.tensor,
    d_value: tl.tensor,
    length: tl.int32,
    key_heads: tl.int32,
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
    TOGETHER: tl.constexpr,
) -> None:
    """Gradients of COLUMNS keys and values of one key head, over the GROUP heads that read it."""
    block, batch, key_head = position(length, key_heads, COLUMNS)
    start = block * COLUMNS
    sequence = batch.to(tl.int64) * length
    stride = key_heads * HEAD_DIM
    key += batch * key_batch_stride + key_head * key_head_stride
    value += batch * value_batch_stride + key_head * value_head_stride
    keys = load_rows(key, start, key_stride, length, COLUMNS, HEAD_DIM, WIDTH)
    values = load_rows(value, start, value_stride, length, COLUMNS, HEAD_DIM, WIDTH)
    column = start + tl.arange(0, COLUMNS)
    last += sequence
    tile = (keys, values, column, _last_seen(last, column, length, HAS_BOUNDS))
    limits = _query_limits(last, start, length, HAS_BOUNDS, ROWS, COLUMNS)
    gradient += sequence * stride * GROUP
    query += batch * query_batch_stride
    rows = (gradient, query, stride * GROUP, query_stride, query_head_stride)
    sources = (rows, (logsumexp, delta, head_mask), (key_head * GROUP, batch * key_heads * GROUP))
    d_keys, d_values = _key_gradients(
        tile, sources, limits, scale, HAS_MASK, HAS_BOUNDS, GROUP, ROWS, HEAD_DIM, True, TOGETHER
    )
    place = sequence * stride + key_head * HEAD_DIM
    store_rows(d_key + place, d_keys * scale, start, stride, length, COLUMNS, HEAD_DIM, WIDTH)
    if not TOGETHER:
        _, d_values = _key_gradients(
            tile, sources, limits, scale, HAS_MASK, HAS_BOUNDS, GROUP, ROWS, HEAD_DIM, False, True
        )
    store_rows(d_value + place, d_values, start, stride, length, COLUMNS, HEAD_DIM, WIDTH)


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
    strides = [n for x in (query, key, value) for n in x.stride()[:3]]
    inputs = (gradient.contiguous(), query, key, value, mask)
    d_query, d_key, d_value = (x.new_empty(x.shape) for x in (query, key, value))
    output, logsumexp = output.contiguous(), logsumexp.contiguous()
    delta = torch.empty_like(logsumexp)
    tile = choose(_QUERY_TILES, query)
    options = constants(tile, query, key, head_mask, first is not None)
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
            **tile.options(),
        )
        tile = choose(_KEY_TILES, query)
        options = constants(tile, query, key, head_mask, first is not None)
        options["TOGETHER"] = tile.together
        backward_key_kernel[(triton.cdiv(length, options["COLUMNS"]) * batch * key_heads,)](
            *inputs,
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
            **tile.options(),
        )
    return d_query, d_key, d_value, partial.sum(0)[: 0 if head_mask is None else heads]


def _last_queries(first: Tensor) -> Tensor:
    """[B, S] int32, the last query that sees each key, from the first key of each query."""
    position = torch.arange(first.shape[1], dtype=torch.int32, device=first.device)
    keys = position.expand_as(first).contiguous()
    return torch.searchsorted(first, keys, right=True, out_int32=True) - 1


_INPUTS = ("query", "key", "value")
_INTEGERS = ("length", *(f"{name}_stride" for name in _INPUTS))
_WIDE_INTEGERS = tuple(f"{name}_{kind}_stride" for name in _INPUTS for kind in ("batch", "head"))
_SIGNATURE = {
    **dict.fromkeys(("gradient", *_INPUTS), "*bf16"),
    **dict.fromkeys(("head_mask", "logsumexp", "delta"), "*fp32"),
    **dict.fromkeys(_INTEGERS, "i32"),
    **dict.fromkeys(_WIDE_INTEGERS, "i64"),
    "scale": "fp32",
}
_QUERY_BYTES = 6 * ROWS_BYTES + 2 * STATISTIC_BYTES + BOUND_BYTES + MASK_BYTES
_KEY_BYTES = 2 * ROWS_BYTES + 2 * STATISTIC_BYTES + BOUND_BYTES + MASK_BYTES
# Key heads: those of LLaMA 2 7B, and of Llama 3 8B (arXiv 2407.21783, table 3).
_KEY_HEADS = {"attention": HEADS, "grouped_attention": 8}

COMPILATIONS = (
    *(
        Compilation(
            name="attention.backward_query",
            module=__name__,
            function="backward_query_kernel",
            signature={
                **_SIGNATURE,
                **dict.fromkeys(("output", "d_query"), "*bf16"),
                "partial": "*fp32",
                "first": "*i32",
                "heads": "i32",
            },
            aligned=(*_INTEGERS, *_WIDE_INTEGERS, "heads"),
            constants=compiled_constants(tile),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            architectures=(number,),
            bytes_moved=_QUERY_BYTES + 2 * MASK_BYTES * (TOKENS // tile.rows),
            minimum_bytes=_QUERY_BYTES + MASK_BYTES,
            flops=3 * DOT_FLOPS,
            shape="gradient, query, key and value [2, 4096, 32, 128] bf16, mask fp32",
        )
        for number, tile in compiled_tiles(_QUERY_TILES).items()
    ),
    *(
        Compilation(
            name=f"{operator}.backward_key",
            module=__name__,
            function="backward_key_kernel",
            signature={
                **_SIGNATURE,
                **dict.fromkeys(("d_key", "d_value"), "*bf16"),
                "last": "*i32",
                "key_heads": "i32",
            },
            aligned=(*_INTEGERS, *_WIDE_INTEGERS, *(("key_heads",) if key_heads % 16 == 0 else ())),
            constants={**compiled_constants(tile, key_heads), "TOGETHER": tile.together},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            architectures=(number,),
            bytes_moved=_KEY_BYTES + 4 * ROWS_BYTES * key_heads // HEADS,
            minimum_bytes=_KEY_BYTES + 4 * ROWS_BYTES * key_heads // HEADS,
            flops=4 * DOT_FLOPS,
            shape="gradient and query [2, 4096, 32, 128] bf16, key and value "
            f"[2, 4096, {key_heads}, 128], mask fp32",
        )
        for operator, key_heads in _KEY_HEADS.items()
        for number, tile in compiled_tiles(_KEY_TILES).items()
    ),
)
