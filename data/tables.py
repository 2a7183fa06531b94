"""Tables on a terminal or in a file: no number is cut, however narrow the place is."""

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

BORDER = 3
"""Characters beside a column's text: its padding, and one line."""
FOLDED = 8
"""Least width of a column whose words may be broken."""


def print_table(table: Table, console: Console | None = None) -> None:
    """Prints a table of plain texts whose words stay whole, unless their column folds them.

    A table that cannot be narrow enough for that is wider than the terminal, which then breaks its
    lines; rich would leave out ends of numbers, or all of them.
    """
    console = console or Console()
    sizes = [_widths(column) for column in table.columns]
    widths = [natural for _, natural in sizes]
    least = [least for least, _ in sizes]
    room = console.width - BORDER * len(widths) - 1
    if sum(widths) > room:
        while sum(widths) > max(room, sum(least)):
            spare = [width - low for width, low in zip(widths, least, strict=True)]
            widths[spare.index(max(spare))] -= 1
        for column, width in zip(table.columns, widths, strict=True):
            column.width = width
    before = console.width
    console.width = max(before, sum(widths) + BORDER * len(widths) + 1)
    console.print(table)
    console.width = before


def millions(count: int) -> str:
    """A number of parameters in words, in millions unless it is far below one: "46.5M"."""
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,}"


def _widths(column: Column) -> tuple[int, int]:
    """The least and the natural width of a column, in characters."""
    texts = [str(text) for text in (column.header, *column.cells)]
    lines = [line for text in texts for line in text.splitlines()]
    natural = max(map(cell_len, lines), default=0)
    if column.overflow == "fold":
        return min(natural, FOLDED), natural
    words = lines if column.no_wrap else [word for line in lines for word in line.split()]
    return max(map(cell_len, words), default=0), natural
