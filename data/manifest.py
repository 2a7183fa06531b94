"""The manifest: what a folder of tokens holds, and the identity of its data."""

import contextlib
import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, cast

import numpy as np

from data.errors import InputError, failure
from data.files import write_json
from data.places import EMPTY_FOLDER, odd_name, what_is
from data.records import is_kind, read_json, word_for, words_for

VERSION = 1
PACKED = 2
"""Version of a folder of conversations: what reads version 1 alone would train on every token of
it, and refuses it."""
FILE_NAME = "manifest.json"
DAMAGED = "copy it again, or tokenize again with --overwrite"
FIELD_OPTIONS = {
    "text": "--text-field",
    "domain": "--domain-field",
    "skip_incomplete": "--skip-incomplete",
}
"""What the names of a record's fields are called on the command line."""
ID_WORDS = {
    "eos_id": "id that --tokenizer ends documents with (eos_token)",
    "bos_id": "id that --tokenizer begins documents with",
    "vocab_size": "number of ids of --tokenizer",
    "probe": "ids that --tokenizer gives the same text",
}
"""What `TokenizerRecord.ids` are called in messages."""
TRAIN = "train"
HELD_OUT = "held_out"
MARKS = "uint8"
"""Type of the numbers in a shard of marks."""
# 32-bit ids are signed because the index format has no unsigned 32-bit type.
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "int32": np.dtype("<i4")}

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class TokenizerRecord:
    """The tokenizer that made the tokens."""

    kind: str
    """"sentencepiece" or "huggingface"."""
    fingerprint: str
    """sha256 of its model file."""
    vocab_size: int
    """Number of ids; every id is below it."""
    bos_id: int | None
    eos_id: int
    adds_bos: bool
    """Whether each document starts with BOS; each ends with EOS in any case."""
    probe: list[int]
    """Ids of `data.tokenizers.PROBE_TEXT`: two tokenizers that agree on it are interchangeable."""

    @property
    def ids(self) -> dict[str, Any]:
        """What decides the ids of a document besides the model file: settings beside it."""
        return {
            "eos_id": self.eos_id,
            "bos_id": self.bos_id if self.adds_bos else None,
            "vocab_size": self.vocab_size,
            "probe": hashlib.sha256(json.dumps(self.probe).encode()).hexdigest()[:16],
        }


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One shard: `path` + .bin (tokens), .idx (document bounds), .crc (block checksums)."""

    path: str
    """Relative to the manifest's folder, without suffix, separated by "/"."""
    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents before tokenizing."""
    crc_sha256: str
    """sha256 of the .crc file, which ties the tokens' content to this record."""
    idx_sha256: str
    marks: "ShardRecord | None" = None
    """In a folder of conversations, the shard of as many bytes that say which tokens count
    (data.packing). Its own marks are None."""

    def parts(self, dtype: str) -> "list[tuple[ShardRecord, str]]":
        """The shards that it consists of, each with the type of its numbers; `dtype` is that of
        tokens."""
        return [(self, dtype), *([] if self.marks is None else [(self.marks, MARKS)])]


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One input file."""

    path: str
    bytes: int
    documents: int
    """Those that have text and were taken."""
    incomplete: int = 0
    """Records that --skip-incomplete left out."""


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """How conversations became samples."""

    template: str
    """The chat template, in Jinja."""
    template_name: str
    """What it was called: a name that --chat-template takes, a file, or the tokenizer's own."""
    end_of_turn: int | None
    """The special token that ends an answer; None where none does."""
    seq_len: int
    """Tokens per sample: no conversation lies in two of them."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of a token folder.

    `splits[split][domain]` lists the shards of a domain in input order.
    """

    dtype: str
    tokenizer: TokenizerRecord
    splits: dict[str, dict[str, list[ShardRecord]]]
    sources: list[SourceRecord]
    arguments: dict[str, Any]
    """Settings that determined the content; a rerun with equal ones reuses it."""
    version: int = VERSION
    chat: ChatRecord | None = None
    """In a folder of conversations (version 2), how they were written and packed."""
    counts: dict[str, int] = field(default_factory=dict)
    """Of conversations, by kind: what was taken and cut (data.tasks.TAKEN), and what was left out
    for what reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """By reason, the first place in the input where a record was left out."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of what defines the data.

        Where the data came from (`sources`, `arguments`) is left out: equal tokens from a moved
        input folder are the same data.
        """
        content = {
            "version": self.version,
            "dtype": self.dtype,
            "tokenizer": _plain(self.tokenizer),
            "splits": {
                split: {
                    domain: [_plain(shard) for shard in shards] for domain, shards in of.items()
                }
                for split, of in self.splits.items()
            },
        }
        if self.chat is not None:
            content["chat"] = dataclasses.asdict(self.chat)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def domains(self, split: str) -> list[str]:
        """Domains that have at least one shard in `split`."""
        return list(self.splits.get(split, {}))

    def tokens(self, split: str) -> dict[str, int]:
        """Tokens per domain of `split`."""
        shards = self.splits.get(split, {})
        return {domain: sum(shard.tokens for shard in shards[domain]) for domain in shards}

    def save(self, path: Path) -> None:
        """Writes the manifest atomically."""
        content = dataclasses.asdict(self)
        # Versions that do not know these keys refuse them.
        for source in content["sources"]:
            if not source["incomplete"]:
                del source["incomplete"]
        for name in ("chat", "counts", "examples"):
            if not content[name]:
                del content[name]
        write_json(path, _without_none(content, "marks"))

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Reads and checks `directory`/manifest.json.

        Raises:
            InputError: the folder or file is missing, unreadable, damaged, or of another version.
        """
        path = directory / FILE_NAME
        try:
            found = path.exists()
        except OSError as error:
            raise InputError(f"{path}: {failure(error)}") from None
        if not found:
            raise InputError(why_no_tokens(directory))
        content = read_json(path, DAMAGED, keys={"version": (int, str, float)})
        if content["version"] not in (VERSION, PACKED):
            raise InputError(
                f"{path} has version {content['version']!r}, this program reads {VERSION} and "
                f"{PACKED}; tokenize again"
            )
        try:
            manifest = from_json(cls, content)
            manifest.validate()
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}; {DAMAGED}") from None
        return manifest

    def validate(self) -> None:
        """Raises InputError if the records contradict each other."""
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.tokenizer.vocab_size - 1 > np.iinfo(DTYPES[self.dtype]).max:
            raise InputError(f"{self.tokenizer.vocab_size} ids do not fit into {self.dtype}")
        if (self.chat is not None) != (self.version == PACKED):
            raise InputError(f"`chat` belongs into version {PACKED}, and into no other")
        end = None if self.chat is None else self.chat.end_of_turn
        if end is not None and not 0 <= end < self.tokenizer.vocab_size:
            raise InputError(f"`end_of_turn` {end} is no id below {self.tokenizer.vocab_size}")
        for split, domains in self.splits.items():
            if split not in (TRAIN, HELD_OUT):
                raise InputError(f"unknown split {split!r}")
            for domain, shards in domains.items():
                for shard in shards:
                    self._require_marks(shard)
                    if shard.tokens <= 0 or shard.documents <= 0:
                        raise InputError(f"shard {shard.path} of {domain} is empty")
                    if shard.path.startswith("/") or ".." in shard.path.split("/"):
                        raise InputError(f"shard path {shard.path!r} leaves the folder")

    def _require_marks(self, shard: ShardRecord) -> None:
        """Raises InputError unless a shard has marks where it should, and whole samples then."""
        marks, chat = shard.marks, self.chat
        if (marks is None) != (chat is None):
            raise InputError(f"shard {shard.path} must have `marks` beside `chat`, and only there")
        if marks is None or chat is None:
            return
        if chat.seq_len < 1 or shard.tokens % chat.seq_len or marks.tokens != shard.tokens:
            raise InputError(
                f"shard {shard.path} has {shard.tokens} tokens and {marks.tokens} marks, which are "
                f"no whole samples of {chat.seq_len}"
            )
        if marks.marks is not None or marks.path != marks_path(shard.path):
            raise InputError(f"the marks of shard {shard.path} are at {marks.path!r}")


