"""Shearing and training of families other than the Llama of the other tests, from start to end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.errors import InputError
from pruner.run import open_inputs, shear
from tests.factories import write_model, write_tokenizer, write_tokens
from tests.pruner.test_run import configure
from tests.trainer.tiny import pretrain
from trainer.models.hf import load_config


def write_pythia(path: Path) -> Path:
    """A folder like write_model's of the GPT-NeoX family."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=3,
    )
    GPTNeoXForCausalLM(config).save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model and a token folder of two domains."""
    root = tmp_path_factory.mktemp("inputs")
    write_tokens(root / "tokens", write_pythia(root / "model"), number=40)
    return root


def test_gpt_neox_is_sheared_and_trained_on(inputs: Path, tmp_path: Path) -> None:
    config = configure(inputs, tmp_path / "out")
    with pytest.raises(InputError, match="hidden size 24 is not 2 heads of 8"):
        shear(replace(config, target="layers=2,hidden=24,heads=2"))
    shear(replace(config, target="layers=2,hidden=16,heads=2,ffn=20"))
    report = json.loads((tmp_path / "out" / "shear.json").read_text())
    assert report["reload_difference"] <= 1e-5 and report["polarised"]
    model = load_config(tmp_path / "out" / "model")
    assert (model.family, model.num_layers, model.hidden_size) == ("gpt_neox", 2, 16)
    continued = pretrain(
        config.train,
        model=tmp_path / "out",
        data=inputs / "tokens",
        output=tmp_path / "cpt",
    )
    assert continued is not None
    assert load_config(tmp_path / "cpt" / "model").num_parameters() == model.num_parameters()


def test_a_source_whose_head_is_missing_is_refused_before_it_loads(
    inputs: Path, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('embeddings": true', 'embeddings": false'))
    config = configure(inputs, tmp_path / "out", source=str(folder))
    with pytest.raises(InputError, match=r"no lm_head\.weight.*tie_word_embeddings to true"):
        open_inputs(replace(config, target="ffn=20"))
