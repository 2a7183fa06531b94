"""What the output folders of runs tell about them, during the run and after it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from data.errors import InputError
from data.places import odd_name, run_above, what_is
from data.records import fits, require_regular, word_for
from launch.report.forms import read_history, read_metrics, read_report, require_masks
from pruner.history import FILE as HISTORY
from pruner.history import decode_mask
from pruner.shapes import Shape, config_of, parse_target, shape_of
from pruner.units import OFF
from trainer.identity import FILE as IDENTITY
from trainer.identity import read_identity
from trainer.models.config import ModelConfig

COMMANDS = {"shear": "shear.json", "cpt": "cpt.json", "finetune": "finetune.json"}
"""Commands whose runs can be shown, and the report that marks such a run as finished."""


@dataclass(frozen=True, slots=True)
class UnitCounts:
    """Counts of one unit kind, each row on its own."""

    rows: int
    units: int
    target: int
    """Units every row keeps at the end."""
    current_target: float
    on: list[int]
    """Units of each row whose mask is at least 0.99."""
    nonzero: list[int]
    """Units of each row whose mask is above 0."""

    @property
    def between(self) -> int:
        """Units that are nonzero but not on."""
        return sum(self.nonzero) - sum(self.on)

    @property
    def settled(self) -> bool:
        """Whether every row has its target on and nothing else nonzero."""
        return all(count == self.target for count in (*self.on, *self.nonzero))


@dataclass(frozen=True, slots=True)
class Run:
    """The content of one output folder."""

    folder: Path
    command: str
    """A key of COMMANDS."""
    identity: dict[str, Any]
    """The content of run.json."""
    metrics: list[dict[str, Any]]
    history: list[dict[str, Any]]
    report: dict[str, Any] | None
    """The command's own report; None while the run is not finished."""
    model: ModelConfig
    """The model that the run started from."""
    target: Shape | None
    """The shape that a shearing run makes."""
    masks: dict[str, np.ndarray]
    """The newest masks there are, [rows, columns] by unit kind, in 0 .. 1."""
    masks_step: int | None
    """Completed steps when `masks` were recorded; None for those that were extracted."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return int(self.identity["steps"])

    @property
    def step(self) -> int:
        """Completed steps that are on record."""
        return max((int(r[-1]["step"]) for r in (self.metrics, self.history) if r), default=0)

    @property
    def written(self) -> float | None:
        """When the metrics were last written, in seconds since 1970."""
        path = self.folder / "metrics.jsonl"
        return path.stat().st_mtime if path.exists() else None


def read_run(folder: Path) -> Run:
    """Reads an output folder. Raises InputError where there is none of a command in COMMANDS."""
    advice = "name the --output folder of pruner.shear, launch/cpt.py or launch/finetune.py"
    found, run = what_is(folder), run_above(folder)
    if run is not None:
        advice = f"name the run's folder, {run}"
    advice = odd_name(str(folder), patterns=False) or advice
    if not folder.is_dir():
        raise InputError(f"{folder}: {f'it is {found}' if found else 'no such folder'}; {advice}")
    identity = read_identity(folder)
    if identity is None:
        what = f"; it is {found}" if found else ""
        raise InputError(f"{folder} holds no run (there is no {IDENTITY}{what}); {advice}")
    command = identity.get("command") if isinstance(identity, dict) else word_for(identity)
    if not isinstance(command, str) or command not in COMMANDS:
        raise InputError(f"{folder} is a run of {command!r}, which has no page; {advice}")
    history: list[dict[str, Any]] = []
    masks: dict[str, np.ndarray] = {}
    step = target = None
    finished = folder / COMMANDS[command]
    try:
        model = _model(identity)
        if command == "shear":
            target = parse_target(identity["target"], shape_of(model), apart=True)
    except (InputError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise _unreadable(folder, error) from error
    report = read_report(finished, command, model) if finished.exists() else None
    if command == "shear":
        history = read_history(folder / HISTORY, model)
        try:
            masks, step = _newest_masks(folder, model, report, history)
        except (ValueError, OSError, SafetensorError) as error:
            raise _unreadable(folder, error) from error
    metrics = read_metrics(folder / "metrics.jsonl")
    return Run(folder, command, identity, metrics, history, report, model, target, masks, step)


def _unreadable(folder: Path, error: Exception) -> InputError:
    return InputError(
        f"{folder} cannot be read ({type(error).__name__}: {error}); it was written by another "
        "version or is damaged: resume the run, or name another folder"
    )


def _model(identity: dict[str, Any]) -> ModelConfig:
    """The model in run.json. Raises InputError or TypeError for an identity of another form."""
    form = {"steps": int, "target?": str, "data?": str, "model.family?": str}
    names = [field.name for field in fields(ModelConfig) if f"model.{field.name}" in identity]
    whole = [name for name in names if _is_size(name)]
    if not fits(identity, form | {f"model.{name}": int for name in whole}):
        raise InputError(f"{IDENTITY} is not of the form that this version writes")
    return ModelConfig(**{name: identity[f"model.{name}"] for name in names})


def _is_size(name: str) -> bool:
    return next(field.type for field in fields(ModelConfig) if field.name == name) in (int, "int")


def _newest_masks(
    folder: Path,
    model: ModelConfig,
    report: dict[str, Any] | None,
    history: list[dict[str, Any]],
) -> tuple[dict[str, np.ndarray], int | None]:
    path = folder / "masks.safetensors"
    if report is not None and path.exists():
        require_regular(path, "move it away")
        tensors = load_file(path)
        found = {n.removeprefix("z."): v for n, v in tensors.items() if n.startswith("z.")}
        require_masks(found, model, path)
        return found, None
    for record in reversed(history):
        if "masks" in record:
            masks = {name: decode_mask(entry) for name, entry in record["masks"].items()}
            return masks, int(record["step"])
    return {}, None


def removed_layers(run: Run) -> list[int]:
    """Layers without a place in the extracted model, which keeps every mask above 0; before there
    is one, layers whose newest mask is at most OFF."""
    if "layer" not in run.masks:
        return []
    limit = 0.0 if run.masks_step is None else OFF
    return [int(index) for index in np.flatnonzero(run.masks["layer"][0] <= limit)]


def unit_counts(run: Run) -> dict[str, UnitCounts]:
    """The newest counts of each unit kind: those of the extracted model once there is one, else of
    the last record; none for a run without either."""
    report = run.report or {}
    if "families" in report:
        return {
            name: UnitCounts(
                *(sizes["rows"], sizes["units"], sizes["target"], sizes["target"]),
                on=report["alive"][name],
                nonzero=report["kept"][name],
            )
            for name, sizes in report["families"].items()
        }
    last = run.history[-1]["families"] if run.history else {}
    return {
        name: UnitCounts(
            *(sizes["rows"], sizes["units"], sizes["target"], sizes["current_target"]),
            on=sizes["alive"],
            nonzero=sizes["nonzero"],
        )
        for name, sizes in last.items()
    }


def parameters(run: Run) -> dict[str, int]:
    """Parameters of the run's model ("source"), and of its "target" where it has one, with and
    "_non_embedding" without embeddings."""
    models = {"source": run.model}
    if run.target is not None:
        models["target"] = config_of(run.target, run.model)
    counts = {}
    for name, model in models.items():
        counts[name] = model.num_parameters()
        counts[f"{name}_non_embedding"] = model.num_parameters(embeddings=False)
    return counts


def newest(run: Run, key: str) -> dict[str, Any]:
    """The newest object that the metrics hold under `key`; empty where there is none."""
    found: dict[str, Any] = next((r[key] for r in reversed(run.metrics) if r.get(key)), {})
    return found


def held_out_of(run: Run) -> dict[str, Any]:
    """Held-out losses {domain: {loss, tokens}} of the run's model: the report's, which are those of
    a refitted model too, else the newest of the metrics; empty where there are none."""
    measured: dict[str, Any] = (run.report or {}).get("held_out") or newest(run, "held_out")
    return measured


def facts(run: Run) -> dict[str, Any]:
    """The numbers at the head of the page, JSON-able; None where something is not known."""
    last = run.metrics[-1] if run.metrics else {}
    held_out = held_out_of(run)
    result: dict[str, Any] = {
        "folder": str(run.folder),
        "command": run.command,
        "finished": run.report is not None,
        "step": run.step,
        "steps": run.steps,
        "tokens": last.get("tokens", 0),
        "loss": last.get("loss"),
        "tokens_per_second": last.get("tokens_per_second"),
        "held_out": {name: row["loss"] for name, row in held_out.items()},
        "parameters": parameters(run),
    }
    if run.report is not None and run.report.get("tokens_per_second"):
        result["tokens_per_second"] = run.report["tokens_per_second"]
    return result | (_mask_facts(run) if run.command == "shear" else {})


def _mask_facts(run: Run) -> dict[str, Any]:
    counts = unit_counts(run)
    names = [name for name in counts if run.metrics and f"alive_{name}_min" in run.metrics[-1]]
    reached = names and all(count.current_target == count.target for count in counts.values())
    polarised = all(count.settled for count in counts.values()) if counts else None
    return {
        "source": shape_of(run.model).to_json(),
        "target": run.target.to_json() if run.target else None,
        "rule": run.identity.get("masks.rule"),
        "polarised": run.report["polarised"] if run.report else polarised,
        "kept_not_alive": {name: count.between for name, count in counts.items()},
        "alive": {name: count.on for name, count in counts.items()},
        "on_target_since_step": first_step_on_target(run.metrics, names) if reached else None,
    }


def first_step_on_target(records: list[dict[str, Any]], kinds: list[str]) -> int | None:
    """The step from which every row of every kind has its final target on; None if none does."""
    final = {kind: records[-1].get(f"target_{kind}") for kind in kinds}
    first = None
    for record in reversed(records):
        keys = [(kind, f"alive_{kind}{end}") for kind in kinds for end in ("_min", "_max")]
        ends = [(kind, record.get(key)) for kind, key in keys]
        if any(count != final[kind] for kind, count in ends):
            break
        first = record["step"]
    return first


def mean_loss(domains: Mapping[str, Mapping[str, float]]) -> float:
    """Token-weighted mean of {domain: {loss, tokens}}."""
    tokens = sum(row["tokens"] for row in domains.values())
    return sum(row["loss"] * row["tokens"] for row in domains.values()) / tokens
