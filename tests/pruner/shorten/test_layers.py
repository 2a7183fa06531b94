"""Runs that remove attention and feed-forward layers apart."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.errors import InputError
from pruner.config import RefitConfig, ShearConfig
from pruner.run import shear
from pruner.shorten.run import shorten
from tests.factories import write_model, write_tokens
from tests.pruner.shorten.test_run import LAYERS, configure, report_of
from trainer.config import TrainConfig
from trainer.cpt import CptConfig, continue_pretraining
from trainer.models.hf import load_config, load_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    model = write_model(root / "model", num_hidden_layers=LAYERS, initializer_range=0.2)
    write_tokens(root / "tokens", model, number=40)
    return root


def present(output: Path) -> list[tuple[bool, bool]]:
    """Which layers each block of a run's model has."""
    blocks = load_config(output / "model").blocks
    return [(bool(sizes.num_heads), bool(sizes.intermediate_size)) for sizes in blocks]


@pytest.mark.parametrize("criterion", ["ppl", "taylor", "magnitude", "influence", "random"])
@pytest.mark.parametrize("units", ["attention", "feed-forward", "both"])
def test_the_least_go(criterion: str, units: str, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shorten(configure(inputs, output, criterion=criterion, units=units, remove=3))
    told = report_of(output)["selection"]
    kinds = ("attention", "feed-forward") if units == "both" else (units,)
    every = [f"{kind} {block}" for block in range(LAYERS) for kind in kinds]
    assert told["units"] == every and sorted(told["order"]) == sorted(every)
    assert len(told["scores"]) == len(every)
    by_score = sorted(every, key=lambda name: told["scores"][every.index(name)])
    assert told["order"] == by_score
    assert set(told["protected"]) == {name for name in every if name[-1] in "04"}
    unprotected = [name for name in by_score if name not in told["protected"]]
    assert set(told["removed"]) == set(unprotected[:3])
    whole = [
        tuple(f"{kind} {block}" not in told["removed"] for kind in ("attention", "feed-forward"))
        for block in range(LAYERS)
    ]
    assert present(output) == [block for block in whole if any(block)]
    report = report_of(output)
    model = load_model(output / "model")
    assert report["parameters"]["target"] == sum(p.numel() for p in model.parameters())
    assert report["refit"]["kept"] in (True, False)


@pytest.mark.parametrize("search", ["greedy", "evolution", "refitted"])
def test_searches_and_resumes(
    search: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    options = {"search": search, "units": "both", "remove": 3}
    if search != "greedy":
        options |= {"generations": 2, "offspring": 3}
    config = configure(inputs, output, **options)
    shorten(config)
    told = report_of(output)["selection"]
    assert len(set(told["removed"])) == 3
    (output / "shear.json").unlink()
    monkeypatch.setattr("pruner.shorten.run.Scorer.choose", None)
    shorten(config)
    again = report_of(output)["selection"]
    assert {name: again[name] for name in told if name != "in_doubt"} == {
        name: told[name] for name in told if name != "in_doubt"
    }
    with pytest.raises(InputError, match=r"--units was 'both', now 'block'"):
        shorten(replace(config, units="block", search="one-shot", generations=None, offspring=None))


def test_other_sizes_are_cut_too(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    then = "hidden=16,heads=2,kv-heads=1,ffn=24"
    shorten(configure(inputs, output, units="both", remove=3, then=then))
    config = load_config(output / "model")
    assert config.hidden_size == 16
    for heads, kv_heads, channels in config.blocks:
        assert (heads, kv_heads) in ((2, 1), (0, 0)) and channels in (24, 0)
    # The same units again, by the run's masks.
    again = ShearConfig(
        source=str(inputs / "model"),
        selection=str(output),
        data=str(inputs / "tokens"),
        output=str(tmp_path / "again"),
        refit=RefitConfig(refit=False),
        train=TrainConfig(
            steps=0,
            global_batch=1,
            micro_batch=1,
            seq_len=32,
            eval_sequences=2,
            precision="fp32",
            threads=1,
        ),
    )
    shear(again)
    assert load_config(tmp_path / "again" / "model").layer_sizes == config.layer_sizes
    first, second = (
        load_file(folder / "masks.safetensors") for folder in (output, tmp_path / "again")
    )
    assert first.keys() == second.keys() | {"basis"} - ({"basis"} - first.keys())
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_it_can_be_trained(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shorten(configure(inputs, output, units="attention", remove=2))
    continue_pretraining(
        CptConfig(
            model=str(output),
            data=str(inputs / "tokens"),
            output=str(tmp_path / "cpt"),
            train=TrainConfig(
                steps=2, global_batch=2, seq_len=32, eval_sequences=2, precision="fp32", threads=1
            ),
        )
    )
    trained = load_config(tmp_path / "cpt" / "model")
    assert trained.layer_sizes == load_config(output / "model").layer_sizes
    assert (tmp_path / "cpt" / "model" / "modeling_uneven.py").is_file()
    with pytest.raises(InputError, match=r"--source .*: its blocks differ in size already"):
        shorten(
            replace(configure(inputs, tmp_path / "two"), source=str(tmp_path / "cpt" / "model"))
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"units": "both", "remove": None, "ratio": 0.2}, r"--units both: .*--remove 6"),
        (
            {"units": "attention", "criterion": "angular"},
            r"--criterion angular: is taken over whole",
        ),
        (
            {"units": "both", "remove": 5, "protect_first": 0, "protect_last": 0},
            r"takes 5 of 10 attention and feed-forward layers, and at least one layer of each kind "
            r"must stay; ask for at most --remove 4",
        ),
        (
            {"units": "attention", "remove": 5, "protect_first": 0, "protect_last": 0},
            r"--remove 5: takes 5 of 5 attention layers, and at least one must stay",
        ),
        (
            {"units": "feed-forward", "remove": 4},
            r"takes 4 of 5 feed-forward layers, and --protect",
        ),
        (
            {"units": "feed-forward", "remove": None, "ratio": 0.0001},
            r"--ratio 0.0001: removes no feed-forward layer, because one is",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], words: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        shorten(configure(inputs, tmp_path / "out", **options))


def test_ratio_and_params_count_layers(inputs: Path, tmp_path: Path) -> None:
    model = load_config(inputs / "model")
    for units, position in (("attention", 0), ("feed-forward", 2)):
        output = tmp_path / units
        shorten(configure(inputs, output, units=units, remove=2))
        left = report_of(output)["parameters"]["target"]
        assert sum(bool(sizes[position]) for sizes in load_config(output / "model").blocks) == 3
        options: dict[str, Any]
        for name, options in (
            ("params", {"params": str(left)}),
            ("ratio", {"ratio": 1 - left / model.num_parameters()}),
        ):
            again = tmp_path / f"{units}-{name}"
            shorten(configure(inputs, again, units=units, remove=None, **options))
            assert report_of(again)["parameters"]["target"] == left
            assert json.loads((again / "shear.json").read_text())["selection"]["removed"]


def test_all_layers_that_are_not_protected_may_go(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shorten(configure(inputs, output, units="both", remove=6, criterion="reverse"))
    assert present(output) == [(True, True), (True, True)]
