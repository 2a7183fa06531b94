"""One unit of tokenizing: a fixed list of files to one shard per domain and split.

A task's output depends on its files and the settings alone, never on which process runs it or
when, so any scheduler may run tasks in any order.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.chat import TOO_LONG, Chat, Encoded
from data.conversations import Unfit
from data.domain_names import DomainNames, Original
from data.errors import InputError
from data.files import write_text
from data.formats import Format, format_of
from data.log import logger
from data.manifest import (
    HELD_OUT,
    TRAIN,
    ShardRecord,
    SourceRecord,
    TokenizerRecord,
    dtype_for,
    from_json,
)
from data.packing import Packer
from data.records import read_json
from data.shards import ShardReader, ShardWriter, check_shards
from data.sources import Document, Fields, holds_nothing, iterate_documents, unfit
from data.streams import reading
from data.tokenizers import Tokenizer

READING = 2
"""Raised when the same input would give other tokens than before: parts that an older version
finished are then made again, and finished outputs stay as they are."""
REPORTS = "tasks"
HELD_OUT_KEY = b"held-out"
BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 512
SMALLEST_FILE = {".zst": 20, ".gz": 30, ".parquet": 12}
"""Bytes, by last suffix, below which a file of records cannot hold one; 2 for others."""
SMALL_FILE = 512
"""Bytes of a file that is opened to see whether it holds anything: what packs nothing is small."""
FILES_NAMED = 20
Counts = dict[str, int]
"""Of conversations: those of TAKEN, and records that were left out, by reason."""
TAKEN = {
    "conversations": "those that are in samples",
    "answers": "turns of an assistant in them",
    "counting": "tokens whose loss counts",
    "padding": "tokens that fill samples up",
    "cut": "conversations that lack their last answers, for which a sample has no room",
    "cut answers": "those",
    "unanswered": "conversations without what their user said last, which nobody answers",
}
"""What counts of conversations are called, and what they are of."""


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
    merge_domains: bool = False
    """Take names that become one domain as one. Where it is not set, they are an error."""
    chat: Chat | None = None
    """How conversations become samples; None: documents are plain text."""

    def arguments(self) -> dict[str, Any]:
        """What determines the output, as a manifest keeps it: an option that only refuses or lets
        pass is not in it, and one of later versions only where it is set."""
        fields: dict[str, Any] = {"text": self.fields.text, "domain": self.fields.domain}
        if self.fields.skip_incomplete:
            fields["skip_incomplete"] = True
        chat = {} if self.chat is None else self.chat.arguments()
        return chat | {
            "fields": fields,
            "domains": list(self.domains),
            "held_out": self.held_out,
            "max_bytes_per_domain": self.max_bytes_per_domain,
            "bytes_per_task": self.bytes_per_task,
        }


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
            json.dumps([READING, self.files, arguments], sort_keys=True).encode()
        ).hexdigest()


@dataclass(frozen=True, slots=True)
class FormerKey:
    """What tells the report of an older version: its key did not say how the tokenizer begins and
    ends documents, but the documents do."""

    key: str
    tokenizer: TokenizerRecord

    def check(self, folder: Path, shards: Iterable[ShardRecord], dtype: str) -> None:
        """Raises InputError unless the shards below `folder` are framed as the tokenizer does."""
        now = self.tokenizer
        begin = now.bos_id if now.adds_bos else None
        for shard in shards:
            reader = ShardReader(folder, shard, dtype, "never")
            ids = np.empty(reader.documents()[1], np.int64)
            reader.read_into(0, ids)
            reader.close()
            first = int(ids[0]) if len(ids) > 1 and ids[0] == now.bos_id else None
            if ids[-1] != now.eos_id or first != begin:
                raise InputError("its documents begin or end with another id than now")


@dataclass(slots=True)
class Report:
    """What a finished task made."""

    key: str
    shards: dict[str, dict[str, ShardRecord]] = field(default_factory=dict)
    """By split, then domain."""
    sources: list[SourceRecord] = field(default_factory=list)
    names: dict[str, Original] = field(default_factory=dict)
    """By domain, what the input calls it."""
    counts: Counts = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    """By reason, the first place where a record was left out."""

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
        """The report, or None where the task has not finished.

        Raises InputError when it is damaged.
        """
        if not path.exists():
            return None
        keys = {"key": str, "shards": dict, "sources": list}
        content = read_json(path, "delete it", keys=keys)
        try:
            return from_json(cls, content)
        except InputError as error:
            raise InputError(f"{path}: {error}; delete it") from None


def report_path(folder: Path, index: int) -> Path:
    return folder / REPORTS / f"{index:05d}.json"


def plan_tasks(files: list[Path], bytes_per_task: int) -> list[Task]:
    """Groups files, in their order, into tasks of about `bytes_per_task` bytes of input.

    Raises InputError naming all files that cannot be read, or all those of records that hold none:
    each one that is left out later moves the files behind it into other tasks.
    """
    sized = []
    for path in files:
        with reading(path):
            sized.append((path, path.stat().st_size))
    denied = [str(path) for path, _ in sized if not os.access(path, os.R_OK)]
    if denied:
        raise InputError(
            f"{len(denied)} of {len(files)} input files cannot be read: {_some(denied)}; permission"
            " denied: change their permissions, or remove them from the input"
        )
    empty = [f"{path} ({size} bytes)" for path, size in sized if _is_empty(path, size)]
    if empty:
        raise InputError(
            f"{len(empty)} of {len(files)} input files are empty: {_some(empty)}; download them "
            "again or remove them from the input"
        )
    groups: list[list[tuple[str, int]]] = []
    filled = 0
    for path, size in sized:
        if not groups or filled + size > bytes_per_task:
            groups.append([])
            filled = 0
        groups[-1].append((str(path), size))
        filled += size
    return [Task(index, tuple(group)) for index, group in enumerate(groups)]


def _is_empty(path: Path, size: int) -> bool:
    if format_of(path) is Format.TEXT:
        return False
    if size < SMALLEST_FILE.get(path.suffix.lower(), 2):
        return True
    return format_of(path) is Format.JSON and size <= SMALL_FILE and holds_nothing(path)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - FILES_NAMED} more" if len(names) > FILES_NAMED else ""
    return ", ".join(names[:FILES_NAMED]) + more


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
        self._names = DomainNames(settings.merge_domains)
        self._writers: dict[tuple[str, str], ShardWriter | Packer] = {}
        self._batch: list[tuple[str, Document, int]] = []
        self._characters = 0
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._unfit = 0
        """Conversations of the current file that were read, and then could not be written."""
        self._before = [] if not tokenizer.adds_bos else [tokenizer.bos_id]

    def run(self, key: str) -> Report:
        """Writes the shards, then the report that marks the task as finished.

        Raises:
            InputError: bad input; nothing of the task is left behind.
        """
        report = Report(key)
        try:
            for name, size in self._task.files:
                documents, incomplete = (0, 0) if self._all_full() else self._read(Path(name), size)
                report.sources.append(SourceRecord(name, size, documents, incomplete))
            report.names = self._names.known
            self._flush()
            for (split, domain), writer in sorted(self._writers.items()):
                report.shards.setdefault(split, {})[domain] = writer.commit()
                if isinstance(writer, Packer):
                    self._counts["padding"] += writer.padding
            report.counts, report.examples = dict(self._counts), self._examples
            report.save(report_path(self._folder, self._task.index))
        except BaseException:
            for writer in self._writers.values():
                writer.abort()
            raise
        return report

    def _read(self, path: Path, size: int) -> tuple[int, int]:
        """Numbers of documents taken and of records left out."""
        documents = 0
        incomplete: list[int] = []
        fields = self._settings.fields

        def leave_out(row: int, kind: str) -> None:
            incomplete.append(row)
            if fields.conversations:
                self._note(kind, f"{path}:{row}")

        for document in iterate_documents(path, fields, self._advance, leave_out):
            self._names.add(document.domain, document.name, path, document.row)
            self._refuse_unknown(document)
            if self._all_full():
                break
            if self._is_full(document.domain):
                continue
            self._add(document)
            documents += 1
        if self._settings.chat is not None:
            self._flush()
        unwritten, self._unfit = self._unfit, 0
        with reading(path):
            found = path.stat().st_size
        if found != size:
            raise InputError(
                f"{path} has {found:,} bytes and had {size:,} when the command started; run it "
                "again once nobody writes to the file"
            )
        return documents - unwritten, len(incomplete) + unwritten

    def _add(self, document: Document) -> None:
        encoded = document.text.encode("utf-8")
        self._used[document.domain] += len(encoded)
        split = HELD_OUT if is_held_out(encoded, self._settings.held_out) else TRAIN
        self._batch.append((split, document, len(encoded)))
        self._characters += len(document.text)
        if self._characters >= BATCH_CHARACTERS or len(self._batch) >= BATCH_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        if self._settings.chat is None:
            self._append_texts()
        else:
            self._append_conversations(self._settings.chat)
        self._batch.clear()
        self._characters = 0

    def _append_texts(self) -> None:
        after = [self._tokenizer.eos_id]
        encoded = self._tokenizer.encode([document.text for _, document, _ in self._batch])
        for (split, document, size), ids in zip(self._batch, encoded, strict=True):
            tokens = np.concatenate([self._before, ids, after]).astype(np.int64)
            writer = self._writer(split, document.domain)
            assert isinstance(writer, ShardWriter)
            writer.append(tokens, size)

    def _append_conversations(self, chat: Chat) -> None:
        encoded = chat.encode([document.turns for _, document, _ in self._batch])
        for (split, document, size), found in zip(self._batch, encoded, strict=True):
            if isinstance(found, Unfit):
                place = f"{document.path}:{document.row}"
                # How long a sample is, is the user's choice, and what it leaves out no fault.
                if not self._settings.fields.skip_incomplete and found.kind != TOO_LONG:
                    raise InputError(unfit(place, found))
                self._note(found.kind, place)
                self._unfit += 1
                continue
            writer = self._writer(split, document.domain)
            assert isinstance(writer, Packer)
            writer.append(found.ids, found.counts, size)
            self._count(found)

    def _count(self, taken: Encoded) -> None:
        self._counts["conversations"] += 1
        self._counts["answers"] += taken.answers
        self._counts["counting"] += int(taken.counts.sum())
        self._counts["cut"] += taken.cut > 0
        self._counts["cut answers"] += taken.cut
        self._counts["unanswered"] += taken.unanswered

    def _note(self, kind: str, place: str) -> None:
        """Counts a record that was left out."""
        self._counts[kind] += 1
        self._examples.setdefault(kind, place)

    def _writer(self, split: str, domain: str) -> ShardWriter | Packer:
        if (split, domain) not in self._writers:
            path = f"{split}/{domain}/{self._task.index:05d}"
            dtype, chat = dtype_for(self._tokenizer.vocab_size), self._settings.chat
            self._writers[split, domain] = (
                ShardWriter(self._folder, path, dtype)
                if chat is None
                # Nothing is trained on it, so that any id will do which a model has a row for.
                else Packer(self._folder, path, dtype, chat.seq_len, self._tokenizer.eos_id)
            )
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


def finished_report(
    task: Task,
    key: str,
    folder: Path,
    dtype: str,
    advance: Callable[[int], None],
    former: FormerKey | None = None,
) -> Report | None:
    """The report of a finished task with this key, once all it wrote is checked; else None.

    Args:
        task: the task.
        key: what its report must have.
        folder: root of the shards.
        dtype: token dtype.
        advance: told, after a shard that was checked, that no bytes were read.
        former: what the report of an older version must have instead; None refuses those.
    """
    path = report_path(folder, task.index)
    try:
        report = Report.load(path)
        if report is None:
            return None
        known = former is not None and report.key == former.key
        if report.key != key and not known:
            raise InputError("it is of other input or of another version")
        if tuple((source.path, source.bytes) for source in report.sources) != task.files:
            raise InputError(f"{path} names other files than its part")
        check_shards(folder, shards_of(report), dtype, lambda _: advance(0))
        if former is not None and known:
            former.check(folder, shards_of(report), dtype)
    except InputError as error:
        logger.warning(f"part {task.index} is made again: {str(error).partition('; ')[0]}")
        return None
    return report


def shards_of(report: Report) -> Iterable[ShardRecord]:
    return (shard for shards in report.shards.values() for shard in shards.values())


def counted(reports: Iterable[Report]) -> tuple[Counts, dict[str, str]]:
    """The counts of all reports together, and the first example of each reason."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for report in reports:
        counts.update(report.counts)
        examples = report.examples | examples
    return dict(counts), examples
