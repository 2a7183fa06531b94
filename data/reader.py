"""Random access to fixed-length samples of a token folder."""

from pathlib import Path

import numpy as np

from data.errors import InputError
from data.log import logger
from data.manifest import HELD_OUT, TRAIN, Manifest
from data.shards import OpenShards, ShardReader, Verify, allow_open_files


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

    Raises:
        InputError: no manifest, no such split, a shard missing or of the wrong size, or no domain
            with `seq_len` tokens.
    """

    def __init__(
        self, directory: Path | str, seq_len: int, split: str = TRAIN, verify: Verify = "once"
    ) -> None:
        self.directory = Path(directory)
        self.seq_len = seq_len
        self.split = split
        self.manifest = Manifest.load(self.directory)
        if seq_len < 1:
            raise InputError(f"seq_len is {seq_len}, but a sample needs at least 1 token")
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
        self._ends: dict[str, np.ndarray] = {}
        count = sum(len(self.manifest.splits[split][domain]) for domain in self.domains)
        opened = OpenShards(allow_open_files(count))
        for domain in self.domains:
            records = self.manifest.splits[split][domain]
            self._shards[domain] = [
                ShardReader(self.directory, record, self.manifest.dtype, verify, opened)
                for record in records
            ]
            self._ends[domain] = np.cumsum([record.tokens for record in records], dtype=np.int64)

    def spread(self, domain: str, count: int) -> np.ndarray:
        """Up to `count` samples of `domain`, evenly spread over its documents: int64 indices."""
        size = self.sizes[domain]
        return np.linspace(0, size - 1, min(size, count)).round().astype(np.int64)

    def read(self, domain: str, indices: np.ndarray) -> np.ndarray:
        """Tokens of the samples `indices` of `domain`: int64 [len(indices), seq_len].

        Raises:
            InputError: a block of a shard is damaged.
        """
        indices = np.asarray(indices, np.int64)
        assert indices.ndim == 1
        size = self.sizes[domain]
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
            raise IndexError(f"sample outside 0 to {size - 1} of domain {domain}")
        out = np.empty((len(indices), self.seq_len), np.int64)
        starts = indices * self.seq_len
        firsts = np.searchsorted(self._ends[domain], starts, side="right")
        for row, start, shard in zip(out, starts.tolist(), firsts.tolist(), strict=True):
            self._read_row(domain, start, shard, row)
        return out

    def _read_row(self, domain: str, start: int, shard: int, row: np.ndarray) -> None:
        shards, ends = self._shards[domain], self._ends[domain]
        filled = 0
        while filled < len(row):
            reader = shards[shard]
            offset = start + filled - (int(ends[shard]) - reader.record.tokens)
            count = min(len(row) - filled, reader.record.tokens - offset)
            reader.read_into(offset, row[filled : filled + count])
            filled += count
            shard += 1

    def _refuse_empty_split(self) -> None:
        if self.split not in (TRAIN, HELD_OUT):
            raise InputError(f"unknown split {self.split!r}; known: {TRAIN}, {HELD_OUT}")
        if not self.manifest.domains(self.split):
            raise InputError(
                f"{self.directory} has no {self.split} documents; tokenize again with another "
                "--held-out fraction (such as 0.01) or more text"
            )
