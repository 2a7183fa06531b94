"""The progress display of a training run."""

from typing import TYPE_CHECKING, ClassVar

from data.progress import Progress
from trainer.callbacks.base import Callback

if TYPE_CHECKING:
    from trainer.loop import Trainer


class ProgressCallback(Callback):
    """A bar on a terminal, a line every few seconds elsewhere: loss, learning rate, speed, time
    left."""

    name: ClassVar[str] = "progress"

    def __init__(self, description: str) -> None:
        self.description = description
        self._bar: Progress | None = None

    def on_train_start(self, t: "Trainer") -> None:
        self._bar = Progress(
            self.description,
            total=t.config.steps,
            unit="step",
            completed=t.step,
            enabled=t.context.is_main,
        )

    def on_step_end(self, t: "Trainer") -> None:
        assert self._bar is not None
        fields = {
            "loss": f"{t.loss:.3f}",
            "lr": f"{t.record['lr']:.2e}",
            "tok/s": f"{t.record['tokens_per_second']:,.0f}",
        }
        fields |= {key: f"{100 * value:.1f}%" for key, value in t.throughput.mfu().items()}
        self._bar.update(1, **(fields | t.bar_fields))
        held_out = t.record.get("held_out")
        if held_out:
            losses = "  ".join(f"{name} {values['loss']:.3f}" for name, values in held_out.items())
            self._bar.message(f"step {t.step}: held-out loss  {losses}")

    def on_exit(self, t: "Trainer") -> None:
        if self._bar is not None:
            self._bar.close()
