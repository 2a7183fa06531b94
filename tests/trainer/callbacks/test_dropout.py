"""Dropout of adapters is told every pass of a step, and nothing else."""

from pathlib import Path
from typing import ClassVar

from tests.distributed import run_ranks
from tests.trainer.tiny import make_trainer, options
from trainer.callbacks.dropout import DropoutCallback
from trainer.loop import Callback, Trainer
from trainer.models.lora import Dropout


class Recorder(Callback):
    """Notes where dropout believes to be, at every hook behind it."""

    name: ClassVar[str] = "recorder"

    def __init__(self, dropout: Dropout) -> None:
        self.dropout = dropout
        self.passes: list[tuple[int, int] | None] = []
        self.rest: set[tuple[int, int] | None] = set()

    def on_micro_batch(self, trainer: Trainer) -> None:
        self.passes.append(self.dropout.place)

    def after_backward(self, trainer: Trainer) -> None:
        self.rest.add(self.dropout.place)

    def on_step_end(self, trainer: Trainer) -> None:
        self.rest.add(self.dropout.place)


def places(workspace: Path, output: Path, micro_batch: int) -> list[tuple[int, int] | None]:
    dropout = Dropout(0.5, seed=0)
    recorder = Recorder(dropout)
    config = options(steps=2, micro_batch=micro_batch)
    trainer = make_trainer(
        workspace, output, config, callbacks=[DropoutCallback(dropout), recorder]
    )
    trainer.fit()
    assert recorder.rest == {None} and dropout.place is None
    return recorder.passes


def test_each_pass_knows_its_step_and_first_sequence(workspace: Path, tmp_path: Path) -> None:
    assert places(workspace, tmp_path, 4) == [(0, 0), (0, 4), (1, 0), (1, 4)]


def test_ranks_have_the_sequences_of_their_share(workspace: Path, tmp_path: Path) -> None:
    found = run_ranks(places, 2, workspace, tmp_path, 2)
    assert found == [
        [(0, 0), (0, 2), (1, 0), (1, 2)],
        [(0, 4), (0, 6), (1, 4), (1, 6)],
    ]
