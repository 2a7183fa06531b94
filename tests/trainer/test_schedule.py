"""The learning rate over the steps of a run."""

from itertools import pairwise

import pytest

from trainer.schedule import learning_rate


def rates(steps: int, warmup: float = 0.1) -> list[float]:
    return [
        learning_rate(i, steps=steps, peak=2.0, warmup_ratio=warmup, min_ratio=0.1)
        for i in range(steps)
    ]


def test_rises_to_the_peak_and_falls_to_the_minimum() -> None:
    values = rates(100)
    assert values[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(values) == values[9] == 2.0
    assert values[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(values[9:]))
    # Half way down the cosine lies the mean of peak and minimum.
    assert learning_rate(54, steps=100, peak=2.0, warmup_ratio=0.1, min_ratio=0.1) == pytest.approx(
        1.1
    )


def test_without_warmup_starts_at_the_peak() -> None:
    values = rates(11, warmup=0.0)
    assert values[0] == 2.0 and values[5] == pytest.approx(1.1) and values[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_tiny_runs_stay_within_bounds(steps: int, warmup: float) -> None:
    values = rates(steps, warmup)
    assert all(0 < value <= 2.0 for value in values) and max(values) == 2.0
