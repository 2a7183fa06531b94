"""Model configs survive transformers' form, and what it cannot express is refused."""

from typing import Any

import pytest
import torch

from data.errors import InputError
from tests.trainer.models.cases import CASES
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM

_SIZES: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 32,
    "head_dim": 128,
}


@pytest.mark.parametrize("name", CASES)
def test_config_survives_the_round_trip_through_transformers(name: str) -> None:
    config = ModelConfig.from_hf(CASES[name])
    again = ModelConfig.from_hf(config.to_hf().to_dict())
    for field in ModelConfig.__slots__:
        if field not in ("hf", "rope_scaling"):
            assert getattr(again, field) == getattr(config, field), field
    for key in ("rope_type", "factor"):
        assert (again.rope_scaling or {}).get(key) == (config.rope_scaling or {}).get(key)


def test_reading_leaves_the_given_dictionary_alone() -> None:
    values = {**CASES["llama-linear-rope"], "rope_scaling": {"type": "linear", "factor": 4.0}}
    ModelConfig.from_hf(values)
    assert values["rope_scaling"] == {"type": "linear", "factor": 4.0}


def test_keys_of_other_families_are_ignored_as_in_transformers() -> None:
    stray = {"attention_bias": True, "mlp_bias": True, "use_parallel_residual": True}
    config = ModelConfig.from_hf(CASES["mistral"] | stray)
    assert not (config.qkv_bias or config.output_bias or config.mlp_bias)
    assert not (stray.keys() & config.to_hf().to_dict().keys())


def test_special_tokens_and_extras_reach_the_written_config() -> None:
    config = ModelConfig.from_hf({**CASES["llama"], "bos_token_id": 7, "eos_token_id": [8, 9]})
    written = config.to_hf()
    assert (written.bos_token_id, written.eos_token_id) == (7, [8, 9])
    assert written.architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name", CASES)
def test_num_parameters_counts_the_model(name: str) -> None:
    config = ModelConfig.from_hf(CASES[name])
    with torch.device("meta"):
        parameters = dict(CausalLM(config).named_parameters())
    assert config.num_parameters() == sum(p.numel() for p in parameters.values())
    inner = [p.numel() for n, p in parameters.items() if "embed" not in n and "lm_head" not in n]
    assert config.num_parameters(embeddings=False) == sum(inner)


def test_sizes_and_flops_of_llama_2_7b() -> None:
    config = ModelConfig(family="llama", **_SIZES)
    assert config.num_parameters() == 6_738_415_616
    # Measured with torch's FLOP counter at 4096 tokens: 46.08 GF per token, 42.87 causal.
    assert config.flops_per_token(4096, causal=False) == pytest.approx(46.08e9, rel=1e-3)
    assert config.flops_per_token(4096, causal=True) == pytest.approx(42.87e9, rel=1e-3)


def test_sizes_and_flops_of_pythia_410m() -> None:
    config = ModelConfig.from_hf(
        {
            "model_type": "gpt_neox",
            "vocab_size": 50304,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "use_parallel_residual": True,
            "max_position_embeddings": 2048,
        }
    )
    assert (config.rotary_dim, config.rope_theta, config.parallel_residual) == (16, 10_000.0, True)
    assert config.num_parameters() == 405_334_016  # arXiv 2304.01373, table 1
    weights = 24 * (4 + 2 * 4) * 1024**2 + 50304 * 1024
    assert config.flops_per_token(2048, causal=False) == 6 * weights + 12 * 24 * 1024 * 2048


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, r"'relu' is not supported in gpt_neox; only 'gelu', 'gelu_new'"),
        ({"head_dim": 16}, r"head_dim 16 in a gpt_neox config .*remove the key"),
        ({"rotary_pct": 0.4}, r"head_dim is 8, of which .* rotates 3; it needs an even number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"hidden_size": 50}, "not divisible by the number of attention heads"),
    ],
)
def test_unsupported_gpt_neox_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig.from_hf({**CASES["gpt_neox"], **change})


