"""Which units a masked forward pass has to compute: those whose mask is not zero."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.models.config import ModelConfig
from trainer.models.layer_sizes import LayerSizes


class LayerUnits(NamedTuple):
    """The units of one block that are computed, ascending int64 indices; None means all."""

    queries: Tensor | None = None
    """[h * head_dim] channels of query heads; every computed KV head has equally many heads."""
    keys: Tensor | None = None
    """[k * head_dim] channels of the KV heads they read."""
    fused: Tensor | None = None
    """[3 h * head_dim] rows of those heads in a matrix that fuses query, key and value."""
    channels: Tensor | None = None
    """[f] feed-forward channels."""
    skipped: bool = False
    """The block's own mask is 0, or those of both its layers: it passes its input on."""
    attends: bool = True
    """The mask of its attention is not 0."""
    feeds: bool = True
    """The mask of its feed-forward layer is not 0."""


ALL_UNITS = LayerUnits()


@dataclass(frozen=True, slots=True)
class ComputedUnits:
    """The units of a model that are computed."""

    hidden: Tensor | None
    """[m] int64 residual dimensions; None: all."""
    layers: list[LayerUnits]


def find_computed_units(
    masks: Mapping[str, Tensor], config: ModelConfig, multiple: int
) -> ComputedUnits:
    """The nonzero units (z > 0) of those masks that are present, and what pads them.

    Args:
        masks: any of hidden [d], layer, attention and feed_forward [L], head [L, H] and
            intermediate [L, F].
        config: the model's architecture.
        multiple: units with mask 0 pad the dimensions and channels to multiples of this. They pad
            the heads so that all KV heads with a nonzero query head have equally many.

    At least one unit of each kind is computed. One transfer from the masks' device and one to it.
    """
    if not masks:
        return ComputedUnits(None, [ALL_UNITS] * config.num_layers)
    nonzero = _to_host(masks)
    upload = _Upload(next(iter(masks.values())).device)
    hidden = nonzero.get("hidden")
    upload.add("hidden", None if hidden is None else padded_units(hidden, multiple))
    every = np.ones(config.num_layers, dtype=bool)
    attends, feeds = (
        nonzero.get("layer", every) & nonzero.get(name, every)
        for name in ("attention", "feed_forward")
    )
    for index in range(config.num_layers):
        if "head" in nonzero and attends[index]:
            chosen = computed_heads(nonzero["head"][index], config.num_kv_heads)
            if chosen is not None:
                heads, groups = chosen
                upload.add(f"{index}.queries", expand(heads, config.head_dim))
                if config.traits.fused_qkv:
                    upload.add(f"{index}.fused", expand(heads, 3 * config.head_dim))
                else:
                    upload.add(f"{index}.keys", expand(groups, config.head_dim))
        if "intermediate" in nonzero and feeds[index]:
            channels = padded_units(nonzero["intermediate"][index], multiple)
            upload.add(f"{index}.channels", channels)
    found = upload.send()
    layers = [
        LayerUnits(
            queries=found.get(f"{index}.queries"),
            keys=found.get(f"{index}.keys"),
            fused=found.get(f"{index}.fused"),
            channels=found.get(f"{index}.channels"),
            skipped=not (attends[index] or feeds[index]),
            attends=bool(attends[index]),
            feeds=bool(feeds[index]),
        )
        for index in range(config.num_layers)
    ]
    return ComputedUnits(found.get("hidden"), layers)


def padded_units(nonzero: np.ndarray, multiple: int) -> np.ndarray | None:
    """Indices of the nonzero units and of the first others, as many as make the number a positive
    multiple of `multiple`; None when that is all of them. `nonzero` is bool [F]."""
    units = np.flatnonzero(nonzero)
    count = max(1, -(-len(units) // multiple)) * multiple
    if count >= len(nonzero):
        return None
    padding = np.flatnonzero(~nonzero)[: count - len(units)]
    return np.sort(np.concatenate([units, padding]))


def computed_heads(nonzero: np.ndarray, kv_heads: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Indices of the query heads and of the KV heads to compute; None when that is all of them.

    `nonzero` is bool [H]. KV heads without a nonzero query head are left out. Of each other one as
    many query heads are computed as the fullest of them has nonzero.
    """
    grouped = nonzero.reshape(kv_heads, -1)
    counts = grouped.sum(1)
    groups = np.flatnonzero(counts) if counts.any() else np.array([0])
    size = max(1, int(counts.max()))
    if size * len(groups) == len(nonzero):
        return None
    # A stable sort puts the nonzero heads of a group first, in order.
    own = np.sort(np.argsort(~grouped[groups], axis=1, kind="stable")[:, :size], axis=1)
    return (groups[:, None] * grouped.shape[1] + own).ravel(), groups


def expand(heads: np.ndarray, width: int) -> np.ndarray:
    """Indices of all channels of `heads`, each `width` wide."""
    return (heads[:, None] * width + np.arange(width)).ravel()


def computed_sizes(config: ModelConfig, units: LayerUnits) -> LayerSizes:
    """The sizes of what is computed of a block; `config` is that of the model, of even blocks."""
    keys_of = units.keys if units.fused is None else units.queries
    queries = config.query_size if units.queries is None else len(units.queries)
    keys = config.kv_size if keys_of is None else len(keys_of)
    channels = config.intermediate_size if units.channels is None else len(units.channels)
    heads = queries // config.head_dim if units.attends else 0
    kv_heads = keys // config.head_dim if units.attends else 0
    return LayerSizes(heads, kv_heads, channels if units.feeds else 0)


def computed_config(
    config: ModelConfig, computed: ComputedUnits, indices: Sequence[int]
) -> ModelConfig:
    """The architecture of a model of what is computed of the blocks `indices`."""
    sizes = [computed_sizes(config, computed.layers[index]) for index in indices]
    heads, kv_heads, channels = map(max, zip(*sizes, strict=True))
    return replace(
        config,
        num_layers=len(sizes),
        hidden_size=config.hidden_size if computed.hidden is None else len(computed.hidden),
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=channels,
        layer_sizes=tuple(sizes),
    )


def computed_flops(
    config: ModelConfig, computed: ComputedUnits, seq_len: int, causal: bool
) -> float:
    """Forward plus backward FLOPs of one token through the computed units, in the conventions of
    ModelConfig.flops_per_token."""
    blocks = [index for index, units in enumerate(computed.layers) if not units.skipped]
    if blocks:
        return computed_config(config, computed, blocks).flops_per_token(seq_len, causal)
    width = config.hidden_size if computed.hidden is None else len(computed.hidden)
    return 6.0 * config.vocab_size * width


def _to_host(masks: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    # Not z > 0: a NaN must reach the loss, where it is noticed.
    joined = torch.cat([~(z.detach() <= 0).flatten() for z in masks.values()]).cpu().numpy()
    ends = np.cumsum([z.numel() for z in masks.values()])
    parts = np.split(joined, ends[:-1])
    return {name: part.reshape(masks[name].shape) for name, part in zip(masks, parts, strict=True)}


class _Upload:
    """Index arrays collected by name and sent to the device in one piece."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, name: str, array: np.ndarray | None) -> None:
        if array is not None:
            self.arrays[name] = array

    def send(self) -> dict[str, Tensor]:
        if not self.arrays:
            return {}
        joined = torch.from_numpy(np.concatenate(list(self.arrays.values())).astype(np.int64))
        parts = joined.to(self.device).split([len(array) for array in self.arrays.values()])
        return dict(zip(self.arrays, parts, strict=True))
