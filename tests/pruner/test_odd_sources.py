"""Sources and options that are odd but legal end in a model that plain transformers loads."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pruner.run import shear
from tests.factories import write_model
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
