"""One JSON line per step, and TensorBoard where it is installed."""

import json
import threading
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path
from typing import Any, ClassVar

from data.errors import InputError, failure
from data.files import finite_only, write_bytes
from data.log import logger
from data.records import is_kind, read_bytes, require_regular
from trainer.loop import Callback, Trainer


class StepLog:
    """A file of JSON lines, one for each step that is recorded. It cannot end the training.

    Lines that cannot be written, as on a full disk, wait in memory and are tried again with the
    next.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: RawIOBase | None = None
        self._waiting = b""
        self._warned = False

    def open(self, step: int) -> None:
        """Opens the file after `step` steps, without lines of later ones; a run that begins keeps
        what is there under another name. Raises InputError when that fails."""
        require_regular(self.path, "move it away")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if step == 0 and self.path.is_file() and self.path.stat().st_size:
                old = self.path.replace(self.path.with_name(f"{self.path.name}.old"))
                logger.info(f"note: the run begins; {self.path.name} is kept as {old.name}")
            truncate_after(self.path, step)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"{self.path}: {failure(error)}") from None

    def write(self, record: dict[str, Any], separators: tuple[str, str] | None = None) -> None:
        """Appends a line; nothing where the file is not open."""
        if self._file is not None:
            self._waiting += (
                json.dumps(finite_only(record), separators=separators) + "\n"
            ).encode()
            self._flush()

    def close(self) -> None:
        """Closes the file; says what could not be written."""
        if self._file is not None:
            self._flush()
            if self._waiting:
                lines = self._waiting.count(b"\n")
                logger.warning(f"{self.path}: the last {lines} lines could not be written")
            self._file.close()
            self._file = None

    @property
    def is_open(self) -> bool:
        """Whether this rank writes the file."""
        return self._file is not None

    def _flush(self) -> None:
        assert self._file is not None
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) or 0 :]
        except OSError as error:
            if not self._warned:
                logger.warning(
                    f"{self.path}: {failure(error)}; the training goes on, and the lines are "
                    "written when that is possible again"
                )
            self._warned = True


class MetricsCallback(Callback):
    """Appends the step's record to OUTPUT/metrics.jsonl on rank 0, every `interval` steps.

    After a restart, lines of steps that the checkpoint does not contain are removed, so each step
    appears once. Numbers also go to OUTPUT/tensorboard unless `tensorboard` is False or the package
    is missing.
    """

    name: ClassVar[str] = "metrics"
    alone: ClassVar[bool] = True

    def __init__(self, output: Path, *, interval: int = 1, tensorboard: bool = True) -> None:
        self.log = StepLog(output / "metrics.jsonl")
        self.interval = interval
        self._board_folder = output / "tensorboard" if tensorboard else None
        self._board: Any = None
        self._last = -1

    def on_train_start(self, trainer: Trainer) -> None:
        main = trainer.context.is_main
        trainer.context.raise_on_any_rank(lambda: self.log.open(trainer.step) if main else None)
        self._last = trainer.step
        if main and self._board_folder is not None:
            self._board = _open_board(self._board_folder, trainer.step + 1)

    def on_step_end(self, trainer: Trainer) -> None:
        due = (
            trainer.step % self.interval == 0
            or trainer.step == trainer.config.steps
            or "held_out" in trainer.record
        )
        if due and self.log.is_open:
            self.log.write(trainer.record | trainer.throughput.mfu())
            self._last = trainer.step
            self._draw(trainer)

    def on_error(self, trainer: Trainer) -> None:
        # The step is done and will be saved, though this callback's turn did not come.
        if self._last < trainer.step == trainer.record.get("step"):
            self.on_step_end(trainer)

    def on_exit(self, trainer: Trainer) -> None:
        self.log.close()
        board, self._board = self._board, None
        if board is not None:
            # It may fail, as on a full disk, in any way that its thread found to report.
            try:
                board.flush()
                board.close()
            except Exception as error:
                _warn_of_board(error)

    def _draw(self, trainer: Trainer) -> None:
        if self._board is None:
            return
        try:
            for key, value in _numbers(trainer.record):
                self._board.add_scalar(key, value, trainer.step)
        except Exception as error:
            _warn_of_board(error)
            self._board = None


def truncate_after(path: Path, step: int) -> None:
    """Removes lines of steps after `step`, and what is no record, as a last line that was cut
    short. Raises OSError."""
    if not path.exists():
        return
    kept = []
    for line in read_bytes(path).splitlines():
        try:
            own = json.loads(line)["step"]
            if is_kind(own, int) and own <= step:
                kept.append(line + b"\n")
        # Not UTF-8, not JSON, too deep, or no record.
        except (ValueError, RecursionError, KeyError, TypeError, IndexError):
            continue
    # A link to another disk is the user's, and stays.
    write_bytes(path.resolve(), b"".join(kept))


def _warn_of_board(error: Exception) -> None:
    text = failure(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    logger.warning(f"TensorBoard gets no more values: {text}")


def _quiet_its_threads() -> None:
    """TensorBoard's threads report what they raise to whoever writes next, who says it in a line;
    Python would print a traceback besides."""
    others = threading.excepthook
    if getattr(others, "quiet", False):
        return

    def report(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            others(failed)

    report.quiet = True  # type: ignore[attr-defined]
    threading.excepthook = report


def _open_board(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # A package that is broken, as by another version of protobuf, must not end the run.
    except Exception as error:
        _warn_of_board(error)
        return None
    _quiet_its_threads()
    try:
        return SummaryWriter(str(folder), purge_step=first_step)
    except Exception as error:
        _warn_of_board(error)
        return None


def _numbers(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            yield prefix + key, float(value)
