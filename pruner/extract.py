"""From masks and the source's tensors to the tensors of an ordinary, smaller model.

A unit is kept if its mask is above 0. Weights are folded as in the forward pass on the kept units
(trainer.models.masks, trainer.models.folding), so the smaller model is what that pass computes.
Tensors are handled one at a time, on the CPU.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from trainer.models.computed import computed_config
from trainer.models.config import ModelConfig
from trainer.models.families import Role
from trainer.models.folding import Fold, fold_vector, fold_weight
from trainer.models.masks import LayerMasks, Masks


class Extraction:
    """What to keep of each tensor, worked out from the masks once.

    Every kept KV head of a block must keep equally many query heads (AssertionError).
    """

    def __init__(self, config: ModelConfig, masks: Masks) -> None:
        self.source = config
        self.names = config.traits.names
        self.masks = masks.to("cpu").compact(config, multiple=1)
        self.stream = self.masks.stream()
        layers = (self.masks.for_layer(index, self.stream) for index in range(config.num_layers))
        self.blocks = {
            index: masks for index, masks in enumerate(layers) if not masks.units.skipped
        }
        """The masks of the kept blocks, by number in the source."""
        assert self.blocks, "no block is kept"
        self.config = self._config()

    def _config(self) -> ModelConfig:
        """The smaller model's; AssertionError where the masks leave none."""
        assert self.masks.computed is not None
        _require_nonzero(self.masks.hidden, self.stream.units, "no hidden dimension is kept")
        for index, block in self.blocks.items():
            if block.units.attends:
                columns = block.head_columns(self.source.head_dim)
                uneven = f"KV heads keep different query heads in block {index}"
                _require_nonzero(columns, block.units.queries, uneven)
            if block.units.feeds:
                empty = f"no channel is kept in block {index}"
                _require_nonzero(block.intermediate, block.units.channels, empty)
        return computed_config(self.source, self.masks.computed, list(self.blocks))

    @torch.no_grad()
    def tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The smaller model's (name, tensor), for each of the source's that remains.

        They keep the input's dtype; where nothing is cut or scaled, they are the input's own.
        """
        prefix = f"{self.names.blocks}."
        numbers = {index: str(number) for number, index in enumerate(self.blocks)}
        for name, tensor in tensors:
            index, _, part = name.removeprefix(prefix).partition(".")
            if not name.startswith(prefix):
                if name != f"{self.names.head}.weight" or not self.source.tie_embeddings:
                    yield name, self._outer(name, tensor)
            elif int(index) in self.blocks:
                block = self.blocks[int(index)]
                if self._keeps(part, block):
                    yield f"{prefix}{numbers[int(index)]}.{part}", self._inner(part, tensor, block)

    def _keeps(self, part: str, block: LayerMasks) -> bool:
        """Whether a kept block keeps the layer to which its tensor `part` belongs."""
        attends = self.names.attends(part.rpartition(".")[0])
        return block.units.attends if attends else block.units.feeds

    def _outer(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor outside the blocks.

        With tied embeddings the head carries the mask of the embedding, so the final norm does not;
        otherwise the final norm carries it and the head stays as it is.
        """
        stream = self.stream
        module, _, kind = name.rpartition(".")
        if module == self.names.embedding:
            return fold_weight(tensor, Fold(columns=stream.units, column_scale=stream.mask), name)
        if module == self.names.head:
            return fold_weight(tensor, stream.reading(), name)
        assert module == self.names.final_norm, f"unknown tensor {name}"
        if not self.source.tie_embeddings:
            return self._norm(kind, tensor)
        return fold_vector(tensor, stream.units, stream.gain if kind == "weight" else None)

    def _norm(self, kind: str, tensor: Tensor) -> Tensor:
        """Gain or bias of a norm over the residual stream."""
        scale = self.stream.norm_scale() if kind == "weight" else self.stream.mask
        return fold_vector(tensor, self.stream.units, scale)

    def _inner(self, part: str, tensor: Tensor, block: LayerMasks) -> Tensor:
        """A tensor of a kept block; `part` is its name inside the block."""
        module, _, kind = part.rpartition(".")
        role = self.names.modules[module]
        if role is Role.NORM:
            return self._norm(kind, tensor)
        if role is Role.HEAD_NORM:
            return tensor
        fold = _fold(role, block, self.source.head_dim)
        if kind == "weight":
            return fold_weight(tensor, fold, part)
        return fold_vector(tensor, fold.rows, fold.row_scale)


def _fold(role: Role, block: LayerMasks, head_dim: int) -> Fold:
    """How the block's forward pass folds its matrices of this role."""
    units = block.units
    if role is Role.ATTENTION_OUTPUT:
        return block.writing(units.queries, block.head_columns(head_dim), block.attention)
    if role is Role.FEED_FORWARD_OUTPUT:
        return block.writing(units.channels, block.intermediate, block.feed_forward)
    rows = {
        Role.QUERIES: units.queries,
        Role.KEYS: units.keys,
        Role.FUSED: units.fused,
        Role.CHANNELS: units.channels,
    }
    return block.reading(rows[role])


def _require_nonzero(mask: Tensor | None, units: Tensor | None, problem: str) -> None:
    """AssertionError with `problem` unless the mask of every computed unit is above 0."""
    if mask is not None:
        assert bool(((mask if units is None else mask[units]) > 0).all()), problem
