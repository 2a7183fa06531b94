"""Dynamic domain weights follow the stated formula within their bounds."""

import json
from math import exp, isclose, log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.mixture import Mixture, MixtureConfig

INITIAL = {"c4": 0.5, "github": 0.3, "book": 0.2}
REFERENCE = {"c4": 2.0, "github": 1.0, "book": 2.5}
HORIZON = 1_000_000


def make(**config: object) -> Mixture:
    return Mixture(MixtureConfig(**config), INITIAL, REFERENCE, HORIZON)  # type: ignore[arg-type]


def feed(mixture: Mixture, losses: dict[str, float], tokens: int, updates: int = 1) -> None:
    for _ in range(updates):
        mixture.update(
            {domain: loss * 100 for domain, loss in losses.items()},
            dict.fromkeys(losses, 100),
            tokens // updates,
        )


def test_update_is_the_stated_formula() -> None:
    mixture = make(strength=2.0)
    feed(mixture, {"c4": 2.4, "github": 1.0, "book": 2.0}, HORIZON // 4)
    raw = {"c4": 0.5 * exp(2.0 * 0.4 / 4), "github": 0.3, "book": 0.2}
    total = sum(raw.values())
    for domain, value in raw.items():
        assert isclose(mixture.weights[domain], value / total, rel_tol=1e-12)


@pytest.mark.parametrize("updates", [2, 10, 100])
def test_effect_does_not_depend_on_the_interval(updates: int) -> None:
    losses = {"c4": 2.3, "github": 1.1, "book": 2.4}
    once, often = make(), make()
    feed(once, losses, HORIZON // 2)
    feed(often, losses, HORIZON // 2, updates)
    for domain in INITIAL:
        assert isclose(once.weights[domain], often.weights[domain], rel_tol=1e-9)


def test_effect_at_a_bound_does_not_depend_on_the_interval() -> None:
    losses = {"c4": 2.0, "github": 1.0, "book": 4.5}
    once, often = make(ceiling=2.0), make(ceiling=2.0)
    feed(once, losses, HORIZON)
    feed(often, losses, HORIZON, 50)
    assert once.weights["book"] == pytest.approx(0.4, abs=1e-12)
    assert once.weights == pytest.approx(often.weights, abs=1e-9)


@given(
    history=st.lists(
        st.tuples(st.lists(st.floats(0, 12), min_size=3, max_size=3), st.integers(0, HORIZON)),
        min_size=1,
        max_size=25,
    ),
    clip=st.booleans(),
    floor=st.sampled_from([0.0, 1 / 8, 0.9, 1.0]),
    ceiling=st.sampled_from([1.0, 1.1, 8.0, 1e6]),
)
@settings(max_examples=80, deadline=None)
def test_weights_stay_bounded_and_sum_to_one(
    history: list[tuple[list[float], int]], clip: bool, floor: float, ceiling: float
) -> None:
    mixture = make(strength=50.0, clip=clip, floor=floor, ceiling=ceiling)
    for losses, tokens in history:
        feed(mixture, dict(zip(INITIAL, losses, strict=True)), tokens)
        assert isclose(sum(mixture.weights.values()), 1, rel_tol=1e-9)
        for domain, start in INITIAL.items():
            weight = mixture.weights[domain]
            assert floor * start - 1e-12 <= weight <= min(1, ceiling * start) + 1e-12


def test_excess_loss_is_clipped_at_zero() -> None:
    better_than_reference = {"c4": 1.0, "github": 0.5, "book": 2.5}
    clipped, unclipped = make(), make(clip=False, strength=8.0)
    feed(clipped, better_than_reference, HORIZON // 10)
    feed(unclipped, better_than_reference, HORIZON // 10)
    assert clipped.weights == pytest.approx(INITIAL)
    assert unclipped.weights["c4"] < INITIAL["c4"] < 1
    ratio = unclipped.weights["c4"] / unclipped.weights["book"]
    assert isclose(log(ratio / (0.5 / 0.2)), 8.0 * -1.0 / 10)


def test_unobserved_domain_keeps_its_weight() -> None:
    mixture = make()
    mixture.update({"c4": 300.0, "github": 100.0}, {"c4": 100, "github": 100, "book": 0}, HORIZON)
    assert mixture.weights["book"] == INITIAL["book"]
    assert mixture.weights["c4"] > INITIAL["c4"]
    assert isclose(sum(mixture.weights.values()), 1)
    mixture.update({}, {}, HORIZON)
    assert isclose(sum(mixture.weights.values()), 1)


def test_fixed_never_changes() -> None:
    mixture = Mixture(MixtureConfig(kind="fixed"), {"a": 1, "b": 3}, {}, HORIZON)
    mixture.update({"a": 9.0, "b": 0.0}, {"a": 1, "b": 1}, HORIZON)
    assert mixture.weights == {"a": 0.25, "b": 0.75}


def test_no_update_at_restart() -> None:
    mixture = make()
    feed(mixture, {"c4": 2.3, "github": 1.5, "book": 2.4}, HORIZON // 3)
    restored = make()
    restored.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
    assert restored.weights == mixture.weights
    for either in (mixture, restored):
        feed(either, {"c4": 2.1, "github": 1.2, "book": 2.9}, HORIZON // 3)
    assert restored.weights == mixture.weights


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_non_finite_loss_names_the_domain_and_changes_nothing(loss: float) -> None:
    mixture = make()
    with pytest.raises(InputError, match="domain github"):
        feed(mixture, {"c4": 2.9, "github": loss, "book": 2.4}, HORIZON)
    assert mixture.weights == INITIAL


@pytest.mark.parametrize("reference", [{"c4": 1.0}, REFERENCE | {"book": float("nan")}])
def test_dynamic_needs_a_reference_for_each_domain(reference: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"no reference loss for .*book"):
        Mixture(MixtureConfig(), INITIAL, reference, HORIZON)


@pytest.mark.parametrize("initial", [{"a": -1.0, "b": 2.0}, {"a": 0.0}, {"a": float("nan")}])
def test_bad_initial_weights_are_refused(initial: dict[str, float]) -> None:
    with pytest.raises(InputError, match="domain weights"):
        Mixture(MixtureConfig(kind="fixed"), initial, {}, HORIZON)


@pytest.mark.parametrize(
    "config",
    [{"floor": 1.5}, {"floor": -0.1}, {"ceiling": 0.5}, {"strength": -1.0}, {"interval": 0}],
)
def test_bad_constants_are_refused(config: dict[str, float]) -> None:
    with pytest.raises(InputError, match="mixture"):
        MixtureConfig(**config)  # type: ignore[arg-type]


def test_state_of_other_domains_is_refused() -> None:
    with pytest.raises(InputError, match="cannot resume"):
        make().load_state_dict({"weights": {"c4": 1.0}})
