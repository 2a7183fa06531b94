"""Checkpoints that either exist completely or not at all.

A checkpoint is a folder `step-00000010`: sharded model and optimizer state
(torch.distributed.checkpoint, so that any number of ranks can load it), `state.pt` with everything
small, and `COMMITTED` with the SHA-256 of every file. It is written under a temporary name and
renamed when all of it is on disk.
"""

import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from data.errors import InputError
from data.files import sync_file, sync_folder, write_json
from trainer.loop import Callback, Trainer
from trainer.parallel import DistributedContext

MARKER = "COMMITTED"
STATE_FILE = "state.pt"


class Checkpointer:
    """Saves and restores a trainer; `directory` must be on a file system that all ranks share."""

    def __init__(self, directory: Path, context: DistributedContext, *, keep: int = 2) -> None:
        self.directory = directory
        self.context = context
        self.keep = keep

    def latest(self) -> Path | None:
        """The newest committed checkpoint, the same on every rank."""
        return self.context.broadcast(_committed(self.directory)[-1:] or [None])[0]

    def save(self, trainer: Trainer) -> Path:
        """Saves the state after `trainer.step` steps.

        Raises InputError on every rank when the disk is full or cannot be written; older
        checkpoints stay.
        """
        final = self.directory / f"step-{trainer.step:08d}"
        partial = self.directory / f".{final.name}.partial"
        if self.context.broadcast((final / MARKER).exists()):
            return final
        self.context.raise_first(self._prepare(partial, trainer) if self.context.is_main else None)
        rng = self.context.gather(_rng_state())
        model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
        self._write_shards({"model": model, "optimizer": optimizer}, partial)
        problem = None
        if self.context.is_main:
            problem = _attempt(lambda: _write_state(trainer, rng, partial / STATE_FILE), partial)
        self.context.raise_first(problem)
        hashes = self._hash_files(partial)
        if self.context.is_main:
            problem = _attempt(lambda: self._commit(trainer, partial, final, hashes), partial)
        self.context.raise_first(problem)
        return final

    def restore(self, trainer: Trainer, path: Path) -> None:
        """Loads a checkpoint into `trainer`, also when it was saved by another number of ranks.

        Raises InputError naming the file when a content hash differs, or when the callbacks differ
        from the saved ones.
        """
        self._verify(path)
        state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
        _refuse_other_callbacks(path, state, trainer.callbacks)
        decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
        model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
        dcp.load(parts, checkpoint_id=path, process_group=self.context.cpu_group)
        set_state_dict(
            trainer.model,
            trainer.optimizer,
            model_state_dict=parts["model"],
            optim_state_dict=parts["optimizer"],
        )
        # Options may change on resume; what the checkpoint remembers of them must not win.
        for group, decay in zip(trainer.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        trainer.step, trainer.tokens = state["step"], state["tokens"]
        trainer.loss = state["loss"]
        trainer.throughput.load_state_dict(state["throughput"])
        trainer.stream.load_state_dict(state["stream"])
        for callback in trainer.callbacks:
            if callback.name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.name])
        if self.context.rank < len(state["rng"]):
            _set_rng_state(state["rng"][self.context.rank])

    def clean(self) -> None:
        """Removes what an interrupted save left behind."""
        if self.context.is_main and self.directory.is_dir():
            for partial in self.directory.glob(".step-*"):
                shutil.rmtree(partial, ignore_errors=True)
        self.context.barrier()

    def _prepare(self, partial: Path, trainer: Trainer) -> str | None:
        shutil.rmtree(partial, ignore_errors=True)
        problem = _attempt(lambda: partial.mkdir(parents=True), partial)
        if problem:
            return problem
        # Weights and two Adam moments in fp32.
        needed = 12 * sum(parameter.numel() for parameter in trainer.model.parameters())
        free = shutil.disk_usage(partial).free
        if free < needed:
            shutil.rmtree(partial, ignore_errors=True)
            return _disk_full(self.directory, f"{free / 1e9:.1f} of {needed / 1e9:.1f} GB are free")
        return None

    def _write_shards(self, state: dict[str, Any], partial: Path) -> None:
        writer = dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True)
        problem = None
        try:
            dcp.save(state, storage_writer=writer, process_group=self.context.cpu_group)
        except (CheckpointException, OSError) as error:
            problem = _describe(error, partial)
        self.context.raise_first(problem)

    def _hash_files(self, folder: Path) -> dict[str, str]:
        """SHA-256 of every file, the work divided over ranks."""
        names = self.context.broadcast(sorted(p.name for p in folder.iterdir()))
        mine = {n: _sha256(folder / n) for n in names[self.context.rank :: self.context.world]}
        return {name: value for part in self.context.gather(mine) for name, value in part.items()}

    def _commit(self, trainer: Trainer, partial: Path, final: Path, hashes: dict[str, str]) -> None:
        marker = {"step": trainer.step, "tokens": trainer.tokens, "sha256": hashes}
        write_json(partial / MARKER, marker)
        shutil.rmtree(final, ignore_errors=True)  # a folder of that name without a marker
        partial.rename(final)
        sync_folder(self.directory)
        for old in _committed(self.directory)[: -self.keep]:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = old.rename(old.with_name(f".{old.name}.removed"))
            shutil.rmtree(doomed, ignore_errors=True)

    def _verify(self, path: Path) -> None:
        expected = json.loads((path / MARKER).read_text(encoding="utf-8"))["sha256"]
        problem = None
        for name in sorted(expected)[self.context.rank :: self.context.world]:
            file = path / name
            actual = _sha256(file) if file.exists() else "a missing file"
            if actual != expected[name]:
                problem = (
                    f"{file}: SHA-256 is {actual[:16]}, the checkpoint was committed with "
                    f"{expected[name][:16]}; the file is damaged: delete the folder {path} to "
                    "resume from the checkpoint before it"
                )
        self.context.raise_first(problem)


