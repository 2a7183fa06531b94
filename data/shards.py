"""Token shards in Megatron's .bin/.idx format, with block checksums beside them.

`.bin` holds the documents' ids, little-endian, one after another. `.idx` holds their lengths and
offsets (Megatron-LM, megatron/core/datasets/indexed_dataset.py). `.crc` holds the CRC-32 of every
1 MiB block of `.bin`, so that a reader can check just what it touches.
"""

import array
import contextlib
import hashlib
import os
import resource
import struct
import threading
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import IO, Literal

import numpy as np

from data.errors import InputError
from data.files import sync_folder
from data.manifest import DTYPES, ShardRecord

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_DTYPE_CODES = {"uint16": 8, "int32": 4}
INDEX_HEADER = struct.Struct("<9sQBQQ")
CHECKSUM_MAGIC = b"SHORNCRC"
CHECKSUM_HEADER = struct.Struct("<8sIQ")
BLOCK_BYTES = 1 << 20
SUFFIXES = (".bin", ".idx", ".crc")
MAX_OPEN = 1 << 14
"""Mapped files per reader; Linux allows a process 65,530 mappings."""

Verify = Literal["once", "always", "never"]


class ShardWriter:
    """Writes one shard under temporary names; `commit` makes it visible, `abort` removes it.

    Args:
        root: folder that the record's path is relative to.
        path: shard path below `root`, without suffix.
        dtype: "uint16" or "int32".
    """

    def __init__(self, root: Path, path: str, dtype: str) -> None:
        self._root = root
        self._path = path
        self._dtype_name = dtype
        self._dtype = DTYPES[dtype]
        self._lengths = array.array("i")
        self._text_bytes = 0
        self._checksums = array.array("I")
        self._pending = bytearray()
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = self._temporary(".bin").open("wb")

    def append(self, ids: np.ndarray, text_bytes: int) -> None:
        """Adds one document.

        Raises:
            InputError: an id does not fit the dtype; nothing of the document is written.
        """
        assert ids.ndim == 1 and len(ids)
        limit = int(np.iinfo(self._dtype).max)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > limit:
            raise InputError(
                f"token id {low if low < 0 else high} does not fit {self._dtype_name} (0 to "
                f"{limit}); the tokenizer gives ids outside its own vocabulary: repair its files"
            )
        self._lengths.append(len(ids))
        self._text_bytes += text_bytes
        self._pending += ids.astype(self._dtype).tobytes()
        if len(self._pending) >= BLOCK_BYTES:
            self._write_blocks(len(self._pending) // BLOCK_BYTES * BLOCK_BYTES)

    def commit(self) -> ShardRecord:
        """Makes the shard durable and visible under its final name."""
        self._write_blocks(len(self._pending))
        _finish(self._file)
        checksums = CHECKSUM_HEADER.pack(CHECKSUM_MAGIC, BLOCK_BYTES, self._bytes())
        checksums += np.asarray(self._checksums, "<u4").tobytes()
        index = self._index()
        for suffix, content in ((".idx", index), (".crc", checksums)):
            with self._temporary(suffix).open("wb") as file:
                file.write(content)
                _finish(file)
        for suffix in SUFFIXES:
            self._temporary(suffix).replace(self._final(suffix))
        sync_folder(self._final(".bin").parent)
        return ShardRecord(
            path=self._path,
            tokens=sum(self._lengths),
            documents=len(self._lengths),
            text_bytes=self._text_bytes,
            crc_sha256=hashlib.sha256(checksums).hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )

    def abort(self) -> None:
        """Removes everything this writer wrote, committed or not."""
        with contextlib.suppress(OSError):
            self._file.close()
        for suffix in SUFFIXES:
            self._temporary(suffix).unlink(missing_ok=True)
            self._final(suffix).unlink(missing_ok=True)

    def _bytes(self) -> int:
        return sum(self._lengths) * self._dtype.itemsize

    def _write_blocks(self, size: int) -> None:
        for start in range(0, size, BLOCK_BYTES):
            block = self._pending[start : min(start + BLOCK_BYTES, size)]
            self._checksums.append(zlib.crc32(block))
            self._file.write(block)
        del self._pending[:size]

    def _index(self) -> bytes:
        lengths = np.asarray(self._lengths, "<i4")
        count = len(lengths)
        offsets = np.zeros(count, "<i8")
        np.cumsum(lengths[:-1].astype("<i8") * self._dtype.itemsize, out=offsets[1:])
        header = INDEX_HEADER.pack(
            INDEX_MAGIC, INDEX_VERSION, INDEX_DTYPE_CODES[self._dtype_name], count, count + 1
        )
        documents = np.arange(count + 1, dtype="<i8")
        return header + lengths.tobytes() + offsets.tobytes() + documents.tobytes()

    def _final(self, suffix: str) -> Path:
        path = self._root / self._path
        return path.with_name(path.name + suffix)

    def _temporary(self, suffix: str) -> Path:
        # The process id keeps a left-over worker of a killed run out of this run's files.
        path = self._root / self._path
        return path.with_name(f"{path.name}{suffix}.{os.getpid()}.tmp")


class OpenShards:
    """The open ones among the shards of a reader, at most `limit`: each open shard holds a file
    descriptor.

    Opening one more closes the one that was read least recently. Threads may share it.
    """

    def __init__(self, limit: int) -> None:
        assert limit >= 1
        self.limit = limit
        self._shards: OrderedDict[ShardReader, None] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._shards)

    def touch(self, shard: "ShardReader") -> None:
        """Notes that `shard`, which is open, is being read."""
        with self._lock:
            self._shards[shard] = None
            self._shards.move_to_end(shard)
            while len(self._shards) > self.limit:
                self._shards.popitem(last=False)[0].close()


