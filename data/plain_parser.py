"""Command lines parsed by the standard library, where tyro is not installed."""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any, NoReturn

from data.errors import InputError
from data.options import Option, convert, describe


class Parser(argparse.ArgumentParser):
    """One that raises InputError instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help-all tells what each option takes")


def refuse_unknown(words: list[str], flags: Sequence[str]) -> None:
    """Raises InputError for the first of `words`, which stood where only `flags` may."""
    if words:
        near = difflib.get_close_matches(words[0].partition("=")[0], flags, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help-all lists all options"
        raise InputError(f"unknown option {words[0]}; {hint}")


def parse_plainly(options: Sequence[Option], words: list[str]) -> dict[str, Any]:
    """The value of every option by name, from the flags in `words` or by default.

    Raises:
        InputError: a flag is unknown, has a value that does not fit, or is required and missing.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    for option in options:
        spellings = dict.fromkeys((option.flag, f"--{option.name}"))
        settings: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS}
        if option.metavar:
            # argparse names a positional argument by its destination.
            spellings = {settings.pop("dest"): None}
        if option.type is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif option.takes_several:
            settings["nargs"] = "*"
        parser.add_argument(*spellings, **settings)
    given, unknown = parser.parse_known_intermixed_args(words)
    refuse_unknown(unknown, [option.flag for option in options if not option.metavar])
    return {option.name: _value(option, vars(given)) for option in options}


def _value(option: Option, given: dict[str, Any]) -> Any:
    found = given.get(option.name)
    if found is None or (option.metavar and not found):
        if option.default is MISSING:
            raise InputError(
                f"{option.flag} is missing: give {option.flag} {describe(option.type)}"
            )
        return option.default
    if isinstance(found, bool):
        return found
    words = found if isinstance(found, list) else [found]
    try:
        return convert(words, option.type)
    except ValueError:
        shown = " ".join(words)
        raise InputError(f"{option.flag} {shown}: expected {describe(option.type)}") from None
