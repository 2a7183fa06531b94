"""The progress display of a training run."""

from typing import ClassVar

from data.progress import Progress
from trainer.loop import Callback, Trainer


class ProgressCallback(Callback):
    """A bar on a terminal, a line every few seconds elsewhere: loss, learning rate, speed, time
    left."""

    name: ClassVar[str] = "progress"
    alone: ClassVar[bool] = True

    def __init__(self, description: str) -> None:
        self.description = description
        self._bar: Progress | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        self._bar = Progress(
            self.description,
            total=trainer.config.steps,
            unit="step",
            completed=trainer.step,
            heeds_reader=True,
        )

    def on_step_end(self, trainer: Trainer) -> None:
        assert self._bar is not None
        fields = {
            "loss": f"{trainer.loss:.3f}",
            "lr": f"{trainer.record['lr']:.2e}",
            "tok/s": f"{trainer.record['tokens_per_second']:,.0f}",
        }
        fields |= {key: f"{100 * value:.1f}%" for key, value in trainer.throughput.mfu().items()}
        self._bar.update(1, **(fields | trainer.bar_fields))
        held_out = trainer.record.get("held_out")
        if held_out:
            losses = "  ".join(f"{name} {values['loss']:.3f}" for name, values in held_out.items())
            self._bar.message(f"step {trainer.step}: held-out loss  {losses}")

    def on_exit(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()
