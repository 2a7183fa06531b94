"""One reader for every JSON file and JSON line: what cannot be used is named with its place."""

import json
import os
from codecs import BOM_UTF8
from collections.abc import Mapping
from io import BufferedReader
from math import isfinite
from pathlib import Path
from typing import Any

from data.errors import InputError, failure

Kind = type | tuple[type, ...]
ABSENT = object()
"""What `lookup` finds where there is nothing, which null is not."""
TWICE = object()
"""What `lookup` finds where a name is given twice, with different values."""

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
    with open_bytes(path) as file:
        return file.read()


def open_bytes(path: Path) -> BufferedReader:
    """As `read_bytes`, for a file that need not be held whole."""
    return open(path, "rb", opener=_without_waiting)


def require_regular(path: Path, fix: str) -> None:
    """Raises InputError naming `fix` where something else than a file lies at `path`, such as a
    pipe: a library that opens it would wait without end. Folders and missing files it refuses
    itself."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: not a regular file; {fix}")


def require_no_mark(path: Path) -> None:
    """Raises InputError where a file begins with a byte-order mark, which this reader passes over
    and the libraries that read the file themselves do not. Other failures are left to them."""
    try:
        with open_bytes(path) as file:
            marked = file.read(len(BOM_UTF8)) == BOM_UTF8
    except OSError:
        return
    if marked:
        raise InputError(
            f"{path}: begins with a byte-order mark, which transformers cannot read; save it as "
            "UTF-8 without one"
        )


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
    record: bool = False,
) -> Any:
    """As `read_json`, of a text that came from `place`.

    A `record` of a user's may hold what is of no concern: an object that gives a name twice is an
    `Ambiguous` one in place of an error, and whole numbers of thousands of digits, which Python
    does not convert, are infinite.
    """
    try:
        try:
            value = (_RECORDS if record else _OBJECTS).decode(_without_mark(text))
        except json.JSONDecodeError:
            raise
        except ValueError:
            if not record:
                raise
            value = json.loads(text, object_pairs_hook=_marked, parse_int=_number)
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


def _number(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def _without_mark(text: str | bytes) -> str:
    return text.decode("utf-8-sig") if isinstance(text, bytes) else text


class Ambiguous(dict[str, Any]):
    """An object in which names are given twice with different values, of which it has the last."""

    twice: frozenset[str]
    """Those names."""


def _marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = frozenset(name for name, value in pairs if values[name] != value)
        if twice:
            values = Ambiguous(values)
            values.twice = twice
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = _marked(pairs)
    if isinstance(values, Ambiguous):
        raise ValueError(f"{min(values.twice)!r} is given twice, with different values")
    return values


# Made once: to make one takes as long as to read a short record.
_OBJECTS = json.JSONDecoder(object_pairs_hook=_unique)
_RECORDS = json.JSONDecoder(object_pairs_hook=_marked)


def is_finite(value: object) -> bool:
    """Whether a JSON value is a number, and one that a float can hold: not NaN, not infinite."""
    try:
        return is_kind(value, float) and isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # a whole number of 400 digits
        return False


def is_kind(value: object, kind: Kind) -> bool:
    """As isinstance, but true and false are no numbers, and a whole number is a number."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


def word_for(value: object) -> str:
    """What a JSON value is, in words: "a list"."""
    kind = dict if isinstance(value, dict) else type(value)
    return _WORDS.get(kind, kind.__name__)


def words_for(kind: Kind) -> str:
    """What a value must be, in words: "a number or null"."""
    return " or ".join(
        _WORDS.get(one, one.__name__) for one in (kind if isinstance(kind, tuple) else (kind,))
    )


def fits(value: object, form: Any) -> bool:
    """Whether a JSON value has a form.

    Args:
        value: the value.
        form: a kind as for `is_kind`; [form], a list of such; {name: form, ...}, an object with at
            least these, of which a name that ends in "?" may be missing; {"*": form}, an object
            whose values all have the form.
    """
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(entry, form[0]) for entry in value)
    if not isinstance(form, dict):
        return is_kind(value, form)
    if not isinstance(value, dict):
        return False
    if "*" in form:
        return all(fits(entry, form["*"]) for entry in value.values())
    for name, wanted in form.items():
        key = name.removesuffix("?")
        if key in value and not fits(value[key], wanted):
            return False
        if key not in value and key == name:
            return False
    return True


def lookup(record: Any, dotted: str) -> Any:
    """What a record holds under `dotted`: a key of that very name, or one inside another."""
    if isinstance(record, list) and record and all(isinstance(pair, tuple) for pair in record):
        record = dict(record)  # a parquet map
    if not isinstance(record, dict):
        return ABSENT
    twice = record.twice if isinstance(record, Ambiguous) else ()
    if dotted in record:
        return TWICE if dotted in twice else record[dotted]
    parts = dotted.split(".")
    for count in range(len(parts) - 1, 0, -1):
        outer = ".".join(parts[:count])
        if outer in twice:
            return TWICE
        if outer in record:
            found = lookup(record[outer], ".".join(parts[count:]))
            if found is not ABSENT:
                return found
    return ABSENT
