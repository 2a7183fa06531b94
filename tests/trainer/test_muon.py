"""Muon against a plain reference in fp64 and torch's own, on any number of ranks, and resumed."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from data.errors import InputError
from tests.distributed import run_ranks
from tests.trainer.models.cases import CASES
from tests.trainer.tiny import SHAPE, losses, make_trainer, options, weights
from trainer import muon, parallel
from trainer.adamw import LocalAdamW
from trainer.loop import Callback, Trainer
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.muon import Muon, orthogonalised
from trainer.optimizer import build_optimizer
from trainer.run import build_model, random_init
from trainer.saving import full_tensors

NEOX = ModelConfig.from_hf(CASES["gpt_neox"])
MATRICES = [(24, 24), (16, 40), (40, 16), (7, 3), (1, 9), (2, 5)]


def by_singular_values(matrix: Tensor) -> Tensor:
    """What the iterations do to each singular value, in fp64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


@pytest.mark.parametrize("shape", MATRICES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    found = orthogonalised(matrix)
    torch.testing.assert_close(found.double(), by_singular_values(matrix), rtol=0, atol=1e-5)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.25


def optimizer_of(matrices: list[nn.Parameter], dtype: torch.dtype, decay: float = 0.1) -> Muon:
    group = {"params": matrices, "momentum": 0.95, "head_rows": 0, "weight_decay": decay}
    return Muon([group], dtype=dtype, lr=0.02, fused=True)


def test_steps_follow_the_formulas() -> None:
    """Nesterov momentum, decoupled weight decay and Moonlight's scale, in fp64."""
    torch.manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape)) for shape in MATRICES]
    expected = [matrix.detach().double() for matrix in matrices]
    momenta = [torch.zeros_like(value) for value in expected]
    optimizer = optimizer_of(matrices, torch.float32)
    for rate in (0.02, 0.01, 0.005):
        optimizer.param_groups[0]["lr"] = rate
        for index, matrix in enumerate(matrices):
            matrix.grad = torch.randn_like(matrix)
            gradient = matrix.grad.double()
            momenta[index] = 0.95 * momenta[index] + 0.05 * gradient
            ahead = 0.95 * momenta[index] + 0.05 * gradient
            scale = 0.2 * max(matrix.shape) ** 0.5
            decayed = expected[index] * (1 - rate * 0.1)
            expected[index] = decayed - rate * scale * by_singular_values(ahead)
        optimizer.step()
    for matrix, value in zip(matrices, expected, strict=True):
        torch.testing.assert_close(matrix.detach().double(), value, rtol=0, atol=1e-5)


