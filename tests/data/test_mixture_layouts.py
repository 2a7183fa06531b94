"""How rarely two layouts of a run come to different domain weights, by simulation.

`pytest -m slow -s tests/data/test_mixture_layouts.py` prints the table in docs/lab-notebook.md. Two
runs of 24,000 steps on seven domains see the same losses but for a noise of their own, given as a
fraction of a domain's mean loss over ten steps. They part at the first update after which a weight
in force differs; from there on samples are drawn in another order.
"""

from typing import Literal

import numpy as np
import pytest

from data.mixture import Mixture, MixtureConfig

STEPS = 24_000
PIECE = 10
"""Steps of one value of the noise."""
LOSS = 2.0
"""Nats per token that the noise is a fraction of."""
INITIAL = {"cc": 0.67, "c4": 0.15, "github": 0.045, "wiki": 0.045} | {
    "book": 0.045,
    "arxiv": 0.025,
    "stackexchange": 0.02,
}
Persistence = Literal["independent", "lasting", "shared", "constant"]


def gaps_of_a_run(generator: np.random.Generator) -> np.ndarray:
    """Excess losses [domains, pieces] that fall as after pruning, batches' own scatter included."""
    time = (np.arange(STEPS // PIECE) + 0.5) / (STEPS // PIECE)
    size = (len(INITIAL), 1)
    early = generator.uniform(0, 1.5, size) * np.exp(-time * generator.uniform(2, 30, size))
    return early + generator.uniform(-0.05, 0.25, size) + generator.normal(0, 0.03, early.shape)


def noise_of_a_layout(
    generator: np.random.Generator, relative: float, persistence: Persistence
) -> np.ndarray:
    """[domains, pieces] in nats; two layouts differ by `relative` in the root mean square.

    Lasting noise forgets itself over 1,000 steps, as where runs drift apart; shared noise is that,
    and the same in all domains; constant noise never forgets itself.
    """
    pieces, scale = STEPS // PIECE, relative * LOSS / 2**0.5
    fresh = generator.normal(0, scale, (len(INITIAL), pieces))
    if persistence == "constant":
        return np.repeat(fresh[:, :1], pieces, 1)
    if persistence == "shared":
        fresh[:] = fresh[0]
    if persistence in ("lasting", "shared"):
        keep = float(np.exp(-PIECE / 1000))
        for i in range(1, pieces):
            fresh[:, i] = keep * fresh[:, i - 1] + (1 - keep * keep) ** 0.5 * fresh[:, i]
    return fresh


def course(gaps: np.ndarray, interval: int | None, seen: list[float]) -> list[dict[str, float]]:
    """Weights in force after each update; `seen` gets their distances from the exact ones."""
    config = MixtureConfig(interval=interval)
    mixture = Mixture(config, INITIAL, dict.fromkeys(INITIAL, LOSS), STEPS)
    every = config.steps_between(STEPS)
    pieces = every // PIECE
    weights = []
    # What is updated after the last step decides about no sample.
    for start in range(0, STEPS // PIECE - pieces, pieces):
        means = LOSS + gaps[:, start : start + pieces].mean(1)
        sums = dict(zip(INITIAL, means.tolist(), strict=True))
        weights.append(mixture.update(sums, dict.fromkeys(INITIAL, 1), every))
        seen += [abs(np.log(weights[-1][d] / mixture.exact[d])) for d in INITIAL]
    return weights


def parted(
    runs: int, relative: float, persistence: Persistence, interval: int | None, seen: list[float]
) -> float:
    """Fraction of `runs` whose two layouts part."""
    generator = np.random.default_rng(0)
    count = 0
    for _ in range(runs):
        gaps = gaps_of_a_run(generator)
        noise = [noise_of_a_layout(generator, relative, persistence) for _ in range(2)]
        first, second = (course(gaps + own, interval, seen) for own in noise)
        count += first != second
    return count / runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("persistence", "relative", "most"),
    [
        ("independent", 1e-4, 0.02),
        ("independent", 1e-3, 0.10),
        ("lasting", 1e-4, 0.15),
        ("lasting", 1e-3, 0.70),
        ("shared", 1e-4, 0.06),
        ("shared", 1e-3, 0.30),
        ("constant", 1e-4, 0.35),
    ],
)
def test_layouts_seldom_part(persistence: Persistence, relative: float, most: float) -> None:
    seen: list[float] = []
    found = parted(400, relative, persistence, None, seen)
    distances = np.array(seen)
    print(
        f"\n{persistence} {relative:g}: {found:.1%} part; weights in force lie "
        f"{np.sqrt((distances**2).mean()):.1%} (at most {distances.max():.1%}) from the exact ones"
    )
    assert found < most
    assert np.sqrt((distances**2).mean()) < 0.08 and distances.max() < np.log(1.3)


@pytest.mark.slow
def test_frequent_updates_make_layouts_part() -> None:
    """The reason why the default interval follows the length of the run."""
    found = parted(20, 1e-3, "independent", 10, [])
    print(f"\nindependent 0.001, an update every 10 steps: {found:.0%} part")
    assert found > 0.5
