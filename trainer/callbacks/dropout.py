"""Tells the adapters' dropout where in training a forward pass is."""

from typing import ClassVar

from trainer.loop import Callback, Trainer
from trainer.models.lora import Dropout


class DropoutCallback(Callback):
    """Turns a `Dropout` on for the passes of a step, and off for everything else."""

    name: ClassVar[str] = "dropout"

    def __init__(self, dropout: Dropout) -> None:
        self.dropout = dropout

    def on_micro_batch(self, trainer: Trainer) -> None:
        # Rank r of W has the r-th W-th of the global batch (data.batches).
        own = trainer.config.global_batch // trainer.context.world
        first = trainer.context.rank * own + trainer.micro_batch * trainer.config.micro_batch
        self.dropout.place = trainer.step, first

    def after_backward(self, trainer: Trainer) -> None:
        self.dropout.place = None
