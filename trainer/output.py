"""The output folder of a run: whose it is, what it holds already, what may go when it is done."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError
from data.files import write_json
from data.locks import folder_lock
from data.log import logger
from data.paths import require_utf8
from data.places import REPLACED
from data.records import is_kind, read_json
from trainer.checkpoint import Checkpointer
from trainer.checkpoint_files import RECORD, committed, step_of
from trainer.config import TrainConfig
from trainer.disk import CHECKPOINT_BYTES, MOMENT_BYTES, room_problem
from trainer.finished import KINDS, REPORTS
from trainer.identity import FILE
from trainer.memory import FROZEN_BYTES
from trainer.parallel import DistributedContext


@contextmanager
def owned(output: Path, report: str, context: DistributedContext) -> Iterator[None]:
    """Holds OUTPUT, where a finished run leaves `report`, for one run of all ranks. Raises
    InputError on every rank when another process holds it, or when it cannot be written."""
    with ExitStack() as held:

        def hold() -> None:
            require_utf8(output)
            # A finished run may lie where nobody can write: nothing is left to write there.
            if os.access(output, os.W_OK) or not _finished(output / report, resuming=True):
                held.enter_context(folder_lock(output, "training"))

        context.raise_on_any_rank(hold if context.is_main else lambda: None)
        yield


@dataclass(frozen=True, slots=True)
class State:
    """What an output folder holds of the run it is named for."""

    report: Path | None
    """The report of a finished run."""
    resuming: bool
    """Whether there is a checkpoint to go on from."""
    written: bool
    """Whether there is a model of a run."""

    @property
    def started(self) -> bool:
        """Whether the folder belongs to a run already."""
        return self.report is not None or self.resuming or self.written


def state_of(output: Path, report: str, context: DistributedContext) -> State:
    """Looks at OUTPUT, where a finished run leaves `report`; the same on every rank.

    A report that was cut off does not count, where a checkpoint is there to finish from. Raises
    InputError on every rank when checkpoints or report are lost or cannot be read.
    """
    checkpointer = Checkpointer(output / "checkpoints", context)
    newest = checkpointer.latest()

    def look() -> State:
        finished = _finished(output / report, newest is not None)
        if not finished and newest is None:
            _require_no_other(output, report)
            _require_no_loss(output, report)
        written = (output / "model").exists() and (output / FILE).exists()
        return State(output / report if finished else None, newest is not None, written)

    found = context.raise_on_any_rank(look if context.is_main else lambda: None)
    state: State = context.broadcast(found)
    if state.report is not None:
        checkpointer.clean()
    return state


def _finished(path: Path, resuming: bool) -> bool:
    """Whether the report at `path` is there, and whole."""
    if not path.exists():
        return False
    try:
        read_json(path, "restore it from a copy, or name another --output", keys={"steps": int})
    except InputError as error:
        if not resuming:
            raise
        logger.warning(f"{error.args[0].partition(';')[0]}: it is written again")
        return False
    return True


def _require_no_other(output: Path, report: str) -> None:
    """Raises InputError when a run of another command has finished there."""
    for other in REPORTS:
        if other != report and (output / other).exists():
            raise InputError(
                f"--output {output}: holds a finished run of {KINDS[other]} ({other}); "
                "name another --output"
            )


def _require_no_loss(output: Path, report: str) -> None:
    """Raises InputError when the run had checkpoints, and neither one nor the report is left."""
    record = output / RECORD
    if record.exists():
        raise InputError(
            f"{output}: a run has trained there, but checkpoints/ holds no checkpoint and there is "
            f"no {report}: put back one of them, or name another --output (to begin again in this "
            f"folder all the same, delete {record})"
        )


def require_apart(output: Path, *, models: Mapping[str, Path], data: Path) -> None:
    """Raises InputError when a run into `output` would replace what it reads, or mix with it.

    Args:
        output: the run's folder.
        models: folders or files of models, by the option that names them.
        data: the token folder.
    """
    place = output.resolve()
    replaced = [(output / name).resolve() for name in REPLACED] + [place / n for n in REPLACED]
    for option, path in {**models, "--data": data}.items():
        read = path.resolve()
        inside = [folder for folder in replaced if folder == read or folder in read.parents]
        if inside or read == place:
            what = f"is what --output {output} would replace" if inside else "is the --output too"
            raise InputError(f"{option} {path}: {what}; name another --output")
        # A run that was started so goes on.
        if option != "--data" and place in read.parents and not (output / "run.json").exists():
            raise InputError(f"{option} {path}: lies in --output {output}; name another --output")


def require_room(
    output: Path,
    parameters: int,
    train: TrainConfig,
    context: DistributedContext,
    *,
    saved: int,
    dtype: str,
    frozen: bool = False,
    refitted: bool = False,
    moments: bool = False,
) -> None:
    """Raises InputError on every rank when the checkpoints to come and the final model do not fit.

    Args:
        output: the run's folder.
        parameters: of the model that is trained.
        train: steps, intervals and number of checkpoints.
        context: the ranks.
        saved: parameters of the final model.
        dtype: the dtype that it will be written in, by name.
        frozen: whether no weight is trained, so that checkpoints hold no moments.
        refitted: whether it is written a second time, and its blocks in fp32 before that.
        moments: whether the optimizer's moments are written beside it.
    """
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    model = saved * ((2 * size + 4 if refitted else size) + (MOMENT_BYTES if moments else 0))
    checkpoint = parameters * (FROZEN_BYTES if frozen else CHECKPOINT_BYTES)
    context.raise_on_any_rank(
        lambda: _check_room(output, checkpoint, train, model) if context.is_main else None
    )


def _check_room(output: Path, checkpoint: int, train: TrainConfig, model: int) -> None:
    found = committed(output / "checkpoints")
    done = step_of(found[-1]) if found else 0
    every = train.save_interval or max(1, train.steps)
    saves = -(-train.steps // every) - done // every if done < train.steps else 0
    problem = room_problem(
        output,
        checkpoint=checkpoint,
        saves=saves,
        existing=len(found),
        keep=train.keep_checkpoints,
        model=model,
    )
    if problem:
        raise InputError(problem)


def run_of(model: Path) -> Path:
    """The folder of the run that wrote the model folder `model`, where its reports lie; `model` may
    be a link to it."""
    folders = (model.parent, model.resolve().parent)
    for folder in folders if model.name == "model" else folders[::-1]:
        if any((folder / name).exists() for name in (*REPORTS, "run.json")):
            return folder
    return model.parent


def note_removal(output: Path, train: TrainConfig, context: DistributedContext) -> None:
    """Notes how many checkpoints are to stay once the report is written, so that a start after a
    kill in between removes the others (`finish_removal`)."""
    keep = int(train.keep_last_checkpoint)
    _write_record(output, context, {"step": train.steps, "keep": keep})


def remove_checkpoints(
    output: Path, identity: Mapping[str, Any], train: TrainConfig, context: DistributedContext
) -> None:
    """Removes the checkpoints of a run whose model and report are written, or all but the last
    (--keep-last-checkpoint)."""
    checkpointer = Checkpointer(output / "checkpoints", context, identity=identity)
    if checkpointer.remove_all(int(train.keep_last_checkpoint)) and not train.keep_last_checkpoint:
        logger.info("its checkpoints are removed (--keep-last-checkpoint keeps the last one)")
    # Checkpoints that a user puts back from now on stay.
    _write_record(output, context, {"step": identity["steps"]})


def finish_removal(output: Path, identity: Mapping[str, Any], context: DistributedContext) -> None:
    """Removes the checkpoints that a finished run was about to remove when it was killed. Those of
    which that is not known, as of runs of former versions, stay."""
    keep = context.broadcast(_noted(output) if context.is_main else None)
    if keep is None:
        return
    checkpointer = Checkpointer(output / "checkpoints", context, identity=identity)
    if checkpointer.remove_all(keep):
        logger.info("checkpoints that it left when it was cut off at its end are removed")
    # Checkpoints that a user puts back from now on stay.
    _write_record(output, context, {"step": identity["steps"]})


def _noted(output: Path) -> int | None:
    """How many checkpoints of a finished run are to stay; None where none are to go."""
    record = output / RECORD
    whole = (output / "model" / "config.json").exists()
    if not record.exists() or not os.access(output, os.W_OK) or not whole:
        return None
    try:
        keep = read_json(record, "").get("keep")
    except InputError:  # only its presence is relied on
        return None
    return keep if is_kind(keep, int) and keep >= 0 else None


def _write_record(output: Path, context: DistributedContext, content: dict[str, int]) -> None:
    """What .checkpointed says besides that there was a checkpoint, if there was one."""
    record = output / RECORD
    if context.is_main and record.exists():
        with contextlib.suppress(OSError):  # it costs no more than the room that they take
            write_json(record, content)
