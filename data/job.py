"""A tokenizing job: plans tasks, runs them on worker processes, publishes the result at once.

While it runs, everything lies in OUTPUT/.partial. Finished tasks found there are reused, so an
interrupted or failed job goes on where it stopped. The manifest appears last, by a rename.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from ctypes import c_bool
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, TypeVar

from data.domain_names import DomainNames
from data.errors import InputError, failure, is_full
from data.files import sync_folder, write_text
from data.hub import was_revision
from data.locks import FILE_NAME as LOCK
from data.locks import folder_lock
from data.log import logger
from data.manifest import (
    FILE_NAME,
    HELD_OUT,
    PACKED,
    TRAIN,
    VERSION,
    Manifest,
    ShardRecord,
    TokenizerRecord,
    differences,
    dtype_for,
    left_out,
)
from data.progress import Progress
from data.records import read_json
from data.shards import SUFFIXES, ShardReader, check_shards, holds_shards
from data.tasks import (
    REPORTS,
    FormerKey,
    Report,
    Settings,
    Task,
    TaskRun,
    counted,
    finished_report,
    plan_tasks,
)
from data.tokenizers import Tokenizer
from data.workers import CONTEXT, worker_pool

PARTIAL = ".partial"
REVISION = "tokenizer_revision"
"""Among the arguments that are kept, what a hub id of the tokenizer stood for. It is only told."""
SETTINGS = "settings.json"
SETTINGS_FIX = "it is written again; finished parts with the same arguments are used all the same"
SECONDS_BETWEEN_UPDATES = 0.2

T = TypeVar("T")


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
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.record = tokenizer.record()
        # Through JSON once, so that it equals what a manifest gives back.
        self.arguments: dict[str, Any] = json.loads(
            json.dumps(settings.arguments() | {"tokenizer": tokenizer.fingerprint})
        )
        # A manifest has the ids in its record of the tokenizer.
        self.known = self.arguments | {"ids": self.record.ids}
        if tokenizer.revision is not None:
            self.arguments[REVISION] = tokenizer.revision

    def run(self, workers: int, verify: bool = False) -> tuple[Manifest, bool]:
        """Runs what is not done yet. Returns the manifest and whether there was anything to do.

        Args:
            workers: processes to run tasks on.
            verify: read all of an output that is there already.

        Raises:
            InputError: bad input, an output made with other arguments or damaged, one that cannot
                be written, a full disk, or another process at work there.
        """
        try:
            self._refuse_foreign_folder()
            # What is finished needs no lock, and may lie where nobody can write.
            finished = None if self.partial.exists() else self._finished(verify)
            if finished is not None:
                return finished, False
            with folder_lock(self.output, "tokenizing", remove=True):
                try:
                    return self._run(workers, verify)
                finally:
                    self._tidy()
        except OSError as error:
            raise InputError(_unwritable(self.output, error)) from None
        except MemoryError:
            raise InputError(
                "not enough memory to tokenize; use fewer --workers, a lower --max-record-mib, or "
                "a machine with more (finished parts are kept: run the same command again)"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                self.output.rmdir()  # only if empty

    def _run(self, workers: int, verify: bool) -> tuple[Manifest, bool]:
        self.partial.mkdir(exist_ok=True)
        self._publish_if_complete()
        finished = self._finished(verify)
        if finished is not None:
            self._drop_leftovers()
            return finished, False
        self._prepare()
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
        foreign = sorted(entry.name for entry in self.output.iterdir() if entry.name != LOCK)
        if not foreign or ours:
            return
        strange = [name for name in foreign if not holds_shards(self.output / name)]
        if strange:
            raise InputError(
                f"--output {self.output} holds files that are not tokens, such as {strange[0]}; "
                "choose a new folder, and keep logs beside it, not in it"
            )
        if not self.overwrite:
            raise InputError(
                f"--output {self.output} holds shards of tokens, and no {FILE_NAME} that says what "
                "they are: copy it from where they came from, or use --overwrite to tokenize again"
            )

    def _finished(self, verify: bool) -> Manifest | None:
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
        known = _known(manifest.arguments, manifest.tokenizer.ids)
        if known == self.known and files == wanted_files:
            # Who finds a damaged shard is told to tokenize again with --overwrite.
            return manifest if self._is_sound(manifest, verify or self.overwrite) else None
        if self.overwrite:
            return None
        wanted = self.known | {"files": _describe_files(wanted_files, files)}
        found = known | {"files": _describe_files(files, wanted_files)}
        raise InputError(
            f"--output {self.output} was made with other arguments: "
            f"{'; '.join(differences(wanted, found))}. {self._then(manifest.arguments, known)}Use "
            "another --output, or --overwrite to replace it"
        )

    def _then(self, found: Mapping[str, Any], known: Mapping[str, Any]) -> str:
        """The hub's state of the tokenizer that made what is there, where it is another now."""
        then = found.get(REVISION)
        moved = any(known.get(key) != self.known[key] for key in ("tokenizer", "ids"))
        return f"{was_revision(str(then), '--tokenizer')}. " if moved and then else ""

    def _is_sound(self, manifest: Manifest, verify: bool) -> bool:
        """Whether the shards of a finished output are there, by their sizes or by every byte.

        Raises InputError if they are not, unless they are to be replaced.
        """
        shards = [
            shard for of in manifest.splits.values() for some in of.values() for shard in some
        ]
        try:
            if verify:
                total = sum(shard.tokens for shard in shards)
                with Progress("verify", total=total, unit="token") as bar:
                    check_shards(self.output, shards, manifest.dtype, bar.update)
            else:
                for shard in shards:
                    for part, numbers in shard.parts(manifest.dtype):
                        ShardReader(self.output, part, numbers, "never")
        except InputError as error:
            if self.overwrite:
                return False
            raise InputError(f"{error} (--overwrite tokenizes again)") from None
        return True

    def _drop_leftovers(self) -> None:
        """Removes reports that a crash right after publishing left."""
        found = self._former_arguments() or self.known
        if _known(found, self.record.ids) == self.known:
            shutil.rmtree(self.partial / REPORTS, ignore_errors=True)

    def _prepare(self) -> None:
        """Clears what an unfinished job with other settings left; keeps what can be reused."""
        found = self._former_arguments() or self.known
        # Where an older version wrote no ids, each part tells its own.
        known = _known(found, self.record.ids)
        if known != self.known:
            started = any(self.partial.glob(f"{REPORTS}/*.json"))
            if started and not self.overwrite:
                raise InputError(
                    f"--output {self.output} holds an unfinished job with other arguments: "
                    f"{'; '.join(differences(self.known, known))}. {self._then(found, known)}Use "
                    "those to finish it, another --output, or --overwrite to drop it"
                )
            self._clear()
        for leftover in self.partial.rglob("*.tmp"):
            leftover.unlink(missing_ok=True)
        write_text(self.partial / SETTINGS, json.dumps(self.arguments | self.known))

    def _former_arguments(self) -> dict[str, Any] | None:
        """Those of the job that left the working folder; None where nothing tells."""
        path = self.partial / SETTINGS
        if not path.exists():
            return None
        try:
            found: dict[str, Any] = read_json(path, SETTINGS_FIX)
            return found
        except InputError as error:
            # Each part says by a key of its own what it was made with.
            logger.warning(str(error))
            if path.is_dir():
                shutil.rmtree(path)
            return None

    def _clear(self) -> None:
        for entry in self.partial.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
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
        names = DomainNames(self.settings.merge_domains)
        limited = self.settings.max_bytes_per_domain is not None
        for task in self.tasks:
            before = bar.completed
            known = self.known | ({"used": used} if limited else {})
            key, former = task.key(known), _former_key(task, known, self.record)
            report = finished_report(task, key, self.partial, self.dtype, bar.update, former)
            if report is None:
                run = TaskRun(task, self.settings, self.tokenizer, self.partial, bar.update, used)
                report = run.run(key)
            used += report.text_bytes()
            names.add_all(report.names)
            reports.append(report)
            bar.update(before + task.bytes - bar.completed)
        return reports

    def _run_on_workers(self, workers: int, bar: Progress) -> list[Report]:
        reports: dict[int, Report] = {}
        names = DomainNames(self.settings.merge_domains)
        counter: Synchronized[int] = CONTEXT.Value("q", 0)
        # Without a lock: a worker that is killed would keep it.
        stop = CONTEXT.RawValue(c_bool, False)
        shared = (self.settings, self.tokenizer, self.partial, counter, stop, os.getpid())
        number = min(workers, len(self.tasks))
        try:
            with worker_pool(number, _start_worker, shared, lambda: _set(stop)) as submit:
                calls = [
                    (task, task.key(self.known), _former_key(task, self.known, self.record))
                    for task in self.tasks
                ]
                futures = submit(_run_on_worker, calls)
                for future in _as_completed(futures, lambda: _show(bar, counter)):
                    index, report = future.result()
                    names.add_all(report.names)
                    reports[index] = report
        except BrokenProcessPool:
            raise InputError(
                "a worker process was killed, most likely for want of memory; use fewer --workers "
                "(finished parts are kept: run the same command again)"
            ) from None
        return [reports[task.index] for task in self.tasks]

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
        chat, (counts, examples) = self.settings.chat, counted(reports)
        if not splits[TRAIN] and not splits[HELD_OUT]:
            raise InputError(
                "the input holds no text at all; check --input and --text-field"
                if chat is None
                else f"no conversation to train on: {'; '.join(left_out(counts, examples))}"
            )
        return Manifest(
            dtype=self.dtype,
            tokenizer=self.record,
            splits=splits,
            sources=[source for report in reports for source in report.sources],
            arguments=self.arguments,
            version=VERSION if chat is None else PACKED,
            chat=None if chat is None else chat.record(),
            counts=counts,
            examples=examples,
        )

    def _publish_if_complete(self) -> None:
        """Goes on with publishing where a crash interrupted it."""
        path = self.partial / FILE_NAME
        if not path.is_file():
            return
        try:
            manifest = Manifest.load(self.partial)
            for split, domains in manifest.splits.items():
                if (self.partial / split).exists():  # not moved yet, and perhaps changed meanwhile
                    shards = itertools.chain(*domains.values())
                    check_shards(self.partial, shards, manifest.dtype, lambda _: None)
        except InputError as error:
            # It is made again from the reports, which go last.
            logger.warning(f"finishing again: {error}")
            path.unlink()
            return
        self._publish()

    def _publish(self) -> None:
        """Moves the finished shards into place, the manifest last; repeatable after a crash."""
        manifest = Manifest.load(self.partial)
        self._drop_strays(manifest)
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

    def _drop_strays(self, manifest: Manifest) -> None:
        """Removes shards of parts that were made again and then had other domains."""
        for split in (TRAIN, HELD_OUT):
            wanted = {
                self.partial / (part.path + suffix)
                for shards in manifest.splits[split].values()
                for shard in shards
                for part, _ in shard.parts(manifest.dtype)
                for suffix in SUFFIXES
            }
            for folder in (self.partial / split).glob("*"):
                for path in set(folder.iterdir()) - wanted:
                    path.unlink()
                with contextlib.suppress(OSError):
                    folder.rmdir()  # only if empty

    def _tidy(self) -> None:
        """Removes the working folder once nothing in it is of use."""
        if not any(self.partial.glob(f"{REPORTS}/*.json")):
            shutil.rmtree(self.partial, ignore_errors=True)


