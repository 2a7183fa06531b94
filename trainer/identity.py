"""What makes a run this run: only the configuration that started an output folder resumes it."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.errors import InputError
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


def weights_fingerprint(folder: Path) -> str:
    """Hash of a model folder's safetensors files: sizes, headers and a few samples of each, so it
    costs no time."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for position in range(0, size, max(1, size // 64)):
                file.seek(position)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def claim_output(
    output: Path, identity: dict[str, Any], context: DistributedContext, *, started: bool
) -> None:
    """Writes OUTPUT/run.json, or compares with the one there when the run has `started` (has state
    worth keeping).

    Raises InputError naming the fields that differ.
    """
    problem = None
    if context.is_main:
        path = output / FILE
        wanted = json.loads(json.dumps(identity))
        if started and path.exists():
            problem = _difference(output, json.loads(path.read_text(encoding="utf-8")), wanted)
        else:
            problem = _write(path, wanted)
    context.check(problem)


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
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
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
