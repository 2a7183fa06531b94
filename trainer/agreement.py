"""Ranks that were started for different work are refused by name, before they wait for each other
or train apart."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data.errors import InputError

MOST = 3
"""Differences that a message names."""
MOST_RANKS = 8
LONGEST = 200
SAME_FILES = (
    "give all of them the same options, and files and folders of the same content (their values "
    "tell contents apart)"
)
"""What helps where what ranks have opened differs."""


def require_same(
    values: Mapping[str, str], gather: Callable[[Any], list[Any]], fix: str, *, first: str = ""
) -> None:
    """Raises InputError on every rank unless all have the same `values`; collective.

    Args:
        values: what this rank was told or has found, in words by name, such as "--lr".
        gather: the values of all ranks, in rank order.
        fix: what helps; ends the message.
        first: the name whose difference explains all others.
    """
    everyone: list[dict[str, str]] = gather(dict(values))
    names = list(dict.fromkeys(name for one in everyone for name in one))
    differing = [name for name in names if len({one.get(name) for one in everyone}) > 1]
    if first in differing:
        differing = [first]
    if not differing:
        return
    told = [_told(name, [one.get(name, "not known") for one in everyone]) for name in differing]
    more = f", and {len(told) - MOST} more" if len(told) > MOST else ""
    raise InputError(
        f"the ranks were started for different work: {', '.join(told[:MOST])}{more}; {fix}"
    )


def _told(name: str, values: Sequence[str]) -> str:
    """Which ranks have which value: "--lr is 0.1 on rank 0 and 0.2 on ranks 1, 2"."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    parts = [f"{_short(value)} on {_named(numbers)}" for value, numbers in ranks.items()]
    return f"{name} is {' and '.join(parts)}"


def _named(ranks: Sequence[str]) -> str:
    more = ", ..." if len(ranks) > MOST_RANKS else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:MOST_RANKS])}{more}"


def _short(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[: LONGEST - 3]}..."