def latest_step(directory: Path) -> int | None:
    """Number of steps behind the newest committed checkpoint in `directory`."""
    committed = _committed(directory)
    return int(committed[-1].name.removeprefix("step-")) if committed else None


def _refuse_other_callbacks(path: Path, state: dict[str, Any], callbacks: list[Callback]) -> None:
    saved, present = set(state["callbacks"]), {callback.name for callback in callbacks}
    optional = {*state["optional"], *(c.name for c in callbacks if c.optional_state)}
    if (saved ^ present) - optional:
        raise InputError(
            f"{path}: holds the state of {sorted(saved)}, this run has {sorted(present)}; "
            "resume it with the command that started it"
        )


def _committed(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if (path / MARKER).exists())


def _write_state(trainer: Trainer, rng: list[dict[str, Any]], path: Path) -> None:
    state = {
        "step": trainer.step,
        "tokens": trainer.tokens,
        "loss": trainer.loss,
        "throughput": trainer.throughput.state_dict(),
        "stream": trainer.stream.state_dict(),
        "callbacks": {callback.name: callback.state_dict() for callback in trainer.callbacks},
        "optional": [callback.name for callback in trainer.callbacks if callback.optional_state],
        "rng": rng,
    }
    torch.save(state, path)
    sync_file(path)


def _rng_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _attempt(action: Any, partial: Path) -> str | None:
    """Runs `action`; returns what went wrong on the file system, if anything."""
    try:
        action()
    except OSError as error:
        return _describe(error, partial)
    return None


def _describe(error: BaseException, partial: Path) -> str:
    shutil.rmtree(partial, ignore_errors=True)
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return _disk_full(partial.parent, "the disk is full")
    return f"{partial.parent}: the checkpoint cannot be written: {text.strip().splitlines()[-1]}"


def _disk_full(directory: Path, reason: str) -> str:
    return (
        f"{directory}: no room for a checkpoint ({reason}); free some space or lower "
        "--keep-checkpoints, then run the same command again: it resumes from the last checkpoint"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
