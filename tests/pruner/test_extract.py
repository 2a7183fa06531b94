"""The extracted model computes what the masked one does, in transformers too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.errors import InputError
from pruner.extract import Extraction
from pruner.shapes import Shape, shape_of, validate
from pruner.units import to_masks, unit_kinds
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_config, load_model, save_model
from trainer.models.masks import Masks

BASE: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 6},
    "llama-3": {"model_type": "llama", "rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5},
    "llama-mqa": {"model_type": "llama", "num_key_value_heads": 1},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
}
NEOX_BASE: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": 53,
    "hidden_size": 48,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
NEOX_MODELS: dict[str, dict[str, Any]] = {
    "pythia": NEOX_BASE,
    "sequential-tied": NEOX_BASE | {"use_parallel_residual": False, "tie_word_embeddings": True},
    "no-bias": NEOX_BASE | {"attention_bias": False, "rotary_pct": 1.0},
}


def random_model(**options: Any) -> CausalLM:
    """Every parameter random, gains and biases too, so that nothing can hide behind 0 or 1."""
    base = NEOX_BASE if options["model_type"] == "gpt_neox" else BASE
    model = CausalLM(ModelConfig.from_hf(base | options))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        gain = name.endswith("norm.weight")
        parameter.data = 1 + 0.3 * values if gain else 0.3 * values
    return model.eval()


def random_masks(
    target: Shape, source: Shape, *, mid_range: bool = True, seed: int = 0, hold_scale: bool = False
) -> Masks:
    """Random units of each row kept, with mid-range values when `mid_range`."""
    generator = torch.Generator().manual_seed(seed)
    z: dict[str, Tensor] = {}
    for name, kind in unit_kinds(target, source).items():
        order = torch.rand(kind.rows, kind.units, generator=generator).argsort(-1)
        values = 0.2 + 0.75 * torch.rand(kind.rows, kind.units, generator=generator)
        z[name] = torch.where(order < kind.target, values if mid_range else 1.0, 0.0)
    return to_masks(z, source, hold_scale=hold_scale)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def check_all_agree(model: CausalLM, masks: Masks, path: Path) -> ModelConfig:
    """Masked forward == extracted model == its folder in plain transformers; returns its config."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 53, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        masked = model(ids, masks=masks)
        extraction = Extraction(model.config, masks)
        config = extraction.config
        pairs = extraction.tensors(model.named_parameters())
        save_model(config, ((name, tensor.detach()) for name, tensor in pairs), path)
        extracted = load_model(path)
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        assert difference(extracted.eval()(ids), masked) < 1e-5
        assert difference(plain(ids).logits, masked) < 1e-5
    assert load_config(path).num_parameters() == config.num_parameters()
    assert plain.num_parameters() == config.num_parameters()
    return config


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mid_range", [True, False])
@pytest.mark.parametrize("hold_scale", [True, False])
def test_masked_extracted_and_reloaded_models_agree(
    name: str, mid_range: bool, hold_scale: bool, tmp_path: Path
) -> None:
    model = random_model(**MODELS[name])
    source = shape_of(model.config)
    kv_heads = max(1, source.kv_heads - 1)
    group = max(1, source.group - 1)
    target = Shape(2, 20, kv_heads * group, kv_heads, 8, 11)
    validate(target, source)
    masks = random_masks(target, source, mid_range=mid_range, hold_scale=hold_scale)
    config = check_all_agree(model, masks, tmp_path / "model")
    assert shape_of(config) == target


@pytest.mark.parametrize("name", NEOX_MODELS)
@pytest.mark.parametrize("mid_range", [True, False])
@pytest.mark.parametrize("hold_scale", [True, False])
@pytest.mark.parametrize(
    "target",
    [
        Shape(2, 32, 4, 4, 8, 11),
        Shape(3, 32, 4, 4, 8, 20),
        Shape(1, 48, 6, 6, 8, 20),
        Shape(3, 48, 6, 6, 8, 7),
        Shape(1, 8, 1, 1, 8, 1),
    ],
    ids=["all", "width", "layer", "ffn", "one-of-each"],
)
def test_gpt_neox_agrees(
    name: str, mid_range: bool, hold_scale: bool, target: Shape, tmp_path: Path
) -> None:
    model = random_model(**NEOX_MODELS[name])
    source = shape_of(model.config)
    validate(target, source)
    masks = random_masks(target, source, mid_range=mid_range, hold_scale=hold_scale)
    config = check_all_agree(model, masks, tmp_path / "model")
    assert shape_of(config) == target


