"""Clipping against torch's own, and which parameters decay."""

import pytest
import torch
from torch import nn

from tests.distributed import run_ranks
from tests.trainer.tiny import SHAPE, options
from trainer import parallel
from trainer.models.decoder import CausalLM
from trainer.optimizer import build_optimizer, clip_gradients
from trainer.run import build_model, random_init


def test_only_matrices_decay() -> None:
    model = CausalLM(SHAPE)
    decayed, kept = build_optimizer(model, options(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and all(p.ndim == 2 for p in decayed["params"])
    assert kept["weight_decay"] == 0.0 and all(p.ndim == 1 for p in kept["params"])
    together = len(decayed["params"]) + len(kept["params"])
    assert together == len(list(model.parameters()))


@pytest.mark.parametrize("limit", [0.0, 0.25, 1e6])
def test_clipping_equals_torch(limit: float) -> None:
    context = parallel.init(threads=1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = clip_gradients(model, limit, context.mesh)
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    expected = nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf"))
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(got, [p.grad for p in model.parameters()])


def sharded_norm(replicas: int) -> tuple[float, float]:
    """Global norm before and after clipping to 1, with gradient 2 everywhere."""
    context = parallel.init(replicas=replicas, threads=1)
    model = build_model(SHAPE, options(), context, load=random_init(0))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    before = clip_gradients(model, 1.0, context.mesh)
    return before.item(), clip_gradients(model, 0.0, context.mesh).item()


@pytest.mark.parametrize(("world", "replicas"), [(3, 1), (4, 2)])
def test_shards_count_once(world: int, replicas: int) -> None:
    expected = 2.0 * SHAPE.num_parameters() ** 0.5
    for before, after in run_ranks(sharded_norm, world, replicas):
        assert before == pytest.approx(expected, rel=1e-5)
        assert after == pytest.approx(1.0, rel=1e-5)
