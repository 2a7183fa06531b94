"""The loss without each block, or without each attention or feed-forward layer, all in one pass.

The naive loop runs the model once for every part that it leaves out, and so computes everything in
front of that part as often as there are parts behind it. Here the stream that goes around a block
leaves the intact one in front of it and joins the batch behind it: what is in front is computed
once, and every weight is read once for all streams. L blocks take L (L - 1) / 2 + L passes through
a block instead of L (L - 1).

The stream that goes around one of a block's two layers joins in front of the block, where what that
layer adds to it is replaced by zeros.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruner.refit import halves
from pruner.shorten.parts import Part
from trainer.models.decoder import CausalLM, LossOutput, next_token_targets
from trainer.models.masks import Masks


class Deletions:
    """Forward hooks that add to the sequences of a forward pass, for each of `parts`, the same
    ones around that part; use as a context manager.

    The rows of what comes out are those of the intact model, then those of each part, in the order
    of the model.
    """

    def __init__(self, model: CausalLM, parts: Sequence[Part], sequences: int) -> None:
        self.model = model
        self.parts = set(parts)
        self.sequences = sequences
        self._around: Tensor | None = None
        """[B, S, d]: the stream that goes around the block in front."""
        self._handles: list[Any] = []

    def __enter__(self) -> "Deletions":
        for index, block in enumerate(self.model.blocks):
            self._watch(block, Part("layer", index) in self.parts)
            self._watch_layers(index, block)
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

    def _watch_layers(self, index: int, block: nn.Module) -> None:
        """Has a stream for each layer of the block that is left out join in front of it, and be
        passed by that layer."""
        kinds = ("attention", "feed_forward")
        own = [Part(kind, index) in self.parts for kind in kinds]
        if not any(own):
            return

        def join(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *others = inputs
            return (torch.cat([x, *[x[: self.sequences]] * sum(own)]), *others)

        self._handles.append(block.register_forward_pre_hook(join))
        # The last streams of the batch, in the order of the layers.
        behind = sum(own)
        for half, left_out in zip(halves(self.model.config), own, strict=True):
            if left_out:
                module = block.get_submodule(half.module)
                self._handles.append(module.register_forward_hook(self._passing(behind)))
                behind -= 1

    def _passing(self, place: int) -> Callable[..., Tensor]:
        """A hook that makes a layer add nothing to the stream which is the `place`-th from the end
        of the batch."""

        def hook(_: nn.Module, __: Any, update: Tensor) -> Tensor:
            start = len(update) - place * self.sequences
            passed = update.clone()
            passed[start : start + self.sequences] = 0
            return passed

        return hook


@torch.no_grad()
def deletion_losses(
    model: CausalLM, ids: Tensor, parts: Sequence[Part], masks: Masks | None = None
) -> Tensor:
    """Summed token losses in nats, fp64 [1 + len(parts), B]: of the model as it is on each of the
    sequences `ids` [B, S], then without each of `parts` (in the order of the model, at least one).

    `masks` may leave out other parts in all of them. Collective, as a forward pass is.
    """
    rows = 1 + len(parts)
    targets, valid = next_token_targets(ids)
    with Deletions(model, parts, len(ids)):
        output = model(
            ids, masks, targets=targets.repeat(rows, 1), weights=valid.float().repeat(rows, 1)
        )
    assert isinstance(output, LossOutput)
    return output.token_loss.view(rows, len(ids), -1).double().sum(-1)
