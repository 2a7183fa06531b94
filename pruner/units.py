"""Kinds of units: which ones a target removes, and how their masks become the model's masks.

A kind is a stack of independent rows; each row must end with exactly its target count of units.

| kind         | rows                    | units of a row                   |
|--------------|-------------------------|----------------------------------|
| hidden       | 1                       | residual dims                    |
| layer        | 1                       | decoder blocks                   |
| attention    | 1                       | attention layers, whole          |
| feed_forward | 1                       | feed-forward layers, whole       |
| kv_group     | layers                  | KV heads with their query heads  |
| query_head   | layers * KV heads       | query heads of that KV head      |
| intermediate | layers                  | feed-forward channels            |

Every KV head keeps the same number of query heads, so that the result is an ordinary
grouped-query model. Attention and feed-forward layers are removed apart where a target says how
many stay; those of removed blocks then count as removed too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pruner.shapes import Shape
from trainer.models.masks import Masks

ON = 0.99
"""A unit at or above this mask value is on."""
OFF = 0.01
"""A unit at or below this mask value is off."""

LABELS = {
    "hidden": "hidden dimensions",
    "layer": "layers",
    "attention": "attention layers",
    "feed_forward": "feed-forward layers",
    "kv_group": "KV heads per layer",
    "query_head": "query heads per KV head",
    "intermediate": "FFN channels per layer",
}
"""What tables and pictures call the units of a row. Files keep the names of the kinds."""


APART = {"attention": "attention-layers", "feed_forward": "mlp-layers"}
"""Kinds of units that only some targets remove, and the sizes that say so."""


def label(kind: str) -> str:
    """A unit kind in words."""
    return LABELS.get(kind, kind.replace("_", " "))


@dataclass(frozen=True, slots=True)
class UnitKind:
    """One kind of units: `rows` rows of `units` units, of which `target` are kept in each row."""

    name: str
    rows: int
    units: int
    target: int
    uneven: bool = False
    """Rows may keep other numbers, as many in all."""


def unit_sizes(source: Shape) -> dict[str, tuple[int, int]]:
    """(rows, units) of every kind of units of a source, in a fixed order."""
    apart = {name: (1, source.size(key)) for name, key in APART.items()}
    return (
        {"hidden": (1, source.hidden), "layer": (1, source.layers)}
        | apart
        | {
            "kv_group": (source.layers, source.kv_heads),
            "query_head": (source.layers * source.kv_heads, source.group),
            "intermediate": (source.layers, source.ffn),
        }
    )


def measured_sizes(source: Shape) -> dict[str, tuple[int, int]]:
    """`unit_sizes` of those kinds whose importance is measured in any run."""
    return {name: size for name, size in unit_sizes(source).items() if name not in APART}


def unit_kinds(target: Shape, source: Shape) -> dict[str, UnitKind]:
    """The kinds of which the target keeps fewer units than the source has."""
    kinds = {}
    for name, (rows, units) in unit_sizes(source).items():
        kept = unit_sizes(target)[name][1]
        # Layers of removed blocks go with their blocks.
        with_blocks = name in APART and kept == target.layers
        if kept < units and not with_blocks:
            kinds[name] = UnitKind(name, rows, units, kept)
    return kinds


def to_masks(z: dict[str, Tensor], source: Shape, *, hold_scale: bool = False) -> Masks:
    """Joins the masks z [rows, units] of all kinds into the model's masks; differentiable.

    A query head's mask is the product of its KV head's and its own. `hold_scale` as in Masks.
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
        attention=z["attention"][0] if "attention" in z else None,
        feed_forward=z["feed_forward"][0] if "feed_forward" in z else None,
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
    """Units per row that are on: int64 [rows]."""
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


def polarised(z: dict[str, Tensor], kinds: dict[str, UnitKind]) -> bool:
    """True if each row has exactly its target count of units on and every other unit off."""
    for name, kind in kinds.items():
        on, off = on_counts(z[name]), (z[name] <= OFF).sum(-1)
        wanted = torch.full_like(on, kind.target)
        if kind.uneven:
            wanted = on if int(on.sum()) == kind.target * kind.rows else wanted
        if bool((on != wanted).any()) or bool((off != kind.units - wanted).any()):
            return False
    return True
