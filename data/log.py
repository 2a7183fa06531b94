"""The logger of every command: what happens goes to stdout, warnings and errors to stderr.

Rank 0 speaks for all: the other ranks are quiet but for errors, or show everything, each line with
its rank, at level "debug".
"""

import contextlib
import logging
import os
import sys
from typing import IO

from data.errors import failure
from data.machine import rank

LEVELS = ("debug", "info", "warning", "error")
LEVEL_VARIABLE = "SHORN_LOG_LEVEL"

logger = logging.getLogger("shorn")


def set_level(name: str) -> None:
    """Shows messages of level `name` (one of LEVELS) and above, also in processes started later."""
    os.environ[LEVEL_VARIABLE] = name
    logger.setLevel(name.upper())


def level() -> str:
    """The level whose messages, and those above it, are shown: one of LEVELS."""
    return logging.getLevelName(logger.level).lower()


class _Handler(logging.Handler):
    """Writes to the streams that are in place when a message comes, as `print` does.

    What cannot be written (a full disk, a terminal that was closed) ends no run: stderr is told
    once, if it still takes anything.
    """

    _complained = False

    def emit(self, record: logging.LogRecord) -> None:
        own = rank()
        if own and record.levelno < logging.ERROR and logger.level > logging.DEBUG:
            return
        label = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        tag = f"[rank {own}] " if own else ""
        stream: IO[str] = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        text = f"{tag}{label}{record.getMessage()}"
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError as error:
            plain = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            print(plain, file=stream, flush=True)
        except OSError as error:
            if not self._complained:
                self._complained = True
                with contextlib.suppress(OSError):
                    name = "stderr" if stream is sys.stderr else "stdout"
                    complaint = f"warning: {name} cannot be written ({failure(error, '')})"
                    print(complaint, file=sys.stderr, flush=True)


logger.addHandler(_Handler())
logger.propagate = False
_named = os.environ.get(LEVEL_VARIABLE, "info")
logger.setLevel((_named if _named in LEVELS else "info").upper())
