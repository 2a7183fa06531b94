"""Stops a run that has become meaningless, before the damage is saved."""

import math
from typing import ClassVar

from data.errors import InputError
from trainer.checkpoint import Checkpointer
from trainer.loop import Callback, Trainer


class GuardCallback(Callback):
    """Raises InputError when the loss or the gradient norm is not finite, before the optimizer uses
    the gradient. Finite ones prove that the checkpoint before the step is sound."""

    name: ClassVar[str] = "guard"

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer

    def before_optimizer_step(self, trainer: Trainer) -> None:
        for name in ("loss", "grad_norm"):
            value = trainer.record[name]
            if not math.isfinite(value):
                raise InputError(
                    f"{name} is {value} at step {trainer.step + 1} (it must be finite); nothing "
                    f"was updated. {self._remedy(trainer)}"
                )
        self.checkpointer.prove(trainer.step)

    def _remedy(self, trainer: Trainer) -> str:
        if trainer.step == 0:
            return (
                "No step was made before it, so the learning rate has no part in it: the start "
                "model's weights are damaged, or --precision does not suit them (--precision fp32 "
                "is the safe one)"
            )
        return self.checkpointer.way_back(trainer)
