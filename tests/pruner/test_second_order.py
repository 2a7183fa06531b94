"""Errors of removals against refits by least squares, unit by unit, and on any number of ranks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pruner.second_order import channel_errors, removal_errors, second_order
from tests.distributed import run_ranks
from tests.factories import write_model
from tests.pruner.test_importance import sequences
from trainer import parallel
from trainer.config import TrainConfig
from trainer.models.hf import load_config
from trainer.run import build_model, pretrained


def best_error(weight: Tensor, inputs: Tensor, kept: Tensor) -> float:
    """Squared error of the outputs with the best weights on the columns `kept`."""
    wanted = inputs @ weight.t()
    if not len(kept):
        return float(wanted.square().sum())
    solution = torch.linalg.lstsq(inputs[:, kept], wanted).solution
    return float((inputs[:, kept] @ solution - wanted).square().sum())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_units_go_in_the_order_of_what_they_cost(size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    mixing = torch.randn(8, 8, generator=draw, dtype=torch.float64)
    inputs = torch.randn(40, 8, generator=draw, dtype=torch.float64) @ mixing
    weight = torch.randn(5, 8, generator=draw, dtype=torch.float64)
    units = torch.randperm(8, generator=draw).view(-1, size)
    found = removal_errors(weight, inputs.t() @ inputs, units)
    left = list(range(len(units)))
    for _ in range(len(units)):
        costs = {
            unit: best_error(weight, inputs, units[[u for u in left if u != unit]].flatten())
            for unit in left
        }
        cheapest = min(costs, key=costs.__getitem__)
        left.remove(cheapest)
        assert found[cheapest].item() == pytest.approx(costs[cheapest], rel=1e-9)
        assert all(found[unit] >= found[cheapest] for unit in left)


def test_a_copy_of_a_channel_costs_nothing() -> None:
    """Activations alone would keep both: each is as strong as the other."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 6, generator=draw, dtype=torch.float64)
    inputs[:, 5] = inputs[:, 2]
    products = inputs.t() @ inputs
    products.diagonal().add_(1e-9)
    found = removal_errors(
        torch.ones(3, 6, dtype=torch.float64), products, torch.arange(6)[:, None]
    )
    first = int(found.argmin())
    assert first in (2, 5) and found[first] < 1e-6 < found.sort().values[1]


@pytest.mark.parametrize("count", [7, 64, 150])
def test_channels_at_once_are_those_one_by_one(count: int) -> None:
    draw = torch.Generator().manual_seed(count)
    mixing = torch.randn(count, count, generator=draw, dtype=torch.float64)
    inputs = torch.randn(4 * count, count, generator=draw, dtype=torch.float64) @ mixing
    weight = torch.randn(11, count, generator=draw, dtype=torch.float64)
    products = inputs.t() @ inputs
    expected = removal_errors(weight, products, torch.arange(count)[:, None])
    torch.testing.assert_close(channel_errors(weight, products), expected, rtol=1e-7, atol=0)


def scores(folder: Path, count: int) -> dict[str, Tensor]:
    context = parallel.init(threads=1)
    train = TrainConfig(precision="fp32")
    model = build_model(load_config(folder), train, context, load=pretrained(folder))
    found = second_order(model, sequences(count), context, 2)
    return {name: values[0] for name, values in found.items()}


def test_ranks_find_the_same(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", num_hidden_layers=3)
    (expected,) = run_ranks(scores, 1, folder, 7)
    assert {name: tuple(values.shape) for name, values in expected.items()} == {
        "hidden": (1, 32),
        "layer": (1, 3),
        "kv_group": (3, 2),
        "query_head": (6, 2),
        "intermediate": (3, 48),
    }
    for found in run_ranks(scores, 2, folder, 7):
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-9)
