"""What the files of a run must hold to be shown; the rest of the report relies on it."""

from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError
from data.records import fits, read_json
from pruner.history import BINS, decode_mask, read_records
from pruner.shapes import shape_of
from pruner.units import unit_sizes
from trainer.models.config import ModelConfig

_NUMBER = (int, float)
_LOSSES = {"*": {"loss": (*_NUMBER, type(None)), "tokens": int}}
_METRIC = {
    "step": int,
    "tokens?": int,
    **dict.fromkeys(("loss?", "lr?", "tokens_per_second?", "grad_norm?", "distill_kl?"), _NUMBER),
    **{key: {"*": _NUMBER} for key in ("domain_weights?", "domain_loss?")},
    "held_out?": _LOSSES,
}
_KIND = {"rows": int, "units": int, "target": int}
_HISTORY = {
    "step": int,
    "temperature": _NUMBER,
    "families": {
        "*": _KIND
        | {"current_target": _NUMBER, "multipliers": [_NUMBER]}
        | {key: [int] for key in ("alive", "nonzero", "histogram")}
    },
    "masks?": {"*": {"columns": int, "data": str}},
}
_REPORT = {
    "tokens_per_second?": (int, float, type(None)),
    "held_out?": _LOSSES,
    "source_held_out?": _LOSSES,
    "weights?": {"*": _NUMBER},
    "trained_parameters?": int,
}
_SHEAR_REPORT = _REPORT | {
    "polarised": bool,
    "families?": {"*": _KIND},
    "alive?": {"*": [int]},
    "kept?": {"*": [int]},
}
FIX = "restore the file, or move it away to show the run without it"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that can be drawn; a warning counts the others."""
    records = read_records(path, _is_metric)
    for record in records:
        _leave_out_infinite(record)
    return records


def read_history(path: Path, model: ModelConfig) -> list[dict[str, Any]]:
    """The lines of history.jsonl that can be drawn and belong to units of `model`; a warning counts
    the others."""
    sizes = unit_sizes(shape_of(model))
    return read_records(path, lambda record: _is_history(record, sizes))


def read_report(path: Path, command: str, model: ModelConfig) -> dict[str, Any]:
    """The report of a finished run of `command` that started from `model`. Raises InputError when
    it is not of that form."""
    report: dict[str, Any] = read_json(path, FIX)
    losses = (report.get("held_out") or {}, report.get("source_held_out") or {})
    usable = fits(report, _SHEAR_REPORT if command == "shear" else _REPORT)
    usable = usable and all(map(_counted, losses))
    if not usable or (command == "shear" and not _has_units(report, model)):
        raise InputError(f"{path}: not a report of {command} as this version reads it; {FIX}")
    _leave_out_infinite(report)
    return report


def _leave_out_infinite(record: dict[str, Any]) -> None:
    """Takes losses out that are null, which stands for what is not finite."""
    for name in ("held_out", "source_held_out"):
        losses = record.get(name)
        if losses:
            record[name] = {d: row for d, row in losses.items() if row["loss"] is not None}


def _has_units(report: dict[str, Any], model: ModelConfig) -> bool:
    """Whether the counts of units are those of `model`."""
    sizes = unit_sizes(shape_of(model))
    for name, kind in report.get("families", {}).items():
        if sizes.get(name) != (kind["rows"], kind["units"]):
            return False
        counts = [report.get(key, {}).get(name, ()) for key in ("alive", "kept")]
        if any(len(rows) != kind["rows"] for rows in counts):
            return False
    return True


def require_masks(masks: dict[str, np.ndarray], model: ModelConfig, path: Path) -> None:
    """Raises InputError unless `masks` are of units of `model`."""
    sizes = unit_sizes(shape_of(model))
    for name, values in masks.items():
        if name not in sizes or values.shape != sizes[name]:
            raise InputError(f"{path}: its masks of {name!r} are not those of this model; {FIX}")


def _is_metric(record: dict[str, Any]) -> bool:
    counts = (v for k, v in record.items() if k.startswith(("alive_", "target_")))
    return (
        fits(record, _METRIC)
        and all(fits(count, _NUMBER) for count in counts)
        and _counted(record.get("held_out", {}))
    )


def _counted(losses: Any) -> bool:
    """Whether each held-out loss rests on tokens."""
    return fits(losses, _LOSSES) and all(row["tokens"] > 0 for row in losses.values())


def _is_history(record: dict[str, Any], sizes: dict[str, tuple[int, int]]) -> bool:
    if not fits(record, _HISTORY):
        return False
    kinds, masks = record["families"], record.get("masks")
    for name, kind in kinds.items():
        rows, units = sizes.get(name, (0, 0))
        counts = [len(kind["alive"]), len(kind["nonzero"]), kind["rows"]]
        if counts != [rows] * 3 or kind["units"] != units or not rows:
            return False
        if len(kind["histogram"]) != BINS or sum(kind["histogram"]) < 1:
            return False
    if masks is None:
        return True
    try:
        shapes = {name: decode_mask(entry).shape for name, entry in masks.items()}
    except ValueError:
        return False
    return shapes.keys() == kinds.keys() and all(
        shape[0] == sizes[name][0] and 0 < shape[1] <= sizes[name][1]
        for name, shape in shapes.items()
    )
