"""How scores become masks of the target shape: the rules "projection" and "paper".

Both rules train the scores of every mask family with their own optimizer, in fp32 and replicated on
every rank; they differ in how the target count is met.

projection  Each row is projected onto {sum z = k} at every step, so the count is met by
            construction. The threshold lambda of a row is the Lagrange multiplier of its count.
paper       Sheared LLaMA (arXiv 2310.06694): a penalty on the expected L0 norm with multipliers
            raised by dual ascent. It need not polarise.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from data.errors import InputError
from pruner.config import MaskConfig
from pruner.hard_concrete import gate, gate_slope, logistic_noise, probability_nonzero
from pruner.units import Family, indicator
from trainer.schedule import learning_rate

ADAM_BETAS = (0.9, 0.95)
MAX_ITERATIONS = 200
"""Bound of the search for a threshold; every third iteration halves the bracket."""
COUNT_TOLERANCE = 1e-10
"""Largest error of a row's count, in units."""
SATURATION = math.log(11)
"""|logit| from which a gate is exactly 0 or 1 (up to rounding)."""


class Rule(ABC):
    """Scores [rows, units] of each family and the masks z they stand for.

    `step` counts completed optimizer steps, so a run's steps are 0 .. steps - 1. The same (seed,
    step, draw) gives the same noise on every rank and after a resume.
    """

    def __init__(
        self,
        members: dict[str, Family],
        scores: dict[str, Tensor],
        config: MaskConfig,
        steps: int,
        seed: int,
    ) -> None:
        self.members = members
        self.config = config
        self.steps = steps
        self.seed = seed
        self.scores = {
            name: scores[name].detach().to(torch.float32, copy=True).requires_grad_()
            for name in members
        }
        self.optimizer = torch.optim.Adam(
            list(self.scores.values()), lr=config.learning_rate, betas=ADAM_BETAS
        )

    @abstractmethod
    def masks(self, step: int, draw: int | None = 0) -> dict[str, Tensor]:
        """The masks of one step, fp32; they carry a graph to the scores unless they are final.

        `draw` numbers the step's draws of noise; None leaves the noise out.
        """

    @abstractmethod
    def final(self) -> dict[str, Tensor]:
        """The masks to extract, without noise: fp32, exactly `target` entries > 0 in each row."""

    @abstractmethod
    def duals(self) -> dict[str, Tensor]:
        """The multipliers of each family's count constraint in the latest step."""

    @abstractmethod
    def temperature(self, step: int) -> float:
        """Width of the masks' transition at `step`."""

    def noise(self, step: int, draw: int | None) -> dict[str, Tensor]:
        """Logistic noise [rows, units] of each family on the scores' device; none for draw None."""
        if draw is None:
            return {}
        shapes = {name: (family.rows, family.units) for name, family in self.members.items()}
        noise = logistic_noise(shapes, self.seed, step, draw)
        return {name: values.to(self.scores[name].device) for name, values in noise.items()}

    def current_target(self, family: Family, step: int) -> float:
        """Units each row is held to at `step`: linear from all of them to the target."""
        progress = min(1.0, (step + 1) / (self.steps * self.config.warmup))
        return family.units + (family.target - family.units) * progress

    def backward(self, outputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """The scores' gradients, given loss gradients of tensors computed from masks()."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(outputs, gradients)
        for scores in self.scores.values():
            if scores.grad is None:
                scores.grad = torch.zeros_like(scores)
        return [scores.grad for scores in self.scores.values() if scores.grad is not None]

    def broken_rows(self) -> list[str]:
        """Names of the rows, "intermediate row 3", whose score gradients are not finite."""
        return [
            f"{name} row {row}"
            for name, scores in self.scores.items()
            if scores.grad is not None
            for row in torch.nonzero(~scores.grad.isfinite().all(-1)).flatten().tolist()
        ]

    def update(self, step: int) -> None:
        """Take one optimizer step with the gradients that `backward` left in the scores."""
        self.add_regularizer(step)
        for scores in self.scores.values():
            torch.nn.utils.clip_grad_norm_(scores, self.config.mask_clip)
        self.optimizer.step()
        with torch.no_grad():
            self.bound_scores()

    def add_regularizer(self, step: int) -> None:  # noqa: B027
        """Add gradients that do not come from the loss; once a step, equal on every rank.

        Optional: a rule that meets the count by construction has none.
        """

    @abstractmethod
    def bound_scores(self) -> None:
        """Put the scores back into their range, in place."""

    def state_dict(self) -> dict[str, Tensor]:
        """All trained state as flat named tensors."""
        state = {f"scores.{name}": scores.detach() for name, scores in self.scores.items()}
        return state | _optimizer_state(self.optimizer, self.scores, "scores")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; the continuation is bit-identical."""
        _load_parameters(self.optimizer, self.scores, "scores", state)


class Projection(Rule):
    """Entropy-regularised projection of the scores onto a fixed count, annealed to top-k.

    z_i = clip(1.2 sigmoid((a_i - lambda) / T + s n_i) - 0.1, 0, 1), n logistic, with one lambda per
    row such that the masks without noise sum to the current target exactly. T falls geometrically
    and the noise scale s falls to 0 with it; from `harden` on, z marks the top-k scores.
    """

    def __init__(
        self,
        members: dict[str, Family],
        scores: dict[str, Tensor],
        config: MaskConfig,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__(members, scores, config, steps, seed)
        self.levels: dict[str, Tensor] = {}

    def masks(self, step: int, draw: int | None = 0) -> dict[str, Tensor]:
        levels = self.solve(step)
        fixed = {name: level.detach() for name, level in levels.items()}
        if draw is not None:
            self.levels = fixed
        if self.hardened(step):
            return self.final()
        temperature = self.temperature(step)
        noise = self.noise(step, draw)
        scale = self.noise_scale(step)
        z = {}
        for name in self.members:
            scores = self.scores[name].double()
            level = levels[name] if self.config.implicit_gradient else fixed[name]
            logit = (scores - level) / temperature
            z[name] = gate(logit + scale * noise[name] if noise else logit).float()
        return z

    def solve(self, step: int) -> dict[str, Tensor]:
        """The thresholds of `step`: fp64 [rows, 1] for each family, differentiable."""
        temperature = self.temperature(step)
        return {
            name: threshold(
                self.scores[name].double(), self.current_target(family, step), temperature
            )
            for name, family in self.members.items()
        }

    def final(self) -> dict[str, Tensor]:
        return {
            name: indicator(self.scores[name].detach(), family.target)
            for name, family in self.members.items()
        }

    def duals(self) -> dict[str, Tensor]:
        return self.levels

    def hardened(self, step: int) -> bool:
        """True once masks are exactly 0 or 1."""
        return (step + 1) / self.steps >= self.config.harden

    def temperature(self, step: int) -> float:
        progress = min(1.0, (step + 1) / (self.steps * self.config.harden))
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


class _Threshold(torch.autograd.Function):
    """lambda per row with sum_i gate((a_i - lambda) / T) = count."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, count: float, temperature: float) -> Tensor:
        level = solve_threshold(scores, count, temperature)
        ctx.save_for_backward(scores, level)
        ctx.temperature = temperature
        return level

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        scores, level = ctx.saved_tensors
        slope = gate_slope((scores - level) / ctx.temperature)
        total = slope.sum(-1, keepdim=True)
        # Where every gate is saturated the count does not depend on the scores.
        share = torch.where(total > 0, slope / total.clamp(min=1e-300), torch.zeros_like(slope))
        return gradients[0] * share, None, None


def threshold(scores: Tensor, count: float, temperature: float) -> Tensor:
    """The lambda [rows, 1] at which gate((scores - lambda) / temperature) sums to `count`.

    `scores` [rows, units] fp64; where an interval of values meets the count, its middle.
    Differentiable by the implicit function theorem:
    d lambda / d a_j = z'_j / sum_i z'_i.
    """
    level: Tensor = _Threshold.apply(scores, count, temperature)
    return level


@torch.no_grad()
def solve_threshold(scores: Tensor, count: float, temperature: float) -> Tensor:
    """`threshold` without a graph: Newton's method in a bracket that bisection keeps closing."""
    units = scores.shape[-1]
    order = scores.sort(dim=-1, descending=True).values
    width = SATURATION * temperature
    # With lambda at `low` the gates of the first ceil(count) units are 1; with lambda at `high`
    # those of all but the first floor(count) are 0.
    low = order[:, max(math.ceil(count), 1) - 1].unsqueeze(-1) - width
    high = order[:, min(math.floor(count), units - 1)].unsqueeze(-1) + width
    if count >= units:
        return low
    # Where low is beyond high every gate is saturated between them, and any level there would do.
    level = (low + high) / 2
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    for iteration in range(MAX_ITERATIONS):
        logits = (scores - level) / temperature
        excess = gate(logits).sum(-1, keepdim=True) - count
        if float(excess.abs().max()) < COUNT_TOLERANCE:
            break
        low = torch.where(excess > 0, level, low)
        high = torch.where(excess < 0, level, high)
        newton = level + excess * temperature / gate_slope(logits).sum(-1, keepdim=True)
        inside = (newton > low) & (newton < high) & (iteration % 3 < 2)
        level = torch.where(excess == 0, level, torch.where(inside, newton, (low + high) / 2))
    return level


class Paper(Rule):
    """Sheared LLaMA's rule: hard-concrete masks, penalty on expected sparsity, dual ascent.

    Constants are those of the published code (beta 2/3, log-alpha within ln 0.01 .. ln 100, one
    pair of multipliers per family, mean over rows); its weight decay of 0 is the run's to set. At
    the end the top-k soft values of each row are kept, whatever they are.
    """

    BETA = 2 / 3
    EVAL_SHARPNESS = 0.8
    BOUND = math.log(100)
    LR_WARMUP = 0.1
    MIN_LR_RATIO = 0.1

    def __init__(
        self,
        members: dict[str, Family],
        scores: dict[str, Tensor],
        config: MaskConfig,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__(members, scores, config, steps, seed)
        with torch.no_grad():
            self.bound_scores()
        self.multipliers = {
            name: torch.zeros(2, device=self.scores[name].device, requires_grad=True)
            for name in members
        }
        self.ascent = torch.optim.Adam(
            list(self.multipliers.values()),
            lr=config.learning_rate,
            betas=ADAM_BETAS,
            maximize=True,
        )

    def masks(self, step: int, draw: int | None = 0) -> dict[str, Tensor]:
        if draw is None:
            return self.kept({n: self.current_target(f, step) for n, f in self.members.items()})
        noise = self.noise(step, draw)
        return {
            name: gate((scores + noise[name]) / self.BETA) for name, scores in self.scores.items()
        }

    def final(self) -> dict[str, Tensor]:
        return self.kept({name: family.target for name, family in self.members.items()})

    def kept(self, targets: Mapping[str, float]) -> dict[str, Tensor]:
        """The published masks of evaluation: soft values of each row's top scores, else 0."""
        return {
            name: torch.sigmoid(self.EVAL_SHARPNESS / self.BETA * scores.detach())
            * indicator(scores.detach(), round(targets[name]))
            for name, scores in self.scores.items()
        }

    def duals(self) -> dict[str, Tensor]:
        return {name: values.detach()[:1] for name, values in self.multipliers.items()}

    def temperature(self, step: int) -> float:
        return self.BETA

    def violations(self, step: int) -> dict[str, Tensor]:
        """Expected sparsity minus its current target, [rows] for each family; differentiable."""
        result = {}
        for name, family in self.members.items():
            sparsity = 1 - probability_nonzero(self.scores[name], self.BETA).mean(-1)
            result[name] = sparsity - (1 - self.current_target(family, step) / family.units)
        return result

    def add_regularizer(self, step: int) -> None:
        for name, violation in self.violations(step).items():
            terms = torch.stack([violation.mean(), violation.square().mean()])
            (self.multipliers[name].detach() * terms).sum().backward()
            self.multipliers[name].grad = terms.detach()
        rate = learning_rate(
            step,
            steps=self.steps,
            peak=self.config.learning_rate,
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
        state |= _optimizer_state(self.ascent, self.multipliers, "multipliers")
        return state | super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        _load_parameters(self.ascent, self.multipliers, "multipliers", state)


def require_reachable(members: dict[str, Family], config: MaskConfig) -> None:
    """Raises InputError when a family's rows cannot meet their target under the rule.

    The paper's expected counts stay within 4.7% and 99.8% of the units, because log-alpha is
    bounded. A projection meets every count.
    """
    if config.rule != "paper":
        return
    bounds = torch.tensor([-Paper.BOUND, Paper.BOUND])
    low, high = probability_nonzero(bounds, Paper.BETA).tolist()
    for name, family in members.items():
        least, most = math.ceil(low * family.units), math.floor(high * family.units)
        if not least <= family.target <= most:
            raise InputError(
                f"--rule paper cannot hold the rows of {name} at {family.target} of {family.units} "
                f"units: its expected count stays within {least}..{most}; use another target or "
                "--rule projection"
            )


def _optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_parameters(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, Tensor],
    prefix: str,
    state: dict[str, Any],
) -> None:
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(state[f"{prefix}.{name}"])
        start = f"{prefix}.{name}."
        moments = {key[len(start) :]: v for key, v in state.items() if key.startswith(start)}
        if moments:
            optimizer.state[parameter] = {
                # Adam keeps its step count on the CPU.
                key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                for key, value in moments.items()
            }


def make_rule(
    members: dict[str, Family],
    scores: dict[str, Tensor],
    config: MaskConfig,
    steps: int,
    seed: int,
) -> Rule:
    """The rule that `config` names, starting from `scores`."""
    rule = Projection if config.rule == "projection" else Paper
    return rule(members, scores, config, steps, seed)
