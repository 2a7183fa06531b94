"""Both rules: threshold and gradient of the projection, multipliers of the Lagrangian."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from data.errors import InputError
from pruner.config import MaskConfig, resolve_masks
from pruner.hard_concrete import gate
from pruner.projection import Projection
from pruner.rules import Rule
from pruner.scores import make_rule
from pruner.sheared_llama import Lagrangian, require_reachable
from pruner.threshold import threshold
from pruner.units import UnitKind, on_counts, polarised

KINDS = {
    "hidden": UnitKind("hidden", 1, 24, 15),
    "intermediate": UnitKind("intermediate", 4, 40, 11),
}


def random_scores(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(k.rows, k.units, generator=generator) for n, k in KINDS.items()}


def make(steps: int, scores_seed: int = 0, **options: Any) -> Rule:
    masks = resolve_masks(MaskConfig(**options))
    return make_rule(KINDS, random_scores(scores_seed), masks, steps, seed=7)


def train(rule: Rule, first: int, last: int) -> list[dict[str, Tensor]]:
    """Steps against a fixed linear loss; returns the masks used."""
    wanted = random_scores(seed=1)
    used = []
    for step in range(first, last):
        masks = rule.masks(step)
        used.append({name: z.detach().clone() for name, z in masks.items()})
        trained = [name for name in masks if masks[name].requires_grad]
        if trained:
            rule.backward([masks[n] for n in trained], [-wanted[n] for n in trained])
            rule.update(step)
    return used


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("count", [1.0, 7.3, 12.0, 39.9, 40.0])
def test_threshold_meets_the_count_in_every_row(count: float, temperature: float) -> None:
    scores = random_scores()["intermediate"].double()
    z = gate((scores - threshold(scores, count, temperature)) / temperature)
    assert torch.allclose(z.sum(-1), torch.full((4,), count, dtype=torch.float64), atol=1e-9)


def test_threshold_gradient_is_exact() -> None:
    scores = random_scores()["intermediate"].double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a: threshold(a, 11.4, 0.5), (scores,), eps=1e-6, atol=1e-7
    )

    def masks(a: Tensor) -> Tensor:
        return gate((a - threshold(a, 11.4, 0.5)) / 0.5)

    assert torch.autograd.gradcheck(masks, (scores,), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("implicit", [True, False])
def test_implicit_gradient_cannot_change_the_count(implicit: bool) -> None:
    rule = make(10, implicit_gradient=implicit, mask_noise=0.0)
    z = rule.masks(3)["intermediate"]
    (gradient,) = torch.autograd.grad(z.sum(), rule.scores["intermediate"])
    assert (gradient.abs().max().item() < 1e-6) == implicit


def test_saturated_rows_have_no_gradient() -> None:
    scores = torch.tensor([[3.0, 2.0, -2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    level = threshold(scores, 2.0, 0.01)
    assert level.item() == pytest.approx(0.0, abs=1e-9)
    (gradient,) = torch.autograd.grad(level.sum(), scores)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_count_falls_to_the_target_and_stays() -> None:
    rule = make(20)
    kind = KINDS["intermediate"]
    counts = [rule.current_target(kind, step) for step in range(20)]
    assert counts[0] == pytest.approx(40 - 29 / 10)
    assert all(a > b for a, b in itertools.pairwise(counts[:10]))
    assert counts[9:] == [11.0] * 11


def test_projection_polarises_exactly_and_keeps_its_masks() -> None:
    rule = make(20)
    assert isinstance(rule, Projection)
    used = train(rule, 0, 20)
    before, after = used[13], used[14:]
    assert any(((z > 0) & (z < 1)).any() for z in before.values())
    for masks in after:
        assert polarised(masks, KINDS)
        assert set(masks["intermediate"].unique().tolist()) == {0.0, 1.0}
        assert all(torch.equal(masks[name], after[0][name]) for name in masks)
    final = rule.final()
    assert all(torch.equal(final[name], after[0][name]) for name in final)
    assert rule.noise_scale(15) == 0.0
    assert rule.temperature(15) == pytest.approx(0.02)


def test_projection_without_noise_sums_to_the_current_target() -> None:
    rule = make(20, mask_noise=0.0)
    for step, masks in enumerate(train(rule, 0, 15)):
        for name, kind in KINDS.items():
            expected = torch.full((kind.rows,), rule.current_target(kind, step))
            assert torch.allclose(masks[name].sum(-1), expected, atol=1e-4)


def test_projection_learns_the_units_that_lower_the_loss() -> None:
    rule = make(200, mask_lr=0.1)
    train(rule, 0, 200)
    wanted = random_scores(seed=1)["intermediate"]
    kept = rule.final()["intermediate"]
    best = wanted.topk(11).values.sum().item()
    assert (kept * wanted).sum().item() >= 0.9 * best


def test_scores_stay_row_centred() -> None:
    rule = make(10)
    train(rule, 0, 8)
    for scores in rule.scores.values():
        assert scores.detach().mean(-1).abs().max().item() < 1e-6


@pytest.mark.parametrize("name", ["projection", "sheared-llama"])
def test_restored_state_continues_bit_for_bit(name: str) -> None:
    straight = make(8, rule=name)
    train(straight, 0, 8)
    stopped = make(8, rule=name)
    train(stopped, 0, 4)
    state = {key: value.clone() for key, value in stopped.state_dict().items()}
    resumed = make(8, scores_seed=5, rule=name)
    resumed.load_state_dict(state)
    train(resumed, 4, 8)
    expected, found = straight.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_lagrangian_keeps_the_target_count_but_need_not_polarise() -> None:
    rule = make(40, rule="sheared-llama")
    assert isinstance(rule, Lagrangian)
    train(rule, 0, 40)
    final = rule.final()
    for name, kind in KINDS.items():
        assert (final[name] > 0).sum(-1).tolist() == [kind.target] * kind.rows
        assert (on_counts(final[name]) <= kind.target).all()
    assert not polarised(final, KINDS)
    assert all(s.abs().max().item() <= rule.BOUND + 1e-5 for s in rule.scores.values())


def test_multipliers_rise_with_the_violation() -> None:
    rule = make(100, rule="sheared-llama", init="flat")
    assert isinstance(rule, Lagrangian)
    for scores in rule.scores.values():
        scores.data.fill_(rule.BOUND)
    masks = rule.masks(50)
    violation = rule.violations(50)["hidden"]
    assert violation.item() == pytest.approx(15 / 24 - 1 + (1 - 0.99798), abs=1e-4)
    rule.backward(list(masks.values()), [torch.zeros_like(z) for z in masks.values()])
    rule.update(50)
    linear, quadratic = rule.multipliers["hidden"].tolist()
    # Too many units: the linear multiplier falls below zero, which raises the sparsity.
    assert linear < 0 < quadratic
    before = rule.scores["hidden"].detach().clone()
    masks = rule.masks(51)
    rule.backward(list(masks.values()), [torch.zeros_like(z) for z in masks.values()])
    rule.update(51)
    assert (rule.scores["hidden"] < before).all()


@pytest.mark.parametrize(("target", "named"), [(4, "4 of 100"), (100, None), (5, None), (99, None)])
def test_counts_that_the_lagrangian_cannot_hold_are_refused(target: int, named: str | None) -> None:
    kinds = {"intermediate": UnitKind("intermediate", 3, 100, target)} if target < 100 else {}
    require_reachable(kinds, MaskConfig())
    if named is None:
        require_reachable(kinds, MaskConfig(rule="sheared-llama"))
        return
    with pytest.raises(InputError, match=f"rows of intermediate at {named} units"):
        require_reachable(kinds, MaskConfig(rule="sheared-llama"))
