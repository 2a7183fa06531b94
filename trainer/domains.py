"""Initial domain weights and reference losses of a run, from options or from the run that made the
model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import InputError


@dataclass(frozen=True, slots=True)
class Domains:
    """Starting point of a mixture."""

    weights: dict[str, float]
    """Sampling probability per domain; sums to 1."""
    reference: dict[str, float]
    """Loss in nats per token that each domain is steered towards; empty when unknown."""
    notes: list[str]
    """What the user should know about where these came from."""


def parse_values(text: str, flag: str) -> dict[str, float]:
    """Reads "c4=0.6,github=0.4". Raises InputError naming `flag`."""
    values: dict[str, float] = {}
    for part in text.split(","):
        name, separator, number = part.strip().partition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not separator or not name or not value >= 0:
            raise InputError(f"{flag} {text!r}: {part!r} is not <domain>=<number of 0 or more>")
        if name in values:
            raise InputError(f"{flag} {text!r}: domain {name!r} is given twice")
        values[name] = value
    return values


def starting_domains(
    sizes: Mapping[str, int],
    *,
    weights: str | None,
    reference: str | None,
    sheared: dict[str, Any] | None,
    dynamic: bool,
) -> Domains:
    """Chooses weights and reference losses for the domains of `sizes` (sequences per domain).

    Each comes from its option if given, else from `sheared` (a shear.json), else weights are
    proportional to tokens and references are unknown, which turns a dynamic mixture into a fixed
    one (said in `notes`). Raises InputError for options that name other domains than the data has.
    """
    notes = []
    if weights is not None:
        chosen = _match(parse_values(weights, "--domain-weights"), sizes, "--domain-weights")
    else:
        chosen = {d: w for d, w in (sheared or {}).get("weights", {}).items() if d in sizes}
        if chosen.keys() != sizes.keys():
            if chosen:
                notes.append(
                    f"the sheared run's weights lack {sorted(sizes.keys() - chosen.keys())}: "
                    "starting with weights proportional to tokens (--domain-weights sets others)"
                )
            chosen = {domain: float(size) for domain, size in sizes.items()}
    total = sum(chosen.values())
    if total <= 0:
        raise InputError(f"--domain-weights {weights!r}: the weights sum to 0; give one above 0")
    losses = _reference(sizes, reference, sheared)
    if dynamic and not losses:
        notes.append(
            "no reference losses are known for these domains, so the domain weights stay fixed; "
            "--reference-losses 'c4=2.1,...' makes them dynamic"
        )
    return Domains({d: chosen[d] / total for d in sizes}, losses, notes)


def _reference(
    sizes: Mapping[str, int], reference: str | None, sheared: dict[str, Any] | None
) -> dict[str, float]:
    if reference is not None:
        return _match(parse_values(reference, "--reference-losses"), sizes, "--reference-losses")
    known = (sheared or {}).get("reference") or {}
    losses = {d: v["loss"] if isinstance(v, dict) else v for d, v in known.items() if d in sizes}
    return losses if losses.keys() == sizes.keys() else {}


def _match(values: dict[str, float], sizes: Mapping[str, int], flag: str) -> dict[str, float]:
    if values.keys() != sizes.keys():
        raise InputError(
            f"{flag} names {sorted(values)}, the data has the domains {sorted(sizes)}; "
            "give each exactly once"
        )
    return values


def sheared_report(model: Path) -> dict[str, Any] | None:
    """The shear.json of the run whose `model` folder this is, or None."""
    path = model.parent / "shear.json"
    if not path.is_file():
        return None
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report
