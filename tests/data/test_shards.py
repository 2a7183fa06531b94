"""Shards return what was written; damage is found."""

import struct
from pathlib import Path

import numpy as np
import pytest

from data.errors import InputError
from data.manifest import dtype_for
from data.shards import BLOCK_BYTES, ShardReader, ShardWriter, Verify
from tests.data.helpers import random_documents, write_shard

BLOCK_TOKENS = BLOCK_BYTES // 2


def read_all(reader: ShardReader) -> np.ndarray:
    out = np.empty(reader.record.tokens, np.int64)
    reader.read_into(0, out)
    return out


@pytest.mark.parametrize("vocab_size", [1000, 65_536, 65_537, 200_000])
def test_round_trip_and_bytes(tmp_path: Path, vocab_size: int) -> None:
    documents = random_documents([3, 1, 400, 7], vocab_size)
    documents[2][5] = vocab_size - 1
    dtype = dtype_for(vocab_size)
    record = write_shard(tmp_path, "train/c4/00000", documents, dtype)
    assert (record.tokens, record.documents, record.text_bytes) == (411, 4, 3 * 411)
    reader = ShardReader(tmp_path, record, dtype, "always")
    assert np.array_equal(read_all(reader), np.concatenate(documents))
    assert reader.documents().tolist() == [0, 3, 4, 404, 411]
    raw = (tmp_path / "train/c4/00000.bin").read_bytes()
    assert (
        raw == np.concatenate(documents).astype("<u2" if vocab_size <= 65_536 else "<i4").tobytes()
    )


def test_index_has_megatrons_layout(tmp_path: Path) -> None:
    """Field by field as megatron/core/datasets/indexed_dataset.py reads it."""
    write_shard(tmp_path, "a", random_documents([3, 5]), "uint16")
    content = (tmp_path / "a.idx").read_bytes()
    assert content[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack("<QBQQ", content[9:34]) == (1, 8, 2, 3)
    assert np.frombuffer(content, np.int32, 2, 34).tolist() == [3, 5]
    assert np.frombuffer(content, np.int64, 2, 42).tolist() == [0, 6]
    assert np.frombuffer(content, np.int64, 3, 58).tolist() == [0, 1, 2]
    assert len(content) == 82


@pytest.mark.parametrize(("dtype", "bad"), [("uint16", 65_536), ("uint16", -1), ("int32", 1 << 31)])
def test_id_too_large_for_dtype_is_refused(tmp_path: Path, dtype: str, bad: int) -> None:
    writer = ShardWriter(tmp_path, "a", dtype)
    writer.append(np.array([1, 2]), 4)
    with pytest.raises(InputError, match=f"token id {bad} does not fit {dtype}"):
        writer.append(np.array([3, bad]), 4)
    assert writer.commit().tokens == 2


def test_nothing_visible_before_commit_and_nothing_left_after_abort(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train/c4/00000", "uint16")
    writer.append(np.arange(10), 10)
    assert not list(tmp_path.rglob("*.bin"))
    writer.abort()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    committed = ShardWriter(tmp_path, "train/c4/00000", "uint16")
    committed.append(np.arange(10), 10)
    committed.commit()
    assert sorted(path.suffix for path in tmp_path.rglob("*.*")) == [".bin", ".crc", ".idx"]
    committed.abort()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_flipped_bit_is_found_when_its_block_is_touched(tmp_path: Path) -> None:
    tokens = random_documents([2 * BLOCK_TOKENS + 100])
    record = write_shard(tmp_path, "a", tokens, "uint16")
    path = tmp_path / "a.bin"
    content = bytearray(path.read_bytes())
    content[BLOCK_BYTES + 77] ^= 4
    path.write_bytes(content)
    reader = ShardReader(tmp_path, record, "uint16", "once")
    out = np.empty(50, np.int64)
    reader.read_into(10, out)
    reader.read_into(2 * BLOCK_TOKENS + 50, out)
    with pytest.raises(InputError) as error:
        reader.read_into(BLOCK_TOKENS - 25, out)  # starts in the sound block before it
    message = str(error.value)
    assert str(path) in message
    assert "block 1, bytes 1,048,576 to 2,097,152" in message
    assert "expected" in message and "copy it again" in message
    ShardReader(tmp_path, record, "uint16", "never").read_into(BLOCK_TOKENS - 25, out)


def test_always_checks_again_and_once_does_not(tmp_path: Path) -> None:
    record = write_shard(tmp_path, "a", random_documents([1000]), "uint16")
    once = ShardReader(tmp_path, record, "uint16", "once")
    always = ShardReader(tmp_path, record, "uint16", "always")
    read_all(once)
    read_all(always)
    with (tmp_path / "a.bin").open("r+b") as file:
        file.write(b"\xff\xff")
    read_all(once)
    with pytest.raises(InputError, match="block 0"):
        read_all(always)


def test_damaged_checksum_file_is_refused(tmp_path: Path) -> None:
    record = write_shard(tmp_path, "a", random_documents([1000]), "uint16")
    path = tmp_path / "a.crc"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"a\.crc is not the file the manifest describes"):
        read_all(ShardReader(tmp_path, record, "uint16", "once"))


def test_damaged_index_is_refused(tmp_path: Path) -> None:
    record = write_shard(tmp_path, "a", random_documents([1000]), "uint16")
    path = tmp_path / "a.idx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"a\.idx is not the file"):
        ShardReader(tmp_path, record, "uint16", "once").documents()


def test_truncated_or_missing_shard_is_refused_at_open(tmp_path: Path) -> None:
    record = write_shard(tmp_path, "a", random_documents([1000]), "uint16")
    path = tmp_path / "a.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match="has 1,998 bytes, the manifest says 2,000"):
        ShardReader(tmp_path, record, "uint16", "once")
    path.unlink()
    with pytest.raises(InputError, match="missing"):
        ShardReader(tmp_path, record, "uint16", "once")


def test_index_of_another_size_is_refused_at_open(tmp_path: Path) -> None:
    record = write_shard(tmp_path, "a", random_documents([1000]), "uint16")
    path = tmp_path / "a.idx"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"a\.idx has 54 bytes, the manifest says 62"):
        ShardReader(tmp_path, record, "uint16", "once")
    path.unlink()
    with pytest.raises(InputError, match=r"a\.idx is missing"):
        ShardReader(tmp_path, record, "uint16", "once")


@pytest.mark.parametrize("verify", ["once", "always", "never"])
def test_shard_that_shrinks_while_it_is_read_is_an_error_not_a_crash(
    tmp_path: Path, verify: Verify
) -> None:
    record = write_shard(tmp_path, "a", random_documents([2 * BLOCK_TOKENS]), "uint16")
    reader = ShardReader(tmp_path, record, "uint16", verify)
    read_all(reader)
    with (tmp_path / "a.bin").open("r+b") as file:
        file.truncate(BLOCK_BYTES + 20)
    out = np.empty(20, np.int64)
    reader.read_into(10, out if verify != "always" else out[:0])
    with pytest.raises(InputError, match=r"a\.bin ends at byte 1,048,596, but had 2,097,152"):
        reader.read_into(BLOCK_TOKENS, out)


def test_shard_that_shrinks_after_open_is_an_error_not_a_crash(tmp_path: Path) -> None:
    record = write_shard(tmp_path, "a", random_documents([1000]), "uint16")
    reader = ShardReader(tmp_path, record, "uint16", "once")
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(InputError, match="has 0 bytes"):
        read_all(reader)
