"""Everything that differs between model families: one row of FAMILIES each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Literal


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
    """Hugging Face's names of a family's modules, as its stored tensors have them."""

    embedding: str
    blocks: str
    """The list of blocks."""
    final_norm: str
    head: str
    """The output head, present unless it is tied to the embedding."""
    modules: Mapping[str, Role]
    """Modules with parameters inside a block; the first norm is that in front of attention."""

    def with_role(self, role: Role) -> str:
        """The first module of `role` inside a block."""
        return next(name for name, own in self.modules.items() if own is role)

    def attends(self, module: str) -> bool:
        """Whether a module inside a block belongs to its attention, with the norm in front."""
        role = self.modules[module]
        if role is Role.NORM:
            return module == self.with_role(Role.NORM)
        return role not in (Role.CHANNELS, Role.FEED_FORWARD_OUTPUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one family differs: its parameters' names, its config.json, its block.

    A new family is a row, and a block class where no other family's block does.
    """

    architecture: str
    """The transformers class that runs it, as config.json names it."""
    names: Names
    keys: Mapping[str, str]
    """Field of ModelConfig -> key of config.json, for all that the family's config states. Without
    `head_dim` a head is hidden_size / num_heads wide; without `num_kv_heads` there are num_heads of
    them. Fields that share a key must be equal."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Values of fields that have no key, where they are not ModelConfig's defaults."""
    activations: tuple[str, ...] = ("silu",)
    """Activations that the block computes, by transformers' names; the config's default first."""
    partial_rotary: bool = False
    """The config may rotate a part of each head only (`partial_rotary_factor`)."""
    legacy_rope_keys: Mapping[str, str] = field(
        default_factory=lambda: {"rope_theta": "rope_theta"}
    )
    """Key of `rope_parameters` -> key beside it under which transformers 4 reads the same."""
    divides_hidden: bool = False
    """transformers refuses a hidden size that is no multiple of the heads, despite `head_dim`."""
    norm: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """The class in trainer.models.layers of every norm over the residual stream."""
    block: str = "trainer.models.llama:DecoderLayer"
    """The block's class: made from a ModelConfig, called with x, cos, sin, the LayerMasks and
    documents, and made of the layers of trainer.models.layers. A path, because blocks import
    ModelConfig, which reads this table."""

    @property
    def fused_qkv(self) -> bool:
        """Whether one matrix holds query, key and value rows of head after head."""
        return Role.FUSED in self.names.modules.values()

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer multiplies two projections (SwiGLU): three matrices, not
        two."""
        return list(self.names.modules.values()).count(Role.CHANNELS) == 2

    @property
    def rotatable(self) -> bool:
        """Whether the basis of the residual stream may be rotated: a LayerNorm subtracts the mean
        over the dimensions, which a rotated stream does not have."""
        return self.norm == "RMSNorm"


_COMMON_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "activation": "hidden_act",
}
_LLAMA_KEYS = _COMMON_KEYS | {
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
}
_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
_LLAMA_NAMES = Names(
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

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        names=_LLAMA_NAMES,
        keys=_LLAMA_KEYS | _ATTENTION_BIAS | {"mlp_bias": "mlp_bias"},
        divides_hidden=True,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        names=_LLAMA_NAMES,
        keys=_LLAMA_KEYS | {"sliding_window": "sliding_window"},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        names=_LLAMA_NAMES,
        keys=_LLAMA_KEYS,
        fixed={"qkv_bias": True},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        names=_LLAMA_NAMES,
        keys=_LLAMA_KEYS | _ATTENTION_BIAS,
        fixed={"qk_norm": True},
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        names=Names(
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
        ),
        keys=_COMMON_KEYS
        | _ATTENTION_BIAS
        | {"norm_eps": "layer_norm_eps", "parallel_residual": "use_parallel_residual"},
        fixed={"mlp_bias": True},
        activations=("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        partial_rotary=True,
        legacy_rope_keys={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        norm="LayerNorm",
        block="trainer.models.gpt_neox:DecoderLayer",
    ),
}
"""A family's row by the `model_type` of its Hugging Face config."""
