"""Dynamic domain weights follow the stated formula within their bounds."""

import json
import random
from itertools import pairwise
from math import exp, isclose, log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.mixture import NOTCHES, Mixture, MixtureConfig, parse_values

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
        assert isclose(mixture.exact[domain], value / total, rel_tol=1e-12)


@pytest.mark.parametrize("updates", [2, 10, 100])
def test_effect_does_not_depend_on_the_interval(updates: int) -> None:
    losses = {"c4": 2.3, "github": 1.1, "book": 2.4}
    once, often = make(), make()
    feed(once, losses, HORIZON // 2)
    feed(often, losses, HORIZON // 2, updates)
    for domain in INITIAL:
        assert isclose(once.exact[domain], often.exact[domain], rel_tol=1e-9)


def test_effect_at_a_bound_does_not_depend_on_the_interval() -> None:
    losses = {"c4": 2.0, "github": 1.0, "book": 4.5}
    once, often = make(ceiling=2.0), make(ceiling=2.0)
    feed(once, losses, HORIZON)
    feed(often, losses, HORIZON, 50)
    assert once.exact["book"] == pytest.approx(0.4, abs=1e-12)
    assert once.exact == pytest.approx(often.exact, abs=1e-9)


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
        for weights in (mixture.weights, mixture.exact):
            assert isclose(sum(weights.values()), 1, rel_tol=1e-9)
            for domain, start in INITIAL.items():
                low, high = floor * start, min(1, ceiling * start)
                assert low - 1e-12 <= weights[domain] <= high + 1e-12


def test_excess_loss_is_clipped_at_zero() -> None:
    better_than_reference = {"c4": 1.0, "github": 0.5, "book": 2.5}
    clipped, unclipped = make(), make(clip=False, strength=8.0)
    feed(clipped, better_than_reference, HORIZON // 10)
    feed(unclipped, better_than_reference, HORIZON // 10)
    assert clipped.weights == pytest.approx(INITIAL)
    assert unclipped.exact["c4"] < INITIAL["c4"] < 1
    ratio = unclipped.exact["c4"] / unclipped.exact["book"]
    assert isclose(log(ratio / (0.5 / 0.2)), 8.0 * -1.0 / 10)


def test_unobserved_domain_keeps_its_weight() -> None:
    mixture = make()
    mixture.update({"c4": 300.0, "github": 100.0}, {"c4": 100, "github": 100, "book": 0}, HORIZON)
    assert mixture.exact["book"] == INITIAL["book"]
    assert mixture.exact["c4"] > INITIAL["c4"]
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
    assert (restored.weights, restored.exact) == (mixture.weights, mixture.exact)
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


def wander(seed: int, updates: int) -> list[dict[str, float]]:
    """Losses with gaps that fall over the run, each with noise of its own."""
    generator = random.Random(seed)
    steepness = {domain: generator.uniform(1, 10) for domain in INITIAL}
    return [
        {
            domain: REFERENCE[domain]
            + exp(-steepness[domain] * update / updates)
            + generator.gauss(0.1, 0.03)
            for domain in INITIAL
        }
        for update in range(updates)
    ]


@pytest.mark.parametrize("updates", [20, 400])
def test_weights_in_force_stay_near_the_exact_ones(updates: int) -> None:
    distances = []
    for seed in range(20):
        mixture = make()
        for losses in wander(seed, updates):
            feed(mixture, losses, HORIZON // updates)
            distances += [log(mixture.weights[d] / mixture.exact[d]) for d in INITIAL]
    assert max(map(abs, distances)) < log(1.3)
    assert (sum(x * x for x in distances) / len(distances)) ** 0.5 < 0.08


def test_weights_move_seldom_and_by_notches() -> None:
    mixture = make()
    seen = [mixture.weights]
    for losses in wander(1, 1000):
        feed(mixture, losses, HORIZON // 1000)
        if mixture.weights != seen[-1]:
            seen.append(mixture.weights)
    assert 3 < len(seen) < 20
    for before, after in pairwise(seen):
        change = {domain: log(after[domain] / before[domain]) for domain in INITIAL}
        assert max(change.values()) - min(change.values()) > 0.99 * log(2) / NOTCHES


def test_losses_that_go_to_and_fro_move_nothing() -> None:
    """Not even where the exact weight crosses the middle between two places again and again."""
    mixture = make(clip=False, strength=1.0)
    feed(mixture, {"c4": 2.0, "github": 1.0 + 0.6 * log(2) / NOTCHES, "book": 2.5}, HORIZON)
    assert mixture.exact != pytest.approx(INITIAL) and mixture.weights == INITIAL
    for step in range(100):
        noise = 0.01 if step % 2 else -0.01
        feed(mixture, {"c4": 2.0, "github": 1.0 + noise, "book": 2.5 - noise}, HORIZON)
        assert mixture.weights == INITIAL


def test_an_update_does_not_carry_a_domain_away() -> None:
    """One update that stands for ten of twelve steps, with gaps as after one-shot pruning."""
    mixture = make()
    feed(mixture, {"c4": 3.0, "github": 4.0, "book": 3.0}, HORIZON * 10 // 12)
    assert mixture.exact["github"] > 0.9
    assert 0.3 < mixture.weights["github"] < 0.65
    for _ in range(4):
        feed(mixture, REFERENCE, HORIZON // 12)
    assert mixture.weights == pytest.approx(mixture.exact, rel=0.3)


@pytest.mark.parametrize(
    ("steps", "interval"), [(1, 1), (12, 1), (39, 1), (40, 2), (500, 25), (24_000, 1_200)]
)
def test_the_interval_follows_the_length_of_the_run(steps: int, interval: int) -> None:
    assert MixtureConfig().steps_between(steps) == interval
    assert MixtureConfig(interval=7).steps_between(steps) == 7


def test_a_run_from_before_the_grid_keeps_the_exact_weights() -> None:
    mixture = make()
    mixture.load_state_dict({"weights": {"c4": 0.41, "github": 0.37, "book": 0.22}})
    assert not mixture.on_grid and mixture.weights["github"] == 0.37
    feed(mixture, {"c4": 2.0, "github": 1.05, "book": 2.5}, HORIZON // 10)
    assert mixture.weights == mixture.exact and mixture.weights["github"] > 0.37
    again = make()
    again.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
    assert not again.on_grid and again.weights == mixture.weights


def test_enormous_strength_stays_finite() -> None:
    mixture = make(strength=1e308)
    for _ in range(3):
        feed(mixture, {"c4": 30.0, "github": 1.0, "book": 90.0}, HORIZON)
    assert isclose(sum(mixture.weights.values()), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "replay"}, "--mixture-history"),
        ({"kind": "fixed", "history": "runs/a"}, r"--mixture-history runs/a .*--mixture fixed"),
        ({"history": "runs/a"}, r"add --mixture replay"),
    ],
)
def test_a_history_belongs_to_replay(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MixtureConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [*("c4", "c4=x", "=1", "c4=-1", "c4=nan", "c4=1,c4=2", "", "c4=1,"),
     *("c4=inf", "c4=1,github=infinity", "c4=1e999", "c4=1e308,github=1e308")],
)  # fmt: skip
def test_values_that_are_none_name_the_flag(text: str) -> None:
    with pytest.raises(InputError, match="--reference-losses"):
        parse_values(text, "--reference-losses")


def test_values_are_read() -> None:
    text = " c4 = 0.5, a=b=2,github=1e-3"
    assert parse_values(text, "--x") == {"c4": 0.5, "a=b": 2.0, "github": 1e-3}


def test_names_may_be_decomposed() -> None:
    """As a file manager shows them that writes an umlaut as a letter and a mark."""
    decomposed = "bu\u0308cher"
    assert parse_values(f"{decomposed}=2", "--x") == {"b\u00fccher": 2.0}
    with pytest.raises(InputError, match="given twice"):
        parse_values(f"{decomposed}=2,b\u00fccher=3", "--x")
