"""Options of fine-tuning that cannot be met are refused by name."""

from pathlib import Path
from typing import Any

import pytest

from data.cli import parse
from data.errors import InputError
from data.idle import idle_options
from trainer.config import TrainConfig
from trainer.finetune_config import FinetuneConfig, LoraOptions


def test_defaults_are_those_of_shortened_llama() -> None:
    config = FinetuneConfig()
    assert (config.method, config.epochs, config.train.steps) == ("lora", None, 0)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (8, 16.0, 0.05)
    assert config.lora.scale == 2.0 and config.lora.target_modules == ()
    assert (config.train.lr, config.train.global_batch) == (1e-4, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "--lora-r 0: must be at least 1"),
        ({"alpha": 0.0}, "--lora-alpha 0.0: must be above 0"),
        ({"alpha": float("inf")}, "--lora-alpha inf: must be above 0"),
        ({"alpha": float("nan")}, "--lora-alpha nan: must be above 0"),
        ({"dropout": 1.0}, r"--lora-dropout 1.0: must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"--lora-dropout -0.1: must be in \[0, 1\)"),
        ({"dropout": float("nan")}, r"--lora-dropout nan: must be in \[0, 1\)"),
    ],
)
def test_adapters_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoraOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0.0}, "--epochs 0: must be above 0"),
        ({"epochs": -1.0}, "--epochs -1: must be above 0"),
        ({"epochs": float("nan")}, "--epochs nan: must be a finite number"),
        ({"epochs": 1e9}, "--epochs 1e.09: must be above 0, and at most 10,000"),
        ({"last_blocks": 0}, "--last-blocks 0: must be at least 1"),
        (
            {"epochs": 2.0, "train": TrainConfig(steps=5)},
            "--epochs 2 and --steps 5 both say how long to train: leave one out",
        ),
        ({"train": TrainConfig(optimizer="muon")}, "--optimizer muon moves whole matrices"),
    ],
)
def test_runs_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FinetuneConfig(**options)
    if "epochs" not in options and "last_blocks" not in options:
        FinetuneConfig(**options, method="full")


def test_options_of_other_methods_are_said_to_do_nothing() -> None:
    def idle(**options: Any) -> set[str]:
        names = ("lora_r", "target_modules", "last_blocks", "head", "reference_losses")
        return set(idle_options(FinetuneConfig(**options))).intersection(names)

    assert idle() == {"last_blocks", "head", "reference_losses"}
    assert idle(method="last-blocks") == {"lora_r", "target_modules", "reference_losses"}
    assert "head" in idle(method="full") and "lora_r" in idle(method="full")


def test_what_identifies_a_method_is_that_alone() -> None:
    lora = FinetuneConfig(last_blocks=7).identity(("q_proj", "v_proj"))
    assert lora == {
        "method": "lora",
        "lora_r": 8,
        "lora_alpha": 16.0,
        "lora_dropout": 0.05,
        "target_modules": "q_proj v_proj",
    }
    assert FinetuneConfig(method="last-blocks").identity(()) == {
        "method": "last-blocks",
        "last_blocks": 3,
        "head": True,
    }
    assert FinetuneConfig(method="full").identity(()) == {"method": "full"}


def test_options_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = "--epochs 0.5 --lora-r 4 --target-modules q_proj v_proj --method last-blocks --no-head"
    config = parse(FinetuneConfig, section="finetune", argv=words.split())
    assert (config.epochs, config.lora.r, config.head) == (0.5, 4, False)
    assert config.lora.target_modules == ("q_proj", "v_proj")
    # Values that are not given stay those of fine-tuning, not of continued pre-training.
    assert (config.train.steps, config.train.weight_decay, config.mixture.kind) == (0, 0.0, "fixed")
