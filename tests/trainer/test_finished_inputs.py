"""A finished run that is started again ends well although what it read is gone."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from pruner.config import RefitConfig, ShearConfig
from pruner.run import shear
from pruner.shorten.run import shorten
from tests.distributed import run_ranks
from tests.factories import write_model, write_tokens
from tests.pruner.shorten.test_run import configure as shortening
from trainer.config import CptConfig, TrainConfig
from trainer.cpt import continue_pretraining
from trainer.finetune import finetune
from trainer.finetune_config import FinetuneConfig

SCHEDULE: dict[str, Any] = {"global_batch": 2, "seq_len": 32, "eval_sequences": 2, "threads": 1}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    model = write_model(tmp_path / "model", num_hidden_layers=5, initializer_range=0.2)
    write_tokens(tmp_path / "tokens", model, number=40)
    return tmp_path


def shearing(inputs: Path) -> ShearConfig:
    return ShearConfig(
        source=str(inputs / "model"),
        target="layers=3",
        data=str(inputs / "tokens"),
        output=str(inputs / "run"),
        refit=RefitConfig(refit=False),
        train=TrainConfig(steps=0, micro_batch=1, precision="fp32", **SCHEDULE),
    )


def training(inputs: Path) -> CptConfig:
    return CptConfig(
        model=str(inputs / "model"),
        data=str(inputs / "tokens"),
        output=str(inputs / "run"),
        train=TrainConfig(steps=2, micro_batch=1, precision="fp32", **SCHEDULE),
    )


def tuning(inputs: Path) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(inputs / "model"),
        data=str(inputs / "tokens"),
        output=str(inputs / "run"),
        method="full",
        train=training(inputs).train,
    )


COMMANDS: dict[str, tuple[Callable[[Any], Any], Callable[[Path], Any]]] = {
    "shear": (shear, shearing),
    "shorten": (shorten, lambda inputs: shortening(inputs, inputs / "run")),
    "cpt": (continue_pretraining, training),
    "finetune": (finetune, tuning),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("gone", ["model", "tokens"])
def test_what_it_read_may_be_gone(
    command: str, gone: str, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, made = COMMANDS[command]
    config = made(inputs)
    shutil.move(inputs / gone, inputs / "aside")
    with pytest.raises(InputError, match=f"{gone}"):
        start(config)
    shutil.move(inputs / "aside", inputs / gone)
    start(config)
    # A name that never was the run's is a mistake.
    trains = command in ("cpt", "finetune")
    option = {"model": "model" if trains else "source", "tokens": "data"}[gone]
    with pytest.raises(InputError, match="nowhere"):
        start(replace(config, **{option: str(inputs / "nowhere")}))
    shutil.rmtree(inputs / gone)
    capsys.readouterr()
    assert start(config) is None
    printed = capsys.readouterr().out
    assert "note: --" in printed and "this run is finished; its report is" in printed
    if command != "shorten":
        other = replace(config, train=replace(config.train, seed=7))
        with pytest.raises(InputError, match="--seed was 0, now 7"):
            start(other)


def test_on_several_ranks(inputs: Path) -> None:
    assert run_ranks(_train, 2, inputs) == [True, True]
    shutil.rmtree(inputs / "tokens")
    assert run_ranks(_train, 2, inputs) == [False, False]


def _train(inputs: Path) -> bool:
    return continue_pretraining(training(inputs)) is not None


def test_the_other_command_is_named(inputs: Path) -> None:
    """Both write shear.json, and neither has the other's options."""
    shear(shearing(inputs))
    with pytest.raises(InputError, match=r"run holds a run of shorn shear: name another --output$"):
        shorten(shortening(inputs, inputs / "run"))
    shorten(shortening(inputs, inputs / "short"))
    other = replace(shearing(inputs), output=str(inputs / "short"))
    with pytest.raises(InputError, match=r"short holds a run of shorn shorten: name another"):
        shear(other)
