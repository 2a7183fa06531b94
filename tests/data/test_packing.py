"""Packed samples hold every conversation once and whole; marks say what counts."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.manifest import ShardRecord
from data.packing import BEGINS, COUNTS, OPEN_SAMPLES, Packer, documents_of
from data.shards import ShardReader

PAD = 2


def pack(root: Path, lengths: list[int], seq_len: int) -> tuple[ShardRecord, int]:
    """Conversation number i has the ids i + 3, the odd ones of which count."""
    packer = Packer(root, "train/talks/00000", "uint16", seq_len, PAD)
    for number, length in enumerate(lengths):
        packer.append(np.full(length, number + 3), np.arange(length) % 2 == 1, 10)
    return packer.commit(), packer.padding


def read(root: Path, record: ShardRecord, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and marks as samples [n, seq_len]."""
    found = []
    for part, dtype in record.parts("uint16"):
        values = np.empty(part.tokens, np.int64)
        ShardReader(root, part, dtype, "once").read_into(0, values)
        found.append(values.reshape(-1, seq_len))
    ids, marks = found
    return ids, marks


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=200), seq_len=st.integers(20, 30))
def test_every_conversation_is_whole_in_one_sample(
    lengths: list[int], seq_len: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("packed")
    record, padding = pack(root, lengths, seq_len)
    ids, marks = read(root, record, seq_len)
    documents = documents_of(marks)
    assert (documents[:, 0] == 0).all() and record.documents == len(lengths)
    found = []
    for row, mark, owners in zip(ids, marks, documents, strict=True):
        for number in range(owners[-1] + 1):
            own = row[owners == number]
            assert len(set(own.tolist())) == 1
            counts = (mark[owners == number] & COUNTS) != 0
            if own[0] == PAD:
                # Padding stands last and counts nowhere.
                assert number == owners[-1] and not counts.any()
                continue
            assert counts.tolist() == [index % 2 == 1 for index in range(len(own))]
            found.append((int(own[0]) - 3, len(own)))
    assert sorted(found) == list(enumerate(lengths))
    assert padding == int((ids == PAD).sum()) == ids.size - sum(lengths)
    assert record.text_bytes == 10 * len(lengths)


def test_little_is_padding_where_conversations_vary(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(20, 900, 2000).tolist()
    record, padding = pack(tmp_path, lengths, 1024)
    # One open sample alone leaves 27%.
    assert padding < 0.04 * record.tokens


def test_what_is_written_depends_on_the_conversations_alone(tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).integers(1, 64, 5 * OPEN_SAMPLES).tolist()
    first, second = pack(tmp_path / "a", lengths, 64)[0], pack(tmp_path / "b", lengths, 64)[0]
    assert first == second
    assert first.marks is not None and first.marks.tokens == first.tokens
    assert pack(tmp_path / "c", lengths[::-1], 64)[0] != first


def test_nothing_stays_of_what_is_given_up(tmp_path: Path) -> None:
    packer = Packer(tmp_path, "train/talks/00000", "uint16", 8, PAD)
    packer.append(np.arange(8), np.ones(8, np.bool_), 1)
    packer.abort()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_documents_begin_where_marks_say() -> None:
    marks = np.array([[BEGINS, 0, COUNTS, BEGINS, 0], [BEGINS, BEGINS, BEGINS | COUNTS, 0, 0]])
    assert documents_of(marks).tolist() == [[0, 0, 0, 1, 1], [0, 1, 2, 2, 2]]
