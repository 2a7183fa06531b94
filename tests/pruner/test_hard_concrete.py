"""The hard concrete gate: slope, noise and probabilities against samples and published values."""

import pytest
import torch

from pruner.hard_concrete import gate, gate_slope, logistic_noise, probability_nonzero


def test_gate_reaches_zero_and_one_exactly() -> None:
    values = gate(torch.tensor([-3.0, -2.4, 0.0, 2.4, 3.0]))
    assert values.tolist()[0] == 0 and values.tolist()[-1] == 1
    assert torch.allclose(values[2], torch.tensor(0.5))


def test_slope_is_the_derivative() -> None:
    logit = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(gate(logit).sum(), logit)
    assert torch.allclose(gate_slope(logit.detach()), expected, atol=1e-14)


def test_noise_depends_on_seed_and_step_alone() -> None:
    shapes = {"a": (3, 50), "b": (1, 7)}
    first = logistic_noise(shapes, seed=1, step=5)
    torch.manual_seed(99)
    again = logistic_noise(shapes, seed=1, step=5)
    assert all(torch.equal(first[name], again[name]) for name in shapes)
    for seed, step in ((1, 6), (2, 5), (5, 1)):
        other = logistic_noise(shapes, seed=seed, step=step)
        assert not torch.equal(first["a"], other["a"])


@pytest.mark.parametrize("seed", [-1, -(2**70), 2**64, 2**63])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert logistic_noise({"a": (9,)}, seed=seed, step=1)["a"].isfinite().all()


def test_noise_is_standard_logistic() -> None:
    noise = logistic_noise({"a": (200_000,)}, seed=0, step=0)["a"]
    assert torch.isfinite(noise).all()
    assert abs(noise.mean().item()) < 0.02
    assert abs(noise.std().item() - 3.14159 / 3**0.5) < 0.02


def test_probability_nonzero_matches_samples() -> None:
    beta = 2 / 3
    noise = logistic_noise({"a": (400_000,)}, seed=3, step=0)["a"]
    for log_alpha in (-2.0, 0.0, 1.5):
        sampled = (gate((noise + log_alpha) / beta) > 0).float().mean().item()
        expected = probability_nonzero(torch.tensor(log_alpha), beta).item()
        assert abs(sampled - expected) < 3e-3


def test_published_values_of_the_expected_l0() -> None:
    at = probability_nonzero(torch.tensor([4.605, 0.0, -4.605]), 2 / 3)
    assert torch.allclose(at, torch.tensor([0.99798, 0.832, 0.04713]), atol=2e-4)
