"""One unit of tokenizing: a fixed list of files to one shard per domain and split.

A task's output depends on its files and the settings alone, never on which process runs it or
when, so any scheduler may run tasks in any order.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError
from data.files import write_text
from data.manifest import HELD_OUT, TRAIN, ShardRecord, SourceRecord, dtype_for
from data.shards import SUFFIXES, ShardWriter
from data.sources import (
    JSON_SUFFIXES,
    Document,
    Fields,
    format_suffix,
    iterate_documents,
)
from data.tokenizers import Tokenizer

REPORTS = "tasks"
HELD_OUT_KEY = b"held-out"
BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 512
SMALLEST_FILE = {"": 2, ".zst": 20, ".gz": 30, ".parquet": 12}
"""Bytes, by last suffix, below which a file of records cannot hold one."""
FILES_NAMED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What determines a task's output besides its files and tokenizer."""

    fields: Fields
    domains: tuple[str, ...]
    """Domains allowed; empty allows all."""
    held_out: float
    """Fraction of documents set apart."""
    max_bytes_per_domain: int | None
    bytes_per_task: int
    """Input, in bytes, behind one shard per domain."""


@dataclass(frozen=True, slots=True)
class Task:
    """Files to tokenize in order, with their sizes in bytes."""

    index: int
    files: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)

    def key(self, arguments: Mapping[str, Any]) -> str:
        """Identity of the task's output: a finished report with the same key can be reused."""
        return hashlib.sha256(
            json.dumps([self.files, arguments], sort_keys=True).encode()
        ).hexdigest()


