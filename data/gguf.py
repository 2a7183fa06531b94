"""GGUF files: told from others, and their headers walked once, before anything trusts them."""

import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from data.errors import InputError, failure
from data.records import open_bytes

# Bytes of a value by its type in the format; strings (8) and arrays (9) have none of their own.
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_INTEGERS = {2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_BLOCK = re.compile(r"^blk\.(\d+)\.")
_MAGIC = b"GGUF"
_DEEPEST_ARRAY = 4
_MOST_DIMENSIONS = 8


def is_gguf(path: Path) -> bool:
    """Whether a file is one in GGUF: by its suffix in any case, or where it has no suffix (some
    programs keep models under their checksums) by its first bytes."""
    if path.suffix or not path.is_file():
        return path.suffix.lower() == ".gguf" and path.is_file()
    try:
        with open_bytes(path) as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files in `folder`, by name."""
    # Hidden ones are another system's notes about the file of that name (._model.gguf).
    visible = (file for file in sorted(folder.iterdir()) if not file.name.startswith("."))
    return [file for file in visible if is_gguf(file)]


def read_header(path: Path, limits: Mapping[str, int]) -> "Header":
    """The header of a GGUF file; raises InputError unless it is whole.

    The library that reads such files trusts every length in them, and counts on for years where
    one is damaged.

    Args:
        limits: the largest value of each size, by the last part of its key.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = Header(data, limits)
            header.walk()
            return header
    except OSError as error:
        raise InputError(f"cannot convert {path}: {failure(error)}") from None
    except (ValueError, struct.error) as error:
        raise InputError(
            f"cannot convert {path}: its header is damaged ({error}); fetch the file again"
        ) from None


class Header:
    """What a header says; `walk` goes through it, and raises ValueError or struct.error where it
    leads nowhere."""

    def __init__(self, data: mmap.mmap, limits: Mapping[str, int]) -> None:
        self._data, self._at = data, 0
        self._limits = limits
        self._blocks: int | None = None
        self.parts = 1
        """Files that the model is split over; of the parts no tensors are looked at."""
        self.architecture = ""
        self.scaled = ""
        """What scales the rotary positions; empty where nothing does."""

    def walk(self) -> None:
        """Magic, version, the keys with their values, and what is said of each tensor."""
        if self._data[: len(_MAGIC)] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._at = len(_MAGIC)
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(
                f"version {version}; 2 and 3 can be read, on machines with little-endian numbers"
            )
        tensors, keys = self._number("<Q"), self._number("<Q")
        for _ in range(keys):
            name = self._string().decode("utf-8", "replace")
            self._value(name, self._number("<I"))
        if self.parts > 1:
            return
        numbers: set[str] = set()
        for _ in range(tensors):
            name = self._string().decode("utf-8", "replace")
            numbers |= set(_BLOCK.findall(name))
            if name.startswith("rope_"):
                self.scaled = name
            dimensions = self._number("<I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            self._skip(8 * dimensions + 4)
            if self._number("<Q") >= len(self._data):
                raise ValueError("a tensor begins behind the end of the file")
        if self._blocks is not None and len(numbers) != self._blocks:
            raise ValueError(f"it states {self._blocks} blocks and holds {len(numbers)}")

    def _value(self, name: str, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            text = self._string()
            if name.endswith(".rope.scaling.type") and text != b"none":
                self.scaled = name
            elif name == "general.architecture":
                self.architecture = text.decode("utf-8", "replace")
        elif kind == _ARRAY:
            self._array(name, depth)
        elif kind not in _BYTES:
            raise ValueError(f"{name} is of type {kind}, which the format does not have")
        elif kind in _INTEGERS:
            value = self._number(_INTEGERS[kind])
            limit = self._limits.get(name.rpartition(".")[2])
            if limit is not None and not 0 <= value <= limit:
                raise ValueError(f"{name} is {value}; it can be {limit} at most")
            if name.endswith(".block_count"):
                self._blocks = value
            elif name == "split.count":
                self.parts = value
        else:
            self._skip(_BYTES[kind])

    def _array(self, name: str, depth: int) -> None:
        kind, length = self._number("<I"), self._number("<Q")
        if depth == _DEEPEST_ARRAY:
            raise ValueError(f"{name} holds lists in lists in lists")
        if kind in _BYTES:
            self._skip(length * _BYTES[kind])
            return
        for _ in range(length):
            self._value(name, kind, depth + 1)

    def _number(self, format: str) -> int:
        (value,) = struct.unpack_from(format, self._data, self._at)
        self._at += struct.calcsize(format)
        return int(value)

    def _string(self) -> bytes:
        start = self._at + 8
        self._skip(self._number("<Q"))
        return self._data[start : self._at]

    def _skip(self, length: int) -> None:
        self._at += length
        if self._at > len(self._data):
            raise ValueError("the file ends inside it")
