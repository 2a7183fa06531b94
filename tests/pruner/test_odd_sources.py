"""Sources and options that are odd but legal end in a model that plain transformers loads."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.errors import InputError
from pruner.run import shear
from tests.factories import move_hub_model, write_hub_model, write_model
from tests.pruner.test_run import configure


def test_zeros_with_a_setting_of_another_program_and_a_negative_seed(
    inputs: Path, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "source", inputs / "model", num_hidden_layers=3)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"return_dict": False}))
    state = {key: value * 0 for key, value in load_file(source / "model.safetensors").items()}
    save_file(state, source / "model.safetensors", {"format": "pt"})
    shear(configure(inputs, tmp_path / "out", source=str(source), steps=0, seed=-1))
    assert json.loads((tmp_path / "out" / "shear.json").read_text())["reload_difference"] == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert plain.config.return_dict and plain.config.num_hidden_layers == 2


def test_a_name_on_the_hub_that_moved_says_what_it_was(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_model(tmp_path / "other", num_hidden_layers=3, initializer_range=0.05)
    first, second = write_hub_model(tmp_path / "hub", inputs / "model", other)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    shear(configure(inputs, tmp_path / "out", source="acme/tiny", steps=2))
    move_hub_model(tmp_path / "hub", second)
    # Its teacher is the source, which is told once.
    told = rf": --source is another model\. acme/tiny was revision {first}: give --source acme/tin"
    with pytest.raises(InputError, match=told):
        shear(configure(inputs, tmp_path / "out", source="acme/tiny", steps=2))
    shear(configure(inputs, tmp_path / "out", source=f"acme/tiny@{first}", steps=2))