def marks_path(path: str) -> str:
    """Where the marks of the shard at `path` are."""
    return f"{path}.marks"


def from_json(kind: type[R], content: Any) -> R:
    """A dataclass of this file from what JSON gives back.

    Raises InputError naming a field that is missing, unknown or of another type.
    """
    return cast(R, _converted(kind, content, kind.__name__))


def _converted(hint: Any, value: Any, place: str) -> Any:
    """`value` as what the annotation `hint` says."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    records = [part for part in parts if dataclasses.is_dataclass(part)]
    if origin is UnionType and records:
        return None if value is None else _converted(records[0], value, place)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InputError(f"{place} is {word_for(value)}, not {word_for({})}")
        known = _annotations(hint)
        unknown = value.keys() - known.keys()
        if unknown:
            raise InputError(f"{place} has an unknown key {min(unknown)!r}")
        given = {
            name: _converted(of, value[name], f"{place}.{name}")
            for name, of in known.items()
            if name in value
        }
        missing = [
            field.name
            for field in dataclasses.fields(hint)
            if field.name not in given
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise InputError(f"{place} has no {missing[0]!r}")
        return hint(**given)
    allowed = {list: list, dict: dict}.get(origin) or (parts if origin is UnionType else hint)
    if hint is not Any and not is_kind(value, allowed):
        raise InputError(f"{place} is {word_for(value)}, not {words_for(allowed)}")
    if origin is list:
        return [_converted(parts[0], entry, place) for entry in value]
    if origin is dict:
        return {key: _converted(parts[1], entry, f"{place}.{key}") for key, entry in value.items()}
    return value


@cache
def _annotations(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def why_no_tokens(directory: Path) -> str:
    """What to say of a folder without a manifest: what it is instead, where that shows."""
    found, advice = what_is(directory), odd_name(str(directory), patterns=False)
    make = f"`python -m data.tokenize --input ... --tokenizer ... --output {directory}`"
    indexes = [Path(f"{directory}.idx")]  # the folder may be `.`, which has no name
    with contextlib.suppress(OSError):
        indexes += sorted(directory.glob("*.idx"))[:1]
        if any((directory / ".partial").iterdir()):
            return (
                f"no tokens at {directory} yet: tokenizing was not finished there; run the same "
                "command again, it goes on where it stopped"
            )
    if any(any(directory.glob(f"{split}/*/*.idx")) for split in (TRAIN, HELD_OUT)):
        return (
            f"no {FILE_NAME} at {directory}, which says what the shards there are: copy it from "
            "where they came from, or tokenize again with --overwrite"
        )
    if "of text" in found:
        return (
            f"no tokens at {directory}: it is {found}; tokenize it with `python -m data.tokenize "
            f"--input {directory} --tokenizer ... --output FOLDER`, and name FOLDER"
        )
    if "part of the tokens" not in found and any(index.is_file() for index in indexes):
        return (
            f"no tokens at {directory}: it holds Megatron's .bin and .idx files without the "
            f"{FILE_NAME} that names their tokenizer, domains and checksums; tokenize the text with"
            f" {make.replace(str(directory), 'FOLDER')}"
        )
    if advice or found not in ("", EMPTY_FOLDER):
        what = f"it is {found}" if found else "no such folder"
        fix = advice or f"name the folder that holds {FILE_NAME}"
        return f"no tokens at {directory}: {what}; {fix}"
    return (
        f"no tokens at {directory}: {directory / FILE_NAME} does not exist; make them with {make} "
        "or correct the folder"
    )


def dtype_for(vocab_size: int) -> str:
    """The narrowest token dtype that holds ids below `vocab_size`."""
    for name, dtype in DTYPES.items():
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return name
    raise InputError(f"a vocabulary of {vocab_size} ids is above the limit of 2^31")


def left_out(counts: Mapping[str, int], examples: Mapping[str, str]) -> list[str]:
    """What a manifest says of records that were left out, in words, the most frequent first."""
    found = sorted(((counts.get(kind, 1), kind) for kind in examples), reverse=True)
    return [f"{count:,} with {kind} (such as {examples[kind]})" for count, kind in found]


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Describes each argument that differs by its option, for error messages."""
    if mine.get("tokenizer") != theirs.get("tokenizer"):
        # Another tokenizer has other ids.
        mine, theirs = ({k: v for k, v in of.items() if k != "ids"} for of in (mine, theirs))
    options = [_as_options(arguments) for arguments in (mine, theirs)]
    lines = []
    for option in sorted(options[0].keys() | options[1].keys()):
        ours, other = (values.get(option) for values in options)
        if ours != other:
            lines.append(f"{option}: {_shorten(other)} there, {_shorten(ours)} now")
    return lines


def _as_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's arguments by what they are called on the command line."""
    found: dict[str, Any] = {}
    for key, value in arguments.items():
        if key == "fields" and isinstance(value, dict):
            found |= {FIELD_OPTIONS.get(name, str(name)): entry for name, entry in value.items()}
        elif key == "ids" and isinstance(value, dict):
            found |= {ID_WORDS.get(name, str(name)): entry for name, entry in value.items()}
        elif key == "bytes_per_task" and is_kind(value, int):
            found["--task-mib"] = f"{value / 2**20:g}"
        else:
            found["--input" if key == "files" else f"--{key.replace('_', '-')}"] = value
    return found


def _plain(record: TokenizerRecord | ShardRecord) -> dict[str, Any]:
    """Like `dataclasses.asdict`, without its deep copies, and without marks that are not there: the
    identity of plain text is that of former versions."""
    found = {name: getattr(record, name) for name in record.__slots__}
    marks = found.pop("marks", None)
    return found if marks is None else found | {"marks": _plain(marks)}


def _without_none(value: Any, name: str) -> Any:
    """A JSON value whose objects have no `name` where that is null."""
    if isinstance(value, list):
        return [_without_none(entry, name) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_none(entry, name)
        for key, entry in value.items()
        if not (key == name and entry is None)
    }


def _shorten(value: Any) -> str:
    words = {None: "not given", True: "on", False: "off"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, list):
        text = " ".join(map(str, value)) or "not given"
    return text if len(text) <= 120 else text[:117] + "..."
