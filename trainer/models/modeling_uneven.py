"""Decoders of transformers whose blocks differ in size, or lack one of their two layers.

transformers' own classes have blocks that are all alike. Those here are them with the blocks that
`layer_sizes` of config.json describes; everything else is inherited. This file goes along with such
a model, and needs torch and transformers alone.
"""

import copy
from typing import Any

import torch
import transformers
from torch import nn

NAMES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gpt_neox": "GPTNeoX",
}
"""transformers' `model_type` of a family -> how the names of its classes begin."""


class NoAttention(nn.Module):
    """Adds nothing, and has no weights."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """Zeros like the input, and no attention weights."""
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """Adds nothing, and has no weights."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros like the input."""
        return torch.zeros_like(hidden_states)


def resize_blocks(model: Any) -> None:
    """Gives the blocks of one of transformers' models the sizes that its config lists."""
    layers, config = model.base_model.layers, model.config
    attending = 0
    for index, sizes in enumerate(config.layer_sizes):
        own = copy.copy(config)
        for key, size in sizes.items():
            # What has none is replaced below.
            if size:
                setattr(own, key, size)
        block = layers[index] = type(layers[index])(own, index)
        attention = "self_attn" if hasattr(block, "self_attn") else "attention"
        for module in block.modules():
            if getattr(module, "config", None) is own:
                # Attention looks up its implementation there, which may be set later.
                module.config = config
        if sizes["num_attention_heads"]:
            # Caches count layers that attend, and take the first one's length for that of all.
            getattr(block, attention).layer_idx = attending
            attending += 1
        else:
            setattr(block, attention, NoAttention())
            block.input_layernorm = nn.Identity()
        if not sizes["intermediate_size"]:
            block.mlp = NoFeedForward()
            block.post_attention_layernorm = nn.Identity()


def _classes(family: str, name: str) -> dict[str, type]:
    base_config: Any = getattr(transformers, f"{name}Config")
    base_model: Any = getattr(transformers, f"{name}ForCausalLM")

    class UnevenConfig(base_config):
        model_type = f"{family}_uneven"

    class UnevenForCausalLM(base_model):
        config_class = UnevenConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            resize_blocks(self)
            self.post_init()

    found: dict[str, type] = {"Config": UnevenConfig, "ForCausalLM": UnevenForCausalLM}
    named = {}
    for kind, own in found.items():
        own.__name__ = own.__qualname__ = f"Uneven{name}{kind}"
        named[own.__name__] = own
    _read_weights_as(f"{name}ForCausalLM", f"Uneven{name}ForCausalLM")
    return named


def _read_weights_as(base: str, own: str) -> None:
    """Has the class called `own` rename stored tensors as `base` does. transformers 5 knows by the
    name of a class that some of its modules are called otherwise in files."""
    try:
        from transformers import conversion_mapping as known
    except ImportError:
        return
    mapping = known.get_checkpoint_conversion_mapping(base)
    if mapping is not None:
        known.register_checkpoint_conversion_mapping(own, mapping, overwrite=True)


for _family, _name in NAMES.items():
    globals().update(_classes(_family, _name))
