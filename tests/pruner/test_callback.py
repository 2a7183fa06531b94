"""Masks in training: they meet the target, on any number of ranks and over a resume."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.batches import Batch
from data.errors import InputError
from pruner.callback import ShearCallback
from pruner.config import MaskConfig, resolve_masks
from pruner.scores import initial_scores, make_rule
from pruner.shapes import Shape, shape_of
from pruner.units import indicator, polarised, to_masks, unit_kinds
from tests.distributed import run_ranks
from tests.trainer.tiny import SHAPE
from trainer import parallel
from trainer.checkpoint import Checkpointer
from trainer.config import TrainConfig
from trainer.loop import Trainer
from trainer.models.decoder import CausalLM
from trainer.models.hf import init_weights
from trainer.optimizer import build_optimizer
from trainer.run import build_model
from trainer.saving import full_tensors
from trainer.throughput import Throughput

MODEL = dataclasses.replace(SHAPE, vocab_size=61, num_layers=3)
MASK_OPTIONS = {field.name for field in dataclasses.fields(MaskConfig)}
TARGET = Shape(layers=2, hidden=10, heads=2, kv_heads=2, head_dim=4, ffn=9)


class RandomStream:
    """Rows of random ids that depend on the step alone."""

    domains = ("a", "b")

    def __init__(self, config: TrainConfig, rank: int, world: int) -> None:
        self.config, self.rank, self.world, self.step = config, rank, world, 0

    def next(self) -> Batch:
        rows = self.config.global_batch
        ids = np.random.default_rng(self.step).integers(0, 61, (rows, self.config.seq_len))
        own = slice(self.rank * rows // self.world, (self.rank + 1) * rows // self.world)
        self.step += 1
        return Batch(ids=ids[own], domains=np.arange(rows)[own] % 2, step=self.step - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def make_trainer(**options: Any) -> tuple[Trainer, ShearCallback]:
    of_masks = {name: options.pop(name) for name in MASK_OPTIONS & options.keys()}
    masks = resolve_masks(MaskConfig(**({"init": "flat"} | of_masks)))
    fields = {"steps": 8, "seq_len": 8, "global_batch": 8, "micro_batch": 2, "lr": 1e-3}
    config = TrainConfig(**(fields | {"precision": "fp32"} | options))
    context = parallel.init(threads=1, replicas=config.replicas)
    model = build_model(MODEL, config, context, load=lambda m: init_weights(m, std=0.3))
    source = shape_of(MODEL)
    kinds = unit_kinds(TARGET, source)
    scores = initial_scores(kinds, masks, None, 3, context.device)
    callback = ShearCallback(make_rule(kinds, scores, masks, config.steps, seed=3), source)
    trainer = Trainer(
        model=model,
        optimizer=build_optimizer(model, config),
        stream=RandomStream(config, context.rank, context.world),  # type: ignore[arg-type]
        config=config,
        context=context,
        throughput=Throughput(MODEL, seq_len=8, device=context.device, world=context.world),
        callbacks=[callback],
    )
    return trainer, callback


def trained_scores(options: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The scores after each step."""
    trainer, callback = make_trainer(**options)
    history = []
    while trainer.step < trainer.config.steps:
        trainer.train_step()
        scores = callback.rule.scores
        history.append({name: values.detach().clone() for name, values in scores.items()})
    return history


def test_masks_meet_the_target_at_the_end() -> None:
    trainer, callback = make_trainer()
    before = {name: scores.detach().clone() for name, scores in callback.rule.scores.items()}
    records = []
    while trainer.step < 8:
        trainer.train_step()
        records.append(trainer.record)
    for name, scores in callback.rule.scores.items():
        assert not torch.equal(scores, before[name]), name
    final = callback.rule.final()
    assert polarised(final, callback.rule.kinds)
    assert trainer.masks is not None and trainer.masks.hidden is not None
    assert torch.equal(trainer.masks.hidden, final["hidden"][0])
    assert not trainer.masks.hidden.requires_grad
    last = records[-1]
    assert (last["alive_hidden"], last["alive_layer"], last["alive_intermediate"]) == (10, 2, 9)
    assert last["alive_query_head_min"] == last["alive_query_head_max"] == 1
    assert last["target_hidden"] == 10 and last["temperature"] == pytest.approx(0.02)
    assert records[0]["target_hidden"] > 10 and np.isfinite(records[0]["lambda"])
    assert trainer.bar_fields["ffn"] == "9/9" and trainer.bar_fields["layers"] == "2/2"


