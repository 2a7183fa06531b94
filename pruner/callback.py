"""Mask learning as a callback of the training loop."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from data.errors import InputError
from pruner.rules import Rule
from pruner.shapes import Shape
from pruner.units import on_counts, span, to_masks
from trainer.loop import Callback, Trainer
from trainer.models.computed import ComputedUnits, computed_flops
from trainer.models.folding import WeightCache
from trainer.models.masks import Masks
from trainer.parallel import compute_dtype

LABELS = {
    "hidden": "hidden",
    "layer": "layers",
    "attention": "attention",
    "feed_forward": "mlp",
    "kv_group": "kv",
    "query_head": "heads",
    "intermediate": "ffn",
}
"""Names of the kinds of units in the progress bar."""
PADDING = {"cuda": 128, "cpu": 16}
"""Multiples to which the nonzero dimensions and channels are padded, for vector loads."""


class ShearCallback(Callback):
    """Draws masks, hands them to the loop as leaves and trains the scores behind them.

    The scores are replicated: every rank sums the same gradients, so they stay equal without being
    communicated. Which passes share a draw is the option `mask_draws` of MaskConfig.
    """

    name: ClassVar[str] = "shear"

    def __init__(self, rule: Rule, source: Shape, headroom: float = math.inf) -> None:
        self.rule = rule
        self.source = source
        self.headroom = headroom
        """Bytes of each rank that gathered weights and their gradient sums may take."""
        self.z: dict[str, Tensor] = {}
        """[rows, units] masks of each kind in this rank's last draw."""
        self._outputs: list[Tensor] = []
        self._leaves: list[Tensor] = []
        self._steered = False

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.step == trainer.config.steps:
            trainer.masks = self.final_masks(trainer)

    def on_step_start(self, trainer: Trainer) -> None:
        self._outputs, self._leaves = [], []
        draws = self.rule.config.mask_draws
        if draws != "micro-batch":
            draw = trainer.context.rank if draws == "rank" else 0
            self._draw(trainer, draw, trainer.micro_batches)

    def on_micro_batch(self, trainer: Trainer) -> None:
        if self.rule.config.mask_draws == "micro-batch":
            first = trainer.context.rank * trainer.micro_batches
            self._draw(trainer, first + trainer.micro_batch, 1)

    def _draw(self, trainer: Trainer, draw: int, passes: int) -> None:
        """Makes masks for the next `passes` forward and backward passes of this rank."""
        z = self.rule.masks(trainer.step, draw)
        self.z = {name: values.detach() for name, values in z.items()}
        joined = self._joined(z)
        leaves = {}
        for name, output in joined.tensors().items():
            leaves[name] = output.detach().requires_grad_(output.requires_grad)
            if output.requires_grad:
                self._outputs.append(output)
                self._leaves.append(leaves[name])
        masks = self._compact(joined.with_tensors(leaves), trainer)
        computed = masks.computed
        if computed is not None:
            model, seq_len = trainer.model.config, trainer.config.seq_len
            trainer.throughput.recount(
                lambda causal: computed_flops(model, computed, seq_len, causal)
            )
            if passes > 1 and self._may_share(computed, trainer):
                masks = replace(masks, cache=WeightCache(passes))
        trainer.masks = masks

    def _joined(self, z: dict[str, Tensor]) -> Masks:
        return to_masks(z, self.source, hold_scale=self.rule.config.norm_scale == "held")

    def _compact(self, masks: Masks, trainer: Trainer) -> Masks:
        if not self.rule.config.compact:
            return masks
        padding = PADDING.get(trainer.context.device.type, 16)
        return masks.compact(trainer.model.config, multiple=padding)

    def _may_share(self, computed: ComputedUnits, trainer: Trainer) -> bool:
        """Whether the passes of this draw share their gathered weights (docs/decisions/0005).

        Shared weights get their gradients in the last pass alone, and FSDP reduces in each pass the
        parameters that have one. Ranks with draws of their own compute other units, and would wait
        for each other with different parameters. Replicas (HSDP) must reduce the same parameters in
        every pass. Both gather anew in each pass, as does a rank without the memory to keep the
        gathered weights and the fp32 sums of their gradients.
        """
        if self.rule.config.mask_draws != "step" or trainer.config.replicas > 1:
            return False
        model = trainer.model.config
        share = computed_flops(model, computed, 0, True) / model.flops_per_token(0, True)
        itemsize = compute_dtype(trainer.config.precision, trainer.context.device).itemsize
        return model.num_parameters() * share * (itemsize + 4) <= self.headroom

    def after_backward(self, trainer: Trainer) -> None:
        self._steered = bool(self._outputs)
        if not self._steered:
            return
        gradients = [torch.zeros_like(z) if z.grad is None else z.grad for z in self._leaves]
        scores = self.rule.backward(self._outputs, gradients)
        self._outputs, self._leaves = [], []
        joined = trainer.context.all_reduce_sum(
            torch.cat([gradient.flatten() for gradient in scores])
        )
        parts = joined.split([gradient.numel() for gradient in scores])
        for gradient, part in zip(scores, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def after_optimizer_step(self, trainer: Trainer) -> None:
        # Not earlier: a step whose gradients are not finite must leave the scores as they are.
        if self._steered:
            self.rule.update(trainer.step)

    def before_optimizer_step(self, trainer: Trainer) -> None:
        # A loss that is not finite breaks every row: GuardCallback says so.
        sound = self._steered and math.isfinite(trainer.record["loss"])
        rows = self.rule.broken_rows() if sound else []
        if rows:
            more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
            raise InputError(
                f"the mask gradients of {', '.join(rows[:3])}{more} are not finite at step "
                f"{trainer.step + 1}; nothing was updated. Run the same command with a lower --lr "
                f"(now {trainer.config.lr:g}): it resumes from the last checkpoint, if one was "
                f"saved. A lower --mask-lr (now {self.rule.learning_rate:g}) is another "
                "run: give it another --output"
            )

    def on_step_end(self, trainer: Trainer) -> None:
        self._report(trainer, trainer.step - 1)
        if trainer.step == trainer.config.steps:
            trainer.masks = self.final_masks(trainer)
        elif trainer.config.eval_interval and trainer.step % trainer.config.eval_interval == 0:
            # Equal on all ranks and free of noise, whatever the ranks drew for training.
            with torch.no_grad():
                z = self.rule.masks(trainer.step - 1, None)
            trainer.masks = self._compact(self._joined(z), trainer)

    def _report(self, trainer: Trainer, step: int) -> None:
        """Units on, target, multipliers and temperature of the masks the step used."""
        for name, kind in self.rule.kinds.items():
            counts: list[int] = on_counts(self.z[name]).tolist()
            trainer.bar_fields[LABELS[name]] = f"{span(counts)}/{kind.target}"
            trainer.record[f"alive_{name}"] = sum(counts) / len(counts)
            trainer.record[f"alive_{name}_min"] = min(counts)
            trainer.record[f"alive_{name}_max"] = max(counts)
            trainer.record[f"target_{name}"] = self.rule.current_target(kind, step)
        multipliers = [values.flatten() for values in self.rule.count_multipliers.values()]
        multiplier = float(torch.cat(multipliers).abs().mean())
        trainer.record["lambda"] = multiplier
        trainer.record["temperature"] = self.rule.temperature(step)
        trainer.bar_fields["λ"] = f"{multiplier:.3f}"

    def final_masks(self, trainer: Trainer) -> Masks:
        """The masks to evaluate."""
        return self._compact(self._joined(self.rule.final()), trainer)

    def state_dict(self) -> dict[str, Any]:
        return self.rule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict(state)
