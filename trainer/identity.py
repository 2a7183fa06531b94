"""What makes a run this run: only the configuration that started an output folder resumes it."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.files import write_json
from data.log import logger
from trainer.checkpoint import latest_step
from trainer.config import TrainConfig
from trainer.models.config import ModelConfig
from trainer.parallel import DistributedContext

FILE = "run.json"
SCHEDULE_FIELDS = (
    "steps",
    "seq_len",
    "global_batch",
    "lr",
    "min_lr_ratio",
    "warmup_ratio",
    "weight_decay",
    "beta1",
    "beta2",
    "eps",
    "clip",
    "seed",
)
"""Options that decide the trajectory. The others (micro-batch, intervals, threads, ...) may change
on resume."""
CHANGEABLE = ("lr", "min_lr_ratio", "clip", "weight_decay")
"""Those of SCHEDULE_FIELDS that may change on resume too: they bring a diverging run back on track,
and the order of the data does not depend on them."""


def run_identity(
    config: TrainConfig, model: ModelConfig, *, precision: str, data: str, **others: Any
) -> dict[str, Any]:
    """Everything that decides the sequence of losses: schedule, shape, compute precision, data
    fingerprint, `others`."""
    shape = {key: value for key, value in asdict(model).items() if key != "hf"}
    options = asdict(config)
    return {
        **{name: options[name] for name in SCHEDULE_FIELDS},
        "precision": precision,
        "data": data,
        **{f"model.{name}": value for name, value in shape.items()},
        **others,
    }


def verify_run(
    output: Path,
    identity: dict[str, Any],
    context: DistributedContext,
    *,
    started: bool,
    resolve: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Writes OUTPUT/run.json, or compares with the one there when the run has `started` (has state
    worth keeping).

    Changes of CHANGEABLE options are noted and kept while the run is unfinished. `resolve` brings a
    saved identity that a former version wrote into today's form. Raises InputError naming the other
    fields that differ.
    """
    saved = context.raise_on_any_rank(lambda: read_identity(output) if started else None)
    if saved is not None:
        saved = resolve(saved)
    problem = None
    if context.is_main:
        wanted = json.loads(json.dumps(identity))
        changes: dict[str, Any] = {}
        if saved is not None:
            changes = _accepted_changes(output, saved, wanted)
            problem = _difference(output, saved | changes, wanted)
        if problem is None and (saved is None or changes):
            problem = _write(output / FILE, wanted)
        if problem is None and saved is not None:
            first = (latest_step(output / "checkpoints") or 0) + 1
            for name, value in changes.items():
                logger.info(f"note: {name} {saved[name]} -> {value} from step {first}")
    context.raise_first(problem)


def _accepted_changes(
    output: Path, saved: dict[str, Any], wanted: dict[str, Any]
) -> dict[str, Any]:
    """New values of CHANGEABLE options; none when no steps are left that they could change."""
    step = latest_step(output / "checkpoints")
    if step is None or step >= wanted["steps"]:
        return {}
    return {name: wanted[name] for name in CHANGEABLE if saved[name] != wanted[name]}


def _difference(output: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    names = [n for n in sorted(saved.keys() | wanted.keys()) if saved.get(n) != wanted.get(n)]
    if not names:
        return None
    changes = ", ".join(f"{n} was {saved.get(n)!r}, now {wanted.get(n)!r}" for n in names)
    fix = "Repeat the old values to resume it, or choose another --output to start a new run"
    if "steps" in names:
        fix += (
            ". Another number of steps is another learning-rate schedule; to train a finished "
            f"model further, start a new run from it: --model {output / 'model'} "
            "--output <new folder>"
        )
    return f"{output} holds a run of another configuration: {changes}. {fix}"


def _write(path: Path, identity: dict[str, Any]) -> str | None:
    try:
        write_json(path, identity)
    except OSError as error:
        return f"--output {path.parent} cannot be written: {error.strerror}; choose another folder"
    return None


def read_identity(output: Path) -> dict[str, Any] | None:
    """The identity of the run in `output`, or None when there is no run."""
    path = output / FILE
    if not path.exists():
        return None
    try:
        identity: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: not valid JSON ({error}); delete the folder to start over"
        ) from None
    return identity
