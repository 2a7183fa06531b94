"""The GPT-NeoX family (Pythia): LayerNorm, fused projections, parallel residual, partial rotary.

Architecture: GPT-NeoX-20B (arXiv 2204.06745, section 2.1); Pythia (arXiv 2304.01373, section 2.2).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.attention import attention
from trainer.kernels.rope import rope
from trainer.models.config import ModelConfig
from trainer.models.layer_sizes import LayerSizes
from trainer.models.layers import LayerNorm, Linear, skip_block, skip_layer
from trainer.models.masks import LayerMasks


class Attention(nn.Module):
    """Causal attention with as many key/value heads as query heads."""

    def __init__(self, config: ModelConfig, heads: int) -> None:
        super().__init__()
        self.config = config
        width, inner = config.hidden_size, heads * config.head_dim
        self.query_key_value = Linear(width, 3 * inner, bias=config.qkv_bias)
        self.dense = Linear(inner, width, bias=config.output_bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        masks: LayerMasks,
        documents: Tensor | None = None,
    ) -> Tensor:
        """x [B, S, m] -> [B, S, m] for m computed residual dimensions.

        Head masks scale columns of `dense`; queries, keys and values stay unscaled.
        """
        batch, length, _ = x.shape
        head_dim = self.config.head_dim
        fused = self.query_key_value(x, masks.reading(masks.units.fused))
        query, key, value = fused.view(batch, length, -1, 3 * head_dim).chunk(3, dim=-1)
        query, key = rope(query, key, cos, sin)
        context = attention(query, key, value, documents=documents).flatten(2)
        columns = masks.head_columns(head_dim)
        writing = masks.writing(masks.units.queries, columns, masks.attention)
        output: Tensor = self.dense(context, writing)
        return output


class FeedForward(nn.Module):
    """Two projections with a GELU between them."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.approximate = "none" if config.activation == "gelu" else "tanh"
        self.dense_h_to_4h = Linear(config.hidden_size, channels)
        self.dense_4h_to_h = Linear(channels, config.hidden_size)

    def forward(self, x: Tensor, masks: LayerMasks) -> Tensor:
        """x [B, S, m] -> [B, S, m]."""
        channels = self.dense_h_to_4h(x, masks.reading(masks.units.channels))
        channels = F.gelu(channels, approximate=self.approximate)
        writing = masks.writing(masks.units.channels, masks.intermediate, masks.feed_forward)
        output: Tensor = self.dense_4h_to_h(channels, writing)
        return output


class DecoderLayer(nn.Module):
    """One block: attention and feed-forward layer, each behind its norm, in parallel or in turn;
    `sizes` may leave one of the two out."""

    def __init__(self, config: ModelConfig, sizes: LayerSizes) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.sizes = sizes
        if sizes.num_heads:
            self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        if sizes.intermediate_size:
            self.post_attention_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        if sizes.num_heads:
            self.attention = Attention(config, sizes.num_heads)
        if sizes.intermediate_size:
            self.mlp = FeedForward(config, sizes.intermediate_size)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        masks: LayerMasks,
        documents: Tensor | None = None,
    ) -> Tensor:
        """x [B, S, m] -> [B, S, m]; cos and sin as `rope` takes them, in x's dtype; documents as
        `attention` takes them."""
        if masks.units.skipped:
            return skip_block(self, x, masks.stream)
        attends, feeds = self.sizes.num_heads > 0, self.sizes.intermediate_size > 0
        update: Tensor | None = None
        if attends and masks.units.attends:
            update = self.attention(
                self.input_layernorm(x, masks.stream), cos, sin, masks, documents
            )
        elif attends:
            x = skip_layer(x, masks.stream, self.input_layernorm, self.attention)
        if not self.parallel_residual and update is not None:
            x, update = x + update, None
        if feeds and masks.units.feeds:
            fed = self.mlp(self.post_attention_layernorm(x, masks.stream), masks)
            update = fed if update is None else fed + update
        elif feeds:
            x = skip_layer(x, masks.stream, self.post_attention_layernorm, self.mlp)
        return x if update is None else update + x