@pytest.mark.parametrize("name", NEOX_MODELS)
@pytest.mark.parametrize("sizes", [(17, 6), (48, 2)], ids=["hidden", "heads"])
def test_gpt_neox_width_and_heads_alone_work_but_have_no_folder(
    name: str, sizes: tuple[int, int], tmp_path: Path
) -> None:
    model = random_model(**NEOX_MODELS[name])
    source = shape_of(model.config)
    masks = random_masks(Shape(3, sizes[0], sizes[1], sizes[1], 8, 20), source)
    extraction = Extraction(model.config, masks)
    pairs = extraction.tensors(model.named_parameters())
    tensors = {key: tensor.detach() for key, tensor in pairs}
    with pytest.raises(InputError, match=r"is not \d heads of 8, and gpt_neox configs"):
        save_model(extraction.config, tensors, tmp_path / "model")
    extracted = CausalLM(extraction.config)
    extracted.load_state_dict(tensors)
    ids = torch.randint(0, 53, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert difference(extracted(ids), model(ids, masks=masks)) < 1e-5


@pytest.mark.parametrize(
    "target",
    [
        Shape(3, 24, 3, 3, 8, 20),
        Shape(3, 24, 4, 2, 8, 20),
        Shape(3, 24, 6, 3, 8, 7),
        Shape(1, 24, 6, 3, 8, 20),
        Shape(3, 18, 6, 3, 8, 20),
        Shape(1, 1, 1, 1, 8, 1),
    ],
    ids=["query-head", "kv-group", "ffn", "layer", "hidden", "one-of-each"],
)
@pytest.mark.parametrize("name", ["llama-tied", "qwen2"])
def test_single_kinds_and_single_units(name: str, target: Shape, tmp_path: Path) -> None:
    model = random_model(**MODELS[name])
    source = shape_of(model.config)
    config = check_all_agree(model, random_masks(target, source, seed=3), tmp_path / "model")
    assert shape_of(config) == target


@pytest.mark.parametrize("name", ["llama", "llama-tied", "pythia", "sequential-tied"])
def test_all_units_kept_with_mid_range_masks(name: str, tmp_path: Path) -> None:
    model = random_model(**(MODELS | NEOX_MODELS)[name])
    generator = torch.Generator().manual_seed(5)
    masks = Masks(
        hidden=0.2 + 0.8 * torch.rand(model.config.hidden_size, generator=generator),
        layer=0.2 + 0.8 * torch.rand(3, generator=generator),
        head=0.2 + 0.8 * torch.rand(3, 6, generator=generator),
        intermediate=0.2 + 0.8 * torch.rand(3, 20, generator=generator),
    )
    assert check_all_agree(model, masks, tmp_path / "model").num_parameters() == (
        model.config.num_parameters()
    )


def test_no_masks_copy_the_model() -> None:
    model = random_model(model_type="llama")
    extraction = Extraction(model.config, Masks())
    assert extraction.config == model.config
    parameters = dict(model.named_parameters())
    copied = dict(extraction.tensors(model.named_parameters()))
    assert copied.keys() == parameters.keys()
    assert all(torch.equal(copied[name], parameters[name]) for name in parameters)


def test_a_stored_head_of_a_tied_model_is_left_out() -> None:
    model = random_model(model_type="llama", tie_word_embeddings=True)
    state = [*model.named_parameters(), ("lm_head.weight", model.head_weight)]
    names = [name for name, _ in Extraction(model.config, Masks()).tensors(state)]
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names


def test_dtype_is_kept_and_dropped_blocks_are_renumbered() -> None:
    model = random_model(model_type="llama").to(torch.bfloat16)
    masks = Masks(layer=torch.tensor([0.0, 1.0, 1.0]), hidden=torch.linspace(0.1, 1, 24))
    found = dict(Extraction(model.config, masks).tensors(model.named_parameters()))
    assert all(t.dtype == torch.bfloat16 for t in found.values())
    blocks = {name.split(".")[2] for name in found if name.startswith("model.layers.")}
    assert blocks == {"0", "1"}
    last = dict(model.named_parameters())["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], last)


@pytest.mark.parametrize("name", [*MODELS, *NEOX_MODELS])
@pytest.mark.parametrize("mid_range", [True, False])
def test_blocks_of_different_sizes_agree(name: str, mid_range: bool, tmp_path: Path) -> None:
    """A block without attention, one without its feed-forward layer, and channels of any number."""
    model = random_model(**(MODELS | NEOX_MODELS)[name])
    source = shape_of(model.config)
    fused = model.config.traits.fused_qkv
    target = Shape(3, 48, 6, 6, 8, 20) if fused else Shape(3, 18, source.kv_heads, 0, 8, 20)
    target = replace(target, kv_heads=source.kv_heads)
    masks = random_masks(target, source, mid_range=mid_range)
    part = 0.6 if mid_range else 1.0
    channels = torch.ones(3, 20)
    channels[1, 3:9] = 0
    masks = replace(
        masks,
        attention=torch.tensor([0.0, 1.0, part]),
        feed_forward=torch.tensor([1.0, part, 0.0]),
        intermediate=channels,
    )
    config = check_all_agree(model, masks, tmp_path / "model")
    heads, kv_heads = target.heads, target.kv_heads
    assert config.layer_sizes == ((0, 0, 20), (heads, kv_heads, 14), (heads, kv_heads, 0))
    saved = load_config(tmp_path / "model")
    assert saved.layer_sizes == config.layer_sizes
    assert replace(saved, hf={}) == replace(config, hf={})


def test_non_uniform_masks_are_refused() -> None:
    config = random_model(model_type="llama").config
    heads = torch.ones(3, 6)
    heads[:, 0] = 0
    with pytest.raises(AssertionError, match="different query heads"):
        Extraction(config, Masks(head=heads))
    with pytest.raises(AssertionError, match="no block"):
        Extraction(config, Masks(layer=torch.zeros(3)))
    with pytest.raises(AssertionError, match="no hidden dimension"):
        Extraction(config, Masks(hidden=torch.zeros(24)))
    with pytest.raises(AssertionError, match="no channel is kept in block 0"):
        Extraction(config, Masks(intermediate=torch.zeros(3, 20)))
