"""The scores that masks start from, and the rule that trains them."""

import torch
from torch import Tensor

from pruner.config import MaskConfig
from pruner.projection import Projection
from pruner.rules import Rule
from pruner.sheared_llama import Lagrangian
from pruner.units import UnitKind

FLAT_STD = 0.01
FLAT_MEAN = {"projection": 0.0, "sheared-llama": 5.0}
IMPORTANCE_MEAN = {"projection": 0.0, "sheared-llama": 2.0}
"""log-alpha of an average unit of sheared-llama: P(z = 1) is 0.6, and no unit is held at its
bound. A projection does not depend on the mean."""
FLOOR = 1e-3
"""Least importance that is told apart, relative to the median of a row."""


def initial_scores(
    kinds: dict[str, UnitKind],
    config: MaskConfig,
    importance: dict[str, Tensor] | None,
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Scores [rows, units] fp32 to start from; `importance` (pruner.importance.measure) may be None
    for flat scores. `config` is resolved."""
    generator = torch.Generator().manual_seed(seed % 2**64)
    scores = {}
    for name, kind in kinds.items():
        if config.init == "flat":
            noise = torch.randn(kind.rows, kind.units, generator=generator)
            values = FLAT_STD * noise + FLAT_MEAN[config.rule]
        else:
            assert importance is not None
            values = standardise(importance[name]) + IMPORTANCE_MEAN[config.rule]
        scores[name] = values.to(device)
    return scores


def standardise(importance: Tensor) -> Tensor:
    """ln(importance) with mean 0 and standard deviation 1 in each row, fp32; 0 in constant rows.

    Values below a thousandth of the row's median count as that: an unused unit, whose logarithm has
    no bound, would flatten the differences of all others.
    """
    values = importance.double()
    floor = values.median(-1, keepdim=True).values * FLOOR
    logs = torch.maximum(values, floor).clamp(min=1e-30).log()
    centred = logs - logs.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    return torch.where(deviation > 1e-9, centred / deviation.clamp(min=1e-9), 0.0).float()


def make_rule(
    kinds: dict[str, UnitKind],
    scores: dict[str, Tensor],
    config: MaskConfig,
    steps: int,
    seed: int,
) -> Rule:
    """The rule that `config` (resolved) names, starting from `scores`."""
    rule = Projection if config.rule == "projection" else Lagrangian
    return rule(kinds, scores, config, steps, seed)
