"""Signals that ask a run to stop, while it can save nothing: what is kept is said."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from data.machine import rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""The last comes from a terminal that is closed; a run under nohup ignores it and goes on."""
SECONDS_OF_ONE_REQUEST = 5.0
"""Signals this close together are one request: torchrun repeats a Ctrl-C that the terminal already
sent to every process."""


@contextlib.contextmanager
def kept_is_said(report: Path, *folders: str) -> Iterator[None]:
    """Has each of STOP_SIGNALS say what is kept of the run before it ends the process, as it would
    anyway.

    For all that a run does before its first step and after its last one; in between checkpoints
    are saved (trainer.callbacks.checkpoint). `report` is the file whose presence marks the run as
    finished, `folders` are names of files and folders beside it that an interrupted measurement
    goes on from.
    A signal that is ignored stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # where signals cannot be handled
        return

    def end(received: int, frame: FrameType | None) -> None:
        number = signal.Signals(received)
        if rank() == 0:
            _complain(f"stopped by {number.name}: {_kept(report, folders)}")
        signal.signal(number, previous[number])
        signal.raise_signal(number)

    previous = {s: signal.getsignal(s) for s in STOP_SIGNALS}
    handled = [s for s in STOP_SIGNALS if previous[s] not in (signal.SIG_IGN, None)]
    try:
        for number in handled:
            signal.signal(number, end)
        yield
    finally:
        for number in handled:
            signal.signal(number, previous[number])


def _kept(report: Path, folders: Sequence[str]) -> str:
    """What is left of a run that ends now, and what goes on from there."""
    if report.exists():
        return f"the run is finished, its report is {report}"
    steps = sorted(report.parent.glob("checkpoints/step-*/COMMITTED"))
    found = [report.parent / name for name in folders if _holds(report.parent / name)]
    if not steps and found:
        which = " and ".join(map(str, found))
        return f"what is measured is kept in {which}; the same command goes on from it"
    if not steps:
        return "nothing was saved yet; the same command starts again"
    return f"{steps[-1].parent} is kept; run the same command again to resume"


def _holds(path: Path) -> bool:
    """Whether something is there to go on from: a file, or a folder with something in it."""
    return path.is_file() or any(path.glob("*"))


def _complain(text: str) -> None:
    # Not by `print`, which may have been interrupted.
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))
