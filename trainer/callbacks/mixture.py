"""Feeds per-domain training losses to the domain mixture and its weights to the data stream."""

import os
from io import RawIOBase
from pathlib import Path
from typing import Any, ClassVar

from data import weight_history
from data.errors import InputError, failure
from data.files import write_text
from data.log import logger
from data.mixture import FORMER_INTERVAL, Mixture
from data.weight_history import WeightHistory, read_history
from trainer.callbacks.metrics import truncate_after
from trainer.loop import Callback, Trainer

NOTABLE = 1.05
"""Factor by which a weight must have changed since weights were last shown for another message."""
VISIBLE = 1.005
"""The same for a weight that the message names."""
SHOWN = 8
"""Domains in a message."""


class MixtureCallback(Callback):
    """Updates the domain weights every so many steps from the losses of the batches since the last
    update, or from the `history` of another run.

    The losses come from the training batches themselves, so they cost nothing. A restart changes
    nothing: the sums since the last update are part of the state, and the stream restores its own
    weights. Weights that are not fixed are written to OUTPUT/mixture.jsonl, exactly, at each
    update; after a restart lines of steps that the checkpoint does not contain are removed.
    """

    name: ClassVar[str] = "mixture"

    def __init__(
        self, mixture: Mixture, steps: int, output: Path, history: WeightHistory | None = None
    ) -> None:
        assert (history is not None) == (mixture.config.kind == "replay")
        self.mixture = mixture
        self.interval = history.interval if history else mixture.config.steps_between(steps)
        self.history = history
        self.path = output / weight_history.FILE
        self._file: RawIOBase | None = None
        self._shown = mixture.weights
        self._loss_sum: dict[str, float] = {}
        self._count: dict[str, int] = {}
        self._tokens = 0

    def on_train_start(self, trainer: Trainer) -> None:
        self._shown = self.mixture.weights
        config, steps = self.mixture.config, trainer.config.steps
        if config.kind == "dynamic" and config.interval is not None and config.interval >= steps:
            logger.info(
                f"note: --mixture-interval {config.interval} is not below --steps {steps}, so the "
                "domain weights stay as they begin"
            )
        if config.kind != "fixed":
            main = trainer.context.is_main
            trainer.context.raise_on_any_rank(lambda: self._open(trainer) if main else None)

    def _open(self, trainer: Trainer) -> None:
        """Opens the file where it is this run's from its beginning."""
        try:
            if trainer.step == 0:
                order = trainer.stream.order() | {
                    "seq_len": trainer.config.seq_len,
                    "global_batch": trainer.config.global_batch,
                }
                first = trainer.stream.sampler.weights
                write_text(self.path, weight_history.header(order, self.interval, first))
            elif not self._continue_file(trainer.step):
                return
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"{self.path}: {failure(error)}") from None

    def on_step_end(self, trainer: Trainer) -> None:
        for domain, count in trainer.domain_tokens.items():
            self._loss_sum[domain] = (
                self._loss_sum.get(domain, 0.0) + trainer.domain_loss_sum[domain]
            )
            self._count[domain] = self._count.get(domain, 0) + count
        self._tokens += trainer.config.global_batch * trainer.config.seq_len
        if trainer.step % self.interval == 0:
            self._update(trainer)
            self._loss_sum, self._count, self._tokens = {}, {}, 0
        trainer.record["domain_weights"] = dict(self.mixture.weights)

    def on_exit(self, trainer: Trainer) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def state_dict(self) -> dict[str, Any]:
        if self._file is not None:
            # A checkpoint relies on the lines of the steps before it.
            os.fsync(self._file.fileno())
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
        if not self.mixture.on_grid and self.mixture.config.interval is None:
            self.interval = FORMER_INTERVAL

    def _update(self, trainer: Trainer) -> None:
        if self.history is None:
            weights = self.mixture.update(self._loss_sum, self._count, self._tokens)
        else:
            # The last update of a run decides about no sample, and may be beyond the history.
            weights = self.history.weights.get(trainer.step, self.mixture.weights)
            self.mixture.replay(weights)
        trainer.stream.set_weights(weights)
        self._show(trainer.step)
        if self.mixture.config.kind != "fixed":
            trainer.context.raise_on_any_rank(lambda: self._write(trainer))

    def _write(self, trainer: Trainer) -> None:
        """Appends the weights after this step, on the rank that has the file open."""
        if self._file is None:
            return
        line = weight_history.line(trainer.step, trainer.stream.sampler.weights).encode()
        try:
            while line:
                line = line[self._file.write(line) or 0 :]
        except OSError as error:
            raise InputError(
                f"{self.path}: {failure(error)}; then run the same command again: it goes on from "
                "the last checkpoint"
            ) from None

    def _show(self, step: int) -> None:
        """Says which weights have changed notably since they were last shown."""
        weights = self.mixture.weights
        change = {
            domain: max(weight / before, before / weight)
            for domain, weight in weights.items()
            if weight > 0 and (before := self._shown[domain]) > 0
        }
        if max(change.values(), default=1.0) < NOTABLE:
            return
        changed = sorted((d for d in change if change[d] > VISIBLE), key=lambda d: -change[d])
        texts = [f"{d} {self._shown[d]:.3g} -> {weights[d]:.3g}" for d in changed[:SHOWN]]
        if len(changed) > SHOWN:
            texts.append(f"and {len(changed) - SHOWN} more")
        logger.info(f"step {step}: domain weights  {', '.join(texts)}")
        self._shown = weights

    def _continue_file(self, step: int) -> bool:
        """Removes what comes after `step`; False where the file does not begin this run's."""
        truncate_after(self.path, step)
        try:
            known = read_history(self.path)
            missing = set(range(0, step + 1, self.interval)) - known.weights.keys()
            problem = f"it lacks step {min(missing)}" if missing else None
        except InputError as error:
            known, problem = None, str(error) if self.path.exists() else "it is missing"
        if problem:
            logger.warning(
                f"{self.path} does not hold all domain weights of this run so far ({problem}); "
                "the run goes on as it would, but --mixture replay cannot repeat it"
            )
        return known is not None
