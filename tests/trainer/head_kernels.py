"""Attention's kernels as models with other heads than a 7B model's launch them, for the contracts."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from unittest.mock import patch

import torch

from trainer.kernels import (
    attention_backward_triton,
    attention_tiles,
    attention_triton,
    compilation,
)
from trainer.kernels.compilation import HEADS, Compilation

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (64, 80, 96, 128, 256)
"""Those of GPT-NeoX and LLaMA models, Pythia (arXiv 2304.01373, table 1) among them."""
_TILES = {
    "forward_kernel": attention_triton._TILES,
    "backward_query_kernel": attention_backward_triton._QUERY_TILES,
    "backward_key_kernel": attention_backward_triton._KEY_TILES,
}


def with_heads(
    record: Compilation, head_dim: int, dtype: str, masked: bool = True, bounded: bool = True
) -> Compilation:
    """A record of attention with other heads, of the dtype "bf16", "fp16" or "fp32"."""
    query = torch.empty(1, 1, HEADS, head_dim, dtype=DTYPES[dtype], device="meta")
    key = query[:, :, : HEADS // int(record.constants["GROUP"])]
    (number,) = record.architectures
    with patch.object(attention_tiles, "architecture", return_value=number):
        tile = attention_tiles.choose(_TILES[record.function], query)
    return replace(
        record,
        name=f"{record.name} {head_dim} {dtype} {masked:d}{bounded:d}",
        signature={name: t.replace("bf16", dtype) for name, t in record.signature.items()},
        constants=attention_tiles.constants(tile, query, key, query if masked else None, bounded),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
