"""Losses that are scored already, kept in the output folder, so that a run goes on from there."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.models.hf import save_tensors
from trainer.parallel import DistributedContext

FOLDER = "scores"
"""Name of the folder of kept losses in the output folder."""
_ROWS = "losses"


class KeptRows:
    """Rows [n, K] fp64 in a file that is written anew after every pass; the same on every rank. A
    damaged file is not used."""

    def __init__(self, path: Path, context: DistributedContext) -> None:
        self.path = path
        self.rows: Tensor | None = context.broadcast(self._read() if context.is_main else None)

    def add(self, rows: Tensor, context: DistributedContext) -> None:
        """Appends `rows`; collective. Raises InputError where the file cannot be written."""
        self.rows = rows if self.rows is None else torch.cat([self.rows, rows])
        context.raise_first(self._write() if context.is_main else None)

    def _read(self) -> Tensor | None:
        try:
            return load_file(self.path)[_ROWS]
        except (OSError, SafetensorError, KeyError):
            return None

    def _write(self) -> str | None:
        assert self.rows is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({_ROWS: self.rows}, self.path)
        except (OSError, SafetensorError) as error:
            return f"--output {self.path.parent.parent} cannot be written ({error}); free space"
        return None
