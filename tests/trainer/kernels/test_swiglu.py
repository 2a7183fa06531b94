"""swiglu against its formula in fp64, for every implementation."""

import random

import pytest
import torch
from torch import Tensor

from tests.trainer.kernels.backends import large
from tests.trainer.kernels.comparison import (
    DTYPES,
    compare,
    compiles,
    draw_mask,
    draw_rows,
)
from trainer.kernels.swiglu import swiglu

SHAPES = ((1, 1), (7, 2), (3, 11, 15), (2, 3, 16), (130, 33), (40, 130), (3, 7, 300), (2, 1100))
WIDE = large((257, 5504), (1031, 11008))


def formula(gate: Tensor, up: Tensor, mask: Tensor | None) -> Tensor:
    product = gate / (1 + (-gate).exp()) * up
    return product if mask is None else product * mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
def test_equals_formula(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = random.Random(f"{shape} {dtype}")
    torch.manual_seed(generator.randrange(2**31))
    gate, up = draw_rows(shape, dtype, generator), draw_rows(shape, dtype, generator)
    inputs = (gate, up, draw_mask(shape[-1], generator))
    compare(swiglu, formula, inputs, roundings=3 if backend == "reference" else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_of_one_projection(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    both, mask = torch.randn(2, 5, 48).to(dtype), torch.rand(24)

    def of_both(operator: object) -> object:
        return lambda both, mask: operator(*both.split(24, -1), mask)  # type: ignore[operator]

    inputs, roundings = (both, mask), 3 if backend == "reference" else 1
    compare(of_both(swiglu), of_both(formula), inputs, roundings=roundings)  # type: ignore[arg-type]


def test_large_gates_do_not_overflow(backend: str) -> None:
    gate = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0]], requires_grad=True)
    up = torch.ones(1, 5, requires_grad=True)
    mask = torch.ones(5, requires_grad=True)
    result = swiglu(gate, up, mask)
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.0, 0.0, 90.0, 200.0]]))
    d_gate, d_up, d_mask = torch.autograd.grad(result.sum(), (gate, up, mask))
    torch.testing.assert_close(d_gate, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]))
    torch.testing.assert_close(d_up, result)
    torch.testing.assert_close(d_mask, result[0])


def test_mask_gradient_is_exact_where_the_mask_is_zero(backend: str) -> None:
    gate, up = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    mask = torch.tensor([0.0, 1.0], requires_grad=True)
    (found,) = torch.autograd.grad(swiglu(gate, up, mask).sum(), mask)
    torch.testing.assert_close(found, formula(gate.double(), up.double(), None).sum(0).float())


def test_without_rows(backend: str) -> None:
    gate, up = (torch.zeros(0, 8, requires_grad=True) for _ in range(2))
    mask = torch.ones(8, requires_grad=True)
    result = swiglu(gate, up, mask)
    assert result.shape == (0, 8)
    found = torch.autograd.grad(result.sum(), (gate, up, mask))
    assert found[2].tolist() == [0.0] * 8


def test_same_bits_every_time(backend: str) -> None:
    torch.manual_seed(2)
    inputs = (torch.randn(150, 40), torch.randn(150, 40), torch.rand(40))
    results = []
    for _ in range(3):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        result = swiglu(*leaves)
        results.append([result, *torch.autograd.grad(result.square().sum(), leaves)])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("masked", [True, False])
def test_operator_is_registered_correctly(backend: str, masked: bool) -> None:
    gate, up = (torch.randn(6, 10, requires_grad=True) for _ in range(2))
    mask = torch.rand(10, requires_grad=True) if masked else None
    torch.library.opcheck(torch.ops.shorn.swiglu.default, (gate, up, mask))
    detached = [None if t is None else t.detach() for t in (gate, up, mask)]
    gradient = torch.randn(6, 10)
    torch.library.opcheck(torch.ops.shorn.swiglu_backward.default, (gradient, *detached))


def test_compiles_without_graph_break(backend: str) -> None:
    torch.manual_seed(3)
    inputs = [torch.randn(6, 10), torch.randn(6, 10), torch.rand(10)]
    compiles(lambda gate, up, mask: swiglu(gate, up, mask).square().sum(), inputs)


def test_fp64_keeps_its_precision(backend: str) -> None:
    torch.manual_seed(4)
    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 4), (3, 4), (4,))
    ]
    assert torch.autograd.gradcheck(swiglu, inputs)


WRONG = [
    ({"gate": torch.zeros(2, 4, dtype=torch.int64)}, "gate must be fp64, fp32, bf16 or fp16, got"),
    ({"gate": torch.zeros(4, 2).t()}, "gate must be contiguous in its last dimension, got strides"),
    ({"up": torch.zeros(2, 5)}, "up must be [2, 4] torch.float32 on cpu, got [2, 5] torch.float32"),
    ({"up": torch.zeros(2, 4).bfloat16()}, "on cpu, got [2, 4] torch.bfloat16 on cpu"),
    ({"up": torch.zeros(4, 2).t()}, "up must be contiguous in its last dimension, got strides (1,"),
    (
        {"mask": torch.zeros(2)},
        "mask must be [4] torch.float32 on cpu, got [2] torch.float32 on cpu",
    ),
    (
        {"mask": torch.zeros(4).double()},
        "mask must be [4] torch.float32 on cpu, got [4] torch.float",
    ),
    ({"mask": torch.zeros(4, device="meta")}, "on cpu, got [4] torch.float32 on meta"),
]


@pytest.mark.cpu
@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_bad_input_is_refused(backend: str, changed: dict[str, Tensor], message: str) -> None:
    given = {"gate": torch.zeros(2, 4), "up": torch.zeros(2, 4), "mask": torch.ones(4), **changed}
    with pytest.raises(ValueError) as caught:
        swiglu(**given)
    assert str(caught.value).startswith("swiglu: ")
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="swiglu: "):
        torch.ops.shorn.swiglu(*given.values())


def test_wrong_gradient_is_refused(backend: str) -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"swiglu: gradient must be \[2, 4\] .* got \[4, 2\]"):
        torch.ops.shorn.swiglu_backward(torch.zeros(4, 2), x, x, None)
