"""Widths that differ from layer to layer: the search finds better ones, as many channels in all."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.errors import InputError
from pruner.config import MaskConfig, RefitConfig, ShearConfig
from pruner.layer_widths import MOST_STEPS, moved
from pruner.run import shear
from pruner.shapes import shape_of
from tests.distributed import run_ranks
from tests.factories import write_model, write_tokens
from tests.pruner.shorten.test_run import report_of
from trainer.config import TrainConfig
from trainer.models.hf import load_config, load_model

TARGET = "layers=3,hidden=32,heads=4,kv-heads=2,ffn=24"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The feed-forward layer of block 1 is worth far more than the others'."""
    root = tmp_path_factory.mktemp("inputs")
    model = write_model(root / "model", num_hidden_layers=4, initializer_range=0.2)
    network = load_model(model)
    with torch.no_grad():
        for index, block in enumerate(network.blocks):
            weight = block.get_submodule("mlp.down_proj").get_parameter("weight")
            weight.mul_(3.0 if index == 1 else 0.05)
    from trainer.models.hf import save_model

    pairs = {name: tensor.detach() for name, tensor in network.named_parameters()}
    save_model(network.config, pairs, model, tokenizer_from=root / "model")
    write_tokens(root / "tokens", model, number=60)
    return root


def configure(inputs: Path, output: Path, **options: Any) -> ShearConfig:
    train = TrainConfig(
        steps=0,
        global_batch=2,
        micro_batch=1,
        seq_len=32,
        eval_sequences=2,
        precision="fp32",
        threads=1,
    )
    defaults: dict[str, Any] = {
        "source": str(inputs / "model"),
        "target": TARGET,
        "layer_widths": "free",
        "data": str(inputs / "tokens"),
        "output": str(output),
        "masks": MaskConfig(calibration_sequences=8),
        "refit": RefitConfig(refit_sequences=16, refit_held_out=8),
        "train": train,
    }
    return ShearConfig(**defaults | options)


def test_channels_move_to_where_they_count(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shear(configure(inputs, output))
    report = report_of(output)
    told = report["selection"]
    widths = {int(index): width for index, width in told["widths"].items()}
    assert sum(widths.values()) == 3 * 24 and told["search"] == "layer-widths"
    assert widths[1] == max(widths.values()) > 24
    assert told["divergence"]["after"] < told["divergence"]["before"]
    config = load_config(output / "model")
    assert [sizes.intermediate_size for sizes in config.blocks] == list(widths.values())
    source = load_config(inputs / "model")
    assert config.num_parameters() == report["parameters"]["target"]
    assert shape_of(config).ffn == 24 and report["polarised"]
    # As many as the uniform model has.
    shear(configure(inputs, tmp_path / "even", layer_widths="uniform"))
    even = load_config(tmp_path / "even" / "model")
    assert even.layer_sizes is None and even.num_parameters() == config.num_parameters()
    assert source.num_parameters() > config.num_parameters()
    masks = load_file(output / "masks.safetensors")
    kept = (masks["z.intermediate"] > 0).sum(-1).tolist()
    assert [kept[index] for index in widths] == list(widths.values())
    assert "kept.intermediate" not in masks and "kept.layer" in masks


def test_it_goes_on_from_what_it_knows(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    config = configure(inputs, output)
    with monkeypatch.context() as patch:
        patch.setattr("pruner.run.prune", None)
        with pytest.raises(TypeError):
            shear(config)
    monkeypatch.setattr("pruner.searches.WidthSearch", None)
    shear(config)
    first = report_of(output)
    shear(config)
    (output / "shear.json").unlink()
    shear(config)
    assert report_of(output)["selection"]["widths"] == first["selection"]["widths"]
    with pytest.raises(InputError, match=r"--layer-widths was 'free', now 'uniform'"):
        shear(replace(config, layer_widths="uniform"))
    # Nothing is searched of which a finished run has no use.
    for options, words in (
        ({"target": "layers=3,ffn=16"}, "--target was"),
        ({"refit": RefitConfig(refit_sequences=8, refit_held_out=8)}, "--refit-sequences was 16"),
        ({"train": replace(config.train, seed=3)}, "--seed was 0, now 3"),
    ):
        with pytest.raises(InputError, match=words):
            shear(replace(config, **options))
    # The same units, by the run's masks.
    again = replace(
        config,
        layer_widths="uniform",
        target="1.3b",
        selection=str(output),
        output=str(tmp_path / "two"),
    )
    shear(again)
    assert (
        load_config(tmp_path / "two" / "model").layer_sizes
        == load_config(output / "model").layer_sizes
    )


def test_ranks_find_the_same(inputs: Path, tmp_path: Path) -> None:
    for world in (1, 2):
        run_ranks(_find, world, inputs, tmp_path / str(world))
    one, two = (report_of(tmp_path / str(world))["selection"] for world in (1, 2))
    assert one["widths"] == two["widths"]
    assert one["divergence"]["after"] == pytest.approx(two["divergence"]["after"], rel=1e-3)


def _find(inputs: Path, output: Path) -> None:
    shear(configure(inputs, output))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "layers=3,ffn=48"}, r"--layer-widths free: the target keeps all 48 channels"),
        ({"target": "layers=1,ffn=24"}, r"--layer-widths free: the target has one block"),
        ({"align": 7}, r"--align 7: the target's 24 channels are no multiple .* use ffn=21"),
        ({"masks": MaskConfig(init="second-order")}, r"--init second-order: --layer-widths free"),
        ({"selection": "x"}, r"--layer-widths free: --selection x says which"),
        ({"refit": RefitConfig(refit=False)}, r"--no-refit: --layer-widths free compares"),
        ({"train": TrainConfig(steps=4)}, r"--steps 4 would learn keep the same .* add --steps 0"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], words: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        shear(configure(inputs, tmp_path / "out", **options))


def test_moves() -> None:
    draw = random.Random(0)
    widths: tuple[int, ...] = (24, 24, 24)
    seen = set()
    for _ in range(500):
        new = moved(widths, draw, step=4, most=40)
        changes = sorted(after - before for after, before in zip(new, widths, strict=True))
        assert changes[1] == 0 and changes[0] == -changes[2] and changes[2] % 4 == 0
        assert min(new) >= 4 and max(new) <= 40 and changes[2] <= 4 * MOST_STEPS
        seen.add(changes[2])
        widths = new
    assert seen == {4, 8, 12, 16}
    assert moved((4, 4), draw, step=4, most=40) == (4, 4)
    assert moved((40, 40), draw, step=4, most=40) == (40, 40)
    assert moved((8, 40), draw, step=4, most=40) in ((12, 36), (16, 32), (20, 28), (24, 24))
