"""Stop and resume: bit-identical on the same number of ranks, atomic, verified."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch

from data.errors import InputError
from tests.distributed import run_ranks
from tests.trainer.tiny import losses, make_trainer, options, weights
from trainer import checkpoint
from trainer.callbacks import checkpoint as callback_module
from trainer.callbacks.checkpoint import STOP_SIGNALS
from trainer.callbacks.evaluate import EvaluateCallback
from trainer.callbacks.mixture import MixtureCallback
from trainer.checkpoint import MARKER, Checkpointer
from trainer.loop import Callback, Trainer


class Wanderer(Callback):
    """State of tensors and numbers that every step changes."""

    name: ClassVar[str] = "wanderer"

    def __init__(self) -> None:
        self.scores = torch.zeros(5)
        self.optimizer_state: dict[str, Any] = {
            "steps": 0,
            "moment": [torch.ones(2, dtype=torch.float64)],
        }

    def on_step_end(self, trainer: Trainer) -> None:
        self.scores += torch.rand(5) * trainer.loss
        self.optimizer_state["steps"] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "optimizer": self.optimizer_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores, self.optimizer_state = state["scores"], state["optimizer"]


class SignalAt(Callback):
    """Sends a signal to one rank's own process at a step."""

    name: ClassVar[str] = "signal"

    def __init__(self, step: int, number: int, rank: int) -> None:
        self.step, self.number, self.rank = step, number, rank

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == self.step and trainer.context.rank == self.rank:
            # torchrun repeats what a terminal's Ctrl-C already sent to every process.
            signal.raise_signal(self.number)
            signal.raise_signal(self.number)


class Outcome(NamedTuple):
    weights: dict[str, np.ndarray]
    scores: list[float]
    callback_steps: int
    mixture: dict[str, float]
    used: dict[str, int]
    stopped: bool


def train(workspace: Path, output: Path, stop_at: int = 0, number: int = signal.SIGTERM) -> Outcome:
    """Runs or resumes 20 steps; a signal to the last rank stops the run at step `stop_at`."""
    torch.manual_seed(0)
    wanderer = Wanderer()
    sender = SignalAt(stop_at, number, rank=int(os.environ.get("WORLD_SIZE", "1")) - 1)
    trainer = make_trainer(workspace, output, callbacks=[wanderer, sender])
    trainer.fit()
    (mixture,) = (c for c in trainer.callbacks if isinstance(c, MixtureCallback))
    return Outcome(
        weights={name: value.numpy() for name, value in weights(trainer).items()},
        scores=wanderer.scores.tolist(),
        callback_steps=wanderer.optimizer_state["steps"],
        mixture=mixture.mixture.weights,
        used=trainer.stream.sampler.used,
        stopped=trainer.stopping,
    )


def assert_same(one: Outcome, other: Outcome) -> None:
    assert one[1:] == other[1:]
    for name, value in one.weights.items():
        np.testing.assert_array_equal(value, other.weights[name], err_msg=name)


