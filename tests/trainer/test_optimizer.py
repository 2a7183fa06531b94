"""Updates and clipping against torch's own, and which parameters decay."""

import gc
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed import run_ranks
from tests.trainer.tiny import SHAPE, options
from trainer import optimizer as optimizers
from trainer import parallel
from trainer.models.decoder import CausalLM
from trainer.optimizer import LocalAdamW, build_optimizer, clip_gradients
from trainer.run import build_model, random_init


def test_only_matrices_decay() -> None:
    model = CausalLM(SHAPE)
    decayed, kept = build_optimizer(model, options(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and all(p.ndim == 2 for p in decayed["params"])
    assert kept["weight_decay"] == 0.0 and all(p.ndim == 1 for p in kept["params"])
    together = len(decayed["params"]) + len(kept["params"])
    assert together == len(list(model.parameters()))


class OnShards(TorchDispatchMode):
    """Counts operations on DTensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(isinstance(leaf, DTensor) for leaf in tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


class Trained:
    """A sharded model whose optimizer has a replicated and a plain parameter too."""

    def __init__(self, optimizer: type[torch.optim.AdamW]) -> None:
        context = parallel.init(threads=1)
        model = build_model(SHAPE, options(), context, load=random_init(0))
        with patch.object(optimizers, "LocalAdamW", optimizer):
            self.optimizer = build_optimizer(model, options(weight_decay=0.3))
        replicated = distribute_tensor(torch.ones(3, 2), context.mesh, [Replicate()])
        # One row on two ranks: the second has nothing of it.
        short = distribute_tensor(torch.ones(1, 2), context.mesh, [Shard(0)])
        others = [nn.Parameter(x) for x in (replicated, short, torch.ones(5))]
        # PyTorch takes no DTensors and plain tensors together.
        for group in (others[:2], others[2:]):
            self.optimizer.add_param_group({"params": group, "weight_decay": 0.1, "lr": 0.02})
        self.parameters = [*model.parameters(), *others]

    def update(self, step: int) -> None:
        """The same for the same step; some parameters have a gradient every other time."""
        torch.manual_seed(step)
        for index, parameter in enumerate(self.parameters):
            parameter.grad = None if index % 3 == 0 and step % 2 else torch.randn_like(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.9
        self.optimizer.step()


def same(found: Any, expected: Any) -> bool:
    """Equal in types, placements and bits."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[k], expected[k]) for k in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, DTensor) and found.placements != expected.placements:
        return False
    if isinstance(expected, torch.Tensor):
        return torch.equal(parallel.to_local(found.data), parallel.to_local(expected.data))
    return bool(found == expected)


def updates_of_shards() -> dict[str, bool]:
    ours, theirs = Trained(LocalAdamW), Trained(torch.optim.AdamW)
    for step in range(4):
        ours.update(step)
        theirs.update(step)
    found = {
        "updated": same(ours.parameters, theirs.parameters),
        "saved": same(ours.optimizer.state_dict(), theirs.optimizer.state_dict()),
    }
    # Each goes on with what the other has saved.
    state = ours.optimizer.state_dict()
    ours.optimizer.load_state_dict(theirs.optimizer.state_dict())
    theirs.optimizer.load_state_dict(state)
    for step in range(4, 6):
        ours.update(step)
        theirs.update(step)
    return found | {"loaded": same(ours.parameters, theirs.parameters)}


def test_shards_are_updated_as_torch_updates_dtensors() -> None:
    """Bit for bit, with state of the same types."""
    expected = {"updated": True, "saved": True, "loaded": True}
    assert run_ranks(updates_of_shards, 2) == [expected] * 2


def work_on_dtensors(optimizer: type[torch.optim.AdamW]) -> tuple[int, int]:
    """Operations on DTensors in a step, and how many DTensorSpecs five steps leave behind."""
    trained = Trained(optimizer)
    for step in range(2):
        trained.update(step)
    with OnShards() as mode:
        trained.optimizer.step()
    before = specs()
    for _ in range(5):
        trained.optimizer.step()
    return mode.count, specs() - before


def specs() -> int:
    gc.collect()
    return sum(isinstance(item, DTensorSpec) for item in gc.get_objects())


def test_a_step_leaves_dtensors_alone() -> None:
    """PyTorch up to 2.12 keeps what it works out for each of them, for ever."""
    assert run_ranks(work_on_dtensors, 2, LocalAdamW) == [(0, 0)] * 2
    # What is counted is there to be counted.
    assert all(count > 0 for count, _ in run_ranks(work_on_dtensors, 2, torch.optim.AdamW))


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
