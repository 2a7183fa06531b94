"""Rotary positions in Triton: queries and keys in one launch, each value read and written once.

A program turns all pairs of a few positions and heads, of the queries or of the keys; it reads the
angles of its positions once for all its heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.compilation import ENABLE_FP_FUSION, HEAD_DIM, HEADS, TOKENS, Compilation

_TILE = 2048
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": ENABLE_FP_FUSION}


@triton.jit
def _turn(
    source: tl.tensor,
    target: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    block: tl.tensor,
    length: tl.tensor,
    heads: tl.tensor,
    head_dim: tl.tensor,
    half: tl.tensor,
    position_stride: tl.tensor,
    head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    INVERSE: tl.constexpr,
    REST: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """One tile [POSITIONS, BLOCK_HEADS, BLOCK_HALF] of pairs, and the channels that stay."""
    position = (tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS))[:, None, None]
    channel = tl.arange(0, BLOCK_HALF)[None, None, :]
    inside = (position < length) & (channel < half)
    place = position.to(tl.int64)
    cosine = tl.load(cos + place * cos_stride + channel, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + place * sin_stride + channel, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        sine = -sine
    head = (block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[None, :, None]
    present = (position < length) & (head < heads)
    source += place * position_stride + head.to(tl.int64) * head_stride
    target += ((tl.program_id(2).to(tl.int64) * length + place) * heads + head) * head_dim
    inside = present & (channel < half)
    first = tl.load(source + channel, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half + channel, mask=inside, other=0.0).to(tl.float32)
    turned = first * cosine - second * sine
    tl.store(target + channel, turned.to(target.dtype.element_ty), mask=inside)
    turned = second * cosine + first * sine
    tl.store(target + half + channel, turned.to(target.dtype.element_ty), mask=inside)
    if REST > 0:
        kept = 2 * half + tl.arange(0, REST)[None, None, :]
        inside = present & (kept < head_dim)
        tl.store(target + kept, tl.load(source + kept, mask=inside, other=0.0), mask=inside)


@triton.jit
def rotate_kernel(
    query: tl.tensor,
    key: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query_result: tl.tensor,
    key_result: tl.tensor,
    length: tl.int32,
    heads: tl.int32,
    key_heads: tl.int32,
    head_dim: tl.int32,
    half: tl.int32,
    query_batch_stride: tl.int64,
    query_position_stride: tl.int32,
    query_head_stride: tl.int32,
    key_batch_stride: tl.int64,
    key_position_stride: tl.int32,
    key_head_stride: tl.int32,
    cos_stride: tl.int32,
    sin_stride: tl.int32,
    INVERSE: tl.constexpr,
    REST: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """POSITIONS positions and BLOCK_HEADS heads; blocks of keys follow the blocks of queries."""
    block = tl.program_id(1)
    query_blocks = tl.cdiv(heads, BLOCK_HEADS)
    source = query + tl.program_id(2) * query_batch_stride
    target = query_result
    position_stride = query_position_stride
    head_stride = query_head_stride
    if block >= query_blocks:
        block -= query_blocks
        source = key + tl.program_id(2) * key_batch_stride
        target = key_result
        position_stride = key_position_stride
        head_stride = key_head_stride
        heads = key_heads
    _turn(
        source,
        target,
        cos,
        sin,
        block,
        length,
        heads,
        head_dim,
        half,
        position_stride,
        head_stride,
        cos_stride,
        sin_stride,
        INVERSE,
        REST,
        POSITIONS,
        BLOCK_HEADS,
        BLOCK_HALF,
    )


def supports(query: Tensor) -> bool:
    """Whether the kernel takes these tensors; the reference does the rest."""
    return query.dtype != torch.float64 and query.numel() > 0


def rotate(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    results: tuple[Tensor, Tensor],
) -> None:
    """Writes both rotated to `results` [B, S, heads, head_dim], contiguous; they may be query and
    key themselves."""
    batch, length, heads, head_dim = query.shape
    key_heads, half = key.shape[2], cos.shape[1]
    tile = _tile(heads, head_dim, half)
    blocks = triton.cdiv(heads, tile["BLOCK_HEADS"]) + triton.cdiv(key_heads, tile["BLOCK_HEADS"])
    with torch.cuda.device_of(query):
        rotate_kernel[(triton.cdiv(length, tile["POSITIONS"]), blocks, batch)](
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
            cos.stride(0),
            sin.stride(0),
            INVERSE=inverse,
            **tile,
            **_OPTIONS,
        )


def _tile(heads: int, head_dim: int, half: int) -> dict[str, int]:
    block_half = triton.next_power_of_2(half)
    rest = head_dim - 2 * half
    block_heads = min(triton.next_power_of_2(heads), max(1, _TILE // block_half))
    return {
        "REST": triton.next_power_of_2(rest) if rest else 0,
        "POSITIONS": max(1, _TILE // (block_heads * block_half)),
        "BLOCK_HEADS": block_heads,
        "BLOCK_HALF": block_half,
    }


_PASS = 2 * TOKENS * HEADS * HEAD_DIM
_TABLES = 2 * 2 * TOKENS // 2 * HEAD_DIM // 2
_INTEGERS = (
    *("length", "heads", "key_heads", "head_dim", "half", "query_position_stride"),
    *("query_head_stride", "key_position_stride", "key_head_stride", "cos_stride", "sin_stride"),
)
_WIDE_INTEGERS = ("query_batch_stride", "key_batch_stride")

COMPILATIONS = tuple(
    Compilation(
        name=f"rope.{name}",
        module=__name__,
        function="rotate_kernel",
        signature={
            **dict.fromkeys(("query", "key", "cos", "sin"), "*bf16"),
            **dict.fromkeys(("query_result", "key_result"), "*bf16"),
            **dict.fromkeys(_INTEGERS, "i32"),
            **dict.fromkeys(_WIDE_INTEGERS, "i64"),
        },
        aligned=(*_INTEGERS, *_WIDE_INTEGERS),
        constants={"INVERSE": inverse, **_tile(HEADS, HEAD_DIM, HEAD_DIM // 2)},
        num_warps=_OPTIONS["num_warps"],
        num_stages=_OPTIONS["num_stages"],
        bytes_moved=4 * _PASS + _TABLES,
        minimum_bytes=4 * _PASS + _TABLES,
        shape="query and key [2, 4096, 32, 128] bf16, cos and sin [4096, 64] bf16",
    )
    for name, inverse in (("forward", False), ("backward", True))
)
