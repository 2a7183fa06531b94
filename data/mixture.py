"""Dynamic domain weights: domains whose loss lags their reference are drawn more often.

The order of samples follows the weights, and the weights follow losses, which differ by rounding
between two layouts of one run (other ranks, micro-batch or device). A decision that is made from
rounded numbers cannot be made sure; it can be made seldom and far from its limits. So losses are
summed over a whole interval, a twentieth of the run by default, and the weights that samples are
drawn with stand on a coarse grid, from which one moves only when it is clearly nearer to another
value. docs/lab-notebook.md says how rarely two layouts then part. Rounding each loss as well would
add limits to cross and remove none.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, isfinite, log, log2
from typing import Annotated, Any, Literal

from data.errors import InputError, require
from data.options import ON_DISK, Name

UPDATES = 20
"""Updates in a run where no interval is given."""
FORMER_INTERVAL = 10
"""What the interval was before it followed the length of the run."""
NOTCHES = 4
"""Notches of the grid per doubling of a weight: 19% each."""
LARGEST_PULL = 1e6
"""Largest exponent of an update, so that the sum of two stays a number."""
MARGIN = 0.25
"""How much further than half a notch a weight must be from its place before it moves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    """How domain weights follow the losses."""

    kind: Annotated[Literal["dynamic", "fixed", "replay"], Name("mixture")] = "dynamic"
    """"dynamic": raise the weight of domains whose loss exceeds its reference. "fixed": keep the
    initial weights. "replay": the weights of the run whose --mixture-history is given, so that its
    samples are drawn again in exactly its order, on any number of ranks."""
    history: Annotated[str | None, Name("mixture-history"), ON_DISK] = None
    """For --mixture replay: the mixture.jsonl of a run, or the run's folder."""
    strength: Annotated[float, Name("mixture-strength")] = 4.0
    """A gap of 1 nat per token kept up over the whole run multiplies a domain's weight by
    exp(strength) relative to a domain without a gap."""
    floor: Annotated[float, Name("mixture-floor")] = 1 / 8
    """Lowest weight, as a multiple of the initial one."""
    ceiling: Annotated[float, Name("mixture-ceiling")] = 8.0
    """Highest weight, as a multiple of the initial one."""
    clip: Annotated[bool, Name("mixture-clip")] = True
    """Count a loss below its reference as no gap; otherwise as a negative one."""
    interval: Annotated[int | None, Name("mixture-interval")] = None
    """Steps between updates. Default: a twentieth of the run. The strength of the effect does not
    depend on it; the fewer updates, the rarer two layouts of a run draw samples in another
    order."""

    def __post_init__(self) -> None:
        finite = isfinite(self.strength) and self.strength >= 0
        require(finite, "mixture_strength", self.strength, "finite and at least 0")
        weight = "as a multiple of the initial weights"
        require(0 <= self.floor <= 1, "mixture_floor", self.floor, f"in [0, 1], {weight}")
        require(self.ceiling >= 1, "mixture_ceiling", self.ceiling, f"at least 1, {weight}")
        interval = self.interval
        require(
            interval is None or interval >= 1, "mixture_interval", interval, "at least 1 (step)"
        )
        if self.kind == "replay" and self.history is None:
            raise InputError(
                "--mixture replay repeats the weights of another run: name its mixture.jsonl with "
                "--mixture-history"
            )
        if self.kind != "replay" and self.history is not None:
            raise InputError(
                f"--mixture-history {self.history} is read with --mixture replay only, and this is "
                f"--mixture {self.kind}: add --mixture replay, or leave the file out"
            )

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why (data.idle)."""
        if self.kind == "dynamic":
            return {}
        rule = ("mixture_strength", "mixture_floor", "mixture_ceiling", "mixture_clip")
        if self.kind == "replay":
            return dict.fromkeys(rule, "--mixture replay takes the weights of --mixture-history")
        return dict.fromkeys((*rule, "mixture_interval"), "--mixture fixed moves no weights")

    def steps_between(self, steps: int) -> int:
        """Steps between updates in a run of `steps`."""
        return self.interval or max(1, steps // UPDATES)


def parse_values(text: str, flag: str) -> dict[str, float]:
    """Reads "c4=0.6,github=0.4", names in Unicode's composed form.

    Raises InputError naming `flag` where one is not finite and at least 0, where a name is there
    twice, or where they are too large to be added.
    """
    values: dict[str, float] = {}
    for part in text.split(","):
        name, separator, number = (word.strip() for word in part.rpartition("="))
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not separator or not name or not (isfinite(value) and value >= 0):
            raise InputError(
                f"{flag} {text!r}: {part.strip()!r} is not <domain>=<finite number of 0 or more>"
            )
        # As domains are named: a file manager's copy of one may look the same and not be.
        name = unicodedata.normalize("NFC", name)
        if name in values:
            raise InputError(f"{flag} {text!r}: domain {name!r} is given twice")
        values[name] = value
    if not isfinite(sum(values.values())):
        raise InputError(f"{flag} {text!r}: the sum of these numbers is not finite; lower them")
    return values


class Mixture:
    """Domain weights by multiplicative updates on the excess loss.

    The rule is that of Sheared LLaMA (Xia et al. 2023, section 3.2, algorithm 1; after DoReMi, Xie
    et al. 2023) with the exponent scaled by the share of the run that passed since the last update:

        ln w_d += strength * max(loss_d - reference_d, 0) * tokens / horizon_tokens

    followed by a rescaling that makes the weights sum to 1 with each within
    [floor, min(1, ceiling)] of the initial weight. Equal gaps thus have an equal total effect
    however often `update` is called (exactly so while no weight stands at a bound).

    These are the `exact` weights. The `weights` in force follow them on a grid: each is its initial
    value times 2^(n / NOTCHES) for a whole n, before all are rescaled as above. An n moves to the
    nearest place when the exact weight is more than 1/2 + MARGIN notches away, and by a factor of 2
    per update at most; what is left of a longer way is made up at the next updates. The weights in
    force hence stay within 30% of the exact ones (7% in the root mean square), but for such ways.

    Args:
        config: the rule's constants.
        initial: weight per domain, finite, at least 0, not all 0; normalised here.
        reference: loss per domain (nats per token) that training should reach; not needed when the
            kind is "fixed".
        horizon_tokens: tokens of the whole run.

    Raises:
        InputError: bad weights, or a domain without a finite reference loss.
    """

    def __init__(
        self,
        config: MixtureConfig,
        initial: Mapping[str, float],
        reference: Mapping[str, float],
        horizon_tokens: int,
    ) -> None:
        values = list(initial.values())
        if not all(isfinite(value) and value >= 0 for value in values) or not any(values):
            raise InputError(
                f"domain weights must be finite, at least 0 and not all 0, got {dict(initial)}"
            )
        if config.kind == "dynamic":
            bad = [d for d in initial if not isfinite(reference.get(d, float("nan")))]
            if bad:
                raise InputError(
                    f"no reference loss for {', '.join(bad)} (known: {dict(reference)}); give one "
                    "for each domain or use --mixture fixed"
                )
        assert horizon_tokens > 0
        total = sum(values)
        self.config = config
        self.horizon_tokens = horizon_tokens
        self._initial = {domain: value / total for domain, value in initial.items()}
        self._reference = dict(reference)
        self._exact = dict(self._initial)
        self._weights = dict(self._initial)
        self._notches: dict[str, int] | None = dict.fromkeys(initial, 0)

    @property
    def weights(self) -> dict[str, float]:
        """Weights in force; they sum to 1."""
        return dict(self._weights)

    @property
    def exact(self) -> dict[str, float]:
        """What the weights in force follow; differs by rounding from one layout to another."""
        return dict(self._exact)

    @property
    def on_grid(self) -> bool:
        """Whether the weights in force stand on the grid. Those of a run that began before there
        was one are the exact ones to its end."""
        return self._notches is not None

    def update(
        self, loss_sum: Mapping[str, float], token_count: Mapping[str, int], tokens: int
    ) -> dict[str, float]:
        """Moves the weights by what was observed since the last update and returns them.

        Args:
            loss_sum: summed loss (nats) per domain over `token_count` target tokens.
            token_count: a domain that is absent or has 0 keeps its exact weight.
            tokens: tokens trained on since the last update, over all domains.

        Raises:
            InputError: a domain's loss is not finite; the weights stay as they were.
        """
        assert tokens >= 0
        if self.config.kind != "dynamic":
            return self.weights
        scale = self.config.strength * tokens / self.horizon_tokens
        exponents: dict[str, float] = {}
        for domain in self._exact:
            count = token_count.get(domain, 0)
            if not count:
                continue
            loss = loss_sum[domain] / count
            if not isfinite(loss):
                raise InputError(
                    f"the loss of domain {domain} is {loss} over {count:,} tokens; training has "
                    "diverged or the domain's data is broken: resume from the last checkpoint "
                    "with a lower learning rate, or leave the domain out"
                )
            gap = loss - self._reference[domain]
            pull = scale * (max(gap, 0.0) if self.config.clip else gap)
            exponents[domain] = max(-LARGEST_PULL, min(LARGEST_PULL, pull))
        self._apply(exponents)
        if self._notches is None:
            self._weights = dict(self._exact)
        else:
            self._follow(self._notches)
        return self.weights

    def replay(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Takes over weights that another run was in force with, and returns them."""
        assert weights.keys() == self._initial.keys()
        self._exact, self._weights = dict(weights), dict(weights)
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        state: dict[str, Any] = {"weights": dict(self._exact)}
        if self._notches is not None:
            state |= {"notches": dict(self._notches), "in_force": dict(self._weights)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the weights; they change again only at the next `update`.

        Raises:
            InputError: the state has other domains.
        """
        if state["weights"].keys() != self._initial.keys():
            raise InputError(
                f"cannot resume: the checkpoint mixes the domains {sorted(state['weights'])}, "
                f"this run {sorted(self._initial)}; use the checkpoint's data or a new output"
            )
        in_force = state.get("in_force", state["weights"])
        self._exact = {domain: float(state["weights"][domain]) for domain in self._initial}
        self._weights = {domain: float(in_force[domain]) for domain in self._initial}
        notches = state.get("notches")
        self._notches = None if notches is None else {d: int(notches[d]) for d in self._initial}

    def _follow(self, notches: dict[str, int]) -> None:
        before = dict(notches)
        for domain, exact in self._exact.items():
            if exact > 0:
                place = NOTCHES * (log2(exact) - log2(self._initial[domain]))
                if abs(place - notches[domain]) > 0.5 + MARGIN:
                    way = round(place) - notches[domain]
                    notches[domain] += max(-NOTCHES, min(NOTCHES, way))
        if notches != before:
            places = {d: self._initial[d] * 2.0 ** (n / NOTCHES) for d, n in notches.items()}
            drawn = [domain for domain, weight in self._exact.items() if weight > 0]
            held = self._rescaled(drawn, [places[domain] for domain in drawn], 1.0)
            self._weights |= dict(zip(drawn, held, strict=True))

    def _apply(self, exponents: dict[str, float]) -> None:
        moving = [domain for domain in exponents if self._exact[domain] > 0]
        if not moving:
            return
        mass = sum(self._exact[domain] for domain in moving)
        logs = [log(self._exact[domain]) + exponents[domain] for domain in moving]
        top = max(logs)
        raw = [exp(value - top) for value in logs]
        self._exact |= dict(zip(moving, self._rescaled(moving, raw, mass), strict=True))

    def _rescaled(self, domains: list[str], values: list[float], mass: float) -> list[float]:
        lows = [self.config.floor * self._initial[domain] for domain in domains]
        highs = [min(1.0, self.config.ceiling * self._initial[domain]) for domain in domains]
        return _rescale(values, lows, highs, mass)


def _rescale(
    values: list[float], lows: list[float], highs: list[float], mass: float
) -> list[float]:
    """clip(c * values, lows, highs) for the c that makes them sum to `mass`.

    The sum grows with c, linearly between the points where a value meets a bound, so c is found
    exactly. Assumes sum(lows) <= mass <= sum(highs), up to rounding.
    """
    floor_of_values = max(values) * 1e-300
    values = [max(value, floor_of_values) for value in values]

    def clipped(c: float) -> list[float]:
        return [
            min(max(c * v, low), high) for v, low, high in zip(values, lows, highs, strict=True)
        ]

    bounds = [low / v for v, low in zip(values, lows, strict=True)]
    bounds += [high / v for v, high in zip(values, highs, strict=True)]
    bounds.sort()
    left = bounds[0]
    for right in bounds:
        if sum(clipped(right)) >= mass:
            break
        left = right
    low_sum, high_sum = sum(clipped(left)), sum(clipped(right))
    share = (mass - low_sum) / (high_sum - low_sum) if high_sum > low_sum else 0.0
    return clipped(left + min(max(share, 0.0), 1.0) * (right - left))
