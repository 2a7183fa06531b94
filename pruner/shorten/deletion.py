"""The loss without each block, all blocks in one pass.

The naive loop runs the model once for every block that it leaves out, and so computes everything in
front of that block as often as there are blocks behind it. Here the stream that goes around a block
leaves the intact one in front of it and joins the batch behind it: what is in front is computed
once, and every weight is read once for all streams. L blocks take L (L - 1) / 2 + L passes through
a block instead of L (L - 1).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trainer.models.decoder import CausalLM, LossOutput, next_token_targets
from trainer.models.masks import Masks


class Deletions:
    """Forward hooks that add to the sequences of a forward pass, for each of `blocks`, the same
    ones around that block; use as a context manager.

    The rows of what comes out are those of the intact model, then those of each block, in ascending
    order.
    """

    def __init__(self, model: CausalLM, blocks: Sequence[int], sequences: int) -> None:
        self.model = model
        self.blocks = set(blocks)
        self.sequences = sequences
        self._around: Tensor | None = None
        """[B, S, d]: the stream that goes around the block in front."""
        self._handles: list[Any] = []

    def __enter__(self) -> "Deletions":
        for index, block in enumerate(self.model.blocks):
            self._watch(block, index in self.blocks)
        self._watch(self.model.get_submodule(self.model.names.final_norm), False)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, module: nn.Module, left_out: bool) -> None:
        """Has the stream around the module before join in front of `module`, and, if that is to be
        `left_out` too, the next one leave."""

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = inputs
            if self._around is not None:
                x = torch.cat([x, self._around])
            self._around = x[: self.sequences] if left_out else None
            return (x, *others)

        self._handles.append(module.register_forward_pre_hook(hook))


def without(removed: Iterable[int], model: CausalLM, device: torch.device) -> Masks:
    """Masks that skip the blocks `removed` and scale nothing."""
    layer = torch.ones(model.config.num_layers, device=device)
    layer[list(removed)] = 0
    return replace(Masks(layer=layer).compact(model.config, multiple=1), layer=None)


@torch.no_grad()
def deletion_losses(
    model: CausalLM, ids: Tensor, blocks: Sequence[int], masks: Masks | None = None
) -> Tensor:
    """Summed token losses in nats, fp64 [1 + len(blocks), B]: of the model as it is on each of the
    sequences `ids` [B, S], then without each of `blocks` (ascending, at least one).

    `masks` may leave out other blocks in all of them. Collective, as a forward pass is.
    """
    rows = 1 + len(blocks)
    targets, valid = next_token_targets(ids)
    with Deletions(model, blocks, len(ids)):
        output = model(
            ids, masks, targets=targets.repeat(rows, 1), weights=valid.float().repeat(rows, 1)
        )
    assert isinstance(output, LossOutput)
    return output.token_loss.view(rows, len(ids), -1).double().sum(-1)
