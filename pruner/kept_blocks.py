"""Blocks that are refitted already, kept in the output folder for an interrupted refit."""

import itertools
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from trainer.models.hf import save_tensors
from trainer.parallel import DistributedContext


class KeptBlocks:
    """The refitted blocks of an interrupted refit, one file each; None keeps nothing."""

    def __init__(self, folder: Path | None, context: DistributedContext) -> None:
        self.folder = folder
        self.context = context
        numbers = itertools.count() if folder is not None and context.is_main else ()
        whole = itertools.takewhile(lambda number: _is_whole(self._path(number)), numbers)
        self.count: int = context.broadcast(len(list(whole)))
        """Blocks that are there from the first one on."""

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{number:05d}.safetensors"

    def read(self, number: int) -> dict[str, Tensor] | None:
        """The parameters of block `number` by their names inside it, if they are kept."""
        return load_file(self._path(number)) if number < self.count else None

    def keep(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Writes the parameters of block `number`; collective. Raises InputError on every rank."""
        problem = None
        if self.folder is not None and self.context.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_tensors(tensors, self._path(number))
            except (OSError, SafetensorError) as error:
                problem = f"{self.folder} cannot be written ({error}); free space, and run it again"
        self.context.raise_first(problem)


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
