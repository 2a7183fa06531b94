"""A tokenizing job: plans tasks, runs them on worker processes, publishes the result at once.

While it runs, everything lies in OUTPUT/.partial. Finished tasks found there are reused, so an
interrupted or failed job goes on where it stopped. The manifest appears last, by a rename.
"""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from data.errors import InputError, require_at_least
from data.files import sync_folder, write_text
from data.manifest import (
    DTYPES,
    FILE_NAME,
    HELD_OUT,
    TRAIN,
    Manifest,
    ShardRecord,
    differences,
    dtype_for,
)
from data.progress import Progress
from data.sources import AUTO
from data.tasks import (
    REPORTS,
    Report,
    Settings,
    Task,
    TaskRun,
    is_complete,
    plan_tasks,
    report_path,
)
from data.tokenizers import Tokenizer

PARTIAL = ".partial"
SETTINGS = "settings.json"
SECONDS_BETWEEN_UPDATES = 0.2

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeConfig:
    """Turns text into token shards per domain.

    An output that exists is reused if it was made from the same files (by path and size) with the
    same arguments. An interrupted run continues where it stopped. The result does not depend on the
    number of workers.
    """

    ESSENTIAL: ClassVar = "input tokenizer output seq-len workers domain-field"

    input: tuple[str, ...]
    """Files, folders or quoted globs ('**' crosses folders): .jsonl .parquet .txt, or any other
    text suffix the glob ends with; .zst and .gz are decompressed."""
    tokenizer: str
    """A sentencepiece .model file, a folder with tokenizer.json or tokenizer.model, or a name on
    the Hugging Face hub."""
    output: Path = Path("runs/tokens")
    """Folder for the shards and manifest.json."""
    seq_len: int = 4096
    """Sample length for the counts in the closing report; the shards fit any length."""
    workers: int | None = None
    """Worker processes; default one per core."""
    domain_field: str = AUTO
    """Where a document's domain is: a dotted field of its record; "folder", the name of the file's
    folder; or "auto", meta.redpajama_set_name for records and the folder for plain text."""
    text_field: str = "text"
    """Dotted field of a record that holds its text."""
    domains: tuple[str, ...] = ()
    """Domains to expect; any other is an error. Default: whatever the input holds."""
    held_out: float = 0.01
    """Fraction of documents set apart for evaluation, chosen by a hash of the text."""
    max_bytes_per_domain: int | None = None
    """Stop each domain at the first document that brings it to this many bytes. Uses one
    process."""
    task_mib: int = 512
    """Input, in MiB, behind one shard per domain: the unit of work that a worker takes."""
    overwrite: bool = False
    """Replace an output made with other arguments."""

    def __post_init__(self) -> None:
        if not self.input:
            raise InputError("--input names no files; give at least one file, folder or glob")
        if not 0 <= self.held_out < 1:
            raise InputError(f"--held-out {self.held_out} is a fraction: use 0 up to, not with, 1")
        require_at_least(self, 1, "workers", "seq_len", "task_mib", "max_bytes_per_domain")


