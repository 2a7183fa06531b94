"""The architecture of a decoder language model, read from and written to Hugging Face configs."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch

from data.errors import InputError
from data.records import is_kind, word_for, words_for
from trainer.models.families import FAMILIES, Family
from trainer.models.layer_sizes import (
    KEY,
    SUFFIX,
    LayerSizes,
    read_layer_sizes,
    require_layer_sizes,
    written_layer_sizes,
)
from trainer.models.limits import LARGEST_WIDTH, SIZE_LIMITS, shortened
from trainer.models.rope_settings import read_rope
from trainer.models.uneven import register, uneven_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Fields that not every family's config can hold.
_OPTIONS = (
    "qkv_bias",
    "output_bias",
    "mlp_bias",
    "qk_norm",
    "activation",
    "parallel_residual",
    "rotary_fraction",
    "sliding_window",
)
# Keys of a Hugging Face config that are written anew beside those of the families' tables, or that
# describe one particular file, or a program that ran the model.
_REWRITTEN_KEYS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "dtype",
        KEY,
        "layer_types",
        "model_type",
        "original_dtype",
        "pruned_heads",
        "quantization_config",
        "return_dict",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "rotary_emb_base",
        "rotary_pct",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "transformers_weights",
    }
)


_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(SIZE_LIMITS, int),
    **dict.fromkeys(("norm_eps", "rope_theta", "rotary_fraction"), float),
    **dict.fromkeys(("tie_embeddings", "qkv_bias", "output_bias", "mlp_bias"), bool),
    **dict.fromkeys(("qk_norm", "parallel_residual"), bool),
    "activation": str,
    "sliding_window": (int, type(None)),
}


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
    """Share of each head, from its first channel on, that the rotary embedding rotates."""
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
    layer_sizes: tuple[LayerSizes, ...] | None = None
    """Sizes of every block, where they differ; the fields above then hold the largest. None: all
    blocks are alike."""
    hf: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The Hugging Face config this one was read from: special token ids and other extras."""

    def __post_init__(self) -> None:
        _require_known(self.family)
        _require_types(self)
        for name, limit in SIZE_LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise InputError(
                    f"{name} is {getattr(self, name)}; it must be at least 1, and at most {limit}"
                )
        if self.query_size > LARGEST_WIDTH:
            raise InputError(
                f"{self.num_heads} heads of {self.head_dim} are {self.query_size} wide together; "
                f"at most {LARGEST_WIDTH} can be used"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise InputError(f"sliding_window is {self.sliding_window}; it must be at least 1")
        if not 0 < self.rotary_fraction <= 1:
            raise InputError(
                f"the rotary embedding rotates {self.rotary_fraction} of each head; it must be "
                "above 0, and at most 1"
            )
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}; every key/value head must serve equally many query heads"
            )
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise InputError(
                f"head_dim is {self.head_dim}, of which the rotary embedding rotates "
                f"{self.rotary_dim}; it needs an even number of at least 2"
            )
        if self.layer_sizes is not None:
            self._settle_layer_sizes(self.layer_sizes)

    def _settle_layer_sizes(self, given: Sequence[Sequence[int]]) -> None:
        """Checks them; blocks that are all alike need none."""
        sizes = tuple(LayerSizes(*block) for block in given)
        require_layer_sizes(sizes, self._largest, self.num_layers)
        uneven = any(block != self._largest for block in sizes)
        object.__setattr__(self, "layer_sizes", sizes if uneven else None)

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> "ModelConfig":
        """Read the content of a config.json; keys that are absent take transformers' defaults.

        Raises:
            InputError: unknown family, a value of another type or beyond all sense, or a feature
                that changes the forward pass and that this implementation does not have.
        """
        if "model_type" not in values:
            raise InputError("`model_type` is missing; it names the model's family, such as llama")
        family = str(values["model_type"])
        sizes = None
        if family.endswith(SUFFIX):
            family, sizes = family.removesuffix(SUFFIX), read_layer_sizes(values)
            values = {key: value for key, value in values.items() if key != KEY}
        _require_known(family)
        _require_possible(FAMILIES[family], values)
        _require_dtype(values)
        _refuse_unsupported(family, values)
        config = _transformers_config(family, values)
        if sizes is not None:
            register(family)
        theta, fraction, scaling = read_rope(config.rope_parameters)
        if fraction != 1.0 and not FAMILIES[family].partial_rotary:
            raise InputError(
                f"partial_rotary_factor {fraction} is not supported in {family}; only rotary "
                "embeddings over the whole head (1.0) are"
            )
        return cls(
            family=family,
            rope_theta=theta,
            rope_scaling=scaling,
            rotary_fraction=fraction,
            layer_sizes=sizes,
            hf=copy.deepcopy(values),
            **_read_fields(FAMILIES[family], config),
        )

    def to_hf(self) -> "PreTrainedConfig":
        """The transformers config of this architecture.

        Raises:
            InputError: transformers or the family's Hugging Face class cannot express the shape.
        """
        self._require_expressible()
        rewritten = _REWRITTEN_KEYS.union(*(row.keys.values() for row in FAMILIES.values()))
        values = {key: value for key, value in self.hf.items() if key not in rewritten}
        values |= {key: getattr(self, name) for name, key in self.traits.keys.items()}
        rope = {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.rope_theta}
        if self.traits.partial_rotary:
            rope["partial_rotary_factor"] = self.rotary_fraction
        values |= {"architectures": [self.traits.architecture], "rope_parameters": rope}
        if self.layer_sizes is not None:
            values[KEY] = written_layer_sizes(self.layer_sizes)
        return _transformers_config(self.family, values)

    def _require_expressible(self) -> None:
        family, keys = self.family, self.traits.keys
        if self.traits.divides_hidden and self.hidden_size % self.num_heads:
            nearest = max(1, self.hidden_size // self.num_heads) * self.num_heads
            raise InputError(
                f"hidden size {self.hidden_size} is not a multiple of the {self.num_heads} heads; "
                f"transformers refuses such a {family} config: use a hidden size of {nearest} or "
                "another number of heads"
            )
        if "head_dim" not in keys and self.query_size != self.hidden_size:
            fitting = max(1, self.hidden_size // self.head_dim)
            raise InputError(
                f"hidden size {self.hidden_size} is not {self.num_heads} heads of {self.head_dim}, "
                f"and {family} configs have no head dim of their own: use a hidden size of "
                f"{self.query_size} with {self.num_heads} heads, or {fitting * self.head_dim} with "
                f"{fitting}"
            )
        if "num_kv_heads" not in keys and self.num_kv_heads != self.num_heads:
            raise InputError(
                f"{family} configs cannot express {self.num_kv_heads} KV heads for "
                f"{self.num_heads} query heads; they must be equal"
            )
        for name in _OPTIONS:
            if not self._expressible_in(family, name):
                able = [other for other in FAMILIES if self._expressible_in(other, name)]
                raise InputError(
                    f"{family} configs cannot express {name}={getattr(self, name)!r}; "
                    + (f"use family {' or '.join(able)}" if able else "no known family can")
                )
            same = [other for other in _OPTIONS if name in keys and keys.get(other) == keys[name]]
            if len({getattr(self, other) for other in same}) > 1:
                values = " and ".join(f"{other}={getattr(self, other)!r}" for other in same)
                raise InputError(
                    f"{family} configs cannot express {values}: {keys[name]} states both; make "
                    "them equal"
                )

    def _expressible_in(self, family: str, name: str) -> bool:
        """Whether a config of `family` can hold this model's value of one of _OPTIONS."""
        traits, value = FAMILIES[family], getattr(self, name)
        if name == "activation":
            return value in traits.activations
        if name in traits.keys or (name == "rotary_fraction" and traits.partial_rotary):
            return True
        default = next(f.default for f in dataclasses.fields(self) if f.name == name)
        return bool(value == traits.fixed.get(name, default))

    @property
    def traits(self) -> Family:
        """What its family determines: names, config keys, block."""
        return FAMILIES[self.family]

    @property
    def key(self) -> str:
        """Tells architectures apart: a hash of everything that decides what the weights compute."""
        values = {name: v for name, v in dataclasses.asdict(self).items() if name != "hf"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def _largest(self) -> LayerSizes:
        return LayerSizes(self.num_heads, self.num_kv_heads, self.intermediate_size)

    @property
    def blocks(self) -> tuple[LayerSizes, ...]:
        """Sizes of every block."""
        return self.layer_sizes or (self._largest,) * self.num_layers

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
        """Channels of each head that the rotary embedding rotates."""
        return int(self.head_dim * self.rotary_fraction)

    def num_parameters(self, embeddings: bool = True) -> int:
        """Number of parameters; `embeddings=False` leaves out the embedding and an untied head."""
        # A LayerNorm has a gain and a bias, an RMSNorm only a gain.
        norm = (2 if self.traits.norm == "LayerNorm" else 1) * self.hidden_size
        total = norm + sum(self._block_parameters(sizes, norm) for sizes in self.blocks)
        if embeddings:
            total += (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return total

    def _block_parameters(self, sizes: LayerSizes, norm: int) -> int:
        """Parameters of a block with norms of `norm`."""
        total = self._block_matmul_parameters(sizes)
        if sizes.num_heads:
            total += norm + self.qk_norm * 2 * self.head_dim + self.output_bias * self.hidden_size
            heads = sizes.num_heads + 2 * sizes.num_kv_heads
            total += self.qkv_bias * heads * self.head_dim
        if sizes.intermediate_size:
            biases = (1 + self.traits.gated) * sizes.intermediate_size + self.hidden_size
            total += norm + self.mlp_bias * biases
        return total

    @property
    def block_matrices(self) -> int:
        """Number of weights of the matrices in blocks."""
        return sum(map(self._block_matmul_parameters, self.blocks))

    def flops_per_token(self, seq_len: int, causal: bool) -> float:
        """Forward plus backward FLOPs of one token in a sequence of `seq_len`.

        6N + 12 d s for each of the layers of attention (or 6N + 6 d s when only the causal half of
        attention is counted), where N is the number of weights in matrix products: the head is in,
        the embedding lookup is out; d is the width of all query heads (PaLM, arXiv 2204.02311,
        appendix B).
        """
        weights = self.block_matrices + self.vocab_size * self.hidden_size
        width = sum(sizes.num_heads for sizes in self.blocks) * self.head_dim
        return float(6 * weights + (6 if causal else 12) * width * seq_len)

    def _block_matmul_parameters(self, sizes: LayerSizes) -> int:
        heads, kv_heads, channels = sizes
        attention = 2 * (heads + kv_heads) * self.head_dim
        return self.hidden_size * (attention + (2 + self.traits.gated) * channels)


def _require_known(family: str) -> None:
    if family not in FAMILIES:
        raise InputError(
            f"model family {shortened(repr(family))} is not supported; known families: "
            f"{', '.join(FAMILIES)}"
        )


def _require_types(config: ModelConfig) -> None:
    """Raises InputError unless every field of `config` is of the type that it is declared with."""
    for name, kind in _TYPES.items():
        value = getattr(config, name)
        if not is_kind(value, kind):
            raise InputError(
                f"{name} is {word_for(value)} ({shortened(repr(value))}), not {words_for(kind)}"
            )
        if isinstance(value, float) and not (isfinite(value) and value >= 0):
            raise InputError(f"{name} is {value}; it must be a number of at least 0")


def _require_possible(traits: Family, values: dict[str, Any]) -> None:
    """Raises InputError for sizes beyond SIZE_LIMITS, from which transformers would build lists."""
    for name, limit in SIZE_LIMITS.items():
        key = traits.keys.get(name)
        value = values.get(key) if key else None
        if isinstance(value, (int, float)) and not value <= limit:
            raise InputError(f"{key} is {shortened(str(value))}; it can be {limit} at most")


def _require_dtype(values: dict[str, Any]) -> None:
    """Raises InputError where config.json states a dtype that does not exist."""
    for key in ("dtype", "torch_dtype"):
        stated = values.get(key)
        # transformers knows a dictionary of them, one for each part of a model.
        if stated is None or isinstance(stated, dict):
            continue
        if not isinstance(stated, str) or not isinstance(getattr(torch, stated, None), torch.dtype):
            raise InputError(
                f"{key} is {shortened(repr(stated))}, which names no dtype of PyTorch: write the "
                'one of the weights, such as "bfloat16", or remove the key'
            )


def _read_fields(traits: Family, config: Any) -> dict[str, Any]:
    """The fields that the family's config states or fixes; `config` is transformers'."""
    keys = dict(traits.keys)
    head_dim = getattr(config, keys.pop("head_dim", "head_dim"), None)
    fields = {**traits.fixed, **{name: getattr(config, key) for name, key in keys.items()}}
    fields.setdefault("num_kv_heads", fields["num_heads"])
    fields["head_dim"] = head_dim or fields["hidden_size"] // fields["num_heads"]
    return fields


def _refuse_unsupported(family: str, values: dict[str, Any]) -> None:
    traits = FAMILIES[family]
    key, known = traits.keys["activation"], traits.activations
    if (values.get(key) or known[0]) not in known:
        raise InputError(
            f"{key} {shortened(repr(values[key]))} is not supported in {family}; only "
            f"{', '.join(map(repr, known))} is"
        )
    if "head_dim" not in traits.keys and values.get("head_dim") is not None:
        raise InputError(
            f"head_dim {shortened(str(values['head_dim']))} in a {family} config is not supported: "
            "its heads are hidden_size / num_attention_heads wide; remove the key"
        )
    if values.get("quantization_config"):
        raise InputError(
            "the model is quantized (quantization_config is set) and cannot be trained; "
            "give the unquantized original"
        )
    layer_types = values.get("layer_types") or []
    full = isinstance(layer_types, list) and all(one == "full_attention" for one in layer_types)
    if values.get("use_sliding_window") or not full:
        raise InputError(
            f"{family} with sliding-window attention in some layers is not supported; "
            "only full attention in every layer is (use_sliding_window false)"
        )


def _transformers_config(family: str, values: dict[str, Any]) -> "PreTrainedConfig":
    from transformers import AutoConfig

    try:
        # transformers completes the nested rope dictionaries in place.
        arguments = copy.deepcopy({key: values[key] for key in values if key != "model_type"})
        if KEY in values:
            return uneven_config(family, arguments)
        return AutoConfig.for_model(family, **arguments)
    except Exception as error:  # it raises many types for a bad value
        reason = shortened(" ".join(str(error).split()) or type(error).__name__, 300)
        raise InputError(f"transformers refuses this {family} config: {reason}") from error
