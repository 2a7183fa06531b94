"""A rotated model is the same function, ordered by principal components."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.errors import InputError
from pruner.rotation import measure_rotation, principal_rotation, rotate
from tests.distributed import run_ranks
from tests.factories import write_model
from tests.trainer.models.cases import LLAMA_CASES, pair
from trainer import parallel
from trainer.config import TrainConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_config
from trainer.models.masks import Masks
from trainer.run import build_model, pretrained
from trainer.saving import full_tensors

IDS = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(4))


def random_rotation(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    orthogonal: Tensor = torch.linalg.qr(noise).Q
    return orthogonal


def final_gain(model: CausalLM) -> Tensor:
    (gain,) = model.get_submodule(model.names.final_norm).parameters()
    return gain


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", LLAMA_CASES)
@torch.no_grad()
def test_a_rotated_model_is_the_same_function(name: str) -> None:
    model, _ = pair(name, torch.float64)
    if model.config.tie_embeddings:
        final_gain(model).fill_(0.7)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = model(IDS)
    rotate(model, random_rotation(model.config.hidden_size))
    assert distance(model(IDS), expected) < 1e-10
    embedding = "model.embed_tokens.weight"
    assert distance(model.get_parameter(embedding), before[embedding]) > 0.5


@torch.no_grad()
def test_weights_keep_their_size_and_gains_become_uniform() -> None:
    model, _ = pair("llama", torch.float64)
    before = {name: p.clone() for name, p in model.named_parameters()}
    rotate(model, random_rotation(model.config.hidden_size))
    for name, parameter in model.named_parameters():
        assert float(parameter.norm() / before[name].norm()) == pytest.approx(1, abs=0.35), name
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, parameter[:1].expand_as(parameter)), name


@torch.no_grad()
def test_gains_of_zero_leave_finite_weights() -> None:
    model, _ = pair("llama", torch.float64)
    model.get_parameter("model.layers.0.input_layernorm.weight").zero_()
    expected = model(IDS)
    rotate(model, random_rotation(model.config.hidden_size))
    assert distance(model(IDS), expected) < 1e-10


def test_principal_components_are_ordered_and_orthogonal() -> None:
    torch.manual_seed(0)
    factor = torch.randn(200, 12, dtype=torch.float64) * torch.logspace(0, -2, 12)
    covariance = factor.t() @ factor
    rotation = principal_rotation(covariance, torch.ones(12), tied=False)
    torch.testing.assert_close(rotation.t() @ rotation, torch.eye(12, dtype=torch.float64))
    rotated = rotation.t() @ covariance @ rotation
    values = torch.diagonal(rotated)
    assert (values.diff() <= 0).all()
    assert (rotated - torch.diag(values)).abs().max() < 1e-9 * values.max()
    # The sign is fixed: the largest entry of each component is positive.
    assert (rotation.gather(0, rotation.abs().argmax(0, keepdim=True)) > 0).all()


def test_tied_models_keep_dimensions_with_other_final_gains() -> None:
    torch.manual_seed(0)
    factor = torch.randn(100, 8, dtype=torch.float64)
    gain = torch.tensor([2.0, 2.1, -2.0, 1.9, 5.0, 2.3, 1.7, 2.0])
    rotation = principal_rotation(factor.t() @ factor, gain, tied=True)
    for kept in (2, 4):
        column = rotation[kept].nonzero()
        assert column.numel() == 1 and rotation[kept, column] == 1
        assert rotation[:, column.flatten()].nonzero().shape[0] == 1
    assert (rotation[0] != 0).sum() == 6
    torch.testing.assert_close(rotation.t() @ rotation, torch.eye(8, dtype=torch.float64))


@torch.no_grad()
def test_tied_models_are_nearly_the_same_function() -> None:
    model, _ = pair("llama-tied-head-dim", torch.float64)
    gain = final_gain(model)
    gain.copy_(1.8 + 0.05 * torch.randn(gain.shape))
    gain[3] = -4
    expected = model(IDS)
    context = parallel.init(threads=1)
    rotate(model, measure_rotation(model, IDS, context, 2))
    assert 0 < distance(model(IDS), expected) < 0.1


@torch.no_grad()
def test_pruned_components_carry_less_than_pruned_dimensions() -> None:
    """Streams of low rank lose nothing in their principal components."""
    model, _ = pair("qwen2", torch.float64)
    width, rank = model.config.hidden_size, 16
    low = random_rotation(width)[:, :rank]
    for name, parameter in model.named_parameters():
        if name.endswith(("embed_tokens.weight",)):
            parameter.copy_(parameter @ low @ low.t())
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.copy_(low @ low.t() @ parameter)
    expected = model(IDS)
    hidden = (torch.arange(width) < rank).double()
    cut = distance(model(IDS, Masks(hidden=hidden, hold_scale=True)), expected)
    rotate(model, measure_rotation(model, IDS, parallel.init(threads=1), 2))
    kept = distance(model(IDS, Masks(hidden=hidden, hold_scale=True)), expected)
    # Not exactly: the norms' eps counts for another share of the mean square.
    assert kept < 1e-3 < 0.1 < cut


def rotated_model(folder: Path, replicas: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    context = parallel.init(threads=1, replicas=replicas)
    config = TrainConfig(precision="fp32", replicas=replicas)
    model = build_model(load_config(folder), config, context, load=pretrained(folder))
    rotation = measure_rotation(model, IDS, context, 1)
    rotate(model, rotation)
    return {name: tensor.clone() for name, tensor in full_tensors(model)}, rotation


@pytest.mark.parametrize("replicas", [1, 2])
def test_ranks_rotate_their_shards_as_one_rank_does(replicas: int, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", attention_bias=True, tie_word_embeddings=False)
    ((expected, rotation),) = run_ranks(rotated_model, 1, folder)
    for tensors, own in run_ranks(rotated_model, 4, folder, replicas):
        assert (own - rotation).abs().max() < 1e-6
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_stream_that_is_not_finite_is_refused() -> None:
    model, _ = pair("llama")
    model.get_parameter("model.embed_tokens.weight").fill_(float("nan"))
    with pytest.raises(InputError, match=r"residual stream .* is not finite"):
        measure_rotation(model, IDS, parallel.init(threads=1), 2)