def test_in_bf16_it_is_torchs_own() -> None:
    """Bit for bit, on matrices that are not sharded."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in MATRICES]
    theirs = [nn.Parameter(matrix.detach().clone()) for matrix in ours]
    mine = optimizer_of(ours, torch.bfloat16)
    other = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for own, twin in zip(ours, theirs, strict=True):
            own.grad = torch.randn_like(own)
            twin.grad = own.grad.clone()
        mine.step()
        other.step()
    assert all(torch.equal(own, twin) for own, twin in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_an_update_is_as_large_as_adamws(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.zeros(shape))
    matrix.grad = 1e-4 * torch.randn(shape)
    optimizer_of([matrix], torch.float32).step()
    assert matrix.detach().square().mean().sqrt().item() / 0.02 == pytest.approx(0.2, rel=0.2)


def test_zero_gradients_move_nothing() -> None:
    """Neither a whole matrix of them nor rows and columns of units that are off."""
    torch.manual_seed(0)
    still, partly = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 8))
    before = [still.detach().clone(), partly.detach().clone()]
    still.grad, partly.grad = torch.zeros_like(still), torch.randn_like(partly)
    partly.grad[2:4] = 0.0
    partly.grad[:, 5:] = 0.0
    optimizer_of([still, partly], torch.float32, decay=0.0).step()
    moved = partly.detach() != before[1]
    assert torch.equal(still, before[0])
    assert not moved[2:4].any() and not moved[:, 5:].any()
    assert moved[[0, 1, 4, 5], :5].all()


def test_queries_keys_and_values_of_one_matrix_are_three() -> None:
    """Rows are, for each of 4 heads, 2 of its query, 2 of its key and 2 of its value."""
    torch.manual_seed(0)
    sizes = torch.tensor([1.0, 1e-3, 50.0]).repeat_interleave(2).repeat(4)
    matrix = sizes[:, None] * torch.randn(24, 10)
    found = orthogonalised(matrix, 2).view(4, 3, 2, 10)
    for index in range(3):
        part = matrix.view(4, 3, 2, 10)[:, index].reshape(8, 10)
        expected = by_singular_values(part).view(4, 2, 10)
        torch.testing.assert_close(found[:, index].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [replace(SHAPE, tie_embeddings=False), NEOX])
def test_only_matrices_in_blocks_are_muons(shape: ModelConfig) -> None:
    model = CausalLM(shape)
    optimizer = build_optimizer(model, options(optimizer="muon", weight_decay=0.3))
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon: dict[str, int] = {}
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.3 if group["params"][0].ndim == 2 else 0.0)
        if "momentum" in group:
            by_muon |= {names[p]: group["head_rows"] for p in group["params"]}
    expected = {name: p for p, name in names.items() if p.ndim == 2 and "layers." in name}
    assert by_muon.keys() == expected.keys()
    assert sum(p.numel() for p in expected.values()) == shape.block_matrices
    for name, head_rows in by_muon.items():
        assert head_rows == (shape.head_dim if "query_key_value" in name else 0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_adamw_stays_the_default() -> None:
    optimizer = build_optimizer(CausalLM(SHAPE), options())
    assert type(optimizer) is LocalAdamW
    assert all("momentum" not in group for group in optimizer.param_groups)


def test_a_frozen_model_has_nothing_to_update() -> None:
    model = CausalLM(SHAPE).requires_grad_(False)
    optimizer = build_optimizer(model, options(optimizer="muon"))
    optimizer.step()
    assert not optimizer.state


def given_gradients(shape: ModelConfig, replicas: int, precision: str) -> dict[str, np.ndarray]:
    """Weights and moments after steps on gradients that are the same on any number of ranks."""
    context = parallel.init(replicas=replicas, threads=1)
    config = options(optimizer="muon", replicas=replicas, precision=precision)
    model = build_model(shape, config, context, load=random_init(0))
    optimizer = build_optimizer(model, config)
    for step in range(3):
        torch.manual_seed(step)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                parameter.grad = distribute_tensor(gradient, mesh, placements)
            else:
                parameter.grad = gradient
        optimizer.step()
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    found = dict(full_tensors(model))
    for owner, state in optimizer.state.items():
        if "momentum_buffer" in state:
            momentum = state["momentum_buffer"]
            assert parallel.to_local(momentum).shape == parallel.to_local(owner).shape
            found[f"momentum of {names[owner]}"] = parallel.full_tensor(momentum)
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize(
    ("shape", "precision", "batch"),
    [(SHAPE, "fp32", muon.BATCH), (SHAPE, "bf16", 300), (NEOX, "fp32", muon.BATCH)],
)
def test_ranks_share_the_work_of_one(
    shape: ModelConfig, precision: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices bit for bit, with shards of different sizes on 3 ranks, and in many exchanges."""
    monkeypatch.setattr(muon, "BATCH", batch)
    (expected,) = run_ranks(given_gradients, 1, shape, 1, precision)
    assert any(name.startswith("momentum of") for name in expected)
    for world, replicas in ((2, 1), (3, 1), (4, 2)):
        for found in run_ranks(given_gradients, world, shape, replicas, precision):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                # AdamW's own updates round by where a shard ends in memory.
                off = 0.0 if f"momentum of {name}" in expected or " of " in name else 1e-7
                np.testing.assert_allclose(found[name], value, rtol=0, atol=off, err_msg=name)


