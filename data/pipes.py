"""Pipes that are named where a small file is wanted: one process can read them, and once."""

import re
from pathlib import Path

from data.errors import InputError
from data.machine import group
from data.records import read_text

INTO_A_FILE = "write what comes out of it into a file, and name that"
_OF_A_SHELL = re.compile(r"/(dev|proc/self)/fd/(?!0$)[0-9]+")
_read: dict[Path, str] = {}


def is_of_a_shell(text: str) -> bool:
    """Whether `text` names a pipe as a shell does for <(...), which it opens for the one process
    that it starts."""
    return _OF_A_SHELL.fullmatch(text) is not None


def is_pipe(path: Path) -> bool:
    """Whether something lies at `path` that is neither a file nor a folder."""
    return path.exists() and not path.is_file() and not path.is_dir()


def read_again(path: Path, fix: str | None = None) -> str:
    """As `data.records.read_text`, for a file that each rank reads, and perhaps more than once: the
    text of a pipe is kept. Raises InputError for a pipe where there are several ranks."""
    if not is_pipe(path):
        return read_text(path, fix)
    started = group()
    if started is not None and started.world > 1:
        raise InputError(
            f"{path}: is a pipe, and each of {started.world} ranks would have to read it; "
            f"{INTO_A_FILE}"
        )
    if path not in _read:
        _read[path] = read_text(path, fix)
    return _read[path]
