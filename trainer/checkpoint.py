"""Checkpoints that either exist completely or not at all.

A checkpoint is a folder `step-00000010`: sharded model and optimizer state
(torch.distributed.checkpoint, so that any number of ranks can load it), `state.pt` with everything
small, and `COMMITTED` with the run it belongs to, its step and the SHA-256 of every file. It is
written under a temporary name and renamed when all of it is on disk.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from os.path import samestat
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from data.errors import InputError, failure
from data.files import sync_file, sync_folder, write_json
from data.log import logger
from trainer.checkpoint_files import (
    MARKER,
    RECORD,
    STATE_FILE,
    SafePlanner,
    SafeReader,
    committed,
    damage_of,
    folder_name,
    innermost,
    read_marker,
    read_metadata,
    read_state,
    sha256_of,
    step_of,
    tensor_problem,
    unreadable,
    way_around,
)
from trainer.disk import CHECKPOINT_BYTES, free_bytes, is_out_of_space, is_too_large, size_text
from trainer.identity import same_run
from trainer.loop import Callback, Trainer
from trainer.parallel import DistributedContext, to_local

_LEFT_OVER = re.compile(r"\.step-[0-9]{8,}\.(partial|removed)")


class Checkpointer:
    """Saves and restores a trainer.

    Args:
        directory: on a file system that all ranks share.
        context: the ranks.
        keep: number of newest checkpoints kept.
        identity: of the run (trainer.identity), written into its checkpoints; those of other runs
            are never removed.
        trained_only: whether frozen weights are left out, because whoever resumes the run loads
            them from where it began; `identity` must tell those weights from others.
    """

    def __init__(
        self,
        directory: Path,
        context: DistributedContext,
        *,
        keep: int = 2,
        identity: Mapping[str, Any] | None = None,
        trained_only: bool = False,
    ) -> None:
        self.directory = directory
        self.context = context
        self.keep = keep
        self.identity = None if identity is None else json.loads(json.dumps(identity))
        self.trained_only = trained_only
        self._options = StateDictOptions(ignore_frozen_params=trained_only, strict=not trained_only)
        self._unproven: int | None = None
        """Step of the checkpoint saved last, until the step after it was finite."""
        self._at: int | None = None
        """Step of the checkpoint saved or restored last."""
        self._run: os.stat_result | None = None
        """The folder that checkpoints go into with all else of the run, once training has begun."""

    def begin(self) -> None:
        """Says that training begins: from now on the run's folder must stay where it is."""
        with contextlib.suppress(OSError):
            self._run = self.directory.parent.stat()

    def latest(self) -> Path | None:
        """The newest committed checkpoint, the same on every rank.

        Raises InputError on every rank when it, or the folder, cannot be read, and when its name is
        not that of the step it holds.
        """
        found = self.context.raise_on_any_rank(self._newest if self.context.is_main else list)
        newest: Path | None = (self.context.broadcast(found) or [None])[0]
        return newest

    def _newest(self) -> list[Path]:
        found = committed(self.directory)[-1:]
        for path in found:
            read_marker(path)
        return found

    def save(self, trainer: Trainer) -> Path:
        """Saves the state after `trainer.step` steps.

        Raises InputError on every rank when weights or moments are not finite, and when the disk is
        full or cannot be written; older checkpoints stay.
        """
        final = self.directory / folder_name(trainer.step)
        partial = self.directory / f".{final.name}.partial"
        known = self._at == trainer.step and (final / MARKER).exists()
        if self.context.broadcast(known):
            return final
        if self.context.any(not _is_finite(trainer)):
            raise InputError(
                f"the weights or the optimizer's moments are not finite after step {trainer.step}: "
                f"they are not saved. {self.way_back(trainer)}"
            )
        self.context.raise_first(self._prepare(partial, trainer) if self.context.is_main else None)
        rng = self.context.gather(_rng_state())
        model, optimizer = self._state_of(trainer)
        self._write_shards({"model": model, "optimizer": optimizer}, partial)
        problem = None
        if self.context.is_main:
            problem = _attempt(lambda: _write_state(trainer, rng, partial / STATE_FILE), partial)
        self.context.raise_first(problem)
        hashes = self._hash_files(partial)
        if self.context.is_main:
            problem = _attempt(lambda: self._commit(trainer, partial, final, hashes), partial)
        self.context.raise_first(problem)
        self._unproven = self._at = trainer.step
        return final

    def restore(self, trainer: Trainer, path: Path) -> None:
        """Loads a checkpoint into `trainer`, also when it was saved by another number of ranks.

        Raises InputError on every rank, naming the file, when a content hash differs, when the
        content is not that of a checkpoint, and when tensors or callbacks are others than the
        trainer's. Nothing that a checkpoint holds is executed.
        """
        marker = self.context.raise_on_any_rank(lambda: read_marker(path))
        self._verify(path, marker["sha256"])
        state = self.context.raise_on_any_rank(lambda: read_state(path, marker["step"]))
        _refuse_other_callbacks(path, state, trainer.callbacks)
        decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
        self._load_shards(trainer, path, list(marker["sha256"]))
        # Options may change on resume; what the checkpoint remembers of them must not win.
        for group, decay in zip(trainer.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        trainer.step, trainer.tokens = state["step"], state["tokens"]
        trainer.loss = state["loss"]
        self._unproven = self._at = trainer.step
        self.context.raise_on_any_rank(lambda: _load_small_states(trainer, state, path))
        if self.context.rank < len(state["rng"]):
            _set_rng_state(state["rng"][self.context.rank])

    def clean(self) -> None:
        """Removes what an interrupted save left behind."""
        if self.context.is_main and self.directory.is_dir():
            for entry in self.directory.iterdir():
                if _LEFT_OVER.fullmatch(entry.name):
                    shutil.rmtree(entry, ignore_errors=True)
        self.context.barrier()

    def prove(self, step: int) -> None:
        """Says that losses and gradients of the step after `step` were finite, so that its
        checkpoint can be gone on from; with --keep-checkpoints 1 the one before it then goes."""
        if self._unproven == step:
            self._unproven = None
            if self.context.is_main and self.keep == 1:
                self._remove_old(step, 0)

    def way_back(self, trainer: Trainer) -> str:
        """How to go on after losses, gradients or weights that are not finite; collective."""
        found = self.context.raise_on_any_rank(lambda: committed(self.directory)[-2:])
        found, config = self.context.broadcast(found), trainer.config
        rate = f"--lr {config.lr / 2:g}"
        lower = (
            f"a lower --lr or --clip (now {config.lr:g} and {config.clip:g}), such as {rate}"
            if config.clip
            else f"a lower --lr (now {config.lr:g}) and with clipping, such as {rate} --clip 1"
        )
        if not found:
            return f"Run the same command with {lower}: it starts again, no checkpoint exists yet"
        newest, older = found[-1], found[-2] if len(found) > 1 else None
        if step_of(newest) < trainer.step:
            back = f"it resumes from {newest}"
            if older:
                back += f" (if that ends here too, delete {newest} to go back to {older.name})"
            return f"Run the same command with {lower}: {back}"
        if older:
            return (
                f"Whatever broke it is already in the checkpoint {newest}: delete that folder and "
                f"run the same command with {lower}; it then resumes from {older}"
            )
        return (
            f"Whatever broke it is already in the only checkpoint, {newest}: start again with "
            f"another --output and {lower}, or with --precision fp32"
        )

    def remove_all(self, keep: int = 0) -> bool:
        """Removes this run's checkpoints but the `keep` newest, once its model is in place. Returns
        whether rank 0 found any."""
        own = self._own() if self.context.is_main else []
        if own:
            self._remove_old(step_of(own[-1]) + 1, keep)
            # A link to another disk is the user's.
            if self.directory.is_dir() and not self.directory.is_symlink():
                with contextlib.suppress(OSError):
                    self.directory.rmdir()
        self.context.barrier()
        return bool(own)

    def _own(self) -> list[Path]:
        """This run's checkpoints, oldest first; none where they cannot be read, which costs no
        run that only wants to remove some."""
        try:
            return [path for path in committed(self.directory) if _is_ours(path, self.identity)]
        except InputError as error:
            logger.warning(f"old checkpoints stay: {error}")
            return []

    def _remove_old(self, before: int, keep: int) -> None:
        """Removes this run's checkpoints of steps before `before`, but the `keep` newest."""
        old = [path for path in self._own() if step_of(path) < before]
        for path in old[: max(0, len(old) - keep)]:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = path.with_name(f".{path.name}.removed")
            try:
                path.rename(doomed)
            except OSError as error:
                logger.warning(f"{path}: cannot be removed: {failure(error)}")
            shutil.rmtree(doomed, ignore_errors=True)

    def _load_shards(self, trainer: Trainer, path: Path, files: list[str]) -> None:
        """Fills model and optimizer from the checkpoint's tensors."""
        metadata = self.context.raise_on_any_rank(lambda: read_metadata(path, files))
        model, optimizer = self._state_of(trainer)
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
        flat, _ = flatten_state_dict(parts)
        tensors = {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}
        problem = tensor_problem(tensors, metadata)
        if problem:
            problem = f"{path}: {problem}; it belongs to another model: move it away"
        self.context.raise_first(problem)
        try:
            dcp.load(
                parts,
                storage_reader=SafeReader(path, metadata),
                planner=SafePlanner(),
                process_group=self.context.cpu_group,
            )
        except CheckpointException as error:
            problem = f"{path}: {unreadable(innermost(error))}; {way_around(path)}"
        self.context.raise_first(problem)
        set_state_dict(
            trainer.model,
            trainer.optimizer,
            model_state_dict=parts["model"],
            optim_state_dict=parts["optimizer"],
            options=self._options,
        )

    def _state_of(self, trainer: Trainer) -> tuple[Any, Any]:
        """What of model and optimizer a checkpoint holds, by name."""
        return get_state_dict(trainer.model, trainer.optimizer, options=self._options)

    def _prepare(self, partial: Path, trainer: Trainer) -> str | None:
        run = self.directory.parent
        if self._run is not None and not (run.is_dir() and samestat(run.stat(), self._run)):
            return (
                f"{run}: was renamed or removed while the run was training, so the run would end "
                "in two places; put it back, then run the same command again: it goes on from the "
                "last checkpoint there"
            )
        shutil.rmtree(partial, ignore_errors=True)
        problem = _attempt(lambda: partial.mkdir(parents=True), partial)
        if problem:
            return problem
        held = [p for p in trainer.model.parameters() if p.requires_grad or not self.trained_only]
        needed = CHECKPOINT_BYTES * sum(parameter.numel() for parameter in held)
        free = free_bytes(partial)
        if free < needed:
            shutil.rmtree(partial, ignore_errors=True)
            return _disk_full(
                self.directory, f"it needs {size_text(needed)}, {size_text(free)} are free"
            )
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
        mine = {n: sha256_of(folder / n) for n in names[self.context.rank :: self.context.world]}
        return {name: value for part in self.context.gather(mine) for name, value in part.items()}

    def _commit(self, trainer: Trainer, partial: Path, final: Path, hashes: dict[str, str]) -> None:
        marker: dict[str, Any] = {"step": trainer.step, "tokens": trainer.tokens, "sha256": hashes}
        if self.identity is not None:
            marker["run"] = self.identity
        write_json(partial / MARKER, marker)
        if os.path.lexists(final):
            # No checkpoint, or not what this run came from.
            aside = final.with_name(f"{final.name}.other-{time.time_ns()}")
            final.rename(aside)
            logger.warning(f"{final} was there before this step: it is called {aside.name} now")
        partial.rename(final)
        sync_folder(self.directory)
        record = self.directory.parent / RECORD
        if not record.exists():
            write_json(record, {"step": trainer.step})
        # One whose following step was finite stays: this one may turn out to be broken.
        self._remove_old(trainer.step, max(1, self.keep - 1))

    def _verify(self, path: Path, expected: Mapping[str, str]) -> None:
        mine = sorted(expected)[self.context.rank :: self.context.world]
        problems = [damage_of(path, name, expected) for name in mine]
        self.context.raise_first(next(filter(None, problems), None))


def _is_ours(path: Path, identity: Mapping[str, Any] | None) -> bool:
    """Whether a checkpoint is of the step its name says, and of this run, as far as both tell."""
    try:
        run = read_marker(path).get("run")
    except InputError:
        return False
    return run is None or identity is None or same_run(run, identity)


def _is_finite(trainer: Trainer) -> bool:
    """Whether this rank's part of the weights and of the optimizer's state holds no inf or NaN."""
    tensors = [parameter.detach() for parameter in trainer.model.parameters()]
    for state in trainer.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    device = trainer.context.device
    checks = [to_local(tensor).isfinite().all().to(device) for tensor in tensors]
    return bool(torch.stack(checks).all().item()) if checks else True


def _load_small_states(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    """Restores stream, throughput and callbacks from what `read_state` returned."""
    part = "throughput"
    try:
        trainer.throughput.load_state_dict(state["throughput"])
        part = "stream"
        trainer.stream.load_state_dict(state["stream"])
        for callback in trainer.callbacks:
            part = callback.name
            if part in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][part])
    except InputError:
        raise
    # What belongs to another version or run can fail in any way.
    except Exception as error:
        raise InputError(
            f"{path / STATE_FILE}: the state of `{part}` does not fit this run "
            f"({type(error).__name__}: {error}); {way_around(path)}"
        ) from None


