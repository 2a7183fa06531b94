"""What progress prints in a terminal, elsewhere, and on other ranks."""

import io

import pytest

from data import progress
from data.log import logger
from data.progress import Progress


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
    assert lines[0] == ("shear: 4/100 step  4%  elapsed 00:12  ETA 04:48  loss 3.22  alive 403/432")
    assert lines[-1].startswith("shear: 20/100 step  20%  elapsed 01:00  ETA 04:00")


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
    assert stream.getvalue() == "read: 3.0 GiB  elapsed 1:01:40\n"


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


def test_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress("shear", total=4, unit="step", stream=stream) as bar:
        bar.update(2, loss=1.5)
        bar.message("[note] kept as it is")
    printed = stream.getvalue()
    assert "shear" in printed and "2/4 step" in printed and "loss 1.5" in printed
    assert "[note] kept as it is" in printed
