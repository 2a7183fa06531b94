"""The Llama family of decoders, with the one masked forward used to train, evaluate and extract."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.loss import linear_cross_entropy
from trainer.models.config import ModelConfig
from trainer.models.layers import Linear, RMSNorm
from trainer.models.masks import LayerMasks, Masks
from trainer.models.rope import inverse_frequencies, rotary_tables, rotate

_NO_MASKS = LayerMasks()


class LossOutput(NamedTuple):
    """What CausalLM returns when it is given targets."""

    loss: Tensor
    """Scalar fp32: sum over tokens of weight * token loss."""
    token_loss: Tensor
    """[B, S] fp32, detached: cross-entropy in nats, 0 where the weight is 0."""


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
        """x [B, S, d] -> [B, S, d]. Head masks scale columns of o_proj; q, k, v stay unscaled."""
        batch, length, _ = x.shape
        head_dim = self.config.head_dim
        query = self.q_proj(x).view(batch, length, -1, head_dim)
        key = self.k_proj(x).view(batch, length, -1, head_dim)
        value = self.v_proj(x).view(batch, length, -1, head_dim)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        window = self._window_mask(length, x.device)
        context = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=window,
            is_causal=window is None,
            enable_gqa=self.config.num_kv_heads != self.config.num_heads,
        )
        context = context.transpose(1, 2).reshape(batch, length, -1)
        output: Tensor = self.o_proj(context, masks.residual, masks.head_columns(head_dim))
        return output

    def _window_mask(self, length: int, device: torch.device) -> Tensor | None:
        """[S, S] bool of visible positions, or None where plain causal attention is the same."""
        window = self.config.sliding_window
        if window is None or length <= window:
            return None
        visible = torch.ones(length, length, dtype=torch.bool, device=device)
        return visible.tril().triu(1 - window)


class FeedForward(nn.Module):
    """Gated feed-forward layer (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, masks: LayerMasks) -> Tensor:
        """x [B, S, d] -> [B, S, d]."""
        channels = F.silu(self.gate_proj(x)) * self.up_proj(x)
        output: Tensor = self.down_proj(channels, masks.residual, masks.intermediate)
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
        """x [B, S, d] -> [B, S, d]; cos and sin [S, head_dim / 2] in x's dtype."""
        norm_masks = (masks.hidden, masks.hidden_scale)
        x = x + self.self_attn(self.input_layernorm(x, *norm_masks), cos, sin, masks)
        return x + self.mlp(self.post_attention_layernorm(x, *norm_masks), masks)


class Decoder(nn.Module):
    """The parameters below `model.` in Hugging Face's naming; CausalLM runs them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class CausalLM(nn.Module):
    """Decoder language model; parameter names and layouts are exactly Hugging Face's.

    Masks are folded into weights: they scale the embedding's output, the gain of every norm (whose
    statistics run over the live dimensions), the rows of what writes to the residual stream and the
    columns of what reads heads or channels. The final norm's gain carries the hidden mask once, the
    head none. Slicing and scaling weights by the same masks therefore gives the same function.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpoint_activations = False
        # A plain attribute, not a buffer: FSDP would cast a buffer to bf16.
        self.frequencies = inverse_frequencies(config)

    @property
    def head_weight(self) -> Tensor:
        """[V, d] weight of the output head; the embedding's when they are tied."""
        if self.config.tie_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def _hidden_states(self, ids: Tensor, masks: Masks | None = None) -> Tensor:
        """ids [B, S] -> output of the final norm [B, S, d]."""
        masks = masks or Masks()
        for name, z in masks.tensors().items():
            assert z.dtype in (torch.float32, torch.float64), f"{name} masks are {z.dtype}"
        x = self.model.embed_tokens(ids)
        if masks.hidden is not None:
            x = (x * masks.hidden).to(x.dtype)
        if self.frequencies.device != ids.device:
            self.frequencies = self.frequencies.to(ids.device)
        cos, sin = rotary_tables(self.frequencies, ids.shape[1], x.dtype)
        for index, layer in enumerate(self.model.layers):
            arguments = (x, cos, sin, masks.for_layer(index))
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        output: Tensor = self.model.norm(x, masks.hidden, masks.hidden_scale)
        return output

    def forward(
        self,
        ids: Tensor,
        masks: Masks | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | LossOutput:
        """Logits, or the weighted sum of token losses when targets are given.

        Args:
            ids: [B, S] token ids.
            masks: masks of the units; None for the plain model.
            targets: [B, S] ids to predict, already shifted by the caller; ignored at weight 0.
            weights: [B, S] fp32 weight of each token's loss; None for ones.

        Returns:
            Logits [B, S, V] in the parameters' dtype, or LossOutput.
        """
        states = self._hidden_states(ids, masks)
        if targets is None:
            return F.linear(states, self.head_weight)
        if weights is None:
            weights = torch.ones(targets.shape, dtype=torch.float32, device=targets.device)
        loss, token_loss = linear_cross_entropy(
            states.flatten(0, 1), self.head_weight, targets.flatten(), weights.flatten()
        )
        return LossOutput(loss, token_loss.view(targets.shape))
