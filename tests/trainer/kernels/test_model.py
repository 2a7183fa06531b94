"""A model's loss and gradients with its operators as kernels, against those with PyTorch alone."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.trainer.kernels.backends import DEVICE, INTERPRETED, running
from tests.trainer.models.cases import CASES, random_masks
from trainer import parallel
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import init_weights

FAMILIES = ("llama-mha", "mistral-window", "qwen3", "gpt_neox")
TOLERANCE = 1e-5 if DEVICE == "cpu" else 1e-4
BACKENDS = ("compiled",)


@pytest.fixture(autouse=True)
def only_what_moves(backend: str) -> Iterator[None]:
    """On a GPU is the model and what it is given, and nothing by default: as in training."""
    with torch.device("cpu"):
        yield


def make_ids() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(61, (2, 9), generator=generator).to(DEVICE)


def gradients(
    family: str,
    ids: Tensor,
    *,
    masked: bool,
    recompute: bool = False,
    ranks: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Loss, and gradients of parameters and masks, of a model that is sharded among `ranks` and
    computes in `dtype`."""
    model = CausalLM(ModelConfig.from_hf(CASES[family]))
    model.checkpoint_activations = recompute
    context = parallel.init(threads=1) if ranks else None
    if context is not None:
        parallel.shard(
            model,
            model.blocks,
            context.mesh,
            dtype=dtype,
            reshard_after_forward=True,
        )
    init_weights(model, seed=0)
    model.to(DEVICE)
    masks, leaves = None, {}
    if masked:
        drawn = random_masks(1)
        leaves = {
            name: z.detach().to(DEVICE).requires_grad_() for name, z in drawn.tensors().items()
        }
        masks = drawn.with_tensors(leaves).compact(model.config, multiple=1)
    own = ids if context is None else ids[context.rank :: context.world]
    loss = model(own, masks, targets=own.roll(-1, 1)).loss
    loss.backward()
    found = {"loss": loss.detach()} | {name: gradient(z) for name, z in leaves.items()}
    if context is not None:
        found = {name: context.all_reduce_sum(part) for name, part in found.items()}
    return found | {name: gradient(p) for name, p in model.named_parameters()}


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return parallel.full_tensor(tensor.grad).clone()


def compare(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max()
        assert error <= tolerance * value.abs().max() + 1e-7, name


@pytest.mark.parametrize(("masked", "recompute"), [(False, False), (True, True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_pytorch(family: str, masked: bool, recompute: bool) -> None:
    found = gradients(family, make_ids(), masked=masked, recompute=recompute)
    with running("reference"):
        expected = gradients(family, make_ids(), masked=masked)
    compare(found, expected)


@pytest.mark.cpu
@pytest.mark.parametrize("masked", [True] if INTERPRETED else [False, True])
def test_sharded_gradients_equal_those_of_one_process(masked: bool) -> None:
    with running("reference"):
        expected = gradients("qwen3", make_ids(), masked=masked)

    def on_ranks() -> dict[str, Tensor]:
        return gradients("qwen3", make_ids(), masked=masked, recompute=True, ranks=True)

    for found in run_ranks(on_ranks, 2):
        compare(found, expected)


@pytest.mark.cpu
def test_sharded_gradients_in_bf16_are_near_those_in_fp32() -> None:
    with running("reference"):
        expected = gradients("qwen3", make_ids(), masked=True)

    def on_ranks() -> dict[str, Tensor]:
        return gradients("qwen3", make_ids(), masked=True, ranks=True, dtype=torch.bfloat16)

    for found in run_ranks(on_ranks, 2):
        compare(found, expected, 0.1)


def test_without_gradients_nothing_else_changes() -> None:
    """Rotations then overwrite the projections."""
    model = CausalLM(ModelConfig.from_hf(CASES["llama-mha"]))
    init_weights(model, seed=0)
    model.to(DEVICE)
    recorded = model(make_ids())
    with torch.no_grad():
        torch.testing.assert_close(model(make_ids()), recorded, rtol=0, atol=1e-6)
