"""Samples are drawn once per epoch, at the mixture's weights, and resume anywhere."""

import json
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.sampler import ONE, DomainSampler, Permutation, _quantise

SIZES = {"c4": 97, "github": 41, "book": 13}
WEIGHTS = {"c4": 0.6, "github": 0.3, "book": 0.1}
GOLDEN_PERMUTATION = [4, 3, 7, 1, 5, 9, 6, 2, 0, 8]
GOLDEN_BATCH = [
    [0, 0, 74],
    [0, 0, 32],
    [0, 0, 16],
    [1, 0, 19],
    [2, 0, 8],
    [1, 0, 6],
    [0, 0, 5],
    [0, 0, 75],
]


def make(seed: int = 7, sizes: dict[str, int] | None = None) -> DomainSampler:
    return DomainSampler(sizes or SIZES, WEIGHTS, seed, "data-1")


def run(sampler: DomainSampler, batches: Iterable[int]) -> np.ndarray:
    return np.concatenate([sampler.next_batch(size) for size in batches])


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 4096, 10_007, 65_537])
def test_permutation_is_a_bijection(n: int) -> None:
    image = Permutation(n, ("test", n))(np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))


@given(n=st.integers(1, 5000), key=st.tuples(st.integers(), st.text(max_size=8)))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection_for_any_key(n: int, key: tuple[int, str]) -> None:
    assert len(np.unique(Permutation(n, key)(np.arange(n)))) == n


def test_permutation_of_parts_equals_parts_of_permutation() -> None:
    permutation = Permutation(1000, ("parts",))
    whole = permutation(np.arange(1000))
    assert np.array_equal(permutation(np.array([5, 999, 0])), whole[[5, 999, 0]])
    assert len(permutation(np.arange(0))) == 0


def test_permutation_looks_random() -> None:
    n, cells = 65_536, 64
    image = Permutation(n, ("quality",))(np.arange(n))
    serial = np.corrcoef(image[:-1], image[1:])[0, 1] * np.sqrt(n)
    counts, *_ = np.histogram2d(np.arange(n), image, bins=cells)
    chi_square = ((counts - n / cells**2) ** 2 / (n / cells**2)).sum() / (cells - 1) ** 2
    commonest = np.unique(np.diff(image), return_counts=True)[1].max()
    assert abs(serial) < 4
    assert 0.9 < chi_square < 1.1
    # A linear (lattice-like) permutation repeats one difference hundreds of times.
    assert commonest < 20


def test_golden_order() -> None:
    """The order must never change by accident: it would break every resume across versions."""
    assert Permutation(10, ("golden", 1))(np.arange(10)).tolist() == GOLDEN_PERMUTATION
    assert make().next_batch(8).tolist() == GOLDEN_BATCH


def test_every_sample_once_per_epoch_in_a_new_order() -> None:
    rows = run(make(), [16] * 60)
    for domain, size in enumerate(SIZES.values()):
        mine = rows[rows[:, 0] == domain]
        # Within a batch rows are shuffled; epochs themselves come in order.
        complete = mine[:, 1].max()
        assert complete >= 2
        orders = []
        for epoch in range(complete):
            samples = mine[mine[:, 1] == epoch][:, 2]
            assert sorted(samples) == list(range(size))
            orders.append(samples.tolist())
        assert orders[0] != orders[1]


def test_order_depends_on_seed() -> None:
    assert not np.array_equal(make(1).next_batch(32), make(2).next_batch(32))


@given(
    stops=st.lists(st.integers(0, 39), max_size=5),
    changes=st.dictionaries(
        st.integers(0, 39), st.lists(st.floats(0.01, 1), min_size=3, max_size=3), max_size=6
    ),
)
@settings(max_examples=30, deadline=None)
def test_resume_anywhere_gives_the_same_sequence(
    stops: list[int], changes: dict[int, list[float]]
) -> None:
    def play(stops: list[int]) -> tuple[np.ndarray, dict]:
        sampler, rows = make(), []
        for step in range(40):
            if step in stops:
                state = json.loads(json.dumps(sampler.state_dict()))
                sampler = make()
                sampler.load_state_dict(state)
            if step in changes:
                sampler.set_weights(dict(zip(SIZES, changes[step], strict=True)))
            rows.append(sampler.next_batch(8 if step % 3 else 12))
        return np.concatenate(rows), sampler.state_dict()

    (expected, expected_state), (found, found_state) = play([]), play(stops)
    assert np.array_equal(found, expected)
    assert found_state == expected_state


