"""Models whose blocks differ in size: in transformers with the file that goes along, and refused
where they are none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import InputError
from tests.factories import write_tokenizer
from tests.pruner.test_extract import MODELS, NEOX_MODELS, random_model
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import init_weights, load_config, load_model, save_model
from trainer.models.layer_sizes import LayerSizes

SIZES = (LayerSizes(0, 0, 20), LayerSizes(6, 3, 7), LayerSizes(6, 3, 0))
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, trusted = sys.argv[1], sys.argv[2] == "trusted"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted, dtype=torch.float32)
assert not [name for name in sys.modules if name.startswith("trainer.")]
ids = torch.arange(1, 12)[None]
with torch.no_grad():
    logits = model.eval()(ids).logits
cached, plain = (
    model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=own) for own in (True, False)
)
assert torch.equal(cached, plain), (cached, plain)
model.save_pretrained(sys.argv[3])
torch.save(logits, sys.argv[4])
"""


def uneven(**options: Any) -> CausalLM:
    """A random one of SIZES."""
    config = random_model(**options).config
    group = config.num_heads // config.num_kv_heads
    sizes = [LayerSizes(s.num_heads, s.num_heads // group, s.intermediate_size) for s in SIZES]
    values = json.loads(config.to_hf().to_json_string())
    model = CausalLM(ModelConfig(**fields_of(ModelConfig.from_hf(values), tuple(sizes))))
    init_weights(model, std=0.4)
    return model.eval()


def fields_of(config: ModelConfig, sizes: tuple[LayerSizes, ...]) -> dict[str, Any]:
    names = ModelConfig.__dataclass_fields__
    return {name: getattr(config, name) for name in names} | {"layer_sizes": sizes}


def save(model: CausalLM, path: Path) -> None:
    pairs = {name: tensor.detach() for name, tensor in model.named_parameters()}
    save_model(model.config, pairs, path)


@pytest.mark.parametrize("name", ["qwen3", "pythia"])
def test_other_programs_load_it_with_its_own_file(name: str, tmp_path: Path) -> None:
    model = uneven(**(MODELS | NEOX_MODELS)[name])
    folder, again, found = tmp_path / "model", tmp_path / "again", tmp_path / "logits.pt"
    save(model, folder)
    command = [sys.executable, "-c", PLAIN, str(folder), "trusted", str(again), str(found)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
    with torch.no_grad():
        expected = model(torch.arange(1, 12)[None])
    torch.testing.assert_close(torch.load(found), expected, rtol=1e-5, atol=1e-5)
    # What transformers saves of it is the same model.
    assert load_config(again).layer_sizes == model.config.layer_sizes
    with torch.no_grad():
        assert torch.equal(load_model(again).eval()(torch.arange(1, 12)[None]), expected)


def test_nothing_runs_that_was_not_trusted(tmp_path: Path) -> None:
    save(uneven(**MODELS["llama"]), tmp_path / "model")
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "model"), "not"]
    run = subprocess.run(
        command, cwd=tmp_path, timeout=300, capture_output=True, text=True, input="n\n", check=False
    )
    assert run.returncode
    assert "trust_remote_code" in run.stderr


def test_sizes_of_even_blocks_are_none() -> None:
    config = random_model(**MODELS["llama"]).config
    even = ModelConfig(**fields_of(config, (LayerSizes(6, 3, 20),) * 3))
    assert even.layer_sizes is None
    assert even == config


def test_counts_are_those_of_the_weights() -> None:
    for options in (*MODELS.values(), *NEOX_MODELS.values()):
        model = uneven(**options)
        counted = sum(parameter.numel() for parameter in model.parameters())
        assert model.config.num_parameters() == counted
        heads = sum(sizes.num_heads for sizes in model.config.blocks)
        assert heads == 12
        matrices = sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if parameter.ndim == 2 and name.startswith(model.names.blocks)
        )
        vocabulary = model.config.vocab_size * model.config.hidden_size
        width = heads * model.config.head_dim
        expected = 6 * (matrices + vocabulary) + 12 * width * 5
        assert model.config.flops_per_token(5, causal=False) == expected


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (SIZES[:2], "lists 2 blocks, and the model has 3"),
        ((LayerSizes(0, 0, 0), *SIZES[1:]), "block 0 has 0 heads, 0 KV heads and 0 channels"),
        ((LayerSizes(4, 3, 20), *SIZES[1:]), "4 heads, no multiple of its 3 KV heads"),
        ((LayerSizes(6, 0, 20), *SIZES[1:]), "block 0 has 6 heads, 0 KV heads"),
        ((LayerSizes(0, 0, 20),) * 3, "no block has attention"),
        ((LayerSizes(6, 3, 19), *SIZES[1:]), "has 6, 3, 19 at most, and the config says 6, 3, 20"),
        ((LayerSizes(-6, -3, 20), *SIZES[1:]), "block 0 has -6 heads"),
    ],
)
def test_impossible_sizes_are_refused(sizes: tuple[LayerSizes, ...], words: str) -> None:
    config = random_model(**MODELS["llama"]).config
    with pytest.raises(InputError, match=words):
        ModelConfig(**fields_of(config, sizes))


@pytest.mark.parametrize("found", [None, 3, [], [{}], [{"num_attention_heads": 6}], ["6"]])
def test_configs_without_usable_sizes_are_refused(found: Any, tmp_path: Path) -> None:
    save(uneven(**MODELS["llama"]), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    values["layer_sizes"] = found
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"config.json: `layer_sizes` is missing or not a list"):
        load_config(tmp_path / "model")


def test_a_family_of_no_kind_is_named() -> None:
    with pytest.raises(InputError, match="model family 'gpt2' is not supported"):
        ModelConfig.from_hf(
            {"model_type": "gpt2_uneven", "layer_sizes": [dict(zip(KEYS, (6, 3, 20), strict=True))]}
        )


KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def test_its_tokenizer_is_read_without_a_warning(tmp_path: Path) -> None:
    """Though nothing has loaded its class yet."""
    write_tokenizer(tmp_path / "model")
    save(uneven(**MODELS["llama"]), tmp_path / "other")
    for file in (tmp_path / "other").iterdir():
        file.rename(tmp_path / "model" / file.name)
    code = "import sys; from pathlib import Path; from data.tokenizers import load_tokenizer\n"
    code += "load_tokenizer(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    run = subprocess.run(command, timeout=300, capture_output=True, text=True, check=True)
    assert run.stdout + run.stderr == ""
