"""Sizes of single blocks, for models whose blocks are not all alike."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from data.errors import InputError
from data.records import fits

SUFFIX = "_uneven"
"""End of the `model_type` of such a model; what is before it is the family's."""
KEY = "layer_sizes"
"""Key of config.json that lists them."""
_KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


class LayerSizes(NamedTuple):
    """Sizes of one block; 0 for those of a layer that it lacks."""

    num_heads: int
    """Query heads; 0: no attention."""
    num_kv_heads: int
    """Key/value heads; each serves num_heads / num_kv_heads query heads."""
    intermediate_size: int
    """Channels of the feed-forward layer; 0: there is none."""


def read_layer_sizes(values: dict[str, Any]) -> tuple[LayerSizes, ...]:
    """Those of the content of a config.json. Raises InputError where it lists none."""
    found = values.get(KEY)
    if not fits(found, [dict.fromkeys(_KEYS, int)]) or not found:
        raise InputError(
            f"`{KEY}` is missing or not a list of blocks with {', '.join(_KEYS)}, which "
            f"model_type {values['model_type']!r} needs; fetch config.json again"
        )
    return tuple(LayerSizes(*(block[key] for key in _KEYS)) for block in found)


def written_layer_sizes(sizes: Sequence[LayerSizes]) -> list[dict[str, int]]:
    """What config.json says of them."""
    return [dict(zip(_KEYS, block, strict=True)) for block in sizes]


def require_layer_sizes(sizes: Sequence[LayerSizes], largest: LayerSizes, number: int) -> None:
    """Raises InputError unless `sizes` are those of `number` blocks that a model can have, the
    largest of which are `largest`."""
    if len(sizes) != number:
        raise InputError(f"`{KEY}` lists {len(sizes)} blocks, and the model has {number}")
    for index, block in enumerate(sizes):
        heads, kv_heads, channels = block
        if min(block) < 0 or not (heads or channels) or bool(heads) != bool(kv_heads):
            raise InputError(
                f"block {index} has {heads} heads, {kv_heads} KV heads and {channels} channels; it "
                "needs heads and KV heads, channels, or all of them"
            )
        if heads and heads % kv_heads:
            raise InputError(
                f"block {index} has {heads} heads, no multiple of its {kv_heads} KV heads; every "
                "key/value head must serve equally many query heads"
            )
    if not any(block.num_heads for block in sizes):
        raise InputError("no block has attention, so that no token would see another")
    if largest != tuple(map(max, zip(*sizes, strict=True))):
        raise InputError(
            f"`{KEY}` has {', '.join(map(str, map(max, zip(*sizes, strict=True))))} at most, and "
            f"the config says {', '.join(map(str, largest))} (heads, KV heads, channels)"
        )