def test_what_only_gpt_neox_can_express_is_refused_elsewhere() -> None:
    sizes = {**_SIZES, "num_heads": 8, "num_kv_heads": 8}
    for change in ({"rotary_fraction": 0.5}, {"parallel_residual": True}, {"activation": "gelu"}):
        with pytest.raises(InputError, match="use family gpt_neox"):
            ModelConfig(family="mistral", **sizes, **change).to_hf()
    options: dict[str, Any] = {
        "activation": "gelu",
        "mlp_bias": True,
        "qkv_bias": True,
        "output_bias": True,
    }
    sizes |= {"head_dim": 512}
    assert ModelConfig(family="gpt_neox", **sizes, **options).to_hf().rope_parameters is not None
    with pytest.raises(InputError, match="4 KV heads for 8"):
        ModelConfig(family="gpt_neox", **{**sizes, "num_kv_heads": 4}, **options).to_hf()
    with pytest.raises(InputError, match=r"4096 is not 4 heads of 512.*2048 with 4 .*4096 with 8"):
        small = {**sizes, "num_heads": 4, "num_kv_heads": 4}
        ModelConfig(family="gpt_neox", **small, **options).to_hf()
    with pytest.raises(InputError, match="cannot express mlp_bias=False"):
        ModelConfig(family="gpt_neox", **sizes, **{**options, "mlp_bias": False}).to_hf()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": 50}, "50"),
        ({"num_key_value_heads": 4}, "num_kv_heads 4"),
    ],
)
def test_unsupported_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig.from_hf({**CASES["llama"], **change})


def test_shapes_that_transformers_cannot_express_are_refused() -> None:
    config = ModelConfig(family="llama", **{**_SIZES, "hidden_size": 4100})
    with pytest.raises(InputError, match=r"4100.*4096"):
        config.to_hf()
    with pytest.raises(InputError, match="mlp_bias"):
        ModelConfig(family="mistral", mlp_bias=True, **_SIZES).to_hf()
    with pytest.raises(InputError, match="head_dim is 3"):
        ModelConfig(family="llama", **{**_SIZES, "head_dim": 3})


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["auto", "torch.bfloat16", "bf16", 16, ["float16"]])
def test_a_dtype_that_does_not_exist_is_named(key: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^{key} is .*which names no dtype.*bfloat16"):
        ModelConfig.from_hf({**CASES["llama"], key: value})


@pytest.mark.parametrize("value", [None, "float64", "float8_e4m3fn", {"text_config": "float16"}])
def test_a_dtype_of_pytorch_is_taken(value: object) -> None:
    assert ModelConfig.from_hf({**CASES["llama"], "torch_dtype": value}).hidden_size == 48


def test_settings_of_a_program_that_ran_the_model_are_left_out() -> None:
    settings = {
        "return_dict": False,
        "attn_implementation": "flash_attention_2",
        # transformers 4 would not tie the head, and fail, in that order.
        "torchscript": True,
        "pruned_heads": {"0": [1]},
        # Both would take the model for a quantized one.
        "quantization_config": {},
    }
    written = ModelConfig.from_hf({**CASES["llama"], **settings}).to_hf()
    assert written.return_dict
    assert not settings.keys() & written.to_diff_dict().keys()
    assert written._attn_implementation != "flash_attention_2"


def test_keys_tell_what_computes_apart() -> None:
    """Not by what only travels along, such as ids of special tokens."""
    values: dict[str, Any] = {"model_type": "llama", "vocab_size": 53, "hidden_size": 24}
    values |= {"num_attention_heads": 3, "num_hidden_layers": 2}
    first = ModelConfig.from_hf(values)
    assert first.key == ModelConfig.from_hf(values | {"bos_token_id": 5}).key
    changes = ({"rope_theta": 5e5}, {"rms_norm_eps": 1e-3}, {"tie_word_embeddings": True})
    assert len({first.key, *(ModelConfig.from_hf(values | change).key for change in changes)}) == 4
