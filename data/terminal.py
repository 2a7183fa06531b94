"""What a terminal or pipe cannot show is escaped or passed over instead of ending the command."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def escape_what_streams_lack() -> None:
    """From now on prints letters that the encoding of stdout or stderr lacks as \\u1234.

    Names of domains and files may hold any: also in an ASCII terminal, and where a file's name is
    no UTF-8. A stream that was closed before the command started takes all and shows nothing.
    """
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115, open to the end
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115, open to the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def passing_over_what_is_not_shown() -> Iterator[None]:
    """Around the tables of what is done and written already: that a terminal was closed, a reader
    of a pipe has seen enough, or a log is on a full disk, makes no failure of it."""
    try:
        yield
    except OSError:
        pass
    except SystemExit as leaving:
        if not is_broken_pipe(leaving):
            raise


def is_broken_pipe(error: BaseException) -> bool:
    """Whether nobody reads our output any more; rich leaves the program then, with status 1."""
    cause = error.__context__ if isinstance(error, SystemExit) else error
    return isinstance(cause, BrokenPipeError) and cause.filename is None
