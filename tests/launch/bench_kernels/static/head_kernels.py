"""Attention as models with other heads than a 7B model's launch it, for the contracts."""

from dataclasses import replace
from itertools import product

from launch.bench_kernels.static.kernels import Launches, attentions

HEAD_DIMS = (64, 80, 96, 128, 256)
"""Of GPT-NeoX and LLaMA models: Pythia's (arXiv 2304.01373, table 1) are 64, 80, 128 and 256."""
DTYPES = ("bf16", "fp16", "fp32")


def launches() -> Launches:
    """Every kernel of attention, with everything optional or nothing."""
    return tuple(
        replace(
            launch, name=f"{launch.name} {head_dim} {dtype} {'complete' if optional else 'plain'}"
        )
        for head_dim, dtype, optional in product(HEAD_DIMS, DTYPES, (True, False))
        for launch in attentions(head_dim=head_dim, dtype=dtype, optional=optional)
    )
