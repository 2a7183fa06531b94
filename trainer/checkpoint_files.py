"""The files of a checkpoint: which folders are checkpoints, and their contents, read as data alone.

Nothing in a checkpoint is executed: what PyTorch's checkpoint library would unpickle freely goes
through a list of the types that belong there.
"""

import hashlib
import io
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from data.errors import InputError, failure
from data.records import open_bytes, read_json

MARKER = "COMMITTED"
STATE_FILE = "state.pt"
METADATA_FILE = ".metadata"
RECORD = ".checkpointed"
"""File of a run's folder that says that a checkpoint was committed: where none is left then, they
are lost."""

_NAME = re.compile(r"step-[0-9]{8,}")
_STATE_KEYS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "tokens": int,
    "loss": float,
    "throughput": dict,
    "stream": dict,
    "callbacks": dict,
    "rng": list,
}
_CHECKPOINT = "torch.distributed.checkpoint"
_TYPES = {
    *((f"{_CHECKPOINT}.metadata", name) for name in dcp.metadata.__all__),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath",)),
    ("collections", "OrderedDict"),
}
"""What a `.metadata` may be made of: descriptions of tensors and of where they lie."""


def folder_name(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Number of steps behind a checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def committed(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, oldest first; other folders and files are passed over.

    Raises InputError when the folder cannot be read, or is a link that leads nowhere.
    """
    try:
        if not directory.exists() and not directory.is_symlink():
            return []
        found = [
            path
            for path in directory.iterdir()
            if _NAME.fullmatch(path.name) and folder_name(step_of(path)) == path.name
        ]
        return sorted((path for path in found if (path / MARKER).exists()), key=step_of)
    except OSError as error:
        fix = "make it readable, or put it back: a run goes on from its checkpoints"
        raise InputError(f"{directory}: {failure(error, fix)}") from None


def latest_step(directory: Path) -> int | None:
    """Number of steps behind the newest committed checkpoint in `directory`."""
    found = committed(directory)
    return step_of(found[-1]) if found else None


def read_marker(path: Path) -> dict[str, Any]:
    """COMMITTED of the checkpoint `path`.

    Raises InputError when it cannot be read, and when it belongs to another step than the folder's
    name says.
    """
    keys: dict[str, Any] = {"step": int, "sha256": dict}
    marker: dict[str, Any] = read_json(path / MARKER, way_around(path), keys=keys)
    if marker["step"] != step_of(path):
        name = folder_name(marker["step"])
        again = "" if (path.parent / name).exists() else f"call it {name} again, or "
        raise InputError(
            f"{path}: holds the state after step {marker['step']}; {again}move it out of "
            f"{path.parent}"
        )
    return marker


def way_around(path: Path) -> str:
    """What helps against a checkpoint that cannot be used: the one before it, if there is one."""
    older = [other for other in committed(path.parent) if step_of(other) < step_of(path)]
    if older:
        return f"delete the folder {path} to resume from {older[-1].name}"
    record = path.parent.parent / RECORD
    return (
        "restore it from a copy; there is no older one: to begin again, "
        f"delete the folder {path} and {record}"
    )


def read_state(path: Path, step: int) -> dict[str, Any]:
    """state.pt of the checkpoint `path`, which was made after `step` steps; executes nothing.

    Raises InputError for anything else than what a checkpoint of ours holds.
    """
    file = path / STATE_FILE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{file}: {failure(error, way_around(path))}") from None
    # PyTorch raises what its zip reader, its unpickler or a damaged record happen to raise.
    except Exception as error:
        raise InputError(f"{file}: {unreadable(error)}; {way_around(path)}") from None
    wrong = [
        name
        for name, kind in _STATE_KEYS.items()
        if not isinstance(state, dict) or not isinstance(state.get(name), kind)
    ]
    if wrong:
        raise InputError(f"{file}: `{wrong[0]}` is missing or of another type; {way_around(path)}")
    if state["step"] != step:
        raise InputError(
            f"{file}: is of step {state['step']}, the checkpoint of step {step}; {way_around(path)}"
        )
    found: dict[str, Any] = state
    return found


class _Unpickler(pickle._Unpickler):
    """Makes nothing but what describes tensors.

    The one written in Python: in the other a few damaged bytes allocate gigabytes.
    """

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _TYPES
        if not known and not (module == "torch" and isinstance(getattr(torch, name), torch.dtype)):
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def read_metadata(path: Path, files: Iterable[str]) -> Metadata:
    """`.metadata` of the checkpoint `path`: which tensors it holds and where in `files` they lie.

    Raises InputError for any other content, without executing it.
    """
    file = path / METADATA_FILE
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
        places = {info.relative_path for info in metadata.storage_data.values()}
        if not isinstance(metadata, Metadata) or not places <= set(files):
            raise pickle.UnpicklingError("it does not describe the files beside it")
        metadata.state_dict_metadata.items()
    except OSError as error:
        raise InputError(f"{file}: {failure(error, way_around(path))}") from None
    # A damaged pickle can raise anything.
    except Exception as error:
        raise InputError(f"{file}: {unreadable(error)}; {way_around(path)}") from None
    return metadata


class SafeReader(dcp.FileSystemReader):
    """The checkpoint library's reader, which takes `.metadata` from `read_metadata`."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description of the tensors, as it was checked."""
        if getattr(self._metadata, "storage_meta", None) is None:
            self._metadata.storage_meta = StorageMeta()
        assert self._metadata.storage_meta is not None
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


class SafePlanner(DefaultLoadPlanner):
    """The checkpoint library's planner, which unpickles numbers and names alone."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """As the library's, of what `torch.load` reads with weights_only."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def tensor_problem(expected: Mapping[str, torch.Tensor], metadata: Metadata) -> str | None:
    """What to say when a checkpoint's tensors are not the `expected` ones; None when they are."""
    saved = {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    sizes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for names, problem in (
        (sizes.keys() - saved.keys(), "lacks"),
        (saved.keys() - sizes.keys(), "also holds"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{problem} {min(names)}{more}"
    for name in sorted(sizes):
        if sizes[name] != saved[name]:
            return f"holds {name} with the sizes {saved[name]}, not {sizes[name]}"
    return None


def unreadable(error: BaseException) -> str:
    """The cause in one line, of what a library raised about a checkpoint's content."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if text.startswith("Weights only load failed"):
        # PyTorch goes on to say how to execute it.
        text = "it holds more than numbers, names and tensors"
    return f"not the content of a checkpoint ({text[:200]})"


def damage_of(path: Path, name: str, expected: Mapping[str, str]) -> str | None:
    """What to say where the file `name` of the checkpoint `path` is not what was committed."""
    file = path / name
    try:
        actual = sha256_of(file)
    except FileNotFoundError:
        actual = "a missing file"
    except OSError as error:
        return f"{file}: {failure(error)}"
    if actual == expected[name]:
        return None
    return (
        f"{file}: SHA-256 is {actual[:16]}, the checkpoint was committed with "
        f"{str(expected[name])[:16]}; the file is damaged: {way_around(path)}"
    )


def innermost(error: BaseException) -> BaseException:
    """What a rank raised, of an error in which the checkpoint library gathered all ranks'."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open_bytes(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
