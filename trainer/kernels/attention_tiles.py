"""What the Triton kernels of attention share: tiles, loads and stores, which keys are visible.

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

from trainer.kernels.attention import Inputs
from trainer.kernels.launching import Tile

FP32 = 0
"""Stands for an architecture: products in fp32 run on no tensor core, on all alike."""
USUAL_HEAD_DIM = 128
"""Channels up to which heads take the first of two tiles."""
LOG2_E = tl.constexpr(1.4426950408889634)


Tiles = dict[int, tuple[Tile, Tile]]
"""By architecture, 90 for sm_90, and FP32: the tile of heads up to USUAL_HEAD_DIM, and of wider
ones."""


def architecture(device: torch.device) -> int:
    """80 for every GPU of compute capability 8, and where there is none."""
    return 10 * torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 80


def choose(tiles: Tiles, query: Tensor) -> Tile:
    """A kernel's tile for queries [B, S, H, D] on their device, of those it has."""
    number = FP32 if query.dtype == torch.float32 else architecture(query.device)
    usual, wide = tiles.get(number, tiles[80])
    return usual if query.shape[3] <= USUAL_HEAD_DIM else wide


def constants(tile: Tile, inputs: Inputs, bounded: bool) -> dict[str, int | bool]:
    """The compile-time arguments of a kernel and its options."""
    head_dim = inputs.query.shape[3]
    return {
        "HAS_MASK": inputs.head_mask is not None,
        "HAS_BOUNDS": bounded,
        "GROUP": inputs.query.shape[2] // inputs.key.shape[2],
        "HEAD_DIM": head_dim,
        # tl.dot needs 16 channels.
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        **tile.options(),
    }


@triton.jit
def load_rows(
    base: tl.tensor,
    start: tl.int32,
    stride: tl.int32,
    S: tl.int32,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """[BLOCK, BLOCK_D] from row `start` of [S, HEAD_DIM], with zeros outside."""
    offs_s, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    inside = (start + offs_s < S)[:, None]
    if HEAD_DIM < BLOCK_D:
        inside = inside & (offs_d < HEAD_DIM)[None, :]
    # Where the tile starts may exceed 32 bits, what follows in it does not.
    base += stride.to(tl.int64) * start
    return tl.load(base + offs_s[:, None] * stride + offs_d[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(
    base: tl.tensor,
    values: tl.tensor,
    start: tl.int32,
    stride: tl.int32,
    S: tl.int32,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """The reverse of `load_rows`; values are rounded to the dtype of what is stored to."""
    offs_s, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    inside = (start + offs_s < S)[:, None]
    if HEAD_DIM < BLOCK_D:
        inside = inside & (offs_d < HEAD_DIM)[None, :]
    base += stride.to(tl.int64) * start
    offs = offs_s[:, None] * stride + offs_d[None, :]
    tl.store(base + offs, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def position(
    S: tl.int32, H: tl.int32, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Block of BLOCK rows, sequence and head of this program; neighbours share a head, and so find
    its rows in the L2 cache."""
    blocks = tl.cdiv(S, BLOCK)
    off_bh = tl.program_id(0) // blocks
    return tl.program_id(0) % blocks, off_bh // H, off_bh % H


@triton.jit
def load_mask(head_mask: tl.tensor, off_h: tl.int32, HAS_MASK: tl.constexpr) -> tl.tensor:
    z = tl.full((), 1.0, tl.float32)
    if HAS_MASK:
        z = tl.load(head_mask + off_h)
    return z


@triton.jit
def key_limits(
    first: tl.tensor,
    z: tl.float32,
    start_m: tl.int32,
    S: tl.int32,
    HAS_BOUNDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The rows' start; where their keys begin, where the diagonal begins, and where keys end.

    A head whose mask is 0 has no keys.
    """
    low = start_m * 0
    if HAS_BOUNDS:
        # First keys never decrease: those of the first row begin first.
        low = tl.load(first + start_m)
    high = tl.minimum(start_m + BLOCK_M, S)
    return start_m, tl.where(z == 0.0, high, low), start_m // BLOCK_N * BLOCK_N, high


@triton.jit
def visible(
    offs_m: tl.tensor,
    offs_n: tl.tensor,
    first: tl.tensor,
    S: tl.int32,
    HAS_BOUNDS: tl.constexpr,
) -> tl.tensor:
    """[rows, columns], whether queries see keys."""
    seen = offs_n[None, :] <= offs_m[:, None]
    if HAS_BOUNDS:
        first_n = tl.load(first + offs_m, mask=offs_m < S, other=0)
        seen = seen & (offs_n[None, :] >= first_n[:, None])
    return seen
