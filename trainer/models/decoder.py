"""The one masked forward pass of all families, used to train, evaluate and extract."""

import pkgutil
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.kernels.linear_cross_entropy import (
    TeacherOutput,
    linear_cross_entropy,
    linear_distillation,
)
from trainer.models.config import ModelConfig
from trainer.models.folding import Fold, fold_weight
from trainer.models.layers import LayerNorm, Linear, RMSNorm
from trainer.models.masks import Masks, StreamMasks
from trainer.models.rope import inverse_frequencies, positions_in, rotary_tables


class LossOutput(NamedTuple):
    """What CausalLM returns when it is given targets."""

    loss: Tensor
    """Scalar fp32: sum over tokens of weight * token loss."""
    token_loss: Tensor
    """[B, S] fp32, detached: cross-entropy in nats, 0 where the weight is 0."""
    token_kl: Tensor | None = None
    """[B, S] fp32, detached: divergence from the teacher in nats; None without one."""


class CausalLM(nn.Module):
    """Decoder language model; parameter names and layouts are exactly Hugging Face's.

    Masks are folded into weights: they scale the embedding's output, gain and bias of every norm
    (its statistics run over the nonzero dimensions), the rows of what writes to the residual stream
    and the columns of what reads heads or channels. The final norm carries the hidden mask once,
    the head none. Slicing and scaling weights by the same masks therefore gives the same function,
    and compact masks (Masks.compact) compute only the slices that are not zero.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.names = names = config.traits.names
        block = pkgutil.resolve_name(config.traits.block)
        norm = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[config.traits.norm]
        self._place(names.embedding, nn.Embedding(config.vocab_size, config.hidden_size))
        self._place(names.blocks, nn.ModuleList(block(config, sizes) for sizes in config.blocks))
        self._place(names.final_norm, norm(config.hidden_size, config.norm_eps))
        if not config.tie_embeddings:
            self._place(names.head, Linear(config.hidden_size, config.vocab_size, bias=False))
        self.checkpoint_activations = False
        # A plain attribute, not a buffer: FSDP would cast a buffer to bf16.
        self.frequencies = inverse_frequencies(config)

    def _place(self, path: str, module: nn.Module) -> None:
        """Adds a module at a dotted path, inside containers that are made as needed."""
        parent: nn.Module = self
        *containers, name = path.split(".")
        for container in containers:
            if container not in dict(parent.named_children()):
                parent.add_module(container, nn.Module())
            parent = parent.get_submodule(container)
        parent.add_module(name, module)

    @property
    def head_weight(self) -> Tensor:
        """[V, d] weight of the output head; the embedding's when they are tied."""
        names = self.names
        module = self.get_submodule(names.embedding if self.config.tie_embeddings else names.head)
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, first to last."""
        return list(self.get_submodule(self.names.blocks).children())

    def _embed(self, ids: Tensor, stream: StreamMasks) -> Tensor:
        """ids [B, S] -> [B, S, m], the computed dimensions of the embeddings times their masks."""
        x: Tensor = self.get_submodule(self.names.embedding)(ids)
        fold = Fold(columns=stream.units, column_scale=stream.mask)
        return fold_weight(x.flatten(0, 1), fold, self).unflatten(0, ids.shape)

    def _hidden_states(
        self, ids: Tensor, masks: Masks, stream: StreamMasks, documents: Tensor | None = None
    ) -> Tensor:
        """ids [B, S] -> output of the final norm [B, S, m]; `stream` is that of the masks."""
        for name, z in masks.tensors().items():
            assert z.dtype in (torch.float32, torch.float64), f"{name} masks are {z.dtype}"
        x = self._embed(ids, stream)
        if self.frequencies.device != ids.device:
            self.frequencies = self.frequencies.to(ids.device)
        cos, sin = rotary_tables(self.frequencies, ids.shape[1], x.dtype)
        if documents is not None:
            positions = positions_in(documents)
            cos, sin = cos[positions], sin[positions]
        for index, layer in enumerate(self.blocks):
            block = masks.for_layer(index, stream)
            arguments = (x, cos, sin, block, documents)
            recompute = self.checkpoint_activations and not block.units.skipped
            if recompute and torch.is_grad_enabled():
                # Nothing in a layer draws random numbers.
                x = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*arguments)
        output: Tensor = self.get_submodule(self.names.final_norm)(x, stream)
        return output

    def forward(
        self,
        ids: Tensor,
        masks: Masks | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        teacher_output: TeacherOutput | None = None,
        documents: Tensor | None = None,
    ) -> Tensor | LossOutput:
        """Logits, or the weighted sum of token losses when targets are given.

        Args:
            ids: [B, S] token ids.
            masks: masks of the units; None for the plain model.
            targets: [B, S] ids to predict, already shifted by the caller; ignored at weight 0.
            weights: [B, S] fp32 weight of each token's loss; None for ones.
            teacher_output: what a teacher says about the same ids (states [B, S, d_t]); mixes its
                divergence into the loss.
            documents: [B, S] int32 or int64 numbers of the tokens' documents, each of which ends
                where the number changes: none sees another, and positions begin anew in each. None:
                one each row.

        Returns:
            Logits [B, S, V] in the parameters' dtype, or LossOutput.
        """
        masks = masks or Masks()
        stream = masks.stream()
        states = self._hidden_states(ids, masks, stream, documents)
        head = fold_weight(self.head_weight, stream.reading(), "head")
        if targets is None:
            return F.linear(states, head)
        if weights is None:
            weights = torch.ones(targets.shape, dtype=torch.float32, device=targets.device)
        arguments = (states.flatten(0, 1), head, targets.flatten(), weights.flatten())
        if teacher_output is None:
            loss, token_loss = linear_cross_entropy(*arguments)
            return LossOutput(loss, token_loss.view(targets.shape))
        loss, token_loss, token_kl = linear_distillation(*arguments, teacher_output)
        return LossOutput(loss, token_loss.view(targets.shape), token_kl.view(targets.shape))


def next_token_targets(
    ids: Tensor, valid: np.ndarray | None = None, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Targets [B, S], each position's next token, and which of them count (bool [B, S]).

    The last position has no target, and neither has the last of each of the `documents` [B, S], if
    given. `valid` [B, S], if given, marks the ids that may be targets.
    """
    targets = torch.roll(ids, -1, dims=1)
    counted = torch.ones_like(ids, dtype=torch.bool)
    if valid is not None:
        counted = torch.roll(torch.from_numpy(valid).to(ids.device), -1, dims=1)
    counted[:, -1] = False
    if documents is not None:
        counted[:, :-1] &= documents.diff(dim=1) == 0
    return targets, counted
