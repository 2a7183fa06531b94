"""One JSON line per step, and TensorBoard where it is installed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, ClassVar

from data.files import write_text
from trainer.loop import Callback, Trainer


class MetricsCallback(Callback):
    """Appends the step's record to OUTPUT/metrics.jsonl on rank 0, every `interval` steps.

    After a restart, lines of steps that the checkpoint does not contain are removed, so each step
    appears once. Numbers also go to OUTPUT/tensorboard unless `tensorboard` is False or the package
    is missing.
    """

    name: ClassVar[str] = "metrics"

    def __init__(self, output: Path, *, interval: int = 1, tensorboard: bool = True) -> None:
        self.path = output / "metrics.jsonl"
        self.interval = interval
        self._board_folder = output / "tensorboard" if tensorboard else None
        self._file: IO[str] | None = None
        self._board: Any = None
        self._last = -1

    def on_train_start(self, trainer: Trainer) -> None:
        if not trainer.context.is_main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        truncate_after(self.path, trainer.step)
        self._last = trainer.step
        self._file = self.path.open("a", encoding="utf-8")
        if self._board_folder is not None:
            self._board = _open_board(self._board_folder, trainer.step + 1)

    def on_step_end(self, trainer: Trainer) -> None:
        due = (
            trainer.step % self.interval == 0
            or trainer.step == trainer.config.steps
            or "held_out" in trainer.record
        )
        if due and self._file is not None:
            self._file.write(json.dumps(trainer.record | trainer.throughput.mfu()) + "\n")
            self._file.flush()
            self._last = trainer.step
            if self._board is not None:
                for key, value in _numbers(trainer.record):
                    self._board.add_scalar(key, value, trainer.step)

    def on_exit(self, trainer: Trainer) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None


def truncate_after(path: Path, step: int) -> None:
    """Removes lines of steps after `step`, and a last line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))


def _open_board(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step)


def _numbers(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            yield prefix + key, float(value)
