"""Rule "sheared-llama": the published penalty on expected sparsity, with dual ascent."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from data.errors import InputError
from pruner.config import MaskConfig
from pruner.hard_concrete import gate, probability_nonzero
from pruner.rules import ADAM_BETAS, Rule, load_parameters, optimizer_state
from pruner.units import UnitKind, indicator
from trainer.schedule import learning_rate


class Lagrangian(Rule):
    """Sheared LLaMA's rule (arXiv 2310.06694): hard-concrete masks, a Lagrangian of the expected L0
    norm, multipliers raised by dual ascent. It need not polarise.

    Constants are those of the published code (beta 2/3, log-alpha within ln 0.01 .. ln 100, one
    pair of multipliers per kind of units, mean over rows); its weight decay of 0 is the run's to
    set. At the end the top-k values between 0 and 1 of each row are kept, whatever they are.
    """

    BETA = 2 / 3
    EVAL_SHARPNESS = 0.8
    BOUND = math.log(100)
    LR_WARMUP = 0.1
    MIN_LR_RATIO = 0.1

    def __init__(
        self,
        kinds: dict[str, UnitKind],
        scores: dict[str, Tensor],
        config: MaskConfig,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__(kinds, scores, config, steps, seed)
        with torch.no_grad():
            self.bound_scores()
        self.multipliers = {
            name: torch.zeros(2, device=self.scores[name].device, requires_grad=True)
            for name in kinds
        }
        # Views, which follow the multipliers.
        self.count_multipliers = {name: v.detach()[:1] for name, v in self.multipliers.items()}
        self.ascent = torch.optim.Adam(
            list(self.multipliers.values()),
            lr=self.learning_rate,
            betas=ADAM_BETAS,
            maximize=True,
        )

    def masks(self, step: int, draw: int | None = 0) -> dict[str, Tensor]:
        if draw is None:
            return self.kept({n: self.current_target(kind, step) for n, kind in self.kinds.items()})
        noise = self.noise(step, draw)
        return {
            name: gate((scores + noise[name]) / self.BETA) for name, scores in self.scores.items()
        }

    def final(self) -> dict[str, Tensor]:
        return self.kept({name: kind.target for name, kind in self.kinds.items()})

    def kept(self, targets: Mapping[str, float]) -> dict[str, Tensor]:
        """The published masks of evaluation: between 0 and 1 for each row's top scores, else 0."""
        return {
            name: torch.sigmoid(self.EVAL_SHARPNESS / self.BETA * scores.detach())
            * indicator(scores.detach(), round(targets[name]))
            for name, scores in self.scores.items()
        }

    def temperature(self, step: int) -> float:
        return self.BETA

    def violations(self, step: int) -> dict[str, Tensor]:
        """Expected sparsity minus its current target, [rows] of each kind; differentiable."""
        result = {}
        for name, kind in self.kinds.items():
            sparsity = 1 - probability_nonzero(self.scores[name], self.BETA).mean(-1)
            result[name] = sparsity - (1 - self.current_target(kind, step) / kind.units)
        return result

    def add_regularizer(self, step: int) -> None:
        for name, violation in self.violations(step).items():
            terms = torch.stack([violation.mean(), violation.square().mean()])
            (self.multipliers[name].detach() * terms).sum().backward()
            self.multipliers[name].grad = terms.detach()
        rate = learning_rate(
            step,
            steps=self.steps,
            peak=self.learning_rate,
            warmup_ratio=self.LR_WARMUP,
            min_ratio=self.MIN_LR_RATIO,
        )
        for optimizer in (self.optimizer, self.ascent):
            for group in optimizer.param_groups:
                group["lr"] = rate
        self.ascent.step()

    def bound_scores(self) -> None:
        for scores in self.scores.values():
            scores.clamp_(-self.BOUND, self.BOUND)

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"multipliers.{name}": v.detach() for name, v in self.multipliers.items()}
        state |= optimizer_state(self.ascent, self.multipliers, "multipliers")
        return state | super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        load_parameters(self.ascent, self.multipliers, "multipliers", state)


def require_reachable(kinds: dict[str, UnitKind], config: MaskConfig) -> None:
    """Raises InputError when the rows of a kind cannot meet their target under the rule.

    Expected counts of the Lagrangian stay within 4.7% and 99.8% of the units, because log-alpha is
    bounded. A projection meets every count.
    """
    if config.rule == "projection":
        return
    bounds = torch.tensor([-Lagrangian.BOUND, Lagrangian.BOUND])
    low, high = probability_nonzero(bounds, Lagrangian.BETA).tolist()
    for name, kind in kinds.items():
        least, most = math.ceil(low * kind.units), math.floor(high * kind.units)
        if not least <= kind.target <= most:
            raise InputError(
                f"--rule {config.rule} cannot hold the rows of {name} at {kind.target} of "
                f"{kind.units} units: its expected count stays within {least}..{most}; use another "
                "target or --rule projection"
            )
