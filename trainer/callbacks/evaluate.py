"""Held-out evaluation per domain during training."""

from typing import Any, ClassVar

from data.reader import TokenReader
from trainer.evaluate import DomainLoss, evaluate, report
from trainer.loop import Callback, Trainer
from trainer.models.decoder import CausalLM
from trainer.models.masks import Masks


class EvaluateCallback(Callback):
    """Puts `held_out` ({domain: {loss, perplexity, tokens}}) into the record every `interval` steps
    and after the last.

    `results` holds the newest evaluation. `sequences` per domain; `interval` 0 evaluates after the
    last step only.
    """

    name: ClassVar[str] = "evaluate"
    optional_state: ClassVar[bool] = True

    def __init__(self, reader: TokenReader, *, interval: int, sequences: int) -> None:
        self.reader = reader
        self.interval = interval
        self.sequences = sequences
        self.results: dict[str, DomainLoss] = {}
        self._step = -1

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step == trainer.config.steps or (
            self.interval and trainer.step % self.interval == 0
        ):
            self._evaluate(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        if self._step != trainer.step and not trainer.stopping:
            self._evaluate(trainer)

    def measure(self, trainer: Trainer, model: CausalLM, masks: Masks | None = None) -> None:
        """Makes `results` those of `model`; collective."""
        self.results = evaluate(
            model,
            self.reader,
            self.reader.domains,
            self.sequences,
            trainer.config.micro_batch,
            trainer.context,
            masks,
        )

    def _evaluate(self, trainer: Trainer) -> None:
        self.measure(trainer, trainer.model, trainer.masks)
        self._step = trainer.step
        trainer.record["held_out"] = report(self.results)

    def state_dict(self) -> dict[str, Any]:
        losses = {name: [d.loss, d.tokens] for name, d in self.results.items()}
        return {"step": self._step, "results": losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self.results = {name: DomainLoss(*values) for name, values in state["results"].items()}