def allow_open_files(count: int) -> int:
    """How many of `count` more files this process may keep open, leaving most descriptors to
    others.

    Raises the soft limit (`ulimit -n`) towards the hard one where an eighth of it does not suffice.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(count, MAX_OPEN)
    if soft == resource.RLIM_INFINITY or count <= soft // 8:
        return count
    wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
    raised = 0
    # Some systems have a lower ceiling than the hard limit says.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        raised = wanted - soft
    return max(1, min(count, max(raised, soft // 8)))


class ShardReader:
    """Memory-mapped tokens of one shard, checked block by block as they are touched.

    Threads may share a reader. Files are opened at the first read, and again at the first one after
    `close`; only the size of `.bin` is looked at before.

    Args:
        root: folder of the manifest.
        record: the shard's entry in the manifest.
        dtype: token dtype of the manifest.
        verify: check a block at its first touch by this reader, at every read, or not at all.
        opened: told of every read, so that it can close this shard; None leaves it open.

    Raises:
        InputError: `.bin` is missing or has another size than the record says.
    """

    def __init__(
        self,
        root: Path,
        record: ShardRecord,
        dtype: str,
        verify: Verify,
        opened: OpenShards | None = None,
    ) -> None:
        self.record = record
        self._opened = opened
        self._base = f"{root}/{record.path}"
        self._dtype = DTYPES[dtype]
        self._verify = verify
        self._lock = threading.Lock()
        self._tokens: np.ndarray | None = None
        self._checksums: np.ndarray | None = None
        self._checked: np.ndarray | None = None
        self._check_size()

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Copies tokens [start, start + len(out)) into `out`, an int64 array.

        Raises:
            InputError: a block's checksum does not match.
        """
        # Another thread may close the shard; this reference keeps it mapped until the read is over.
        tokens = self._tokens
        if tokens is None:
            with self._lock:
                tokens = self._tokens
                if tokens is None:
                    tokens = self._tokens = self._open()
        if self._opened is not None:
            self._opened.touch(self)
        assert start >= 0 and start + len(out) <= len(tokens)
        if self._verify != "never":
            assert self._checked is not None
            size = self._dtype.itemsize
            first = start * size // BLOCK_BYTES
            last = ((start + len(out)) * size - 1) // BLOCK_BYTES
            for block in range(first, last + 1):
                if self._verify == "always" or not self._checked[block]:
                    self._check_block(tokens, block)
        out[:] = tokens[start : start + len(out)]

    def close(self) -> None:
        """Gives the mapped file back; which blocks are checked is remembered."""
        self._tokens = None

    def documents(self) -> np.ndarray:
        """Start of each document and the end of the last, in tokens: int64 [documents + 1].

        Raises:
            InputError: `.idx` is not the file this shard was written with.
        """
        content = self._read_checked(".idx", self.record.idx_sha256)
        count = self.record.documents
        lengths = np.frombuffer(content, "<i4", count, INDEX_HEADER.size)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])

    def _check_size(self) -> None:
        path = self._base + ".bin"
        expected = self.record.tokens * self._dtype.itemsize
        try:
            # A folder may hold thousands of shards; pathlib would dominate the time to open it.
            found = os.stat(path).st_size  # noqa: PTH116
        except FileNotFoundError:
            raise InputError(f"shard {path} is missing; copy it again or tokenize again") from None
        if found != expected:
            raise InputError(
                f"shard {path} has {found:,} bytes, the manifest says {expected:,}; "
                "copy it again or tokenize again"
            )

    def _open(self) -> np.ndarray:
        if self._verify != "never" and self._checked is None:
            content = self._read_checked(".crc", self.record.crc_sha256)
            self._checksums = np.frombuffer(content, "<u4", offset=CHECKSUM_HEADER.size)
            self._checked = np.zeros(len(self._checksums), np.bool_)
        # Mapping a file that shrank since it was first looked at would crash at the first access.
        self._check_size()
        return np.memmap(self._base + ".bin", self._dtype, "r")

    def _read_checked(self, suffix: str, sha256: str) -> bytes:
        path = self._base + suffix
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error}; copy it again") from None
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise InputError(
                f"{path} is not the file the manifest describes (sha256 {found[:12]}..., expected "
                f"{sha256[:12]}...); copy it again or tokenize again"
            )
        return content

    def _check_block(self, tokens: np.ndarray, block: int) -> None:
        assert self._checksums is not None and self._checked is not None
        size = self._dtype.itemsize
        start = block * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, len(tokens) * size)
        found = zlib.crc32(tokens[start // size : end // size].data)
        expected = int(self._checksums[block])
        if found != expected:
            raise InputError(
                f"shard {self._base}.bin is damaged: block {block}, bytes {start:,} to "
                f"{end:,}, has CRC-32 {found:08x}, expected {expected:08x}; copy it again or "
                "tokenize again"
            )
        self._checked[block] = True


def _finish(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
