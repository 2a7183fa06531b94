"""What this process was told to do, which ranks compare where they meet: each may be started by
another machine's launcher, with options, a shorn.toml and variables of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

from data.options import Option

FREE = ("threads", "log_level")
"""Options of which every rank may have a value of its own."""
SHARED = ("output",)
"""Those that name one place for all ranks. Other places may have a name of their own on each
machine: what they hold is compared once it is open."""

_given: dict[str, str] = {}
_flags: set[str] = set()


def note_given(command: str, options: Sequence[Option], values: Mapping[str, Any]) -> None:
    """Keeps the resolved `values` of the `options` of a command, by name, for `given`."""
    _given.clear()
    _flags.clear()
    _flags.update(option.flag for option in options)
    _given["the command"] = command
    for option in options:
        if option.name not in FREE:
            _given[option.place] = _in_words(option, values[option.name])


def given() -> dict[str, str]:
    """The resolved options of this process's command, in words by flag, and its name; empty where
    it was not started by a command line."""
    return dict(_given)


def has_option(flag: str) -> bool:
    """Whether this process's command takes `flag`, so that advice may name it; true where it was
    not started by a command line."""
    return not _flags or flag in _flags


def _in_words(option: Option, value: Any) -> str:
    if value is None:
        return "not given"
    if option.on_disk and option.name not in SHARED:
        several = option.takes_several and len(value) != 1
        return (f"{len(value)} names" if value else "not given") if several else "given"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if option.takes_several else str(value)
