"""torch.compile traces a whole model, with masks and without, as one graph."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.trainer.models.cases import CASES, random_masks
from trainer.kernels import registry
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import init_weights
from trainer.models.masks import Masks


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Before the test, and after it."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "operators"])
@pytest.mark.parametrize(
    "masked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "masked"]
)
@pytest.mark.parametrize("name", ["mistral-window", "gpt_neox"])
def test_one_graph_with_the_same_loss_and_gradients(
    name: str, masked: bool, reference: bool
) -> None:
    """`reference`: what computes the operators is traced too; otherwise each is one node."""
    config = ModelConfig.from_hf(CASES[name])
    model = CausalLM(config)
    init_weights(model, seed=0)
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for call in (model, compiled):
        masks = random_masks(1) if masked else Masks()
        run = masks.compact(config, multiple=4) if masked else None
        with patch.object(registry, "runs_reference", lambda *_: reference):
            loss = call(ids, run, ids.roll(-1, 1)).loss
        inputs: dict[str, Tensor] = dict(model.named_parameters()) | masks.tensors()
        gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        found.append({"loss": loss, **dict(zip(inputs, gradients, strict=True))})
    assert sum(value is not None for value in found[0].values()) > 10
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
