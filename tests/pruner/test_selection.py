"""Units of another pruned model: found in a cut of any family, read from a run, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import InputError
from pruner.extract import Extraction
from pruner.run import shear
from pruner.selection import read_selection
from pruner.shapes import shape_of
from pruner.units import measured_sizes, to_masks, unit_kinds
from tests.factories import write_model
from tests.pruner.test_refit import CASES, build
from tests.pruner.test_run import configure
from tests.trainer.tiny import options, pretrain
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_config, load_model, save_tensors


def save(model: CausalLM, folder: Path) -> Path:
    folder.mkdir()
    model.config.to_hf().save_pretrained(folder)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    save_tensors(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("hold_scale", [True, False])
def test_what_a_cut_kept_is_found(name: str, hold_scale: bool, tmp_path: Path) -> None:
    source = build(name)
    shape = shape_of(source.config)
    z = random_half(source)
    masks = to_masks(z, shape, hold_scale=hold_scale)
    extraction = Extraction(source.config, masks)
    cut = CausalLM(extraction.config)
    pairs = [(key, value.detach()) for key, value in source.named_parameters()]
    cut.load_state_dict(dict(extraction.tensors(pairs)))
    folders = save(source, tmp_path / "source"), save(cut, tmp_path / "cut")
    found = read_selection(str(folders[1]), folders[0], load_config(folders[0]))
    assert found.shape == shape_of(cut.config) and found.rotation is None
    own = {kind: values.float() for kind, values in found.z.items()}
    again = Extraction(source.config, to_masks(own, shape, hold_scale=hold_scale))
    for key, value in again.tensors(pairs):
        assert torch.equal(value, cut.get_parameter(key)), key
    for kind in unit_kinds(found.shape, shape).values():
        assert bool((found.z[kind.name].sum(1) == kind.target).all()), kind.name


def random_half(source: CausalLM) -> dict[str, Tensor]:
    """Half of the units of each kind and two blocks, 1 or 0."""
    shape = shape_of(source.config)
    draw = torch.Generator().manual_seed(1)
    z = {}
    for name, (rows, units) in measured_sizes(shape).items():
        z[name] = torch.zeros(rows, units)
        for row in z[name]:
            row[torch.randperm(units, generator=draw)[: max(1, units // 2)]] = 1.0
    z["layer"] = torch.tensor([[1.0, 0.0, 1.0]])
    return z


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cut_may_be_kept_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    source = build("llama")
    z = random_half(source)
    extraction = Extraction(source.config, to_masks(z, shape_of(source.config), hold_scale=False))
    cut = CausalLM(extraction.config)
    pairs = [(key, value.detach()) for key, value in source.named_parameters()]
    cut.load_state_dict(dict(extraction.tensors(pairs)))
    folders = save(source, tmp_path / "source"), save(cut.to(dtype), tmp_path / "cut")
    found = read_selection(str(folders[1]), folders[0], load_config(folders[0]))
    assert torch.equal(found.z["hidden"].float(), z["hidden"])
    assert torch.equal(found.z["layer"].float(), z["layer"])


def again(inputs: Path, output: Path, selection: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"steps": 0, "selection": str(selection), "target": "1.3b"}
    shear(configure(inputs, output, **options | changes))
    report: dict[str, Any] = json.loads((output / "shear.json").read_text())
    return report


def test_units_of_a_trained_run_are_cut_from_the_source(inputs: Path, tmp_path: Path) -> None:
    learned = tmp_path / "learned"
    shear(configure(inputs, learned, steps=8))
    report = again(inputs, tmp_path / "out", learned / "model")
    assert report["selection"]["from"] == str(learned / "model")
    assert report["refit"] is not None
    before, after = (load_file(run / "masks.safetensors") for run in (learned, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (
        report["target_shape"] == json.loads((learned / "shear.json").read_text())["target_shape"]
    )


def test_a_model_cut_elsewhere_is_refitted(inputs: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    flags: dict[str, Any] = {"steps": 0, "basis": "source", "norm_scale": "live", "refit": False}
    shear(configure(inputs, cut, **flags))
    elsewhere = tmp_path / "elsewhere"
    (cut / "model").rename(elsewhere)
    report = again(inputs, tmp_path / "out", elsewhere, norm_scale="live", refit=False)
    assert report["basis"] == "source" and report["selection"]["from"] == str(elsewhere)
    before = load_file(elsewhere / "model.safetensors")
    after = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert again(inputs, tmp_path / "refitted", elsewhere)["refit"] is not None
    with pytest.raises(InputError, match=r"--target layers=1: --selection .* keeps layers=2"):
        again(inputs, tmp_path / "other", elsewhere, target="layers=1")
    with pytest.raises(InputError, match=r"--basis principal: --selection .* of the basis source"):
        again(inputs, tmp_path / "other", elsewhere, basis="principal")
    with pytest.raises(InputError, match=r"--steps 3 would learn others; add --steps 0"):
        again(inputs, tmp_path / "other", elsewhere, steps=3)


def test_changed_weights_are_refused(inputs: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shear(configure(inputs, tmp_path / "cut", steps=0, basis="source", refit=False))
    (tmp_path / "cut" / "model").rename(elsewhere)
    tensors = load_file(elsewhere / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 1.1
    save_file(tensors, elsewhere / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"its block 1 are not .* trained or changed since it was"):
        again(inputs, tmp_path / "out", elsewhere)
    assert not (tmp_path / "out").exists()


def test_a_run_from_another_source_is_refused(inputs: Path, tmp_path: Path) -> None:
    shear(configure(inputs, tmp_path / "run", steps=0))
    other = write_model(tmp_path / "other", num_hidden_layers=3)
    model = load_model(other)
    with torch.no_grad():
        next(iter(model.parameters())).mul_(2)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    save_tensors(tensors, other / "model.safetensors")
    with pytest.raises(InputError, match=r"was cut from another model than --source"):
        read_selection(str(tmp_path / "run"), other, load_config(other))
    (tmp_path / "run" / "masks.safetensors").unlink()
    with pytest.raises(InputError, match=r"is a finished run, but its masks.safetensors is gone"):
        read_selection(str(tmp_path / "run"), other, load_config(other))
    with pytest.raises(InputError, match=r"nothing: is neither a finished run of shorn shear nor"):
        read_selection(str(tmp_path / "nothing"), other, load_config(other))
    with pytest.raises(InputError, match=r"nor a Hugging Face folder \(it is a folder of tokens"):
        read_selection(str(inputs / "tokens"), other, load_config(other))


def test_a_model_that_was_trained_on_names_the_run_before(inputs: Path, tmp_path: Path) -> None:
    shear(configure(inputs, tmp_path / "run", steps=0))
    pretrain(
        options(steps=1, seq_len=32),
        model=tmp_path / "run",
        data=inputs / "tokens",
        output=tmp_path / "cpt",
    )
    source = inputs / "model"
    for place in (tmp_path / "cpt", tmp_path / "cpt" / "model"):
        with pytest.raises(InputError, match=r"run of shorn cpt.*came from: .*/run/model$") as met:
            read_selection(str(place), source, load_config(source))
    named = str(met.value).rpartition(": ")[2]
    assert read_selection(named, source, load_config(source)).shape.layers == 2
    (tmp_path / "cpt" / "cpt.json").write_text("{}")
    with pytest.raises(InputError, match=r"kept; name a run of shorn shear$"):
        read_selection(str(tmp_path / "cpt"), source, load_config(source))


def test_a_model_that_keeps_everything_is_named(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--selection .*model: keeps all units of --source"):
        again(inputs, tmp_path / "out", inputs / "model")
