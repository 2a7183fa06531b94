"""Shearing and the training after it with the source as teacher."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from pruner.run import open_inputs, shear
from tests.distributed import run_ranks
from tests.factories import write_model
from tests.pruner.test_run import configure
from tests.trainer.tiny import pretrain
from trainer import distillation
from trainer.config import DISTILL_WEIGHT, DistillationConfig
from trainer.models.sources import weights_fingerprint


def divergences(output: Path) -> list[float]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["distill_kl"] for line in lines]


def test_distillation_keeps_the_model_near_its_source(inputs: Path, tmp_path: Path) -> None:
    """What pruning takes away from the source's distributions, distillation wins back."""
    sharp = write_model(
        tmp_path / "sharp", inputs / "model", num_hidden_layers=3, initializer_range=0.2
    )
    options: dict[str, Any] = {"source": str(sharp), "target": "ffn=16", "lr": 3e-3, "steps": 20}
    options |= {"target_warmup": 0.2, "harden": 0.3, "keep_last_checkpoint": True}
    for weight in (1.0, 0.01):
        options["distillation"] = DistillationConfig(weight=weight)
        shear(configure(inputs, tmp_path / str(weight), **options))
    distilled, free = divergences(tmp_path / "1.0"), divergences(tmp_path / "0.01")
    assert len(distilled) == 20 and distilled[0] == free[0]
    assert distilled[-1] < 0.8 * max(distilled) and distilled[-1] < 0.5 * free[-1]
    del options["distillation"]
    (tmp_path / "1.0" / "shear.json").unlink()
    expected = {
        "projection": rf"--distill-weight was 1\.0, now {DISTILL_WEIGHT}",
        "sheared-llama": r"--rule was .projection., now .sheared-llama.",
    }
    for rule, message in expected.items():
        with pytest.raises(InputError, match=message):
            shear(configure(inputs, tmp_path / "1.0", rule=rule, **options))


def test_learned_masks_are_distilled_unless_told_otherwise(inputs: Path, tmp_path: Path) -> None:
    for output, changes in (
        ("default", {}),
        ("off", {"distillation": DistillationConfig(weight=0.0)}),
        ("at-once", {"steps": 0}),
        ("sheared-llama", {"rule": "sheared-llama", "target": "ffn=30"}),
    ):
        shear(configure(inputs, tmp_path / output, **changes))
        identity = json.loads((tmp_path / output / "run.json").read_text())
        expected = DISTILL_WEIGHT if output == "default" else None
        assert identity.get("distill.weight") == expected, output


def train_on(inputs: Path, shear_run: Path, output: Path, **options: Any) -> dict[str, Any]:
    """What run.json says of the teacher after training on a sheared model."""
    distillation = DistillationConfig(**options.pop("distillation", {}))
    pretrain(
        configure(inputs, output).train,
        model=shear_run,
        data=inputs / "tokens",
        output=output,
        distillation=distillation,
        **options,
    )
    identity = json.loads((output / "run.json").read_text())
    return {name: value for name, value in identity.items() if name.startswith("distill.")}


def shear_briefly(inputs: Path, output: Path) -> None:
    options = DistillationConfig(weight=0.7, temperature=2.0, top_k=50)
    shear(configure(inputs, output, distillation=options, steps=2))


@pytest.fixture(scope="module")
def sheared(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sheared") / "shear"
    # In a process of its own: a process group of this one would pass to the ranks of a test.
    run_ranks(shear_briefly, 1, inputs, output)
    return output


def test_training_goes_on_learning_from_the_source(
    inputs: Path, sheared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {
        "distill.teacher": weights_fingerprint(inputs / "model"),
        "distill.weight": 0.7,
        "distill.kind": "forward-kl",
        "distill.temperature": 2.0,
        "distill.top_k": "50 and the others as one",
    }
    assert train_on(inputs, sheared, tmp_path / "default") == same
    assert "at weight 0.7, the model it was cut from" in capsys.readouterr().out
    named = {"teacher": str(inputs / "model")}
    assert train_on(inputs, sheared, tmp_path / "named", **named) == same
    half = train_on(inputs, sheared, tmp_path / "half", distillation={"weight": 0.5})
    assert half == same | {"distill.weight": 0.5}
    off = {"distillation": {"weight": 0.0}}
    assert train_on(inputs, sheared, tmp_path / "off", **off) == {}
    assert train_on(inputs, sheared, tmp_path / "random", init="random") == {}


def test_a_model_that_was_only_cut_is_trained_with_its_source(inputs: Path, tmp_path: Path) -> None:
    """Shearing at once loads no teacher, which has nothing to teach yet."""
    output = tmp_path / "cut"
    trainer = shear(configure(inputs, output, steps=0, refit=False))
    assert trainer is not None and trainer.teacher is None
    assert not [name for name in json.loads((output / "run.json").read_text()) if "distill" in name]
    found = train_on(inputs, output, tmp_path / "trained")
    assert found["distill.teacher"] == weights_fingerprint(inputs / "model")
    assert found["distill.weight"] == DISTILL_WEIGHT
    published = tmp_path / "published"
    shear(configure(inputs, published, steps=0, rule="paper"))
    assert train_on(inputs, published, tmp_path / "alone") == {}


def test_training_says_that_the_source_is_gone_or_another(
    inputs: Path, sheared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "shear"
    shutil.copytree(sheared, moved)
    report = json.loads((moved / "shear.json").read_text())
    for change in ({"source": str(tmp_path / "gone")}, {"source_weights": "another"}):
        (moved / "shear.json").write_text(json.dumps(report | change))
        output = tmp_path / next(iter(change))
        assert train_on(inputs, moved, output) == {}
        assert "is no longer" in capsys.readouterr().out
        with pytest.raises(InputError, match="needs a model to learn from: add --teacher"):
            train_on(inputs, moved, tmp_path / "asked", distillation={"weight": 0.5})
    (moved / "shear.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match=r"--teacher, --distill-weight: it had no teacher"):
        train_on(inputs, moved, output)


def train_where_one_rank_lacks_the_source(inputs: Path, sheared: Path, output: Path) -> str:
    if os.environ["RANK"] == "1":
        distillation._holds = lambda *_: False
    try:
        train_on(inputs, sheared, output)
    except InputError as error:
        return str(error)
    return ""


def test_a_teacher_that_some_ranks_lack_is_refused_on_all(
    inputs: Path, sheared: Path, tmp_path: Path
) -> None:
    arguments = (inputs, sheared, tmp_path / "out")
    messages = run_ranks(train_where_one_rank_lacks_the_source, 2, *arguments)
    assert len(set(messages)) == 1 and "is there on ranks [0] only" in messages[0]


def test_a_distilled_run_holds_its_learning_rate(inputs: Path, tmp_path: Path) -> None:
    for options, expected in (
        ({}, (1.0, DISTILL_WEIGHT)),
        ({"rule": "sheared-llama"}, (0.1, 0.0)),
        ({"steps": 0}, (0.1, DISTILL_WEIGHT)),
        ({"rule": "sheared-llama", "min_lr_ratio": 0.3}, (0.3, 0.0)),
        ({"min_lr_ratio": 0.3}, (0.3, DISTILL_WEIGHT)),
    ):
        config = open_inputs(configure(inputs, tmp_path, target="ffn=30", **options)).config
        assert (config.train.min_lr_ratio, config.distillation.weight) == expected
