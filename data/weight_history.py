"""The domain weights that a run drew its samples with, update by update: OUTPUT/mixture.jsonl.

Together with data, seed and batch they are all that the order of samples depends on. So the file
holds these too, and the weights exactly.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import InputError, naming
from data.paths import home_expanded
from data.pipes import read_again
from data.records import is_finite, parse_json

FILE = "mixture.jsonl"
FLAG = "--mixture-history"
ORDER: dict[str, tuple[type, str]] = {
    "data": (str, "other data"),
    "sizes": (dict, "other domains or samples"),
    "seed": (int, "another --seed"),
    "seq_len": (int, "another --seq-len"),
    "global_batch": (int, "another --global-batch"),
    "used": (dict, "other samples passed over, which shearing has drawn"),
}
"""What the order depends on besides the weights, by name: its type, and a difference in words."""


@dataclass(frozen=True, slots=True)
class WeightHistory:
    """Weights by step."""

    path: Path
    order: dict[str, Any]
    """The values of ORDER."""
    interval: int
    """Steps between updates."""
    weights: dict[int, dict[str, float]]
    """Those in force after so many steps, where they may have changed; 0 holds the first."""

    def require(self, order: Mapping[str, Any], interval: int | None, steps: int) -> None:
        """Raises InputError unless a run of `steps` on `order` can repeat these weights.

        `interval` is what the user asked for, if anything.
        """
        place = f"{FLAG} {self.path}"
        for name, (_, difference) in ORDER.items():
            # The order of the domains counts too.
            if _listed(self.order[name]) != _listed(order[name]):
                raise InputError(
                    f"{place} is of a run with {difference}: {name} {_short(self.order[name])} "
                    f"there, {_short(order[name])} here; the order of samples would not be that "
                    "run's: use what it used"
                )
        if interval is not None and interval != self.interval:
            raise InputError(
                f"{place} has an update every {self.interval} steps, and --mixture-interval is "
                f"{interval}: leave --mixture-interval out"
            )
        missing = [step for step in self._updates(steps) if step not in self.weights]
        if missing:
            raise InputError(
                f"{place} has no weights of step {missing[0]:,}, which a run of {steps:,} steps "
                f"needs (it goes to step {max(self.weights):,}): use the whole file of a run of "
                "as many steps"
            )

    def digest(self, steps: int) -> str:
        """Identity of what a run of `steps` draws by; more steps of the file do not change it."""
        used = [[step, self.weights[step]] for step in (0, *self._updates(steps))]
        content = json.dumps([self.order, self.interval, used], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _updates(self, steps: int) -> range:
        """The updates after which samples are drawn."""
        return range(self.interval, steps, self.interval)


def header(order: Mapping[str, Any], interval: int, weights: Mapping[str, float]) -> str:
    """The first line of a history: the values of ORDER, and the first weights."""
    known = {name: order[name] for name in ORDER}
    return json.dumps({"step": 0, "weights": dict(weights), "interval": interval, **known}) + "\n"


def line(step: int, weights: Mapping[str, float]) -> str:
    """The line of an update after `step` steps."""
    return json.dumps({"step": step, "weights": dict(weights)}) + "\n"


def read_history(path: Path) -> WeightHistory:
    """Reads a history, or that of the run whose folder `path` is.

    A last line that the run is still writing is left out. Raises InputError, naming the place, for
    any other content.
    """
    path = Path(home_expanded(path, FLAG))
    path = path / FILE if path.is_dir() else path
    fix = f"{FLAG} takes the {FILE} of a run with a dynamic mixture"
    with naming(FLAG):
        lines = read_again(path, fix).split("\n")[:-1]
    if not lines:
        raise InputError(f"{path}: is empty; {fix}")
    first: dict[str, Any] = {}
    weights: dict[int, dict[str, float]] = {}
    for number, text in enumerate(lines, 1):
        place = f"{path}:{number}"
        keys: dict[str, Any] = {"step": int, "weights": dict}
        if not first:
            keys |= {"interval": int} | {name: kind for name, (kind, _) in ORDER.items()}
        record = parse_json(text, place, fix, keys=keys)
        first = first or record
        step = record["step"]
        if step in weights or bool(weights) != bool(step):
            raise InputError(
                f"{place}: `step` is {step}; the first line has step 0, and no step comes twice; "
                f"{fix}"
            )
        weights[step] = _weights(record["weights"], first["sizes"], place, fix)
    if first["interval"] < 1:
        raise InputError(f"{path}:1: `interval` is {first['interval']}, not 1 or more; {fix}")
    return WeightHistory(path, {name: first[name] for name in ORDER}, first["interval"], weights)


def _weights(
    values: dict[str, Any], domains: Mapping[str, Any], place: str, fix: str
) -> dict[str, float]:
    if values.keys() != domains.keys():
        raise InputError(
            f"{place}: `weights` names {sorted(values)}, the first line {sorted(domains)}; {fix}"
        )
    good = all(is_finite(value) and 0 <= value <= 1 for value in values.values())
    if not good or not sum(values.values()) > 0:
        raise InputError(
            f"{place}: `weights` must be numbers from 0 to 1 and not all 0, got {values}; {fix}"
        )
    return {domain: float(value) for domain, value in values.items()}


def _listed(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:120] + "..."
