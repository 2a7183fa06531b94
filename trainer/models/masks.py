"""Multiplicative masks over a decoder's units: residual dimensions, blocks, heads, channels."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerMasks:
    """The masks one block needs. Every field may be None, which means all ones."""

    hidden: Tensor | None = None
    """[d] residual dimensions, shared by all blocks."""
    hidden_scale: Tensor | None = None
    """Scalar d / n with n the number of live residual dimensions (z > 0)."""
    layer: Tensor | None = None
    """Scalar of the whole block."""
    head: Tensor | None = None
    """[H] query heads."""
    intermediate: Tensor | None = None
    """[F] channels of the feed-forward layer."""

    @property
    def residual(self) -> Tensor | None:
        """[d] or scalar: factor of everything the block adds to the residual stream."""
        if self.hidden is None or self.layer is None:
            return self.layer if self.hidden is None else self.hidden
        return self.hidden * self.layer

    def head_columns(self, head_dim: int) -> Tensor | None:
        """[H * head_dim]: the head mask for each input column of the output projection."""
        if self.head is None:
            return None
        return self.head.unsqueeze(-1).expand(-1, head_dim).reshape(-1)


@dataclass(frozen=True)
class Masks:
    """Masks of a whole model, in fp32; None means all ones.

    They stay fp32 under bf16 because FSDP is told not to cast inputs (`cast_forward_inputs=False`
    in trainer/parallel.py): rounded to bf16, they would lose the resolution the constraint needs.
    """

    hidden: Tensor | None = None
    """[d] residual dimensions."""
    layer: Tensor | None = None
    """[L] blocks."""
    head: Tensor | None = None
    """[L, H] query heads."""
    intermediate: Tensor | None = None
    """[L, F] channels of the feed-forward layers."""

    @cached_property
    def hidden_scale(self) -> Tensor | None:
        """Scalar d / n, n = number of residual dimensions with z > 0; a tensor, so no host sync."""
        if self.hidden is None:
            return None
        live = (self.hidden.detach() > 0).sum().clamp(min=1)
        # A tensor divided by a tensor: number / tensor is a rounded reciprocal, 1 only nearly.
        return self.hidden.new_full((), self.hidden.shape[0]) / live

    def for_layer(self, index: int) -> LayerMasks:
        """The masks of block `index`, as views of this object's tensors."""
        return LayerMasks(
            hidden=self.hidden,
            hidden_scale=self.hidden_scale,
            layer=None if self.layer is None else self.layer[index],
            head=None if self.head is None else self.head[index],
            intermediate=None if self.intermediate is None else self.intermediate[index],
        )

    def tensors(self) -> dict[str, Tensor]:
        """The masks that are present, by family name."""
        families = ("hidden", "layer", "head", "intermediate")
        return {name: z for name in families if (z := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> "Masks":
        """The same masks on another device."""
        return Masks(**{name: z.to(device) for name, z in self.tensors().items()})
