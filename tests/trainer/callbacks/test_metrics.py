"""Logging waits, or stops with a warning; it ends no training."""

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from tests.distributed import run_ranks
from tests.trainer.tiny import losses, make_trainer, options
from trainer.callbacks.metrics import MetricsCallback, StepLog, truncate_after


class FullDisk:
    """A file that takes `room` bytes, then nothing until `room` grows."""

    def __init__(self, file: Any) -> None:
        self.file, self.room = file, 0

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: self.room]
        self.room -= len(part)
        self.file.write(part)
        return len(part)

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_costs_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = StepLog(tmp_path / "metrics.jsonl")
    log.open(0)
    disk: Any = FullDisk(log._file)
    log._file = disk
    log.write({"step": 1})
    disk.room = 5
    log.write({"step": 2})
    assert capsys.readouterr().err.count("no space left on the disk") == 1
    disk.room = 1000
    log.write({"step": 3})
    disk.room = 0
    log.write({"step": 4})
    log.close()
    assert losses_of(log.path) == [1, 2, 3]
    assert "the last 1 lines could not be written" in capsys.readouterr().err


def losses_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_full_disk_ends_no_training(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StepLog.open

    def opened(log: StepLog, step: int) -> None:
        original(log, step)
        full: Any = FullDisk(log._file)
        log._file = full

    monkeypatch.setattr(StepLog, "open", opened)
    trainer = make_trainer(workspace, tmp_path, options(steps=3))
    trainer.fit()
    assert trainer.step == 3 and losses(tmp_path) == []
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()


def fail(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def break_values(board: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(board.SummaryWriter, "add_scalar", fail)


def break_the_folder(board: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(board.SummaryWriter, "__init__", fail)


def break_the_end(board: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(board.SummaryWriter, "close", fail)


@pytest.mark.parametrize("broken", [break_values, break_the_folder, break_the_end])
def test_tensorboard_warns_and_stops(
    broken: Callable[[Any, pytest.MonkeyPatch], None],
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken(pytest.importorskip("torch.utils.tensorboard"), monkeypatch)
    trainer = make_trainer(workspace, tmp_path, options(steps=3))
    index = next(i for i, c in enumerate(trainer.callbacks) if isinstance(c, MetricsCallback))
    trainer.callbacks[index] = MetricsCallback(tmp_path)
    trainer.fit()
    assert len(losses(tmp_path)) == 3
    assert capsys.readouterr().err.count("TensorBoard gets no more values: no space left") == 1


def test_what_tensorboards_threads_raise_is_one_warning(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter
    monkeypatch.setattr(writer, "write", fail)
    # As outside of pytest, which has a hook of its own.
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    trainer = make_trainer(workspace, tmp_path, options(steps=3))
    index = next(i for i, c in enumerate(trainer.callbacks) if isinstance(c, MetricsCallback))
    trainer.callbacks[index] = MetricsCallback(tmp_path)
    trainer.fit()
    said = capsys.readouterr().err
    assert said.count("TensorBoard gets no more values: no space left") == 1
    assert "Traceback" not in said and len(losses(tmp_path)) == 3


@pytest.mark.parametrize(
    "line",
    [b"5", b"[]", b"null", b'"step"', b'{"step": null}', b'{"step"', b"\xff\xfe", b"[" * 3000, b""],
)
def test_lines_that_are_no_records_are_left_out(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"step": 3}\n')
    truncate_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_link_to_another_place_stays(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "there")
    (tmp_path / "there").write_text('{"step": 1}\n{"step": 2}\n')
    truncate_after(tmp_path / "metrics.jsonl", 1)
    assert (tmp_path / "metrics.jsonl").is_symlink()
    assert (tmp_path / "there").read_text() == '{"step": 1}\n'


def refused(workspace: Path, place: Path) -> str:
    try:
        make_trainer(workspace, place, options(steps=2)).fit()
    except InputError as error:
        return str(error)
    return ""


def test_metrics_that_cannot_be_opened_stop_every_rank(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    messages = run_ranks(refused, 2, workspace, tmp_path)
    assert messages[0] == messages[1] and "metrics.jsonl: is a folder" in messages[0]
