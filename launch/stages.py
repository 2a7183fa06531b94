"""Resumable stages: each runs once for its settings, alone or several at once."""

import hashlib
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import InputError, failure
from data.files import write_json
from data.locks import FILE_NAME as LOCK
from data.log import logger
from data.records import is_finite, read_json
from launch.commands import CommandError, interrupted_by_sigterm, outlast

MARKERS = ".stages"


def require_own(output: Path) -> None:
    """Raises InputError where the folder `output` holds what no stage made: stages begin with empty
    folders of names such as text and tokens, and would remove those of others."""
    if not output.is_dir() or (output / MARKERS).is_dir():
        return
    others = sorted(entry.name for entry in output.iterdir() if entry.name != LOCK)
    if others:
        raise InputError(
            f"--output {output} holds other files ({', '.join(others[:3])}); name a new folder"
        )


class Stages:
    """Runs named stages in order and remembers in OUTPUT/.stages which are finished.

    A stage's identity is the hash of its settings and of the stages it builds on. A finished stage
    with the same identity is skipped; an interrupted one is called again and finds what it left;
    one with another identity starts from an empty folder. In settings, `renamed` gives the former
    names of paths that are named otherwise now.
    """

    def __init__(self, output: Path, number: int, renamed: Sequence[tuple[Any, Any]] = ()) -> None:
        self.markers = output / MARKERS
        self.number = number
        self.renamed = renamed
        self.started = 0
        self.identities: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.reused: set[str] = set()

    def run(
        self,
        name: str,
        *,
        settings: Mapping[str, object],
        after: Sequence[str] = (),
        folder: Path,
        action: Callable[[], None],
    ) -> None:
        """Call `action`, which fills `folder`, unless it finished before with these settings."""
        self.started += 1
        upstream = {stage: self.identities[stage] for stage in after}
        first_named = self._as_first_named(json.loads(json.dumps(dict(settings))))
        content = json.dumps([name, first_named, upstream], sort_keys=True)
        identity = self.identities[name] = hashlib.sha256(content.encode()).hexdigest()
        marker = self.markers / f"{name}.json"
        known = _read_marker(marker)
        title = f"[{self.started}/{self.number}] {name}"
        if known.get("identity") == identity and known.get("finished") and folder.exists():
            self.seconds[name] = known["seconds"]
            self.reused.add(name)
            announce(f"{title}: finished before in {known['seconds']:.0f} s, reused")
            return
        if known and known.get("identity") != identity:
            title += " (anew: other settings made what was there)"
            shutil.rmtree(folder, ignore_errors=True)
        announce(title)
        folder.mkdir(parents=True, exist_ok=True)
        spent = known.get("seconds", 0.0) if known.get("identity") == identity else 0.0
        _write_marker(marker, identity, finished=False, seconds=spent)
        start = time.monotonic()
        try:
            action()
        finally:
            self.seconds[name] = spent + time.monotonic() - start
            _write_marker(marker, identity, finished=False, seconds=self.seconds[name])
        _write_marker(marker, identity, finished=True, seconds=self.seconds[name])
        announce(f"{title}: done in {self.seconds[name]:.0f} s")

    def _as_first_named(self, value: Any) -> Any:
        """`value` of a setting, where names in it are those that the first start gave."""
        for now, first in self.renamed:
            if value == now:
                return first
            if isinstance(now, str) and isinstance(value, str) and value.startswith(f"{now}/"):
                return first + value.removeprefix(now)
        if isinstance(value, dict):
            return {key: self._as_first_named(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [self._as_first_named(entry) for entry in value]
        return value


def _read_marker(path: Path) -> dict[str, Any]:
    """What is known of a stage; nothing where it never ran, or its marker is damaged."""
    if not path.exists():
        return {}
    form = {"identity": str, "finished": bool, "seconds": float}
    try:
        content: dict[str, Any] = read_json(path, "the stage runs again", keys=form)
    except InputError as error:
        logger.warning(str(error))
        return {}
    if not is_finite(content["seconds"]) or content["seconds"] < 0:
        logger.warning(f"{path}: `seconds` is {content['seconds']}; the stage runs again")
        return {}
    return content


def _write_marker(path: Path, identity: str, *, finished: bool, seconds: float) -> None:
    try:
        write_json(path, {"identity": identity, "finished": finished, "seconds": seconds})
    except OSError as error:
        raise InputError(f"{path}: {failure(error)}") from None


def announce(text: str) -> None:
    """Says what a stage does, apart from what its command prints."""
    logger.info(f"\n== {text}")


@dataclass(frozen=True, slots=True)
class Task:
    """One stage and what it waits for."""

    name: str
    kind: str
    """Tasks of one kind take about equally long."""
    settings: Mapping[str, Any]
    after: tuple[str, ...]
    """Names of the tasks it builds on."""
    folder: Path
    action: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """Tasks, and what to make of them."""

    tasks: list[Task]
    """In the order in which they should start."""
    results: Callable[[set[str]], dict[str, Any] | None]
    """The results so far, JSON-able, from the names of the finished tasks; None while there are
    none."""
    show: Callable[[dict[str, Any]], None]
    """Prints results."""


def run_tasks(
    tasks: Sequence[Task],
    stages: Stages,
    *,
    jobs: int,
    running: set[subprocess.Popen[bytes]],
    finished: Callable[[Task], None],
) -> None:
    """Runs all tasks, `jobs` at once and earlier ones first, and calls `finished` after each.

    Where a task fails, the ones that do not build on it still run; then InputError names those that
    failed, and each reason once. On Ctrl-C or SIGTERM the processes in `running` are asked to stop
    and waited for.
    """
    waiting = {task.name: task for task in tasks}
    done: set[str] = set()
    failed: dict[str, list[str]] = {}
    active: dict[Future[None], Task] = {}
    stopping = threading.Event()
    with interrupted_by_sigterm(), ThreadPoolExecutor(jobs) as pool:
        try:
            while True:
                ready = [task for task in waiting.values() if done.issuperset(task.after)]
                for task in ready[: jobs - len(active)]:
                    del waiting[task.name]
                    active[pool.submit(_run, task, stages, stopping)] = task
                if not active:
                    break
                for future in wait(active, return_when=FIRST_COMPLETED).done:
                    task = active.pop(future)
                    try:
                        future.result()
                    except InputError as error:
                        reason = error.reason if isinstance(error, CommandError) else str(error)
                        failed.setdefault(reason, []).append(task.name)
                        announce(f"{task.name} failed: {error}")
                        continue
                    done.add(task.name)
                    finished(task)
                    if task.name not in stages.reused:
                        unfinished = [*waiting.values(), *active.values()]
                        _announce_time_left(tasks, unfinished, stages, jobs)
        except BaseException:
            stopping.set()
            _stop(active, running)
            raise
    if failed:
        number = sum(len(names) for names in failed.values())
        reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in failed.items())
        raise InputError(
            f"{number} of {len(tasks)} stages failed, and {len(waiting)} that build on them "
            f"were left out: {reasons}"
        )


def seconds_left(
    tasks: Sequence[Task], unfinished: Sequence[Task], seconds: Mapping[str, float], jobs: int
) -> float | None:
    """Estimate for `unfinished` tasks from the `seconds` of finished ones of their kinds, and from
    all finished ones where no such is known; None where none is finished."""
    left = {task.name for task in unfinished}
    known: dict[str, list[float]] = {}
    for task in tasks:
        if task.name in seconds and task.name not in left:
            known.setdefault(task.kind, []).append(seconds[task.name])
    everything = [value for values in known.values() for value in values]
    if not everything:
        return None
    total = 0.0
    for task in unfinished:
        values = known.get(task.kind, everything)
        total += sum(values) / len(values)
    return total / min(jobs, max(1, len(unfinished)))


def _run(task: Task, stages: Stages, stopping: threading.Event) -> None:
    if not stopping.is_set():
        stages.run(
            task.name,
            settings=task.settings,
            after=task.after,
            folder=task.folder,
            action=task.action,
        )


def _announce_time_left(
    tasks: Sequence[Task], unfinished: Sequence[Task], stages: Stages, jobs: int
) -> None:
    seconds = seconds_left(tasks, unfinished, stages.seconds, jobs)
    if unfinished and seconds is not None:
        hours, minutes = divmod(round(seconds / 60), 60)
        spelled = f"{hours} h {minutes} min" if hours else f"{minutes} min"
        logger.info(f"{len(unfinished)} of {len(tasks)} stages left, about {spelled}")


def _stop(active: Mapping[Future[None], Task], running: set[subprocess.Popen[bytes]]) -> None:
    asked: set[subprocess.Popen[bytes]] = set()

    def ended() -> bool:
        for process in set(running) - asked:
            process.terminate()
            asked.add(process)
        return not wait(active, timeout=0.2).not_done

    def kill() -> None:
        for process in set(running):
            process.kill()

    outlast(ended, kill)
