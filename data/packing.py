"""Conversations packed whole into samples of one length, with marks of what counts.

A sample holds one conversation after the other, and padding behind the last. Marks are one byte for
each token: whether its loss counts, and whether a document begins there. Padding is a document of
its own, in which nothing counts.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data.manifest import MARKS, ShardRecord, marks_path
from data.shards import ShardWriter

COUNTS, BEGINS = 1, 2
"""Bits of a mark."""
OPEN_SAMPLES = 64
"""Samples that are filled at once. More leave less padding, and bring conversations farther from
their place in the input."""


@dataclass(slots=True, eq=False)
class _Sample:
    """A sample that is being filled."""

    ids: list[np.ndarray] = field(default_factory=list)
    marks: list[np.ndarray] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    size: int = 0
    """Tokens so far."""


class Packer:
    """Writes one shard of samples and the shard of their marks, as ShardWriter writes one.

    A conversation goes to the fullest open sample in which it has room, the first of several. What
    is written depends on the conversations and their order alone.

    Args:
        root: folder that the record's path is relative to.
        path: shard path below `root`, without suffix.
        dtype: that of tokens.
        seq_len: tokens per sample.
        pad_id: stands where a sample has no conversation.
    """

    def __init__(self, root: Path, path: str, dtype: str, seq_len: int, pad_id: int) -> None:
        self._seq_len = seq_len
        self._pad_id = pad_id
        self._open: list[_Sample] = []
        self._tokens = ShardWriter(root, path, dtype)
        self._marks = ShardWriter(root, marks_path(path), MARKS)
        self.padding = 0
        """Tokens of padding so far."""

    def append(self, ids: np.ndarray, counts: np.ndarray, text_bytes: int) -> None:
        """Adds one conversation of at most `seq_len` tokens; `counts` says which of them count."""
        size = len(ids)
        assert 0 < size <= self._seq_len and counts.shape == ids.shape
        fitting = [sample for sample in self._open if sample.size + size <= self._seq_len]
        sample = max(fitting, key=lambda one: one.size, default=None)
        if sample is None:
            if len(self._open) == OPEN_SAMPLES:
                self._close(max(self._open, key=lambda one: one.size))
            sample = _Sample()
            self._open.append(sample)
        marks = np.where(counts, COUNTS, 0).astype(np.uint8)
        marks[0] |= BEGINS
        sample.ids.append(ids)
        sample.marks.append(marks)
        sample.text_bytes.append(text_bytes)
        sample.size += size
        if sample.size == self._seq_len:
            self._close(sample)

    def commit(self) -> ShardRecord:
        """Fills what is open with padding and makes both shards durable and visible."""
        while self._open:
            self._close(self._open[0])
        # The marks first: a shard of tokens that is there has them.
        marks = self._marks.commit()
        return replace(self._tokens.commit(), marks=marks)

    def abort(self) -> None:
        """Removes everything this writer wrote, committed or not."""
        self._tokens.abort()
        self._marks.abort()

    def _close(self, sample: _Sample) -> None:
        """Writes a sample; its padding belongs to its last conversation in the index."""
        self._open.remove(sample)
        padding = self._seq_len - sample.size
        if padding:
            rest = np.zeros(padding, np.uint8)
            rest[0] = BEGINS
            sample.ids[-1] = np.concatenate([sample.ids[-1], np.full(padding, self._pad_id)])
            sample.marks[-1] = np.concatenate([sample.marks[-1], rest])
        for ids, marks, size in zip(sample.ids, sample.marks, sample.text_bytes, strict=True):
            self._tokens.append(ids, size)
            self._marks.append(marks, 0)
        self.padding += padding


def documents_of(marks: np.ndarray) -> np.ndarray:
    """The number of each token's document in its sample, from 0: int32, of marks [n, seq_len]."""
    begins = (marks & BEGINS) != 0
    return np.cumsum(begins, axis=1, dtype=np.int32) - begins[:, :1]
