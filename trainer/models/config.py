"""The architecture of a decoder language model, read from and written to Hugging Face configs."""

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from data.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")
ROPE_TYPES = ("default", "linear", "llama3")
ACTIVATIONS = {"gpt_neox": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")}
"""Activations of the families that have more than SwiGLU's; all but "gelu" are its tanh form."""
# Keys of a Hugging Face config that ModelConfig owns or that describe one particular file.
_DERIVED_KEYS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attention_bias",
        "dtype",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "layer_norm_eps",
        "layer_types",
        "max_position_embeddings",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "rotary_emb_base",
        "rotary_pct",
        "sliding_window",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_parallel_residual",
        "vocab_size",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape and options of one decoder."""

    family: str
    """One of FAMILIES: the `model_type` of the Hugging Face config."""
    vocab_size: int
    """Rows of the embedding and of the head."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Channels of the feed-forward layer."""
    num_layers: int
    """Number of blocks."""
    num_heads: int
    """Query heads per block."""
    num_kv_heads: int
    """Key/value heads per block; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of one head; need not be hidden_size / num_heads."""
    norm_eps: float = 1e-5
    """Epsilon of every norm."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding."""
    rope_scaling: dict[str, Any] | None = None
    """None, or {"rope_type": "linear" | "llama3", "factor": ..., ...}, as in Hugging Face."""
    rotary_fraction: float = 1.0
    """Share of each head, from its first channel on, that the rotary embedding turns."""
    max_position_embeddings: int = 4096
    """Longest sequence the model was made for, in tokens."""
    tie_embeddings: bool = False
    """The head shares the embedding's weight."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    output_bias: bool = False
    """Bias on the attention output projection."""
    mlp_bias: bool = False
    """Biases on the feed-forward projections."""
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys before the rotary embedding."""
    activation: str = "silu"
    """Activation of the feed-forward layer, by transformers' name."""
    parallel_residual: bool = False
    """Attention and feed-forward layer of a block read the same input."""
    sliding_window: int | None = None
    """Each position sees only this many positions, itself included; None: all earlier ones."""
    hf: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The Hugging Face config this one was read from: special token ids and other extras."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InputError(
                f"model family {self.family!r} is not supported; known families: "
                f"{', '.join(FAMILIES)}"
            )
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}; every key/value head must serve equally many query heads"
            )
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise InputError(
                f"head_dim is {self.head_dim}, of which the rotary embedding turns "
                f"{self.rotary_dim}; it needs an even number of at least 2"
            )

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> "ModelConfig":
        """Read the content of a config.json; keys that are absent take transformers' defaults.

        Raises:
            InputError: unknown family, or a feature that changes the forward pass and that this
                implementation does not have.
        """
        family = str(values.get("model_type"))
        if family not in FAMILIES:
            raise InputError(
                f"model family {family!r} is not supported; known families: {', '.join(FAMILIES)}"
            )
        _refuse_unsupported(family, values)
        config = _transformers_config(family, values)
        rope = dict(config.rope_parameters)
        rope_type = rope.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise InputError(
                f"rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
            )
        theta = float(rope.pop("rope_theta"))
        fraction = float(rope.pop("partial_rotary_factor", 1.0))
        if fraction != 1.0 and family != "gpt_neox":
            raise InputError(
                f"partial_rotary_factor {fraction} is not supported in {family}; only rotary "
                "embeddings over the whole head (1.0) are"
            )
        read = _read_neox if family == "gpt_neox" else _read_llama
        return cls(
            family=family,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            rope_theta=theta,
            rope_scaling=None if rope_type == "default" else rope,
            rotary_fraction=fraction,
            max_position_embeddings=config.max_position_embeddings,
            tie_embeddings=bool(config.tie_word_embeddings),
            hf=copy.deepcopy(values),
            **read(config),
        )

    def to_hf(self) -> "PreTrainedConfig":
        """The transformers config of this architecture.

        Raises:
            InputError: transformers or the family's Hugging Face class cannot express the shape.
        """
        self._require_expressible()
        values = {key: value for key, value in self.hf.items() if key not in _DERIVED_KEYS}
        rope = {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}
        values |= {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "hidden_act": self.activation,
            "rope_parameters": rope,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_embeddings,
        }
        if self.family == "gpt_neox":
            rope["partial_rotary_factor"] = self.rotary_fraction
            values |= {
                "architectures": ["GPTNeoXForCausalLM"],
                "attention_bias": self.qkv_bias,
                "layer_norm_eps": self.norm_eps,
                "use_parallel_residual": self.parallel_residual,
            }
            return _transformers_config(self.family, values)
        values |= {
            "architectures": [f"{self.family.capitalize()}ForCausalLM"],
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.norm_eps,
        }
        if self.family in ("llama", "qwen3"):
            values["attention_bias"] = self.qkv_bias
        if self.family == "llama":
            values["mlp_bias"] = self.mlp_bias
        if self.family == "mistral":
            values["sliding_window"] = self.sliding_window
        return _transformers_config(self.family, values)

    def _require_expressible(self) -> None:
        if self.family == "llama" and self.hidden_size % self.num_heads:
            nearest = max(1, self.hidden_size // self.num_heads) * self.num_heads
            raise InputError(
                f"hidden size {self.hidden_size} is not a multiple of the {self.num_heads} heads; "
                f"transformers refuses such a Llama config: use a hidden size of {nearest} or "
                "another number of heads"
            )
        self._require_expressible_neox()
        biases = (self.qkv_bias, self.output_bias)
        allowed = {
            "llama": ((False, False), (True, True)),
            "qwen3": ((False, False), (True, True)),
            "qwen2": ((True, False),),
            "mistral": ((False, False),),
            "gpt_neox": ((False, False), (True, True)),
        }[self.family]
        if biases not in allowed:
            raise InputError(
                f"{self.family} configs cannot express qkv_bias={self.qkv_bias} with "
                f"output_bias={self.output_bias}; choose another family"
            )
        if self.mlp_bias and self.family not in ("llama", "gpt_neox"):
            raise InputError(f"{self.family} configs cannot express mlp_bias; use family llama")
        if self.sliding_window is not None and self.family != "mistral":
            raise InputError(f"{self.family} configs cannot express a sliding window here")

    def _require_expressible_neox(self) -> None:
        if self.family != "gpt_neox":
            if self.rotary_fraction != 1.0 or self.parallel_residual or self.activation != "silu":
                raise InputError(
                    f"{self.family} configs cannot express rotary_fraction, parallel_residual or "
                    "another activation than 'silu'; use family gpt_neox"
                )
            return
        if self.query_size != self.hidden_size:
            fitting = max(1, self.hidden_size // self.head_dim)
            raise InputError(
                f"hidden size {self.hidden_size} is not {self.num_heads} heads of {self.head_dim}, "
                "and GPT-NeoX configs have no head dim of their own: use a hidden size of "
                f"{self.query_size} with {self.num_heads} heads, or {fitting * self.head_dim} with "
                f"{fitting}"
            )
        if self.num_kv_heads != self.num_heads:
            raise InputError(
                f"GPT-NeoX configs cannot express {self.num_kv_heads} KV heads for "
                f"{self.num_heads} query heads; they must be equal"
            )
        if not self.mlp_bias or self.qk_norm:
            raise InputError("GPT-NeoX configs need mlp_bias, and cannot express qk_norm")

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that the rotary embedding turns."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer multiplies two projections (SwiGLU): three matrices, not
        two."""
        return self.family != "gpt_neox"

    @property
    def fused_qkv(self) -> bool:
        """Whether one matrix holds query, key and value rows of head after head."""
        return self.family == "gpt_neox"

    def num_parameters(self, embeddings: bool = True) -> int:
        """Number of parameters; `embeddings=False` leaves out the embedding and an untied head."""
        # A LayerNorm has a gain and a bias, an RMSNorm only a gain.
        norm = (2 if self.family == "gpt_neox" else 1) * self.hidden_size
        block = self._block_matmul_parameters() + 2 * norm
        block += self.qkv_bias * (self.query_size + 2 * self.kv_size)
        block += self.output_bias * self.hidden_size
        block += self.mlp_bias * ((1 + self.gated) * self.intermediate_size + self.hidden_size)
        block += self.qk_norm * 2 * self.head_dim
        total = self.num_layers * block + norm
        if embeddings:
            total += (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return total

    def flops_per_token(self, seq_len: int, causal: bool) -> float:
        """Forward plus backward FLOPs of one token in a sequence of `seq_len`.

        6N + 12 L d s (or 6N + 6 L d s when only the causal half of attention is counted), where N
        is the number of weights in matrix products: the head is in, the embedding lookup is out;
        d is the width of all query heads (PaLM, arXiv 2204.02311, appendix B).
        """
        weights = self.num_layers * self._block_matmul_parameters()
        weights += self.vocab_size * self.hidden_size
        attention = (6 if causal else 12) * self.num_layers * self.query_size * seq_len
        return float(6 * weights + attention)

    def _block_matmul_parameters(self) -> int:
        attention = 2 * self.hidden_size * (self.query_size + self.kv_size)
        return attention + (2 + self.gated) * self.hidden_size * self.intermediate_size


def _read_llama(config: Any) -> dict[str, Any]:
    """What Llama-like configs say beyond the sizes that all families share."""
    family, attention_bias = config.model_type, bool(getattr(config, "attention_bias", False))
    head_dim = getattr(config, "head_dim", None)
    return {
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim or config.hidden_size // config.num_attention_heads,
        "norm_eps": config.rms_norm_eps,
        "qkv_bias": attention_bias or family == "qwen2",
        "output_bias": attention_bias,
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "qk_norm": family == "qwen3",
        "sliding_window": config.sliding_window if family == "mistral" else None,
    }


def _read_neox(config: Any) -> dict[str, Any]:
    """What GPT-NeoX configs say beyond the sizes that all families share."""
    return {
        "num_kv_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "norm_eps": config.layer_norm_eps,
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "mlp_bias": True,
        "activation": config.hidden_act,
        "parallel_residual": config.use_parallel_residual,
    }


def _refuse_unsupported(family: str, values: dict[str, Any]) -> None:
    known = ACTIVATIONS.get(family, ("silu",))
    activation = values.get("hidden_act") or known[0]
    if activation not in known:
        raise InputError(
            f"hidden_act {activation!r} is not supported in {family}; only "
            f"{', '.join(map(repr, known))} is"
        )
    if family == "gpt_neox" and values.get("head_dim") is not None:
        raise InputError(
            f"head_dim {values['head_dim']} in a gpt_neox config is not supported: its heads are "
            "hidden_size / num_attention_heads wide; remove the key"
        )
    if values.get("quantization_config"):
        raise InputError(
            "the model is quantized (quantization_config is set) and cannot be trained; "
            "give the unquantized original"
        )
    layer_types = set(values.get("layer_types") or ())
    if values.get("use_sliding_window") or layer_types - {"full_attention"}:
        raise InputError(
            f"{family} with sliding-window attention in some layers is not supported; "
            "only full attention in every layer is (use_sliding_window false)"
        )


def _transformers_config(family: str, values: dict[str, Any]) -> "PreTrainedConfig":
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    # transformers completes the nested rope dictionaries in place.
    arguments = copy.deepcopy({key: values[key] for key in values if key != "model_type"})
    try:
        return AutoConfig.for_model(family, **arguments)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"transformers refuses this {family} config: {error}") from error
