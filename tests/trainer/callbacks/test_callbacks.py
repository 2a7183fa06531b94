"""The standard callbacks on a tiny run."""

import json
import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from data.errors import InputError
from data.mixture import Mixture, MixtureConfig
from data.reader import TokenReader
from tests.trainer.tiny import losses, make_trainer, options, weights
from trainer.callbacks.evaluate import EvaluateCallback
from trainer.callbacks.metrics import MetricsCallback, truncate_after
from trainer.callbacks.mixture import MixtureCallback
from trainer.evaluate import evaluate
from trainer.loop import Callback, Trainer


class Breaker(Callback):
    """Makes one weight NaN before a step."""

    name: ClassVar[str] = "breaker"

    def __init__(self, step: int) -> None:
        self.step = step
        self.before: dict[str, torch.Tensor] = {}

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            with torch.no_grad():
                next(iter(trainer.model.parameters())).fill_(math.nan)
            self.before = weights(trainer)


def test_guard_stops_before_the_optimizer(workspace: Path, tmp_path: Path) -> None:
    breaker = Breaker(5)
    trainer = make_trainer(workspace, tmp_path, options(save_interval=4), callbacks=[breaker])
    with pytest.raises(InputError, match=r"loss is nan at step 6 .*--lr 0\.005.*step-00000004"):
        trainer.fit()
    after = weights(trainer)
    for name, value in breaker.before.items():
        assert torch.equal(value, after[name]) or value.isnan().any()
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert names == ["step-00000004"]
    assert len(losses(tmp_path)) == 5
    make_trainer(workspace, tmp_path, options(lr=0.005), callbacks=[Breaker(-1)]).fit()
    assert len(losses(tmp_path)) == 20


def test_metrics_have_what_a_reader_needs(workspace: Path, tmp_path: Path) -> None:
    make_trainer(workspace, tmp_path, options(steps=4, eval_interval=2)).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for step, line in enumerate(lines, start=1):
        assert line["step"] == step and line["tokens"] == step * 8 * 16
        assert {"loss", "lr", "grad_norm", "tokens_per_second"} <= line.keys()
        assert set(line["domain_loss"]) <= {"alpha", "beta"}
        assert sum(line["domain_weights"].values()) == pytest.approx(1)
        assert ("held_out" in line) == (step % 2 == 0)
        assert "mfu_full" not in line
    assert set(lines[-1]["held_out"]["alpha"]) == {"loss", "perplexity", "tokens"}


def test_log_interval_keeps_the_last_step(workspace: Path, tmp_path: Path) -> None:
    make_trainer(workspace, tmp_path, options(steps=7, log_interval=3)).fit()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6, 7]


def test_lines_after_the_checkpoint_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    truncate_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    truncate_after(tmp_path / "absent", 2)


def test_tensorboard(workspace: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trainer = make_trainer(workspace, tmp_path, options(steps=2))
    trainer.callbacks.insert(-1, BoardCallback(tmp_path / "board"))
    trainer.fit()
    assert list((tmp_path / "board" / "tensorboard").glob("events*"))


class BoardCallback(MetricsCallback):
    name: ClassVar[str] = "board"


def test_held_out_losses_are_those_of_evaluate(workspace: Path, tmp_path: Path) -> None:
    trainer = make_trainer(workspace, tmp_path, options(steps=3))
    trainer.fit()
    (callback,) = (c for c in trainer.callbacks if isinstance(c, EvaluateCallback))
    reader = TokenReader(workspace / "tokens", 16, split="held_out")
    again = evaluate(trainer.model, reader, reader.domains, 4, 3, trainer.context)
    for domain, result in again.items():
        assert callback.results[domain].loss == pytest.approx(result.loss, abs=1e-6)


def test_a_finished_run_keeps_its_evaluation(workspace: Path, tmp_path: Path) -> None:
    trainer = make_trainer(workspace, tmp_path, options(steps=3))
    trainer.fit()
    resumed = make_trainer(workspace, tmp_path, options(steps=3))
    (first,) = (c for c in trainer.callbacks if isinstance(c, EvaluateCallback))
    (second,) = (c for c in resumed.callbacks if isinstance(c, EvaluateCallback))
    assert second.results == first.results
    resumed.fit()
    assert resumed.step == 3 and len(losses(tmp_path)) == 3


def test_mixture_updates_at_its_interval(workspace: Path, tmp_path: Path) -> None:
    make_trainer(workspace, tmp_path, options(steps=7)).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    alpha = [line["domain_weights"]["alpha"] for line in lines]
    assert alpha[:2] == [0.5, 0.5]
    assert alpha[2] == alpha[3] == alpha[4] > 0.5
    assert alpha[5] == alpha[6] > alpha[4]


def test_mixture_sees_the_losses_of_the_interval(workspace: Path, tmp_path: Path) -> None:
    """The weights follow exactly from the logged losses and token counts."""
    seen: list[tuple[dict[str, float], dict[str, int]]] = []

    class Spy(Callback):
        name: ClassVar[str] = "spy"

        def on_step_end(self, trainer: Trainer) -> None:
            seen.append((trainer.domain_loss_sum, trainer.domain_tokens))

    trainer = make_trainer(workspace, tmp_path, options(steps=3), callbacks=[Spy()])
    trainer.fit()
    mixture = Mixture(
        MixtureConfig(interval=3, strength=1.0),
        {"alpha": 1, "beta": 1},
        {"alpha": 2.0, "beta": 5.0},
        3 * 8 * 16,
    )
    names = ("alpha", "beta")
    sums = {name: sum(step[0][name] for step in seen) for name in names}
    counts = {name: sum(step[1][name] for step in seen) for name in names}
    expected = mixture.update(sums, counts, 3 * 8 * 16)
    (callback,) = (c for c in trainer.callbacks if isinstance(c, MixtureCallback))
    assert callback.mixture.weights == pytest.approx(expected)
    assert trainer.stream.sampler.weights == pytest.approx(expected, abs=1e-6)


def test_callback_names_are_unique(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="breaker"):
        make_trainer(workspace, tmp_path, callbacks=[Breaker(1), Breaker(2)])
