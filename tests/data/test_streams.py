"""The bytes of files in every compression, and one error for each cause of a failed read."""

import bz2
import errno
import gzip
import io
import lzma
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard

from data import streams
from data.errors import InputError
from data.streams import read_blocks, read_lines

WORDS = random.Random(0).choices(["mask", "keeps", "what", "counts", "allow", "loss"], k=60_000)
CONTENT = " ".join(WORDS).encode()


def lz4(content: bytes) -> bytes:
    stream = io.BytesIO()
    with pyarrow.CompressedOutputStream(stream, "lz4") as out:
        out.write(content)
        out.flush()
        stream.close = lambda: None  # type: ignore[method-assign]
    return stream.getvalue()


def long_window(content: bytes) -> bytes:
    """As `zstd --long=31` packs what comes through a pipe, whose size it does not know."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(content) + packer.flush()


PACKERS: list[tuple[str, Callable[[bytes], bytes]]] = [
    (".zst", zstandard.compress),
    (".zstd", long_window),
    (".GZ", gzip.compress),
    (".bz2", bz2.compress),
    (".xz", lzma.compress),
    (".lz4", lz4),
]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read(path: Path) -> bytes:
    return b"".join(read_blocks(path))


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
def test_every_compression(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(CONTENT)
    path = tmp_path / f"a.txt{suffix}"
    assert read(write(path, packed)) == CONTENT
    assert read(write(path, packed + pack(b"") + packed)) == CONTENT * 2
    for cut in (len(packed) // 2, len(packed) - 1, len(packed) + 9):
        write(path, (packed + packed)[:cut])
        with pytest.raises(InputError, match=r"a\.txt.* is truncated or damaged: .*download"):
            read(path)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 255
    if suffix not in (".zst", ".zstd", ".lz4"):  # these frames have no checksum
        with pytest.raises(InputError, match="truncated or damaged"):
            read(write(path, bytes(flipped)))
    steps: list[int] = []
    for _ in read_blocks(write(path, packed + packed), steps.append):
        pass
    assert sum(steps) == 2 * len(packed) and min(steps) >= 0


def test_frames_of_every_window_lie_end_to_end(tmp_path: Path) -> None:
    skipped = struct.pack("<II", 0x184D2A5E, 12) + b"x" * 12
    short, long = zstandard.compress(CONTENT), long_window(b"long" * 1000)
    path = write(tmp_path / "a.txt.zst", skipped + short * 2 + skipped + long + short + skipped)
    assert read(path) == CONTENT * 2 + b"long" * 1000 + CONTENT
    write(path, short + long + skipped[:-3])
    with pytest.raises(InputError, match="truncated or damaged"):
        read(path)


def test_zeros_between_streams_of_xz(tmp_path: Path) -> None:
    packed = lzma.compress(b"one")
    assert read(write(tmp_path / "a.xz", packed + bytes(8) + packed + bytes(4))) == b"oneone"
    with pytest.raises(InputError, match="truncated or damaged"):
        read(write(tmp_path / "a.xz", packed + b"garbage"))


def test_a_long_window_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = write(tmp_path / "a.txt.zst", long_window(CONTENT))
    with pytest.raises(InputError, match=r"above 128 MiB.*pip install zstandard.*--long=31"):
        read(path)


def test_frames_packed_with_a_dictionary_ask_for_it(tmp_path: Path) -> None:
    words = zstandard.train_dictionary(4000, [CONTENT[i : i + 500] for i in range(0, 60_000, 500)])
    packed = zstandard.ZstdCompressor(dict_data=words).compress(CONTENT)
    with pytest.raises(InputError, match=r"packed with a dictionary.*zstd -d -D"):
        read(write(tmp_path / "a.txt.zst", packed))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".txt.zst"])
@pytest.mark.parametrize(
    ("content", "fix"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"/annex/objects/SHA256E-s5--00.txt\n", "git annex get"),
        (b"../../.git/annex/objects/x/y/SHA256E-s5--00/SHA256E-s5--00", "git annex get"),
    ],
)
def test_what_stands_in_for_a_file_is_refused(
    tmp_path: Path, suffix: str, content: bytes, fix: str
) -> None:
    with pytest.raises(InputError, match=rf"pointer, not the file; fetch it with `{fix}`"):
        read(write(tmp_path / f"a{suffix}", content))
    prose = b"see /annex/objects/x and version https://git-lfs.github.com/spec/v1\n"
    assert read(write(tmp_path / "b.txt", prose)) == prose


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (gzip.compress(b"x", mtime=0), r"holds gzip data, not zstd data; give it the suffix \.gz"),
        (b"<html><body>login", "holds a web page, not zstd data"),
        (b"PK\x03\x04....", "holds a zip archive"),
        (b"Entry not found", "not compressed, b'Entry not found': .* else download it again"),
        (b'{"text": "plain"}\n', "not compressed, .*: rename it a.jsonl if it was unpacked"),
        ("ä".encode() * 300, "holds text that is not compressed"),
        (b"Entry\0not", r"damaged: zstd data does not start with b'Entry\\x00not'"),
        (b"", "is empty"),
    ],
)
def test_what_is_not_its_suffix_says_what_it_is(tmp_path: Path, content: bytes, named: str) -> None:
    with pytest.raises(InputError, match=named):
        read(write(tmp_path / "a.jsonl.zst", content))


@pytest.mark.parametrize(
    ("number", "named"),
    [
        (errno.EIO, "the storage failed; check the disk"),
        (errno.EACCES, "permission denied"),
        (errno.ENOENT, "no such file; .*put it back"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_what_the_system_refuses_is_no_damage(
    tmp_path: Path, suffix: str, number: int, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / f"a.txt{suffix}", gzip.compress(CONTENT))
    error = OSError(number, "said by the system")

    class Failing(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            if size != streams.HEAD_BYTES:
                raise error
            return super().read(size)

    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Failing(path))
    with pytest.raises(InputError, match=rf"a\.txt{suffix}: {named}") as caught:
        read(path)
    assert "download" not in str(caught.value)


def test_lines_count_from_one_and_have_a_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\n\nabc\n" + b"x" * 11)
    assert list(read_lines(path, 11, lambda _: None)) == [b"", b"", b"abc", b"x" * 11]
    with pytest.raises(InputError, match=r"a\.jsonl:4: one record"):
        list(read_lines(path, 10, lambda _: None))
