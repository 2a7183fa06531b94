"""Feeds per-domain training losses to the domain mixture and its weights to the data stream."""

from typing import Any, ClassVar

from data.mixture import Mixture
from trainer.loop import Callback, Trainer


class MixtureCallback(Callback):
    """Updates the domain weights every `interval` steps from the losses of the batches since the
    last update.

    The losses come from the training batches themselves, so they cost nothing. A restart changes
    nothing: the sums since the last update are part of the state, and the stream restores its own
    weights.
    """

    name: ClassVar[str] = "mixture"

    def __init__(self, mixture: Mixture, interval: int) -> None:
        self.mixture = mixture
        self.interval = interval
        self._loss_sum: dict[str, float] = {}
        self._count: dict[str, int] = {}
        self._tokens = 0

    def on_step_end(self, trainer: Trainer) -> None:
        for domain, count in trainer.domain_tokens.items():
            self._loss_sum[domain] = (
                self._loss_sum.get(domain, 0.0) + trainer.domain_loss_sum[domain]
            )
            self._count[domain] = self._count.get(domain, 0) + count
        self._tokens += trainer.config.global_batch * trainer.config.seq_len
        if trainer.step % self.interval == 0:
            weights = self.mixture.update(self._loss_sum, self._count, self._tokens)
            trainer.stream.set_weights(weights)
            self._loss_sum, self._count, self._tokens = {}, {}, 0
        trainer.record["domain_weights"] = dict(self.mixture.weights)

    def state_dict(self) -> dict[str, Any]:
        return {
            "mixture": self.mixture.state_dict(),
            "loss_sum": dict(self._loss_sum),
            "count": dict(self._count),
            "tokens": self._tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixture.load_state_dict(state["mixture"])
        self._loss_sum, self._count = dict(state["loss_sum"]), dict(state["count"])
        self._tokens = state["tokens"]
