"""The bytes of input files, decompressed, in blocks or lines, with one error for each cause.

What a file really holds is looked at where its suffix is not enough: a Git LFS pointer is sound
text, and a web page behind a failed download has any suffix.
"""

import bz2
import codecs
import io
import lzma
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data.errors import InputError, failure
from data.formats import compression_of

READ_BYTES = 1 << 20
PACKED_BYTES = 4096
"""Decompressed whole, so few: a byte may stand for 30,000."""
HEAD_BYTES = 512
"""What stands in for a file in a repository is shorter."""
LARGEST_WINDOW = 1 << 31
"""Bytes that zstd may look back, as `zstd --long=31` does, which is the most it can."""
LFS = b"version https://git-lfs.github.com/spec/"
ANNEX = re.compile(rb"(/|(\.\./)*\.git/)annex/objects/[^\n]+\n?")
LONG_WINDOW = "too much memory"
"""What zstd says of a window above its usual limit of 128 MiB."""

ONE_A_LINE = (
    "one record a line is wanted: turn a JSON array or a record of several lines into that with "
    "jq -c 'if type == \"array\" then .[] else . end' OLD > NEW.jsonl"
)

_MAGIC = {
    "zstd": (b"\x28\xb5\x2f\xfd",),
    "gzip": (b"\x1f\x8b",),
    "bz2": (b"BZh",),
    "lz4": (b"\x04\x22\x4d\x18",),
    "xz": (b"\xfd7zXZ\x00",),
}
_SUFFIXES = {"zstd": ".zst", "gzip": ".gz", "bz2": ".bz2", "lz4": ".lz4", "xz": ".xz"}
_OTHERS = (
    (b"PAR1", "parquet", "give it the suffix .parquet"),
    (b"PARE", "an encrypted parquet file", "decrypt it"),
    (b"PK\x03\x04", "a zip archive or an office document", "unpack it, or extract its text"),
    (b"%PDF", "a PDF document", "extract its text, such as with pdftotext"),
    (b"MMIDIDX", "an index of Megatron's token shards", "leave it out of --input"),
)
_WEB_PAGE = (b"<!doctype html", b"<html")
_WIDE = (b"\xff\xfe", b"\xfe\xff")


def read_blocks(path: Path, advance: Callable[[int], None] = lambda _: None) -> Iterator[bytes]:
    """The content of a file in blocks, decompressed as its suffix says.

    Args:
        path: what to read.
        advance: told the bytes of the file (as stored) read since the last call.

    Raises:
        InputError: the file cannot be read, is empty, truncated, damaged or not what its suffix
            says, or stands in for another file (Git LFS, git-annex).
    """
    with reading(path), path.open("rb", buffering=0) as raw:
        head = raw.read(HEAD_BYTES)
        size = raw.seek(0, io.SEEK_END)
        raw.seek(0)
        if not head:
            raise InputError(
                f"{path} is empty (0 bytes); download it again or remove it from the input"
            )
        compression = compression_of(path)
        refuse_pointer(path, head)
        if compression:
            _refuse_foreign(path, head, compression)
        reported = 0
        for block in _decompressed(path, raw, compression):
            # A reader that had to start over is not told of again.
            position = max(raw.tell(), reported)
            advance(position - reported)
            reported = position
            yield block
        advance(max(0, size - reported))


def read_lines(path: Path, limit: int, advance: Callable[[int], None]) -> Iterator[bytes]:
    """The lines of a file, without their ends and byte-order marks.

    Raises InputError as `read_blocks` does, and naming path and line where one has more than
    `limit` bytes.
    """
    number, rest = 1, io.BytesIO()
    for block in read_blocks(path, advance):
        *complete, last = block.split(b"\n")
        for line in complete:
            rest.write(line)
            yield _checked(rest, limit, path, number)
            rest = io.BytesIO()
            number += 1
        rest.write(last)
        if rest.tell() > limit:
            _checked(rest, limit, path, number)
    if rest.tell():
        yield _checked(rest, limit, path, number)


def read_whole(path: Path, limit: int, advance: Callable[[int], None]) -> bytes:
    """The content of a file. Raises InputError as `read_lines` does."""
    content = io.BytesIO()
    for block in read_blocks(path, advance):
        content.write(block)
        if content.tell() > limit:
            raise too_large(str(path), limit)
    return content.getvalue()


def too_large(place: str, limit: int) -> InputError:
    """What to raise for a record of more than `limit` bytes at `place`."""
    return InputError(
        f"{place}: one record of more than {limit >> 20:,} MiB, which takes some hundred times as "
        "much memory to tokenize; split it, or raise --max-record-mib"
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what goes wrong while the block reads `path` into an InputError for its cause."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; it was removed, or its name is wrong: put it back and run the "
            "same command again (finished parts are kept)"
        ) from None
    except MemoryError:
        raise InputError(
            f"{path}: not enough memory to read it; use fewer --workers, or a machine with more"
        ) from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        # What the system says has a number, what a decoder says has none.
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{path}: {failure(error)}") from None
        raise InputError(damaged(path, str(error))) from None


def damaged(path: Path, cause: str) -> str:
    """The message for a file whose content ends early or contradicts itself."""
    if "ictionary" in cause:
        return f"{path} was packed with a dictionary ({cause}); unpack it: zstd -d -D DICTIONARY"
    size = path.stat().st_size
    return f"{path} ({size:,} bytes) is truncated or damaged: {cause}; download it again"


