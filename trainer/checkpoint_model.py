"""The model that a checkpoint holds, without the run around it."""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from data.errors import InputError
from trainer.checkpoint_files import (
    SafePlanner,
    SafeReader,
    damage_of,
    innermost,
    read_marker,
    read_metadata,
    tensor_problem,
    unreadable,
    way_around,
)
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM

_FIELDS = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "hf"]
_PREFIX = "model."


@dataclasses.dataclass(frozen=True, slots=True)
class SavedStep:
    """A checkpoint of a run that trains all weights, described; no weights yet."""

    path: Path
    shape: ModelConfig
    step: int
    """Optimizer steps behind it."""
    tokens: int
    """Tokens that these were trained on."""
    weights: str
    """Tells its content from any other."""
    files: Mapping[str, str]
    """SHA-256 of its files."""


def read_step(path: Path) -> SavedStep:
    """What the checkpoint `path` holds.

    Raises InputError where it cannot be read, and for one of a run that does not train all weights:
    shearing's mean nothing without masks, which settle at its end, and adapters or some blocks are
    no model.
    """
    marker = read_marker(path)
    run, tokens = marker.get("run"), marker.get("tokens")
    if not isinstance(run, dict) or not isinstance(tokens, int):
        raise InputError(
            f"{path}: was written by a version that did not note what its model is; measure the "
            "finished run's model instead"
        )
    command, method = run.get("command"), run.get("method")
    if command != "cpt" and (command, method) != ("finetune", "full"):
        why = (
            f"fine-tuning by {method}, which holds what is trained alone"
            if command == "finetune"
            else "shearing, whose model is what its masks keep once they have settled"
        )
        raise InputError(
            f"{path}: is of a run of {why}; steps of runs that train all weights can be measured "
            "(`shorn cpt`, `shorn finetune --method full`), and of this run its end"
        )
    shape = _shape(run, path)
    weights = hashlib.sha256(json.dumps(marker["sha256"], sort_keys=True).encode()).hexdigest()
    return SavedStep(path, shape, marker["step"], tokens, weights[:16], marker["sha256"])


def _shape(run: Mapping[str, Any], path: Path) -> ModelConfig:
    found = {name: run[_PREFIX + name] for name in _FIELDS if _PREFIX + name in run}
    try:
        return ModelConfig(**found)
    except (InputError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: does not say what its model is ({error}); {way_around(path)}"
        ) from None


def load_step(saved: SavedStep, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """The model of a checkpoint on one device, in `dtype`.

    Raises InputError where a file is damaged, or gone because the run went on. Nothing that the
    checkpoint holds is executed.
    """
    for name in saved.files:
        if not saved.path.exists():
            raise InputError(
                f"{saved.path}: was removed meanwhile; a run keeps as many checkpoints as its "
                "--keep-checkpoints says. Run this again for those that are there"
            )
        problem = damage_of(saved.path, name, saved.files)
        if problem is not None:
            raise InputError(problem)
    metadata = read_metadata(saved.path, list(saved.files))
    with torch.device("meta"):
        model = CausalLM(saved.shape).to(dtype)
    model.to_empty(device=device)
    tensors = {f"{_PREFIX}{name}": value.detach() for name, value in model.named_parameters()}
    held = {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(_PREFIX)
    }
    problem = tensor_problem(tensors, dataclasses.replace(metadata, state_dict_metadata=held))
    if problem is not None:
        raise InputError(f"{saved.path}: {problem}; {way_around(saved.path)}")
    parts = {"model": {name.removeprefix(_PREFIX): value for name, value in tensors.items()}}
    try:
        with warnings.catch_warnings():
            # That one process loads all of it is meant.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            reader = SafeReader(saved.path, metadata)
            dcp.load(parts, storage_reader=reader, planner=SafePlanner(), no_dist=True)
    except CheckpointException as error:
        cause = unreadable(innermost(error))
        raise InputError(f"{saved.path}: {cause}; {way_around(saved.path)}") from None
    return model
