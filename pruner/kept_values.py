"""Measured numbers by name, kept in a JSON file, from which an interrupted search goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.files import write_text
from data.records import fits, read_json
from trainer.parallel import DistributedContext


def read_values(path: Path, form: Any, context: DistributedContext) -> dict[str, Any]:
    """What `path` keeps, on every rank; nothing where it is missing, damaged or not of the `form`
    (data.records.fits)."""

    def read() -> dict[str, Any]:
        try:
            found: dict[str, Any] = read_json(path, "")
        except InputError:
            return {}
        return found if fits(found, form) else {}

    values: dict[str, Any] = context.broadcast(read() if context.is_main else {})
    return values


def keep_values(path: Path, values: Mapping[str, Any], context: DistributedContext) -> None:
    """Writes finite `values`: JSON knows no infinity. Raises InputError on every rank where that
    fails."""

    def write() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(values))
        except OSError as error:
            raise InputError(
                f"{path} cannot be written ({error}); free space, or choose another folder"
            ) from error

    context.raise_on_any_rank(write if context.is_main else lambda: None)
