"""One reader for every JSON file and JSON line: what cannot be used is named with its place."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import InputError, failure

Kind = type | tuple[type, ...]

_WORDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


def read_text(path: Path, fix: str | None = None) -> str:
    """The UTF-8 text of a file, without a byte-order mark.

    Raises InputError naming the path, the cause and `fix` when it cannot be read.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {failure(error, fix)}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start}); {fix or 'convert it to UTF-8'}"
        ) from None


def read_bytes(path: Path) -> bytes:
    """The content of a file; a pipe that nobody writes into is empty instead of being waited for.

    Raises OSError.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        return file.read()


def _without_waiting(name: str, flags: int) -> int:
    descriptor = os.open(name, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def read_json(
    path: Path, fix: str, *, kind: Kind = dict, keys: Mapping[str, Kind] | None = None
) -> Any:
    """The value in a JSON file.

    Args:
        path: the file.
        fix: what helps when it cannot be used; ends the message.
        kind: what the value must be.
        keys: names that an object must have, each with what its value must be.

    Raises InputError naming path, cause and `fix`: unreadable, not UTF-8, not JSON, or of another
    type than `kind` and `keys` say.
    """
    return parse_json(read_text(path, fix), str(path), fix, kind=kind, keys=keys)


def parse_json(
    text: str | bytes,
    place: str,
    fix: str,
    *,
    kind: Kind = dict,
    keys: Mapping[str, Kind] | None = None,
) -> Any:
    """As `read_json`, of a text that came from `place`."""
    try:
        value = json.loads(text)
    # Deeply nested brackets end in RecursionError, a number of 5,000 digits in ValueError.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON ({error}); {fix}") from None
    if not is_kind(value, kind):
        raise InputError(f"{place}: holds {word_for(value)}, not {words_for(kind)}; {fix}")
    for name, wanted in (keys or {}).items():
        if name not in value:
            raise InputError(f"{place}: `{name}` is missing; {fix}")
        if not is_kind(value[name], wanted):
            raise InputError(
                f"{place}: `{name}` is {word_for(value[name])}, not {words_for(wanted)}; {fix}"
            )
    return value


def is_kind(value: object, kind: Kind) -> bool:
    """As isinstance, but true and false are no numbers, and a whole number is a number."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


def word_for(value: object) -> str:
    """What a JSON value is, in words: "a list"."""
    return _WORDS.get(type(value), type(value).__name__)


def words_for(kind: Kind) -> str:
    """What a value must be, in words: "a number or null"."""
    return " or ".join(
        _WORDS.get(one, one.__name__) for one in (kind if isinstance(kind, tuple) else (kind,))
    )
