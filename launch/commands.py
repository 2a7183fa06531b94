"""Commands that other commands start: printed so that they can be copied, run, and explained."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data.cli import INTERRUPTED, STOPPED
from data.errors import InputError
from data.log import LEVEL_VARIABLE
from data.machine import PARENT
from trainer.stopping import SECONDS_OF_ONE_REQUEST

ROOT = Path(__file__).resolve().parent.parent


class CommandError(InputError):
    """A command failed; `reason` is what the command itself gave as its error."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def child_environment() -> dict[str, str]:
    """This process's environment, in which Python finds our packages from any folder, and not what
    is called like them in the working folder; a command of ours ends with this process."""
    search = (str(ROOT), os.environ.get("PYTHONPATH"))
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "PYTHONSAFEPATH": "1",
        PARENT: str(os.getpid()),
    }


def typed(path: Path) -> str:
    """A path as a user would type it: relative when it lies below the working folder."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def python() -> str:
    """This interpreter as a word of a command."""
    return typed(Path(sys.executable))


def command(
    words: Sequence[object],
    *,
    makes: Path,
    settings_file: Path | None = None,
    log: Path | None = None,
    running: set[subprocess.Popen[bytes]] | None = None,
) -> None:
    """Print a command so that it can be copied, run it with its output streaming through.

    Args:
        words: program and arguments.
        makes: file the command has made when it is finished.
        settings_file: a shorn.toml to use instead of the user's own; SHORN_* variables are dropped
            with it, so that the command does exactly what it prints, but for SHORN_LOG_LEVEL.
        log: file to which command and output are appended instead.
        running: holds the process while it runs, for whoever wants to stop it.

    Raises InputError when the command fails or stops before `makes` exists; CommandError with what
    it printed to `log` after `error: `, if anything.
    """
    line = [str(word) for word in words]
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            print(f"$ {shlex.join(line)}", file=file)
    else:
        print(f"$ {shlex.join(line)}", flush=True)
    environment = child_environment()
    if settings_file is not None:
        for name in environment.keys() - {LEVEL_VARIABLE, PARENT}:
            if name.startswith("SHORN_"):
                del environment[name]
        settings_file.parent.mkdir(parents=True, exist_ok=True)
        settings_file.touch()
        environment["SHORN_CONFIG"] = str(settings_file)
    running = set() if running is None else running
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("ab")) if log is not None else None
        process = stack.enter_context(
            subprocess.Popen(line, env=environment, stdout=output, stderr=output)
        )
        running.add(process)
        stack.enter_context(interrupted_by_sigterm(process.terminate))
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # The command got the same Ctrl-C, or our SIGTERM, and may be saving a checkpoint.
            outlast(lambda: process.wait() is not None, process.kill)
            raise
        finally:
            running.discard(process)
    if status in (INTERRUPTED, STOPPED):
        raise KeyboardInterrupt
    if status != 0 or not makes.exists():
        raise _failure(status, makes, log)


def outlast(wait: Callable[[], bool], kill: Callable[[], object]) -> None:
    """Waits, after a Ctrl-C, until `wait` says that the processes which got it too have ended.

    They get each further one as well, and it does not end the wait: they would be left behind. One
    that is no repetition calls `kill`.
    """
    begun = time.monotonic()
    while True:
        try:
            if wait():
                return
        except KeyboardInterrupt:
            if time.monotonic() - begun > SECONDS_OF_ONE_REQUEST:
                kill()


@contextlib.contextmanager
def interrupted_by_sigterm(first: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Makes SIGTERM call `first` and then end this process as Ctrl-C does, where signals can be
    handled: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        first()
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _failure(status: int, makes: Path, log: Path | None) -> InputError:
    outcome = f"exited with status {status}" if status else f"stopped before it made {makes}"
    which = "the command above" if log is None else f"the last command in {log}"
    advice = "finished stages are kept: run this again"
    reason = ""
    if log is not None:
        for line in log.read_text("utf-8", errors="replace").splitlines():
            # The log holds earlier commands too, and what they said does not count.
            if line.startswith("$ "):
                reason = ""
            elif match := re.match(r"error(?: \(rank \d+\))?: (.*)", line):
                reason = match[1]
    if not reason:
        return InputError(f"{which} {outcome}; {advice}")
    return CommandError(f"{which} {outcome}: {reason}; {advice}", reason)
