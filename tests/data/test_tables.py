"""Tables keep every number, however narrow the terminal is."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from data.tables import print_table

NUMBERS = ("1,234,567", "0.9871", "89,012")


def printed(width: int, name: str, overflow: str) -> str:
    table = Table()
    table.add_column("domain", no_wrap=overflow != "fold", overflow=overflow)  # type: ignore[arg-type]
    for heading in ("target tokens", "bytes/token", "held-out tokens"):
        table.add_column(heading, justify="right")
    table.add_row(name, *NUMBERS)
    console = Console(file=io.StringIO(), width=width)
    print_table(table, console)
    assert console.width == width and isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [1, 20, 40, 60, 80, 200])
@pytest.mark.parametrize("name", ["c4", "a-long-name-of-a-domain-with-many-words" * 2, "新闻2023"])
@pytest.mark.parametrize("overflow", ["ellipsis", "fold"])
def test_no_number_is_cut(width: int, name: str, overflow: str) -> None:
    text = printed(width, name, overflow)
    assert all(number in text for number in NUMBERS) and "…" not in text
    assert name in text or overflow == "fold"


def test_a_table_that_fits_after_breaking_headings_is_as_wide_as_the_terminal() -> None:
    assert max(map(len, printed(50, "c4", "ellipsis").splitlines())) == 50
