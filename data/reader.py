"""Random access to fixed-length samples of a token folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data.errors import InputError
from data.log import logger
from data.manifest import HELD_OUT, MARKS, TRAIN, Manifest
from data.packing import COUNTS, documents_of
from data.shards import BLOCK_BYTES, OpenShards, ShardReader, Verify, allow_open_files

Documents = Literal["joined", "apart"]
"""Whether the documents in a sample see each other."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Some samples, and what is known of their tokens."""

    ids: np.ndarray
    """int64 [n, seq_len]."""
    documents: np.ndarray | None = None
    """Number of each token's document in its sample, from 0: int32 [n, seq_len]; None where
    documents are joined."""
    valid: np.ndarray | None = None
    """Which tokens count: bool [n, seq_len]; None means all."""


def joined(parts: Sequence[Samples]) -> Samples:
    """The samples of `parts`, at least one, which are of one reader."""
    documents = [part.documents for part in parts if part.documents is not None]
    valid = [part.valid for part in parts if part.valid is not None]
    return Samples(
        np.concatenate([part.ids for part in parts]),
        np.concatenate(documents) if documents else None,
        np.concatenate(valid) if valid else None,
    )


class TokenReader:
    """Samples of `seq_len` tokens, per domain.

    Sample i of a domain is tokens [i * seq_len, (i + 1) * seq_len) of its shards laid end to end,
    so sample 0 starts with the first document of the input. What is left at the end of a domain
    (fewer than `seq_len` tokens) is not used. Threads may share a reader; arrays handed out are
    copies and outlive it. As many shards stay open as the limit of open files allows.

    Args:
        directory: output folder of `python -m data.tokenize`.
        seq_len: tokens per sample.
        split: "train" or "held_out".
        verify: check each 1 MiB block's CRC-32 at its first touch ("once"), at every touch
            ("always") or not at all ("never").
        documents: "joined": samples are read end to end; "apart": `samples` tells documents from
            each other; None: apart for conversations, which are never joined, and joined for text.

    Raises:
        InputError: no manifest, no such split, a shard missing or of the wrong size, no domain
            with `seq_len` tokens, or documents that cannot be read so.
    """

    def __init__(
        self,
        directory: Path | str,
        seq_len: int,
        split: str = TRAIN,
        verify: Verify = "once",
        documents: Documents | None = "joined",
    ) -> None:
        self.directory = Path(directory)
        self.seq_len = seq_len
        self.split = split
        self.manifest = Manifest.load(self.directory)
        if seq_len < 1:
            raise InputError(f"seq_len is {seq_len}, but a sample needs at least 1 token")
        self.documents = self._resolve(documents)
        self._refuse_empty_split()
        tokens = self.manifest.tokens(split)
        self.sizes = {domain: count // seq_len for domain, count in tokens.items()}
        short = [domain for domain, size in self.sizes.items() if size == 0]
        counts = ", ".join(f"{domain} {tokens[domain]:,}" for domain in short)
        if len(short) == len(self.sizes):
            raise InputError(
                f"seq_len {seq_len:,} is longer than every domain of the {split} split of "
                f"{directory} (tokens: {counts}); use a shorter seq_len or tokenize more text"
            )
        if short:
            logger.warning(
                f"left out of the {split} split, shorter than one sample of {seq_len:,} tokens: "
                f"{counts}"
            )
            self.sizes = {domain: size for domain, size in self.sizes.items() if size}
        self.domains = list(self.sizes)
        self.fingerprint = self.manifest.fingerprint
        self._shards: dict[str, list[ShardReader]] = {}
        self._marks: dict[str, list[ShardReader]] = {}
        self._ends: dict[str, np.ndarray] = {}
        count = sum(len(self.manifest.splits[split][domain]) for domain in self.domains)
        chat = self.manifest.chat is not None
        opened = OpenShards(allow_open_files(2 * count if chat else count))
        for domain in self.domains:
            records = self.manifest.splits[split][domain]
            self._shards[domain] = [
                ShardReader(self.directory, record, self.manifest.dtype, verify, opened)
                for record in records
            ]
            self._marks[domain] = [
                ShardReader(self.directory, record.marks, MARKS, verify, opened)
                for record in records
                if record.marks is not None
            ]
            self._ends[domain] = np.cumsum([record.tokens for record in records], dtype=np.int64)
        if self.documents == "apart" and self.manifest.chat is None:
            self._require_bounds()

    def spread(self, domain: str, count: int) -> np.ndarray:
        """Up to `count` samples of `domain`, evenly spread over its documents: int64 indices."""
        size = self.sizes[domain]
        return np.linspace(0, size - 1, min(size, count)).round().astype(np.int64)

    def read(self, domain: str, indices: np.ndarray) -> np.ndarray:
        """Tokens of the samples `indices` of `domain`: int64 [len(indices), seq_len].

        Raises:
            InputError: a block of a shard is damaged.
        """
        return self._read(domain, indices, self._shards[domain], np.dtype(np.int64))

    def samples(self, domain: str, indices: np.ndarray) -> Samples:
        """As `read`, with the tokens' documents and whether they count."""
        ids = self.read(domain, indices)
        if self.manifest.chat is not None:
            marks = self._read(domain, indices, self._marks[domain], np.dtype(np.uint8))
            return Samples(ids, documents_of(marks), (marks & COUNTS) != 0)
        if self.documents == "joined":
            return Samples(ids)
        return Samples(ids, np.cumsum(self._begins(ids), axis=1, dtype=np.int32))

    def _read(
        self, domain: str, indices: np.ndarray, shards: list[ShardReader], dtype: np.dtype
    ) -> np.ndarray:
        indices = np.asarray(indices, np.int64)
        assert indices.ndim == 1
        size = self.sizes[domain]
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
            raise IndexError(f"sample outside 0 to {size - 1} of domain {domain}")
        out = np.empty((len(indices), self.seq_len), dtype)
        starts, ends = indices * self.seq_len, self._ends[domain]
        firsts = np.searchsorted(ends, starts, side="right")
        for row, start, shard in zip(out, starts.tolist(), firsts.tolist(), strict=True):
            _read_row(shards, ends, start, shard, row)
        return out

    def _begins(self, ids: np.ndarray) -> np.ndarray:
        """Which tokens of text begin a document, the first of a row left out: bool, as `ids`."""
        tokenizer = self.manifest.tokenizer
        begins = np.zeros(ids.shape, np.bool_)
        begins[..., 1:] = ids[..., :-1] == tokenizer.eos_id
        if tokenizer.adds_bos:
            begins[..., 1:] &= ids[..., 1:] == tokenizer.bos_id
        return begins

    def _require_bounds(self) -> None:
        """Raises InputError where the ids of text do not tell where documents end, as the beginning
        of each domain shows."""
        for domain, (first, *_) in self._shards.items():
            ids = np.empty(min(first.record.tokens, BLOCK_BYTES), np.int64)
            first.read_into(0, ids)
            starts = first.documents()[1:-1]
            if not np.array_equal(np.flatnonzero(self._begins(ids)), starts[starts < len(ids)]):
                raise InputError(
                    f"{self.directory}: documents of {domain} hold the id that ends them "
                    f"({self.manifest.tokenizer.eos_id}) in their midst, so that ids do not tell "
                    "where one ends: use --documents joined, or tokenize again with a tokenizer "
                    "whose end-of-sequence token is a special one, which no text can spell"
                )

    def _resolve(self, documents: Documents | None) -> Documents:
        chat = self.manifest.chat
        if chat is None:
            return documents or "joined"
        if documents == "joined":
            raise InputError(
                f"{self.directory} holds conversations, in which only answers count and padding "
                "fills samples up: they cannot be read end to end as text is. shorn cpt, finetune "
                "and evaluate read them with --documents apart, which is what they do with them by "
                "default; for all else tokenize plain text"
            )
        if self.seq_len != chat.seq_len:
            raise InputError(
                f"{self.directory} holds conversations in samples of {chat.seq_len:,} tokens, not "
                f"{self.seq_len:,}: use --seq-len {chat.seq_len}, or tokenize them again with "
                f"--seq-len {self.seq_len}"
            )
        return "apart"

    def _refuse_empty_split(self) -> None:
        if self.split not in (TRAIN, HELD_OUT):
            raise InputError(f"unknown split {self.split!r}; known: {TRAIN}, {HELD_OUT}")
        if not self.manifest.domains(self.split):
            raise InputError(
                f"{self.directory} has no {self.split} documents; tokenize again with another "
                "--held-out fraction (such as 0.01) or more text"
            )


def _read_row(
    shards: list[ShardReader], ends: np.ndarray, start: int, shard: int, row: np.ndarray
) -> None:
    """Fills `row` from token `start` on, which lies in shard `shard`."""
    filled = 0
    while filled < len(row):
        reader = shards[shard]
        offset = start + filled - (int(ends[shard]) - reader.record.tokens)
        count = min(len(row) - filled, reader.record.tokens - offset)
        reader.read_into(offset, row[filled : filled + count])
        filled += count
        shard += 1