@pytest.mark.parametrize(
    ("world", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1), (2, signal.SIGINT)]
)
def test_twenty_steps_equal_ten_and_ten(
    workspace: Path, tmp_path: Path, world: int, number: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run_ranks(train, world, workspace, whole)
    first = run_ranks(train, world, workspace, parts, 10, number)
    assert all(outcome.stopped for outcome in first)
    assert len(losses(parts)) == 10
    second = run_ranks(train, world, workspace, parts)
    assert losses(parts) == losses(whole)
    assert expected[0].callback_steps == 20
    assert expected[0].mixture != {"alpha": 0.5, "beta": 0.5}
    for rank in range(world):
        assert_same(second[rank], expected[rank])


def test_a_closed_terminal_stops_a_run_unless_it_is_under_nohup(
    workspace: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, stopped in ((signal.SIG_IGN, False), (signal.SIG_DFL, True)):
            signal.signal(signal.SIGHUP, handler)
            output = tmp_path / handler.name
            trainer = make_trainer(
                workspace, output, callbacks=[SignalAt(2, signal.SIGHUP, rank=0)]
            )
            trainer.fit()
            assert (trainer.stopping, trainer.step == 2) == (stopped, stopped)
            assert (output / "checkpoints" / "step-00000002").exists() == stopped
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back(workspace: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    trainer = make_trainer(workspace, tmp_path, callbacks=[SignalAt(2, signal.SIGINT, rank=0)])
    trainer.fit()
    assert trainer.stopping and trainer.step == 2
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_later_second_signal_acts_at_once(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callback_module, "SECONDS_OF_ONE_REQUEST", -1.0)
    trainer = make_trainer(workspace, tmp_path, callbacks=[SignalAt(2, signal.SIGINT, rank=0)])
    # A shell starts background processes with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (1, 2), (2, 1)])
def test_resume_on_another_number_of_ranks(
    before: int, after: int, workspace: Path, tmp_path: Path
) -> None:
    """One rank keeps plain tensors, several keep shards."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run_ranks(train, 1, workspace, whole)[0]
    run_ranks(train, before, workspace, parts, 10)
    resumed = run_ranks(train, after, workspace, parts)[0]
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=0, atol=1e-5)
    assert resumed.used == expected.used


def saved_run(workspace: Path, output: Path, **changes: Any) -> Trainer:
    trainer = make_trainer(workspace, output, options(**({"steps": 6} | changes)))
    trainer.fit()
    return trainer


def test_keeps_the_newest_and_ignores_partial_ones(workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    leftover = folder / ".step-00000004.partial"
    leftover.mkdir(parents=True)
    (leftover / "__0_0.distcp").write_bytes(b"half")
    unmarked = folder / "step-00000099"
    unmarked.mkdir()
    trainer = saved_run(workspace, tmp_path, save_interval=2)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-00000004", "step-00000006", "step-00000099"]
    latest = Checkpointer(folder, trainer.context).latest()
    assert latest == folder / "step-00000006"


def test_a_damaged_file_is_named(workspace: Path, tmp_path: Path) -> None:
    saved_run(workspace, tmp_path)
    file = tmp_path / "checkpoints" / "step-00000006" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"__0_0\.distcp.*delete the folder .*step-00000006"):
        make_trainer(workspace, tmp_path, options(steps=6))


def test_a_missing_file_is_named(workspace: Path, tmp_path: Path) -> None:
    saved_run(workspace, tmp_path)
    (tmp_path / "checkpoints" / "step-00000006" / "state.pt").unlink()
    with pytest.raises(InputError, match=r"state\.pt.*missing"):
        make_trainer(workspace, tmp_path, options(steps=6))


def test_a_full_disk_costs_no_older_checkpoint(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_run(workspace, tmp_path, steps=4)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    trainer = make_trainer(workspace, tmp_path, options(steps=4))
    trainer.step = 5
    folder = tmp_path / "checkpoints"
    with pytest.raises(InputError, match="no room for a checkpoint"):
        Checkpointer(folder, trainer.context).save(trainer)
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]


def test_a_write_error_is_reported_by_every_rank(workspace: Path, tmp_path: Path) -> None:
    def attempt() -> str:
        trainer = make_trainer(workspace, tmp_path, options(steps=2))
        if trainer.context.rank == 1:

            def refuse(*_: Any, **__: Any) -> None:
                raise OSError(28, "No space left on device")

            checkpoint.dcp.FileSystemWriter.write_data = refuse  # type: ignore[assignment,method-assign]
        try:
            trainer.fit()
        except InputError as error:
            return str(error)
        return ""

    messages = run_ranks(attempt, 2)
    assert all("no room for a checkpoint" in message for message in messages)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_other_callbacks_are_refused(workspace: Path, tmp_path: Path) -> None:
    saved_run(workspace, tmp_path)
    with pytest.raises(InputError, match="wanderer"):
        make_trainer(workspace, tmp_path, options(steps=6), callbacks=[Wanderer()])


def test_evaluation_may_be_turned_off_and_on(workspace: Path, tmp_path: Path) -> None:
    def without(trainer: Trainer) -> Trainer:
        trainer.callbacks = [c for c in trainer.callbacks if c.name != "evaluate"]
        return trainer

    folder = tmp_path / "checkpoints"
    saved_run(workspace, tmp_path)
    trainer = without(make_trainer(workspace, tmp_path / "other", options(steps=6)))
    checkpointer = Checkpointer(folder, trainer.context)
    checkpointer.restore(trainer, folder / "step-00000006")
    shutil.rmtree(folder)
    checkpointer.save(trainer)
    again = make_trainer(workspace, tmp_path, options(steps=6))
    assert again.step == 6
    (callback,) = (c for c in again.callbacks if isinstance(c, EvaluateCallback))
    assert callback.results == {}


def test_options_win_over_the_checkpoint(workspace: Path, tmp_path: Path) -> None:
    saved_run(workspace, tmp_path)
    changed = make_trainer(workspace, tmp_path, options(steps=20, weight_decay=0.7, lr=5e-3))
    assert [group["weight_decay"] for group in changed.optimizer.param_groups] == [0.7, 0.0]
    changed._call("on_train_start")
    changed.train_step()
    assert 0 < changed.record["lr"] <= 5e-3
    rates = {group["lr"] for group in changed.optimizer.param_groups}
    assert rates == {changed.record["lr"]}


def test_the_marker_lists_every_file(workspace: Path, tmp_path: Path) -> None:
    saved_run(workspace, tmp_path)
    folder = tmp_path / "checkpoints" / "step-00000006"
    marker = json.loads((folder / MARKER).read_text())
    files = {path.name for path in folder.iterdir()} - {MARKER}
    assert set(marker["sha256"]) == files and len(files) >= 3
    assert marker["step"] == 6 and marker["tokens"] == 6 * 8 * 16


class Rename(Callback):
    """Renames the run's folder while it trains."""

    name: ClassVar[str] = "rename"

    def __init__(self, output: Path, *, leave: bool) -> None:
        self.output, self.leave = output, leave

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == 5 and trainer.context.is_main:
            self.output.rename(self.output.with_name("moved"))
            if not self.leave:
                self.output.mkdir()


def renamed(workspace: Path, output: Path, leave: bool) -> str:
    rename = Rename(output, leave=leave)
    try:
        make_trainer(workspace, output, options(save_interval=3), callbacks=[rename]).fit()
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("leave", [True, False])
def test_a_folder_renamed_while_training_is_not_made_again(
    leave: bool, workspace: Path, tmp_path: Path
) -> None:
    messages = run_ranks(renamed, 2, workspace, tmp_path / "run", leave)
    assert len(set(messages)) == 1
    assert "run: was renamed or removed while the run was training" in messages[0]
    assert not list((tmp_path / "run").glob("*"))
    assert (tmp_path / "moved" / "checkpoints" / "step-00000003").is_dir()
