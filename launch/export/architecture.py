"""How llama.cpp names and lays out what a model is made of: architectures, settings, tensors.

Its names and conventions are those of the GGUF specification and of `gguf.constants`.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.errors import InputError
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.families import Role
from trainer.models.rope import inverse_frequencies

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gpt_neox": "gptneox",
}
"""llama.cpp's architecture of each family."""
UNEVEN = "deci"
"""Of models whose blocks differ."""
NO_CHANNELS = 32
"""Channels of the feed-forward layer of zeros that stands where a block lacks one: the architecture
can leave out attention alone. A layer of zeros adds nothing."""
NO_HEADS = 1
"""Heads of the attention of zeros that stands where the first block lacks it: llama.cpp takes the
width of all heads from there."""
_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}


def architecture_of(model: ModelConfig) -> str:
    """Raises InputError for a model that llama.cpp has no architecture for."""
    family, found = model.family, ARCHITECTURES[model.family]
    if model.layer_sizes is not None:
        if found != "llama":
            raise InputError(
                f"blocks of unlike sizes: llama.cpp has an architecture for them ({UNEVEN}) that "
                f"computes as Llama does, and none that computes as {family} does; prune to blocks "
                "that are alike, or stay with transformers"
            )
        found = UNEVEN
    if family == "qwen3" and (model.qkv_bias or model.output_bias):
        raise InputError(
            "qwen3 with biases in attention: llama.cpp's architecture has none; stay with "
            "transformers"
        )
    scaled = (model.rope_scaling or {}).get("rope_type")
    if scaled == "llama3" and ARCHITECTURES[family] != "llama":
        raise InputError(
            f"{family} with rotary frequencies scaled as Llama 3's: llama.cpp reads these for "
            "Llama alone; stay with transformers"
        )
    return found


def notes_of(model: ModelConfig) -> list[str]:
    """What llama.cpp computes otherwise than the original, in words."""
    found = []
    window = model.sliding_window
    if window is not None and window < model.max_position_embeddings:
        found.append(
            f"llama.cpp has no sliding window for {model.family}: behind position {window:,} it "
            "sees more than the model was trained with"
        )
    if model.family == "gpt_neox" and model.activation == "gelu":
        found.append("llama.cpp computes gelu by its tanh approximation: logits differ slightly")
    return found


def add_settings(writer: "GGUFWriter", model: ModelConfig) -> None:
    """What config.json says, in llama.cpp's words."""
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_vocab_size(model.vocab_size)
    if model.layer_sizes is None:
        writer.add_feed_forward_length(model.intermediate_size)
        writer.add_head_count(model.num_heads)
        writer.add_head_count_kv(model.num_kv_heads)
    else:
        blocks = model.layer_sizes
        writer.add_feed_forward_length([one.intermediate_size or NO_CHANNELS for one in blocks])
        first = blocks[0].num_heads or NO_HEADS, blocks[0].num_kv_heads or NO_HEADS
        writer.add_head_count([first[0], *(one.num_heads for one in blocks[1:])])
        writer.add_head_count_kv([first[1], *(one.num_kv_heads for one in blocks[1:])])
    writer.add_rope_dimension_count(model.rotary_dim)
    writer.add_rope_freq_base(model.rope_theta)
    if model.family == "gpt_neox":
        writer.add_layer_norm_eps(model.norm_eps)
        writer.add_parallel_residual(model.parallel_residual)
    else:
        writer.add_layer_norm_rms_eps(model.norm_eps)
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)
    scaling = model.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))


