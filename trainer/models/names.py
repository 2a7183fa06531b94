"""Hugging Face's names of each family's modules, and what masks do to each of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from trainer.models.config import ModelConfig


class Role(Enum):
    """What the rows and columns of a module inside a block belong to.

    A matrix that reads the residual stream has its dimensions as columns, one that writes to it has
    them as rows; biases go with the rows.
    """

    NORM = auto()
    """Gain (and bias) over the dimensions of the residual stream."""
    HEAD_NORM = auto()
    """Gain over head_dim, the same for all heads."""
    QUERIES = auto()
    """Reads; rows are channels of query heads."""
    KEYS = auto()
    """Reads; rows are channels of KV heads."""
    FUSED = auto()
    """Reads; rows are, for each head in turn, the channels of its query, its key and its value."""
    CHANNELS = auto()
    """Reads; rows are feed-forward channels."""
    ATTENTION_OUTPUT = auto()
    """Writes; columns are channels of query heads."""
    FEED_FORWARD_OUTPUT = auto()
    """Writes; columns are feed-forward channels."""


@dataclass(frozen=True, slots=True)
class Names:
    """Module names of one family."""

    embedding: str
    blocks: str
    """The list of blocks."""
    final_norm: str
    head: str
    """The output head, present unless it is tied to the embedding."""
    modules: Mapping[str, Role]
    """Modules with parameters inside a block."""

    def with_role(self, role: Role) -> str:
        """The first module of `role` inside a block."""
        return next(name for name, own in self.modules.items() if own is role)


_LLAMA = Names(
    embedding="model.embed_tokens",
    blocks="model.layers",
    final_norm="model.norm",
    head="lm_head",
    modules={
        "input_layernorm": Role.NORM,
        "self_attn.q_proj": Role.QUERIES,
        "self_attn.k_proj": Role.KEYS,
        "self_attn.v_proj": Role.KEYS,
        "self_attn.q_norm": Role.HEAD_NORM,
        "self_attn.k_norm": Role.HEAD_NORM,
        "self_attn.o_proj": Role.ATTENTION_OUTPUT,
        "post_attention_layernorm": Role.NORM,
        "mlp.gate_proj": Role.CHANNELS,
        "mlp.up_proj": Role.CHANNELS,
        "mlp.down_proj": Role.FEED_FORWARD_OUTPUT,
    },
)
_GPT_NEOX = Names(
    embedding="gpt_neox.embed_in",
    blocks="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    modules={
        "input_layernorm": Role.NORM,
        "attention.query_key_value": Role.FUSED,
        "attention.dense": Role.ATTENTION_OUTPUT,
        "post_attention_layernorm": Role.NORM,
        "mlp.dense_h_to_4h": Role.CHANNELS,
        "mlp.dense_4h_to_h": Role.FEED_FORWARD_OUTPUT,
    },
)


def names_of(config: ModelConfig) -> Names:
    """The names of a model's family, as its stored tensors have them."""
    return _GPT_NEOX if config.family == "gpt_neox" else _LLAMA