def _known(arguments: Mapping[str, Any], ids: dict[str, Any]) -> dict[str, Any]:
    """By what tokens with these arguments are known; `ids` where they say nothing of them."""
    return {"ids": ids} | {name: value for name, value in arguments.items() if name != REVISION}


def _former_key(task: Task, known: Mapping[str, Any], record: TokenizerRecord) -> FormerKey:
    """What the task's report of an older version is known by."""
    return FormerKey(task.key({k: v for k, v in known.items() if k != "ids"}), record)


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
    stop: c_bool
    parent: int


def _start_worker(
    settings: Settings,
    tokenizer: Tokenizer,
    folder: Path,
    counter: "Synchronized[int]",
    stop: c_bool,
    parent: int,
) -> None:
    # One process per core is parallel enough.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _Worker.settings, _Worker.tokenizer, _Worker.folder = settings, tokenizer, folder
    _Worker.counter, _Worker.stop, _Worker.parent = counter, stop, parent


def _run_on_worker(task: Task, key: str, former: FormerKey) -> tuple[int, Report]:
    settings, tokenizer, folder = _Worker.settings, _Worker.tokenizer, _Worker.folder
    dtype = dtype_for(tokenizer.vocab_size)
    report = finished_report(task, key, folder, dtype, _advance_worker, former)
    if report is None:
        report = TaskRun(task, settings, tokenizer, folder, _advance_worker).run(key)
    else:
        _advance_worker(task.bytes)
    return task.index, report


def _advance_worker(size: int) -> None:
    if _Worker.stop.value or os.getppid() != _Worker.parent:
        raise _Stopped
    with _Worker.counter.get_lock():
        _Worker.counter.value += size


def _show(bar: Progress, counter: "Synchronized[int]") -> None:
    # Without its lock, too.
    bar.update(counter.get_obj().value - bar.completed)


def _set(stop: c_bool) -> None:
    stop.value = True


def _as_completed(futures: set[Future[T]], tick: Callable[[], None]) -> Iterator[Future[T]]:
    """Yields futures as they complete, calling `tick` several times a second."""
    while futures:
        done, futures = wait(futures, SECONDS_BETWEEN_UPDATES, FIRST_COMPLETED)
        tick()
        yield from done


def _unwritable(output: Path, error: OSError) -> str:
    """What to say of a write that failed, or a read of what was written."""
    kept = "then run the same command again (finished parts are kept)"
    if is_full(error):
        return f"no space left on the disk of {output}; free some, {kept}"
    place = f" ({error.filename})" if error.filename else ""
    return f"--output {output}{place}: {failure(error)}, {kept}"
