"""Work on a GPU in processes of their own: what crashes or hangs takes only itself down.

A job is a list of units, which a worker (worker.py) works through and answers one by
one. Where it dies or stays silent, that is the result of the unit it was at, and another worker
goes on with the next.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
UNIT_SECONDS = 120.0
"""A unit that takes longer, imports and compilation included, hangs."""
MESSAGE_CHARACTERS = 600

Unit = dict[str, Any]
"""Plain values; "kind" says what the worker does with it."""
Result = dict[str, Any]
"""The unit with "status" (ok, failed, not comparable or skipped), "message", and what it found."""


@dataclass(frozen=True, slots=True)
class Job:
    """Units that one process works through, in order."""

    name: str
    units: tuple[Unit, ...]


def failed(unit: Unit) -> str:
    """Status of a unit that raised or died: only those of others' code may."""
    return "not comparable" if unit.get("comparison") else "failed"


class Budget:
    """Seconds that all jobs together may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()

    def stop(self) -> None:
        """Nothing is left."""
        self._end = -float("inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Runner:
    """How jobs are run."""

    device: str
    budget: Budget
    on_result: Callable[[Result], None]
    """Called with each result as it comes, from several threads."""
    worker: str = "launch.bench_kernels.gpu.worker"
    unit_seconds: float = UNIT_SECONDS

    def run_all(self, jobs: Sequence[Job], at_once: int = 1) -> list[Result]:
        """Results of all units, in the order of the jobs; `at_once` jobs run at the same time."""
        with ThreadPoolExecutor(at_once) as pool:
            try:
                return [result for results in pool.map(self.run, jobs) for result in results]
            except BaseException:
                self.budget.stop()
                raise

    def run(self, job: Job) -> list[Result]:
        """One result for each unit of a job."""
        results: list[Result] = []
        while len(results) < len(job.units):
            waiting = job.units[len(results) :]
            if self.budget.left() <= 0:
                results += [self._report(unit, "skipped", _OUT_OF_TIME) for unit in waiting]
                break
            answers = len(results)
            why = self._work(waiting, results)
            # A worker that ends well before its last unit asks to be started again.
            if len(results) < len(job.units) and (why or len(results) == answers):
                unit = job.units[len(results)]
                status, message = failed(unit), why or "the worker said nothing"
                if self.budget.left() <= 0:
                    status, message = "skipped", _OUT_OF_TIME
                results.append(self._report(unit, status, message))
        return results

    def _work(self, units: Sequence[Unit], results: list[Result]) -> str:
        """Adds the results of one worker; returns why it ended early, or nothing."""
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", self.worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(self.device),
                text=True,
            )
            assert process.stdin is not None and process.stdout is not None
            with process, _Watch(process) as watch:
                watch.start(self._patience())
                # A process that is dead already has a status to report.
                with suppress(BrokenPipeError), process.stdin:
                    json.dump({"device": self.device, "units": units}, process.stdin)
                for line in process.stdout:
                    results.append(json.loads(line))
                    self.on_result(results[-1])
                    watch.start(self._patience())
                # A process may have said everything and still not end.
                process.wait()
            if watch.expired:
                return f"no answer in {self.unit_seconds:.0f} s, compilation included"
            if process.returncode == 0:
                return ""
            errors.seek(0)
            said = errors.read().strip()[-MESSAGE_CHARACTERS:]
            return f"the process ended with status {process.returncode}: {said}"

    def _patience(self) -> float:
        return min(self.unit_seconds, self.budget.left())

    def _report(self, unit: Unit, status: str, message: str) -> Result:
        result = unit | {"status": status, "message": message}
        self.on_result(result)
        return result


_OUT_OF_TIME = "the time budget is spent"


class _Watch:
    """Ends a process that stays silent, and one that nobody listens to any more."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.expired = False
        self._timer: threading.Timer | None = None

    def start(self, seconds: float) -> None:
        """Gives the process this long until the next call."""
        self._stop()
        self._timer = threading.Timer(max(0.0, seconds), self._expire)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> "_Watch":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop()
        if kind is not None:
            self.process.kill()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        self.expired = True
        self.process.kill()


def _environment(device: str) -> dict[str, str]:
    """This process's, with our packages to import; kernels on a GPU are never interpreted."""
    environment = dict(os.environ)
    if device != "cpu":
        environment.pop("TRITON_INTERPRET", None)
    paths = (str(ROOT), environment.get("PYTHONPATH"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment
