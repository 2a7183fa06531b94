"""The manifest: what a folder of tokens holds, and the identity of its data."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data.errors import InputError
from data.files import write_json

VERSION = 1
FILE_NAME = "manifest.json"
TRAIN = "train"
HELD_OUT = "held_out"
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


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One input file."""

    path: str
    bytes: int
    documents: int


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
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Reads and checks `directory`/manifest.json.

        Raises:
            InputError: the folder or file is missing, unreadable, or of another version.
        """
        path = directory / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"no tokens at {directory}: {path} does not exist; make them with "
                f"`python -m data.tokenize --input ... --tokenizer ... --output {directory}` "
                "or correct the folder"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}; tokenize again") from None
        if not isinstance(content, dict) or content.get("version") != VERSION:
            found = content.get("version") if isinstance(content, dict) else None
            raise InputError(
                f"{path} has version {found!r}, this program reads {VERSION}; tokenize again"
            )
        try:
            manifest = cls(
                **content
                | {
                    "tokenizer": TokenizerRecord(**content["tokenizer"]),
                    "sources": [SourceRecord(**source) for source in content["sources"]],
                    "splits": {
                        split: {
                            domain: [ShardRecord(**shard) for shard in shards]
                            for domain, shards in domains.items()
                        }
                        for split, domains in content["splits"].items()
                    },
                }
            )
            manifest.validate()
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise InputError(f"{path} is damaged: {error}; copy or tokenize it again") from None
        return manifest

    def validate(self) -> None:
        """Raises InputError if the records contradict each other."""
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.tokenizer.vocab_size - 1 > np.iinfo(DTYPES[self.dtype]).max:
            raise InputError(f"{self.tokenizer.vocab_size} ids do not fit into {self.dtype}")
        for split, domains in self.splits.items():
            if split not in (TRAIN, HELD_OUT):
                raise InputError(f"unknown split {split!r}")
            for domain, shards in domains.items():
                for shard in shards:
                    if shard.tokens <= 0 or shard.documents <= 0:
                        raise InputError(f"shard {shard.path} of {domain} is empty")
                    if shard.path.startswith("/") or ".." in shard.path.split("/"):
                        raise InputError(f"shard path {shard.path!r} leaves the folder")


def dtype_for(vocab_size: int) -> str:
    """The narrowest token dtype that holds ids below `vocab_size`."""
    for name, dtype in DTYPES.items():
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return name
    raise InputError(f"a vocabulary of {vocab_size} ids is above the limit of 2^31")


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Describes each key whose value differs, for error messages."""
    lines = []
    for key in sorted(mine.keys() | theirs.keys()):
        ours, other = mine.get(key), theirs.get(key)
        if ours != other:
            lines.append(f"{key}: {_shorten(other)} there, {_shorten(ours)} now")
    return lines


def _plain(record: TokenizerRecord | ShardRecord) -> dict[str, Any]:
    """Like `dataclasses.asdict`, without its deep copies."""
    return {name: getattr(record, name) for name in record.__slots__}


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