class Job:
    """Tokenizes `files` into the folder `output`.

    Args:
        files: read in this order; with settings and tokenizer they determine every byte written.
        settings: how to read documents and how to group files into tasks.
        tokenizer: makes the ids.
        output: folder for shards and manifest.
        overwrite: replace what other arguments made there.
    """

    def __init__(
        self,
        files: list[Path],
        settings: Settings,
        tokenizer: Tokenizer,
        output: Path,
        overwrite: bool = False,
    ) -> None:
        self.tasks = plan_tasks(files, settings.bytes_per_task)
        self.settings = settings
        self.tokenizer = tokenizer
        self.output = output
        self.overwrite = overwrite
        self.partial = output / PARTIAL
        # Through JSON once, so that it equals what a manifest gives back.
        self.arguments: dict[str, Any] = json.loads(
            json.dumps(asdict(settings) | {"tokenizer": tokenizer.fingerprint})
        )

    def run(self, workers: int) -> tuple[Manifest, bool]:
        """Runs what is not done yet. Returns the manifest and whether there was anything to do.

        Raises:
            InputError: bad input, an output made with other arguments, a full disk.
        """
        self._refuse_foreign_folder()
        self.partial.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if (self.partial / FILE_NAME).is_file():
                self._publish()
            finished = self._finished()
            if finished is not None:
                self._drop_leftovers()
                return finished, False
            self._prepare()
            with _full_disk_explained(self.output):
                reports = self._run_tasks(workers)
                self._manifest(reports).save(self.partial / FILE_NAME)
                self._publish()
            return Manifest.load(self.output), True

    def _refuse_foreign_folder(self) -> None:
        if not self.output.exists():
            return
        if not self.output.is_dir():
            raise InputError(f"--output {self.output} is not a folder; choose another path")
        ours = (self.output / FILE_NAME).is_file() or self.partial.is_dir()
        if not ours and any(self.output.iterdir()):
            raise InputError(
                f"--output {self.output} holds files that are not tokens; choose a new folder"
            )

    def _finished(self) -> Manifest | None:
        """The manifest of an output made with the same arguments, None if there is work to do."""
        if not (self.output / FILE_NAME).is_file():
            return None
        try:
            manifest = Manifest.load(self.output)
        except InputError:
            if self.overwrite:
                return None
            raise
        files = [(source.path, source.bytes) for source in manifest.sources]
        wanted_files = [file for task in self.tasks for file in task.files]
        if manifest.arguments == self.arguments and files == wanted_files:
            return manifest
        wanted = self.arguments | {"files": _describe_files(wanted_files, files)}
        found = manifest.arguments | {"files": _describe_files(files, wanted_files)}
        if self.overwrite:
            return None
        raise InputError(
            f"--output {self.output} was made with other arguments: "
            f"{'; '.join(differences(wanted, found))}. Use another --output, or --overwrite to "
            "replace it"
        )

    def _drop_leftovers(self) -> None:
        """Removes reports that a crash right after publishing left."""
        path = self.partial / SETTINGS
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) == self.arguments:
            shutil.rmtree(self.partial / REPORTS, ignore_errors=True)

    def _prepare(self) -> None:
        """Clears what an unfinished job with other settings left; keeps what can be reused."""
        path = self.partial / SETTINGS
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found != self.arguments:
                started = any(self.partial.glob(f"{REPORTS}/*.json"))
                if started and not self.overwrite:
                    raise InputError(
                        f"--output {self.output} holds an unfinished job with other arguments: "
                        f"{'; '.join(differences(self.arguments, found))}. Use those to finish it, "
                        "another --output, or --overwrite to drop it"
                    )
                self._clear()
        for leftover in self.partial.rglob("*.tmp"):
            leftover.unlink(missing_ok=True)
        write_text(path, json.dumps(self.arguments))

    def _clear(self) -> None:
        for entry in self.partial.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def _run_tasks(self, workers: int) -> list[Report]:
        total = sum(task.bytes for task in self.tasks)
        with Progress("tokenize", total=total, unit="B") as bar:
            # Where a limit applies, what a task may take depends on the tasks before it.
            if workers == 1 or len(self.tasks) == 1 or self.settings.max_bytes_per_domain:
                return self._run_here(bar)
            return self._run_on_workers(workers, bar)

    def _run_here(self, bar: Progress) -> list[Report]:
        reports: list[Report] = []
        used: Counter[str] = Counter()
        limited = self.settings.max_bytes_per_domain is not None
        for task in self.tasks:
            before = bar.completed
            key = task.key(self.arguments | ({"used": used} if limited else {}))
            report = self._reusable(task, key)
            if report is None:
                run = TaskRun(task, self.settings, self.tokenizer, self.partial, bar.update, used)
                report = run.run(key)
            used += report.text_bytes()
            reports.append(report)
            bar.update(before + task.bytes - bar.completed)
        return reports

    def _run_on_workers(self, workers: int, bar: Progress) -> list[Report]:
        keys = {task.index: task.key(self.arguments) for task in self.tasks}
        reports: dict[int, Report] = {}
        for task in self.tasks:
            report = self._reusable(task, keys[task.index])
            if report is not None:
                reports[task.index] = report
                bar.update(task.bytes)
        waiting = [task for task in self.tasks if task.index not in reports]
        if not waiting:
            return [reports[task.index] for task in self.tasks]
        already = bar.completed
        context = multiprocessing.get_context("spawn")
        counter: Synchronized[int] = context.Value("q", 0)
        stop = context.Event()
        pool = ProcessPoolExecutor(
            min(workers, len(waiting)),
            mp_context=context,
            initializer=_start_worker,
            initargs=(self.settings, self.tokenizer, self.partial, counter, stop, os.getpid()),
        )
        try:
            futures = {pool.submit(_run_on_worker, task, keys[task.index]) for task in waiting}
            for future in _as_completed(futures, lambda: _show(bar, already, counter)):
                index, report = future.result()
                reports[index] = report
        except BrokenProcessPool:
            raise InputError(
                "a worker process was killed, most likely for want of memory; use fewer --workers "
                "(finished parts are kept: run the same command again)"
            ) from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        return [reports[task.index] for task in self.tasks]

    def _reusable(self, task: Task, key: str) -> Report | None:
        report = Report.load(report_path(self.partial, task.index))
        itemsize = DTYPES[dtype_for(self.tokenizer.vocab_size)].itemsize
        if report and report.key == key and is_complete(report, self.partial, itemsize):
            return report
        return None

    def _manifest(self, reports: list[Report]) -> Manifest:
        splits: dict[str, dict[str, list[ShardRecord]]] = {}
        for split in (TRAIN, HELD_OUT):
            domains = sorted({name for report in reports for name in report.shards.get(split, {})})
            splits[split] = {
                domain: [
                    report.shards[split][domain]
                    for report in reports
                    if domain in report.shards.get(split, {})
                ]
                for domain in domains
            }
        if not splits[TRAIN] and not splits[HELD_OUT]:
            raise InputError("the input holds no text at all; check --input and --text-field")
        return Manifest(
            dtype=dtype_for(self.tokenizer.vocab_size),
            tokenizer=self.tokenizer.record(),
            splits=splits,
            sources=[source for report in reports for source in report.sources],
            arguments=self.arguments,
        )

    def _publish(self) -> None:
        """Moves the finished shards into place, the manifest last; repeatable after a crash."""
        manifest = Manifest.load(self.partial)
        (self.output / FILE_NAME).unlink(missing_ok=True)
        for split in (TRAIN, HELD_OUT):
            source, target = self.partial / split, self.output / split
            if target.exists() and (source.exists() or not manifest.splits[split]):
                shutil.rmtree(target)
            if source.exists():
                source.replace(target)
        (self.partial / FILE_NAME).replace(self.output / FILE_NAME)
        sync_folder(self.output)
        shutil.rmtree(self.partial / REPORTS)

    def _tidy(self) -> None:
        """Removes the working folder once nothing in it is of use."""
        if not any(self.partial.glob(f"{REPORTS}/*.json")):
            shutil.rmtree(self.partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.output.rmdir()  # only if empty

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.partial / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another process is tokenizing into {self.output}; wait for it, or use "
                    "another --output"
                ) from None
            try:
                yield
            finally:
                self._tidy()


