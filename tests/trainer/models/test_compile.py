"""torch.compile traces a whole model, with masks and without, as one graph."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.trainer.kernels.backends import INTERPRETED
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


# Kernels run in Triton's interpreter, for which the last test runs this file again.
CHOICES: list[registry.Kernels] = ["triton"] if INTERPRETED else ["reference", "auto"]


@pytest.mark.parametrize("kernels", CHOICES)
@pytest.mark.parametrize(
    "masked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "masked"]
)
@pytest.mark.parametrize("name", ["mistral-window", "gpt_neox"])
def test_one_graph_with_the_same_loss_and_gradients(
    name: str, masked: bool, kernels: registry.Kernels
) -> None:
    """The reference is traced too; otherwise each operator that has a kernel is one node."""
    config = ModelConfig.from_hf(CASES[name])
    model = CausalLM(config)
    init_weights(model, seed=0)
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for call in (model, compiled):
        masks = random_masks(1) if masked else Masks()
        run = masks.compact(config, multiple=4) if masked else None
        with registry.chosen(kernels, "cpu"):
            loss = call(ids, run, ids.roll(-1, 1)).loss
            inputs: dict[str, Tensor] = dict(model.named_parameters()) | masks.tensors()
            gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        found.append({"loss": loss, **dict(zip(inputs, gradients, strict=True))})
    assert sum(value is not None for value in found[0].values()) > 10
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_kernels_are_nodes_of_one_graph() -> None:
    pytest.importorskip("triton")
    # Without this test itself.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [*command, __file__], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert "2 passed" in result.stdout
