"""Moments are folded as the weights they belong to."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pruner.extract import Extraction
from pruner.moments import save_moments
from pruner.shapes import shape_of
from tests.factories import write_model
from tests.pruner.test_refit import CASES, build, half_masks, tokens
from tests.trainer.tiny import options
from trainer import parallel
from trainer.loop import Trainer
from trainer.models.decoder import CausalLM, next_token_targets
from trainer.models.masks import Masks
from trainer.moments import FILE


def soft(masks: Masks) -> Masks:
    """`masks` in fp64, whose units above 0 get random values between 0.3 and 1."""
    draw = torch.Generator().manual_seed(3)
    values = {name: z.double() for name, z in masks.tensors().items()}
    changed = {
        name: z * (0.3 + 0.7 * torch.rand(z.shape, generator=draw)) for name, z in values.items()
    }
    return masks.with_tensors(changed)


def gradients(model: CausalLM, masks: Masks | None = None) -> dict[str, Tensor]:
    ids = tokens()
    targets, valid = next_token_targets(ids)
    model(ids, masks=masks, targets=targets, weights=valid.double() / valid.sum()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def stand_in(model: CausalLM, state: dict[str, dict[str, Tensor]], **train: Any) -> Trainer:
    """What of a trainer holds moments: `state` by kind and parameter name."""
    parameters = dict(model.named_parameters())
    found: dict[Any, dict[str, Tensor]] = {p: {} for p in parameters.values()}
    for kind, tensors in state.items():
        for name, tensor in tensors.items():
            found[parameters[name]][kind] = tensor
    trainer = SimpleNamespace(
        model=model,
        optimizer=SimpleNamespace(state=found),
        context=parallel.init(threads=1),
        config=options(**train),
        step=7,
    )
    return cast(Trainer, trainer)


@pytest.mark.parametrize("hold_scale", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_gradient_becomes_that_of_the_pruned_model(
    name: str, hold_scale: bool, tmp_path: Path
) -> None:
    """The masked model and the pruned one are one function, so a moment that is the gradient of
    the first must come out as the gradient of the second."""
    model = build(name).double()
    masks = soft(half_masks(shape_of(model.config)))
    masks = replace(masks, hold_scale=hold_scale)
    extraction = Extraction(model.config, masks)
    own = gradients(model, masks)
    pruned = CausalLM(extraction.config).double()
    weights = [(key, value.detach()) for key, value in model.named_parameters()]
    pruned.load_state_dict(dict(extraction.tensors(weights)))
    wanted = gradients(pruned)
    squares = {key: value.square() for key, value in own.items()}
    write_model(tmp_path / "model")
    trainer = stand_in(model, {"exp_avg": own, "exp_avg_sq": squares})
    save_moments(trainer, extraction, tmp_path)
    found = load_file(tmp_path / FILE)
    assert found.keys() == {f"{kind}/{key}" for key in wanted for kind in ("exp_avg", "exp_avg_sq")}
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[f"exp_avg/{key}"], gradient)
        torch.testing.assert_close(found[f"exp_avg_sq/{key}"], gradient.square())
