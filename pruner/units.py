"""Mask families: which units a target removes, and how their masks become the model's masks.

A family is a stack of independent rows; each row must end with exactly its target count of units.

| family       | rows                    | units of a row                   |
|--------------|-------------------------|----------------------------------|
| hidden       | 1                       | residual dims                    |
| layer        | 1                       | decoder blocks                   |
| kv_group     | layers                  | KV heads with their query heads  |
| query_head   | layers * KV heads       | query heads of that KV head      |
| intermediate | layers                  | feed-forward channels            |

Every KV head keeps the same number of query heads, so that the result is an ordinary
grouped-query model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pruner.shapes import Shape
from trainer.models.masks import Masks

ON = 0.99
"""A unit at or above this mask value is alive."""
OFF = 0.01
"""A unit at or below this mask value is removed."""


@dataclass(frozen=True, slots=True)
class Family:
    """One mask family: `rows` rows of `units` units, of which `target` are kept in each row."""

    name: str
    rows: int
    units: int
    target: int


def families(target: Shape, source: Shape) -> dict[str, Family]:
    """The families whose target is smaller than the source, in a fixed order."""
    every = (
        Family("hidden", 1, source.hidden, target.hidden),
        Family("layer", 1, source.layers, target.layers),
        Family("kv_group", source.layers, source.kv_heads, target.kv_heads),
        Family("query_head", source.layers * source.kv_heads, source.group, target.group),
        Family("intermediate", source.layers, source.ffn, target.ffn),
    )
    return {family.name: family for family in every if family.target < family.units}


def to_masks(z: dict[str, Tensor], source: Shape, *, hold_scale: bool = False) -> Masks:
    """Join family masks z [rows, units] into the model's masks; differentiable.

    A query head's mask is the product of its KV group's and its own. `hold_scale` as in Masks.
    """
    head = None
    if "kv_group" in z:
        head = z["kv_group"].repeat_interleave(source.group, dim=1)
    if "query_head" in z:
        own = z["query_head"].view(source.layers, source.heads)
        head = own if head is None else head * own
    return Masks(
        hidden=z["hidden"][0] if "hidden" in z else None,
        layer=z["layer"][0] if "layer" in z else None,
        head=head,
        intermediate=z.get("intermediate"),
        hold_scale=hold_scale,
    )


def top_units(scores: Tensor, count: int) -> Tensor:
    """Indices [rows, count], ascending, of the largest scores of each row; ties go to the lower."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def indicator(scores: Tensor, count: int) -> Tensor:
    """fp32 mask [rows, units]: 1 for the `count` largest scores of each row, else 0."""
    mask = torch.zeros_like(scores, dtype=torch.float32)
    return mask.scatter_(-1, top_units(scores, count), 1.0)


def on_counts(z: Tensor) -> Tensor:
    """Units per row that are alive: int64 [rows]."""
    return (z >= ON).sum(-1)


def span(counts: list[int]) -> str:
    """The smallest and the largest count, "3..5", or the one that all are."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}..{high}"


def kept_indices(z: Tensor) -> Tensor:
    """Indices [rows, count] of the units with z > 0; all rows must hold the same number of them."""
    counts = (z > 0).sum(-1)
    assert bool((counts == counts[0]).all()), f"rows keep different counts: {counts.tolist()}"
    return torch.nonzero(z > 0)[:, 1].view(z.shape[0], -1)


def polarised(z: dict[str, Tensor], members: dict[str, Family]) -> bool:
    """True if each row has exactly its target count alive and every other unit removed."""
    return all(
        bool((on_counts(z[name]) == family.target).all())
        and bool(((z[name] <= OFF).sum(-1) == family.units - family.target).all())
        for name, family in members.items()
    )
