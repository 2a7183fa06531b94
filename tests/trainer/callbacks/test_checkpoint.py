"""An error between two steps costs none of them, and is the one that is reported."""

import errno
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from data.batches import BatchStream
from data.errors import InputError
from tests.distributed import run_ranks
from tests.trainer.tiny import losses, make_trainer, options, weights
from trainer import checkpoint, parallel
from trainer.callbacks.evaluate import EvaluateCallback
from trainer.callbacks.metrics import MetricsCallback
from trainer.callbacks.mixture import MixtureCallback
from trainer.callbacks.progress import ProgressCallback
from trainer.checkpoint import Checkpointer
from trainer.loop import Callback, Trainer


def names(place: Path) -> list[str]:
    return sorted(path.name for path in (place / "checkpoints").iterdir())


def fail_after(count: int, error: Exception, function: Any) -> Any:
    calls = 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > count:
            # As a reader that has taken its place in the order before it finds the damage.
            function(*arguments)
            raise error
        return function(*arguments)

    return failing


def damaged(workspace: Path, place: Path, patch: pytest.MonkeyPatch) -> None:
    error = InputError("a shard is damaged")
    patch.setattr(BatchStream, "next", fail_after(5, error, BatchStream.next))


def broken_evaluation(workspace: Path, place: Path, patch: pytest.MonkeyPatch) -> None:
    error = InputError("held-out text is damaged")
    patch.setattr(EvaluateCallback, "on_step_end", fail_after(4, error, lambda *_: None))


def broken_display(workspace: Path, place: Path, patch: pytest.MonkeyPatch) -> None:
    error = ValueError("a defect")
    original = ProgressCallback.on_step_end
    patch.setattr(ProgressCallback, "on_step_end", fail_after(4, error, original))


@pytest.mark.parametrize("cause", [damaged, broken_evaluation, broken_display])
def test_an_error_between_steps_saves_once(
    cause: Any, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_trainer(workspace, tmp_path / "whole", options(steps=9))
    whole.fit()
    place = tmp_path / "cut"
    with monkeypatch.context() as patch:
        cause(workspace, place, patch)
        with pytest.raises((InputError, ValueError), match=r"damaged|defect"):
            make_trainer(workspace, place, options(steps=9)).fit()
    assert names(place) == ["step-00000005"]
    again = make_trainer(workspace, place, options(steps=9))
    assert again.step == 5
    again.fit()
    assert losses(place) == losses(tmp_path / "whole")
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name]), name


def test_a_state_that_misses_a_step_is_not_saved(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MixtureCallback.on_step_end
    failing = fail_after(4, ValueError("a defect"), original)
    monkeypatch.setattr(MixtureCallback, "on_step_end", failing)
    with pytest.raises(ValueError, match="a defect"):
        make_trainer(workspace, tmp_path, options(save_interval=2)).fit()
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_an_error_inside_a_step_saves_nothing(workspace: Path, tmp_path: Path) -> None:
    class Inside(Callback):
        name: ClassVar[str] = "inside"

        def after_backward(self, trainer: Trainer) -> None:
            if trainer.step == 3:
                raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        make_trainer(workspace, tmp_path, callbacks=[Inside()]).fit()
    assert not (tmp_path / "checkpoints").exists()


def on_ranks(workspace: Path, place: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        damaged(workspace, place, patch)
        try:
            make_trainer(workspace, place, options(steps=9)).fit()
        except InputError as error:
            return str(error)
    return ""


def test_all_ranks_save_and_report_the_cause(workspace: Path, tmp_path: Path) -> None:
    assert set(run_ranks(on_ranks, 2, workspace, tmp_path)) == {"a shard is damaged"}
    assert names(tmp_path) == ["step-00000005"]


def fail_alone(
    workspace: Path, place: Path, failing: int, kind: type[Callback], error: Exception
) -> str:
    """What ends the training on this rank, where `kind` fails on rank `failing` after step 5."""
    context = parallel.init(threads=1)
    with pytest.MonkeyPatch.context() as patch:
        if context.rank == failing:
            patch.setattr(kind, "on_step_end", fail_after(4, error, kind.on_step_end))
        try:
            make_trainer(workspace, place, options(steps=9), context=context).fit()
        except Exception as raised:
            return f"{type(raised).__name__}: {raised}"
    return ""


@pytest.mark.parametrize(
    ("failing", "kind", "error"),
    [
        (0, ProgressCallback, BrokenPipeError(errno.EPIPE, "Broken pipe")),
        (1, MetricsCallback, ValueError("a defect")),
        (1, ProgressCallback, InputError("its own")),
    ],
)
def test_what_fails_on_one_rank_after_a_step_stops_all_and_costs_no_step(
    workspace: Path, tmp_path: Path, failing: int, kind: type[Callback], error: Exception
) -> None:
    told = run_ranks(fail_alone, 2, workspace, tmp_path / "cut", failing, kind, error, timeout=60)
    assert told[failing] == f"{type(error).__name__}: {error}"
    assert told[1 - failing].startswith(f"InputError: rank {failing} ended after step 5, which is")
    assert names(tmp_path / "cut") == ["step-00000005"]
    run_ranks(train_on, 2, workspace, tmp_path / "cut")
    run_ranks(train_on, 2, workspace, tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def train_on(workspace: Path, place: Path) -> None:
    make_trainer(workspace, place, options(steps=9)).fit()


def test_a_save_that_fails_is_not_tried_again(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def full(checkpointer: Checkpointer, *_: Any) -> None:
        tries.append(1)
        raise InputError("no room")

    monkeypatch.setattr(Checkpointer, "_write_shards", full)
    with pytest.raises(InputError, match="no room"):
        make_trainer(workspace, tmp_path, options(save_interval=2)).fit()
    assert len(tries) == 1


def test_a_full_disk_behind_a_librarys_words(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's writer reports a full disk as a position that it did not expect."""

    def unexpected(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    def none_left(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp.FileSystemWriter, "write_data", unexpected)
    with pytest.raises(InputError, match=r"cannot be written: .*unexpected pos 64 vs 0$"):
        make_trainer(workspace, tmp_path / "other", options(steps=1)).fit()
    monkeypatch.setattr("trainer.disk.tempfile.TemporaryFile", none_left)
    with pytest.raises(InputError, match=r"no room for a checkpoint \(the disk is full\)"):
        make_trainer(workspace, tmp_path / "full", options(steps=1)).fit()
    monkeypatch.undo()
    monkeypatch.setattr("trainer.checkpoint.torch.save", unexpected)
    with pytest.raises(InputError, match=r"cannot be written: .*unexpected pos"):
        make_trainer(workspace, tmp_path / "state", options(steps=1)).fit()
