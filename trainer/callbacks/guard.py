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
                kept = (
                    f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
                )
                raise InputError(
                    f"{name} is {value} at step {t.step + 1} (it must be finite); nothing was "
                    f"updated, {kept}. Lower --lr or --clip, or look at the data "
                    "of this step, and start again"
                )
