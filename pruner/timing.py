"""Times with their rounds and spread, and when a machine was too busy for them to be believed."""

import itertools
import statistics
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

BUSY = 0.2
"""Relative difference of equal work from which times are not believed."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The same work timed in several rounds, at least one."""

    rounds: tuple[float, ...]
    """Seconds in each round."""

    @property
    def seconds(self) -> float:
        """The median round."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles of the rounds, relative to their median."""
        if len(self.rounds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return (high - low) / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Median, number of rounds and spread."""
        return {"seconds": self.seconds, "rounds": len(self.rounds), "spread": self.spread}


def too_busy(timings: Mapping[str, Timing], shapes: Mapping[str, Hashable]) -> str | None:
    """Why the times of models cannot be believed; None when they can.

    Rounds of a model, and models of equal `shapes`, must not differ by more than BUSY. Both
    arguments have the same names.
    """
    reasons = [
        f"{name}: its rounds differ by {timing.spread:.0%}"
        for name, timing in timings.items()
        if timing.spread > BUSY
    ]
    for (one, first), (other, second) in itertools.combinations(timings.items(), 2):
        apart = max(first.seconds, second.seconds) / min(first.seconds, second.seconds) - 1
        if shapes[one] == shapes[other] and apart > BUSY:
            reasons.append(f"{one} and {other}, of one shape, differ by {apart:.0%}")
    if not reasons:
        return None
    return f"too busy to time: {'; '.join(reasons)} (limit {BUSY:.0%})"
