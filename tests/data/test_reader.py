"""Samples are the token stream cut at the sequence length; damaged shards are refused."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data.errors import InputError
from data.reader import TokenReader
from tests.conftest import ROOT
from tests.data.helpers import random_documents, write_folder


def test_samples_are_the_stream_cut_at_seq_len(tmp_path: Path) -> None:
    # Shards shorter than a sample and documents that cross samples and shards.
    groups = [random_documents(lengths, seed=i) for i, lengths in enumerate([[7, 30], [3], [64]])]
    write_folder(tmp_path, {"c4": groups, "book": [random_documents([33])]})
    reader = TokenReader(tmp_path, 16)
    stream = np.concatenate([document for group in groups for document in group])
    assert reader.domains == ["c4", "book"]
    assert reader.sizes == {"c4": 104 // 16, "book": 2}
    order = np.array([5, 0, 2, 2, 1, 4, 3])
    expected = stream[: 6 * 16].reshape(6, 16)[order]
    found = reader.read("c4", order)
    assert found.dtype == np.int64 and np.array_equal(found, expected)
    assert reader.read("c4", np.array([], np.int64)).shape == (0, 16)
    assert reader.fingerprint == reader.manifest.fingerprint


def test_results_are_copies(tmp_path: Path) -> None:
    write_folder(tmp_path, {"c4": [random_documents([64])]})
    reader = TokenReader(tmp_path, 16)
    first = reader.read("c4", np.array([0]))
    expected = first.copy()
    first[:] = -1
    assert np.array_equal(reader.read("c4", np.array([0])), expected)
    del reader
    assert (first == -1).all()


def test_threads_may_share_a_reader_that_closes_shards(tmp_path: Path) -> None:
    groups = [random_documents([500], seed=i) for i in range(20)]
    write_folder(tmp_path, {"c4": groups})
    reader = TokenReader(tmp_path, 10, verify="always")
    stream = np.concatenate([group[0] for group in groups]).reshape(-1, 10)
    opened = reader._shards["c4"][0]._opened
    assert opened is not None
    opened.limit = 5
    orders = [np.random.default_rng(i).permutation(1000) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for order, found in zip(
            orders, pool.map(lambda o: reader.read("c4", o), orders), strict=True
        ):
            assert np.array_equal(found, stream[order])


def test_domain_shorter_than_a_sample_is_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path, {"c4": [random_documents([64])], "tiny": [random_documents([15])]})
    reader = TokenReader(tmp_path, 16)
    assert reader.domains == ["c4"] and reader.sizes == {"c4": 4}
    assert "tiny 15" in capsys.readouterr().err


def test_seq_len_longer_than_every_domain_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"c4": [random_documents([64])], "book": [random_documents([15])]})
    with pytest.raises(InputError, match=r"seq_len 65 is longer .*c4 64, book 15.*shorter"):
        TokenReader(tmp_path, 65)


def test_missing_or_unknown_split_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"c4": [random_documents([64])]})
    with pytest.raises(InputError, match=r"no held_out documents.*--held-out"):
        TokenReader(tmp_path, 16, split="held_out")
    with pytest.raises(InputError, match="unknown split 'test'"):
        TokenReader(tmp_path, 16, split="test")
    with pytest.raises(InputError, match="at least 1 token"):
        TokenReader(tmp_path, 0)


def test_truncated_shard_is_refused_at_open(tmp_path: Path) -> None:
    write_folder(tmp_path, {"c4": [random_documents([64]), random_documents([64])]})
    path = tmp_path / "train/c4/00001.bin"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="has 100 bytes, the manifest says 128"):
        TokenReader(tmp_path, 16)


def test_flipped_bit_is_refused_at_first_touch(tmp_path: Path) -> None:
    write_folder(tmp_path, {"c4": [random_documents([64]), random_documents([64])]})
    path = tmp_path / "train/c4/00001.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    reader = TokenReader(tmp_path, 16)
    reader.read("c4", np.array([0, 3]))
    with pytest.raises(InputError, match=r"00001\.bin is damaged: block 0, bytes 0 to 128"):
        reader.read("c4", np.array([4]))


@pytest.mark.parametrize("index", [-1, 4])
def test_sample_outside_the_domain(tmp_path: Path, index: int) -> None:
    write_folder(tmp_path, {"c4": [random_documents([64])]})
    with pytest.raises(IndexError):
        TokenReader(tmp_path, 16).read("c4", np.array([index]))


READ_EVERYTHING = """
import resource, sys
import numpy as np
from data.reader import TokenReader

resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
reader = TokenReader(sys.argv[1], 10)
order = np.random.default_rng(0).permutation(reader.sizes["c4"])
found = np.empty((len(order), 10), np.int64)
for start in range(0, len(order), 7):
    chosen = order[start : start + 7]
    found[chosen] = reader.read("c4", chosen)
opened = next(iter(reader._shards.values()))[0]._opened
print(len(opened), found.ravel().tolist())
"""


@pytest.mark.parametrize(("soft", "hard", "expected"), [(64, 64, 8), (64, 512, 150)])
def test_more_shards_than_open_files(tmp_path: Path, soft: int, hard: int, expected: int) -> None:
    groups = [random_documents([20], seed=i) for i in range(150)]
    write_folder(tmp_path, {"c4": groups})
    arguments = [str(tmp_path), str(soft), str(hard)]
    result = subprocess.run(
        [sys.executable, "-c", READ_EVERYTHING, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    opened, found = result.stdout.split(maxsplit=1)
    assert int(opened) == expected
    assert json.loads(found) == np.concatenate([group[0] for group in groups]).tolist()


def test_a_shard_that_was_closed_is_checked_once(tmp_path: Path) -> None:
    write_folder(tmp_path, {"c4": [random_documents([64]), random_documents([64], seed=1)]})
    reader = TokenReader(tmp_path, 16)
    first, second = reader._shards["c4"]
    assert first._opened is not None and first._opened is second._opened
    first._opened.limit = 1
    expected = reader.read("c4", np.array([0]))
    reader.read("c4", np.array([4]))
    assert first._file is None and second._file is not None and len(first._opened) == 1
    first._check_block = None  # type: ignore[assignment, method-assign]
    assert np.array_equal(reader.read("c4", np.array([0])), expected)
    (tmp_path / "train/c4/00001.bin").write_bytes(b"")
    with pytest.raises(InputError, match="has 0 bytes"):
        reader.read("c4", np.array([4]))
