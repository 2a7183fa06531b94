"""One writer for each output folder."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data.errors import InputError, failure
from data.log import logger
from data.machine import rank, tasks_without_ranks
from data.places import replaced_by
from data.records import read_json

FILE_NAME = ".lock"
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def folder_lock(
    folder: Path, doing: str, option: str = "--output", *, remove: bool = False
) -> Iterator[None]:
    """Holds FOLDER/.lock while the block runs; makes the folder where it is missing.

    The system frees the lock when the process ends, however it ends. It holds between the machines
    that share the folder where their file system supports flock; where it does not, a warning says
    so and the block runs.

    Args:
        folder: what the block writes into.
        doing: what the owner does there, for the message to others: "training".
        option: the flag that names the folder.
        remove: leave no .lock behind where the block ends in the ordinary way or by an exception.

    Raises InputError when another process holds it, naming that process, when the folder cannot be
    written, and when it lies where a run would replace it.
    """
    path = folder / FILE_NAME
    _refuse_parts_of_runs(folder, option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Read before it is written: the content is the owner's until the lock is ours.
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        fix = "name another folder" if error.errno in (errno.EEXIST, errno.ENOTDIR) else None
        place = (
            f" ({error.filename})" if str(error.filename) not in map(str, (folder, path)) else ""
        )
        raise InputError(f"{option} {folder}{place}: {failure(error, fix)}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = tasks_without_ranks() or f"wait for it to end, or name another {option}"
            raise InputError(
                f"{option} {folder}: another process is {doing} there{_owner(path)}; {fix}"
            ) from None
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                raise InputError(f"{path}: {failure(error)}") from None
            logger.warning(f"{folder}: this file system has no locks; start no second run there")
        if not _is_there(path, file):
            # Its owner removed it after we had opened it: whoever comes now makes another one.
            raise InputError(f"{option} {folder}: another process has just left; try again")
        with contextlib.suppress(OSError):
            file.truncate(0)
            owner = {"host": socket.gethostname(), "process": os.getpid(), "command": sys.argv[0]}
            # Not by way of the file's buffer, whose rest would fail again when the file is closed.
            os.write(file.fileno(), json.dumps(owner | {"rank": rank()}).encode() + b"\n")
        try:
            yield
        finally:
            if remove:
                with contextlib.suppress(OSError):
                    path.unlink()


def _refuse_parts_of_runs(folder: Path, option: str) -> None:
    run = replaced_by(folder)
    if run is not None:
        raise InputError(
            f"{option} {folder}: is where the run in {run} keeps its own, which it replaces; name "
            "a folder outside of that run"
        )


def _is_there(path: Path, file: IO[str]) -> bool:
    """Whether an open file is the one that lies at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def _owner(path: Path) -> str:
    try:
        owner = read_json(path, "", keys={"process": int, "host": str})
    except InputError:
        return ""
    return f" (process {owner['process']} on {owner['host']})"
