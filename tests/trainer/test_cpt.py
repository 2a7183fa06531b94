"""Continued pre-training that is stopped and resumed."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from tests.factories import move_hub_model, write_hub_model, write_model
from tests.trainer.tiny import losses, options, pretrain
from trainer.config import DistillationConfig
from trainer.loop import Trainer


def run(workspace: Path, output: Path, **changes: Any) -> Trainer | None:
    return pretrain(
        options(steps=8, save_interval=2, **changes),
        model=workspace / "model",
        data=workspace / "tokens",
        output=output,
        reference_losses="alpha=2.0,beta=5.0",
    )


def stop_during(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process SIGTERM during a step."""
    train_step = Trainer.train_step

    def stopping(trainer: Trainer) -> None:
        if trainer.step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        train_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", stopping)


def test_a_resumed_run_equals_an_uninterrupted_one(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(workspace, whole)
    with monkeypatch.context() as patch:
        stop_during(3, patch)
        stopped = run(workspace, parts)
    assert stopped is not None and stopped.stopping and len(losses(parts)) == 3
    assert not (parts / "cpt.json").exists()
    run(workspace, parts)
    assert losses(parts) == losses(whole)
    name = "model/model.safetensors"
    assert (parts / name).read_bytes() == (whole / name).read_bytes()
    reports = [json.loads((folder / "cpt.json").read_text()) for folder in (parts, whole)]
    for report in reports:
        assert report["tokens_per_second"] >= report["wall_tokens_per_second"] > 0
    for key in ("final_loss", "held_out", "tokens", "weights"):
        assert reports[0][key] == reports[1][key]


def test_learning_rate_and_evaluation_may_change_on_resume(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        stop_during(4, patch)
        run(workspace, tmp_path)
    with pytest.raises(InputError, match="--seed was 0, now 1"):
        run(workspace, tmp_path, seed=1)
    capsys.readouterr()
    trainer = run(workspace, tmp_path, lr=1e-3, weight_decay=0.0, eval_sequences=0)
    assert trainer is not None and trainer.step == 8
    printed = capsys.readouterr().out
    assert "note: lr 0.01 -> 0.001 from step 5" in printed
    assert "note: weight_decay 0.1 -> 0.0 from step 5" in printed
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["lr"] for line in lines]
    assert min(rates[:4]) > 1e-3 > rates[4]
    assert json.loads((tmp_path / "run.json").read_text())["lr"] == 1e-3


def test_an_unwritable_copy_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--json .* is a folder; name a file in it"):
        pretrain(
            options(steps=1),
            model=tmp_path / "none",
            data=tmp_path / "none",
            output=tmp_path / "out",
            json=str(tmp_path),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", [".", "deeper/out"])
def test_a_copy_that_would_be_the_folder_of_the_run_is_refused(inside: str, tmp_path: Path) -> None:
    copy = tmp_path / "new"
    with pytest.raises(InputError, match=r"^--json .*new is the folder of --output, or around it"):
        pretrain(
            options(steps=1),
            model=tmp_path / "none",
            data=tmp_path / "none",
            output=copy / inside,
            json=str(copy),
        )
    assert not copy.exists()


def test_no_steps_are_refused(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--steps 0: must be at least 1 to train"):
        pretrain(
            options(steps=0),
            model=workspace / "model",
            data=workspace / "tokens",
            output=tmp_path,
        )


def test_losses_are_said_to_be_of_the_weights_before_they_are_rounded(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dtype in ("float32", "bfloat16"):
        pretrain(
            options(steps=1),
            model=workspace / "model",
            data=workspace / "tokens",
            output=tmp_path / dtype,
            reference_losses="alpha=2.0,beta=5.0",
            save_dtype=dtype,
        )
        said = "losses are of the weights in float32" in capsys.readouterr().out
        assert said == (dtype == "bfloat16")


def test_a_name_on_the_hub_that_moved_says_what_it_was(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    other = write_model(tmp_path / "other", initializer_range=0.05)
    first, second, same = write_hub_model(cache, workspace / "model", other, workspace / "model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)

    def start(model: Path | str, teacher: Path | str, **changes: Any) -> None:
        pretrain(
            options(steps=4, save_interval=1, **changes),
            model=Path(model),
            data=workspace / "tokens",
            output=tmp_path / "run",
            reference_losses="alpha=2.0,beta=5.0",
            teacher=str(teacher),
            distillation=DistillationConfig(weight=0.5),
        )

    with monkeypatch.context() as patch:
        stop_during(2, patch)
        start("acme/tiny", "acme/tiny")
    noted = json.loads((tmp_path / "run" / "run.json").read_text())["revisions"]
    assert noted == {"--model": f"acme/tiny@{first}", "--teacher": f"acme/tiny@{first}"}
    move_hub_model(cache, second)
    was = rf"acme/tiny was revision {first}: give"
    both = rf"{was} --model acme/tiny@{first}, {was} --teacher acme/tiny@{first} to resume it, or"
    with pytest.raises(InputError, match=both):
        start("acme/tiny", "acme/tiny")
    with pytest.raises(InputError, match=rf"\. {was} --teacher acme/tiny@{first} to resume it, or"):
        start(f"acme/tiny@{first}", other)
    with pytest.raises(InputError, match=rf"{first}, repeat the other old values to resume it, or"):
        start("acme/tiny", "acme/tiny", seed=1)
    # Another commit with the same weights is the same run.
    move_hub_model(cache, same)
    start("acme/tiny", f"acme/tiny@{first}")
    assert (tmp_path / "run" / "cpt.json").exists()
