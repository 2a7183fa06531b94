"""All deletions in one pass are those of the naive loop."""

import pytest
import torch
from torch import Tensor

from pruner.extract import Extraction
from pruner.shorten.deletion import deletion_losses
from pruner.shorten.parts import Part, Units, marks, parts_of, without
from tests.pruner.test_refit import CASES, build, tokens
from trainer.models.decoder import CausalLM, LossOutput, next_token_targets
from trainer.models.masks import Masks


def naive(model: CausalLM, ids: Tensor, removed: list[int]) -> Tensor:
    """Summed losses [B] of the model without some blocks."""
    masks = None
    if removed:
        layer = torch.ones(model.config.num_layers)
        layer[removed] = 0
        masks = Masks(layer=layer).compact(model.config, multiple=1)
    targets, valid = next_token_targets(ids)
    with torch.no_grad():
        output = model(ids, masks, targets=targets, weights=valid.float())
    assert isinstance(output, LossOutput)
    return output.token_loss.double().sum(-1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gone", [None, 0, 1, 2])
def test_losses_are_those_of_one_pass_for_each_block(name: str, gone: int | None) -> None:
    model = build(name)
    assert model.config.num_layers == 3
    ids = tokens(3)
    removed = [] if gone is None else [gone]
    masks = None
    if gone is not None:
        layer = torch.ones(3)
        layer[gone] = 0
        masks = Masks(layer=layer).compact(model.config, multiple=1)
    blocks = [index for index in range(3) if index != gone]
    found = deletion_losses(model, ids, [Part("layer", index) for index in blocks], masks)
    expected = [naive(model, ids, removed), *(naive(model, ids, [*removed, i]) for i in blocks)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
    # Blocks matter, or nothing would have been compared.
    assert (found - found[:1])[1:].abs().min() > 1e-2
    # Hooks are gone.
    torch.testing.assert_close(naive(model, ids, removed), found[0], rtol=1e-5, atol=1e-5)


def test_some_blocks_alone_may_be_left_out() -> None:
    model = build("llama")
    ids = tokens(2)
    for blocks in ([0], [2], [0, 2]):
        found = deletion_losses(model, ids, [Part("layer", index) for index in blocks])
        expected = [naive(model, ids, []), *(naive(model, ids, [index]) for index in blocks)]
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("units", ["attention", "feed-forward", "both"])
@pytest.mark.parametrize("gone", [None, 0, 3])
def test_layers_by_themselves(name: str, units: Units, gone: int | None) -> None:
    """Against a model that is built without the layer."""
    model = build(name)
    ids = tokens(3)
    every = parts_of("both", 3)
    removed = [] if gone is None else [every[gone]]
    parts = [part for part in parts_of(units, 3) if part not in removed]
    masks = without(removed, model.config, torch.device("cpu")) if removed else None
    found = deletion_losses(model, ids, parts, masks)
    expected = [rebuilt(model, ids, [*removed, *own]) for own in ([], *([part] for part in parts))]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert (found - found[:1])[1:].abs().amax(1).min() > 1e-2


def rebuilt(model: CausalLM, ids: Tensor, removed: list[Part]) -> Tensor:
    """Summed losses [B] of a smaller model."""
    rows = {kind: row.float() for kind, row in marks(removed, 3).items()}
    extraction = Extraction(model.config, Masks.of(rows))
    smaller = CausalLM(extraction.config)
    source = ((name, value.detach()) for name, value in model.named_parameters())
    smaller.load_state_dict(dict(extraction.tensors(source)))
    return naive(smaller, ids, [])
