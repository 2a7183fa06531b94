"""Checkpoints at intervals, at the end, on errors, and when the process is asked to stop."""

import signal
import time
from types import FrameType
from typing import Any, ClassVar

from data.errors import InputError
from data.log import logger
from trainer.checkpoint import Checkpointer
from trainer.loop import Callback, Trainer
from trainer.stopping import SECONDS_OF_ONE_REQUEST, STOP_SIGNALS


class CheckpointCallback(Callback):
    """Saves every `interval` steps (0: never in between), after the last and when told to stop;
    also once when the loop is left by an error that costs no finished step.

    One of STOP_SIGNALS to any rank, or a failure of one rank alone (`trainer.failure`), stops all
    of them after the current step; a second signal some seconds later acts at once. It must be the
    last callback, so that the others' state is complete when it saves.
    """

    name: ClassVar[str] = "checkpoint"

    def __init__(self, checkpointer: Checkpointer, interval: int) -> None:
        self.checkpointer = checkpointer
        self.interval = interval
        self._received_at: float | None = None
        self._previous: dict[int, Any] = {}
        self._saved = 0
        """The step that needs no saving: done, or tried in vain."""

    def on_train_start(self, trainer: Trainer) -> None:
        self._saved = trainer.step
        self.checkpointer.begin()
        if trainer.step < trainer.config.steps:
            nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            heeded = [s for s in STOP_SIGNALS if s != signal.SIGHUP or not nohup]
            self._previous = {s: signal.signal(s, self._on_signal) for s in heeded}

    def on_step_end(self, trainer: Trainer) -> None:
        asked = self._received_at is not None or trainer.failure is not None
        stop = trainer.context.any(asked)
        finished = trainer.step == trainer.config.steps
        if stop or finished or (self.interval and trainer.step % self.interval == 0):
            self._saved = trainer.step
            path = self.checkpointer.save(trainer)
            if stop and trainer.context.is_main:
                logger.info(f"stopped: saved {path}; run the same command again to resume")
        trainer.stopping = trainer.stopping or stop
        if finished and not stop:
            # What follows needs no saving, so a signal may end it.
            self._restore_handlers()

    def on_error(self, trainer: Trainer) -> None:
        if self._saved == trainer.step:
            return
        try:
            path = self.checkpointer.save(trainer)
        except InputError as error:
            logger.warning(f"step {trainer.step} could not be saved: {error}")
        else:
            logger.info(f"saved {path} before the error that follows")

    def on_exit(self, trainer: Trainer) -> None:
        self._restore_handlers()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received_at is None:
            self._received_at = time.monotonic()
        elif time.monotonic() - self._received_at > SECONDS_OF_ONE_REQUEST:
            self._restore_handlers()
            signal.raise_signal(number)

    def _restore_handlers(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