def _describe_files(files: list[tuple[str, int]], others: list[tuple[str, int]]) -> str:
    """Number of files, and the first (with its size) that is not among `others`."""
    known = set(others)
    own = [
        f", among them {path} ({size:,} bytes)" for path, size in files if (path, size) not in known
    ]
    return f"{len(files)} files{own[0] if own else ''}"


class _Stopped(Exception):
    """Another worker failed, or the job was interrupted."""


class _Worker:
    """What a worker process holds between tasks."""

    settings: Settings
    tokenizer: Tokenizer
    folder: Path
    counter: "Synchronized[int]"
    stop: Event
    parent: int


def _start_worker(
    settings: Settings,
    tokenizer: Tokenizer,
    folder: Path,
    counter: "Synchronized[int]",
    stop: Event,
    parent: int,
) -> None:
    # Ctrl-C reaches the whole group; the parent decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process per core is parallel enough.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _Worker.settings, _Worker.tokenizer, _Worker.folder = settings, tokenizer, folder
    _Worker.counter, _Worker.stop, _Worker.parent = counter, stop, parent


def _run_on_worker(task: Task, key: str) -> tuple[int, Report]:
    run = TaskRun(task, _Worker.settings, _Worker.tokenizer, _Worker.folder, _advance_worker)
    return task.index, run.run(key)


def _advance_worker(size: int) -> None:
    if _Worker.stop.is_set() or os.getppid() != _Worker.parent:
        raise _Stopped
    with _Worker.counter.get_lock():
        _Worker.counter.value += size


def _show(bar: Progress, already: float, counter: "Synchronized[int]") -> None:
    bar.update(already + counter.value - bar.completed)


def _as_completed(futures: set[Future[T]], tick: Callable[[], None]) -> Iterator[Future[T]]:
    """Yields futures as they complete, calling `tick` several times a second."""
    while futures:
        done, futures = wait(futures, SECONDS_BETWEEN_UPDATES, FIRST_COMPLETED)
        tick()
        yield from done


@contextlib.contextmanager
def _full_disk_explained(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"no space left on the disk of {output}; free some, then run the same command again "
            "(finished parts are kept)"
        ) from None
