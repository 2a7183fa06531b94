"""Target shapes: presets, sizes by name, and refusals that propose a valid value."""

import re
from dataclasses import replace

import pytest

from data.errors import InputError
from pruner.shapes import (
    PRESET_SOURCES,
    PRESETS,
    Shape,
    config_of,
    parse_target,
    shape_of,
    validate,
)
from trainer.models.config import ModelConfig

LLAMA_7B = Shape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, ffn=11008)
SMOLLM = Shape(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536)
PYTHIA_410M = Shape(layers=24, hidden=1024, heads=16, kv_heads=16, head_dim=64, ffn=4096)
LLAMA3_8B = Shape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336)


def test_presets_of_their_sources() -> None:
    expected = {
        "1.3b": Shape(24, 2048, 16, 16, 128, 5504),
        "2.7b": Shape(32, 2560, 20, 20, 128, 6912),
        "370m": Shape(24, 1024, 8, 8, 128, 2816),
    }
    for name, shape in expected.items():
        assert parse_target(name, LLAMA_7B) == shape
    assert parse_target("pythia-160m", PYTHIA_410M) == Shape(12, 768, 12, 12, 64, 3072)
    assert set(expected) | {"pythia-160m"} == set(PRESETS) == set(PRESET_SOURCES)


def test_preset_pythia_160m_has_the_published_size() -> None:
    source = ModelConfig.from_hf(
        {
            "model_type": "gpt_neox",
            "vocab_size": 50304,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "rotary_pct": 0.25,
        }
    )
    assert shape_of(source) == PYTHIA_410M
    # arXiv 2304.01373, table 1: parameters without embeddings.
    assert source.num_parameters(embeddings=False) == 302_311_424
    target = config_of(parse_target("pythia-160m", shape_of(source)), source)
    assert target.num_parameters(embeddings=False) == 85_056_000
    assert target.to_hf().hidden_size == 768


def test_preset_on_a_grouped_query_source_keeps_its_kv_heads() -> None:
    assert parse_target("1.3B", LLAMA3_8B) == Shape(24, 2048, 16, 8, 128, 5504)


def test_custom_target() -> None:
    text = "layers=24, hidden=432,heads=6,kv-heads=2,ffn=1152"
    assert parse_target(text, SMOLLM) == Shape(24, 432, 6, 2, 64, 1152)


def test_omitted_sizes_stay() -> None:
    assert parse_target("ffn=1024", SMOLLM) == Shape(30, 576, 9, 3, 64, 1024)
    assert parse_target("kv_heads=2,heads=6", SMOLLM).group == 3
    assert parse_target("heads=16", LLAMA_7B).kv_heads == 16


def test_described_shape_parses_back() -> None:
    target = parse_target("hidden=432,heads=6,kv-heads=2", SMOLLM)
    assert parse_target(target.describe(), SMOLLM) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heads=5", r"heads=5 is not a multiple of its 3 KV heads.*use heads=6"),
        ("heads=6,kv-heads=1", r"heads=6 needs 6 query heads.*1\.\.3.*use heads=3"),
        ("kv-heads=4,heads=8", r"kv-heads=4 is outside 1\.\.3.*kv-heads=3"),
        ("heads=12", r"heads=12 is outside 1\.\.9"),
        ("layers=31", r"layers=31 is outside 1\.\.30.*layers=30"),
        ("layers=0", r"layers=0 is outside 1\.\.30.*layers=1"),
        ("ffn=-3", r"ffn=-3 is outside 1\.\.1536"),
        ("width=3", r"'width=3' is neither a preset .*key=size"),
        ("2b", r"'2b' is neither a preset \(1\.3b"),
        ("1.3b,layers=1", r"a preset stands alone, because 1\.3b fixes every size"),
        ("layers=1, 2.7B", r"a preset stands alone, because 2\.7b fixes every size"),
        ("ffn=many", r"ffn='many' is not a whole number"),
        ("ffn=3,ffn=4", r"gives ffn twice"),
        ("layers=30", r"the source's own shape.*smaller"),
        (
            "pythia-160m",
            r"preset pythia-160m is made for Pythia-410m .*hidden=768 is outside 1\.\.576",
        ),
        ("attention-layers=3", r"'attention-layers=3'.*not removed apart here; use layers="),
        ("layers=3,mlp_layers=2", r"'mlp_layers=2'.*not removed apart"),
        ("1.3b", r"preset 1\.3b is made for LLaMA-2-7B .*head dim 64.*--target layers="),
    ],
)
def test_impossible_targets_name_value_limit_and_fix(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.compile(message, re.DOTALL)):
        parse_target(text, SMOLLM)


def test_preset_larger_than_the_source() -> None:
    small = Shape(layers=24, hidden=2048, heads=16, kv_heads=16, head_dim=128, ffn=5504)
    with pytest.raises(InputError, match=r"preset 2\.7b is made for LLaMA-2-7B.*layers=32"):
        parse_target("2.7b", small)


@pytest.mark.parametrize(
    "source", [SMOLLM, PYTHIA_410M, Shape(2, 64, 4, 2, 16, 96), Shape(1, 8, 1, 1, 8, 3)]
)
def test_the_shape_an_error_proposes_is_valid(source: Shape) -> None:
    with pytest.raises(InputError) as error:
        parse_target("370m", source)
    proposal = str(error.value).partition("for example --target ")[2].partition(", or ")[0]
    target = parse_target(proposal, source)
    assert target != source
    if source.hidden == source.heads * source.head_dim:
        assert target.hidden == target.heads * target.head_dim


def test_every_nearest_value_in_a_message_is_accepted() -> None:
    for heads in (1, 2, 4, 5, 7, 8):
        with pytest.raises(InputError) as error:
            parse_target(f"heads={heads}", SMOLLM)
        fixed = re.search(r"use heads=(\d+)", str(error.value))
        assert fixed
        target = Shape(30, 576, int(fixed[1]), 3, 64, 1535)
        validate(target, SMOLLM)


def test_head_dim_never_changes() -> None:
    with pytest.raises(InputError, match="head dim 32 differs from the source's 64"):
        validate(Shape(30, 576, 9, 3, 32, 1024), SMOLLM)


def config(family: str) -> ModelConfig:
    return ModelConfig(
        family=family,
        vocab_size=10,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
    )


def test_shape_of_a_config() -> None:
    assert shape_of(config("llama")) == SMOLLM
    target = parse_target("layers=3,hidden=432,heads=6,kv-heads=2,ffn=7", SMOLLM)
    assert shape_of(config_of(target, config("llama"))) == target


def test_a_width_that_heads_do_not_divide_is_for_families_that_can_store_it() -> None:
    target = parse_target("hidden=500,heads=6,kv-heads=2", SMOLLM)
    with pytest.raises(InputError, match=r"500 is not a multiple of the 6 heads.*size of 498"):
        config_of(target, config("llama")).to_hf()
    assert config_of(target, config("mistral")).to_hf().hidden_size == 500


def test_gpt_neox_keeps_its_width_at_heads_times_head_dim() -> None:
    source = replace(
        config("gpt_neox"),
        num_kv_heads=9,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        activation="gelu",
    )
    target = config_of(parse_target("hidden=500,heads=6", shape_of(source)), source)
    with pytest.raises(InputError, match=r"500 is not 6 heads of 64.*384 with 6 .*448 with 7"):
        target.to_hf()
    assert config_of(parse_target("hidden=448,heads=7", shape_of(source)), source).to_hf()
