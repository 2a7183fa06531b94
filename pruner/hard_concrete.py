"""The hard-concrete distribution: a sigmoid stretched beyond [0, 1] and clipped back.

Louizos, Welling, Kingma 2018 (arXiv 1712.01312), section 2.2. Values of exactly 0 and 1 have
positive probability, so a sampled mask can switch a unit off completely.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

LOWER = -0.1
UPPER = 1.1
"""Limits of the stretched interval."""
NOISE_BOUND = 1e-6
"""Distance of the uniform draws from 0 and 1, which keeps logistic noise finite."""


def stretch(value: Tensor) -> Tensor:
    """Map a sigmoid output to [LOWER, UPPER] and clip to [0, 1]."""
    return (value * (UPPER - LOWER) + LOWER).clamp(0.0, 1.0)


def gate(logit: Tensor) -> Tensor:
    """z = clip(1.2 * sigmoid(logit) - 0.1, 0, 1)."""
    return stretch(torch.sigmoid(logit))


def gate_slope(logit: Tensor) -> Tensor:
    """Derivative of `gate`; zero where the clip holds."""
    value = torch.sigmoid(logit)
    slope = value * (1 - value) * (UPPER - LOWER)
    stretched = value * (UPPER - LOWER) + LOWER
    return torch.where((stretched > 0) & (stretched < 1), slope, torch.zeros_like(slope))


def logistic_noise(
    shapes: Mapping[str, tuple[int, ...]], seed: int, step: int, draw: int = 0
) -> dict[str, Tensor]:
    """Standard logistic draws, fp32 on the CPU, that depend on (seed, step, draw) alone."""
    # torch's CPU generator reads 32 bits of its seed: hash the three into them.
    state = int(np.random.SeedSequence([seed % 2**64, step, draw]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(state)
    draws = {}
    for name, shape in shapes.items():
        uniform = torch.rand(shape, generator=generator).clamp(NOISE_BOUND, 1 - NOISE_BOUND)
        draws[name] = uniform.log() - torch.log1p(-uniform)
    return draws


def probability_nonzero(log_alpha: Tensor, beta: float) -> Tensor:
    """P(z != 0) = sigmoid(log_alpha - beta * ln(-LOWER / UPPER)) (arXiv 1712.01312, eq. 12)."""
    return torch.sigmoid(log_alpha - beta * math.log(-LOWER / UPPER))
