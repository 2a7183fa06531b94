"""What shortening removes: whole blocks, or attention and feed-forward layers apart."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pruner.shapes import config_of, shape_of
from pruner.units import APART
from trainer.models.config import ModelConfig
from trainer.models.masks import Masks

Units = Literal["block", "attention", "feed-forward", "both"]
KINDS: Mapping[Units, tuple[str, ...]] = {
    "block": ("layer",),
    "attention": ("attention",),
    "feed-forward": ("feed_forward",),
    "both": ("attention", "feed_forward"),
}
"""Kinds of units (pruner.units) of what is removed."""
WORDS: Mapping[Units, str] = {
    "block": "blocks",
    "attention": "attention layers",
    "feed-forward": "feed-forward layers",
    "both": "attention and feed-forward layers",
}
_SIZES = {"layer": "layers", "attention": "attention_layers", "feed_forward": "mlp_layers"}


class Part(NamedTuple):
    """One block, or one of its two layers."""

    kind: str
    """layer, attention or feed_forward."""
    block: int

    @property
    def name(self) -> int | str:
        """The number of a block; "attention 7" or "feed-forward 7" for a layer of one."""
        return self.block if self.kind == "layer" else f"{self.kind.replace('_', '-')} {self.block}"


def parts_of(units: Units, layers: int) -> list[Part]:
    """All that could be removed of a model of `layers` blocks, in the order of the model."""
    return [Part(kind, index) for index in range(layers) for kind in KINDS[units]]


def marks(
    removed: Iterable[Part], layers: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """[L] fp64 of each kind that is `removed`, 0 for what goes; of blocks too where both layers of
    one go."""
    z: dict[str, Tensor] = {}
    for kind, index in removed:
        row = z.setdefault(kind, torch.ones(layers, dtype=torch.float64, device=device))
        row[index] = 0
    if {"attention", "feed_forward"} <= z.keys():
        kept = torch.maximum(z["attention"], z["feed_forward"])
        if not kept.all():
            z["layer"] = kept
    return z


def without(removed: Iterable[Part], model: ModelConfig, device: torch.device) -> Masks:
    """Masks that skip the parts `removed` and scale nothing."""
    found = marks(removed, model.num_layers, device)
    masks = Masks.of({kind: row.float() for kind, row in found.items()})
    masks = masks.compact(model, multiple=1)
    return replace(masks, layer=None, attention=None, feed_forward=None)


def part_parameters(model: ModelConfig, units: Units) -> int:
    """Parameters of one block, or of one of its layers."""
    kind = KINDS[units][0]
    longer = config_of(replace(shape_of(model), layers=model.num_layers + 1), model)
    shape = replace(shape_of(longer), **{_SIZES[kind]: model.num_layers})
    return longer.num_parameters() - config_of(shape, model).num_parameters()


def left_over(removed: Sequence[Part], layers: int) -> dict[str, int]:
    """The sizes of --target that say how many blocks, attention and feed-forward layers are left of
    `layers` each; the layers only where they are not as many as the blocks."""
    z = marks(removed, layers)
    blocks = int(z.get("layer", torch.ones(layers)).sum())
    sizes = {"layers": blocks}
    for kind, key in APART.items():
        count = int(z[kind].sum()) if kind in z else blocks
        if count != blocks:
            sizes[key] = count
    return sizes
