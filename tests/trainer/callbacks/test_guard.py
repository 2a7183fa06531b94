"""What is not finite stops the run, and the way back that is named leads somewhere."""

import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from data.errors import InputError
from tests.trainer.callbacks.test_callbacks import Breaker
from tests.trainer.tiny import make_trainer, options, weights
from trainer.checkpoint import Checkpointer
from trainer.loop import Callback, Trainer


class Exploder(Callback):
    """Makes a weight too large, for the forward pass or altogether, after a step."""

    name: ClassVar[str] = "exploder"

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def after_optimizer_step(self, trainer: Trainer) -> None:
        if trainer.step + 1 == self.step:
            with torch.no_grad():
                next(iter(trainer.model.parameters())).fill_(self.value)


def names(place: Path) -> list[str]:
    return sorted(path.name for path in (place / "checkpoints").iterdir())


def test_broken_at_the_start_is_not_the_learning_rate(workspace: Path, tmp_path: Path) -> None:
    trainer = make_trainer(workspace, tmp_path, callbacks=[Breaker(0)])
    with pytest.raises(InputError, match=r"loss is nan at step 1 .*weights are damaged") as caught:
        trainer.fit()
    assert "--lr" not in str(caught.value)


def test_infinite_weights_are_never_committed(workspace: Path, tmp_path: Path) -> None:
    exploder = Exploder(4, math.inf)
    trainer = make_trainer(workspace, tmp_path, options(save_interval=2), callbacks=[exploder])
    pattern = r"not finite after step 4: they are not saved\. .*--lr 0\.005.*from .*step-00000002$"
    with pytest.raises(InputError, match=pattern):
        trainer.fit()
    assert names(tmp_path) == ["step-00000002"]


def test_infinite_moments_are_never_committed(workspace: Path, tmp_path: Path) -> None:
    trainer = make_trainer(workspace, tmp_path, options(steps=2))
    trainer._call("on_train_start")
    trainer.train_step()
    state = next(iter(trainer.optimizer.state.values()))
    state["exp_avg_sq"].fill_(math.inf)
    with pytest.raises(InputError, match="the optimizer's moments are not finite after step 1"):
        Checkpointer(tmp_path / "new", trainer.context).save(trainer)
    trainer._call("on_exit")


@pytest.mark.parametrize("keep", [1, 2])
def test_the_way_back_leads_to_a_sound_checkpoint(
    keep: int, workspace: Path, tmp_path: Path
) -> None:
    """Weights that are finite, saved, and give a loss that is not."""
    config = options(save_interval=1, keep_checkpoints=keep)
    trainer = make_trainer(workspace, tmp_path, config, callbacks=[Exploder(6, 1e38)])
    bad, good = "step-00000006", "step-00000005"
    pattern = rf"already in the checkpoint .*{bad}: delete that folder .* resumes from .*{good}"
    with pytest.raises(InputError, match=pattern):
        trainer.fit()
    assert names(tmp_path) == [good, bad]
    # The same command alone ends in the same words, and removes nothing.
    with pytest.raises(InputError, match=pattern):
        make_trainer(workspace, tmp_path, config, callbacks=[Exploder(0, 0)]).fit()
    assert names(tmp_path) == [good, bad]
    for file in (tmp_path / "checkpoints" / bad).iterdir():
        file.unlink()
    (tmp_path / "checkpoints" / bad).rmdir()
    again = make_trainer(workspace, tmp_path, config, callbacks=[Exploder(0, 0)])
    assert again.step == 5
    again.fit()
    assert all(value.isfinite().all() for value in weights(again).values())


def test_one_checkpoint_is_kept_once_the_next_step_was_finite(
    workspace: Path, tmp_path: Path
) -> None:
    seen: dict[int, list[str]] = {}

    class Look(Callback):
        name: ClassVar[str] = "look"

        def on_step_start(self, trainer: Trainer) -> None:
            seen[trainer.step] = names(tmp_path) if trainer.step > 1 else []

    config = options(steps=6, save_interval=2, keep_checkpoints=1)
    make_trainer(workspace, tmp_path, config, callbacks=[Look()]).fit()
    assert seen[4] == ["step-00000002", "step-00000004"] and seen[5] == ["step-00000004"]


def test_only_a_broken_checkpoint_is_left(workspace: Path, tmp_path: Path) -> None:
    config = options(save_interval=1)
    trainer = make_trainer(workspace, tmp_path, config, callbacks=[Exploder(1, 1e38)])
    with pytest.raises(InputError, match=r"already in the only checkpoint.*another --output"):
        trainer.fit()
