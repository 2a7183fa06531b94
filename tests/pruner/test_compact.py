"""Training on the nonzero units only is training on the dense masked model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pruner import callback as shear
from pruner.shapes import shape_of
from tests.distributed import run_ranks
from tests.pruner.test_callback import MODEL, make_trainer
from trainer.models.masks import Masks
from trainer.saving import full_tensors


@pytest.fixture(autouse=True)
def small_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's sizes would all be padded to the whole otherwise."""
    monkeypatch.setitem(shear.PADDING, "cpu", 2)


def trained(options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights, scores and losses after the run."""
    trainer, callback = make_trainer(**options)
    losses = []
    while trainer.step < trainer.config.steps:
        trainer.train_step()
        losses.append(trainer.loss)
    scores = {name: s.detach().clone() for name, s in callback.rule.scores.items()}
    return {name: w.clone() for name, w in full_tensors(trainer.model)}, scores, losses


def assert_same(found: Any, expected: Any, limit: float) -> None:
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        for name, value in theirs.items():
            assert (ours[name] - value).abs().max().item() < limit, name
    assert found[2] == pytest.approx(expected[2], rel=1e-5)


def test_the_forward_pass_shrinks() -> None:
    trainer, _ = make_trainer()
    shapes = []
    hook = trainer.model.get_submodule("model.norm").register_forward_pre_hook(
        lambda _, inputs: shapes.append(inputs[0].shape[-1])
    )
    trainer.fit()
    hook.remove()
    assert shapes[0] == 16 and shapes[-1] == 10
    assert trainer.masks is not None and trainer.masks.computed is not None
    units = trainer.masks.computed.layers
    assert sum(layer.skipped for layer in units) == 1
    kept = next(layer for layer in units if not layer.skipped)
    assert kept.channels is not None and len(kept.channels) == 10
    assert kept.queries is not None and len(kept.queries) == 2 * MODEL.head_dim


@pytest.mark.parametrize("micro_batch", [8, 2])
@pytest.mark.parametrize(
    ("checkpointing", "optimizer"), [(False, "adamw"), (True, "adamw"), (False, "muon")]
)
def test_compact_training_equals_dense_training(
    micro_batch: int, checkpointing: bool, optimizer: str
) -> None:
    options = {
        "micro_batch": micro_batch,
        "activation_checkpointing": checkpointing,
        "optimizer": optimizer,
    }
    compact = trained(options)
    dense = trained(options | {"compact": False})
    assert_same(compact, dense, 5e-5)


def test_dropped_layers_get_zero_gradients_and_moving_moments() -> None:
    """AdamW's moments and decay move as in the dense step; no gradient would leave them still."""
    trainer, callback = make_trainer(weight_decay=0.1)
    while trainer.step < 7:
        trainer.train_step()
    dropped = int(callback.z["layer"][0].argmin())
    assert callback.z["layer"][0, dropped] == 0
    weight = trainer.model.get_parameter(f"model.layers.{dropped}.mlp.up_proj.weight")
    before = trainer.optimizer.state[weight]["exp_avg_sq"].clone()
    trainer.train_step()
    after = trainer.optimizer.state[weight]["exp_avg_sq"]
    assert before.abs().max() > 0
    torch.testing.assert_close(after, 0.95 * before)


@pytest.mark.parametrize("draws", ["rank", "micro-batch"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_different_masks_on_each_rank(draws: str, checkpointing: bool) -> None:
    """No rank waits for another's collectives, and the scores stay equal on all ranks."""
    options = {"mask_draws": draws, "activation_checkpointing": checkpointing, "micro_batch": 2}
    results = run_ranks(trained, 2, options)
    for name, scores in results[0][1].items():
        assert torch.equal(results[1][1][name], scores), name
    for rank, dense in zip(
        results, run_ranks(trained, 2, options | {"compact": False}), strict=True
    ):
        assert_same(rank, dense, 5e-5)


WILD = {"mask_draws": "rank", "target_warmup": 0.1, "mask_noise": 3.0, "steps": 5}


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_ranks_that_skip_different_layers_stay_in_step(micro_batch: int) -> None:
    def skipped() -> list[list[bool]]:
        trainer, _ = make_trainer(**WILD, micro_batch=micro_batch)
        seen = []
        while trainer.step < 4:
            trainer.train_step()
            assert trainer.masks is not None and trainer.masks.computed is not None
            seen.append([layer.skipped for layer in trainer.masks.computed.layers])
        return seen

    first, second = run_ranks(skipped, 2)
    assert first != second
    options = WILD | {"micro_batch": micro_batch}
    compact = run_ranks(trained, 2, options)
    dense = run_ranks(trained, 2, options | {"compact": False})
    for ours, theirs in zip(compact, dense, strict=True):
        assert_same(ours, theirs, 5e-5)


def test_passes_share_gathered_weights_where_memory_allows() -> None:
    def shares(headroom: float, **options: Any) -> bool:
        trainer, callback = make_trainer(micro_batch=2, **options)
        callback.headroom = headroom
        trainer.train_step()
        assert trainer.masks is not None
        return trainer.masks.cache is not None

    assert shares(1e9)
    assert not shares(1e3)
    assert not shares(1e9, mask_draws="rank")
    assert not shares(1e9, mask_draws="micro-batch")


@pytest.mark.parametrize("world", [2, 4])
def test_micro_batch_draws_do_not_depend_on_the_number_of_ranks(world: int) -> None:
    options = {"mask_draws": "micro-batch", "micro_batch": 2, "steps": 4}
    (expected,) = run_ranks(trained, 1, options)
    assert_same(run_ranks(trained, world, options)[0], expected, 5e-5)


def test_draws_differ_between_micro_batches() -> None:
    trainer, _ = make_trainer(mask_draws="micro-batch", micro_batch=2)
    seen: list[Masks] = []
    trainer.model.register_forward_pre_hook(
        lambda _, __, keywords: seen.append(keywords["masks"]), with_kwargs=True
    )
    trainer.train_step()
    assert len(seen) == 4
    hidden = [masks.hidden for masks in seen]
    assert all(h is not None for h in hidden)
    assert len({tuple(h.tolist()) for h in hidden if h is not None}) == 4


def test_replicas_reduce_the_same_parameters_in_each_pass() -> None:
    (expected,) = run_ranks(trained, 1, {"micro_batch": 2, "steps": 4})
    found = run_ranks(trained, 4, {"micro_batch": 1, "steps": 4, "replicas": 2})
    assert_same(found[0], expected, 5e-5)


def test_evaluation_between_steps_uses_masks_without_noise() -> None:
    trainer, callback = make_trainer(eval_interval=1, mask_draws="rank")
    trainer.train_step()
    assert trainer.masks is not None and trainer.masks.hidden is not None
    expected = callback.rule.masks(0, None)["hidden"][0]
    # The scores have moved since the step drew its own masks.
    assert torch.equal(trainer.masks.hidden, expected.detach())
    assert shape_of(MODEL).hidden == len(trainer.masks.hidden)
