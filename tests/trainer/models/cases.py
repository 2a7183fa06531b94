"""Tiny Hugging Face configs that together use every feature of the supported families."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM, LossOutput
from trainer.models.masks import Masks

_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
_BASE = _SIZES | {"num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA_CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-2},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 6},
    "llama-tied-head-dim": {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 20},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-3-rope": {
        "model_type": "llama",
        "rope_scaling": _LLAMA3,
        "rope_theta": 5e5,
        "head_dim": 16,
    },
    "llama-linear-rope": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 20},
    "mistral-window": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 20},
    "qwen3-biases": {"model_type": "qwen3", "attention_bias": True, "tie_word_embeddings": True},
}
LLAMA_CASES = {name: _BASE | values for name, values in LLAMA_CASES.items()}
NEOX_CASES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.25, "layer_norm_eps": 1e-2},
    "gpt_neox-sequential": {
        "model_type": "gpt_neox",
        "use_parallel_residual": False,
        "rotary_pct": 1.0,
        "rotary_emb_base": 5000,
        "tie_word_embeddings": True,
    },
    "gpt_neox-no-bias": {
        "model_type": "gpt_neox",
        "attention_bias": False,
        "hidden_act": "gelu_new",
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rotary_pct": 0.5,
    },
}
NEOX_CASES = {name: _SIZES | values for name, values in NEOX_CASES.items()}
CASES = LLAMA_CASES | NEOX_CASES


def hf_config(name: str) -> Any:
    """transformers' config of a case; it fills in the nested dictionaries it is given."""
    return AutoConfig.for_model(**deepcopy(CASES[name]))


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[CausalLM, Any]:
    """Our model and transformers' with the same weights, gains and biases not at their defaults."""
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(hf_config(name), dtype=dtype)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.3)
    config = ModelConfig.from_hf(CASES[name])
    model = CausalLM(config).to(dtype)
    state = {stored_name(key, config): value for key, value in reference.state_dict().items()}
    if config.tie_embeddings:
        state.pop(f"{model.names.head}.weight")
    model.load_state_dict(state, strict=True)
    return model, reference


def stored_name(name: str, config: ModelConfig) -> str:
    """The name in files of a parameter of transformers' model, which calls every head lm_head."""
    return name.replace("lm_head", "embed_out") if config.family == "gpt_neox" else name


def random_masks(seed: int, dtype: torch.dtype = torch.float32) -> Masks:
    """Leaf masks for CASES' shape, mid-range values with zeros of every kind."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = torch.rand(shape, generator=generator, dtype=dtype) * 0.8 + 0.2
        zeros = torch.rand(shape, generator=generator) < 0.3
        zeros.view(-1)[0] = True
        return values.masked_fill(zeros, 0.0).requires_grad_()

    masks = Masks(hidden=draw(48), layer=draw(3), head=draw(3, 6), intermediate=draw(3, 80))
    assert masks.layer is not None and masks.layer[1:].max() > 0
    return masks


def check_masked_loss(
    name: str, activation_masked_loss: Callable[[CausalLM, Masks, Tensor, Tensor, Tensor], Tensor]
) -> None:
    """The model's loss and gradients in fp64 equal those of `activation_masked_loss`."""
    model, _ = pair(name, torch.float64)
    masks = random_masks(1, torch.float64)
    leaves = [*model.parameters(), *masks.tensors().values()]
    ids, targets = torch.randint(0, 61, (2, 2, 20))
    # fp64 rotary tables would differ from the model's fp32 ones.
    model.frequencies = model.frequencies.double()
    weights = torch.rand(2, 20, dtype=torch.float64)
    expected = activation_masked_loss(model, masks, ids, targets, weights)
    expected_gradients = torch.autograd.grad(expected, leaves)
    output = model(ids, masks, targets, weights)
    assert isinstance(output, LossOutput)
    gradients = torch.autograd.grad(output.loss, leaves)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert masks.layer is not None
    closed = masks.layer == 0
    assert gradients[-3][closed].abs().min() > 0, "a closed block must still get a gradient"
