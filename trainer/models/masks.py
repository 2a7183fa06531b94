"""Multiplicative masks over a decoder's units: residual dimensions, blocks and their two layers,
heads, channels."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.models.computed import ALL_UNITS, ComputedUnits, LayerUnits, find_computed_units
from trainer.models.config import ModelConfig
from trainer.models.folding import Fold, WeightCache

MASK_NAMES = ("hidden", "layer", "head", "intermediate", "attention", "feed_forward")
"""Names of the masks of a model."""


@dataclass(frozen=True)
class StreamMasks:
    """The masks of the residual stream, as embeddings and norms need them."""

    mask: Tensor | None = None
    """[d] residual dimensions, None for ones."""
    units: Tensor | None = None
    """[m] int64: the dimensions that are computed; None: all d."""
    scale: Tensor | None = None
    """Scalar m / n, where n of the m computed dimensions are nonzero (z > 0)."""
    gain: Tensor | None = None
    """Scalar factor of the gains of all norms, None for 1."""
    cache: WeightCache | None = None
    """Keeps folded weights between passes; None: nothing does."""

    def reading(self) -> Fold:
        """The fold of a weight that reads the normed residual stream: it selects the computed
        columns and scales none, since the norm's gain carries their masks."""
        return Fold(columns=self.units, cache=self.cache)

    def norm_scale(self) -> Tensor | None:
        """[d] factors of every norm's gain; None for ones. A new tensor at each call, because a
        graph that passes shared would be gone after the first backward."""
        return self.mask if self.mask is None or self.gain is None else self.mask * self.gain

    def nonzero(self) -> Tensor | None:
        """[m] bool: which of the computed dimensions have z > 0; None: all."""
        if self.mask is None:
            return None
        mask = self.mask.detach()
        return (mask if self.units is None else mask[self.units]) > 0


@dataclass(frozen=True)
class LayerMasks:
    """The masks one block needs. Every field may be None, which means all ones."""

    stream: StreamMasks = StreamMasks()
    residual: Tensor | None = None
    """[d] or scalar: factor of everything the block adds to the residual stream."""
    attention: Tensor | None = None
    """Scalar: further factor of what attention adds."""
    feed_forward: Tensor | None = None
    """Scalar: further factor of what the feed-forward layer adds."""
    head: Tensor | None = None
    """[H] query heads."""
    intermediate: Tensor | None = None
    """[F] channels of the feed-forward layer."""
    units: LayerUnits = ALL_UNITS
    """What is computed of the block."""

    def reading(self, rows: Tensor | None) -> Fold:
        """Fold of a weight that reads the residual stream; `rows` are the outputs computed."""
        return self.stream.reading()._replace(rows=rows)

    def writing(
        self, columns: Tensor | None, column_scale: Tensor | None, own: Tensor | None
    ) -> Fold:
        """Fold of a weight that writes to the residual stream; `columns` are the inputs computed,
        `column_scale` the factors of all inputs, and `own` that of its layer."""
        factors = [factor for factor in (self.residual, own) if factor is not None]
        scale = math.prod(factors[1:], start=factors[0]) if factors else None
        return Fold(self.stream.units, scale, columns, column_scale, cache=self.stream.cache)

    def head_columns(self, head_dim: int) -> Tensor | None:
        """[H * head_dim]: the head mask for each input column of the output projection."""
        if self.head is None:
            return None
        return self.head.unsqueeze(-1).expand(-1, head_dim).reshape(-1)


