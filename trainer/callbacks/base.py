"""The interface through which behaviour is added to the training loop."""

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from trainer.loop import Trainer


class Callback:
    """Base class of everything that hooks into `trainer.loop.Trainer`.

    The hooks run in the order of the trainer's list of callbacks, on every rank. A hook that
    communicates must do so on every rank. A callback reads and writes the trainer it is given:

    * `t.step`: completed optimizer steps; during a step its own zero-based number.
    * `t.masks`: `trainer.models.masks.Masks` or None; set in `on_step_start` for every forward of
      the step, or in `on_micro_batch` for the next one.
    * `t.record`: metrics of the step, JSON-able, written to metrics.jsonl as one line.
    * `t.bar_fields`: what the progress bar shows next to the loss, already formatted.
    * `t.context.all_reduce_sum(tensor)`: sums a tensor over ranks in place and returns it.
    """

    name: ClassVar[str]
    """Key of this callback's state in a checkpoint; unique among the callbacks of a trainer."""

    optional_state: ClassVar[bool] = False
    """Whether a run may be resumed with this callback added or left out, its state then starting
    anew or being dropped."""

    def on_train_start(self, t: "Trainer") -> None:
        """Before the first step, after a checkpoint (if any) was restored."""

    def on_step_start(self, t: "Trainer") -> None:
        """Before the batch is drawn."""

    def on_micro_batch(self, t: "Trainer") -> None:
        """Before each forward pass; `t.micro_batch` is its number on this rank."""

    def on_backward(self, t: "Trainer") -> None:
        """After the last backward pass of the step.

        Gradients of the model are complete (summed over micro-batches and ranks). Gradients of
        tensors that a callback owns are local to the rank: the loss is already divided by the
        step's global number of target tokens, so a plain sum over ranks completes them. `t.record`
        holds the step's losses.
        """

    def on_gradients(self, t: "Trainer") -> None:
        """After clipping, before the optimizer changes the model; `t.record` holds `grad_norm`."""

    def on_update(self, t: "Trainer") -> None:
        """After the optimizer changed the model: update what else is trained.

        The step's time and tokens/s include it; `t.step` still is the step's zero-based number.
        """

    def on_step_end(self, t: "Trainer") -> None:
        """After the optimizer step; `t.step` counts it. Not part of the step's time."""

    def on_train_end(self, t: "Trainer") -> None:
        """After the last step, or after a stop that was asked for (`t.stopping`)."""

    def on_exit(self, t: "Trainer") -> None:
        """When the loop is left, also by an exception: release what is held, do not communicate."""

    def state_dict(self) -> dict[str, Any]:
        """State saved in checkpoints: tensors, numbers, strings, lists and dictionaries, equal on
        all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; tensors arrive on the CPU."""
