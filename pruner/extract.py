"""From masks and the source's tensors to the tensors of an ordinary, smaller model.

A unit is kept if its mask is above 0; a kept unit's mask value is multiplied into the weights, in
the places where the masked forward pass multiplies it. Which masks belong to a tensor's rows and
columns is in trainer.models.families. Tensors are handled one at a time.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.models.config import ModelConfig
from trainer.models.families import Role
from trainer.models.masks import Masks


@dataclass(frozen=True, slots=True)
class _Block:
    """Kept indices and mask values of one kept block."""

    number: int
    queries: Tensor
    keys: Tensor
    fused: Tensor
    channels: Tensor
    query_scale: Tensor
    channel_scale: Tensor
    residual_scale: Tensor


class Extraction:
    """What to keep of each tensor, worked out from the masks once.

    Rows of one family must keep equally many units in all kept blocks, and every kept KV head
    equally many query heads; otherwise the result is no uniform model (AssertionError).
    """

    def __init__(self, config: ModelConfig, masks: Masks) -> None:
        masks = masks.to("cpu")
        self.source = config
        self.names = config.traits.names
        self.hidden_scale = _values(masks.hidden, config.hidden_size)
        self.hidden = _live(self.hidden_scale)
        self.norm_gain = 1.0
        if masks.hold_scale and masks.hidden is not None:
            self.norm_gain = math.sqrt(config.hidden_size / self.hidden.numel())
        layer = _values(masks.layer, config.num_layers)
        self.blocks: dict[int, _Block] = {}
        for number, index in enumerate(_live(layer).tolist()):
            self.blocks[index] = self._block(number, index, float(layer[index]), masks)
        assert self.blocks, "no block is kept"
        self.config = self._config()

    def _block(self, number: int, index: int, layer: float, masks: Masks) -> _Block:
        config = self.source
        head = _values(None if masks.head is None else masks.head[index], config.num_heads)
        ffn = masks.intermediate
        channel = _values(None if ffn is None else ffn[index], config.intermediate_size)
        groups = (head > 0).view(config.num_kv_heads, -1).any(-1)
        queries = _live(head)
        channels = _live(channel)
        return _Block(
            number=number,
            queries=_expand(queries, config.head_dim),
            keys=_expand(torch.nonzero(groups).flatten(), config.head_dim),
            fused=_expand(queries, 3 * config.head_dim),
            channels=channels,
            query_scale=head[queries].repeat_interleave(config.head_dim),
            channel_scale=channel[channels],
            residual_scale=self.hidden_scale[self.hidden] * layer,
        )

    def _config(self) -> ModelConfig:
        sizes = {
            (block.queries.numel(), block.keys.numel(), block.channels.numel())
            for block in self.blocks.values()
        }
        assert len(sizes) == 1, f"blocks keep different numbers of units: {sorted(sizes)}"
        queries, keys, channels = sizes.pop()
        head_dim = self.source.head_dim
        for block in self.blocks.values():
            owner = block.queries // (head_dim * self.source.num_heads // self.source.num_kv_heads)
            counts = owner.bincount()
            live = counts[counts > 0]
            assert bool((live == live[0]).all()), f"KV heads keep different query heads: {counts}"
        return replace(
            self.source,
            num_layers=len(self.blocks),
            hidden_size=self.hidden.numel(),
            intermediate_size=channels,
            num_heads=queries // head_dim,
            num_kv_heads=keys // head_dim,
        )

    def tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The smaller model's (name, tensor), for each of the source's that remains.

        Slices are new contiguous tensors of the input's dtype and device.
        """
        prefix = f"{self.names.blocks}."
        for name, tensor in tensors:
            if not name.startswith(prefix):
                if name == f"{self.names.head}.weight" and self.source.tie_embeddings:
                    continue
                yield name, self._outer(name, tensor)
                continue
            index, _, part = name.removeprefix(prefix).partition(".")
            block = self.blocks.get(int(index))
            if block is not None:
                yield f"{prefix}{block.number}.{part}", self._inner(part, tensor, block)

    def _outer(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor outside the blocks.

        With tied embeddings the head carries the mask of the embedding, so the final norm does not;
        otherwise the final norm carries it and the head stays as it is.
        """
        scale = self.hidden_scale[self.hidden]
        module = name.rpartition(".")[0]
        if module == self.names.embedding:
            return _take(tensor, columns=self.hidden, column_scale=scale)
        if module == self.names.final_norm:
            tied = self.source.tie_embeddings
            return self._norm(tensor, name, torch.ones_like(scale) if tied else scale)
        assert module == self.names.head, f"unknown tensor {name}"
        return _take(tensor, columns=self.hidden)

    def _norm(self, tensor: Tensor, name: str, scale: Tensor) -> Tensor:
        """Gain or bias of a norm over the residual stream."""
        gain = self.norm_gain if name.endswith(".weight") else 1.0
        return _take(tensor, rows=self.hidden, row_scale=scale * gain)

    def _inner(self, part: str, tensor: Tensor, block: _Block) -> Tensor:
        """A tensor of a kept block; `part` is its name inside the block."""
        module, _, kind = part.rpartition(".")
        role = self.names.modules[module]
        columns = kind == "weight"
        if role is Role.NORM:
            return self._norm(tensor, part, self.hidden_scale[self.hidden])
        if role is Role.HEAD_NORM:
            return tensor.clone()
        if role in (Role.ATTENTION_OUTPUT, Role.FEED_FORWARD_OUTPUT):
            attention = role is Role.ATTENTION_OUTPUT
            units = block.queries if attention else block.channels
            scale = block.query_scale if attention else block.channel_scale
            return _take(
                tensor,
                rows=self.hidden,
                row_scale=block.residual_scale,
                columns=units if columns else None,
                column_scale=scale if columns else None,
            )
        rows = {
            Role.QUERIES: block.queries,
            Role.KEYS: block.keys,
            Role.FUSED: block.fused,
            Role.CHANNELS: block.channels,
        }[role]
        return _take(tensor, rows=rows, columns=self.hidden if columns else None)


def extract(
    config: ModelConfig, masks: Masks, tensors: Iterable[tuple[str, Tensor]]
) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """The config and the (lazily computed) tensors of the model that `masks` describe."""
    extraction = Extraction(config, masks)
    return extraction.config, extraction.tensors(tensors)


def _values(mask: Tensor | None, size: int) -> Tensor:
    if mask is None:
        return torch.ones(size)
    assert mask.shape == (size,), f"mask of shape {tuple(mask.shape)} for {size} units"
    return mask.detach()


def _live(mask: Tensor) -> Tensor:
    return torch.nonzero(mask > 0).flatten()


def _expand(heads: Tensor, head_dim: int) -> Tensor:
    """Indices of all channels of `heads`."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _take(
    tensor: Tensor,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """tensor[rows][:, columns], times the scales in fp32."""
    result = tensor.float()
    if rows is not None:
        result = result.index_select(0, rows.to(tensor.device))
    if columns is not None:
        result = result.index_select(1, columns.to(tensor.device))
    if row_scale is not None:
        scale = row_scale.to(tensor.device)
        result = result * (scale if result.ndim == 1 else scale[:, None])
    if column_scale is not None:
        result = result * column_scale.to(tensor.device)
    return result.to(tensor.dtype).contiguous()
