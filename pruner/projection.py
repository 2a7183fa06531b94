"""Rule "projection": the scores are projected onto a fixed count at every step."""

from typing import Any

from torch import Tensor

from pruner.hard_concrete import gate
from pruner.rules import Rule
from pruner.threshold import threshold
from pruner.units import indicator


class Projection(Rule):
    """Entropy-regularised projection of the scores onto a fixed count, annealed to top-k.

    z_i = clip(1.2 sigmoid((a_i - t) / T + s n_i) - 0.1, 0, 1), n logistic, with one threshold t per
    row such that the masks without noise sum to the current target exactly: t is the Lagrange
    multiplier of the row's count. T falls geometrically and the noise scale s falls to 0 with it;
    from `harden` on, z marks the top-k scores.
    Under --freeze-weights nothing is left to train then, so they harden behind the last step.
    """

    @property
    def hard_from(self) -> float:
        """Number of steps after which masks are exactly 0 or 1."""
        return self.steps + 1 if self.config.freeze_weights else self.steps * self.config.harden

    def masks(self, step: int, draw: int | None = 0) -> dict[str, Tensor]:
        thresholds = self.thresholds(step)
        fixed = {name: values.detach() for name, values in thresholds.items()}
        if draw is not None:
            self.count_multipliers = fixed
        if self.hardened(step):
            return self.final()
        if not self.config.implicit_gradient:
            thresholds = fixed
        temperature = self.temperature(step)
        noise = self.noise(step, draw)
        scale = self.noise_scale(step)
        z = {}
        for name in self.kinds:
            logit = (self.scores[name].double() - thresholds[name]) / temperature
            z[name] = gate(logit + scale * noise[name] if noise else logit).float()
        return z

    def thresholds(self, step: int) -> dict[str, Tensor]:
        """The thresholds of `step`: fp64 [rows, 1] of each kind, differentiable."""
        temperature = self.temperature(step)
        return {
            name: threshold(
                self.scores[name].double(), self.current_target(kind, step), temperature
            )
            for name, kind in self.kinds.items()
        }

    def final(self) -> dict[str, Tensor]:
        return {
            name: indicator(self.scores[name].detach(), kind.target)
            for name, kind in self.kinds.items()
        }

    def hardened(self, step: int) -> bool:
        """True once masks are exactly 0 or 1."""
        return step + 1 >= self.hard_from

    def temperature(self, step: int) -> float:
        progress = min(1.0, (step + 1) / self.hard_from)
        ratio = self.config.final_temperature / self.config.temperature
        return self.config.temperature * ratio**progress

    def noise_scale(self, step: int) -> float:
        """Falls from `mask_noise` to 0 in proportion to the temperature's distance from its end."""
        span = self.config.temperature - self.config.final_temperature
        if span == 0:
            return self.config.mask_noise
        return (
            self.config.mask_noise * (self.temperature(step) - self.config.final_temperature) / span
        )

    def bound_scores(self) -> None:
        for scores in self.scores.values():
            scores -= scores.mean(-1, keepdim=True)


class Chosen(Projection):
    """Units that are decided before, and not trained: `units` [rows, units] of each kind."""

    def __init__(self, *arguments: Any, units: dict[str, Tensor]) -> None:
        super().__init__(*arguments)
        self.units = {name: units[name].to(own) for name, own in self.scores.items()}

    def final(self) -> dict[str, Tensor]:
        return {name: units.detach().clone() for name, units in self.units.items()}
