"""swiglu against its formula in fp64, for every implementation."""

import random

import pytest
import torch
from torch import Tensor

from tests.trainer.kernels.backends import large
from tests.trainer.kernels.comparison import DTYPES, compare, compiles, draw_rows
from trainer.kernels import registry
from trainer.kernels.swiglu import swiglu

SHAPES = ((1, 1), (7, 2), (3, 11, 15), (2, 3, 16), (130, 33), (40, 130), (3, 7, 300), (2, 1100))
WIDE = large((257, 5504), (1031, 11008))


def formula(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def roundings(x: Tensor) -> int:
    """The reference rounds after every operation."""
    return 1 if registry.runs_kernels("swiglu", x) else 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
def test_equals_formula(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = random.Random(f"{shape} {dtype}")
    torch.manual_seed(generator.randrange(2**31))
    gate, up = draw_rows(shape, dtype, generator), draw_rows(shape, dtype, generator)
    compare(swiglu, formula, (gate, up), roundings=roundings(gate))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_of_one_projection(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    both = torch.randn(2, 5, 48).to(dtype)

    def of_both(operator: object) -> object:
        return lambda both: operator(*both.split(24, -1))  # type: ignore[operator]

    compare(of_both(swiglu), of_both(formula), (both,), roundings=roundings(both))  # type: ignore[arg-type]


def test_large_gates_do_not_overflow(backend: str) -> None:
    gate = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0]], requires_grad=True)
    up = torch.ones(1, 5, requires_grad=True)
    result = swiglu(gate, up)
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.0, 0.0, 90.0, 200.0]]))
    d_gate, d_up = torch.autograd.grad(result.sum(), (gate, up))
    torch.testing.assert_close(d_gate, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]))
    torch.testing.assert_close(d_up, result)


def test_without_rows(backend: str) -> None:
    gate, up = (torch.zeros(0, 8, requires_grad=True) for _ in range(2))
    result = swiglu(gate, up)
    assert result.shape == (0, 8)
    for found in torch.autograd.grad(result.sum(), (gate, up)):
        assert found.shape == (0, 8)


def test_same_bits_every_time(backend: str) -> None:
    torch.manual_seed(2)
    inputs = (torch.randn(150, 40), torch.randn(150, 40))
    results = []
    for _ in range(3):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        result = swiglu(*leaves)
        results.append([result, *torch.autograd.grad(result.square().sum(), leaves)])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_operator_is_registered_correctly(backend: str) -> None:
    gate, up = (torch.randn(6, 10, requires_grad=True) for _ in range(2))
    if not registry.runs_kernels("swiglu", gate):
        pytest.skip("the operator runs kernels only")
    torch.library.opcheck(torch.ops.shorn.swiglu.default, (gate, up))
    backward = (torch.randn(6, 10), gate.detach(), up.detach())
    torch.library.opcheck(torch.ops.shorn.swiglu_backward.default, backward)


def test_compiles_without_graph_break(backend: str) -> None:
    torch.manual_seed(3)
    inputs = [torch.randn(6, 10), torch.randn(6, 10)]
    compiles(lambda gate, up: swiglu(gate, up).square().sum(), inputs)


def test_fp64_keeps_its_precision(backend: str) -> None:
    torch.manual_seed(4)
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(swiglu, inputs)


def test_operator_refuses_what_no_kernel_computes(backend: str) -> None:
    """`swiglu` itself runs the reference then."""
    for x in (torch.zeros(2, 4, dtype=torch.float64), torch.zeros(0, 4)):
        with pytest.raises(ValueError, match=r"swiglu: no kernel computes \[[02], 4\] "):
            torch.ops.shorn.swiglu(x, x)
        assert torch.equal(swiglu(x, x), x)


WRONG = [
    ({"gate": torch.zeros(2, 4, dtype=torch.int64)}, "gate must be fp64, fp32, bf16 or fp16, got"),
    ({"gate": torch.zeros(4, 2).t()}, "gate must be contiguous in its last dimension, got strides"),
    ({"up": torch.zeros(2, 5)}, "up must be [2, 4] torch.float32 on cpu, got [2, 5] torch.float32"),
    ({"up": torch.zeros(2, 4).bfloat16()}, "on cpu, got [2, 4] torch.bfloat16 on cpu"),
    ({"up": torch.zeros(4, 2).t()}, "up must be contiguous in its last dimension, got strides (1,"),
]


@pytest.mark.cpu
@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_bad_input_is_refused(backend: str, changed: dict[str, Tensor], message: str) -> None:
    given = {"gate": torch.zeros(2, 4), "up": torch.zeros(2, 4), **changed}
    with pytest.raises(ValueError) as caught:
        swiglu(**given)
    assert str(caught.value).startswith("swiglu: ")
    assert message in str(caught.value)
    with pytest.raises(ValueError, match="swiglu: "):
        torch.ops.shorn.swiglu(*given.values())


def test_wrong_gradient_is_refused(backend: str) -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"swiglu: gradient must be \[2, 4\] .* got \[4, 2\]"):
        torch.ops.shorn.swiglu_backward(torch.zeros(4, 2), x, x)
