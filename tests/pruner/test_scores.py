"""The scores that training starts from."""

import pytest
import torch

from pruner.config import MaskConfig, resolve_masks
from pruner.scores import initial_scores, standardise
from pruner.shapes import Shape
from pruner.units import unit_kinds


def test_standardised_rows() -> None:
    rows = torch.stack([torch.linspace(1, 50, 20).double(), torch.full((20,), 3.0).double()])
    scores = standardise(rows)
    assert scores.dtype == torch.float32
    assert scores.mean(-1).abs().max() < 1e-6
    assert scores[0].square().mean().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(scores[1], torch.zeros(20))
    unused = torch.cat([torch.zeros(5), torch.linspace(1, 50, 200)])
    scores = standardise(unused[None])[0]
    assert torch.equal(scores[:5], scores[:1].expand(5)) and scores[0] < scores[5:].min()
    assert scores[5:].std() > 0.5, "units that are never used flatten the rest"
    assert torch.equal(standardise(torch.zeros(1, 3)), torch.zeros(1, 3))


def test_initial_scores_by_rule_and_kind() -> None:
    source = Shape(2, 16, 4, 2, 4, 10)
    kinds = unit_kinds(Shape(2, 8, 4, 2, 4, 5), source)
    importance = {"hidden": torch.arange(1, 17).view(1, 16), "intermediate": torch.rand(2, 10) + 1}

    def start(masks: MaskConfig, seed: int = 0) -> dict[str, torch.Tensor]:
        known = importance if masks.init != "flat" else None
        return initial_scores(kinds, resolve_masks(masks), known, seed, torch.device("cpu"))

    projection = start(MaskConfig())
    assert (projection["hidden"].diff() > 0).all()
    assert projection["hidden"].mean().abs() < 1e-6
    shifted = start(MaskConfig(rule="sheared-llama", init="importance"))
    assert torch.allclose(shifted["hidden"], projection["hidden"] + 2)
    assert torch.equal(start(MaskConfig(init="taylor"))["hidden"], projection["hidden"])
    assert torch.equal(start(MaskConfig(init="magnitude"))["hidden"], projection["hidden"])
    flat = start(MaskConfig(init="flat"))
    assert flat["intermediate"].abs().max() < 0.1 and flat["intermediate"].std() > 0
    for seed in (-1, 2**63, 2**64, -(2**70)):
        assert start(MaskConfig(init="flat"), seed)["intermediate"].isfinite().all()
    published = start(MaskConfig(rule="sheared-llama"))
    assert abs(published["hidden"].mean().item() - 5) < 0.02
    assert torch.equal(flat["hidden"], start(MaskConfig(init="flat"))["hidden"])
    assert not torch.equal(flat["hidden"], start(MaskConfig(init="flat"), seed=1)["hidden"])
