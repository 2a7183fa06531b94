"""The GPT-NeoX family (Pythia): LayerNorm, fused projections, parallel residual, partial rotary.

Architecture: GPT-NeoX-20B (arXiv 2204.06745, section 2.1); Pythia (arXiv 2304.01373, section 2.2).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.attention import attention
from trainer.kernels.rope import rope
from trainer.models.config import ModelConfig
from trainer.models.layers import LayerNorm, Linear, skip_block
from trainer.models.masks import LayerMasks


class Attention(nn.Module):
    """Causal attention with as many key/value heads as query heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, inner = config.hidden_size, config.query_size
        self.query_key_value = Linear(width, 3 * inner, bias=config.qkv_bias)
        self.dense = Linear(inner, width, bias=config.output_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, masks: LayerMasks) -> Tensor:
        """x [B, S, m] -> [B, S, m] for m computed residual dimensions.

        Head masks scale columns of `dense`; queries, keys and values stay unscaled.
        """
        batch, length, _ = x.shape
        head_dim = self.config.head_dim
        fused = self.query_key_value(x, masks.reading(masks.units.fused))
        query, key, value = fused.view(batch, length, -1, 3 * head_dim).chunk(3, dim=-1)
        query, key = rope(query, key, cos, sin)
        context = attention(query, key, value).flatten(2)
        writing = masks.writing(masks.units.queries, masks.head_columns(head_dim))
        output: Tensor = self.dense(context, writing)
        return output


class FeedForward(nn.Module):
    """Two projections with a GELU between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.approximate = "none" if config.activation == "gelu" else "tanh"
        self.dense_h_to_4h = Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, masks: LayerMasks) -> Tensor:
        """x [B, S, m] -> [B, S, m]."""
        channels = self.dense_h_to_4h(x, masks.reading(masks.units.channels))
        channels = F.gelu(channels, approximate=self.approximate)
        writing = masks.writing(masks.units.channels, masks.intermediate)
        output: Tensor = self.dense_4h_to_h(channels, writing)
        return output


class DecoderLayer(nn.Module):
    """One block: attention and feed-forward layer, each behind its norm, in parallel or in turn."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, masks: LayerMasks) -> Tensor:
        """x [B, S, m] -> [B, S, m]; cos and sin [S, rotary_dim / 2] in x's dtype."""
        if masks.units.skipped:
            return skip_block(self, x, masks.stream)
        attended = self.attention(self.input_layernorm(x, masks.stream), cos, sin, masks)
        if not self.parallel_residual:
            x = x + attended
            return self.mlp(self.post_attention_layernorm(x, masks.stream), masks) + x
        return self.mlp(self.post_attention_layernorm(x, masks.stream), masks) + attended + x
