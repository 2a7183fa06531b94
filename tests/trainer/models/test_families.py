"""The table of families, and two families beyond it: one row, a block class where it differs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from data.errors import InputError
from pruner.extract import Extraction
from tests.trainer.models.cases import CASES, pair, random_masks
from trainer.models import layers, llama
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.families import FAMILIES, Role
from trainer.models.hf import load_model, save_model
from trainer.models.layer_sizes import LayerSizes
from trainer.models.layers import LayerNorm, skip_block
from trainer.models.masks import LayerMasks, Masks


class LayerNormBlock(nn.Module):
    """Llama's block with layer norms, as StableLM has it."""

    def __init__(self, config: ModelConfig, sizes: LayerSizes) -> None:
        super().__init__()
        self.self_attn = llama.Attention(config, sizes)
        self.mlp = llama.FeedForward(config, sizes.intermediate_size)
        self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        masks: LayerMasks,
        documents: Tensor | None = None,
    ) -> Tensor:
        if masks.units.skipped:
            return skip_block(self, x, masks.stream)
        x = x + self.self_attn(self.input_layernorm(x, masks.stream), cos, sin, masks, documents)
        return x + self.mlp(self.post_attention_layernorm(x, masks.stream), masks)


_LLAMA = FAMILIES["llama"]
_SIZES = {key: value for key, value in CASES["llama"].items() if key != "rms_norm_eps"}
NEW_FAMILIES = {
    "seed_oss": dataclasses.replace(
        _LLAMA,
        architecture="SeedOssForCausalLM",
        keys={**_LLAMA.keys, "output_bias": "attention_out_bias"},
        divides_hidden=False,
    ),
    "stablelm": dataclasses.replace(
        _LLAMA,
        architecture="StableLmForCausalLM",
        keys={
            **{
                name: key
                for name, key in _LLAMA.keys.items()
                if name not in ("head_dim", "output_bias", "mlp_bias")
            },
            "norm_eps": "layer_norm_eps",
            "qkv_bias": "use_qkv_bias",
        },
        divides_hidden=False,
        partial_rotary=True,
        norm="LayerNorm",
        block=f"{__name__}:LayerNormBlock",
    ),
}
NEW_CASES: dict[str, dict[str, Any]] = {
    "seed_oss": {"head_dim": 20, "residual_dropout": 0.0, "attention_dropout": 0.0},
    "stablelm": {"use_qkv_bias": True, "layer_norm_eps": 1e-2},
}


@pytest.fixture(params=NEW_FAMILIES)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setitem(FAMILIES, name, NEW_FAMILIES[name])
    monkeypatch.setitem(CASES, name, _SIZES | {"model_type": name} | NEW_CASES[name])
    return name


def _kept(rows: int, units: int, count: int) -> Tensor:
    """Mid-range masks [rows, units] of `count` random units in each row, zeros elsewhere."""
    order = torch.rand(rows, units).argsort(-1)
    return torch.where(order < count, 0.2 + 0.75 * torch.rand(rows, units), 0.0)


def test_a_new_family_is_one_row(family: str, tmp_path: Path) -> None:
    """Its config is read; logits are transformers'; masked, extracted and reloaded models agree."""
    model, reference = pair(family)
    config = model.config
    assert ModelConfig.from_hf(config.to_hf().to_dict()).traits is NEW_FAMILIES[family]
    ids = torch.randint(0, 61, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, rtol=1e-5, atol=1e-5)
        masks = random_masks(0)
        compact = model(ids, masks.compact(config, multiple=4))
        torch.testing.assert_close(compact, model(ids, masks), rtol=1e-5, atol=1e-5)

        torch.manual_seed(0)
        masks = Masks(
            hidden=_kept(1, 48, 32)[0],
            layer=_kept(1, 3, 2)[0],
            head=_kept(6, 3, 2).view(3, 6),
            intermediate=_kept(3, 80, 50),
        )
        extraction = Extraction(config, masks)
        folder = tmp_path / "model"
        saved = save_model(extraction.config, extraction.tensors(model.named_parameters()), folder)
        assert (saved.hidden_size, saved.num_heads, saved.num_kv_heads) == (32, 4, 2)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = model(ids, masks)
        for logits in (load_model(folder)(ids), again(ids).logits):
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_option_is_refused_with_the_families_that_have_it() -> None:
    config = ModelConfig.from_hf(CASES["llama"])
    for change, message in (
        ({"sliding_window": 9}, r"llama .*sliding_window=9; use family mistral$"),
        ({"qk_norm": True}, r"llama .*qk_norm=True; use family qwen3$"),
        ({"activation": "relu"}, r"llama .*activation='relu'; no known family can"),
        ({"qkv_bias": True}, r"qkv_bias=True and output_bias=False: attention_bias states both"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(config, **change).to_hf()


@pytest.mark.parametrize("name", CASES)
def test_rows_describe_their_blocks(name: str) -> None:
    config = ModelConfig.from_hf(CASES[name])
    traits, fields = config.traits, {field.name for field in dataclasses.fields(ModelConfig)}
    assert traits.keys.keys() | traits.fixed.keys() <= fields
    assert not traits.keys.keys() & traits.fixed.keys()
    with torch.device("meta"):
        model = CausalLM(config)
    norms = getattr(layers, traits.norm)
    assert isinstance(model.get_submodule(traits.names.final_norm), norms)
    for block in model.blocks:
        owners = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
        assert owners <= traits.names.modules.keys()
        for module in owners:
            streamed = traits.names.modules[module] is Role.NORM
            assert not streamed or isinstance(block.get_submodule(module), norms)
