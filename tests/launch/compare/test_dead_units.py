"""Shapes of the dead-unit report, and its counts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.errors import InputError
from launch.compare.config import CompareConfig
from launch.compare.dead_units import dead_units_plan, sparse_shape
from launch.compare.stages import StageMaker
from pruner.shapes import Shape, config_of, shape_of
from tests.launch.compare.test_losses import SMOLLM2
from trainer.models.config import ModelConfig

SOURCE = ModelConfig.from_hf(SMOLLM2)
PYTHIA = {
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "rotary_pct": 0.25,
}


def test_shapes_are_near_the_sparsity() -> None:
    assert shape_of(SOURCE).describe() == "layers=30,hidden=576,heads=9,kv-heads=3,ffn=1536"
    assert sparse_shape(SOURCE, 0.5) == Shape(15, 288, 4, 2, 64, 768)
    assert sparse_shape(SOURCE, 0.75) == Shape(8, 144, 2, 1, 64, 384)
    assert sparse_shape(SOURCE, 0.95) == Shape(2, 32, 1, 1, 64, 80)


@pytest.mark.parametrize(
    "source",
    [
        SOURCE,
        config_of(Shape(32, 4096, 32, 8, 128, 14336), replace(SOURCE, head_dim=128)),
        config_of(Shape(3, 24, 4, 2, 8, 20), replace(SOURCE, head_dim=8)),
        ModelConfig.from_hf(PYTHIA),
    ],
)
def test_every_shape_is_valid(source: ModelConfig) -> None:
    for percent in range(20, 100, 5):
        target = sparse_shape(source, percent / 100)
        config_of(target, source).to_hf()
        assert target.hidden % target.heads == 0
        assert target.heads % target.kv_heads == 0
        assert target.group <= shape_of(source).group


def test_a_sparsity_that_removes_nothing_is_named() -> None:
    with pytest.raises(InputError, match=r"--sparsities 0.001: target .* is the source's own"):
        sparse_shape(SOURCE, 0.001)


def test_counts_are_those_of_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CompareConfig(
        source="model", input=("t",), output=str(tmp_path), sparsities=(0.5,), seeds=(4,)
    )
    plan = dead_units_plan(StageMaker(config), ModelConfig.from_hf(SMOLLM2))
    assert "50% of every unit kind: layers=15,hidden=288" in capsys.readouterr().out
    shears = [task for task in plan.tasks if "flags" in task.settings]
    assert [task.name for task in shears] == [
        "dead-units/50/projection/seed-4",
        "dead-units/50/paper/seed-4",
    ]
    assert plan.results({"tokens"}) is None
    for task in shears:
        report = {
            "target": {"hidden": 6},
            "families": {"hidden": {"name": "hidden", "rows": 1, "units": 8, "target": 6}},
            "kept": {"hidden": [6]},
            "alive": {"hidden": [6 if "projection" in task.name else 4]},
            "kept_not_alive": {"hidden": 0 if "projection" in task.name else 2},
            "polarised": "projection" in task.name,
            "steps": 16,
        }
        task.folder.mkdir(parents=True)
        (task.folder / "shear.json").write_text(json.dumps(report))
    results = plan.results({task.name for task in shears})
    assert results is not None
    projection, paper = results["rows"]
    assert (projection["rule"], projection["polarised"], paper["polarised"]) == (
        "projection",
        True,
        False,
    )
    assert paper["kept_not_alive"] == {"hidden": 2} and paper["steps"] == 16
    plan.show(results)
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "50%" in line]
    cells = {line[2].strip(): [cell.strip() for cell in line[5:9]] for line in lines}
    assert cells == {"projection": ["6", "6", "6", "0"], "paper": ["6", "6", "4", "2"]}
