"""Shearing and the training after it with the source as teacher."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from pruner.run import shear
from tests.factories import write_model, write_tokens
from tests.pruner.test_run import configure
from trainer.config import DISTILL_WEIGHT, DistillationConfig
from trainer.cpt import continue_pretraining
from trainer.identity import weights_fingerprint


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a three-block model and a token folder of two domains."""
    root = tmp_path_factory.mktemp("inputs")
    model = write_model(root / "model", num_hidden_layers=3)
    write_tokens(root / "tokens", model, number=40)
    return root


def divergences(output: Path) -> list[float]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["distill_kl"] for line in lines]


def test_distillation_keeps_the_model_near_its_source(inputs: Path, tmp_path: Path) -> None:
    """What pruning takes away from the source's distributions, distillation wins back."""
    sharp = write_model(
        tmp_path / "sharp", inputs / "model", num_hidden_layers=3, initializer_range=0.2
    )
    options: dict[str, Any] = {"source": str(sharp), "target": "ffn=16", "lr": 3e-3, "steps": 20}
    options |= {"target_warmup": 0.2, "harden": 0.3}
    for weight in (1.0, 0.01):
        distillation = DistillationConfig(weight=weight)
        shear(configure(inputs, tmp_path / str(weight), distillation=distillation, **options))
    distilled, free = divergences(tmp_path / "1.0"), divergences(tmp_path / "0.01")
    assert len(distilled) == 20 and distilled[0] == free[0]
    assert distilled[-1] < 0.8 * max(distilled) and distilled[-1] < 0.5 * free[-1]
    (tmp_path / "1.0" / "shear.json").unlink()
    for rule, now in (("projection", DISTILL_WEIGHT), ("paper", None)):
        with pytest.raises(InputError, match=rf"distill\.weight was 1\.0, now {now}"):
            shear(configure(inputs, tmp_path / "1.0", rule=rule, **options))


def test_learned_masks_are_distilled_unless_told_otherwise(inputs: Path, tmp_path: Path) -> None:
    for output, changes in (
        ("default", {}),
        ("off", {"distillation": DistillationConfig(weight=0.0)}),
        ("at-once", {"steps": 0}),
        ("paper", {"rule": "paper", "target": "ffn=30"}),
    ):
        shear(configure(inputs, tmp_path / output, **changes))
        identity = json.loads((tmp_path / output / "run.json").read_text())
        expected = DISTILL_WEIGHT if output == "default" else None
        assert identity.get("distill.weight") == expected, output


def test_training_goes_on_learning_from_the_source(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shear(configure(inputs, tmp_path / "shear"))

    def taught(output: str, weight: float | None = None) -> dict[str, Any]:
        continue_pretraining(
            configure(inputs, tmp_path).train,
            model=str(tmp_path / "shear"),
            data=str(inputs / "tokens"),
            output=tmp_path / output,
            distillation=DistillationConfig(weight=weight),
        )
        identity = json.loads((tmp_path / output / "run.json").read_text())
        return {name: value for name, value in identity.items() if name.startswith("distill.")}

    source = weights_fingerprint(inputs / "model")
    found = taught("default")
    assert (found["distill.teacher"], found["distill.weight"]) == (source, DISTILL_WEIGHT)
    assert "as in shearing (--distill-weight 0: not)" in capsys.readouterr().out
    assert taught("half", 0.5)["distill.weight"] == 0.5
    assert taught("off", 0.0) == {}
    report = json.loads((tmp_path / "shear" / "shear.json").read_text())
    gone = json.dumps(report | {"source": str(tmp_path / "gone")})
    (tmp_path / "shear" / "shear.json").write_text(gone)
    capsys.readouterr()
    assert taught("alone") == {}
    assert "gone, which shearing learned from, is not there" in capsys.readouterr().out
    with pytest.raises(InputError, match="needs a model to learn from: add --teacher"):
        taught("asked", 0.5)
