"""Mask learning as a callback of the training loop."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pruner.constraint import Rule
from pruner.masks import alive_counts, to_masks
from pruner.shapes import Shape
from trainer.callbacks.base import Callback
from trainer.models.masks import Masks

if TYPE_CHECKING:
    from trainer.loop import Trainer

LABELS = {
    "hidden": "hidden",
    "layer": "layers",
    "kv_group": "kv",
    "query_head": "heads",
    "intermediate": "ffn",
}
"""Names of the families in the progress bar."""


class ShearCallback(Callback):
    """Draws the step's masks, hands them to the loop as leaves and trains the scores behind them.

    The scores are replicated: every rank draws the same masks and sums the same gradients, so they
    stay equal without being communicated. All micro-batches of a step share one draw.
    """

    name: ClassVar[str] = "shear"

    def __init__(self, rule: Rule, source: Shape) -> None:
        self.rule = rule
        self.source = source
        self._z: dict[str, Tensor] = {}
        self._outputs: list[Tensor] = []
        self._leaves: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def on_train_start(self, t: "Trainer") -> None:
        if t.step == t.config.steps:
            t.masks = self.final_masks()

    def on_step_start(self, t: "Trainer") -> None:
        masks = self.rule.masks(t.step)
        self._z = {name: z.detach() for name, z in masks.items()}
        outputs = to_masks(masks, self.source).tensors()
        trained = {name: z for name, z in outputs.items() if z.requires_grad}
        leaves = {name: z.detach().requires_grad_(name in trained) for name, z in outputs.items()}
        self._outputs = list(trained.values())
        self._leaves = [leaves[name] for name in trained]
        t.masks = Masks(**leaves)

    def on_backward(self, t: "Trainer") -> None:
        self._gradients = _summed_gradients(self._leaves, t) if self._leaves else []

    def on_update(self, t: "Trainer") -> None:
        # Not earlier: a step whose gradients are not finite must leave the scores as they are.
        if self._outputs:
            self.rule.update(t.step, self._outputs, self._gradients)
        self._outputs, self._leaves, self._gradients = [], [], []

    def on_step_end(self, t: "Trainer") -> None:
        self._report(t, t.step - 1)
        if t.step == t.config.steps:
            t.masks = self.final_masks()

    def _report(self, t: "Trainer", step: int) -> None:
        """Alive and target units, multipliers and temperature of the masks the step used."""
        alive = {name: alive_counts(z).tolist() for name, z in self._z.items()}
        for name, family in self.rule.members.items():
            counts, label = alive[name], LABELS[name]
            low, high = min(counts), max(counts)
            t.bar_fields[label] = f"{_range(low, high)}/{family.target}"
            t.record[f"alive_{name}"] = sum(counts) / len(counts)
            t.record[f"alive_{name}_min"] = low
            t.record[f"alive_{name}_max"] = high
            t.record[f"target_{name}"] = self.rule.current_target(family, step)
        duals = torch.cat([dual.abs().flatten() for dual in self.rule.duals().values()])
        multiplier = float(duals.mean())
        t.record["lambda"] = multiplier
        t.record["temperature"] = self.rule.temperature(step)
        t.bar_fields["λ"] = f"{multiplier:.3f}"

    def final_masks(self) -> Masks:
        """The masks to evaluate and extract."""
        return to_masks(self.rule.final(), self.source)

    def state_dict(self) -> dict[str, Any]:
        return self.rule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict(state)


def _summed_gradients(leaves: list[Tensor], t: "Trainer") -> list[Tensor]:
    """The leaves' gradients summed over ranks, in one collective."""
    gradients = [torch.zeros_like(z) if z.grad is None else z.grad for z in leaves]
    joined = t.context.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = joined.split([gradient.numel() for gradient in gradients])
    return [part.view_as(z) for part, z in zip(parts, leaves, strict=True)]


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}..{high}"
