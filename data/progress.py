"""Progress with an estimate of the time left: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from contextlib import AbstractContextManager
from logging import INFO
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from data.log import logger
from data.machine import rank

SECONDS_BETWEEN_LINES = 10.0
# One unit of work may take minutes; a shorter window would leave no rate to estimate from.
SECONDS_OF_RATE = 1800.0


class Progress(AbstractContextManager["Progress"]):
    """Progress of one activity on stderr: on rank 0 only, and not at log level warning or above.

    Args:
        description: what is being done, e.g. "shear".
        total: amount of work in `unit`s; None when unknown.
        unit: name of one unit; "B" is shown as bytes with binary prefixes.
        completed: units that were done before (a resumed run); they do not enter the rate.
        stream: default stderr.
    """

    def __init__(
        self,
        description: str,
        *,
        total: float | None = None,
        unit: str = "it",
        completed: float = 0,
        stream: IO[str] | None = None,
    ) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.completed = completed
        self.enabled = rank() == 0 and logger.isEnabledFor(INFO)
        self.fields: dict[str, Any] = {}
        self._stream = sys.stderr if stream is None else stream
        self._first = completed
        self._start = self._last_line = time.monotonic()
        self._printed: float | None = None
        self._bar: RichProgress | None = None
        if self.enabled and self._stream.isatty():
            self._bar = _make_bar(Console(file=self._stream))
            self._task = self._bar.add_task(
                description, total=total, completed=int(completed), amount="", fields=""
            )
            self._bar.start()

    def update(self, advance: float = 1, **fields: Any) -> None:
        """Adds `advance` units of work and shows `fields` beside the bar."""
        self.completed += advance
        self.fields.update(fields)
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=self.completed,
                amount=self._amount(),
                fields=_format_fields(self.fields),
            )
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the display; further calls do nothing."""
        if self.enabled and self._bar is not None:
            self._bar.stop()
        elif self.enabled and self._printed != self.completed:
            self._print_line()
        self.enabled = False

    def __exit__(self, *_: object) -> None:
        self.close()

    def _amount(self) -> str:
        done = _format_amount(self.completed, self.unit)
        total = "" if self.total is None else "/" + _format_amount(self.total, self.unit)
        return done + total + ("" if self.unit == "B" else f" {self.unit}")

    def _print_line(self) -> None:
        self._last_line = now = time.monotonic()
        self._printed = self.completed
        elapsed = now - self._start
        parts = [f"{self.description}: {self._amount()}"]
        if self.total:
            parts.append(f"{100 * self.completed / self.total:.0f}%")
        parts.append(f"elapsed {_format_seconds(elapsed)}")
        done = self.completed - self._first
        if self.total is not None and done > 0 and self.completed < self.total:
            parts.append(f"ETA {_format_seconds(elapsed / done * (self.total - self.completed))}")
        if self.fields:
            parts.append(_format_fields(self.fields))
        print("  ".join(parts), file=self._stream, flush=True)


def _make_bar(console: Console) -> RichProgress:
    return RichProgress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[fields]}", markup=False),
        console=console,
        speed_estimate_period=SECONDS_OF_RATE,
        # Output that the user pipes elsewhere must not be drawn on the terminal instead.
        redirect_stdout=sys.stdout.isatty(),
    )


def _format_fields(fields: dict[str, Any]) -> str:
    return "  ".join(f"{name} {_format_value(value)}" for name, value in fields.items())


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _format_amount(amount: float, unit: str) -> str:
    if unit != "B":
        return f"{amount:,.0f}"
    for prefix in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if prefix == "B" else f"{amount:.1f} {prefix}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def _format_seconds(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