def tensors_of(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all tensors as llama.cpp reads them, in the order of the model."""
    config, names = model.config, model.names
    state = dict(model.named_parameters())
    yield "token_embd.weight", state[f"{names.embedding}.weight"]
    yield from _shared(state, names.final_norm, "output_norm")
    if not config.tie_embeddings:
        yield from _shared(state, names.head, "output")
    elif config.family == "gpt_neox":
        # Its architecture has no head that is the embedding.
        yield "output.weight", state[f"{names.embedding}.weight"]
    if (config.rope_scaling or {}).get("rope_type") == "llama3":
        yield "rope_freqs.weight", _slowed(config)
    for index in range(config.num_layers):
        yield from _block(state, config, index)


def _shared(state: Mapping[str, Tensor], module: str, name: str) -> Iterator[tuple[str, Tensor]]:
    for kind in ("weight", "bias"):
        if f"{module}.{kind}" in state:
            yield f"{name}.{kind}", state[f"{module}.{kind}"]


def _block(
    state: Mapping[str, Tensor], config: ModelConfig, index: int
) -> Iterator[tuple[str, Tensor]]:
    names, sizes = config.traits.names, config.blocks[index]
    for module, role in names.modules.items():
        for name, value in _shared(
            state, f"{names.blocks}.{index}.{module}", f"blk.{index}.{_TENSORS[module]}"
        ):
            yield name, _laid_out(value, role, config, sizes.num_heads, sizes.num_kv_heads, module)
    if config.family == "gpt_neox" and not config.qkv_bias:
        # Its architecture has these biases always.
        hidden = config.hidden_size
        yield f"blk.{index}.attn_qkv.bias", torch.zeros(3 * hidden)
        yield f"blk.{index}.attn_output.bias", torch.zeros(hidden)
    if not index and not sizes.num_heads:
        yield from _zeros(index, config, "attn_norm", NO_HEADS * config.head_dim)
    if not sizes.intermediate_size:
        yield from _zeros(index, config, "ffn_norm", NO_CHANNELS)


def _zeros(index: int, config: ModelConfig, norm: str, width: int) -> Iterator[tuple[str, Tensor]]:
    """A layer behind `norm` that adds nothing to the stream; `width` wide inside."""
    hidden = config.hidden_size
    yield f"blk.{index}.{norm}.weight", torch.ones(hidden)
    *readers, writer = (
        ("ffn_gate", "ffn_up", "ffn_down")
        if norm == "ffn_norm"
        else ("attn_q", "attn_k", "attn_v", "attn_output")
    )
    for name in readers:
        yield f"blk.{index}.{name}.weight", torch.zeros(width, hidden)
    yield f"blk.{index}.{writer}.weight", torch.zeros(hidden, width)


def _laid_out(
    value: Tensor, role: Role, config: ModelConfig, heads: int, kv_heads: int, module: str
) -> Tensor:
    """Rows in llama.cpp's order.

    Its llama and deci architectures rotate neighbouring channels 2i and 2i + 1 of a head, where
    Hugging Face's layout rotates i and i + head_dim / 2. Fused rows are all queries, all keys, all
    values, where GPT-NeoX stores them head by head.
    """
    rows = value.shape[1:]
    if role is Role.FUSED:
        apart = value.reshape(heads, 3, config.head_dim, *rows)
        return apart.transpose(0, 1).reshape(value.shape)
    if ARCHITECTURES[config.family] != "llama" or not module.endswith(("q_proj", "k_proj")):
        return value
    count = heads if role is Role.QUERIES else kv_heads
    halves = value.reshape(count, 2, config.head_dim // 2, *rows)
    return halves.transpose(1, 2).reshape(value.shape)


def _slowed(config: ModelConfig) -> Tensor:
    """[rotary_dim / 2] fp32: what llama.cpp divides each rotary frequency by."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float) / config.rotary_dim
    plain = 1.0 / config.rope_theta**exponents
    return plain / inverse_frequencies(config)


def unfit(model: ModelConfig, block: int) -> dict[str, int]:
    """Sizes of rows that are no multiple of `block` weights, by the option that names them."""
    rows = {"hidden": [model.hidden_size]}
    sizes = [(one.num_heads, one.intermediate_size) for one in model.blocks]
    rows["heads times head_dim"] = [heads * model.head_dim for heads, _ in sizes]
    rows["ffn"] = [channels for _, channels in sizes]
    return {
        name: next(value for value in values if value % block)
        for name, values in rows.items()
        if any(value % block for value in values)
    }
