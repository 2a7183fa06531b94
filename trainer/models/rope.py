"""Rotary position embedding in Hugging Face's layout: channels i and i + rotary_dim / 2 pair up."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """[rotary_dim / 2] angular frequencies in radians per token, fp32 on the CPU.

    theta^(-2i / rotary_dim) (RoFormer, arXiv 2104.09864, section 3.2.2), divided by `factor` for
    linear scaling, or interpolated by wavelength for Llama 3 (arXiv 2407.21783, section 3.2).
    """
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float, device="cpu")
    frequencies = 1.0 / (config.rope_theta ** (exponents / config.rotary_dim))
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    slowed = frequencies / scaling["factor"]
    # 1 keeps a frequency, 0 divides it by the factor, in between is interpolated.
    keep = (original / wavelengths - low) / (high - low)
    blended = (1 - keep) * frequencies / scaling["factor"] + keep * frequencies
    scaled = torch.where(wavelengths > original / low, slowed, blended)
    return torch.where(wavelengths < original / high, frequencies, scaled)


def rotary_tables(frequencies: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [length, rotary_dim / 2], computed in fp32 and rounded to `dtype` once."""
    positions = torch.arange(length, dtype=torch.float, device=frequencies.device)
    angles = torch.outer(positions, frequencies)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def positions_in(documents: Tensor) -> Tensor:
    """The position of each token in its document: int64 [B, S], of the numbers [B, S] of documents,
    each of which ends where the number changes."""
    position = torch.arange(documents.shape[1], device=documents.device)
    begins = (documents.diff(dim=1) != 0) * position[1:]
    return position - F.pad(begins, (1, 0)).cummax(1).values
