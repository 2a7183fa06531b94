"""Refitting brings the pruned model's stream closer to the source's, and leaves alone what fits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pruner.extract import Extraction
from pruner.refit import refit
from pruner.shapes import Shape, shape_of
from pruner.units import measured_sizes, to_masks
from tests.distributed import run_ranks
from tests.pruner.test_extract import BASE, MODELS, NEOX_MODELS
from trainer import parallel
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.masks import Masks

CASES = {name: BASE | values for name, values in MODELS.items()} | NEOX_MODELS


def build(name: str) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_hf(CASES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model


def half_masks(shape: Shape, *, layers: tuple[int, ...] = (0, 2)) -> Masks:
    """Keeps a random half of the units of each kind and the named blocks."""
    draw = torch.Generator().manual_seed(1)
    z = {}
    for name, (rows, units) in measured_sizes(shape).items():
        keep = max(1, units // 2)
        z[name] = torch.zeros(rows, units)
        for row in z[name]:
            row[torch.randperm(units, generator=draw)[:keep]] = 1.0
    z["layer"] = torch.zeros(1, shape.layers)
    z["layer"][0, list(layers)] = 1.0
    return to_masks(z, shape, hold_scale=True)


def tokens(number: int = 24) -> Tensor:
    return torch.randint(0, 53, (number, 16), generator=torch.Generator().manual_seed(2))


def stream_error(model: CausalLM, pruned: dict[str, Tensor], extraction: Extraction) -> float:
    """Relative distance of the last stream from the source's in the kept dimensions."""
    student = CausalLM(extraction.config)
    student.load_state_dict(pruned)
    found: list[Tensor] = []
    for network in (model, student):
        final = network.get_submodule(network.names.final_norm)
        handle = final.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        with torch.no_grad():
            network(tokens(440)[400:])
        handle.remove()
    wanted = found[0]
    if extraction.stream.units is not None:
        wanted = wanted[..., extraction.stream.units]
    return float((found[1] - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", CASES)
def test_the_stream_comes_closer(name: str) -> None:
    model = build(name)
    extraction = Extraction(model.config, half_masks(shape_of(model.config)))
    source = [(key, value.detach()) for key, value in model.named_parameters()]
    plain = dict(extraction.tensors(source))
    fitted = dict(refit(extraction, source, tokens(400), ridge=0.01, batch=90, context=alone()))
    assert fitted.keys() == plain.keys()
    assert all(fitted[key].shape == plain[key].shape for key in plain)
    before, after = (stream_error(model, tensors, extraction) for tensors in (plain, fitted))
    assert after < 0.9 * before


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gone", ["attention", "feed_forward", "both"])
def test_layers_may_be_gone(name: str, gone: str) -> None:
    """A whole block too, and the layers on either side of it."""
    model = build(name)
    rows = {
        "attention": torch.tensor([1.0, 0.0, float(gone == "feed_forward")]),
        "feed_forward": torch.tensor([float(gone == "attention"), 0.0, 1.0]),
    }
    masks = half_masks(shape_of(model.config), layers=(0, 1, 2))
    masks = masks.with_tensors(masks.tensors() | rows)
    extraction = Extraction(model.config, masks)
    assert extraction.config.layer_sizes is not None and extraction.config.num_layers == 2
    source = [(key, value.detach()) for key, value in model.named_parameters()]
    plain = dict(extraction.tensors(source))
    options: dict[str, Any] = {"ridge": 0.01, "batch": 90, "context": alone()}
    fitted = dict(refit(extraction, source, tokens(400), **options))
    assert fitted.keys() == plain.keys()
    before, after = (stream_error(model, tensors, extraction) for tensors in (plain, fitted))
    assert after < 0.95 * before


def test_a_writer_makes_up_for_the_layers_behind_it() -> None:
    """Layers that add nothing else than what the one in front can add are not missed."""
    model = build("llama")
    with torch.no_grad():
        for index, kind in ((0, "mlp.down_proj"), (1, "self_attn.o_proj")):
            model.blocks[index].get_submodule(kind).get_parameter("weight").zero_()
    rows = {
        "attention": torch.tensor([1.0, 0.0, 1.0]),
        "feed_forward": torch.tensor([0.0, 1.0, 1.0]),
    }
    extraction = Extraction(model.config, Masks.of(rows))
    source = [(key, value.detach()) for key, value in model.named_parameters()]
    plain = dict(extraction.tensors(source))
    fitted = dict(refit(extraction, source, tokens(), ridge=0.1, batch=7, context=alone()))
    for key, value in plain.items():
        torch.testing.assert_close(fitted[key], value, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "pythia"])
def test_what_lost_nothing_stays(name: str) -> None:
    """Blocks that change nothing are removed, so that the weights fit already."""
    model = build(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".1." in key and ("o_proj" in key or "down_proj" in key or "dense" in key):
                parameter.zero_()
    ones = {key: torch.ones(size) for key, size in measured_sizes(shape_of(model.config)).items()}
    ones["layer"][0, 1] = 0.0
    extraction = Extraction(model.config, to_masks(ones, shape_of(model.config)))
    source = [(key, value.detach()) for key, value in model.named_parameters()]
    plain = dict(extraction.tensors(source))
    fitted = dict(refit(extraction, source, tokens(), ridge=0.1, batch=7, context=alone()))
    for key, value in plain.items():
        torch.testing.assert_close(fitted[key], value, atol=2e-5, rtol=2e-5)


def test_bf16_fits_as_well() -> None:
    """Blocks in bf16; what is not changed keeps all its digits."""
    model = build("llama-biases")
    extraction = Extraction(model.config, half_masks(shape_of(model.config)))
    source = [(key, value.detach()) for key, value in model.named_parameters()]
    plain = dict(extraction.tensors(source))
    exact: dict[str, Tensor] = {}
    rounded: dict[str, Tensor] = {}
    for found, dtype in ((exact, torch.float32), (rounded, torch.bfloat16)):
        options = {"ridge": 0.01, "batch": 90, "context": alone(), "dtype": dtype}
        found.update(refit(extraction, source, tokens(400), **options))
    errors = [stream_error(model, tensors, extraction) for tensors in (plain, exact, rounded)]
    assert errors[2] < errors[1] + 0.05 * (errors[0] - errors[1])
    for key in plain:
        assert rounded[key].dtype == torch.float32
        if "norm" in key:
            assert torch.equal(rounded[key], plain[key])


def test_ranks_share_the_sequences(tmp_path: Path) -> None:
    expected = fitted_on(1, tmp_path)
    found = fitted_on(2, tmp_path)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)


def fitted_on(world: int, folder: Path) -> dict[str, Tensor]:
    path = folder / f"{world}.pt"
    run_ranks(_fit_own_share, world, path)
    found: dict[str, Tensor] = torch.load(path)
    return found


def _fit_own_share(path: Path) -> None:
    context = parallel.init(threads=1)
    model = build("llama")
    extraction = Extraction(model.config, half_masks(shape_of(model.config)))
    source = [(key, value.detach()) for key, value in model.named_parameters()]
    own = tokens()[context.rank :: context.world]
    found = dict(refit(extraction, source, own, ridge=0.1, batch=4, context=context))
    if context.is_main:
        torch.save(found, path)


def alone() -> Any:
    return parallel.init(threads=1)


def test_the_source_stays_as_it_is() -> None:
    """Also where blocks are kept whole, whose tensors are the source's own until they change."""
    model = build("llama")
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    shape = shape_of(model.config)
    masks = to_masks({"layer": torch.tensor([[1.0, 0.0, 1.0]])}, shape)
    source = [(name, tensor.detach()) for name, tensor in model.named_parameters()]
    extraction = Extraction(model.config, masks)
    fitted = dict(refit(extraction, source, tokens(), ridge=0.1, batch=7, context=alone()))
    changed = [name for name in fitted if "layers.0." in name and "proj" in name]
    assert any(not torch.equal(fitted[name], before[name]) for name in changed)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]), name
