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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Literal

import numpy as np

from data.errors import InputError, failure
from data.files import sync_file, sync_folder
from data.manifest import DTYPES, HELD_OUT, MARKS, TRAIN, ShardRecord
from data.records import read_bytes

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_DTYPE_CODES = {"uint16": 8, "int32": 4, MARKS: 1}
NUMBERS = DTYPES | {MARKS: np.dtype("u1")}
"""What a shard may hold: tokens, or marks of tokens."""
INDEX_HEADER = struct.Struct("<9sQBQQ")
CHECKSUM_MAGIC = b"SHORNCRC"
CHECKSUM_HEADER = struct.Struct("<8sIQ")
BLOCK_BYTES = 1 << 20
AGAIN = "copy it again, or tokenize again with --overwrite"
SUFFIXES = (".bin", ".idx", ".crc")
MAX_OPEN = 1 << 14
"""Open files per reader."""

Verify = Literal["once", "always", "never"]


class ShardWriter:
    """Writes one shard under temporary names; `commit` makes it visible, `abort` removes it.

    Args:
        root: folder that the record's path is relative to.
        path: shard path below `root`, without suffix.
        dtype: "uint16" or "int32", or "uint8" for marks.
    """

    def __init__(self, root: Path, path: str, dtype: str) -> None:
        self._root = root
        self._path = path
        self._dtype_name = dtype
        self._dtype = NUMBERS[dtype]
        self._lengths = array.array("i")
        self._text_bytes = 0
        self._checksums = array.array("I")
        self._pending = bytearray()
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        self._temporary(".bin").write_bytes(b"")

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
        sync_file(self._temporary(".bin"))
        checksums = CHECKSUM_HEADER.pack(CHECKSUM_MAGIC, BLOCK_BYTES, self._bytes())
        checksums += np.asarray(self._checksums, "<u4").tobytes()
        index = self._index()
        for suffix, content in ((".idx", index), (".crc", checksums)):
            self._temporary(suffix).write_bytes(content)
            sync_file(self._temporary(suffix))
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
        for path in (*map(self._temporary, SUFFIXES), *map(self._final, SUFFIXES)):
            # What made us give up may stand in the way here too, and is the one to report.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _bytes(self) -> int:
        return sum(self._lengths) * self._dtype.itemsize

    def _write_blocks(self, size: int) -> None:
        for start in range(0, size, BLOCK_BYTES):
            block = self._pending[start : min(start + BLOCK_BYTES, size)]
            self._checksums.append(zlib.crc32(block))
        # Opened each time: a task may have more domains than a process may have open files.
        with self._temporary(".bin").open("ab") as file:
            file.write(self._pending[:size])
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
    """Tokens of one shard, checked block by block as they are touched.

    Threads may share a reader. Files are opened at the first read, and again at the first one after
    `close`; only the sizes of `.bin` and `.idx` are looked at before. The tokens are read, not
    mapped: of a file that shrinks or a disk that fails, a mapping tells by killing the process.

    Args:
        root: folder of the manifest.
        record: the shard's entry in the manifest.
        dtype: token dtype of the manifest.
        verify: check a block at its first touch by this reader, at every read, or not at all.
        opened: told of every read, so that it can close this shard; None leaves it open.

    Raises:
        InputError: `.bin` or `.idx` is missing or has another size than the record says.
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
        self._dtype = NUMBERS[dtype]
        self._verify = verify
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._checksums: np.ndarray | None = None
        self._checked: np.ndarray | None = None
        self._check_sizes()

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Copies tokens [start, start + len(out)) into `out`, whose type holds them.

        Raises:
            InputError: a block's checksum does not match.
        """
        # Another thread may close the shard; this reference keeps it open until the read is over.
        file = self._file
        if file is None:
            with self._lock:
                file = self._file
                if file is None:
                    file = self._file = self._open()
        if self._opened is not None:
            self._opened.touch(self)
        assert start >= 0 and start + len(out) <= self.record.tokens
        size = self._dtype.itemsize
        if self._verify != "never":
            assert self._checked is not None
            first = start * size // BLOCK_BYTES
            last = ((start + len(out)) * size - 1) // BLOCK_BYTES
            for block in range(first, last + 1):
                if self._verify == "always" or not self._checked[block]:
                    self._check_block(file, block)
        out[:] = np.frombuffer(self._read(file, start * size, len(out) * size), self._dtype)

    def check(self) -> None:
        """Reads the whole shard. Raises InputError unless all of it is as it was written."""
        self.documents()
        file = self._open()
        for block in range(-(-self._bytes // BLOCK_BYTES)):
            self._check_block(file, block)

    def close(self) -> None:
        """Gives the open file back; which blocks are checked is remembered."""
        self._file = None

    def documents(self) -> np.ndarray:
        """Start of each document and the end of the last, in tokens: int64 [documents + 1].

        Raises:
            InputError: `.idx` is not the file this shard was written with.
        """
        content = self._read_checked(".idx", self.record.idx_sha256)
        count = self.record.documents
        lengths = np.frombuffer(content, "<i4", count, INDEX_HEADER.size)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])

    @property
    def _bytes(self) -> int:
        return self.record.tokens * self._dtype.itemsize

    def _check_sizes(self) -> None:
        documents = self.record.documents
        index = INDEX_HEADER.size + 20 * documents + 8
        checksums = CHECKSUM_HEADER.size + 4 * -(-self._bytes // BLOCK_BYTES)
        for suffix, expected in ((".bin", self._bytes), (".idx", index), (".crc", checksums)):
            path = self._base + suffix
            try:
                # A folder may hold thousands of shards; pathlib would dominate the time to open it.
                found = os.stat(path).st_size  # noqa: PTH116
            except FileNotFoundError:
                raise InputError(f"shard {path} is missing; {AGAIN}") from None
            except OSError as error:
                raise InputError(f"shard {path}: {failure(error)}") from None
            except ValueError as error:
                # A locale that lacks letters of a domain's name is no fault of the manifest.
                if isinstance(error, UnicodeEncodeError) and not _has_surrogates(path):
                    raise
                raise InputError(f"shard path {path!r} cannot be one; {AGAIN}") from None
            if found != expected:
                raise InputError(
                    f"shard {path} has {found:,} bytes, the manifest says {expected:,}; {AGAIN}"
                )

    def _open(self) -> IO[bytes]:
        if self._checked is None:
            content = self._read_checked(".crc", self.record.crc_sha256)
            self._checksums = np.frombuffer(content, "<u4", offset=CHECKSUM_HEADER.size)
            self._checked = np.zeros(len(self._checksums), np.bool_)
        self._check_sizes()
        try:
            return open(self._base + ".bin", "rb", buffering=0)  # noqa: PTH123
        except OSError as error:
            raise InputError(f"shard {self._base}.bin: {failure(error)}") from None

    def _read(self, file: IO[bytes], start: int, size: int) -> bytes:
        """Bytes [start, start + size) of `.bin`."""
        try:
            content = os.pread(file.fileno(), size, start)
            while content and len(content) < size:
                more = os.pread(file.fileno(), size - len(content), start + len(content))
                if not more:
                    break
                content += more
        except OSError as error:
            raise InputError(f"shard {self._base}.bin: {failure(error)}") from None
        if len(content) < size:
            raise InputError(
                f"shard {self._base}.bin ends at byte {start + len(content):,}, but had "
                f"{self._bytes:,} when it was opened; {AGAIN}"
            )
        return content

    def _read_checked(self, suffix: str, sha256: str) -> bytes:
        path = self._base + suffix
        try:
            content = read_bytes(Path(path))
        except FileNotFoundError:
            raise InputError(f"shard {path} is missing; {AGAIN}") from None
        except OSError as error:
            raise InputError(f"shard {path}: {failure(error)}") from None
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise InputError(
                f"{path} is not the file the manifest describes (sha256 {found[:12]}..., expected "
                f"{sha256[:12]}...); {AGAIN}"
            )
        return content

    def _check_block(self, file: IO[bytes], block: int) -> None:
        assert self._checksums is not None and self._checked is not None
        start = block * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, self._bytes)
        found = zlib.crc32(self._read(file, start, end - start))
        expected = int(self._checksums[block])
        if found != expected:
            raise InputError(
                f"shard {self._base}.bin is damaged: block {block}, bytes {start:,} to "
                f"{end:,}, has CRC-32 {found:08x}, expected {expected:08x}; {AGAIN}"
            )
        self._checked[block] = True


def holds_shards(folder: Path) -> bool:
    """Whether a folder is a split of a token folder: shards in folders of domains, nothing else."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    own = all(path.suffix in SUFFIXES for path in files)
    return folder.name in (TRAIN, HELD_OUT) and bool(files) and own


def check_shards(
    root: Path, shards: Iterable[ShardRecord], dtype: str, advance: Callable[[int], None]
) -> None:
    """Reads whole shards. Raises InputError naming the first that is not as it was written.

    Args:
        root: what the records' paths are relative to.
        shards: the records.
        dtype: token dtype.
        advance: told the tokens read since the last call.
    """
    for shard in shards:
        for part, numbers in shard.parts(dtype):
            ShardReader(root, part, numbers, "once").check()
        advance(shard.tokens)


def _has_surrogates(path: str) -> bool:
    """Whether there are halves of pairs in `path`, which no encoding has."""
    return any("\ud800" <= letter <= "\udfff" for letter in path)
