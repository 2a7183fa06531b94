"""Shapes of one budget are compared by what is cut, and the best is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pruner import run as run_module
from pruner.config import ShearConfig, resolve
from pruner.divergence import Divergence
from pruner.extract import Extraction
from pruner.importance import measure
from pruner.run import shear
from pruner.shape_search import cut, search_shapes
from pruner.shapes import config_of, parse_target, shape_of
from tests.distributed import run_ranks
from tests.factories import write_model
from tests.pruner.shorten.test_scores import loaded, sequences
from tests.pruner.test_run import configure
from trainer.config import TrainConfig
from trainer.models.decoder import CausalLM

TARGETS = ("layers=1", "layers=3,ffn=16", "layers=2,hidden=24,heads=2,kv-heads=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    return write_model(path, num_hidden_layers=4, initializer_range=0.3)


def searched(folder: Path, output: Path) -> dict[str, Any]:
    model, context = loaded(folder)
    shapes = [parse_target(text, shape_of(model.config)) for text in TARGETS]
    config = ShearConfig(train=TrainConfig(steps=0, micro_batch=2))
    config = resolve(config, model.config, shapes[-1])
    return search_shapes(model, shapes, config, sequences(20), context, output / "kept.json")


def test_a_cut_is_what_is_extracted(folder: Path) -> None:
    model, context = loaded(folder)
    importance = {
        name: values[0]
        for name, values in measure("importance", model, sequences(), context, 2).items()
    }
    target = parse_target(TARGETS[-1], shape_of(model.config))
    masks = cut(model, importance, target, True)
    extraction = Extraction(model.config, masks)
    assert shape_of(extraction.config) == target
    small = CausalLM(extraction.config)
    pairs = [(name, tensor.detach()) for name, tensor in model.named_parameters()]
    small.load_state_dict(dict(extraction.tensors(pairs)))
    with torch.no_grad():
        masked, plain = model(sequences(), masks), small(sequences())
    torch.testing.assert_close(masked, plain, rtol=1e-4, atol=1e-4)


def test_the_best_is_the_one_nearest_to_the_source(folder: Path, tmp_path: Path) -> None:
    found = searched(folder, tmp_path)
    rows = {row["shape"]: row for row in found["compared"]}
    assert found["shape"] == found["compared"][0]["shape"] and len(rows) == len(TARGETS)
    assert found["compared"][0]["sequences"] > found["compared"][-1]["sequences"]
    # All of the text of all of them, computed apart.
    model, context = loaded(folder)
    config = ShearConfig(train=TrainConfig(steps=0, micro_batch=2))
    source = shape_of(model.config)
    shapes = {parse_target(text, source).describe(): parse_target(text, source) for text in TARGETS}
    config = resolve(config, model.config, parse_target(TARGETS[-1], source))
    assert config.masks.basis == "principal"
    from pruner.rotation import measure_rotation, rotate

    with torch.no_grad():
        whole = model(sequences(20)).log_softmax(-1)
    rotate(model, measure_rotation(model, sequences(20), context, 2))
    importance = {
        name: values[0]
        for name, values in measure("importance", model, sequences(20), context, 2).items()
    }
    apart = {}
    for text, shape in shapes.items():
        with torch.no_grad():
            logits = model(sequences(20), cut(model, importance, shape, True)).log_softmax(-1)
        per_token = F.kl_div(logits, whole, log_target=True, reduction="none").sum(-1)[:, :-1]
        apart[text] = per_token
        read = rows[text]["sequences"]
        assert rows[text]["divergence"] == pytest.approx(per_token[:read].mean().item(), rel=1e-3)
    assert found["shape"] == min(apart, key=lambda text: apart[text].mean().item())


def test_ranks_find_the_same(folder: Path, tmp_path: Path) -> None:
    (alone,) = run_ranks(searched, 1, folder, tmp_path / "alone")
    for found in run_ranks(searched, 2, folder, tmp_path / "two"):
        assert found["shape"] == alone["shape"]
        for one, other in zip(found["compared"], alone["compared"], strict=True):
            assert one["shape"] == other["shape"]
            assert one["divergence"] == pytest.approx(other["divergence"], rel=1e-4)


def test_what_is_known_is_not_computed_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = searched(folder, tmp_path)
    monkeypatch.setattr(Divergence, "_measure", None)
    assert searched(folder, tmp_path) == first


@pytest.mark.parametrize("target", ["params=26k", "params-non-embedding=14k,layers=2"])
def test_a_run_takes_the_best_shape(
    target: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: dict[str, Any] = {"target": target, "propose": "search", "steps": 0}
    config = configure(inputs, tmp_path / "out", **options)
    shear(config)
    report = json.loads((tmp_path / "out" / "shear.json").read_text())
    record = json.loads((tmp_path / "out" / "target.json").read_text())
    assert record["shape"] == record["search"][0]["shape"] and "alternatives" not in record
    source = shape_of(run_module.load_config(inputs / "model"))
    shape = parse_target(record["shape"], source)
    assert report["target_shape"]["ffn"] == shape.ffn
    model = config_of(shape, run_module.load_config(inputs / "model"))
    assert record["parameters"]["target"] == model.num_parameters()
    assert record["used"] <= 1
    if "layers" in target:
        assert {parse_target(row["shape"], source).layers for row in record["search"]} == {2}
    assert f"taken: --target {record['shape']}" in capsys.readouterr().out
    # A finished run is only shown.
    monkeypatch.setattr(run_module, "search_shapes", None)
    assert shear(config) is None
