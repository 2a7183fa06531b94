"""What the Triton kernels of attention share: tiles, which keys are visible, sizes.

Tiles are chosen for each architecture and width of heads so that no loop keeps in memory what
registers cannot hold. For the same reason one loop walks the tiles on both sides of the diagonal,
instead of one for each. Those of sm_80 and of fp32 need at most 99 KiB of shared memory, which
every GPU since the first of Ampere has; where there are no tiles of its own, those of sm_80 serve.
One case is left: on sm_120 Triton 3.6 spills in the forward loop in fp32, of 65 to 128 channels
with documents or a window; 3.8 and 3.9 do not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.compilation import HEAD_DIM, HEADS, TOKENS, Tile

FP32 = 0
"""Stands for an architecture: products in fp32 run on no tensor core, on all alike."""
Tiles = dict[int, tuple[Tile, Tile]]
"""By architecture, 90 for sm_90, and FP32: the tile of heads up to HEAD_DIM, and of wider ones."""

BATCH = 2
LOG2_E = tl.constexpr(1.4426950408889634)

ROWS_BYTES = 2 * TOKENS * HEADS * HEAD_DIM
STATISTIC_BYTES = 4 * TOKENS * HEADS
BOUND_BYTES = 4 * TOKENS
MASK_BYTES = 4 * HEADS
DOT_FLOPS = TOKENS * (TOKENS // BATCH + 1) * HEADS * HEAD_DIM
"""At a 7B model's shapes: queries, keys or values in bf16; a number in fp32 for each row and head,
or for each row; a mask; and one product over the pairs of a query and a key that it sees."""


def architecture(device: torch.device) -> int:
    """80 for every GPU of compute capability 8, and where there is none."""
    return 10 * torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 80


def choose(tiles: Tiles, query: Tensor) -> Tile:
    """A kernel's tile for queries [B, S, H, D] on their device, of those it has."""
    number = FP32 if query.dtype == torch.float32 else architecture(query.device)
    usual, wide = tiles.get(number, tiles[80])
    return usual if query.shape[3] <= HEAD_DIM else wide


def constants(
    tile: Tile, query: Tensor, key: Tensor, head_mask: Tensor | None, bounded: bool
) -> dict[str, int | float | bool]:
    """The compile-time arguments of a kernel."""
    return {
        "HAS_MASK": head_mask is not None,
        "HAS_BOUNDS": bounded,
        "GROUP": query.shape[2] // key.shape[2],
        "HEAD_DIM": query.shape[3],
        "WIDTH": max(16, triton.next_power_of_2(query.shape[3])),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
    }


def compiled_tiles(tiles: Tiles) -> dict[int, Tile]:
    """By architecture, those of a 7B model's shapes."""
    return {number: usual for number, (usual, _) in tiles.items() if number != FP32}


def compiled_constants(tile: Tile, key_heads: int = HEADS) -> dict[str, int | float | bool]:
    """The compile-time arguments at a 7B model's shapes, with everything optional."""
    query = torch.empty(1, 1, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="meta")
    return constants(tile, query, query[:, :, :key_heads], query, True)


@triton.jit
def load_rows(
    source: tl.tensor,
    start: tl.int32,
    stride: tl.int32,
    length: tl.int32,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """[ROWS, WIDTH] from row `start`, with zeros outside [length, HEAD_DIM]."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (start + row < length)[:, None]
    if HEAD_DIM < WIDTH:
        inside = inside & (column < HEAD_DIM)[None, :]
    source += stride.to(tl.int64) * start
    return tl.load(source + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(
    target: tl.tensor,
    values: tl.tensor,
    start: tl.int32,
    stride: tl.int32,
    length: tl.int32,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (start + row < length)[:, None]
    if HEAD_DIM < WIDTH:
        inside = inside & (column < HEAD_DIM)[None, :]
    target += stride.to(tl.int64) * start
    places = row[:, None] * stride + column[None, :]
    tl.store(target + places, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def position(
    length: tl.int32, heads: tl.int32, ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Block of ROWS rows, sequence and head of this program; neighbours share a head, and so find
    its rows in the L2 cache."""
    blocks = tl.cdiv(length, ROWS)
    pair = tl.program_id(0) // blocks
    return tl.program_id(0) % blocks, pair // heads, pair % heads


@triton.jit
def load_mask(head_mask: tl.tensor, head: tl.int32, HAS_MASK: tl.constexpr) -> tl.tensor:
    mask = tl.full((), 1.0, tl.float32)
    if HAS_MASK:
        mask = tl.load(head_mask + head)
    return mask


@triton.jit
def key_limits(
    first: tl.tensor,
    mask: tl.float32,
    start: tl.int32,
    length: tl.int32,
    HAS_BOUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The rows' start; where their keys begin, where the diagonal begins, and where keys end.

    A head whose mask is 0 has no keys.
    """
    low = start * 0
    if HAS_BOUNDS:
        low = tl.load(first + start)
    high = tl.minimum(start + ROWS, length)
    return start, tl.where(mask == 0.0, high, low), start // COLUMNS * COLUMNS, high


@triton.jit
def visible(
    row: tl.tensor,
    column: tl.tensor,
    first: tl.tensor,
    length: tl.int32,
    HAS_BOUNDS: tl.constexpr,
) -> tl.tensor:
    """[rows, columns], whether queries see keys."""
    seen = column[None, :] <= row[:, None]
    if HAS_BOUNDS:
        first_key = tl.load(first + row, mask=row < length, other=0)
        seen = seen & (column[None, :] >= first_key[:, None])
    return seen
