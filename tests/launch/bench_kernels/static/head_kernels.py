"""Attention as models with other heads than a 7B model's launch it, for the contracts."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from unittest.mock import patch

import torch

from trainer.kernels import attention_backward_triton as backward
from trainer.kernels import attention_tiles, attention_triton, compilation
from trainer.kernels.compilation import HEADS, Compilation

ARCHITECTURES = (80, 90, 100, 120)
HEAD_DIMS = (64, 80, 96, 128, 256)
"""Of GPT-NeoX and LLaMA models: Pythia's (arXiv 2304.01373, table 1) are 64, 80, 128 and 256."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TILES = {
    "forward_kernel": attention_triton._TILES,
    "backward_query_kernel": backward._QUERY_TILES,
    "backward_key_kernel": backward._KEY_TILES,
}


def with_heads(
    record: Compilation, architecture: int, head_dim: int, dtype: str, optional: bool
) -> Compilation:
    """A kernel of attention with heads of another width, and everything optional or nothing."""
    query = torch.empty(1, 1, HEADS, head_dim, dtype=DTYPES[dtype], device="meta")
    key = query[:, :, : HEADS // int(record.constants["GROUP"])]
    mask = query if optional else None
    with patch.object(attention_tiles, "architecture", return_value=architecture):
        tile = attention_tiles.choose(_TILES[record.function], query)
    constants = attention_tiles.constants(tile, query, key, mask, optional)
    if "TOGETHER" in record.constants:
        constants["TOGETHER"] = tile.together
    return replace(
        record,
        name=f"{record.name} {head_dim} {dtype} {'complete' if optional else 'plain'}",
        signature={name: kind.replace("bf16", dtype) for name, kind in record.signature.items()},
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        architectures=(architecture,),
    )


def of_heads(head_dims: tuple[int, ...], dtypes: tuple[str, ...]) -> Iterator[Compilation]:
    """Every kernel of attention on every architecture."""
    records = {r.name: r for r in compilation.compilations() if "attention" in r.name}
    cases = product(records.values(), ARCHITECTURES, head_dims, dtypes, (True, False))
    return (with_heads(*case) for case in cases)


def compilations() -> tuple[Compilation, ...]:
    return tuple(of_heads(HEAD_DIMS, tuple(DTYPES)))
