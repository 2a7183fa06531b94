"""Commands as a user starts them, on one or two ranks, and what is left of them afterwards."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from torch.distributed import TCPStore

from launch.shorn.ranks import exit_status

ROOT = Path(__file__).resolve().parents[2]
TAG = "CHAOS_RUN"
"""Variable that marks every process which a run started, whatever starts it."""
SECONDS_OF_A_RUN = 120.0
SECONDS_TO_END = 40.0
"""What ranks take at most once one of them has died: as long as their launcher gives them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """What a user types."""

    name: str
    """shear, cpt, finetune or tokenize."""
    words: list[str]
    output: Path
    ranks: int = 1


@dataclass(slots=True)
class Started:
    """A command that runs, or has run."""

    command: Command
    logs: list[Path]
    tag: str
    at: float = field(default_factory=time.time)
    """When, in seconds since 1970."""
    warm: list[ForkServerProcess] = field(default_factory=list)
    cold: subprocess.Popen[bytes] | None = None
    store: TCPStore | None = None

    @property
    def pids(self) -> list[int]:
        """Of the ranks, in their order, or of the one process the user started."""
        if self.cold is not None:
            return [self.cold.pid]
        return [process.pid for process in self.warm if process.pid is not None]

    def descendants(self) -> list[int]:
        """Of all processes that belong to the command and still run."""
        return processes_of(self.tag, {process.pid for process in self.warm})

    @property
    def running(self) -> bool:
        """Whether the processes that the user started have not ended."""
        if self.cold is not None:
            return self.cold.poll() is None
        return any(process.exitcode is None for process in self.warm)

    @property
    def began(self) -> bool:
        """Whether every rank has reached `main`."""
        return all(log.exists() and log.stat().st_size > 0 for log in self.logs)

    def send(self, number: int, pids: list[int] | None = None) -> None:
        """Sends a signal to some of its processes; without `pids` to all that the user started."""
        for pid in self.pids if pids is None else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self) -> int:
        """The exit status, as a launcher gives it. Kills what takes too long and raises then."""
        deadline = time.monotonic() + SECONDS_OF_A_RUN
        ending: float | None = None
        asked = False
        while self.running:
            now = time.monotonic()
            failed = any(process.exitcode for process in self.warm)
            if failed and ending is None:
                ending = now + SECONDS_TO_END
            # A launcher asks the other ranks to end as soon as one of them has failed.
            if failed and not asked:
                asked = True
                self.send(
                    signal.SIGTERM, [p.pid for p in self.warm if p.exitcode is None and p.pid]
                )
            if now > min(deadline, ending or deadline):
                self.kill()
                raise AssertionError(f"{self.command.name} does not end:\n{self.text[-2000:]}")
            time.sleep(0.01)
        if self.cold is not None:
            return self.cold.returncode if self.cold.returncode >= 0 else 128 - self.cold.returncode
        return exit_status([process.exitcode for process in self.warm if process.exitcode])

    def kill(self) -> None:
        """Ends everything at once."""
        for pid in self.descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.warm:
            process.join()
        if self.cold is not None:
            self.cold.wait()

    @property
    def text(self) -> str:
        """What all its processes printed."""
        return "".join(
            log.read_text(encoding="utf-8", errors="replace").removeprefix("started\n")
            for log in self.logs
            if log.exists()
        )


class Machine:
    """Starts commands; `folder` holds their logs and the disk that fills up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0
        self.library = _faulty_disk(folder)
        self._context = get_context("forkserver")
        self._serve()

    def start(
        self,
        command: Command,
        *,
        cold: bool = False,
        disk: int | None = None,
        largest_file: int | None = None,
    ) -> Started:
        """Starts a command and returns at once.

        Args:
            command: what to run.
            cold: as a new Python, and several ranks by `shorn --ranks`.
            disk: bytes that fit on the disk of its output.
            largest_file: bytes of the largest file.
        """
        self.number += 1
        tag = uuid.uuid4().hex
        logs = [
            self.folder / f"{self.number:03d}-{command.name}-{rank}.log"
            for rank in range(1 if cold else command.ranks)
        ]
        started = Started(command, logs, tag)
        if cold:
            assert disk is None and largest_file is None
            words = [sys.executable, "-m", "launch.shorn", command.name, *command.words]
            words += ["--ranks", str(command.ranks)] if command.ranks > 1 else []
            with logs[0].open("wb") as written:
                started.cold = subprocess.Popen(
                    words,
                    cwd=ROOT,
                    env=_environment() | {TAG: tag},
                    stdin=subprocess.DEVNULL,
                    stdout=written,
                    stderr=written,
                    start_new_session=True,
                )
            return started
        environments = self._environments(started)
        place = None if disk is None else (disk, str(command.output))
        from tests.chaos import warm

        for log, environment in zip(logs, environments, strict=True):
            process = self._context.Process(
                target=warm.start,
                args=(command.name, command.words, environment, str(log), place, largest_file),
            )
            process.start()
            started.warm.append(process)
        return started

    def _environments(self, started: Started) -> list[dict[str, str]]:
        if started.command.ranks == 1:
            return [{TAG: started.tag}]
        from launch.shorn.ranks import HOST, _environments

        started.store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        shared = _environments(started.command.ranks, started.store.port)
        return [{TAG: started.tag} | shared[rank] for rank in range(started.command.ranks)]

    def _serve(self) -> None:
        """Starts the process that others are forked from, with the disk that fills up."""
        changes = _environment()
        if self.library is not None:
            changes["LD_PRELOAD"] = str(self.library)
        before = dict(os.environ)
        self._context.set_forkserver_preload(["tests.chaos.warm"])
        try:
            os.environ.update(changes)
            forkserver.ensure_running()
        finally:
            for name in changes:
                os.environ.pop(name)
            os.environ.update(before)


def _environment() -> dict[str, str]:
    return dict(os.environ) | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "100",
    }


def _faulty_disk(folder: Path) -> Path | None:
    """The library that full_disk.c becomes; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    library = folder / "full_disk.so"
    source = Path(__file__).with_name("full_disk.c")
    words = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    done = subprocess.run(words, capture_output=True, check=False)
    return library if done.returncode == 0 else None


def processes_of(tag: str, sessions: set[int | None]) -> list[int]:
    """Processes that carry `tag` in their environment, or belong to one of `sessions`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            # After the command's name, which may hold anything: state, parent, group, session.
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            tagged = f"{TAG}={tag}".encode() in (entry / "environ").read_bytes()
        except OSError:
            continue
        if state != "Z" and (tagged or int(session) in sessions):
            found.append(int(entry.name))
    return found


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Waits for a condition; whether it came true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


@contextlib.contextmanager
def nobody_left(started: Started) -> Iterator[None]:
    """Kills what a failed test leaves running."""
    try:
        yield
    finally:
        if started.running or started.descendants():
            started.kill()