def test_scores_follow_the_gradient_of_the_loss() -> None:
    """One step with plain autograd through the same masks gives the same scores."""
    trainer, callback = make_trainer(micro_batch=8)
    reference = copy.deepcopy(callback.rule)
    weights = {name: tensor.clone() for name, tensor in full_tensors(trainer.model)}
    trainer.train_step()

    model = CausalLM(MODEL)
    model.load_state_dict(weights)
    ids = torch.from_numpy(RandomStream(trainer.config, 0, 1).next().ids)
    logits = model(ids, masks=to_masks(reference.masks(0), shape_of(MODEL)))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    names = list(reference.scores)
    gradients = torch.autograd.grad(loss, [reference.scores[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        found = callback.rule.scores[name].grad
        assert found is not None
        norm = gradient.norm()
        expected = gradient * min(1.0, 1.0 / (norm.item() + 1e-6))
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6), name


def test_ranks_and_accumulation_do_not_change_the_masks() -> None:
    (expected,) = run_ranks(trained_scores, 1, {"micro_batch": 8})
    cases: list[tuple[int, dict[str, Any]]] = [
        (1, {"micro_batch": 2}),
        (2, {"micro_batch": 2}),
        (4, {"micro_batch": 1}),
    ]
    for world, options in cases:
        found = run_ranks(trained_scores, world, options)
        for step, scores in enumerate(expected):
            # Rounding of the sums grows with the steps, because Adam divides by small gradients.
            limit = 1e-6 if step < 3 else 5e-5
            for name, values in scores.items():
                assert all(torch.equal(rank[step][name], found[0][step][name]) for rank in found)
                difference = (found[0][step][name] - values).abs().max().item()
                assert difference < limit, (world, step, name, difference)
        for name, kind in unit_kinds(TARGET, shape_of(MODEL)).items():
            kept = indicator(expected[-1][name], kind.target)
            assert torch.equal(indicator(found[0][-1][name], kind.target), kept)


@pytest.mark.parametrize("rule", ["projection", "sheared-llama"])
@pytest.mark.parametrize("stop", [4, 7])
def test_resume_is_bit_identical(rule: str, stop: int, tmp_path: Path) -> None:
    straight, expected = make_trainer(rule=rule)
    straight.fit()
    stopped, _ = make_trainer(rule=rule)
    for _ in range(stop):
        stopped.train_step()
    path = Checkpointer(tmp_path, stopped.context).save(stopped)
    resumed, found = make_trainer(rule=rule)
    Checkpointer(tmp_path, resumed.context).restore(resumed, path)
    assert resumed.step == stop
    resumed.fit()
    assert resumed.loss == straight.loss
    state, other = expected.state_dict(), found.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    ours = dict(resumed.model.named_parameters())
    for name, parameter in straight.model.named_parameters():
        assert torch.equal(parallel.to_local(parameter), parallel.to_local(ours[name])), name


def test_a_run_restored_after_its_last_step_has_its_final_masks(tmp_path: Path) -> None:
    trainer, callback = make_trainer()
    trainer.fit()
    path = Checkpointer(tmp_path, trainer.context).save(trainer)
    again, _ = make_trainer()
    Checkpointer(tmp_path, again.context).restore(again, path)
    again.fit()
    assert again.masks is not None and again.masks.hidden is not None
    assert torch.equal(again.masks.hidden, callback.rule.final()["hidden"][0])


def test_scores_stay_when_the_gradient_is_not_finite() -> None:
    class Stop(Exception):
        pass

    trainer, callback = make_trainer()
    before = {key: value.clone() for key, value in callback.state_dict().items()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parallel.to_local(parameter).fill_(float("nan"))

    def refuse(trainer: Trainer) -> None:
        raise Stop

    trainer.callbacks.append(type("Guard", (), {"__getattr__": lambda *_: lambda _: None})())
    trainer.callbacks[-1].before_optimizer_step = refuse  # type: ignore[method-assign]
    with pytest.raises(Stop):
        trainer.train_step()
    after = callback.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_row_whose_gradient_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, callback = make_trainer()
    trainer.train_step()
    backward = callback.rule.backward

    def poisoned(outputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        between = torch.nonzero((outputs[0] > 0.1) & (outputs[0] < 0.9)).flatten()
        gradients[0][between[0]] = float("nan")
        return backward(outputs, gradients)

    monkeypatch.setattr(callback.rule, "backward", poisoned)
    before = {key: value.clone() for key, value in callback.state_dict().items()}
    with pytest.raises(
        InputError,
        match=r"of hidden row 0 are not finite at step 2.*--lr \(now .*the last checkpoint, if one "
        r"was saved.*--mask-lr \(now 0\.05\).*another --output",
    ):
        trainer.train_step()
    after = callback.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