@given(
    steps=st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=60),
    batch=st.integers(10, 64),
)
@settings(max_examples=60, deadline=None)
def test_counts_stay_within_one_sample_of_the_ideal(steps: list[list[float]], batch: int) -> None:
    domains = [f"d{index}" for index in range(5)]
    sampler = DomainSampler(dict.fromkeys(domains, 1000), dict.fromkeys(domains, 1), 0, "")
    ideal = np.zeros(5)
    for values in steps:
        # Every domain is worth at least one sample a step.
        weights = 1 / batch + (1 - 5 / batch) * (np.array(values) + 1e-9) / sum(
            value + 1e-9 for value in values
        )
        sampler.set_weights(dict(zip(domains, weights.tolist(), strict=True)))
        ideal += batch * np.array(list(sampler.weights.values()))
        sampler.next_batch(batch)
        assert np.abs(ideal - list(sampler.used.values())).max() < 1


@given(weights=st.lists(st.floats(1e-12, 1), min_size=2, max_size=12), batch=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_counts_of_small_domains_are_met_on_average(weights: list[float], batch: int) -> None:
    domains = [f"d{index}" for index in range(len(weights))]
    sampler = DomainSampler(
        dict.fromkeys(domains, 50), dict(zip(domains, weights, strict=True)), 0, ""
    )
    run(sampler, [batch] * 50)
    for domain, weight in sampler.weights.items():
        assert abs(sampler.used[domain] - 50 * batch * weight) < 2


def test_raising_a_weight_does_not_flood_the_batch() -> None:
    sampler = DomainSampler({"a": 9999, "b": 9999}, {"a": 0.98, "b": 0.02}, 0, "")
    run(sampler, [100] * 200)
    sampler.set_weights({"a": 0.8, "b": 0.2})
    counts = [(sampler.next_batch(100)[:, 0] == 1).sum() for _ in range(5)]
    assert counts == [20] * 5


def test_weights_change_at_the_next_step() -> None:
    sampler = make()
    sampler.next_batch(10)
    sampler.set_weights({"c4": 0, "github": 0, "book": 1})
    sampler.next_batch(2)  # what the others were still owed may come first
    assert set(sampler.next_batch(10)[:, 0]) == {2}


def test_weight_zero_is_never_drawn() -> None:
    sampler = DomainSampler({"a": 5, "b": 5}, {"a": 1, "b": 0}, 0, "")
    assert set(run(sampler, [4] * 20)[:, 0]) == {0}


@given(values=st.lists(st.floats(0, 1e300), min_size=1, max_size=20).filter(any))
@settings(max_examples=100, deadline=None)
def test_quantised_weights_sum_to_one_exactly(values: list[float]) -> None:
    quantised = _quantise(values)
    assert sum(quantised) == ONE and min(quantised) >= 0


@pytest.mark.parametrize(
    "weights",
    [
        {"c4": float("nan"), "github": 1, "book": 1},
        {"c4": -1, "github": 1, "book": 1},
        {"c4": 0, "github": 0, "book": 0},
        {"c4": 1, "github": 1},
        {"c4": 1, "github": 1, "book": 1, "extra": 1},
    ],
)
def test_bad_weights_are_refused_and_leave_the_old_ones(weights: dict[str, float]) -> None:
    sampler = make()
    before = sampler.state_dict()
    with pytest.raises(InputError, match="domain weights"):
        sampler.set_weights(weights)
    assert sampler.state_dict() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "other"}, "fingerprint"),
        ({"seed": 8}, "seed"),
        ({"sizes": [1, 2, 3]}, "sizes"),
        ({"domains": ["x", "y", "z"]}, "domains"),
        ({"version": 99}, "version"),
    ],
)
def test_state_of_other_data_is_refused(change: dict, named: str) -> None:
    state = make().state_dict() | change
    with pytest.raises(InputError, match=f"cannot resume.*{named}"):
        make().load_state_dict(state)


def test_state_does_not_grow_with_samples() -> None:
    sampler = DomainSampler(dict.fromkeys(SIZES, 10**9), WEIGHTS, 0, "f" * 64)
    run(sampler, [512] * 20)
    assert len(json.dumps(sampler.state_dict())) < 500
