"""Held-out evaluation per domain during training."""

from typing import TYPE_CHECKING, Any, ClassVar

from data.reader import TokenReader
from trainer.callbacks.base import Callback
from trainer.evaluate import DomainLoss, evaluate, report

if TYPE_CHECKING:
    from trainer.loop import Trainer


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

    def on_step_end(self, t: "Trainer") -> None:
        if t.step == t.config.steps or (self.interval and t.step % self.interval == 0):
            self._evaluate(t)

    def on_train_end(self, t: "Trainer") -> None:
        if self._step != t.step and not t.stopping:
            self._evaluate(t)

    def _evaluate(self, t: "Trainer") -> None:
        self.results = evaluate(
            t.model,
            self.reader,
            self.reader.domains,
            self.sequences,
            t.config.micro_batch,
            t.context,
            t.masks,
        )
        self._step = t.step
        t.record["held_out"] = report(self.results)

    def state_dict(self) -> dict[str, Any]:
        losses = {name: [d.loss, d.tokens] for name, d in self.results.items()}
        return {"step": self._step, "results": losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self.results = {name: DomainLoss(*values) for name, values in state["results"].items()}