@dataclass(frozen=True)
class Masks:
    """Masks of a whole model, in fp32; None means all ones.

    They stay fp32 under bf16 because FSDP is told not to cast inputs (`cast_forward_inputs=False`
    in trainer/parallel.py). Rounded to bf16 they would be too coarse for the threshold.
    """

    hidden: Tensor | None = None
    """[d] residual dimensions."""
    layer: Tensor | None = None
    """[L] blocks."""
    head: Tensor | None = None
    """[L, H] query heads."""
    intermediate: Tensor | None = None
    """[L, F] channels of the feed-forward layers."""
    attention: Tensor | None = None
    """[L] attention of the blocks, whole."""
    feed_forward: Tensor | None = None
    """[L] feed-forward layers of the blocks, whole."""
    computed: ComputedUnits | None = None
    """The units that are computed (`compact`); None: all, dense."""
    cache: WeightCache | None = None
    """Keeps folded weights between the forward passes of one draw (`compact`)."""
    hold_scale: bool = False
    """Multiplies the gains of all norms by sqrt(d / n), for n nonzero of d dimensions. These then
    keep the scale that a norm over all d gives them; otherwise they shrink as others leave."""

    def compact(self, config: ModelConfig, *, multiple: int) -> "Masks":
        """The same masks, with the forward pass restricted to the units that are not zero.

        Loss and gradients stay those of the dense masked model: a unit whose mask is exactly 0 adds
        nothing, and its weights would receive zeros. Only the gradient of a mask that is 0 differs.
        It does not matter, because a clipped mask has no slope there. Waits once for the device.

        Args:
            config: the model's architecture.
            multiple: dimensions and channels are padded to multiples of this number, with units
                whose mask is 0.
        """
        computed = find_computed_units(self.tensors(), config, multiple)
        return replace(self, computed=computed, cache=None)

    def stream(self) -> StreamMasks:
        """The masks of the residual stream. The number of nonzero dimensions stays a tensor, so
        that the host does not wait for it."""
        units = None if self.computed is None else self.computed.hidden
        if self.hidden is None:
            return StreamMasks(units=units, cache=self.cache)
        nonzero = (self.hidden.detach() > 0).sum().clamp(min=1)
        width = self.hidden.shape[0] if units is None else units.shape[0]
        # A tensor divided by a tensor: number / tensor is a rounded reciprocal, 1 only nearly.
        scale = self.hidden.new_full((), width) / nonzero
        gain = None
        if self.hold_scale:
            gain = (self.hidden.new_full((), self.hidden.shape[0]) / nonzero).sqrt()
        return StreamMasks(self.hidden, units, scale, gain, self.cache)

    def for_layer(self, index: int, stream: StreamMasks) -> LayerMasks:
        """The masks of block `index`, with those of the stream, which all blocks share."""
        layer = None if self.layer is None else self.layer[index]
        residual = self.hidden if layer is None else layer
        if self.hidden is not None and layer is not None:
            residual = self.hidden * layer
        return LayerMasks(
            stream=stream,
            residual=residual,
            attention=None if self.attention is None else self.attention[index],
            feed_forward=None if self.feed_forward is None else self.feed_forward[index],
            head=None if self.head is None else self.head[index],
            intermediate=None if self.intermediate is None else self.intermediate[index],
            units=ALL_UNITS if self.computed is None else self.computed.layers[index],
        )

    @classmethod
    def of(cls, tensors: dict[str, Tensor], *, hold_scale: bool = False) -> "Masks":
        """Dense masks from tensors by name, as `tensors` gives them."""
        assert tensors.keys() <= set(MASK_NAMES), sorted(tensors)
        return cls(
            hidden=tensors.get("hidden"),
            layer=tensors.get("layer"),
            attention=tensors.get("attention"),
            feed_forward=tensors.get("feed_forward"),
            head=tensors.get("head"),
            intermediate=tensors.get("intermediate"),
            hold_scale=hold_scale,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The masks that are present, by name."""
        return {name: z for name in MASK_NAMES if (z := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> "Masks":
        """The same masks on another device, dense."""
        return self.with_tensors({name: z.to(device) for name, z in self.tensors().items()})

    def with_tensors(self, tensors: dict[str, Tensor]) -> "Masks":
        """The same options with other values, dense."""
        return Masks.of(tensors, hold_scale=self.hold_scale)
