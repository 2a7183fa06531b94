"""Stops a run that has become meaningless, before the damage is saved."""

import math
from typing import TYPE_CHECKING, ClassVar

from data.errors import InputError
from trainer.callbacks.base import Callback
from trainer.checkpoint import Checkpointer

if TYPE_CHECKING:
    from trainer.loop import Trainer


class GuardCallback(Callback):
    """Raises InputError when the loss or the gradient norm is not finite, before the optimizer uses
    the gradient."""

    name: ClassVar[str] = "guard"

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer

    def on_gradients(self, t: "Trainer") -> None:
        for name in ("loss", "grad_norm"):
            value = t.record[name]
            if not math.isfinite(value):
                last = self.checkpointer.latest()
                where = f"resumes from {last}" if last else "starts again: no checkpoint exists yet"
                config = t.config
                raise InputError(
                    f"{name} is {value} at step {t.step + 1} (it must be finite); nothing was "
                    f"updated. Run the same command with a lower --lr or --clip (now {config.lr:g} "
                    f"and {config.clip:g}), such as --lr {config.lr / 2:g}: it {where}"
                )
