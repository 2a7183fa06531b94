"""Decoders of all families with the one masked forward used to train, evaluate and extract, and the
blocks of the Llama family."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.kernels.attention import attention
from trainer.kernels.rope import rope
from trainer.kernels.swiglu import swiglu
from trainer.loss import Teaching, linear_cross_entropy, linear_distillation
from trainer.models import gpt_neox
from trainer.models.config import ModelConfig
from trainer.models.folding import Fold, fold_weight
from trainer.models.layers import Linear, RMSNorm, skip_block
from trainer.models.masks import LayerMasks, Masks, StreamMasks
from trainer.models.names import names_of
from trainer.models.rope import inverse_frequencies, rotary_tables

_NO_MASKS = LayerMasks()


class LossOutput(NamedTuple):
    """What CausalLM returns when it is given targets."""

    loss: Tensor
    """Scalar fp32: sum over tokens of weight * token loss."""
    token_loss: Tensor
    """[B, S] fp32, detached: cross-entropy in nats, 0 where the weight is 0."""
    token_kl: Tensor | None = None
    """[B, S] fp32, detached: divergence from the teacher in nats; None without one."""


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.q_proj = Linear(width, config.query_size, bias=config.qkv_bias)
        self.k_proj = Linear(width, config.kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(width, config.kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(config.query_size, width, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, masks: LayerMasks) -> Tensor:
        """x [B, S, m] -> [B, S, m] for m computed residual dimensions.

        Head masks scale columns of o_proj; q, k, v stay unscaled.
        """
        batch, length, _ = x.shape
        head_dim = self.config.head_dim
        queries, keys = masks.units.queries, masks.units.keys
        query = self.q_proj(x, masks.reading(queries)).view(batch, length, -1, head_dim)
        key = self.k_proj(x, masks.reading(keys)).view(batch, length, -1, head_dim)
        value = self.v_proj(x, masks.reading(keys)).view(batch, length, -1, head_dim)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rope(query, key, cos, sin, in_place=True)
        context = attention(query, key, value, window=self.config.sliding_window).flatten(2)
        output: Tensor = self.o_proj(context, masks.writing(queries, masks.head_columns(head_dim)))
        return output


class FeedForward(nn.Module):
    """Gated feed-forward layer (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, masks: LayerMasks) -> Tensor:
        """x [B, S, m] -> [B, S, m]."""
        reading = masks.reading(masks.units.channels)
        channels = swiglu(self.gate_proj(x, reading), self.up_proj(x, reading))
        writing = masks.writing(masks.units.channels, masks.intermediate)
        output: Tensor = self.down_proj(channels, writing)
        return output


class DecoderLayer(nn.Module):
    """One block: attention, then feed-forward, each behind a norm and added to its own input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, masks: LayerMasks = _NO_MASKS) -> Tensor:
        """x [B, S, m] -> [B, S, m]; cos and sin [S, head_dim / 2] in x's dtype."""
        if masks.units.skipped:
            return skip_block(self, x, masks.stream)
        attended = self.self_attn(self.input_layernorm(x, masks.stream), cos, sin, masks)
        normed, x = self.post_attention_layernorm.add(x, attended, masks.stream)
        return x + self.mlp(normed, masks)


class Decoder(nn.Module):
    """The parameters below `model.` in Hugging Face's naming; CausalLM runs them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class CausalLM(nn.Module):
    """Decoder language model; parameter names and layouts are exactly Hugging Face's.

    Masks are folded into weights: they scale the embedding's output, gain and bias of every norm
    (its statistics run over the live dimensions), the rows of what writes to the residual stream
    and the columns of what reads heads or channels. The final norm carries the hidden mask once,
    the head none. Slicing and scaling weights by the same masks therefore gives the same function,
    and compact masks (Masks.compact) compute only the slices that are not zero.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.names = names_of(config)
        if config.family == "gpt_neox":
            self.gpt_neox = gpt_neox.Decoder(config)
        else:
            self.model = Decoder(config)
        if not config.tie_embeddings:
            head = Linear(config.hidden_size, config.vocab_size, bias=False)
            self.add_module(self.names.head, head)
        self.checkpoint_activations = False
        # A plain attribute, not a buffer: FSDP would cast a buffer to bf16.
        self.frequencies = inverse_frequencies(config)

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

    def _hidden_states(self, ids: Tensor, masks: Masks, stream: StreamMasks) -> Tensor:
        """ids [B, S] -> output of the final norm [B, S, m]; `stream` is that of the masks."""
        for name, z in masks.tensors().items():
            assert z.dtype in (torch.float32, torch.float64), f"{name} masks are {z.dtype}"
        x = self._embed(ids, stream)
        if self.frequencies.device != ids.device:
            self.frequencies = self.frequencies.to(ids.device)
        cos, sin = rotary_tables(self.frequencies, ids.shape[1], x.dtype)
        for index, layer in enumerate(self.blocks):
            block = masks.for_layer(index, stream)
            arguments = (x, cos, sin, block)
            recompute = self.checkpoint_activations and not block.units.skipped
            if recompute and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
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
        teaching: Teaching | None = None,
    ) -> Tensor | LossOutput:
        """Logits, or the weighted sum of token losses when targets are given.

        Args:
            ids: [B, S] token ids.
            masks: masks of the units; None for the plain model.
            targets: [B, S] ids to predict, already shifted by the caller; ignored at weight 0.
            weights: [B, S] fp32 weight of each token's loss; None for ones.
            teaching: what a teacher says about the same ids (states [B, S, d_t]); mixes its
                divergence into the loss.

        Returns:
            Logits [B, S, V] in the parameters' dtype, or LossOutput.
        """
        masks = masks or Masks()
        stream = masks.stream
        states = self._hidden_states(ids, masks, stream)
        head = fold_weight(self.head_weight, stream.reading, "head")
        if targets is None:
            return F.linear(states, head)
        if weights is None:
            weights = torch.ones(targets.shape, dtype=torch.float32, device=targets.device)
        arguments = (states.flatten(0, 1), head, targets.flatten(), weights.flatten())
        if teaching is None:
            loss, token_loss = linear_cross_entropy(*arguments)
            return LossOutput(loss, token_loss.view(targets.shape))
        loss, token_loss, token_kl = linear_distillation(*arguments, teaching)
        return LossOutput(loss, token_loss.view(targets.shape), token_kl.view(targets.shape))
