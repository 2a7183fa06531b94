"""What progress prints in a terminal, elsewhere, and on other ranks."""

import errno
import io
import os
import re
from typing import Any

import pytest

from data import progress
from data.log import logger
from data.progress import Progress, finishing
from tests.data.helpers import join


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_plain_lines_come_rarely_and_estimate_the_rest(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("shear", total=100, unit="step", stream=stream) as bar:
        for step in range(20):
            clock.now += 3
            bar.update(loss=3.21987, alive=f"{400 + step}/432")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5  # every 12 s; the last falls on the end
    clock_time, _, first = lines[0].partition("  ")
    assert re.fullmatch(r"\d\d:\d\d:\d\d", clock_time)
    assert first == "shear: 4/100 step  4%  elapsed 00:12  ETA 04:48  loss 3.22  alive 403/432"
    assert lines[-1].endswith(
        "shear: 20/100 step  20%  elapsed 01:00  ETA 04:00  loss 3.22  alive 419/432"
    )


def test_lines_of_a_long_run_come_ever_more_rarely(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("cpt", total=10**6, unit="step", stream=stream) as bar:
        for _ in range(24 * 360):
            clock.now += 10
            bar.update()
    lines = stream.getvalue().splitlines()
    assert 100 < len(lines) < 200
    elapsed = [line.split("elapsed ")[1].split()[0] for line in lines]
    assert elapsed[:3] == ["00:10", "00:20", "00:30"]


def test_the_estimate_follows_the_last_half_hour(clock: Clock) -> None:
    with Progress("cpt", total=10_000, unit="step", stream=io.StringIO()) as bar:
        for seconds in [10] * 1000 + [1] * 2000:
            clock.now += seconds
            bar.update()
        assert "3,000/10,000 step 3:20:00 ETA 1:56:40" in bar.line(160).plain
        clock.now += 40
        assert "ETA 1:56:00" in bar.line(160).plain


def test_work_done_before_does_not_enter_the_rate(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("cpt", total=100, unit="step", completed=90, stream=stream) as bar:
        clock.now += 20
        bar.update()
    assert "91/100 step  91%  elapsed 00:20  ETA 03:00" in stream.getvalue()


def test_bytes_have_prefixes_and_total_may_be_unknown(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("read", unit="B", stream=stream) as bar:
        clock.now += 3700
        bar.update(3 * 1024**3)
    assert stream.getvalue().endswith("  read: 3.0 GiB  elapsed 1:01:40\n")


@pytest.mark.parametrize(("rank", "level"), [("1", "info"), ("0", "warning"), ("0", "error")])
def test_other_ranks_and_quiet_commands_print_nothing(
    rank: str, level: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def printed() -> str:
        stream = io.StringIO()
        with Progress("x", total=2, stream=stream) as bar:
            clock.now += 100
            bar.update()
            bar.message("hello")
        return stream.getvalue()

    assert "hello\n" in printed()
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    before = logger.level
    logger.setLevel(level.upper())
    assert printed() == ""
    logger.setLevel(before)


FIELDS: dict[str, Any] = {
    "loss": "4.654",
    "lr": "1.00e-04",
    "tok/s": "12,198",
    "kl": "1.617",
    "hidden": "364/384",
    "ffn": "1039..1067/1088",
}


@pytest.mark.parametrize("width", range(40, 161))
def test_the_time_left_is_readable_at_every_width(clock: Clock, width: int) -> None:
    """Fixed columns stay, fields leave from the right, whole, and nothing is ever wrapped."""
    for total, seconds, name in (
        (20, 100, "shear"),
        (24_000, 7, "continued pre-training"),
        (24_000, 7, "测量源模型"),
        (10**6, 9, "cpt"),
    ):
        with Progress(name, total=total, unit="step", stream=io.StringIO()) as bar:
            clock.now += seconds
            bar.update(1, **FIELDS)
            line = bar.line(width)
            rest = (total - 1) * seconds
            assert line.cell_len <= width and "\n" not in line.plain
            assert f"1/{total:,} step" in line.plain
            assert re.search(r"ETA (\d+:)?\d\d:\d\d( |$)", line.plain)
            assert (f"ETA {rest // 3600}:" if rest >= 3600 else "ETA 31:40") in line.plain
            left = " ".join(f"{key} {value}" for key, value in FIELDS.items())
            shown = " ".join(line.plain.split("  ")[1:])
            assert left.startswith(shown)
        if name == "shear":
            assert name in line.plain and "─" in line.plain and "01:40" in line.plain
    if width == 160:
        assert "ffn 1039..1067/1088" in line.plain


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_runs_within_another_activity_takes_its_place_and_gives_it_back() -> None:
    stream = Terminal()
    with Progress("cpt", total=4, unit="step", stream=stream) as bar:
        with Progress("evaluate", total=2, transient=True, stream=stream) as inner:
            inner.update(2)
        assert "evaluate" in stream.getvalue()
        start = len(stream.getvalue())
        bar.update(4)
    assert "4/4 step" in stream.getvalue()[start:] and "evaluate" not in stream.getvalue()[start:]


def test_short_work_within_another_leaves_no_line(clock: Clock) -> None:
    for seconds, expected in ((1, 0), (30, 1)):
        stream = io.StringIO()
        with Progress("evaluate", total=1, transient=True, stream=stream) as bar:
            clock.now += seconds
            bar.update()
        assert len(stream.getvalue().splitlines()) == expected


def test_no_work_is_no_progress() -> None:
    for stream in (io.StringIO(), Terminal()):
        with Progress("shear", total=0, unit="step", stream=stream):
            pass
        assert stream.getvalue() == ""


def test_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress("shear", total=4, unit="step", stream=stream) as bar:
        bar.update(2, loss=1.5)
        bar.message("[note] kept as it is")
    printed = stream.getvalue()
    assert "shear" in printed and "2/4 step" in printed and "loss 1.5" in printed
    assert "[note] kept as it is" in printed


class Closed(io.StringIO):
    """A stream as a terminal that was closed, or a log on a full disk, leaves it."""

    def __init__(self, number: int, terminal: bool) -> None:
        super().__init__()
        self.number, self.terminal, self.open = number, terminal, True

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        if not self.open:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_stream_that_takes_nothing_more_ends_no_work(number: int, terminal: bool) -> None:
    stream = Closed(number, terminal)
    with Progress("outer", total=2, stream=stream) as outer:
        with Progress("inner", total=2, stream=stream) as inner:
            inner.update()
            stream.open = False
            inner.update()
            inner.message("text")
        outer.update(2)
    assert outer.completed == 2
    assert not progress._shown


class Unread(io.StringIO):
    """A pipe whose reader has seen enough."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def show_unread(**options: Any) -> None:
    with Progress("x", total=2, stream=Unread(), **options) as bar:
        bar.message("hello")
        bar.update()


def test_work_of_one_process_ends_with_whoever_reads_it() -> None:
    with pytest.raises(BrokenPipeError):
        show_unread()
    with finishing():
        show_unread()
        with pytest.raises(BrokenPipeError):
            show_unread(heeds_reader=True)
    with pytest.raises(BrokenPipeError):
        show_unread()


def test_a_rank_does_not_leave_its_peers_for_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    join(monkeypatch, 0)
    show_unread()
    with pytest.raises(BrokenPipeError):
        show_unread(heeds_reader=True)
