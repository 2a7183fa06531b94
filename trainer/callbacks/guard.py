"""Stops a run that has become meaningless, before the damage is saved."""

import math
from typing import ClassVar

from data.errors import InputError
from trainer.checkpoint import Checkpointer
from trainer.loop import Callback, Trainer


class GuardCallback(Callback):
    """Raises InputError when the loss or the gradient norm is not finite, before the optimizer uses
    the gradient."""

    name: ClassVar[str] = "guard"

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer

    def before_optimizer_step(self, trainer: Trainer) -> None:
        for name in ("loss", "grad_norm"):
            value = trainer.record[name]
            if not math.isfinite(value):
                last = self.checkpointer.latest()
                where = f"resumes from {last}" if last else "starts again: no checkpoint exists yet"
                config = trainer.config
                raise InputError(
                    f"{name} is {value} at step {trainer.step + 1} (it must be finite); nothing "
                    f"was updated. Run the same command with a lower --lr or --clip (now "
                    f"{config.lr:g} and {config.clip:g}), such as --lr {config.lr / 2:g}: it "
                    f"{where}"
                )