def _refuse_other_callbacks(path: Path, state: dict[str, Any], callbacks: list[Callback]) -> None:
    saved, present = set(state["callbacks"]), {callback.name for callback in callbacks}
    optional = {*state.get("optional", ()), *(c.name for c in callbacks if c.optional_state)}
    if (saved ^ present) - optional:
        raise InputError(
            f"{path}: holds the state of {sorted(saved)}, this run has {sorted(present)}; "
            "resume it with the command that started it"
        )


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


def _attempt(action: Callable[[], Any], partial: Path) -> str | None:
    """Runs `action`; returns what went wrong on the file system, if anything."""
    try:
        action()
    # torch.save raises RuntimeError where the disk is full.
    except (OSError, RuntimeError) as error:
        return _describe(error, partial)
    return None


def _describe(error: BaseException, partial: Path) -> str:
    cause = innermost(error)
    # Asked before what was written goes, and makes room.
    full, limited = is_out_of_space(cause, partial), is_too_large(cause, partial)
    shutil.rmtree(partial, ignore_errors=True)
    if full:
        return _disk_full(partial.parent, "the disk is full")
    if limited:
        cause = OSError(errno.EFBIG, "")
    reason = failure(cause) if isinstance(cause, OSError) else str(cause).strip()
    reason = (reason.splitlines() or [type(cause).__name__])[-1]
    return f"{partial.parent}: the checkpoint cannot be written: {reason}"


def _disk_full(directory: Path, reason: str) -> str:
    return (
        f"{directory}: no room for a checkpoint ({reason}); free some space or lower "
        "--keep-checkpoints, then run the same command again: it resumes from the last checkpoint"
    )
