"""Blocks of a model on documents apart against the same on joined ones, forward and backward."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from data.tables import print_table
from launch.bench_kernels.config import BenchKernelsConfig
from launch.bench_kernels.turns import alternate, median_ratio
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM, LossOutput, next_token_targets
from trainer.models.hf import init_weights

SHAPE = ModelConfig(
    family="llama",
    vocab_size=1024,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=2,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    tie_embeddings=True,
)
"""Two blocks of SmolLM2 135M, with a vocabulary that takes little of the time."""
LENGTH = 2048
NUMBERS = (1, 8, 64)
"""Documents in a sample of LENGTH tokens, all as long."""


def measure_documents(config: BenchKernelsConfig) -> list[dict[str, Any]]:
    """Time of documents apart over that of joined ones, by number in a sample; fp32."""
    model = CausalLM(SHAPE)
    init_weights(model)
    ids = torch.randint(SHAPE.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    found = []
    for number in NUMBERS:
        documents = torch.arange(LENGTH).mul(number).div(LENGTH, rounding_mode="floor")
        calls = {
            "apart": _call(model, ids, documents.unsqueeze(0)),
            "joined": _call(model, ids, None),
        }
        seconds = alternate(f"{number} documents", calls, config)
        pairs = zip(seconds["apart"], seconds["joined"], strict=True)
        ratios = sorted(apart / joined for apart, joined in pairs)
        found.append(
            {
                "documents": number,
                "time_ratio": median_ratio(seconds["apart"], seconds["joined"]),
                "time_ratio_spread": [ratios[0], ratios[-1]],
                "seconds": {kind: statistics.median(times) for kind, times in seconds.items()},
            }
        )
    return found


def _call(model: CausalLM, ids: Tensor, documents: Tensor | None) -> Callable[[], float]:
    """A measurement of one forward and backward pass, in seconds."""
    targets, valid = next_token_targets(ids, documents=documents)

    def call() -> float:
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        output = model(ids, targets=targets, weights=valid.float(), documents=documents)
        assert isinstance(output, LossOutput)
        output.loss.backward()
        return time.perf_counter() - start

    return call


def print_documents(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints what `measure_documents` found."""
    table = Table(title=f"documents apart in samples of {LENGTH} tokens, two blocks, fp32")
    for heading in ("documents", "s joined", "s apart", "ratio", "of pairs"):
        table.add_column(heading, justify="right")
    for row in rows:
        seconds = row["seconds"]
        table.add_row(
            str(row["documents"]),
            *(f"{seconds[kind]:.2f}" for kind in ("joined", "apart")),
            f"{row['time_ratio']:.3f}",
            "{:.2f} to {:.2f}".format(*row["time_ratio_spread"]),
        )
    print_table(table, console)
