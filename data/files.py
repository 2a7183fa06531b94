"""Files and folders that appear whole or not at all, on disk before anybody relies on them.

They get the permissions of the user's umask.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import InputError, failure
from data.records import open_bytes

NEEDED = (
    "run.json",
    "metrics.jsonl",
    "mixture.jsonl",
    "history.jsonl",
    "target.json",
    "reference.json",
    "shear.json",
    "cpt.json",
    "finetune.json",
    "masks.safetensors",
    "moments.safetensors",
    "source.safetensors",
    ".checkpointed",
    ".lock",
    "manifest.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
"""Files of runs, token folders and models, which no report may replace."""
_RESULT_BYTES = 1 << 26
"""More than any result has."""
NEEDED_SUFFIXES = (".safetensors", ".gguf", ".model", ".bin", ".idx", ".crc", ".pt")
"""Suffixes of weights, tokenizers and shards, which none may replace either."""


def write_text(path: Path, text: str) -> None:
    """Writes a file, and its folder where that is missing. Raises OSError when that fails.

    The odd bytes of names that are no UTF-8 are escaped, as they are when such names are printed.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        partial.write_bytes(content)
        replace_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file as `write_text` does, with null for numbers that are not finite."""
    write_text(path, json.dumps(finite_only(content), indent=1) + "\n")


def finite_only(value: Any) -> Any:
    """`value` with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite_only(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_copy(path: str | None, content: dict[str, Any]) -> None:
    """Writes what a command measured to the file that --json names, if it names one.

    Raises InputError when that fails, as on a full disk.
    """
    if path is None:
        return
    try:
        write_json(Path(path), content)
    except OSError as error:
        raise InputError(
            f"--json {path}: cannot be written: {failure(error, 'name another file')}"
        ) from None


def partial_path(path: Path) -> Path:
    """Where this process writes what becomes `path`; other processes write elsewhere."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def replace_file(partial: Path, path: Path) -> None:
    """Moves a written file to `path`, in place of what is there, once it is on disk."""
    sync_file(partial)
    partial.replace(path)
    sync_folder(path.parent)


def replace_folder(new: Path, path: Path) -> None:
    """Moves the folder `new` to `path`, in place of what is there, once its files are on disk."""
    sync_files(new)
    old = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Waits until the content of a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_files(folder: Path) -> None:
    """Waits until all files of a folder are on disk, content and names."""
    for path in folder.iterdir():
        if path.is_dir():
            sync_files(path)
        else:
            sync_file(path)
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Waits until names that were given in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(name: str | Path | None, option: str) -> None:
    """Raises InputError, naming `option`, when `write_text` could not write the file `name`, or
    would replace what a run, a model or a token folder cannot do without, or what is no result.

    None is an option left out. Leaves nothing behind; a file that exists stays as it is. Refused
    too: what is no regular file, such as /dev/stdout, for `write_text` would put a file in its
    place; and a record that a model, tokens or a run cannot be read without.
    """
    if name is None:
        return
    path = Path(name)
    try:
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; name a file in it")
        if (path.exists() and not path.is_file()) or _leads_to_a_stream(path):
            raise InputError(
                f"{option} {path} is a device or a pipe, which a file would replace; name a regular"
                " file, and read that afterwards"
            )
        target = path.resolve()
        if path.exists() and (target.name in NEEDED or target.suffix in NEEDED_SUFFIXES):
            raise InputError(
                f"{option} {path}: would replace a file that a run, a model or a token folder "
                "needs; name another file"
            )
        if path.exists() and not _is_result(path, table=option == "--csv"):
            raise InputError(
                f"{option} {path}: would replace a file that is no result of a command; name "
                "another file"
            )
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{option} {path}: cannot write there: {failure(error, 'name another file')}"
        ) from None


def _is_result(path: Path, *, table: bool) -> bool:
    """Whether a file has the name or the form of what commands write for the user: a page, a
    picture, JSON, or a table where `table` says that one is written. Raises OSError."""
    if path.suffix in (".html", ".htm", ".json", ".csv", ".png"):
        return True
    with open_bytes(path) as file:
        head = file.read(_RESULT_BYTES)
    if not head or head.startswith((b"<!doctype html", b"\x89PNG")):
        return True
    if table and b"," in head.partition(b"\n")[0] and b"\0" not in head:
        return True
    try:
        return len(head) < _RESULT_BYTES and isinstance(json.loads(head), dict)
    except (ValueError, RecursionError):
        return False


def _leads_to_a_stream(path: Path) -> bool:
    """Whether a path is a link such as /dev/stdout, whichever file the stream goes to."""
    return path.is_symlink() and path.readlink().is_relative_to("/proc")


def require_distinct(files: Mapping[str, str | Path | None]) -> None:
    """Raises InputError when two options, by flag, name one file: the last writer would win.

    None is an option left out.
    """
    known: dict[Path, str] = {}
    for option, name in files.items():
        if name is None:
            continue
        path = Path(name).resolve()
        if path in known:
            raise InputError(f"{known[path]} and {option} name one file, {name}; name two")
        known[path] = option


def follow_umask(path: Path) -> None:
    """Gives a file, or a folder with all its files, the permissions that new ones would have.

    safetensors and tempfile make theirs readable by their owner alone.
    """
    # There is no way to read the umask without setting it.
    umask = os.umask(0o077)
    os.umask(umask)
    if path.is_dir():
        path.chmod(0o777 & ~umask)
        for entry in path.iterdir():
            follow_umask(entry)
    else:
        path.chmod(0o666 & ~umask)
