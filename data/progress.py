"""Progress with an estimate of the time left: one line on a terminal, plain lines elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from logging import INFO
from typing import IO, Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from data.log import logger
from data.machine import rank, world

SECONDS_BETWEEN_LINES = 10.0
SHARE_BETWEEN_LINES = 0.05
"""Lines of a long activity come this share of its time so far apart."""
MOST_SECONDS_BETWEEN_LINES = 1800.0
# One unit of work may take minutes; a shorter window would leave no rate to estimate from.
SECONDS_OF_RATE = 1800.0
WIDEST_BAR, NARROWEST_BAR = 24, 3
REFRESHES_PER_SECOND = 4


class Progress(AbstractContextManager["Progress"]):
    """Progress of one activity on stderr: on rank 0 only, and not at log level warning or above.

    An activity within another takes its place on the terminal until it ends. What cannot be
    written (a terminal that was closed, a full disk) ends no work: nothing more is shown. Only a
    pipe that nobody reads any more, as of `head`, raises BrokenPipeError, where `heeds_reader`.

    Args:
        description: what is being done, e.g. "shear".
        total: amount of work in `unit`s; None when unknown. Of no work at all nothing is shown.
        unit: name of one unit; "B" is shown as bytes with binary prefixes.
        completed: units that were done before (a resumed run); they do not enter the rate.
        transient: whether the display vanishes at the end; elsewhere than on a terminal, whether an
            activity too short for a line of its own goes unmentioned.
        stream: default stderr.
        heeds_reader: whether the work ends with whoever reads the pipe. By default that of one
            process does, outside `finishing`: other ranks would wait for one that ends alone.
    """

    def __init__(
        self,
        description: str,
        *,
        total: float | None = None,
        unit: str = "it",
        completed: float = 0,
        transient: bool = False,
        stream: IO[str] | None = None,
        heeds_reader: bool | None = None,
    ) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.completed = completed
        self.transient = transient
        self.enabled = rank() == 0 and logger.isEnabledFor(INFO) and total != 0
        self.fields: dict[str, Any] = {}
        self._heeds_reader = heeds_reader
        self._stream = sys.stderr if stream is None else stream
        self._start = self._last_line = self._updated = time.monotonic()
        self._samples = deque([(self._start, completed)])
        self._printed: float | None = None
        self._live: Live | None = None
        if self.enabled and self._stream.isatty():
            if _shown:
                _shown[-1]._hide()
            _shown.append(self)
            self._show()

    def update(self, advance: float = 1, **fields: Any) -> None:
        """Adds `advance` units of work and shows `fields` behind the rest, as far as they fit."""
        self.completed += advance
        self.fields.update(fields)
        if not self.enabled:
            return
        self._updated = now = time.monotonic()
        if now - self._samples[-1][0] >= 1:
            self._samples.append((now, self.completed))
        while len(self._samples) > 1 and now - self._samples[1][0] >= SECONDS_OF_RATE:
            self._samples.popleft()
        between = min(MOST_SECONDS_BETWEEN_LINES, SHARE_BETWEEN_LINES * (now - self._start))
        if self not in _shown and now - self._last_line >= max(SECONDS_BETWEEN_LINES, between):
            self._print_line()

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self.enabled:
            return
        with self._writing():
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the display; further calls do nothing."""
        if self in _shown:
            self._hide(last=True)
            _shown.remove(self)
            if _shown:
                _shown[-1]._show()
        elif self.enabled and self._printed != self.completed and self._worth_a_line():
            self._print_line()
        self.enabled = False

    def __exit__(self, *_: object) -> None:
        self.close()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        heavy, light = ("=", "-") if options.ascii_only else ("━", "─")
        yield self.line(options.max_width, heavy, light)

    def line(self, width: int, heavy: str = "━", light: str = "─") -> Text:
        """The display in at most `width` columns.

        What stands further back gives way first: the fields from the right, then the bar, the time
        so far, the description. Amount and time left stay.
        """
        now = time.monotonic()
        left = self._seconds_left(now)
        name, amount = self.description, self._amount()
        elapsed = _format_seconds(now - self._start)
        eta = [] if self.total is None else ["ETA " + _format_seconds(left)]
        fixed = [name, amount, elapsed, *eta]
        room = width - cell_len(" ".join(fixed)) - 1
        bar = min(WIDEST_BAR, width // 8, room) if self.total else 0
        if bar < NARROWEST_BAR:
            bar = 0
        if cell_len(" ".join(fixed)) > width:
            fixed.remove(elapsed)
        shorter = width - cell_len(" ".join(fixed[1:])) - 1
        if shorter < cell_len(name):
            fixed[:1] = [set_cell_size(name, shorter)] if shorter > 0 else []
        words = Text(" ".join(fixed), no_wrap=True, overflow="crop", end="")
        if bar and self.total:
            done = round(bar * min(1.0, self.completed / self.total))
            drawn = Text(heavy * done, "bar.complete") + Text(light * (bar - done), "bar.back")
            drawn.no_wrap, drawn.end = True, ""
            words = Text.assemble(f"{name} ", drawn, " ", " ".join(fixed[1:]), end="")
            words.no_wrap, words.overflow = True, "crop"
        for field in _format_fields(self.fields):
            if words.cell_len + 2 + cell_len(field) > width:
                break
            words.append("  " + field)
        words.truncate(width)
        return words

    def _show(self) -> None:
        self._live = Live(
            self,
            console=Console(file=self._stream),
            refresh_per_second=REFRESHES_PER_SECOND,
            # Output that the user pipes elsewhere must not be drawn on the terminal instead.
            redirect_stdout=sys.stdout.isatty(),
        )
        with self._writing():
            self._live.start()

    def _hide(self, *, last: bool = False) -> None:
        assert self._live is not None
        self._live.transient = self.transient or not last
        with self._writing():
            self._live.stop()
        self._live = None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            heeds = self._heeds_reader
            if heeds is None:
                heeds = world() == 1 and not _finishing
            if isinstance(error, BrokenPipeError) and heeds:
                raise
            self.enabled = False

    def _worth_a_line(self) -> bool:
        return not self.transient or self._printed is not None

    def _amount(self) -> str:
        done = _format_amount(self.completed, self.unit)
        total = "" if self.total is None else "/" + _format_amount(self.total, self.unit)
        return done + total + ("" if self.unit == "B" else f" {self.unit}")

    def _seconds_left(self, now: float) -> float | None:
        """By the rate of the last half hour; None while there is none."""
        then, before = self._samples[0]
        done, spent = self.completed - before, self._updated - then
        if self.total is None or done <= 0 or spent <= 0:
            return None
        rest = max(0.0, self.total - self.completed)
        return max(0.0, rest * spent / done - (now - self._updated))

    def _print_line(self) -> None:
        self._last_line = now = time.monotonic()
        self._printed = self.completed
        parts = [f"{time.strftime('%H:%M:%S')}  {self.description}: {self._amount()}"]
        if self.total:
            parts.append(f"{100 * self.completed / self.total:.0f}%")
        parts.append(f"elapsed {_format_seconds(now - self._start)}")
        left = self._seconds_left(now)
        if left is not None and self.total is not None and self.completed < self.total:
            parts.append(f"ETA {_format_seconds(left)}")
        with self._writing():
            print("  ".join([*parts, *_format_fields(self.fields)]), file=self._stream, flush=True)


_shown: list[Progress] = []
"""The activities on the terminal, each within the one before; the last is drawn."""
_finishing: list[None] = []
"""One entry for each `finishing` that is under way."""


@contextmanager
def finishing() -> Iterator[None]:
    """Around what writes the result of long work: nobody has to read its progress."""
    _finishing.append(None)
    try:
        yield
    finally:
        _finishing.pop()


def _format_fields(fields: dict[str, Any]) -> list[str]:
    return [f"{name} {_format_value(value)}" for name, value in fields.items()]


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


def _format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
