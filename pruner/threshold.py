"""The threshold of a row: where its gates sum to a given count, differentiable in the scores."""

import math
from typing import Any

import torch
from torch import Tensor

from pruner.hard_concrete import gate, gate_slope

MAX_ITERATIONS = 200
"""Bound of the search for a threshold; every third iteration halves the bracket."""
COUNT_TOLERANCE = 1e-10
"""Largest error of a row's count, in units."""
SATURATION = math.log(11)
"""|logit| from which a gate is exactly 0 or 1 (up to rounding)."""


class _Threshold(torch.autograd.Function):
    """t per row with sum_i gate((a_i - t) / T) = count."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, count: float, temperature: float) -> Tensor:
        found = solve_threshold(scores, count, temperature)
        ctx.save_for_backward(scores, found)
        ctx.temperature = temperature
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        scores, found = ctx.saved_tensors
        slope = gate_slope((scores - found) / ctx.temperature)
        total = slope.sum(-1, keepdim=True)
        # Where every gate is saturated the count does not depend on the scores.
        share = torch.where(total > 0, slope / total.clamp(min=1e-300), torch.zeros_like(slope))
        return gradients[0] * share, None, None


def threshold(scores: Tensor, count: float, temperature: float) -> Tensor:
    """The t [rows, 1] at which gate((scores - t) / temperature) sums to `count` in each row.

    `scores` [rows, units] fp64; where an interval of values meets the count, its middle.
    Differentiable by the implicit function theorem: dt / da_j = z'_j / sum_i z'_i.
    """
    found: Tensor = _Threshold.apply(scores, count, temperature)
    return found


@torch.no_grad()
def solve_threshold(scores: Tensor, count: float, temperature: float) -> Tensor:
    """`threshold` without a graph: Newton's method in a bracket that bisection keeps closing."""
    units = scores.shape[-1]
    order = scores.sort(dim=-1, descending=True).values
    width = SATURATION * temperature
    # At `low` the gates of the first ceil(count) units are 1; at `high` those of all but the first
    # floor(count) are 0.
    low = order[:, max(math.ceil(count), 1) - 1].unsqueeze(-1) - width
    high = order[:, min(math.floor(count), units - 1)].unsqueeze(-1) + width
    if count >= units:
        return low
    # Where low is beyond high every gate is saturated between them, and any value there would do.
    found = (low + high) / 2
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    for iteration in range(MAX_ITERATIONS):
        logits = (scores - found) / temperature
        excess = gate(logits).sum(-1, keepdim=True) - count
        if float(excess.abs().max()) < COUNT_TOLERANCE:
            break
        low = torch.where(excess > 0, found, low)
        high = torch.where(excess < 0, found, high)
        newton = found + excess * temperature / gate_slope(logits).sum(-1, keepdim=True)
        inside = (newton > low) & (newton < high) & (iteration % 3 < 2)
        found = torch.where(excess == 0, found, torch.where(inside, newton, (low + high) / 2))
    return found