@dataclass(slots=True)
class Report:
    """What a finished task made."""

    key: str
    shards: dict[str, dict[str, ShardRecord]] = field(default_factory=dict)
    """By split, then domain."""
    sources: list[SourceRecord] = field(default_factory=list)

    def text_bytes(self) -> Counter[str]:
        """UTF-8 bytes of text per domain, both splits together."""
        total: Counter[str] = Counter()
        for shards in self.shards.values():
            for domain, shard in shards.items():
                total[domain] += shard.text_bytes
        return total

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Report | None":
        """The report, or None where the task has not finished."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return cls(
            key=content["key"],
            shards={
                split: {domain: ShardRecord(**shard) for domain, shard in shards.items()}
                for split, shards in content["shards"].items()
            },
            sources=[SourceRecord(**source) for source in content["sources"]],
        )


def report_path(folder: Path, index: int) -> Path:
    return folder / REPORTS / f"{index:05d}.json"


def plan_tasks(files: list[Path], bytes_per_task: int) -> list[Task]:
    """Groups files, in their order, into tasks of about `bytes_per_task` bytes of input.

    Raises InputError naming all files that are too small to hold a record: each one that is left
    out later moves the files behind it into other tasks.
    """
    sized = [(path, path.stat().st_size) for path in files]
    _refuse_empty_files(sized)
    groups: list[list[tuple[str, int]]] = []
    filled = 0
    for path, size in sized:
        if not groups or filled + size > bytes_per_task:
            groups.append([])
            filled = 0
        groups[-1].append((str(path), size))
        filled += size
    return [Task(index, tuple(group)) for index, group in enumerate(groups)]


def _refuse_empty_files(files: list[tuple[Path, int]]) -> None:
    empty = []
    for path, size in files:
        of_records = format_suffix(path) in (*JSON_SUFFIXES, ".parquet")
        if of_records and size < SMALLEST_FILE.get(path.suffix, SMALLEST_FILE[""]):
            empty.append(f"{path} ({size} bytes)")
    if empty:
        more = f" and {len(empty) - FILES_NAMED} more" if len(empty) > FILES_NAMED else ""
        raise InputError(
            f"{len(empty)} of {len(files)} input files are empty: "
            f"{', '.join(empty[:FILES_NAMED])}{more}; download them again or remove them from the "
            "input"
        )


def is_held_out(text: bytes, fraction: float) -> bool:
    """Decides by a hash of the text, so that equal documents fall on the same side."""
    digest = hashlib.blake2b(text, digest_size=8, key=HELD_OUT_KEY).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


class TaskRun:
    """Runs one task.

    Args:
        task: files to read.
        settings: how to read them.
        tokenizer: makes the ids.
        folder: root of the shards.
        advance: told bytes of input read since the last call.
        used: text bytes per domain that earlier tasks took, where a limit applies.
    """

    def __init__(
        self,
        task: Task,
        settings: Settings,
        tokenizer: Tokenizer,
        folder: Path,
        advance: Callable[[int], None],
        used: Mapping[str, int] | None = None,
    ) -> None:
        self._task = task
        self._settings = settings
        self._tokenizer = tokenizer
        self._folder = folder
        self._advance = advance
        self._used: Counter[str] = Counter(used or {})
        self._writers: dict[tuple[str, str], ShardWriter] = {}
        self._batch: list[tuple[str, str, str, int]] = []
        self._characters = 0
        self._before = [] if not tokenizer.adds_bos else [tokenizer.bos_id]

    def run(self, key: str) -> Report:
        """Writes the shards, then the report that marks the task as finished.

        Raises:
            InputError: bad input; nothing of the task is left behind.
        """
        report = Report(key)
        try:
            for name, size in self._task.files:
                documents = 0 if self._all_full() else self._read(Path(name))
                report.sources.append(SourceRecord(name, size, documents))
            self._flush()
            for (split, domain), writer in sorted(self._writers.items()):
                report.shards.setdefault(split, {})[domain] = writer.commit()
            report.save(report_path(self._folder, self._task.index))
        except BaseException:
            for writer in self._writers.values():
                writer.abort()
            raise
        return report

    def _read(self, path: Path) -> int:
        documents = 0
        for document in iterate_documents(path, self._settings.fields, self._advance):
            self._refuse_unknown(document)
            if self._all_full():
                break
            if self._is_full(document.domain):
                continue
            self._add(document)
            documents += 1
        return documents

    def _add(self, document: Document) -> None:
        encoded = document.text.encode("utf-8")
        self._used[document.domain] += len(encoded)
        split = HELD_OUT if is_held_out(encoded, self._settings.held_out) else TRAIN
        self._batch.append((split, document.domain, document.text, len(encoded)))
        self._characters += len(document.text)
        if self._characters >= BATCH_CHARACTERS or len(self._batch) >= BATCH_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        after = [self._tokenizer.eos_id]
        encoded = self._tokenizer.encode([text for _, _, text, _ in self._batch])
        for (split, domain, _, size), ids in zip(self._batch, encoded, strict=True):
            tokens = np.concatenate([self._before, ids, after]).astype(np.int64)
            self._writer(split, domain).append(tokens, size)
        self._batch.clear()
        self._characters = 0

    def _writer(self, split: str, domain: str) -> ShardWriter:
        if (split, domain) not in self._writers:
            path = f"{split}/{domain}/{self._task.index:05d}"
            dtype = dtype_for(self._tokenizer.vocab_size)
            self._writers[split, domain] = ShardWriter(self._folder, path, dtype)
        return self._writers[split, domain]

    def _refuse_unknown(self, document: Document) -> None:
        allowed = self._settings.domains
        if allowed and document.domain not in allowed:
            raise InputError(
                f"{document.path}:{document.row}: domain {document.domain!r} is not among "
                f"--domains {' '.join(allowed)}; add it there, or keep its files out of --input"
            )

    def _is_full(self, domain: str) -> bool:
        limit = self._settings.max_bytes_per_domain
        return limit is not None and self._used[domain] >= limit

    def _all_full(self) -> bool:
        allowed = self._settings.domains
        return bool(allowed) and all(self._is_full(domain) for domain in allowed)


def is_complete(report: Report, folder: Path, itemsize: int) -> bool:
    """Whether every file of a finished task is still there."""
    for shards in report.shards.values():
        for shard in shards.values():
            paths = [folder / (shard.path + suffix) for suffix in SUFFIXES]
            if not all(path.is_file() for path in paths):
                return False
            if paths[0].stat().st_size != shard.tokens * itemsize:
                return False
    return True
