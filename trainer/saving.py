"""What a run leaves behind: the model's folder and the report."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from data.errors import InputError, MissingInput, failure
from data.files import NEEDED, require_writable, write_json
from data.log import logger
from data.manifest import ChatRecord
from data.places import REPLACED
from data.records import read_json
from trainer.checkpoint_files import committed
from trainer.config import TrainConfig
from trainer.finished import ways_back
from trainer.identity import CHANGEABLE, SCHEDULE_FIELDS, require_same_options, same_names
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import save_model
from trainer.models.weights import original_dtype
from trainer.parallel import DistributedContext, full_tensor

T = TypeVar("T")


def full_tensors(model: CausalLM, *, needed: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole fp32 tensor on the CPU), gathered one at a time; every rank must exhaust it.

    A rank on which they are not `needed` leaves them where they are gathered.
    """
    for name, parameter in model.named_parameters():
        whole = full_tensor(parameter.detach())
        yield name, whole.cpu() if needed else whole


def final_dtype(config: ModelConfig, source: Path) -> str:
    """Name of the dtype that a model made from the one in `source` ends in: that of the original;
    bf16 where nothing states it."""
    return original_dtype(config.hf, source) or "bfloat16"


def save_pretrained(
    model: CausalLM,
    context: DistributedContext,
    path: Path,
    *,
    tokenizer_from: Path,
    dtype: str | None = None,
    tensors: Iterator[tuple[str, torch.Tensor]] | None = None,
    chat: ChatRecord | None = None,
) -> None:
    """Writes `path` as a Hugging Face folder, with the companions of the model in `tokenizer_from`.

    In `dtype`, by name; by default in `final_dtype`. `tensors` take the place of `full_tensors`.
    `chat` says how the conversations were written that the model was trained on, and goes along.
    All ranks take part.
    """
    stored = getattr(torch, dtype or final_dtype(model.config, tokenizer_from))
    tensors = tensors or full_tensors(model, needed=context.is_main)
    save_tensors_of(tensors, model.config, context, path, tokenizer_from, stored, chat)


def save_tensors_of(
    tensors: Iterator[tuple[str, torch.Tensor]],
    config: ModelConfig,
    context: DistributedContext,
    path: Path,
    tokenizer_from: Path,
    dtype: torch.dtype,
    chat: ChatRecord | None = None,
) -> None:
    """Writes `tensors`, whose gathering is collective, from rank 0.

    Raises InputError on every rank when they cannot be written.
    """
    problem = None
    if context.is_main:
        try:
            save_model(config, tensors, path, tokenizer_from, dtype, chat)
        except InputError as error:
            problem = str(error)
    # Every rank goes through all tensors, also rank 0 after a failure.
    for _ in tensors:
        pass
    context.raise_first(problem)


def publish(context: DistributedContext, report: dict[str, Any], *paths: Path | str | None) -> None:
    """Writes a report to all `paths` (None: nowhere) from rank 0. Raises InputError on every
    rank."""
    problem = None
    if context.is_main:
        try:
            for path in paths:
                if path is not None:
                    write_json(Path(path), report)
        except OSError as error:
            problem = f"cannot write {path}: {failure(error)}, or choose another file"
    context.raise_first(problem)


def require_copy(context: DistributedContext, path: Path | str | None, report: Path) -> None:
    """Raises InputError on every rank when rank 0 could not write the copy of `report` (--json), or
    would replace what the run itself writes beside the report."""
    if path is not None:
        context.raise_on_any_rank(
            lambda: _check_copy(Path(path), report) if context.is_main else None
        )


def _check_copy(path: Path, report: Path) -> None:
    copy, output = path.resolve(), report.parent.resolve()
    if copy == report.resolve():
        return
    if output.is_relative_to(copy) and not copy.exists():
        raise InputError(
            f"--json {path} is the folder of --output, or around it; name a file in it"
        )
    own = copy.relative_to(output).parts[:1] if copy.is_relative_to(output) else ()
    if own and (own[0] in REPLACED or own[0] in NEEDED):
        raise InputError(f"--json {path}: the run itself writes {own[0]} there; name another file")
    require_writable(path, "--json")


def log_finished(
    context: DistributedContext,
    report: Path,
    copy: str | None,
    dtype: str | None = None,
    keep: int = 0,
) -> None:
    """Says that the run of `report` is finished, and copies the report to `copy` (--json).

    Warns where its model is in another type than `dtype`, and where a checkpoint is asked for
    (`keep`) and none is left. Raises InputError on every rank when the
    model is gone.
    """
    logger.info(f"{report.parent}: this run is finished; its report is {report}")
    content = context.raise_on_any_rank(lambda: read_json(report, "restore it from a copy"))
    written = context.raise_on_any_rank(lambda: _written_dtype(report))
    if dtype is not None and written not in (None, dtype):
        logger.warning(
            f"--save-dtype {dtype} changes nothing: {report.parent / 'model'} is written, in "
            f"{written}; name another --output to have it in {dtype}"
        )
    if keep and not committed(report.parent / "checkpoints"):
        logger.warning(
            "--keep-last-checkpoint and --keep-all-checkpoints change nothing: the run is "
            "finished, and holds no checkpoint; name another --output to train again and keep them"
        )
    publish(context, content, copy)


def open_or_finished(
    open_inputs: Callable[[], T],
    report: Path,
    train: TrainConfig,
    context: DistributedContext,
    *,
    names: Mapping[str, Any],
    copy: str | None,
    dtype: str | None = None,
    unknown: Collection[str] = (),
) -> T | None:
    """What `open_inputs` gives; None where something that it reads is gone and the run of `report`
    is finished, which needs it no more: then both are said. Collective.

    `names` are where the inputs are (identity.named): what was never the run's own is missed.
    `unknown` are fields of `train` that only the inputs decide.

    Raises InputError on every rank where the run is not finished, or was started with another
    schedule (`train`).
    """
    found: list[T] = []
    problem = None
    try:
        found.append(open_inputs())
    except MissingInput as error:
        problem = str(error)
    if not context.any(problem is not None):
        return found[0]

    def finished() -> bool:
        whole = report.is_file() and report.stat().st_size > 0
        return whole and same_names(report.parent, names)

    if not context.broadcast(context.raise_on_any_rank(finished)):
        context.raise_first(problem)
    names_now = set(SCHEDULE_FIELDS).difference(CHANGEABLE, unknown)
    schedule = {name: getattr(train, name) for name in SCHEDULE_FIELDS if name in names_now}
    given = {name: value for name, value in schedule.items() if value is not None}

    def compare() -> None:
        require_same_options(report.parent, given)

    context.raise_on_any_rank(compare if context.is_main else lambda: None)
    text = next(text for text in context.gather(problem) if text)
    logger.info(f"note: {text.splitlines()[0]}")
    log_finished(context, report, copy, dtype, train.checkpoints_left)
    return None


def _written_dtype(report: Path) -> str | None:
    """The type of a finished run's model, by name. Raises InputError when the model is gone."""
    config = report.parent / "model" / "config.json"
    if not config.exists():
        raise InputError(
            f"{report.parent}: this run is finished, but its model/ is gone: "
            f"{ways_back(report, 'the same command')}"
        )
    dtype = read_json(config, "restore it from a copy").get("dtype")
    return dtype if isinstance(dtype, str) else None