def refuse_pointer(path: Path, head: bytes) -> None:
    """Raises InputError where a file stands in for one that was not fetched.

    Args:
        path: the file.
        head: its first bytes.
    """
    if head.startswith(LFS):
        raise InputError(f"{path} is a Git LFS pointer, not the file; fetch it with `git lfs pull`")
    if len(head) < HEAD_BYTES and ANNEX.fullmatch(head):
        raise InputError(
            f"{path} is a git-annex pointer, not the file; fetch it with `git annex get`"
        )


def true_content(content: bytes) -> tuple[str, str] | None:
    """What a file that starts with `content` holds instead of text, and what helps; or None."""
    head = content[:HEAD_BYTES]
    for name, magics in _MAGIC.items():
        if head.startswith(magics):
            return f"{name} data", f"give it the suffix {_SUFFIXES[name]}"
    for magic, name, fix in _OTHERS:
        if head.startswith(magic):
            return name, fix
    if head.lstrip().lower().startswith(_WEB_PAGE):
        return "a web page", "the download failed or asks for a login: download it again"
    if head.startswith(_WIDE) or is_wide(content):
        return "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW"
    return None


def is_wide(content: bytes) -> bool:
    """Whether every other byte of the start is zero, as where Latin letters are in UTF-16."""
    even, odd = content[:HEAD_BYTES:2], content[1:HEAD_BYTES:2]
    return len(odd) >= 4 and any(
        not any(zeros) and all(letters) for zeros, letters in ((even, odd), (odd, even))
    )


def head_of(path: Path) -> bytes:
    """The first bytes of a file as stored."""
    with reading(path), path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _refuse_foreign(path: Path, head: bytes, compression: str) -> None:
    if head.startswith(_MAGIC[compression]) or (compression in ("zstd", "lz4") and _skips(head)):
        return
    other = true_content(head)
    if other:
        raise InputError(f"{path} holds {other[0]}, not {compression} data; {other[1]}")
    if _is_text(head):
        raise InputError(
            f"{path} holds text that is not compressed, {head[:16]!r}: rename it {path.stem} if it "
            "was unpacked on its way, else download it again"
        )
    raise InputError(damaged(path, f"{compression} data does not start with {head[:16]!r}"))


def _is_text(head: bytes) -> bool:
    """Whether a file starts with UTF-8 text, whose last character may be cut off."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text.lstrip("\ufeff"))


def _skips(head: bytes) -> bool:
    """Whether a file starts with a frame that zstd and lz4 pass over."""
    return head[1:4] == b"\x2a\x4d\x18" and head[:1] >= b"\x50" and head[:1] <= b"\x5f"


def _checked(line: io.BytesIO, limit: int, path: Path, number: int) -> bytes:
    if line.tell() > limit:
        if number == 1 and line.getvalue()[:HEAD_BYTES].lstrip().startswith(b"["):
            raise InputError(f"{path} is one JSON array; {ONE_A_LINE}")
        raise too_large(f"{path}:{number}", limit)
    # Also within a file: it may be several, one behind the other.
    return line.getvalue().removeprefix(b"\xef\xbb\xbf")


def _decompressed(path: Path, raw: IO[bytes], compression: str | None) -> Iterator[bytes]:
    if compression is None:
        yield from _blocks_of(raw, READ_BYTES)
    elif compression == "xz":
        # Between its streams it allows zeros.
        yield from _frames(path, raw, lzma.LZMADecompressor, b"\0")
    elif compression == "bz2":
        yield from _frames(path, raw, bz2.BZ2Decompressor)
    else:
        # pyarrow's streams are used because, unlike zstandard's, they raise on a truncated file.
        import pyarrow

        # Whoever drops the stream closes the file.
        stream, done = pyarrow.CompressedInputStream(raw, compression), 0
        try:
            for block in _blocks_of(stream, READ_BYTES):
                done += len(block)
                yield block
        except OSError as error:
            if error.errno is not None or LONG_WINDOW not in str(error):
                raise
            raw.seek(0)
            yield from _without(done, _long_window_blocks(path, raw))
        except pyarrow.ArrowException as error:
            raise InputError(damaged(path, str(error))) from None


def _blocks_of(stream: IO[bytes], size: int) -> Iterator[bytes]:
    while block := stream.read(size):
        yield block


def _without(size: int, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """What follows after the first `size` bytes."""
    for block in blocks:
        if len(block) > size:
            yield block[size:]
        size = max(0, size - len(block))


def _long_window_blocks(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    """The content of a zstd file with windows of any length."""
    try:
        import zstandard
    except ImportError:
        raise InputError(
            f"{path} was packed with a window above 128 MiB (zstd --long), which needs the Python "
            "package zstandard: pip install zstandard, or pack it again: zstd -dc --long=31 OLD | "
            "zstd -o NEW"
        ) from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
    try:
        yield from _frames(path, raw, decompressor.decompressobj)
    except zstandard.ZstdError as error:
        if "memory" in str(error):
            raise MemoryError from None
        raise InputError(damaged(path, str(error))) from None


def _frames(
    path: Path, raw: IO[bytes], new_frame: Callable[[], Any], padding: bytes = b""
) -> Iterator[bytes]:
    """The content of compressed frames that lie end to end, perhaps with `padding` between them.

    `new_frame` makes what decompresses one of them, as bz2's, lzma's and zstandard's objects do.
    """
    frame, started = new_frame(), False
    for packed in _blocks_of(raw, PACKED_BYTES):
        rest = packed
        while rest := rest if started else rest.lstrip(padding):
            block = frame.decompress(rest)
            started = not frame.eof
            rest = b"" if started else frame.unused_data
            if frame.eof:
                frame = new_frame()
            if block:
                yield block
    if started:
        raise InputError(damaged(path, "its last frame ends early"))
