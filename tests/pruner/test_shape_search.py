"""Shapes of one budget are compared by what is cut, and the best is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data.errors import InputError
from pruner import run as run_module
from pruner.config import RefitConfig, ShearConfig, resolve
from pruner.extract import Extraction
from pruner.refit import refit
from pruner.refitted import RefittedDivergence, cut
from pruner.run import shear
from pruner.shape_search import ShapeSearch
from pruner.shapes import Shape, config_of, parse_target, shape_of
from tests.distributed import run_ranks
from tests.factories import write_model
from tests.pruner.shorten.test_scores import loaded, sequences
from tests.pruner.test_run import configure
from trainer.config import TrainConfig
from trainer.models.decoder import CausalLM

TARGETS = ("layers=1", "layers=3,ffn=16", "layers=2,hidden=24,heads=2,kv-heads=2", "layers=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    return write_model(path, num_hidden_layers=4, initializer_range=0.3)


def opened(folder: Path, output: Path) -> tuple[ShapeSearch, list[Shape]]:
    model, context = loaded(folder)
    shapes = [parse_target(text, shape_of(model.config)) for text in TARGETS]
    refit = RefitConfig(refit_sequences=32, refit_held_out=8)
    config = ShearConfig(train=TrainConfig(steps=0, micro_batch=3, precision="fp32"), refit=refit)
    config = resolve(config, model.config, shapes[2])
    assert config.masks.basis == "principal"
    path = output / "kept.json"
    search = ShapeSearch(model, config, sequences(20), sequences(40), context, path)
    return search, shapes


def searched(folder: Path, output: Path) -> dict[str, Any]:
    search, shapes = opened(folder, output)
    return search.best(shapes)


@pytest.mark.parametrize("index", range(4))
def test_divergence_is_that_of_the_refitted_model(index: int, folder: Path, tmp_path: Path) -> None:
    search, shapes = opened(folder, tmp_path)
    found = search.of(shapes[index], 20)
    model = search.model
    masks = cut(model.config, search.importance, shapes[index], True)
    extraction = Extraction(model.config, masks)
    assert shape_of(extraction.config) == shapes[index]
    pairs = refit(
        extraction,
        [(name, tensor.detach()) for name, tensor in model.named_parameters()],
        sequences(40)[:20],
        ridge=search.config.refit.refit_ridge * 32 / 20,
        batch=3,
        context=search.refitted.context,
    )
    small = CausalLM(extraction.config)
    small.load_state_dict(dict(pairs))
    plain, _ = loaded(folder)
    held_out = sequences(40)[-8:]
    with torch.no_grad():
        whole, pruned = (network(held_out).log_softmax(-1) for network in (plain, small))
    per_token = F.kl_div(pruned, whole, log_target=True, reduction="none").sum(-1)[:, :-1]
    assert found == pytest.approx(per_token.mean().item(), rel=1e-3)


def test_the_best_is_the_one_nearest_to_the_source(folder: Path, tmp_path: Path) -> None:
    found = searched(folder, tmp_path)
    first = found["compared"][0]
    assert found["shape"] == first["shape"] and len(found["compared"]) == len(TARGETS)
    # All of the text for the last one, and a part for those behind.
    assert first["sequences"] == 32 and found["compared"][-1]["sequences"] == 2
    search, shapes = opened(folder, tmp_path / "apart")
    apart = {shape.describe(): search.of(shape, 2) for shape in shapes}
    assert found["compared"][-1]["shape"] == max(apart, key=lambda text: apart[text])
    assert found["shape"] == min(apart, key=lambda text: apart[text])


def test_ranks_find_the_same(folder: Path, tmp_path: Path) -> None:
    (alone,) = run_ranks(searched, 1, folder, tmp_path / "alone")
    for found in run_ranks(searched, 2, folder, tmp_path / "two"):
        assert found["shape"] == alone["shape"]
        for one, other in zip(found["compared"], alone["compared"], strict=True):
            assert one["shape"] == other["shape"]
            assert one["divergence"] == pytest.approx(other["divergence"], rel=1e-3)


def test_what_is_known_is_not_computed_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = searched(folder, tmp_path)
    monkeypatch.setattr(RefittedDivergence, "_measure", None)
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
    monkeypatch.setattr("pruner.searches.ShapeSearch", None)
    assert shear(config) is None
    for changes, message in (
        ({"propose": "rule"}, r"--propose was search, now rule\. Repeat"),
        ({"align": 8}, r"--align was not given, now 8\. Repeat"),
        ({"refit_ridge": 0.3}, r"--refit-ridge was 0\.1, now 0\.3"),
    ):
        with pytest.raises(InputError, match=message):
            shear(configure(inputs, tmp_path / "out", **options | changes))


def test_an_interrupted_search_for_a_speedup_goes_on(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among the same shapes, though what would be timed now is something else."""
    out = tmp_path / "out"
    config = configure(inputs, out, target="params=26k", propose="search", steps=0)
    original = ShapeSearch.of

    def interrupted(self: ShapeSearch, shape: Shape, number: int) -> float:
        if len(self.refitted.known) == 3:
            raise KeyboardInterrupt
        return original(self, shape, number)

    with monkeypatch.context() as patch:
        patch.setattr(ShapeSearch, "of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shear(config)
    measured: list[str] = []
    measure = RefittedDivergence._measure

    def counted(self: RefittedDivergence, *arguments: Any) -> float:
        measured.append("")
        return measure(self, *arguments)

    monkeypatch.setattr("pruner.proposal.resolve", None)
    monkeypatch.setattr(RefittedDivergence, "_measure", counted)
    shear(config)
    (kept,) = [path for path in (out / "shapes").glob("*.json") if path.name != "proposal.json"]
    assert len(json.loads(kept.read_text())) == len(measured) + 3
