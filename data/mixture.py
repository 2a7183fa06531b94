"""Dynamic domain weights: domains whose loss lags their reference are drawn more often."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, isfinite, log
from typing import Annotated, Any, Literal

from data.errors import InputError, require
from data.options import Name


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    """How domain weights follow the losses."""

    kind: Annotated[Literal["dynamic", "fixed"], Name("mixture")] = "dynamic"
    """"dynamic": raise the weight of domains whose loss exceeds its reference. "fixed": keep the
    initial weights."""
    strength: Annotated[float, Name("mixture-strength")] = 4.0
    """A gap of 1 nat per token kept up over the whole run multiplies a domain's weight by
    exp(strength) relative to a domain without a gap."""
    floor: Annotated[float, Name("mixture-floor")] = 1 / 8
    """Lowest weight, as a multiple of the initial one."""
    ceiling: Annotated[float, Name("mixture-ceiling")] = 8.0
    """Highest weight, as a multiple of the initial one."""
    clip: Annotated[bool, Name("mixture-clip")] = True
    """Count a loss below its reference as no gap; otherwise as a negative one."""
    interval: Annotated[int, Name("mixture-interval")] = 10
    """Steps between updates. The strength of the effect does not depend on it."""

    def __post_init__(self) -> None:
        finite = isfinite(self.strength) and self.strength >= 0
        require(finite, "mixture_strength", self.strength, "finite and at least 0")
        weight = "as a multiple of the initial weights"
        require(0 <= self.floor <= 1, "mixture_floor", self.floor, f"in [0, 1], {weight}")
        require(self.ceiling >= 1, "mixture_ceiling", self.ceiling, f"at least 1, {weight}")
        require(self.interval >= 1, "mixture_interval", self.interval, "at least 1 (step)")


class Mixture:
    """Domain weights by multiplicative updates on the excess loss.

    The rule is that of Sheared LLaMA (Xia et al. 2023, section 3.2, algorithm 1; after DoReMi, Xie
    et al. 2023) with the exponent scaled by the share of the run that passed since the last update:

        ln w_d += strength * max(loss_d - reference_d, 0) * tokens / horizon_tokens

    followed by a rescaling that makes the weights sum to 1 with each within
    [floor, min(1, ceiling)] of the initial weight. Equal gaps thus have an equal total effect
    however often `update` is called (exactly so while no weight stands at a bound).

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
        self._weights = dict(self._initial)

    @property
    def weights(self) -> dict[str, float]:
        """Weights in force; they sum to 1."""
        return dict(self._weights)

    def update(
        self, loss_sum: Mapping[str, float], token_count: Mapping[str, int], tokens: int
    ) -> dict[str, float]:
        """Moves the weights by what was observed since the last update and returns them.

        Args:
            loss_sum: summed loss (nats) per domain over `token_count` target tokens.
            token_count: a domain that is absent or has 0 keeps its weight.
            tokens: tokens trained on since the last update, over all domains.

        Raises:
            InputError: a domain's loss is not finite; the weights stay as they were.
        """
        assert tokens >= 0
        if self.config.kind == "fixed":
            return self.weights
        scale = self.config.strength * tokens / self.horizon_tokens
        exponents: dict[str, float] = {}
        for domain in self._weights:
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
            exponents[domain] = scale * (max(gap, 0.0) if self.config.clip else gap)
        self._apply(exponents)
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the weights; they change again only at the next `update`.

        Raises:
            InputError: the state has other domains.
        """
        if state["weights"].keys() != self._weights.keys():
            raise InputError(
                f"cannot resume: the checkpoint mixes the domains {sorted(state['weights'])}, "
                f"this run {sorted(self._weights)}; use the checkpoint's data or a new output"
            )
        self._weights = {domain: float(state["weights"][domain]) for domain in self._weights}

    def _apply(self, exponents: dict[str, float]) -> None:
        moving = [domain for domain in exponents if self._weights[domain] > 0]
        if not moving:
            return
        mass = sum(self._weights[domain] for domain in moving)
        logs = [log(self._weights[domain]) + exponents[domain] for domain in moving]
        top = max(logs)
        lows = [self.config.floor * self._initial[domain] for domain in moving]
        highs = [min(1.0, self.config.ceiling * self._initial[domain]) for domain in moving]
        raw = [exp(value - top) for value in logs]
        for domain, weight in zip(moving, _rescale(raw, lows, highs, mass), strict=True):
            self._weights[domain] = weight


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
