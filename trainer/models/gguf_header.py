"""The header of a GGUF file, walked once: a damaged one is named before it is converted."""

import mmap
import re
import struct
from pathlib import Path

from data.errors import InputError, failure
from data.records import open_bytes
from trainer.models.families import FAMILIES
from trainer.models.limits import SIZE_LIMITS, shortened

# Bytes of a value by its type in the format; strings (8) and arrays (9) have none of their own.
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_INTEGERS = {2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_BLOCK = re.compile(r"^blk\.(\d+)\.")
_MAGIC = b"GGUF"
_DEEPEST_ARRAY = 4
_MOST_DIMENSIONS = 8
# Last part of a key that states a size -> the field of ModelConfig that it becomes.
_SIZES = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_layers",
    "head_count": "num_heads",
    "head_count_kv": "num_kv_heads",
    "key_length": "head_dim",
    "context_length": "max_position_embeddings",
}


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


def check_gguf(path: Path) -> None:
    """Raises InputError unless the header of a GGUF file is whole, states possible sizes and a
    known family, and says nothing that would be lost.

    The library that reads such files trusts every length in them, and counts on for years where
    one is damaged.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            walk = _Walk(data)
            walk.header()
    except OSError as error:
        raise InputError(f"cannot convert {path}: {failure(error)}") from None
    except (ValueError, struct.error) as error:
        raise InputError(
            f"cannot convert {path}: its header is damaged ({error}); fetch the file again"
        ) from None
    if walk.parts > 1:
        raise InputError(
            f"cannot convert {path}: it is one of {walk.parts} parts: join them first, with "
            "llama.cpp's `llama-gguf-split --merge FIRST_PART WHOLE.gguf`, and name the whole file"
        )
    if walk.architecture not in FAMILIES:
        raise InputError(
            f"cannot convert {path}: its architecture {shortened(repr(walk.architecture))} is not "
            f"supported; known families: {', '.join(FAMILIES)}"
        )
    if walk.scaled:
        raise InputError(
            f"cannot convert {path}: its rotary positions are scaled ({walk.scaled}), which "
            "transformers leaves out when it reads GGUF, so that another model would come out; "
            "fetch the safetensors version"
        )


class _Walk:
    """Goes through a header; ValueError or struct.error where it leads nowhere."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0
        self._blocks: int | None = None
        self.parts = 1
        """Files that the model is split over; of the parts no tensors are looked at."""
        self.architecture = ""
        self.scaled = ""
        """What scales the rotary positions; empty where nothing does."""

    def header(self) -> None:
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
            _require_possible(name, value)
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


def _require_possible(name: str, value: int) -> None:
    field = _SIZES.get(name.rpartition(".")[2])
    if field is not None and not 0 <= value <= SIZE_LIMITS[field]:
        raise ValueError(f"{name} is {value}; it can be {SIZE_LIMITS[field]} at most")
