"""The exception for mistakes a user can fix, the checks that raise it, failures in words."""

import dataclasses
import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any


class InputError(Exception):
    """Bad input, configuration or environment.

    The message names the offending value, the limit it breaks and the remedy. Commands print it
    without a traceback and exit with status 2 (`data.cli.run`).
    """


class MissingInput(InputError):
    """What a command reads is not where its options say. A finished run needs it no more."""


def require(condition: bool, name: str, value: object, limit: str) -> None:
    """Raises InputError naming the flag of the option `name` unless `condition` holds."""
    if not condition:
        raise InputError(f"--{name.replace('_', '-')} {value}: must be {limit}")


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Puts `option` in front of an InputError that names no option yet."""
    try:
        yield
    except InputError as error:
        if str(error).startswith("--"):
            raise
        raise InputError(f"{option}: {error}") from error


def require_at_least(config: object, limit: float, *names: str, why: str = "") -> None:
    """Raises InputError unless the named options of `config` are `limit` or more.

    Each entry of a tuple counts; None is an option left out.
    """
    for name in names:
        value = getattr(config, name)
        for entry in value if isinstance(value, tuple) else (value,):
            require(entry is None or entry >= limit, name, entry, f"at least {limit}{why}")


def require_threads(threads: int | None) -> None:
    """Raises InputError for --threads beyond what PyTorch can start: it would crash."""
    most = 1024
    limit = f"at least 1, and at most {most}"
    require(threads is None or 1 <= threads <= most, "threads", threads, limit)


LARGEST = 1e30
"""What a number given for an option may come to: single precision ends at 3e38."""


def require_finite(config: Any) -> None:
    """Raises InputError when a number among the fields of the dataclass `config` is not finite, or
    so large that computing with it in single precision is not."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float):
            require(isfinite(value), field.name, value, "a finite number")
            require(abs(value) <= LARGEST, field.name, value, f"at most {LARGEST:g}")


_STORAGE = ("the storage failed", "check the disk or the network mount, then run the command again")
_FULL = ("no space left on the disk, or its quota is used up", "free some space")
_DENIED = ("permission denied", "change its permissions or name another place")
_CAUSES = {
    errno.ENOENT: ("no such file or folder", "correct the path"),
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: ("read-only file system", "name a place that can be written"),
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: ("the file is larger than this file system or `ulimit -f` allows", "raise it"),
    errno.ENOTDIR: ("part of the path is a file, not a folder", "correct the path"),
    errno.EISDIR: ("is a folder, not a file", "name a file"),
    errno.EEXIST: ("exists already, perhaps as a link that leads nowhere", "name another place"),
    errno.ELOOP: ("its symbolic links lead round in a circle", "mend the links"),
    errno.ENAMETOOLONG: ("the name is too long for this file system", "shorten it"),
    errno.EMFILE: ("too many open files", "raise the limit: ulimit -n 65536"),
    errno.ENFILE: ("too many open files on this machine", "close some, or raise fs.file-max"),
    errno.ENOMEM: ("out of memory", "free some memory"),
    errno.EIO: _STORAGE,
    errno.ESTALE: _STORAGE,
    errno.EREMOTEIO: _STORAGE,
    errno.ETIMEDOUT: _STORAGE,
    errno.ENOTCONN: _STORAGE,
}


def failure(error: OSError, fix: str | None = None) -> str:
    """The cause of a failed read or write in words, and what helps: "read-only file system; ...".

    Args:
        error: what the system said. Without an errno, its own text stands for the cause.
        fix: what helps here, in place of the usual remedy for this cause.
    """
    number = error.errno
    cause, usual = _CAUSES.get(number, ("", "")) if number is not None else ("", "")
    cause = cause or error.strerror or str(error) or type(error).__name__
    fix = fix or usual
    return f"{cause}; {fix}" if fix else cause


def is_full(error: OSError) -> bool:
    """Whether there was no room on the disk for what was written."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


NO_WORKING_FOLDER = (
    "the working folder does not exist any more (removed, or replaced by another of the same name);"
    ' go to one that does (cd ~, or cd "$PWD"), then run the command again'
)
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "ALLOC_FAILED",
    "failed to map segment from shared object",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on a GPU; PyTorch says so in a RuntimeError,
    the loader of libraries in an ImportError."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error) if isinstance(error, RuntimeError | ImportError) else ""
    return isinstance(error, MemoryError) or any(mark in text for mark in _OUT_OF_MEMORY)


NEEDED_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "pyarrow", "rich")
"""Without these nothing works: another Python was started than the one that has them."""


def explain(error: Exception) -> str | None:
    """What to tell the user about an error that nobody turned into an InputError where it arose:
    cause, place and remedy. None for what can only be a defect of ours."""
    if is_out_of_memory(error):
        return (
            f"out of memory ({first_line(error)}); ask for less at once (batch, sequence length or "
            "workers: --help-all names the options), or raise the limit that `ulimit -a` or the "
            "container's memory.max shows"
        )
    if isinstance(error, OSError):
        if error.errno == errno.ENOENT and error.filename is None:  # the answer to where we are
            return NO_WORKING_FOLDER
        places = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(places)}: {failure(error)}" if places else failure(error)
    if isinstance(error, ModuleNotFoundError) and error.name in NEEDED_PACKAGES:
        return (
            f"{sys.executable} has no package {error.name}; use the Python in whose environment "
            "Shorn is installed, or install it there (pip install -e .)"
        )
    if isinstance(error, UnicodeDecodeError):
        around = error.object[max(0, error.start - 20) : error.end + 20]
        return (
            f"text is not {error.encoding} (byte {error.start}: {error.reason}, in {around!r}); "
            "convert the file to UTF-8"
        )
    if isinstance(error, UnicodeEncodeError):
        what = error.object[error.start : error.end]
        if error.encoding.startswith("utf"):
            nearby = error.object[max(0, error.start - 20) : error.end + 20]
            return f"{nearby!r}: not UTF-8; rename the file or folder that is called so"
        return f"{what!r} cannot be written as {error.encoding}; set PYTHONUTF8=1"
    if isinstance(error, RecursionError):
        return (
            f"something is nested too deeply ({first_line(error)}): look for a file with thousands "
            "of brackets; --log-level debug shows where"
        )
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
