"""Packed documents give what each gives alone: logits, losses and gradients, in every family."""

import pytest
import torch
from torch import Tensor

from tests.trainer.models.cases import CASES, pair, random_masks
from trainer.models.decoder import LossOutput, next_token_targets
from trainer.models.masks import Masks
from trainer.models.rope import positions_in

ROWS = ((13, 1, 22, 14), (50,), (1, 2, 46, 1), (25, 25))
"""Lengths of the documents in rows of 50."""
DOCUMENTS = torch.stack(
    [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in ROWS]
)
NAMES = (
    "llama",
    "llama-3-rope",
    "mistral-window",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "gpt_neox-sequential",
)


def alone(ids: Tensor) -> list[Tensor]:
    """Each document as a batch of its own, in order."""
    return [
        part.unsqueeze(0)
        for row, lengths in zip(ids, ROWS, strict=True)
        for part in row.split(lengths)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_documents_alone(name: str) -> None:
    model, reference = pair(name)
    ids = torch.randint(0, 61, (4, 50))
    with torch.no_grad():
        packed = model(ids, documents=DOCUMENTS)
        expected = torch.cat([reference(part).logits[0] for part in alone(ids)])
    assert (packed.flatten(0, 1) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_losses_and_gradients_equal_those_of_documents_alone(
    name: str, masked: bool, checkpointing: bool
) -> None:
    # In fp64 rounding is no excuse.
    model, _ = pair(name, torch.float64)
    model.frequencies = model.frequencies.double()
    model.checkpoint_activations = checkpointing
    masks = random_masks(1, torch.float64) if masked else Masks()
    leaves = [*model.parameters(), *masks.tensors().values()]
    ids = torch.randint(0, 61, (4, 50))
    targets, valid = next_token_targets(ids, documents=DOCUMENTS)
    output = model(ids, masks, targets, valid.double(), documents=DOCUMENTS)
    assert isinstance(output, LossOutput)
    total = torch.zeros((), dtype=torch.float64)
    for part in alone(ids):
        targets, counted = next_token_targets(part)
        single = model(part, masks, targets, counted.double())
        assert isinstance(single, LossOutput)
        total = total + single.loss
    torch.testing.assert_close(output.loss, total, rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(output.loss, leaves)
    for ours, theirs in zip(found, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_one_document_a_row_is_as_none(name: str) -> None:
    model, _ = pair(name)
    ids = torch.randint(0, 61, (2, 50))
    with torch.no_grad():
        plain, one = model(ids), model(ids, documents=torch.zeros_like(ids))
    assert (plain - one).abs().max() <= 1e-5


def test_no_document_sees_another() -> None:
    model, _ = pair("llama")
    ids = torch.randint(0, 61, (4, 50))
    changed = ids.clone()
    changed[0, :13] = (ids[0, :13] + 1) % 61
    with torch.no_grad():
        before, after = (model(x, documents=DOCUMENTS) for x in (ids, changed))
        joined = (model(x) for x in (ids, changed))
    difference = (before - after).abs().amax(-1)
    assert (difference[0, :13] > 0).all() and (difference[0, 13:] == 0).all()
    assert (difference[1:] == 0).all()
    first, second = joined
    assert ((first - second).abs().amax(-1)[0] > 0).all()


def test_positions_begin_anew_where_the_number_changes() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 2, 2], [7, 3, 3, 7, 7, 7], [0, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 2, 0, 0, 1], [0, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert positions_in(documents).tolist() == expected
    assert positions_in(documents.int()).tolist() == expected


def test_the_last_token_of_a_document_predicts_nothing() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    targets, counted = next_token_targets(ids, documents=documents)
    assert targets[0, :4].tolist() == [6, 7, 8, 9]
    assert counted.tolist() == [[True, False, True, True, False]]
    valid = torch.tensor([[True, True, True, False, True]]).numpy()
    counted = next_token_targets(ids, valid, documents)[1]
    assert counted.tolist() == [[True, False, False, True, False]]
