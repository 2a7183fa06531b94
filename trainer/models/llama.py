"""The block of Llama, Mistral and Qwen: RMSNorm, separate projections, gated feed-forward layer."""

from torch import Tensor, nn

from trainer.kernels.attention import attention
from trainer.kernels.rope import rope
from trainer.kernels.swiglu import swiglu
from trainer.models.config import ModelConfig
from trainer.models.layer_sizes import LayerSizes
from trainer.models.layers import Linear, RMSNorm, skip_block, skip_layer
from trainer.models.masks import LayerMasks


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, sizes: LayerSizes) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        queries, keys = (number * config.head_dim for number in sizes[:2])
        self.q_proj = Linear(width, queries, bias=config.qkv_bias)
        self.k_proj = Linear(width, keys, bias=config.qkv_bias)
        self.v_proj = Linear(width, keys, bias=config.qkv_bias)
        self.o_proj = Linear(queries, width, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        masks: LayerMasks,
        documents: Tensor | None = None,
    ) -> Tensor:
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
        window = self.config.sliding_window
        context = attention(query, key, value, documents=documents, window=window).flatten(2)
        writing = masks.writing(queries, masks.head_columns(head_dim), masks.attention)
        output: Tensor = self.o_proj(context, writing)
        return output


class FeedForward(nn.Module):
    """Gated feed-forward layer (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, channels, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, channels, bias=config.mlp_bias)
        self.down_proj = Linear(channels, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, masks: LayerMasks) -> Tensor:
        """x [B, S, m] -> [B, S, m]."""
        reading = masks.reading(masks.units.channels)
        channels = swiglu(self.gate_proj(x, reading), self.up_proj(x, reading))
        writing = masks.writing(masks.units.channels, masks.intermediate, masks.feed_forward)
        output: Tensor = self.down_proj(channels, writing)
        return output


class DecoderLayer(nn.Module):
    """One block: attention, then feed-forward, each behind a norm and added to its own input;
    `sizes` may leave one of the two out."""

    def __init__(self, config: ModelConfig, sizes: LayerSizes) -> None:
        super().__init__()
        if sizes.num_heads:
            self.self_attn = Attention(config, sizes)
        if sizes.intermediate_size:
            self.mlp = FeedForward(config, sizes.intermediate_size)
        if sizes.num_heads:
            self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        if sizes.intermediate_size:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.sizes = sizes

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
        attended = None
        if attends and masks.units.attends:
            attended = self.self_attn(
                self.input_layernorm(x, masks.stream), cos, sin, masks, documents
            )
        elif attends:
            x = skip_layer(x, masks.stream, self.input_layernorm, self.self_attn)
        if feeds and masks.units.feeds:
            normed, x = self.post_attention_layernorm.add(x, attended, masks.stream)
            return x + self.mlp(normed, masks)
        if feeds:
            x = skip_layer(x, masks.stream, self.post_attention_layernorm, self.mlp)
        return x if attended is None else x + attended
