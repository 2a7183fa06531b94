"""What is measured is said; kept measurements come back as they were, or not at all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.errors import InputError
from pruner.measurements import FILE, ROTATION, load_kept
from pruner.run import shear
from tests.factories import write_tokens
from tests.pruner.test_run import configure
from tests.trainer.tiny import pretrain
from trainer import parallel

HELD_OUT = {"a": {"loss": 1.5, "perplexity": 4.5, "tokens": 31}}
METADATA = {
    "key": "k",
    "held_out": json.dumps(HELD_OUT),
    "reference": json.dumps({"a": 2}),
    "importance": "false",
}


def test_what_was_kept_comes_back(tmp_path: Path) -> None:
    context = parallel.init(threads=1)
    tensors = {"layer": torch.ones(1, 2), ROTATION: torch.eye(2)}
    save_file(tensors, tmp_path / FILE, METADATA | {"importance": "true"})
    found = load_kept(tmp_path, "k", context)
    assert found is not None and found.rotation is not None and found.importance is not None
    assert (found.held_out, found.reference) == (HELD_OUT, {"a": 2.0})
    assert load_kept(tmp_path, "other", context) is None


@pytest.mark.parametrize(
    "change",
    [
        {"held_out": "{"},
        {"held_out": "5"},
        {"held_out": '{"a": 5}'},
        {"reference": '{"a": "x"}'},
        {"reference": "[]"},
        {"in_doubt": "{"},
        {"in_doubt": '{"layer": "x"}'},
        {"importance": "[" * 9999},
        {"importance": "1"},
        {"held_out": None},
    ],
    ids=str,
)
def test_damaged_ones_are_measured_again_or_named(
    tmp_path: Path, change: dict[str, str | None]
) -> None:
    context = parallel.init(threads=1)
    tensors = {"none": torch.zeros(0)}
    save_file(tensors, tmp_path / FILE, METADATA)
    assert load_kept(tmp_path, "k", context) is not None
    changed = {key: value for key, value in (METADATA | change).items() if value is not None}
    save_file(tensors, tmp_path / FILE, changed)
    assert load_kept(tmp_path, "k", context) is None
    with pytest.raises(InputError, match="missing or damaged"):
        load_kept(tmp_path, None, context)


def test_what_a_run_goes_without_and_has_seen_is_said(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shearing what a run has trained, on the same data and on data without held-out text."""
    shear(configure(inputs, tmp_path / "first", steps=2))
    printed = capsys.readouterr().out
    assert "held-out loss, loss on training text, principal components, importance" in printed
    assert "data begins at its start" not in printed and "nothing will be" not in printed
    config = configure(inputs, tmp_path / "train")
    pretrain(
        replace(config.train, steps=2),
        model=tmp_path / "first",
        data=inputs / "tokens",
        output=tmp_path / "trained",
    )
    capsys.readouterr()
    write_tokens(tmp_path / "tokens", inputs / "model", number=40, held_out=0)
    again = {"source": str(tmp_path / "trained"), "target": "ffn=16", "steps": 0, "refit": False}
    shear(configure(inputs, tmp_path / "second", **again))
    # Eight of the first shearing, and eight of training, which went on behind them.
    assert "begins at its start, with the 16 samples that the model of" in capsys.readouterr().out
    config = configure(inputs, tmp_path / "third", data=str(tmp_path / "tokens"), **again)
    shear(config)
    printed = capsys.readouterr().out
    assert "has no held-out sequences: nothing will be evaluated" in printed
    assert "measuring the source: loss on training text" in printed


def test_moments_that_a_finished_run_lacks_are_named(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"steps": 2, "save_moments": False}
    shear(configure(inputs, tmp_path, **options))
    capsys.readouterr()
    shear(configure(inputs, tmp_path, **options))
    assert "--save-moments" not in capsys.readouterr().out
    shear(configure(inputs, tmp_path, steps=2))
    assert "--save-moments changes nothing now" in capsys.readouterr().out
    shear(configure(inputs, tmp_path / "with", steps=2))
    capsys.readouterr()
    shear(configure(inputs, tmp_path / "with", **options))
    assert "--no-save-moments changes nothing now" in capsys.readouterr().out
