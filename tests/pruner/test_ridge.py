"""The normal equations of a refit: their minimum, massive inputs, and the first position."""

import pytest
import torch

from pruner.ridge import Apart, Ridge
from tests.distributed import run_ranks
from tests.pruner.test_refit import alone
from trainer import parallel


@pytest.mark.parametrize("biased", [False, True])
def test_ridge_is_the_minimum(biased: bool) -> None:
    """Against the same problem as one least-squares system in fp64."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 4, bias=biased)
    inputs, residual = torch.randn(50, 6), torch.randn(50, 4)
    equations = Ridge([linear])
    with torch.no_grad():
        for part in range(0, 50, 20):
            own = slice(part, part + 20)
            equations.add(inputs[None, own], residual[None, own])
        equations.add_first()
        ((weight, bias),) = equations.solve(0.3, alone())
    a = torch.nn.functional.pad(inputs.double(), (0, int(biased)), value=1.0)
    penalty = 0.3 * inputs.double().square().sum(0).mean()
    rows = penalty.sqrt() * torch.eye(6, 6 + biased, dtype=torch.float64)
    wanted = torch.linalg.lstsq(
        torch.cat([a, rows]), torch.cat([residual.double(), torch.zeros(6, 4)])
    ).solution
    torch.testing.assert_close(weight, wanted[:6].t(), atol=1e-6, rtol=1e-5)
    assert (bias is not None) == biased
    if bias is not None:
        torch.testing.assert_close(bias, wanted[6], atol=1e-6, rtol=1e-5)


def test_a_massive_input_does_not_hold_the_others() -> None:
    """One channel in a hundred that is a thousand times stronger than the others in a few rows."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(100, 3, bias=False)
    inputs = torch.randn(2000, 100)
    wanted = torch.randn(3, 100)
    spiked = inputs.clone()
    spiked[::100, 7] = 1000.0
    found = []
    for own in (inputs, spiked):
        equations = Ridge([linear])
        equations.add(own[None], own[None] @ wanted.t())
        equations.add_first()
        ((weight, _),) = equations.solve(0.1, alone())
        found.append(weight)
    others = torch.arange(100) != 7
    torch.testing.assert_close(found[0][:, others], found[1][:, others], atol=0.02, rtol=0.1)
    torch.testing.assert_close(found[1][:, 7], wanted[:, 7].double(), atol=1e-3, rtol=1e-3)


def test_without_the_first_position_all_inputs_enter_the_penalty() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(100, 1, bias=False)
    inputs = torch.randn(1, 500, 100)
    inputs[..., 7] *= 30
    changes = []
    for first in (True, False):
        equations = Ridge([linear])
        equations.add(inputs, inputs.sum(-1, keepdim=True))
        if first:
            equations.add_first()
        ((weight, _),) = equations.solve(0.1, alone())
        changes.append(weight[:, :7].mean().item())
    # The penalty is that of squares of 1, and of (99 + 900) / 100 on average.
    assert changes[0] == pytest.approx(1 / 1.1, abs=0.06)
    assert changes[1] == pytest.approx(1 / 2, abs=0.1)


def test_the_first_position_enters_only_when_it_is_added() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 4)
    inputs, residual = torch.randn(9, 5, 6), torch.randn(9, 5, 4)

    def solved(first: bool) -> torch.Tensor:
        equations = Ridge([linear])
        for part in range(0, 9, 4):
            equations.add(inputs[part : part + 4], residual[part : part + 4])
        if first:
            equations.add_first()
        ((weight, _),) = equations.solve(0.1, alone())
        return weight

    def least_squares(start: int) -> torch.Tensor:
        equations = Ridge([linear])
        rows = (values[:, start:].flatten(0, 1)[None] for values in (inputs, residual))
        equations.add(*rows)
        equations.add_first()
        ((weight, _),) = equations.solve(0.1, alone())
        return weight

    torch.testing.assert_close(solved(True), least_squares(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(solved(False), least_squares(1), atol=1e-6, rtol=1e-5)


STREAMS = {
    # Length of what is wanted at the first position, share of it that is missing, whether lost.
    "massive and missing": (1000.0, 1.0, True),
    "massive, a little missing": (1000.0, 0.3, False),
    "no longer than the others": (1.0, 1.0, False),
    "all there": (1000.0, 0.0, False),
}


def lost(name: str) -> bool:
    length, share, _ = STREAMS[name]
    context = parallel.init(threads=1)
    apart = Apart()
    generator = torch.Generator().manual_seed(context.rank)
    for _ in range(3):
        wanted = torch.randn(2, 8, 16, generator=generator)
        wanted[:, 0] *= length
        missing = 0.5 * wanted
        missing[:, 0] = share * wanted[:, 0]
        apart.add(wanted, missing)
    return apart.lost(context)


@pytest.mark.parametrize("name", STREAMS)
def test_a_massive_stream_that_is_missing_is_lost(name: str) -> None:
    assert run_ranks(lost, 1, name) == [STREAMS[name][2]]
    assert run_ranks(lost, 2, name) == 2 * [STREAMS[name][2]]
