"""What happened to the masks of a shearing run, step by step, in OUTPUT/history.jsonl.

One JSON line per recorded step:

    {"step", "temperature", "families": {name: {"rows", "units", "target", "current_target",
     "alive", "nonzero", "multipliers", "histogram"}}, "masks": {name: {"columns", "data"}}}

`families` are kinds of units. `alive` (mask >= 0.99: on) and `nonzero` count the units of each row,
`histogram` the masks of the whole kind in BINS equal parts of 0 .. 1. Only some lines hold `masks`;
see `encode_mask`.
"""

import base64
import binascii
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data.errors import InputError, failure
from data.log import logger
from data.records import is_kind, read_bytes
from pruner.callback import ShearCallback
from pruner.units import on_counts
from trainer.callbacks.metrics import StepLog
from trainer.loop import Callback, Trainer

FILE = "history.jsonl"
RECORDS = 200
"""Steps of a run that are recorded, in even distances: as many as this to twice as many."""
SNAPSHOTS = 40
"""Most records that hold the masks themselves, the first and the last step's not counted."""
BINS = 20
WHOLE_UNITS = 16384
"""A kind of at most this many units is kept whole in a snapshot."""
COLUMNS = 128
"""A larger one is averaged over this many groups of neighbouring units in each row."""


class HistoryCallback(Callback):
    """Appends a record on rank 0 at even distances, at the first step and at the last.

    Stands after the ShearCallback whose masks it records: rank 0's last draw of the step. After a
    restart, lines of steps that the checkpoint does not contain are removed, so each recorded step
    appears once.
    """

    name: ClassVar[str] = "history"
    alone: ClassVar[bool] = True
    optional_state: ClassVar[bool] = True

    def __init__(self, shear: ShearCallback, output: Path) -> None:
        self.shear = shear
        self.log = StepLog(output / FILE)

    def on_train_start(self, trainer: Trainer) -> None:
        main = trainer.context.is_main
        trainer.context.raise_on_any_rank(lambda: self.log.open(trainer.step) if main else None)

    def on_step_end(self, trainer: Trainer) -> None:
        steps = trainer.config.steps
        end = trainer.step in (1, steps)
        if not self.log.is_open or not (end or trainer.step % record_interval(steps) == 0):
            return
        record = self._record(
            trainer.step, masks=end or trainer.step % snapshot_interval(steps) == 0
        )
        self.log.write(record, separators=(",", ":"))

    def on_exit(self, trainer: Trainer) -> None:
        self.log.close()

    def _record(self, step: int, *, masks: bool) -> dict[str, Any]:
        rule, z = self.shear.rule, self.shear.z
        kinds = {
            name: {
                "rows": kind.rows,
                "units": kind.units,
                "target": kind.target,
                "current_target": rule.current_target(kind, step - 1),
                "alive": on_counts(z[name]).tolist(),
                "nonzero": (z[name] > 0).sum(-1).tolist(),
                "multipliers": [
                    float(f"{value:.6g}")
                    for value in rule.count_multipliers[name].flatten().tolist()
                ],
                "histogram": histogram(z[name]),
            }
            for name, kind in rule.kinds.items()
        }
        record = {"step": step, "temperature": rule.temperature(step - 1), "families": kinds}
        if masks:
            record["masks"] = {name: encode_mask(z[name]) for name in rule.kinds}
        return record


def record_interval(steps: int) -> int:
    """Steps between two records of a run of `steps`."""
    return max(1, steps // RECORDS)


def snapshot_interval(steps: int) -> int:
    """Steps between two records that hold masks: a multiple of `record_interval`."""
    every = record_interval(steps)
    return every * -(-steps // (every * SNAPSHOTS))


def histogram(z: Tensor) -> list[int]:
    """Units of a kind in each of BINS equal parts of 0 .. 1; 1 belongs to the last."""
    index = (z.double() * BINS).long().clamp(0, BINS - 1)
    counts: list[int] = torch.bincount(index.flatten(), minlength=BINS).tolist()
    return counts


def encode_mask(z: Tensor) -> dict[str, Any]:
    """Masks [rows, units] as compressed bytes of 255 z, in `columns` columns a row.

    Columns are units, or in a kind of more than WHOLE_UNITS the means of neighbouring ones.
    """
    values = z.detach().cpu().double().numpy()
    if values.size > WHOLE_UNITS and values.shape[1] > COLUMNS:
        values = group_means(values, COLUMNS)
    data = np.rint(255 * values).astype(np.uint8).tobytes()
    return {
        "columns": values.shape[1],
        "data": base64.b64encode(zlib.compress(data, 9)).decode("ascii"),
    }


def decode_mask(entry: dict[str, Any]) -> np.ndarray:
    """The masks [rows, columns] of `encode_mask`, in 0 .. 1.

    Raises ValueError for other content.
    """
    try:
        data = zlib.decompress(base64.b64decode(entry["data"], validate=True))
    except (zlib.error, binascii.Error) as error:
        raise ValueError(f"not an encoded mask: {error}") from error
    return np.frombuffer(data, np.uint8).reshape(-1, entry["columns"]) / 255


def group_means(values: np.ndarray, groups: int) -> np.ndarray:
    """Means [rows, groups] of neighbouring columns of [rows, columns]; groups <= columns.

    Groups differ by at most one column in size.
    """
    edges = np.arange(groups + 1) * values.shape[1] // groups
    sums = np.add.reduceat(values, edges[:-1], axis=1)
    means: np.ndarray = sums / np.diff(edges)
    return means


def read_records(
    path: Path, usable: Callable[[dict[str, Any]], bool] = lambda record: True
) -> list[dict[str, Any]]:
    """The records of a .jsonl file that a run may still be writing; none where there is no file.

    A last line that was cut short is left out. So are lines that are no record of a step, or none
    that is `usable`; a warning counts them. Raises InputError for a file that cannot be read.
    """
    if not path.exists():
        return []
    try:
        lines = read_bytes(path).decode("utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{path}: {failure(error)}") from None
    records, odd = [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        # Deeply nested brackets end in RecursionError.
        except (ValueError, RecursionError):
            if line.endswith("\n") and line.strip():
                odd.append(number)
            continue
        if isinstance(record, dict) and is_kind(record.get("step"), int) and usable(record):
            records.append(record)
        else:
            odd.append(number)
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        logger.warning(f"{path}: left out line {odd[0]}{more}: no record as this version writes it")
    return records
