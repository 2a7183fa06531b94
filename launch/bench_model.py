"""The models of random weights that benchmarks time, and the clock they read."""

import time

import torch

from trainer.models.config import ModelConfig


def llama(
    *, vocabulary: int, hidden: int, ffn: int, layers: int, heads: int, positions: int
) -> ModelConfig:
    """A Llama with as many KV heads as query heads, and an output head of its own."""
    return ModelConfig(
        family="llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=positions,
    )


def now(device: torch.device) -> float:
    """Seconds on a clock that is read when `device` has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
