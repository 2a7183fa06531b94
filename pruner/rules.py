"""How scores become masks of the target shape: what the rules have in common.

Every rule trains the scores of each kind of units with an optimizer of its own, in fp32 and
replicated on every rank; they differ in how the target count is met.

projection     Each row is projected onto {sum z = k} at every step, so the count is met by
               construction (pruner.projection).
sheared-llama  Sheared LLaMA's penalty on the expected L0 norm with multipliers raised by dual
               ascent (pruner.sheared_llama).
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from pruner.config import MaskConfig
from pruner.hard_concrete import logistic_noise
from pruner.units import UnitKind

ADAM_BETAS = (0.9, 0.95)


class Rule(ABC):
    """Scores [rows, units] of each kind of units and the masks z they stand for.

    `step` counts completed optimizer steps, so a run's steps are 0 .. steps - 1. The same (seed,
    step, draw) gives the same noise on every rank and after a resume. `config` is resolved.
    """

    def __init__(
        self,
        kinds: dict[str, UnitKind],
        scores: dict[str, Tensor],
        config: MaskConfig,
        steps: int,
        seed: int,
    ) -> None:
        assert config.mask_lr is not None and config.target_warmup is not None
        self.kinds = kinds
        self.config = config
        self.learning_rate = config.mask_lr
        self.warmup = config.target_warmup
        self.steps = steps
        self.seed = seed
        self.scores = {
            name: scores[name].detach().to(torch.float32, copy=True).requires_grad_()
            for name in kinds
        }
        self.count_multipliers: dict[str, Tensor] = {}
        """What each kind's count costs, [rows, 1] or [1]: the thresholds of the latest draw, or the
        Lagrangian's linear multipliers."""
        self.optimizer = torch.optim.Adam(
            list(self.scores.values()), lr=self.learning_rate, betas=ADAM_BETAS
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
    def temperature(self, step: int) -> float:
        """Width of the masks' transition at `step`."""

    def noise(self, step: int, draw: int | None) -> dict[str, Tensor]:
        """Logistic noise [rows, units] of each kind on the scores' device; none for draw None."""
        if draw is None:
            return {}
        shapes = {name: (kind.rows, kind.units) for name, kind in self.kinds.items()}
        noise = logistic_noise(shapes, self.seed, step, draw)
        return {name: values.to(self.scores[name].device) for name, values in noise.items()}

    def current_target(self, kind: UnitKind, step: int) -> float:
        """Units each row is held to at `step`: linear from all of them to the target."""
        progress = min(1.0, (step + 1) / (self.steps * self.warmup))
        return kind.units + (kind.target - kind.units) * progress

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
        return state | optimizer_state(self.optimizer, self.scores, "scores")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; the continuation is bit-identical."""
        load_parameters(self.optimizer, self.scores, "scores", state)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """The optimizer's moments of `parameters`, as "prefix.name.moment"."""
    return {
        f"{prefix}.{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_parameters(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, Tensor],
    prefix: str,
    state: dict[str, Any],
) -> None:
    """Restores `parameters`, stored as "prefix.name", and the optimizer's moments of them."""
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