def rows_of_few() -> list[list[float]]:
    """Matrices of fewer rows than ranks, some on no rank but the first."""
    context = parallel.init(threads=1)
    torch.manual_seed(0)
    values = [(torch.randn(shape), torch.randn(shape)) for shape in MATRICES]
    matrices = []
    for value, gradient in values:
        matrix = nn.Parameter(distribute_tensor(value, context.mesh, [muon.Shard(0)]))
        matrix.grad = distribute_tensor(gradient, context.mesh, [muon.Shard(0)])
        matrices.append(matrix)
    optimizer_of(matrices, torch.float32).step()
    return [parallel.full_tensor(matrix.detach()).flatten().tolist() for matrix in matrices]


def test_ranks_without_rows_take_part() -> None:
    (expected,) = run_ranks(rows_of_few, 1)
    for world in (3, 5):
        assert run_ranks(rows_of_few, world) == [expected] * world


def test_work_is_divided_evenly() -> None:
    assert muon._owners([5, 1, 9, 4, 1], 2) == [1, 0, 0, 1, 1]
    assert muon._rows_of_ranks(10, 4) == [3, 3, 3, 1]
    assert muon._rows_of_ranks(2, 4) == [1, 1, 0, 0]
    assert list(muon._batches([4, 4, 9, 1, 1], 8)) == [[0, 1], [2], [3, 4]]
    assert list(muon._batches([4, 4], 0)) == [[0], [1]]


class Stop(Callback):
    """Ends the run after a step as a signal does, without one."""

    name: ClassVar[str] = "stop"

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Trainer) -> None:
        trainer.stopping = trainer.step == self.step


def train(workspace: Path, output: Path, replicas: int = 1, stop: int = 0) -> dict[str, np.ndarray]:
    """Weights after 6 steps, or `stop` of them, from the newest checkpoint."""
    config = options(
        optimizer="muon", steps=6, save_interval=3, global_batch=12, micro_batch=1, lr=3e-3
    )
    config = replace(config, replicas=replicas)
    trainer = make_trainer(workspace, output, config, callbacks=[Stop(stop)])
    assert isinstance(trainer.optimizer, Muon)
    trainer.fit()
    return {name: value.numpy() for name, value in weights(trainer).items()}


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_is_the_same(workspace: Path, tmp_path: Path, world: int) -> None:
    """Bit for bit on as many ranks; and the loss falls."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run_ranks(train, world, workspace, whole)
    run_ranks(train, world, workspace, parts, 1, 3)
    assert len(losses(parts)) == 3
    found = run_ranks(train, world, workspace, parts)
    assert losses(parts) == losses(whole)
    for own, other in zip(found, expected, strict=True):
        for name, value in other.items():
            np.testing.assert_array_equal(own[name], value, err_msg=name)
    assert losses(whole)[-1] < losses(whole)[0] - 0.05


def test_the_number_of_ranks_changes_rounding_alone(workspace: Path, tmp_path: Path) -> None:
    """Also where a run goes on with another number of ranks than it began with."""
    run_ranks(train, 1, workspace, tmp_path / "one")
    run_ranks(train, 3, workspace, tmp_path / "more", 1, 3)
    run_ranks(train, 4, workspace, tmp_path / "more", 2)
    expected = losses(tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "more"), expected, rtol=0, atol=1e-5)


def test_a_momentum_without_muon_is_refused() -> None:
    with pytest.raises(InputError, match=r"--muon-momentum 0\.9: only --optimizer muon"):
        options(muon_momentum=0.9)
    with pytest.raises(InputError, match=r"--muon-momentum 1\.0: must be in \[0, 1\)"):
        options(optimizer="muon", muon_momentum=1.0)
    assert options(optimizer="muon").momentum == 0.95
    assert options(optimizer="muon", muon_momentum=0.0).momentum == 0.0
    assert options().momentum is None
