"""What a terminal or pipe cannot show is escaped or passed over instead of ending the command."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def escape_what_streams_lack() -> None:
    """From now on prints letters that the encoding of stdout or stderr lacks as \\u1234.

    Names of domains and files may hold any: also in an ASCII terminal, and where a file's name is
    no UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def passing_over_what_is_not_shown() -> Iterator[None]:
    """Around the tables of what is done and written already: that a terminal was closed, or a log
    is on a full disk, makes no failure of it. Whoever reads a pipe may still end the command."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        pass
