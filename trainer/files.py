"""Files and folders that appear whole or not at all, with the permissions of the user's umask."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from data.errors import InputError


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Writes a JSON report so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def require_writable(path: Path, option: str) -> None:
    """Raises InputError, naming `option`, when `write_report` could not write `path`.

    Leaves nothing behind; a file that exists stays as it is.
    """
    try:
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; name a file in it")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{option} {path}: cannot write there: {error.strerror}; name a file in another folder"
        ) from None


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file. Raises OSError or SafetensorError when that fails."""
    partial = path.with_name(f".{path.name}.partial")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, partial, metadata=metadata)
    follow_umask(partial)
    partial.replace(path)


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


def replace_folder(new: Path, path: Path) -> None:
    """Moves the folder `new` to `path`, in place of what is there, once its files are on disk."""
    for file in new.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    old = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)
